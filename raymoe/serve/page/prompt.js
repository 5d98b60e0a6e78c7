// The prompt box: streams an answer, and then says what its experts cost.

import { bytes, count, describe, duration, percent } from "./format.js";
import { stream } from "./server.js";

export class Prompt {
  constructor(form, { onError }) {
    this.form = form;
    this.text = form.querySelector("#prompt-text");
    this.answer = form.querySelector("#answer");
    this.cost = form.querySelector("#cost");
    this.button = form.querySelector("#send");
    this.onError = onError;
    this.running = null;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.running) this.running.abort();
      else this.send();
    });
    this.text.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !this.running) form.requestSubmit();
    });
  }

  body() {
    const chosen = (name) => this.form.querySelector(`input[name="${name}"]:checked`).value;
    const body = { stream_options: { include_usage: true } };
    body.max_tokens = Number(this.form.querySelector("#max-tokens").value);
    const temperature = this.form.querySelector("#temperature").value;
    if (temperature !== "") body.temperature = Number(temperature);
    if (chosen("quality")) body.quality = chosen("quality");
    const isChat = chosen("kind") === "chat";
    if (isChat) body.messages = [{ role: "user", content: this.text.value }];
    else body.prompt = this.text.value;
    return [isChat ? "v1/chat/completions" : "v1/completions", body, isChat];
  }

  async send() {
    const [path, body, isChat] = this.body();
    this.running = new AbortController();
    this.button.textContent = "Stop";
    this.answer.replaceChildren();
    this.answer.dataset.state = "streaming";
    describe(this.cost, []);
    if (!isChat) this.say(this.text.value, "mark"); // the answer goes on where the prompt ends
    const timing = { start: performance.now(), first: null };
    let usage = null;
    try {
      for await (const event of stream(path, body, this.running.signal)) {
        const choice = event.choices?.[0];
        const text = choice?.delta?.content ?? choice?.text ?? "";
        if (text) {
          timing.first ??= performance.now();
          this.say(text);
        }
        usage = event.usage ?? usage;
      }
      this.answer.dataset.state = "done";
      if (usage) this.showCost(usage, timing);
    } catch (error) {
      this.fail(error);
    } finally {
      this.running = null;
      this.button.textContent = "Send";
    }
  }

  say(text, tag) {
    const stays = this.answer.scrollTop + this.answer.clientHeight < this.answer.scrollHeight - 24;
    if (tag) {
      const mark = document.createElement(tag);
      mark.textContent = text;
      this.answer.append(mark);
    } else {
      this.answer.append(text);
    }
    if (!stays) this.answer.scrollTop = this.answer.scrollHeight;
  }

  fail(error) {
    if (error.name === "AbortError") {
      this.answer.dataset.state = "done";
      return;
    }
    this.answer.dataset.state = "failed";
    this.answer.textContent = error.status ? error.message : "The server ended the answer, or can't be reached.";
    this.onError(error);
  }

  showCost(usage, timing) {
    const routing = usage.routing ?? {};
    const tokens = usage.completion_tokens;
    const spent = (performance.now() - timing.first) / 1e3;
    const rows = [
      ["Tokens", `${count(tokens)}`, `after a prompt of ${count(usage.prompt_tokens)}`],
      ["First token", duration((timing.first - timing.start) / 1e3)],
      ["Speed", tokens > 1 ? `${((tokens - 1) / spent).toFixed(1)} /s` : "–"],
      ["Hit rate", percent(routing.hit_rate)],
      ["Loads", count(routing.loads), bytes(routing.bytes_loaded)],
      ["Loaded", bytes(routing.bytes_loaded)],
      ["Substituted", count(routing.substituted), "pairs of token and expert"],
      ["Gate mass", percent(routing.substituted_gate_mass, 2), "share of the chosen experts' scores that was replaced"],
    ];
    if (routing.recall !== null && routing.recall !== undefined) rows.push(["Recall", percent(routing.recall), "of the predictor"]);
    if (routing.drafted) rows.push(["Drafts kept", `${count(routing.accepted)} of ${count(routing.drafted)}`]);
    describe(this.cost, rows);
  }
}
