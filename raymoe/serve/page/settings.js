// Sliders for what may change while the model runs. They follow the server, except while a hand is on them.

import { change } from "./server.js";

const SETTLE_MS = 350;
const STALE_MS = 2500;

export class Settings {
  constructor(form, { onError }) {
    this.alpha = form.querySelector("#alpha");
    this.limit = form.querySelector("#alpha-max");
    this.note = form.querySelector("#settings-note");
    this.why = form.querySelector("#settings-why");
    this.outputs = { alpha: form.querySelector("#alpha-value"), limit: form.querySelector("#alpha-max-value") };
    this.onError = onError;
    this.touched = false;
    this.touches = 0;
    form.addEventListener("submit", (event) => event.preventDefault());
    for (const slider of [this.alpha, this.limit]) {
      slider.addEventListener("input", () => this.touch(slider));
    }
  }

  show(settings, engine) {
    const can = Boolean(settings?.substitutes);
    this.alpha.disabled = this.limit.disabled = !can;
    this.why.hidden = can || !settings;
    if (settings && !can) {
      this.why.textContent = `Policy ${settings.policy} never substitutes: every answer is the exact model's. Policies importance and joint do.`;
    }
    if (!settings || this.touched) return;
    this.alpha.value = settings.follows_budget ? (engine?.alpha ?? settings.alpha) : settings.alpha;
    this.limit.value = settings.alpha_max;
    this.tell();
    if (settings.follows_budget && !this.note.textContent) this.say("alpha follows the time budget");
    if (engine?.refused_settings) this.say(`refused: ${engine.refused_settings}`, "failed");
  }

  tell() {
    this.outputs.alpha.textContent = Number(this.alpha.value).toFixed(2);
    this.outputs.limit.textContent = Number(this.limit.value).toFixed(2);
  }

  touch(slider) {
    this.touched = true;
    this.touches += 1;
    // alpha can't exceed its limit: whichever is moved takes the other along
    if (slider === this.alpha && Number(this.alpha.value) > Number(this.limit.value)) this.limit.value = this.alpha.value;
    if (slider === this.limit && Number(this.limit.value) < Number(this.alpha.value)) this.alpha.value = this.limit.value;
    this.tell();
    this.say("…");
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.send(), SETTLE_MS);
  }

  async send() {
    const touch = this.touches;
    const scheduling = { alpha: Number(this.alpha.value), alpha_max: Number(this.limit.value) };
    try {
      await change("v1/admin/settings", { scheduling });
      this.say("in force");
    } catch (error) {
      this.say(error.message, "failed");
      this.onError(error);
    }
    await new Promise((resolve) => setTimeout(resolve, STALE_MS)); // until then, news may be from before the change
    if (touch === this.touches) this.touched = false;
  }

  say(text, state = "") {
    this.note.textContent = text;
    this.note.dataset.state = state;
  }
}
