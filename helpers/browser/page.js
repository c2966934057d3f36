// The page of one latent: statistics, promoted and suppressed tokens, top activating examples with their values.

import { h, number, percent, rate, running, tint, visible } from "./text.js";
import { kindOf } from "./latents.js";

const SPECIAL = /^<[|/]?\w[\w|]*>$/; // tokens of the chat template

/** Pages drawn into `page`, inside the browser's `root`; returns { draw, hideTip }. */
export function pages(state, root, page) {
  const latents = state.latents;
  let sideBySide = false;
  let current = -1;
  const tip = h("div", { class: "fb-tip", role: "tooltip", hidden: true });
  const live = h("p", { class: "fb-hidden", "aria-live": "polite" });
  root.append(tip, live);

  function draw(i) {
    current = i;
    const content = state.pages[i];
    const entry = kindOf(state, latents.kind[i]);
    const title = h("h3", { class: "fb-heading" }, h("span", {}, "Latent ", h("bdi", {}, ...running(latents.name[i]))),
      entry ? h("span", { class: `fb-badge fb-kind-${entry.key}` }, entry.label) : null);
    page.setAttribute("aria-label", `Latent ${latents.name[i]}`);
    page.replaceChildren(title, statistics(i), moved(content), examples(i, content));
    page.scrollTop = 0;
    hideTip();
  }

  function statistics(i) {
    const box_ = h("div", { class: "fb-statistics" });
    state.contrasts.forEach((contrast, c) => {
      const estimate = latents.auroc[c][i];
      box_.append(h("dl", { class: "fb-stat" }, h("dt", {}, `AUROC ${contrast.name}`), h("dd", {},
        h("b", {}, rate(estimate)), h("span", { class: "fb-faint" },
          ` ${rate(latents.low[c][i])} to ${rate(latents.high[c][i])}`)),
      h("dd", { class: "fb-faint" }, `${contrast.positive} above ${contrast.negative}`)));
    });
    box_.append(
      h("dl", { class: "fb-stat" }, h("dt", {}, "density"), h("dd", {}, h("b", {}, percent(latents.density[i]))),
        h("dd", { class: "fb-faint" }, "of all tokens")),
      h("dl", { class: "fb-stat" }, h("dt", {}, "max act"), h("dd", {}, h("b", {}, number(latents.max[i]))),
        h("dd", { class: "fb-faint" }, "largest activation")));
    const table = h("table", { class: "fb-groups" },
      h("thead", {}, h("tr", {}, ...["prompts", "n", "active in", "mean peak"].map((text) =>
        h("th", { scope: "col" }, text)))),
      h("tbody", {}, ...state.groups.map((group, g) => {
        const share = h("span", { class: "fb-share" });
        share.style.setProperty("--width", `${100 * latents.fires[g][i]}%`);
        return h("tr", {}, h("th", { scope: "row" }, groupChip(g)), h("td", {}, group.n),
          h("td", {}, share, h("span", { class: "fb-percent" }, percent(latents.fires[g][i]))), h("td", {}, number(latents.mean_peak[g][i])));
      })));
    return h("div", {}, box_, table);
  }

  function groupChip(g) {
    return h("span", { class: "fb-group" }, h("span", { class: `fb-mark fb-mark-${g % 6}`, "aria-hidden": "true" }),
      ...running(state.groups[g].name));
  }

  function moved(content) {
    if (!content.promoted.length && !content.suppressed.length) return h("div", {});
    const largest = Math.max(...[...content.promoted, ...content.suppressed].map(([, value]) => Math.abs(value)));
    const line = (label, tokens) => h("div", { class: "fb-moved" }, h("h4", {}, label), h("div", {},
      ...tokens.map(([token, value]) => {
        const chip = h("bdi", { class: "fb-chip fb-token", "data-value": number(value),
          "data-token": state.vocab[token] }, ...visible(state.vocab[token]));
        chip.style.background = tint(value, largest);
        return chip;
      })));
    return h("div", { class: "fb-effects" }, line("promotes", content.promoted),
      line("suppresses", content.suppressed));
  }

  function examples(i, content) {
    const section = h("div", { class: "fb-examples" });
    if (!content.examples.length) {
      section.append(h("p", { class: "fb-empty" }, "This latent is dead: it was not active on any of the prompts."));
      return section;
    }
    const toggle = h("button", { type: "button", class: "fb-button", "aria-pressed": String(sideBySide),
      onclick: () => {
        sideBySide = !sideBySide;
        draw(current);
        page.querySelector(".fb-examples .fb-button").focus();
      } }, "groups side by side");
    section.append(h("div", { class: "fb-exhead" }, h("h4", {}, "top activating examples"),
      state.groups.length > 1 ? toggle : null, scale(content, latents.max[i])));
    if (!sideBySide || state.groups.length < 2) {
      section.append(h("ol", { class: "fb-exlist" }, ...content.examples.map((ex) => example(ex, latents.max[i]))));
      return section;
    }
    section.append(h("div", { class: "fb-columns" }, ...state.groups.map((group, g) => {
      const own = content.examples.filter(([doc]) => state.docs[doc].group === g);
      return h("div", {}, h("h5", {}, groupChip(g)), own.length
        ? h("ol", { class: "fb-exlist" }, ...own.map((ex) => example(ex, latents.max[i])))
        : h("p", { class: "fb-faint" }, "not active here"));
    })));
    return section;
  }

  function scale(content, maximum) {
    const signed = content.examples.some(([, , , , values]) => values.some((x, k) => k % 2 && x < 0));
    return h("span", { class: "fb-scale" }, signed ? number(-Math.abs(maximum)) : "0",
      h("span", { class: `fb-ramp${signed ? " fb-ramp-signed" : ""}`, "aria-hidden": "true" }),
      number(Math.abs(maximum)));
  }

  function example([doc, start, stop, peak, sparse], maximum) {
    const { group, tokens } = state.docs[doc];
    const values = new Map();
    for (let k = 0; k < sparse.length; k += 2) values.set(sparse[k], sparse[k + 1]);
    const spans = [];
    for (let position = start; position < stop; position++) {
      const value = values.get(position) || 0;
      const text = state.vocab[tokens[position]];
      const special = !value && SPECIAL.test(text) ? " fb-special" : "";
      const span = h("bdi", { class: `fb-token${position === peak ? " fb-peak" : ""}${special}`, "data-value": number(value),
        "data-token": text, "data-position": position }, ...visible(text));
      span.style.background = tint(value, maximum);
      spans.push(span);
      if (text.includes("\n")) spans.push(h("br"));
    }
    const line = h("div", { class: "fb-text", tabindex: 0, role: "group", "aria-roledescription": "example text",
      "aria-label": `Example from ${state.groups[group].name}, peak ${number(values.get(peak))}; ` +
        "left and right arrows read the tokens" },
    start > 0 ? h("span", { class: "fb-faint" }, "… ") : null, ...spans,
    stop < tokens.length ? h("span", { class: "fb-faint" }, " …") : null);
    const walk = spans.filter((span) => span.tagName === "BDI");
    let cursor = null;
    line.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      cursor = cursor === null ? peak - start : Math.min(walk.length - 1, Math.max(0, cursor + step));
      showTip(walk[cursor], true);
    });
    line.addEventListener("blur", hideTip);
    return h("li", {}, h("div", { class: "fb-exmeta" }, sideBySide ? h("span") : groupChip(group), h("b", {}, number(values.get(peak)))), line);
  }

  // ---- the value under the pointer or the arrow keys
  let marked = null;
  function showTip(token, speak = false) {
    hideTip();
    marked = token;
    token.classList.add("fb-marked");
    const where = token.dataset.position === undefined ? "" : `  ·  position ${token.dataset.position}`;
    tip.replaceChildren(h("b", {}, token.dataset.value), "  ", h("bdi", {}, ...visible(token.dataset.token)), where);
    tip.hidden = false;
    const frame = root.getBoundingClientRect(), at = token.getBoundingClientRect();
    const left = Math.min(Math.max(4, at.left - frame.left), Math.max(4, frame.width - tip.offsetWidth - 8));
    const above = at.top - frame.top - tip.offsetHeight - 6;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 0 ? above : at.bottom - frame.top + 6}px`;
    if (speak) live.textContent = `${token.dataset.token}: ${token.dataset.value}`;
  }
  function hideTip() {
    if (marked) marked.classList.remove("fb-marked");
    marked = null;
    tip.hidden = true;
  }
  root.addEventListener("mouseover", (event) => {
    const token = event.target.closest ? event.target.closest(".fb-token") : null;
    if (token) showTip(token);
    else if (event.target.closest && !event.target.closest(".fb-tip")) hideTip();
  });
  root.addEventListener("mouseleave", hideTip);
  return { draw, hideTip };
}
