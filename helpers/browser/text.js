// Texts, numbers and colours as elements. Every text goes through textContent; nothing here builds HTML from data.

/** An element with attributes and children; strings become text nodes, never markup. */
export function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "class") node.className = value;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : String(value));
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const CODE = /[\u007f-\u00a0\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff0-\ufffb]/;
const JOINER = /[\u200c\u200d]/; // part of emoji and of several scripts: marked only when alone

/** A token's text as text nodes in which spaces, line breaks and invisible characters can be seen. */
export function visible(text) {
  const parts = [];
  let plain = "";
  const mark = (sign, cls) => {
    if (plain) parts.push(plain);
    plain = "";
    parts.push(h("span", { class: cls }, sign));
  };
  for (const c of text) {
    const code = c.codePointAt(0);
    if (c === " ") mark("·", "fb-space");
    else if (c === "\n") mark("↵", "fb-space");
    else if (c === "\t") mark("→", "fb-space");
    else if (code < 32) mark("\\x" + code.toString(16).padStart(2, "0"), "fb-code");
    else if (CODE.test(c) || (JOINER.test(c) && [...text].length === 1)) mark("U+" + code.toString(16).toUpperCase().padStart(4, "0"), "fb-code");
    else plain += c;
  }
  if (plain) parts.push(plain);
  return parts;
}

/** Three significant digits, with a real minus sign. */
export function number(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text = size >= 1000 || size < 0.001 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
  return text.replace("-", "−");
}

export const percent = (share) => (share > 0 && share < 0.001 ? "<0.1" : number(100 * share)) + " %";
export const rate = (value) => value.toFixed(2);

/** Signed colour: orange for positive, blue for negative, nothing at zero; strength is the share of the maximum. */
export function tint(value, maximum) {
  if (!value || !maximum) return "";
  const share = Math.min(1, Math.abs(value) / Math.abs(maximum));
  return `rgb(var(${value > 0 ? "--fb-positive" : "--fb-negative"}) / ${(0.15 + 0.75 * share).toFixed(3)})`;
}

/** Running text: spaces stay spaces, invisible characters are shown. */
export function running(text) {
  return text.split(" ").flatMap((word, k) => (k ? [" ", ...visible(word)] : visible(word)));
}
