// What every process did in the last recorded steps: a lane each for computing, loading and waiting.

import { duration } from "./format.js";
import { element } from "./format.js";
import * as theme from "./theme.js";

const ROW = 22;
const GAP = 5;
const AXIS = 22;
const LABEL = 132;
const NARROW_LABEL = 92;
const KINDS = [
  ["trunk", "--trunk", "Trunk"],
  ["other", "--head", "Head, sampling, orders"],
  ["layer", "--shadow-step", "Shadow"],
  ["compute", "--compute", "Experts"],
  ["load", "--load", "Load"],
  ["wait", "--wait", "Wait"],
];
const COLOURS = Object.fromEntries(KINDS.map(([kind, colour]) => [kind, colour]));

/** Which of the few colours a span has. */
function family(role, lane, kind) {
  if (lane === "wait") return "wait";
  if (lane === "link") return "load";
  if (kind === "trunk" || kind === "compute") return kind;
  return role === "shadow" && (kind === "layer" || kind === "head" || kind === "prompt") ? "layer" : "other";
}

export class Timeline {
  constructor({ canvas, empty, readout, legend, hold }) {
    Object.assign(this, { canvas, empty, readout, hold });
    this.rows = [];
    this.chosen = null;
    this.recorded = null;
    for (const [, colour, name] of KINDS) {
      const swatch = element("i");
      const paint = () => (swatch.style.background = theme.colour(colour));
      paint();
      theme.onChange(paint);
      legend.append(element("li", {}, swatch, name));
    }
    canvas.addEventListener("pointermove", (event) => this.point(event));
    canvas.addEventListener("pointerleave", () => this.choose(null));
    canvas.addEventListener("keydown", (event) => this.press(event));
    theme.onChange(() => this.draw());
    new ResizeObserver(() => this.draw()).observe(canvas.parentElement);
    this.showEmpty(true);
  }

  get held() {
    return this.hold.checked;
  }

  showEmpty(isEmpty) {
    this.canvas.hidden = isEmpty;
    this.empty.hidden = !isEmpty;
  }

  show(answer) {
    if (this.held || (this.recorded && answer.recorded_s === this.recorded)) return;
    this.recorded = answer.recorded_s;
    this.duration = answer.duration_s;
    this.rows = [];
    for (const process of answer.processes) {
      for (const lane of ["compute", "link", "wait"]) {
        const spans = process.spans.filter((span) => span[0] === lane).map((span) => this.span(process.role, span));
        if (spans.length) this.rows.push({ name: rowName(process, lane), spans });
      }
    }
    this.showEmpty(!this.rows.length);
    this.choose(null);
    this.canvas.setAttribute("aria-label", `Timeline of ${answer.steps} decode steps, ${duration(this.duration)}, ${this.rows.length} lanes. Arrow keys move between spans.`);
    const steps = `${answer.steps} decode ${answer.steps === 1 ? "step" : "steps"}`;
    this.summary = this.rows.length ? `${steps} in ${duration(this.duration)}` : "";
    this.readout.textContent = this.summary;
    this.draw();
  }

  span(role, [lane, kind, start, end, layer, experts, note]) {
    const where = layer === null ? "" : `, layer ${layer}`;
    const which = experts.length ? `, expert${experts.length > 1 ? "s" : ""} ${experts.join(" ")}` : "";
    const text = `${role}: ${kind}${where}${which}${note ? `, ${note}` : ""}, ${duration(end - start)}`;
    return { start, end, colour: COLOURS[family(role, lane, kind)], faded: note.includes("cancelled"), text };
  }

  draw() {
    if (this.canvas.hidden || !this.rows.length) return;
    const begin = performance.now();
    const { context, width, height } = theme.fit(this.canvas, this.rows.length * (ROW + GAP) + AXIS);
    this.label = width < 560 ? NARROW_LABEL : LABEL;
    const x = (seconds) => this.label + (seconds / this.duration) * (width - this.label - 1);
    context.clearRect(0, 0, width, height);
    context.font = `12px ${getComputedStyle(this.canvas).fontFamily}`;
    context.textBaseline = "middle";
    this.drawAxis(context, x, height);
    this.rows.forEach((row, index) => {
      const top = index * (ROW + GAP);
      context.fillStyle = theme.colour("--soft");
      context.fillText(shortened(context, row.name, this.label - 10), 0, top + ROW / 2 + 1);
      context.fillStyle = theme.colour("--sunk");
      context.fillRect(this.label, top, width - this.label, ROW);
      for (const span of row.spans) {
        context.globalAlpha = span.faded ? 0.45 : 1;
        context.fillStyle = theme.colour(span.colour);
        const left = x(span.start);
        context.fillRect(left, top, Math.max(0.8, x(span.end) - left - 0.4), ROW);
      }
      context.globalAlpha = 1;
    });
    this.mark(context, x);
    performance.measure("raymoe-timeline", { start: begin });
  }

  drawAxis(context, x, height) {
    const step = niceStep(this.duration / 6);
    context.fillStyle = theme.colour("--faint");
    context.strokeStyle = theme.colour("--line");
    context.lineWidth = 1;
    for (let at = 0; at <= this.duration * 1.0001; at += step) {
      const left = Math.round(x(at)) - 0.5;
      context.beginPath();
      context.moveTo(left, 0);
      context.lineTo(left, height - AXIS + 4);
      context.stroke();
      const text = `${+(at * 1e3).toFixed(3)} ms`;
      const wide = context.measureText(text).width;
      if (left + wide / 2 <= this.canvas.clientWidth) context.fillText(text, Math.max(this.label, left - wide / 2), height - 8);
    }
  }

  mark(context, x) {
    if (!this.chosen) return;
    const [row, index] = this.chosen;
    const span = this.rows[row].spans[index];
    context.strokeStyle = theme.colour("--cursor");
    context.lineWidth = 1.5;
    context.strokeRect(x(span.start) - 0.5, row * (ROW + GAP) + 0.5, Math.max(3, x(span.end) - x(span.start)), ROW - 1);
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    const row = Math.floor((event.clientY - box.top) / (ROW + GAP));
    const seconds = ((event.clientX - box.left - this.label) / (box.width - this.label)) * this.duration;
    const slack = (2 / (box.width - this.label)) * this.duration;
    const spans = this.rows[row]?.spans ?? [];
    const index = spans.findIndex((span) => span.start - slack <= seconds && seconds <= span.end + slack);
    this.choose(index < 0 ? null : [row, index]);
  }

  press(event) {
    if (!this.rows.length) return;
    const [row, index] = this.chosen ?? [0, -1];
    let next = null;
    if (event.key === "ArrowRight") next = [row, Math.min(index + 1, this.rows[row].spans.length - 1)];
    if (event.key === "ArrowLeft") next = [row, Math.max(index - 1, 0)];
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      const other = Math.max(0, Math.min(this.rows.length - 1, row + (event.key === "ArrowDown" ? 1 : -1)));
      const at = this.rows[row].spans[Math.max(0, index)].start;
      const found = this.rows[other].spans.findIndex((span) => span.end >= at);
      next = [other, found < 0 ? this.rows[other].spans.length - 1 : found];
    }
    if (!next) return;
    event.preventDefault();
    this.choose(next);
  }

  choose(chosen) {
    if (String(chosen) === String(this.chosen)) return;
    this.chosen = chosen;
    this.readout.textContent = chosen ? this.rows[chosen[0]].spans[chosen[1]].text : (this.summary ?? "");
    this.draw();
  }
}

function rowName(process, lane) {
  const role = process.role.replace(/^worker /, "");
  return `${role}${{ compute: "", link: " loads", wait: " waits" }[lane]}`;
}

function shortened(context, text, width) {
  while (text.length > 4 && context.measureText(text).width > width) text = `${text.slice(0, -2).trimEnd()}…`;
  return text;
}

function niceStep(about) {
  const power = 10 ** Math.floor(Math.log10(about));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= about);
}
