// One card per device: its map, what fills its slots, how busy its link is, and how it is.

import { bytes, count, describe, duration, element, percent } from "./format.js";
import { HeatMap, STATES, decode, tally } from "./heatmap.js";

export class Devices {
  constructor(list, heatControl) {
    this.list = list;
    this.cards = new Map();
    this.kind = "use";
    for (const input of heatControl.querySelectorAll("input")) {
      input.addEventListener("change", () => {
        this.kind = input.value;
        for (const card of this.cards.values()) card.showHeat(this.kind);
      });
    }
  }

  showStats(devices, seconds) {
    const names = Object.keys(devices);
    for (const [name, card] of this.cards) {
      if (!(name in devices)) {
        card.root.remove();
        this.cards.delete(name);
      }
    }
    for (const name of names) this.card(name).showStats(devices[name], seconds);
    if (!names.length && !this.list.children.length) {
      this.list.append(element("p", { class: "empty card" }, "No device has reported yet."));
    }
  }

  showResidency(residency) {
    for (const [name, device] of Object.entries(residency.devices)) {
      this.card(name).showMap(residency, device, this.kind);
    }
  }

  card(name) {
    if (!this.cards.size) this.list.replaceChildren();
    if (!this.cards.has(name)) {
      const card = new Card(name);
      this.cards.set(name, card);
      this.list.append(card.root);
    }
    return this.cards.get(name);
  }
}

class Card {
  constructor(name) {
    this.name = name;
    this.title = element("div", { class: "title" }, element("h3", {}, name), element("span", { class: "muted" }), element("span", { class: "state" }));
    this.canvas = element("canvas", { class: "map", tabindex: "0", role: "img" });
    this.readout = element("p", { class: "readout", "aria-live": "polite" });
    this.slots = meter("Slots in use");
    this.link = meter("Link busy", "link");
    this.tallies = element("dl", { class: "tallies" });
    const meters = element("div", { class: "meters" }, this.slots.root, this.link.root);
    this.root = element("article", { class: "card device", "aria-label": `Device ${name}` }, this.title, this.canvas, this.readout, meters, this.tallies);
    this.map = new HeatMap(this.canvas, (cell) => this.read(cell));
    this.before = null;
  }

  showStats(stats, seconds) {
    this.root.dataset.state = stats.state;
    const [, about, state] = this.title.children;
    about.textContent = `${stats.kind}, ${stats.transport === "local" ? "in the engine" : "its own process"}${stats.emulated_link ? ", emulated link" : ""}`;
    const words = { suspect: "silent for a moment", down: "does not answer", rejoining: "reads its experts" };
    const since = stats.since_s ?? null;
    state.textContent = stats.state === "healthy" || since === null ? words[stats.state] ?? stats.state : `${words[stats.state]}, for ${duration(since)}`;
    state.title = stats.reason ?? "";
    const rates = this.rates(stats, seconds);
    this.showSlots(stats);
    const flow = rates.bytes === null ? "–" : `${percent(rates.busy, 0)}, ${bytes(rates.bytes)}/s`;
    this.link.show(rates.busy, flow, "of the time since the last look");
    describe(this.tallies, [
      ["Hits", percent(stats.hit_rate), "pairs of token and expert that needed no load, since the start"],
      ["Loads", count(stats.loads), `${bytes(stats.bytes_loaded)} over the link since the start`],
      ["Prefetches", `${count(stats.prefetches_used)} used`, `${count(stats.prefetches)} begun, ${count(stats.prefetches_late)} too late, ${count(stats.prefetches_wasted)} wasted, ${count(stats.prefetches_refused)} refused`],
      ["Substituted", count(stats.substituted), "pairs whose expert of this device gave way to another"],
    ]);
    this.before = { stats, seconds };
  }

  showSlots(stats) {
    if (stats.slot_count === null || stats.slot_count === undefined) {
      this.slots.show(null, "computes in host memory");
      return;
    }
    const share = stats.slot_count ? stats.resident / stats.slot_count : 0;
    const budget = stats.slot_budget_bytes ?? stats.peak_slot_bytes;
    this.slots.show(share, `${count(stats.resident)} of ${count(stats.slot_count)}`, `${bytes(stats.peak_slot_bytes)} of a budget of ${bytes(budget)}`);
  }

  rates(stats, seconds) {
    const before = this.before;
    if (!before || seconds <= before.seconds || stats.loads < before.stats.loads) return { busy: null, bytes: null };
    const passed = seconds - before.seconds;
    return {
      busy: Math.min(1, (stats.link_busy_s - before.stats.link_busy_s) / passed),
      bytes: (stats.bytes_loaded - before.stats.bytes_loaded) / passed,
    };
  }

  showMap(residency, device, kind) {
    this.residency = residency;
    this.state = decode(device.state);
    this.heats = { use: decode(device.use), score: decode(device.score) };
    this.most = { use: device.use_max, score: device.score_max };
    const counts = tally(this.state);
    this.summary = `${counts.slot} of ${counts.slot + counts.host + counts.loading} owned experts can be computed now`;
    this.canvas.setAttribute("aria-label", `Experts of ${this.name}: ${this.summary}. ${residency.layers} layers by ${residency.experts} experts; arrow keys move over them.`);
    this.showHeat(kind);
    this.read(this.map.cell);
  }

  showHeat(kind) {
    if (!this.state) return;
    this.kind = kind;
    const { layers, experts } = this.residency;
    this.map.show({ layers, experts, state: this.state, heat: this.heats[kind] });
  }

  read(cell) {
    if (!this.state) return;
    let text = this.summary;
    if (cell) {
      const [layer, expert] = cell;
      const index = layer * this.residency.experts + expert;
      const heat = (this.heats[this.kind][index] / 255) * this.most[this.kind];
      const score = this.most.score ? `score ${heat.toFixed(3)}` : "no score under this policy";
      const word = this.kind === "use" ? `${heat.toFixed(heat < 10 ? 1 : 0)} uses lately` : score;
      const state = this.state[index];
      text = `Layer ${layer}, expert ${expert}: ${STATES[state]}${state ? `, ${word}` : ""}`;
    }
    if (this.readout.textContent !== text) this.readout.textContent = text;
  }
}

function meter(label, kind = "") {
  const value = element("b", {}, "–");
  const fill = element("i");
  const bar = element("div", { role: "meter", "aria-label": label, "aria-valuemin": "0", "aria-valuemax": "100", "aria-valuenow": "0" }, fill);
  const root = element("div", { class: `meter ${kind}` }, element("p", {}, element("span", {}, label), value), bar);
  return {
    root,
    show(share, text, hint = "") {
      value.textContent = text;
      root.title = hint;
      fill.style.width = `${100 * (share ?? 0)}%`;
      bar.setAttribute("aria-valuenow", String(Math.round(100 * (share ?? 0))));
      bar.setAttribute("aria-valuetext", `${text} ${hint}`.trim());
    },
  };
}
