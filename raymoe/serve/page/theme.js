// Light, dark, or as the system has it. Colours of canvases are read from the style sheet.

const CHOICE = "raymoe-theme";
const dark = matchMedia("(prefers-color-scheme: dark)");
const listeners = [];
let cached = new Map();

function apply() {
  const choice = localStorage.getItem(CHOICE) ?? "system";
  const shade = choice === "system" ? (dark.matches ? "dark" : "light") : choice;
  document.documentElement.dataset.theme = choice;
  document.documentElement.dataset.shade = shade;
  cached = new Map();
  for (const listener of listeners) listener();
}

export function start(control) {
  for (const input of control.querySelectorAll("input")) {
    input.checked = input.value === (localStorage.getItem(CHOICE) ?? "system");
    input.addEventListener("change", () => {
      localStorage.setItem(CHOICE, input.value);
      apply();
    });
  }
  dark.addEventListener("change", apply);
  apply();
}

/** Called whenever colours have changed. */
export function onChange(listener) {
  listeners.push(listener);
}

/** A custom property of the style sheet, such as "--accent". */
export function colour(name) {
  if (!cached.has(name)) {
    cached.set(name, getComputedStyle(document.documentElement).getPropertyValue(name).trim());
  }
  return cached.get(name);
}

/** Its red, green and blue. The style sheet writes colours that canvases use as #rrggbb. */
export function rgb(name) {
  const value = Number.parseInt(colour(name).slice(1), 16);
  return [(value >> 16) & 255, (value >> 8) & 255, value & 255];
}

/** Makes a canvas as fine as the screen; returns its context and size in CSS pixels. */
export function fit(canvas, height) {
  const ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth;
  const [wide, high] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== wide || canvas.height !== high) {
    canvas.width = wide;
    canvas.height = high;
    canvas.style.height = `${height}px`;
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  return { context, width, height };
}
