// Lines of the last two minutes, from differences of totals.

import { duration, percent } from "./format.js";
import * as theme from "./theme.js";

const SPAN_S = 120;
const HEIGHT = 96;
const narrow = matchMedia("(max-width: 560px)");
const ABOVE = 14; // for what the top line stands for

/** What one value was between two looks; null where nothing happened. */
export const QUANTITIES = {
  tpot: {
    of: (now, before) => ratio(now.decode_s - before.decode_s, now.steps - before.steps),
    show: duration,
    colour: "--accent",
    floor: 0,
  },
  hits: {
    of: (now, before) => ratio(now.hits - before.hits, now.hits + now.misses - before.hits - before.misses),
    show: percent,
    colour: "--accent",
    floor: 0,
    ceiling: 1,
  },
  substituted: {
    of: (now, before) =>
      ratio(now.substituted - before.substituted, now.hits + now.misses - before.hits - before.misses),
    show: percent,
    colour: "--warm",
    floor: 0,
    least: 0.1,
  },
};

function ratio(part, whole) {
  return whole > 0 ? part / whole : null;
}

export class Chart {
  constructor(figure) {
    this.quantity = QUANTITIES[figure.dataset.chart];
    this.output = figure.querySelector("output");
    this.note = figure.querySelector("small");
    this.canvas = figure.querySelector("canvas");
    this.title = this.canvas.getAttribute("aria-label");
    this.points = []; // [seconds, value or null]
    this.last = null;
    theme.onChange(() => this.draw());
  }

  add(seconds, engine) {
    const restarted = this.last && (engine.steps < this.last.steps || engine.hits < this.last.hits);
    if (this.last && !restarted) {
      this.points.push([seconds, this.quantity.of(engine, this.last)]);
    }
    this.last = engine;
    while (this.points.length && this.points[0][0] < seconds - SPAN_S) this.points.shift();
    this.now = seconds;
    this.say();
    this.draw();
  }

  say() {
    const known = this.points.filter(([, value]) => value !== null).map(([, value]) => value);
    const current = this.points.at(-1)?.[1] ?? null;
    const idle = current === null;
    this.output.textContent = known.length ? this.quantity.show(known.at(-1)) : "–";
    const mean = known.reduce((sum, value) => sum + value, 0) / known.length;
    this.note.textContent = known.length
      ? `${idle ? "idle, " : ""}2 min mean ${this.quantity.show(mean)}`
      : "no tokens yet";
    this.canvas.setAttribute("aria-label", `${this.title}: ${this.output.textContent}, ${this.note.textContent}`);
  }

  draw() {
    const { context, width, height } = theme.fit(this.canvas, narrow.matches ? 0.7 * HEIGHT : HEIGHT);
    context.clearRect(0, 0, width, height);
    const known = this.points.filter(([, value]) => value !== null);
    const highest = Math.max(0, ...known.map(([, value]) => value));
    const top = this.quantity.ceiling ?? Math.max(highest * 1.15, this.quantity.least ?? 1e-4);
    const x = (seconds) => width - ((this.now - seconds) / SPAN_S) * width;
    const y = (value) => height - 2 - (value / top) * (height - 2 - ABOVE);
    context.strokeStyle = theme.colour("--line");
    context.lineWidth = 1;
    for (const part of [0, 0.5, 1]) {
      const level = Math.round(y(top * part)) + 0.5;
      context.beginPath();
      context.moveTo(0, level);
      context.lineTo(width, level);
      context.stroke();
    }
    if (known.length) {
      context.font = `11px ${getComputedStyle(this.canvas).fontFamily}`;
      context.fillStyle = theme.colour("--faint");
      context.fillText(this.quantity.show(top), 0, ABOVE - 5);
    }
    const ink = theme.colour(this.quantity.colour);
    for (const run of runs(this.points)) this.drawRun(context, run, x, y, ink, height);
  }

  drawRun(context, run, x, y, ink, height) {
    context.beginPath();
    run.forEach(([seconds, value], index) =>
      index ? context.lineTo(x(seconds), y(value)) : context.moveTo(x(seconds), y(value)),
    );
    context.lineJoin = context.lineCap = "round";
    context.strokeStyle = ink;
    context.lineWidth = 1.75;
    context.stroke();
    if (run.length < 2) context.fillRect(x(run[0][0]) - 1, y(run[0][1]) - 1, 2.5, 2.5);
    context.lineTo(x(run.at(-1)[0]), height - 2);
    context.lineTo(x(run[0][0]), height - 2);
    context.globalAlpha = 0.12;
    context.fillStyle = ink;
    context.fill();
    context.globalAlpha = 1;
  }
}

/** Stretches without a gap: while nobody asks for anything there is no value, and no line. */
function runs(points) {
  const found = [];
  let run = [];
  for (const point of points) {
    if (point[1] !== null) {
      run.push(point);
    } else if (run.length) {
      found.push(run);
      run = [];
    }
  }
  if (run.length) found.push(run);
  return found;
}
