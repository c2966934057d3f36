// Figures for papers: SVG made element by element, so that every text in it is text. Light colours, whatever the theme.

import { number, percent, rate, running, visible } from "./text.js";
import { kindOf } from "./latents.js";

const SVG = "http://www.w3.org/2000/svg";
const INK = { positive: [230, 97, 1], negative: [33, 118, 200], neutral: [110, 119, 129], ink: "#1b1f24", faint: "#59636e" };
export const KIND_INK = { 1: INK.positive, 2: INK.negative, many: [110, 60, 160], 0: INK.neutral, dead: INK.neutral };
const paint = (colour, alpha) => ({ fill: `rgb(${colour.join(",")})`, "fill-opacity": alpha.toFixed(3) });

/** An SVG element with attributes and text. */
export function s(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

/** Drawn parts of a text as one string; what XML cannot hold is replaced. */
const joined = (parts) => parts.map((part) => (typeof part === "string" ? part : part.textContent)).join("")
  .replace(/[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\u{10000}-\u{10ffff}]/gu, "\ufffd");

const label = (x, y, text, more = {}) => s("text", { x, y, fill: INK.ink, ...more }, joined(running(text)));
const frame = (width, height, title, ...children) => s("svg", { xmlns: SVG, width, height, viewBox: `0 0 ${width} ${height}`,
  "font-family": "sans-serif", "font-size": 12, role: "img" }, s("title", {}, joined(running(title))),
s("rect", { width, height, fill: "#ffffff" }), ...children);

/** The scatter as it stands: axes with names and ends, points coloured by kind, the open latent ringed. */
export function scatterFigure(hub, { x, y, points, ends }) {
  const [left, top, width, height] = [64, 20, 500, 380];
  const at = (value, [low, high]) => (value - low) / (high - low || 1);
  const cx = (i) => left + width * at(x.value(i), ends.x), cy = (i) => top + height * (1 - at(y.value(i), ends.y));
  const dot = (i) => s("circle", { cx: cx(i).toFixed(1), cy: cy(i).toFixed(1), r: 2.6,
    ...paint(KIND_INK[kindOf(hub.state, i)?.key] || INK.neutral, 0.75) });
  const current = hub.view.current;
  const ring = points.includes(current) ? [s("circle", { cx: cx(current), cy: cy(current), r: 6, fill: "none", stroke: INK.ink,
    "stroke-width": 1.5 }), label(cx(current) + 8, cy(current) + 4, hub.state.latents.name[current])] : [];
  return frame(600, 450, hub.state.title, s("rect", { x: left, y: top, width, height, fill: "none", stroke: INK.faint }),
    ...points.map(dot), ...ring,
    label(left, top + height + 16, number(ends.x[0])), label(left + width, top + height + 16, number(ends.x[1]), { "text-anchor": "end" }),
    label(left - 6, top + height, number(ends.y[0]), { "text-anchor": "end" }), label(left - 6, top + 10, number(ends.y[1]), { "text-anchor": "end" }),
    label(left + width / 2, top + height + 34, x.label, { "text-anchor": "middle" }),
    label(0, 0, y.label, { "text-anchor": "middle", transform: `translate(16 ${top + height / 2}) rotate(-90)` }));
}

/** The page of a latent: its name, its separation with intervals, its top examples with tinted tokens. */
export function pageFigure(hub, lines, i) {
  const { state } = hub, { latents } = state, rows = [];
  let y = 24;
  const put = (node) => rows.push(node);
  put(label(12, y, `Latent ${latents.name[i]}`, { "font-size": 16, "font-weight": 600 }));
  state.contrasts.forEach((contrast, c) => put(label(12, y += 20, `AUROC ${contrast.name}: ${rate(latents.auroc[c][i])} ` +
    `(${rate(latents.low[c][i])} to ${rate(latents.high[c][i])}), ${contrast.positive} above ${contrast.negative}`)));
  put(label(12, y += 20, `active on ${percent(latents.density[i])} of tokens; largest activation ${number(latents.max[i])}`));
  y += 10;
  for (const stored of state.pages[i].examples.slice(0, 8)) {
    const { group, shown, top } = lines.unpack(stored);
    put(label(12, y += 22, `${state.groups[group].name}, ${number(top)}`, { fill: INK.faint, "font-size": 11 }));
    let x = 12;
    y += 18;
    for (const { text, value } of shown) {
      const drawn = joined(visible(text)), width = 7.3 * [...drawn].length;
      if (x + width > 708) [x, y] = [12, y + 20];
      const share = Math.min(1, Math.abs(value) / Math.abs(latents.max[i] || 1));
      if (value) put(s("rect", { x, y: y - 12, width, height: 16, rx: 2,
        ...paint(value > 0 ? INK.positive : INK.negative, 0.12 + 0.55 * share) }));
      put(s("text", { x, y, fill: INK.ink, "font-family": "monospace", textLength: Math.max(width, 1), "xml:space": "preserve" }, drawn));
      x += width;
    }
  }
  return frame(720, y + 20, `Latent ${latents.name[i]}`, ...rows);
}

/** Put a figure on the clipboard as SVG text; where that is forbidden, give it as a file. */
export async function copyFigure(hub, node, name) {
  const text = new XMLSerializer().serializeToString(node);
  hub.figure = text;
  try {
    await navigator.clipboard.writeText(text);
    hub.say("The figure is on the clipboard, as SVG.");
  } catch {
    hub.give(text, `${name.replace(/[^\w.-]/g, "_")}.svg`, "image/svg+xml");
  }
}
