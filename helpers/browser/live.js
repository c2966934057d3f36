// What needs a running kernel: activations on the reader's own prompt, and answers with latents scaled.

import { h, number, running } from "./text.js";

/** The panel; returns { node, follow }, where `follow` hears that another latent was opened. */
export function livePanel(hub, lines) {
  const { state, view } = hub;
  if (!hub.kernel || !hub.canRun) {
    const why = hub.kernel ? "This browser was opened without a model; open it with browse(model, sae, prompts)."
      : "This part needs a running kernel; open the notebook and run its cell.";
    return { node: h("details", { class: "fb-live" }, h("summary", {}, "Your own prompt, steering"),
      h("p", { class: "fb-faint fb-offline" }, why)), follow: () => {} };
  }
  const text = h("textarea", { class: "fb-input fb-prompt", rows: 2, "aria-label": "Your own prompt", maxlength: 20000,
    placeholder: "Type a prompt; Ctrl+Enter reads its activations", spellcheck: "false" });
  const read = h("button", { type: "button", class: "fb-button", onclick: () => ask() }, "read activations");
  const tokens = h("div", { class: "fb-own" });
  const found = h("div", { class: "fb-moved" });
  let shown = null; // the prompt whose activations are on screen

  function ask() {
    const prompt = text.value, latent = view.current;
    hub.fail("");
    hub.kernel.ask("prompt", { text: prompt, latent: latent < 0 ? null : state.latents.id[latent] }, (reply) => {
      shown = prompt;
      const name = latent < 0 ? "no latent" : `latent ${state.latents.name[latent]}`;
      const peak = reply.values.reduce((best, v, k) => (Math.abs(v) > Math.abs(reply.values[best]) ? k : best), 0);
      const top = reply.values[peak] || 0;
      const scale = Math.max(Math.abs(top), Math.abs(latent < 0 ? 0 : state.latents.max[latent]));
      tokens.replaceChildren(h("div", { class: "fb-exmeta" }, h("span", {}, name), h("b", {}, top ? number(top) : "silent")),
        lines.line(reply.tokens.map((one, position) => ({ text: one, value: reply.values[position], position })), scale,
          top ? peak : -1, `Your prompt, ${name}`));
      found.replaceChildren(h("h4", {}, "strongest"), h("div", {}, ...reply.latents.slice(0, 16).map(([id, value]) => {
        const at = hub.placeOf(id);
        return h("button", { type: "button", class: "fb-button fb-near", disabled: at < 0, onclick: () => hub.show(at) },
          h("bdi", {}, ...running(at < 0 ? `#${id}` : state.latents.name[at])), h("span", { class: "fb-faint" }, ` ${number(value)}`));
      })));
    }, hub.fail);
  }
  text.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      event.stopPropagation();
      ask();
    }
  });

  // ---- steering
  const of = (test) => state.latents.id.filter((_, i) => test(i));
  const sets = [
    { label: "the open latent", ids: () => (view.current < 0 ? [] : [state.latents.id[view.current]]) },
    { label: "the saved list", ids: () => hub.notes.members().map((name) => state.latents.name.indexOf(name))
      .filter((i) => i >= 0).map((i) => state.latents.id[i]) },
    ...state.contrasts.map((contrast, bit) => ({ label: `suppress ${contrast.name}`, factor: 0,
      title: `take out every latent that is ${state.contrasts.length > 1 ? `${contrast.name} only` : contrast.name}`,
      ids: () => of((i) => state.latents.kind[i] === 1 << bit) })),
  ];
  let chosen = sets[0];
  const name = `${hub.id}-steered`;
  const radios = sets.map((set) => {
    const input = h("input", { type: "radio", name, onchange: () => {
      chosen = set;
      if (set.factor !== undefined) slider.value = set.factor;
      label();
    } });
    input.checked = set === chosen;
    return h("label", { class: "fb-filter", title: set.title }, input, set.label);
  });
  const slider = h("input", { type: "range", min: -4, max: 8, step: 0.5, value: 0, class: "fb-slider",
    "aria-label": "Multiply the activations by", oninput: () => label(), onchange: () => text.value.trim() && steer() });
  const factor = h("output", { class: "fb-factor" });
  const go = h("button", { type: "button", class: "fb-button", onclick: () => steer() }, "answer");
  const answers = h("div", { class: "fb-answers" });
  function label() {
    const times = Number(slider.value);
    const what = times === 0 ? "taken out" : times === 1 ? "unchanged" : times < 0 ? "turned round" : times > 1 ? "amplified" : "weakened";
    const n = chosen.ids().length;
    factor.textContent = `× ${number(times)} (${what}), ${n} latent${n === 1 ? "" : "s"}`;
    slider.setAttribute("aria-valuetext", factor.textContent);
    go.disabled = n === 0;
  }
  const answer = (title, { text: said, label: verdict }) => h("div", { class: "fb-answer" }, h("h4", {}, title, " ",
    h("span", { class: "fb-badge" }, ...running(verdict))), h("p", { dir: "auto" }, ...said.split("\n").flatMap((line, k) =>
    (k ? [h("br"), ...running(line)] : running(line)))));
  function steer() {
    const ids = chosen.ids(), times = Number(slider.value), note = factor.textContent;
    hub.fail("");
    hub.kernel.ask("steer", { text: text.value, latents: ids, factor: times }, (reply) => {
      answers.replaceChildren(answer("as it is", reply.plain), answer(`steered: ${note}`, reply.steered),
        h("p", { class: "fb-faint" }, `${reply.fired} of ${ids.length} are active on the prompt itself; a latent that stays ` +
          "silent in prompt and answer cannot be scaled. Labels are a rule's, not a person's."));
    }, hub.fail);
  }
  label();
  const node = h("details", { class: "fb-live", open: true }, h("summary", {}, "Your own prompt, steering"),
    h("div", { class: "fb-ask" }, text, read), tokens, found,
    h("div", { class: "fb-tools", role: "radiogroup", "aria-label": "What to steer" }, ...radios),
    h("div", { class: "fb-tools" }, slider, factor, go), answers);
  return { node, follow: () => {
    label();
    if (shown !== null && shown === text.value) ask();
  } };
}
