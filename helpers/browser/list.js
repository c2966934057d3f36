// The list of latents: sortable, searchable, and only the rows in sight exist.

import { h, number, percent, rate, running, tint, visible } from "./text.js";
import { pairArea } from "./statistics.js";
import { haystack, kindOf, peakTokens, remembered } from "./latents.js";

const ROW = 30; // pixels per list row
const LONGEST = 14; // characters of a name that the list makes room for

/** A latent's name as the list shows it: with several sites, the site stands small below layer and number. */
function placeName(name) {
  const [, site, number] = /^([a-z_]+)\.(\d+\.\d+)$/.exec(name) || [];
  return site ? { site, number, length: Math.max(number.length, 0.8 * site.length) } : { number: name, length: name.length };
}

/** The list; returns { node, find, refresh, draw, reveal, focus, destroy }. `hub.view` holds sort, text and kind. */
export function latentList(hub, allKinds) {
  const { state, view, id } = hub;
  const latents = state.latents;
  const search = remembered((i) => haystack(state, i), (i) => state.pages[i]);
  const names = remembered((i) => peakTokens(state, i));
  const head = h("div", { class: "fb-row fb-head", role: "row", "aria-rowindex": 1 });
  const canvas = h("div", { class: "fb-canvas", role: "rowgroup" });
  const list = h("div", { class: "fb-list", role: "grid", tabindex: 0, "aria-label": "Latents",
    "aria-describedby": `${id}-help` }, h("div", { role: "rowgroup", class: "fb-headgroup" }, head), canvas);
  const longest = latents.name.reduce((most, name) => Math.max(most, placeName(name).length), 0);
  list.style.setProperty("--fb-id", `${18 + 7.5 * Math.min(longest, LONGEST)}px`);
  let columns = [];

  function buildColumns() {
    const area = (key, label, title, value) => ({ key, label, title, value, area: true });
    columns = [
      { key: "id", label: "#", title: "number of the latent", value: (i) => latents.id[i], first: "ascending" },
      { key: "name", label: "fires on", title: "tokens at the peaks of its top examples",
        value: (i) => (names(i)[0] || "\uffff").trim().toLowerCase(), first: "ascending" },
      ...state.contrasts.map((contrast, c) => area(`auroc${c}`, contrast.name,
        `AUROC, ${contrast.positive} above ${contrast.negative}`, (i) => latents.auroc[c][i])),
      ...(view.pair ? [area("pair", "your pair", `AUROC, ${state.groups[view.pair[0]].name} above ` +
        state.groups[view.pair[1]].name, (i) => pairArea(state, ...view.pair, i))] : []),
      { key: "density", label: "density", title: "share of tokens on which it is active",
        value: (i) => latents.density[i] },
      { key: "max", label: "max", title: "largest activation seen", value: (i) => Math.abs(latents.max[i]) },
    ];
    head.replaceChildren();
    for (const column of columns) {
      const button = h("button", { type: "button", title: `Sort by ${column.title}`, class: "fb-sort", onclick: () => {
        view.descending = view.sort === column.key ? !view.descending : column.first !== "ascending";
        view.sort = column.key;
        hub.refresh();
      } }, h("span", {}, column.label), h("span", { class: "fb-arrow", "aria-hidden": "true" }));
      column.cell = h("div", { class: `fb-cell fb-${column.key.replace(/\d+$/, "")}`, role: "columnheader" }, button);
      head.append(column.cell);
    }
    list.setAttribute("aria-colcount", columns.length);
    list.style.setProperty("--fb-contrasts", columns.filter((column) => column.area).length);
  }

  /** The latents that fit filter and search, sorted; `remote` holds what the kernel's search found. */
  function find(remote = new Set()) {
    const needle = view.text.trim().toLowerCase();
    const wanted = allKinds.find((entry) => entry.key === view.kind);
    const byNumber = /^#?\d+$/.test(needle) ? Number(needle.replace("#", "")) : null;
    const fits = (i) => wanted.test(i) &&
      (!needle || latents.id[i] === byNumber || latents.name[i] === needle.replace("#", "") || remote.has(i) ||
        (!needle.startsWith("#") && search(i).includes(needle)));
    const rows = [...Array(latents.id.length).keys()].filter(fits);
    const column = columns.find((entry) => entry.key === view.sort);
    if (column) {
      const sign = view.descending ? -1 : 1;
      const value = new Map(rows.map((i) => [i, column.value(i)]));
      rows.sort((a, b) => {
        const x = value.get(a), y = value.get(b);
        return x < y ? -sign : x > y ? sign : a - b;
      });
    }
    return rows;
  }

  function refresh() {
    for (const entry of columns) {
      const sorted = entry.key === view.sort;
      entry.cell.setAttribute("aria-sort", sorted ? (view.descending ? "descending" : "ascending") : "none");
      entry.cell.querySelector(".fb-arrow").textContent = sorted ? (view.descending ? "▼" : "▲") : "";
    }
    list.setAttribute("aria-rowcount", view.rows.length + 1);
    canvas.style.height = `${view.rows.length * ROW}px`;
    list.scrollTop = 0;
    draw();
  }

  function draw() {
    const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 6);
    const last = Math.min(view.rows.length, first + Math.ceil((list.clientHeight || 600) / ROW) + 14);
    canvas.replaceChildren(...view.rows.slice(first, last).map((latent, k) => row(latent, first + k)));
    const open = canvas.querySelector('[aria-selected="true"]');
    if (open) list.setAttribute("aria-activedescendant", open.id);
    else list.removeAttribute("aria-activedescendant");
  }

  function row(latent, place) {
    const cells = columns.map((column) => {
      const cell = h("div", { role: "gridcell", class: `fb-cell fb-${column.key.replace(/\d+$/, "")}` });
      if (column.key === "id") {
        const { site, number: shown } = placeName(latents.name[latent]);
        cell.append(h("span", { class: `fb-dot fb-kind-${kindOf(state, latent)?.key ?? "all"}` }),
          h("span", { class: "fb-place" }, h("bdi", {}, ...running(shown)), site ? h("span", { class: "fb-faint" }, site) : null));
      } else if (column.key === "name") {
        if (names(latent).length === 0) cell.append(h("span", { class: "fb-faint" }, "never active"));
        names(latent).forEach((text) => cell.append(h("bdi", { class: "fb-chip" }, ...visible(text))));
      } else if (column.area) {
        const value = column.value(latent);
        const bar = h("span", { class: "fb-bar" });
        bar.style.setProperty("--from", `${100 * Math.min(value, 0.5)}%`);
        bar.style.setProperty("--width", `${100 * Math.abs(value - 0.5)}%`);
        bar.style.setProperty("--ink", tint(value - 0.5, 0.5));
        cell.append(bar, rate(value));
      } else cell.append(column.key === "density" ? percent(column.value(latent)) : number(latents.max[latent]));
      return cell;
    });
    const node = h("div", { class: "fb-row", role: "row", id: `${id}-row-${latent}`, "aria-rowindex": place + 2,
      "aria-selected": latent === view.current ? "true" : "false", "data-latent": latents.id[latent],
      onclick: () => hub.select(latent) }, ...cells);
    node.style.top = `${place * ROW}px`;
    return node;
  }

  function reveal() {
    const place = view.rows.indexOf(view.current);
    if (place < 0) return;
    const top = place * ROW, height = list.clientHeight - head.offsetHeight;
    if (top < list.scrollTop) list.scrollTop = top;
    else if (top + ROW > list.scrollTop + height) list.scrollTop = top + ROW - height;
  }

  list.addEventListener("scroll", draw);
  list.addEventListener("keydown", (event) => {
    if (event.target !== list || event.ctrlKey || event.metaKey || event.altKey) return;
    const place = view.rows.indexOf(view.current);
    const jump = Math.max(1, Math.floor(list.clientHeight / ROW) - 2);
    const moves = { ArrowDown: place + 1, ArrowUp: place - 1, PageDown: place + jump, PageUp: place - jump,
      Home: 0, End: view.rows.length - 1 };
    if (event.key in moves && view.rows.length) {
      event.preventDefault();
      hub.select(view.rows[Math.min(view.rows.length - 1, Math.max(0, moves[event.key]))]);
    } else if (event.key === "Enter" && view.current >= 0) {
      event.preventDefault();
      hub.page.focus();
    }
  });
  const resize = new ResizeObserver(() => draw());
  resize.observe(list);
  buildColumns();
  return { node: list, find, refresh, draw, reveal, buildColumns, destroy: () => resize.disconnect() };
}
