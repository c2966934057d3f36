// A text as tokens: each tinted by its activation, its value under the pointer or the arrow keys.

import { h, number, tint, visible } from "./text.js";

const SPECIAL = /^<[|/]?\w[\w|]*>$/; // tokens of the chat template

/** Token lines inside the browser's `root`; returns { line, example, hideTip }. */
export function tokenLines(state, root) {
  const tip = h("div", { class: "fb-tip", role: "tooltip", hidden: true });
  const live = h("p", { class: "fb-hidden", "aria-live": "polite" });
  root.append(tip, live);

  /** One line of tokens [{ text, value, position }]; `peak` is the position that is underlined. */
  function line(tokens, maximum, peak, label, { before = false, after = false } = {}) {
    const spans = [];
    for (const { text, value, position } of tokens) {
      const special = !value && SPECIAL.test(text) ? " fb-special" : "";
      const span = h("bdi", { class: `fb-token${position === peak ? " fb-peak" : ""}${special}`,
        "data-value": number(value), "data-token": text, "data-position": position }, ...visible(text));
      span.style.background = tint(value, maximum);
      spans.push(span);
      if (text.includes("\n")) spans.push(h("br"));
    }
    const node = h("div", { class: "fb-text", tabindex: 0, role: "group", "aria-roledescription": "example text",
      "aria-label": `${label}; left and right arrows read the tokens` },
    before ? h("span", { class: "fb-faint" }, "… ") : null, ...spans,
    after ? h("span", { class: "fb-faint" }, " …") : null);
    const walk = spans.filter((span) => span.tagName === "BDI");
    const first = Math.max(0, tokens.findIndex(({ position }) => position === peak));
    let cursor = null;
    node.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step || !walk.length) return;
      event.preventDefault();
      cursor = cursor === null ? first : Math.min(walk.length - 1, Math.max(0, cursor + step));
      showTip(walk[cursor], true);
    });
    node.addEventListener("blur", hideTip);
    return node;
  }

  /** A stored example [doc, start, stop, peak, [position, value, ...]] as its tokens. */
  function unpack([doc, start, stop, peak, sparse]) {
    const { group, tokens } = state.docs[doc];
    const values = new Map();
    for (let k = 0; k < sparse.length; k += 2) values.set(sparse[k], sparse[k + 1]);
    const shown = [];
    for (let position = start; position < stop; position++) {
      shown.push({ text: state.vocab[tokens[position]], value: values.get(position) || 0, position });
    }
    return { group, shown, peak, top: values.get(peak), before: start > 0, after: stop < tokens.length };
  }

  function example(stored, maximum, head) {
    const { group, shown, peak, top, before, after } = unpack(stored);
    const label = `Example from ${state.groups[group].name}, peak ${number(top)}`;
    return h("li", {}, h("div", { class: "fb-exmeta" }, head(group), h("b", {}, number(top))),
      line(shown, maximum, peak, label, { before, after }));
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
  return { line, example, unpack, hideTip };
}
