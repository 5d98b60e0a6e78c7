// Looks at the server about once a second while the page is visible, and hands what it says to the parts.

import { Chart } from "./charts.js";
import { Devices } from "./devices.js";
import { bytes, count, describe, duration, element, percent } from "./format.js";
import { Prompt } from "./prompt.js";
import { ServerError, get, key } from "./server.js";
import { Settings } from "./settings.js";
import * as theme from "./theme.js";
import { Timeline } from "./timeline.js";

const LOOK_MS = 1000;
const LONGEST_WAIT_MS = 15000;
const TIMELINE_EVERY = 2; // looks; recording a few steps costs them a little
const find = (id) => document.getElementById(id);

theme.start(find("theme"));
const charts = [...document.querySelectorAll("[data-chart]")].map((figure) => new Chart(figure));
const devices = new Devices(find("device-list"), find("heat"));
const timeline = new Timeline({
  canvas: find("timeline"),
  empty: find("timeline-empty"),
  readout: find("timeline-readout"),
  legend: find("timeline-legend"),
  hold: find("timeline-hold"),
});
const settings = new Settings(find("settings"), { onError: askForKey });
new Prompt(find("prompt"), { onError: askForKey });

function showLegend() {
  const entries = [
    ["In a slot, cold to hot", "--here-cold", "--here-hot"],
    ["In host memory", "--away-cold", "--away-hot"],
    ["Loading", "--loading", "--loading"],
    ["On another device", "--unowned", "--unowned"],
  ];
  find("heat-legend").replaceChildren(
    ...entries.map(([name, cold, hot]) => {
      const swatch = element("i", { class: cold === hot ? "" : "ramp" });
      swatch.style.background = `linear-gradient(90deg, ${theme.colour(cold)}, ${theme.colour(hot)})`;
      if (cold === "--unowned") swatch.style.boxShadow = `inset 0 0 0 1px ${theme.colour("--line")}`;
      return element("li", {}, swatch, name);
    }),
  );
}
theme.onChange(showLegend);
showLegend();

function showAbout(stats) {
  const engine = stats.engine;
  const parts = [["", engine.model], ["", engine.dtype], ["policy ", stats.policy]];
  if (stats.predictor) parts.push(["predictor ", `${stats.predictor.kind} (${stats.predictor.state})`]);
  if (stats.replication > 1) parts.push(["owners per expert ", stats.replication]);
  find("about").replaceChildren(
    ...parts.map(([word, value], index) => {
      const shown = element(index ? "span" : "b", {}, String(value));
      return word ? element("span", {}, word, element("b", {}, String(value))) : shown;
    }),
  );
  document.title = `${engine.model} – raymoe`;
}

let lastEngine = null;

function showEngine(stats, seconds) {
  const engine = stats.engine;
  const speed = lastEngine ? (engine.completion_tokens - lastEngine.tokens) / (seconds - lastEngine.seconds) : 0;
  lastEngine = { tokens: engine.completion_tokens, seconds };
  const limited = engine.kv_budget_bytes !== null;
  const kv = limited ? `${percent(engine.kv_bytes / engine.kv_budget_bytes, 0)} full` : bytes(engine.kv_bytes);
  const kvHint = limited ? `${bytes(engine.kv_bytes)} of a budget of ${bytes(engine.kv_budget_bytes)}` : "no budget is set";
  describe(find("engine"), [
    ["Tokens / s", Math.max(0, speed).toFixed(1)],
    ["Running", `${count(engine.running)}`],
    ["Waiting", `${count(engine.waiting)}`],
    ["KV cache", kv, kvHint],
    ["Answers", count(engine.finished), `${count(engine.failed)} failed`],
    ["Loaded", bytes(engine.bytes_loaded), `${count(engine.loads)} loads`],
    ...(engine.recall === null ? [] : [["Recall", percent(engine.recall), "of the predictor"]]),
    ...(engine.drafted ? [["Drafts kept", percent(engine.accepted / engine.drafted)]] : []),
  ]);
}

let looks = 0;
let failures = 0;
let looking = null;

/** One look. Calls while one is under way share it. */
function look() {
  looking ??= lookOnce().finally(() => {
    looking = null;
  });
  return looking;
}

async function lookOnce() {
  const wantsTimeline = looks % TIMELINE_EVERY === 0 && !timeline.held;
  looks += 1;
  try {
    const [stats, residency, steps] = await Promise.all([
      get("v1/stats"),
      get("v1/stats/residency"),
      wantsTimeline ? get("v1/stats/timeline") : null,
    ]);
    const seconds = performance.now() / 1e3;
    if (stats.engine) {
      showAbout(stats);
      showEngine(stats, seconds);
      for (const chart of charts) chart.add(seconds, stats.engine);
    }
    settings.show(stats.settings, stats.engine);
    devices.showStats(stats.devices, seconds);
    devices.showResidency(residency);
    if (steps) timeline.show(steps);
    failures = 0;
    showState("live", "Live");
  } catch (error) {
    failures += 1;
    if (!askForKey(error)) showState("lost", "Not answering", error);
  }
}

function showState(state, word, error = null) {
  const live = find("live");
  live.dataset.state = state;
  if (live.lastElementChild.textContent !== word) live.lastElementChild.textContent = word;
  const banner = find("banner");
  banner.hidden = error === null;
  if (error !== null) {
    const reason = error instanceof ServerError ? error.message : "the server can't be reached";
    const text = `No news from the server: ${reason}. Trying again every ${duration(waitMs() / 1e3)}; what is shown is old.`;
    if (banner.textContent !== text) banner.textContent = text;
  }
}

function waitMs() {
  return Math.min(LONGEST_WAIT_MS, LOOK_MS * 2 ** Math.max(0, failures - 1));
}

/** Opens the dialog where the server wants a key; whether it was that. */
function askForKey(error) {
  if (error.status !== 401 && error.status !== 403) return false;
  showState("lost", "Key needed", error);
  if (!asked && !find("key-dialog").open) find("key-dialog").showModal();
  asked = true;
  return true;
}
let asked = false;

find("key-open").addEventListener("click", () => {
  find("key").value = key.get();
  find("key-dialog").showModal();
});
find("key-form").addEventListener("submit", () => {
  key.set(find("key").value.trim());
  asked = false;
  look();
});
find("key-forget").addEventListener("click", () => {
  key.set("");
  find("key-dialog").close();
});

async function keepLooking() {
  for (;;) {
    if (document.visibilityState === "visible") {
      await look();
    } else {
      showState("waiting", "Paused");
      await new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
      continue;
    }
    await new Promise((resolve) => setTimeout(resolve, waitMs()));
  }
}
keepLooking();
