// All latents as points: two questions at a glance. Linked to the list by filter, search and selection.

import { h, number, rate } from "./text.js";
import { pairArea } from "./statistics.js";
import { kindOf } from "./latents.js";
import { copyFigure, KIND_INK, scatterFigure } from "./figure.js";

const PAD = 12;

/** What can be an axis: effects, AUROCs, the chosen pair of groups, density, largest activation. */
export function axes(state, view) {
  const { latents } = state;
  const areas = state.contrasts.map((contrast, c) => ({ key: `auroc${c}`, label: `AUROC ${contrast.name}`, zero: 0.5,
    value: (i) => latents.auroc[c][i] }));
  const effects = state.effects.map((name, k) => ({ key: `effect${k}`, label: name, zero: 0,
    value: (i) => latents.effect[k][i] }));
  const pair = view.pair ? [{ key: "pair", zero: 0.5, value: (i) => pairArea(state, ...view.pair, i),
    label: `AUROC ${state.groups[view.pair[0]].name} above ${state.groups[view.pair[1]].name}` }] : [];
  return [...effects, ...areas, ...pair, { key: "density", label: "density", value: (i) => latents.density[i] },
    { key: "max", label: "largest activation", value: (i) => latents.max[i] }];
}

/** The scatter; returns { node, draw, mark, destroy }. It shows `hub.view.rows` strongly and the other latents faintly. */
export function scatter(hub) {
  const { state, view } = hub;
  const count = state.latents.id.length;
  const kindKeys = Array.from({ length: count }, (_, i) => kindOf(state, i)?.key);
  const first = axes(state, view);
  const chosen = { x: first[0].key, y: first[1].key };
  const canvas = h("canvas", { class: "fb-points", tabindex: 0, role: "application", "aria-roledescription": "scatter plot" });
  const picks = Object.fromEntries(["x", "y"].map((side) => [side, h("select", { class: "fb-input",
    "aria-label": `${side} axis`, onchange: () => {
      chosen[side] = picks[side].value;
      draw();
    } })]));
  const readout = h("span", { class: "fb-readout fb-faint", "aria-live": "polite" });
  const node = h("section", { class: "fb-scatter", "aria-label": "Scatter of all latents" }, canvas,
    h("div", { class: "fb-tools" }, h("label", {}, "→ ", picks.x), h("label", {}, "↑ ", picks.y), readout,
      h("button", { type: "button", class: "fb-button", onclick: () => copyFigure(hub, scatterFigure(hub, {
        ...axis(), points: view.rows, ends: ends() }), "scatter") }, "copy as SVG")));
  let hovered = -1;

  function axis() {
    const list = axes(state, view);
    const find = (side) => list.find((one) => one.key === chosen[side]) || list[side === "x" ? 0 : 1];
    return { x: find("x"), y: find("y") };
  }

  function ends() {
    return Object.fromEntries(Object.entries(axis()).map(([side, { value, zero }]) => {
      let low = zero ?? Infinity, high = zero ?? -Infinity;
      for (let i = 0; i < count; i++) {
        const v = value(i);
        if (v < low) low = v;
        if (v > high) high = v;
      }
      return [side, low === high ? [low - 0.5, high + 0.5] : [low, high]];
    }));
  }

  let places = [];
  const base = document.createElement("canvas");
  function draw() {
    for (const side of ["x", "y"]) {
      const list = axes(state, view);
      picks[side].replaceChildren(...list.map((one) => h("option", { value: one.key }, one.label)));
      if (!list.some((one) => one.key === chosen[side])) chosen[side] = list[side === "x" ? 0 : 1].key;
      picks[side].value = chosen[side];
    }
    const { x, y } = axis(), range = ends();
    const width = canvas.clientWidth || 400, height = canvas.clientHeight || 180, ratio = window.devicePixelRatio || 1;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    const faint = getComputedStyle(hub.root).getPropertyValue("--fb-line");
    const px = (v) => PAD + ((v - range.x[0]) / (range.x[1] - range.x[0])) * (width - 2 * PAD);
    const py = (v) => height - PAD - ((v - range.y[0]) / (range.y[1] - range.y[0])) * (height - 2 * PAD);
    pen.strokeStyle = faint;
    pen.beginPath();
    if (x.zero !== undefined) pen.moveTo(px(x.zero), 0), pen.lineTo(px(x.zero), height);
    if (y.zero !== undefined) pen.moveTo(0, py(y.zero)), pen.lineTo(width, py(y.zero));
    pen.stroke();
    places = Array.from({ length: count }, (_, i) => [px(x.value(i)), py(y.value(i))]);
    const inside = new Uint8Array(count);
    for (const i of view.rows) inside[i] = 1;
    const plain = (i) => [undefined, "0", "dead"].includes(kindKeys[i]);
    const passes = [[(i) => !inside[i], 0.08], [(i) => inside[i] && plain(i), 0.45], [(i) => inside[i] && !plain(i), 0.9]];
    for (const [test, alpha] of passes) {
      pen.globalAlpha = alpha;
      for (let i = 0; i < count; i++) if (test(i)) point(pen, i);
    }
    base.width = canvas.width;
    base.height = canvas.height;
    base.getContext("2d").drawImage(canvas, 0, 0);
    mark();
  }

  function point(pen, i) {
    const key = kindKeys[i], [left, top] = places[i], r = key === "0" || key === "dead" || !key ? 1.5 : 3;
    pen.fillStyle = `rgb(${(KIND_INK[key] || KIND_INK[0]).join(" ")})`;
    if (key !== "1") return pen.fillRect(left - r, top - r, 2 * r, 2 * r);
    pen.beginPath();
    pen.arc(left, top, r, 0, 7);
    return pen.fill();
  }

  /** The points as they were drawn, with rings on the open and the pointed-at latent. */
  function mark() {
    const { x, y } = axis(), pen = canvas.getContext("2d");
    pen.setTransform(1, 0, 0, 1, 0, 0);
    pen.clearRect(0, 0, canvas.width, canvas.height);
    pen.drawImage(base, 0, 0);
    pen.scale(window.devicePixelRatio || 1, window.devicePixelRatio || 1);
    for (const [i, size] of [[hovered, 5], [view.current, 7]]) {
      if (i < 0 || !places[i]) continue;
      pen.strokeStyle = getComputedStyle(hub.root).getPropertyValue("--fb-ink");
      pen.lineWidth = 2;
      pen.beginPath();
      pen.arc(...places[i], size, 0, 7);
      pen.stroke();
    }
    canvas.setAttribute("aria-label", `Latents: ${x.label} to the right, ${y.label} upwards; ${view.rows.length} of ` +
      `${count} shown. Arrow keys go to the nearest latent in that direction.`);
    const i = hovered >= 0 ? hovered : view.current;
    const value = (one) => (one.zero === 0.5 ? rate(one.value(i)) : number(one.value(i)));
    readout.textContent = i < 0 ? "" : `${state.latents.name[i]}: ${value(x)}, ${value(y)}`;
  }

  function nearest(left, top, limit) {
    let best = -1, least = limit * limit;
    for (const i of view.rows) {
      const distance = (places[i][0] - left) ** 2 + (places[i][1] - top) ** 2;
      if (distance < least) [best, least] = [i, distance];
    }
    return best;
  }
  canvas.addEventListener("mousemove", (event) => {
    const before = hovered;
    hovered = nearest(event.offsetX, event.offsetY, 10);
    if (hovered !== before) mark();
  });
  canvas.addEventListener("mouseleave", () => {
    hovered = -1;
    mark();
  });
  canvas.addEventListener("click", (event) => {
    const found = nearest(event.offsetX, event.offsetY, 12);
    if (found >= 0) hub.select(found);
  });
  canvas.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!way || view.current < 0) return;
    event.preventDefault();
    const [left, top] = places[view.current];
    let best = -1, least = Infinity;
    for (const i of view.rows) {
      const dx = places[i][0] - left, dy = places[i][1] - top, along = dx * way[0] + dy * way[1];
      const cost = along + 3 * Math.abs(dx * way[1] + dy * way[0]);
      if (i !== view.current && along > 0.01 && cost < least) [best, least] = [i, cost];
    }
    if (best >= 0) hub.select(best);
  });
  const resize = new ResizeObserver(draw);
  resize.observe(canvas);
  return { node, draw, mark, destroy: () => resize.disconnect() };
}
