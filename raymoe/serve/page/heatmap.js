// The map of one device: a cell per layer and expert. Colour says where the expert is, heat how much it is used or scores.
// Pixels are written straight into one ImageData: no element per cell, so 94 x 256 of them take about a millisecond.

import * as theme from "./theme.js";

export const STATES = ["elsewhere", "in host memory", "on its way into a slot", "in a slot"];
const [ELSEWHERE, HOST, LOADING, SLOT] = [0, 1, 2, 3];
const HEATS = 256;
const SMALL_CELL = 5; // device pixels; below that gaps between cells would only make them darker
const littleEndian = new Uint8Array(new Uint32Array([1]).buffer)[0] === 1;

export function decode(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

function pack([red, green, blue]) {
  return littleEndian
    ? ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0
    : ((red << 24) | (green << 16) | (blue << 8) | 255) >>> 0;
}

function ramp(cold, hot) {
  const [from, to] = [theme.rgb(cold), theme.rgb(hot)];
  return Uint32Array.from({ length: HEATS }, (_, heat) => {
    const share = heat / (HEATS - 1);
    return pack(from.map((value, part) => Math.round(value + (to[part] - value) * share)));
  });
}

/** Colours by state and heat, made anew when the theme changes. */
class Palette {
  constructor() {
    theme.onChange(() => {
      this.made = null;
    });
  }

  get tables() {
    this.made ??= {
      ground: pack(theme.rgb("--card")),
      states: [
        ramp("--unowned", "--unowned"),
        ramp("--away-cold", "--away-hot"),
        ramp("--loading", "--loading"),
        ramp("--here-cold", "--here-hot"),
      ],
    };
    return this.made;
  }
}

const palette = new Palette();

export class HeatMap {
  /** `onCell(layer, expert)` is told which cell is pointed at, or null. */
  constructor(canvas, onCell) {
    this.canvas = canvas;
    this.onCell = onCell;
    this.cell = null;
    this.map = null;
    canvas.addEventListener("pointermove", (event) => this.point(event));
    canvas.addEventListener("pointerleave", () => this.choose(null));
    canvas.addEventListener("keydown", (event) => this.press(event));
    canvas.addEventListener("focus", () => this.choose(this.cell ?? [0, 0]));
    canvas.addEventListener("blur", () => this.choose(null));
    theme.onChange(() => this.draw());
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  /** map: {layers, experts, state, heat}, the last two with one byte per cell, layer by layer. */
  show(map) {
    this.map = map;
    this.draw();
  }

  draw() {
    if (!this.map || !this.canvas.clientWidth) return;
    const begin = performance.now();
    const { layers, experts } = this.map;
    const ratio = window.devicePixelRatio || 1;
    const wide = Math.max(experts, Math.round(this.canvas.clientWidth * ratio));
    const rowHeight = Math.max(1, Math.min(Math.round(22 * ratio), Math.round((wide / experts) * 1.05), Math.floor((340 * ratio) / layers)));
    const high = rowHeight * layers;
    if (this.canvas.width !== wide || this.canvas.height !== high) {
      this.canvas.width = wide;
      this.canvas.height = high;
      this.canvas.style.height = `${high / ratio}px`;
      this.image = null;
    }
    const context = this.canvas.getContext("2d");
    this.image ??= context.createImageData(wide, high);
    this.paint(new Uint32Array(this.image.data.buffer), wide, rowHeight);
    context.putImageData(this.image, 0, 0);
    this.mark(context, wide, rowHeight, ratio);
    performance.measure("raymoe-heatmap", { start: begin, detail: { cells: layers * experts } });
  }

  paint(pixels, wide, rowHeight) {
    const { layers, experts, state, heat } = this.map;
    const { ground, states } = palette.tables;
    const gap = wide / experts >= SMALL_CELL && rowHeight >= SMALL_CELL ? Math.max(1, Math.round(wide / experts / 12)) : 0;
    const edges = Uint32Array.from({ length: experts + 1 }, (_, expert) => Math.round((expert * wide) / experts));
    for (let layer = 0; layer < layers; layer += 1) {
      const top = layer * rowHeight * wide;
      const row = pixels.subarray(top, top + wide);
      if (gap) row.fill(ground);
      for (let expert = 0, cell = layer * experts; expert < experts; expert += 1, cell += 1) {
        row.fill(states[state[cell]][heat[cell]], edges[expert], edges[expert + 1] - gap);
      }
      for (let line = 1; line < rowHeight; line += 1) {
        if (line < rowHeight - gap) pixels.copyWithin(top + line * wide, top, top + wide);
        else pixels.fill(ground, top + line * wide, top + (line + 1) * wide);
      }
    }
  }

  mark(context, wide, rowHeight, ratio) {
    if (!this.cell) return;
    const [layer, expert] = this.cell;
    const left = Math.round((expert * wide) / this.map.experts);
    const width = Math.round(((expert + 1) * wide) / this.map.experts) - left;
    context.strokeStyle = theme.colour("--cursor");
    context.lineWidth = Math.max(1, 1.5 * ratio);
    context.strokeRect(left - 0.5, layer * rowHeight - 0.5, width, rowHeight);
  }

  point(event) {
    if (!this.map) return;
    const box = this.canvas.getBoundingClientRect();
    const layer = Math.floor(((event.clientY - box.top) / box.height) * this.map.layers);
    const expert = Math.floor(((event.clientX - box.left) / box.width) * this.map.experts);
    this.choose([layer, expert]);
  }

  press(event) {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -1e9], End: [0, 1e9] };
    const step = steps[event.key];
    if (!step || !this.map) return;
    event.preventDefault();
    const [layer, expert] = this.cell ?? [0, 0];
    this.choose([layer + step[0], expert + step[1]]);
  }

  choose(cell) {
    if (cell && this.map) {
      const clamp = (value, most) => Math.max(0, Math.min(most - 1, value));
      cell = [clamp(cell[0], this.map.layers), clamp(cell[1], this.map.experts)];
    }
    if (String(cell) === String(this.cell)) return;
    this.cell = cell;
    this.draw();
    this.onCell(cell);
  }
}

/** How many cells are in each state. */
export function tally(state) {
  const counts = [0, 0, 0, 0];
  for (const value of state) counts[value] += 1;
  return { elsewhere: counts[ELSEWHERE], host: counts[HOST], loading: counts[LOADING], slot: counts[SLOT] };
}
