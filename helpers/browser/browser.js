// The feature browser: one view for the live widget and for the offline file. Nothing here asks the network.

import { h, number, percent, rate, running, tint, visible } from "./text.js";
import { haystack, kindOf, kinds, peakTokens, remembered } from "./latents.js";
import { followTheme } from "./theme.js";
import { pages } from "./page.js";

const ROW = 30; // pixels per list row

/** Build the browser inside `el` from a state object; returns { select, destroy }. */
export function mount(el, state, { selected = null, onSelect = () => {}, fill = false } = {}) {
  const id = `fb${Math.random().toString(36).slice(2, 10)}`; // several browsers may share one page
  const latents = state.latents;
  const count = state.pages.length;
  const all = kinds(state);
  const search = remembered((i) => haystack(state, state.pages[i]));
  const names = remembered((i) => peakTokens(state, state.pages[i], 3));
  const view = { text: "", kind: "all", sort: state.contrasts.length ? "auroc0" : null, descending: true, rows: [],
    current: -1 };

  // ---- skeleton
  const status = h("p", { class: "fb-status", role: "status", "aria-live": "polite" });
  const box = h("input", { class: "fb-search", type: "search", placeholder: "Search texts, tokens or a number   ( / )",
    "aria-label": "Search latents by text, token or number", spellcheck: "false", autocomplete: "off",
    maxlength: 200 });
  const filters = h("div", { class: "fb-filters", role: "radiogroup", "aria-label": "Show latents of kind" });
  const themeButton = h("button", { class: "fb-button", type: "button" });
  const head = h("div", { class: "fb-row fb-head", role: "row", "aria-rowindex": 1 });
  const canvas = h("div", { class: "fb-canvas", role: "rowgroup" });
  const list = h("div", { class: "fb-list", role: "grid", tabindex: 0, "aria-label": "Latents",
    "aria-describedby": `${id}-help` }, h("div", { role: "rowgroup", class: "fb-headgroup" }, head), canvas);
  const empty = h("p", { class: "fb-empty", hidden: true }, "No latent fits. Clear the search or choose another kind.");
  const page = h("section", { class: "fb-page", "aria-label": "Latent page", tabindex: -1 });
  const root = h("div", { class: `fb${fill ? " fb-fill" : ""}`, "data-lm-suppress-shortcuts": "true" },
    h("header", { class: "fb-header" },
      h("div", { class: "fb-titles" }, h("h2", { class: "fb-title" }, ...running(state.title)), metaLine(state)),
      themeButton),
    h("div", { class: "fb-toolbar" }, box, filters),
    h("div", { class: "fb-body" },
      h("div", { class: "fb-side" }, list, empty, status,
        h("p", { class: "fb-help", id: `${id}-help` },
          "↑ ↓ choose · Enter opens the page · Esc returns · / searches · ← → walk along an example's tokens")),
      page));
  root.style.setProperty("--fb-contrasts", state.contrasts.length);
  el.replaceChildren(root);
  const { draw: drawPage, hideTip } = pages(state, root, page);

  const stopTheme = followTheme(root, themeButton);

  // ---- columns of the list
  const columns = [
    { key: "id", label: "#", title: "number of the latent", value: (i) => latents.id[i], first: "ascending" },
    { key: "name", label: "fires on", title: "tokens at the peaks of its top examples",
      value: (i) => (names(i)[0] || "\uffff").trim().toLowerCase(), first: "ascending" },
    ...state.contrasts.map((contrast, c) => ({ key: `auroc${c}`, label: contrast.name,
      title: `AUROC, ${contrast.positive} above ${contrast.negative}`, value: (i) => latents.auroc[c][i] })),
    { key: "density", label: "density", title: "share of tokens on which it is active",
      value: (i) => latents.density[i] },
    { key: "max", label: "max", title: "largest activation seen", value: (i) => Math.abs(latents.max[i]) },
  ];
  for (const column of columns) {
    const button = h("button", { type: "button", title: `Sort by ${column.title}`, class: "fb-sort", onclick: () => {
      view.descending = view.sort === column.key ? !view.descending : column.first !== "ascending";
      view.sort = column.key;
      refresh();
    } }, h("span", {}, column.label), h("span", { class: "fb-arrow", "aria-hidden": "true" }));
    column.cell = h("div", { class: `fb-cell fb-${column.key.replace(/\d+$/, "")}`, role: "columnheader" }, button);
    head.append(column.cell);
  }
  list.setAttribute("aria-colcount", columns.length);

  // ---- filters
  const radios = new Map();
  for (const entry of all) {
    const figure = latents.kind.filter((kind) => entry.test(kind)).length;
    const input = h("input", { type: "radio", name: `${id}-kind`, value: entry.key, onchange: () => {
      view.kind = entry.key;
      refresh();
    } });
    input.checked = entry.key === "all";
    radios.set(entry.key, input);
    filters.append(h("label", { class: "fb-filter" }, input, h("span", { class: `fb-dot fb-kind-${entry.key}` }),
      h("span", {}, entry.label), h("span", { class: "fb-count" }, figure)));
  }

  // ---- the list: only the rows in sight exist
  function refresh() {
    const needle = view.text.trim().toLowerCase();
    const wanted = all.find((entry) => entry.key === view.kind);
    const byNumber = /^#?\d+$/.test(needle) ? Number(needle.replace("#", "")) : null;
    const fits = (i) => wanted.test(latents.kind[i]) &&
      (!needle || latents.id[i] === byNumber || latents.name[i] === needle.replace("#", "") ||
        (!needle.startsWith("#") && search(i).includes(needle)));
    view.rows = [...Array(count).keys()].filter(fits);
    const column = columns.find((entry) => entry.key === view.sort);
    if (column) {
      const sign = view.descending ? -1 : 1;
      view.rows.sort((a, b) => {
        const x = column.value(a), y = column.value(b);
        return x < y ? -sign : x > y ? sign : a - b;
      });
    }
    for (const entry of columns) {
      const sorted = entry.key === view.sort;
      entry.cell.setAttribute("aria-sort", sorted ? (view.descending ? "descending" : "ascending") : "none");
      entry.cell.querySelector(".fb-arrow").textContent = sorted ? (view.descending ? "▼" : "▲") : "";
    }
    const total = state.n_total || count;
    const missing = total > count ? ` (${total - count} more in the full browser)` : "";
    status.textContent = `${view.rows.length} of ${count} latents${missing}`;
    list.setAttribute("aria-rowcount", view.rows.length + 1);
    canvas.style.height = `${view.rows.length * ROW}px`;
    empty.hidden = view.rows.length > 0;
    list.scrollTop = 0;
    if (view.rows.length && !view.rows.includes(view.current)) select(view.rows[0], { quiet: true });
    draw();
  }

  function draw() {
    const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 6);
    const last = Math.min(view.rows.length, first + Math.ceil((list.clientHeight || 600) / ROW) + 14);
    canvas.replaceChildren(...view.rows.slice(first, last).map((latent, k) => row(latent, first + k)));
    if (view.current >= 0 && view.rows.includes(view.current)) {
      list.setAttribute("aria-activedescendant", `${id}-row-${view.current}`);
    } else list.removeAttribute("aria-activedescendant");
  }

  function row(latent, place) {
    const chosen = latent === view.current;
    const cells = columns.map((column) => {
      const cell = h("div", { role: "gridcell", class: `fb-cell fb-${column.key.replace(/\d+$/, "")}` });
      if (column.key === "id") {
        cell.append(h("span", { class: `fb-dot fb-kind-${kindKey(latent)}` }),
          h("bdi", {}, ...running(latents.name[latent])));
      } else if (column.key === "name") {
        if (names(latent).length === 0) cell.append(h("span", { class: "fb-faint" }, "never active"));
        names(latent).forEach((text) => cell.append(h("bdi", { class: "fb-chip" }, ...visible(text))));
      } else if (column.key.startsWith("auroc")) {
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
      "aria-selected": chosen ? "true" : "false", "data-latent": latents.id[latent],
      onclick: () => select(latent) }, ...cells);
    node.style.top = `${place * ROW}px`;
    return node;
  }

  function kindKey(latent) {
    const entry = kindOf(state, latents.kind[latent]);
    return entry ? entry.key : "all";
  }

  function reveal() {
    const place = view.rows.indexOf(view.current);
    if (place < 0) return;
    const top = place * ROW, height = list.clientHeight - head.offsetHeight;
    if (top < list.scrollTop) list.scrollTop = top;
    else if (top + ROW > list.scrollTop + height) list.scrollTop = top + ROW - height;
  }

  function select(latent, { quiet = false } = {}) {
    view.current = latent;
    reveal();
    draw();
    drawPage(latent);
    if (!quiet) onSelect(latents.id[latent]);
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
      select(view.rows[Math.min(view.rows.length - 1, Math.max(0, moves[event.key]))]);
    } else if (event.key === "Enter" && view.current >= 0) {
      event.preventDefault();
      page.focus();
    }
  });
  box.addEventListener("input", () => {
    view.text = box.value;
    refresh();
  });
  box.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" || event.key === "Enter") {
      event.preventDefault();
      list.focus();
    }
  });
  const keys = fill ? document : root; // alone on a page, the browser listens to all of it
  const onKey = (event) => {
    if (event.key === "/" && event.target !== box) {
      event.preventDefault();
      box.focus();
    } else if (event.key === "Escape") {
      if (event.target === box && box.value) {
        box.value = view.text = "";
        refresh();
      } else list.focus();
      hideTip();
    }
  };
  keys.addEventListener("keydown", onKey);

  const resize = new ResizeObserver(() => draw());
  resize.observe(list);
  const opening = latents.id.indexOf(selected);
  refresh();
  if (opening >= 0) select(opening, { quiet: true });
  return {
    select: (figure) => {
      const latent = latents.id.indexOf(figure);
      if (latent < 0 || latent === view.current) return;
      if (!view.rows.includes(latent)) {
        box.value = view.text = "";
        view.kind = "all";
        radios.get("all").checked = true;
        view.current = latent;
        refresh();
      }
      select(latent, { quiet: true });
    },
    destroy: () => {
      resize.disconnect();
      stopTheme();
      keys.removeEventListener("keydown", onKey);
      el.replaceChildren();
    },
  };
}

function metaLine(state) {
  const parts = Object.entries(state.meta).map(([key, value]) => h("span", { class: "fb-meta" },
    h("span", { class: "fb-faint" }, ...running(key), " "), ...running(value)));
  const notes = state.notes.map((note) => h("span", { class: "fb-meta fb-faint" }, ...running(note)));
  return h("p", { class: "fb-metaline" }, ...parts, ...notes);
}

/** anywidget's entry: the state arrives as JSON text, the selection goes both ways. */
export default {
  render({ model, el }) {
    let browser = null;
    const build = () => {
      if (browser) browser.destroy();
      browser = mount(el, JSON.parse(model.get("state")), {
        selected: model.get("selected"),
        onSelect: (latent) => {
          model.set("selected", latent);
          model.save_changes();
        },
      });
    };
    const follow = () => browser.select(model.get("selected"));
    build();
    model.on("change:state", build);
    model.on("change:selected", follow);
    return () => {
      model.off("change:state", build);
      model.off("change:selected", follow);
      browser.destroy();
    };
  },
};
