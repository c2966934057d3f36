// The feature browser: one view for the live widget and for the offline file. Nothing here asks the network.

import { h, running } from "./text.js";
import { kinds } from "./latents.js";
import { followTheme } from "./theme.js";
import { kernelOf } from "./kernel.js";
import { notebook, noteTools } from "./notes.js";
import { tokenLines } from "./examples.js";
import { pages } from "./page.js";
import { scatter } from "./scatter.js";
import { latentList } from "./list.js";
import { livePanel } from "./live.js";

const NO_NOTES = { notes: {}, lists: {} };

/** Build the browser inside `el` from a state object; returns { select, notes, destroy }. */
export function mount(el, state, { selected = null, onSelect = () => {}, fill = false, notes = NO_NOTES,
  onNotes = () => {}, model = null, canRun = false } = {}) {
  const id = `fb${Math.random().toString(36).slice(2, 10)}`; // several browsers may share one page
  const { latents } = state;
  const view = { text: "", kind: "all", sort: state.contrasts.length ? "auroc0" : null, descending: true, rows: [],
    current: -1, pair: null };

  // ---- skeleton
  const alert = h("p", { class: "fb-alert", role: "alert" });
  const status = h("p", { class: "fb-status", role: "status", "aria-live": "polite" });
  const busy = h("span", { class: "fb-busy fb-faint", role: "status" });
  const box = h("input", { class: "fb-search", type: "search", placeholder: "Search texts, tokens or a number   ( / )",
    "aria-label": "Search latents by text, token or number", spellcheck: "false", autocomplete: "off",
    maxlength: 200 });
  const filters = h("div", { class: "fb-filters", role: "radiogroup", "aria-label": "Show latents of kind" });
  const themeButton = h("button", { class: "fb-button", type: "button" });
  const empty = h("p", { class: "fb-empty", hidden: true }, "No latent fits. Clear the search or choose another kind.");
  const page = h("section", { class: "fb-page", "aria-label": "Latent page", tabindex: -1 });
  const root = h("div", { class: `fb${fill ? " fb-fill" : ""}`, "data-lm-suppress-shortcuts": "true" });

  const hub = {
    id, state, view, root, page, canRun,
    kernel: model ? kernelOf(model, (waiting) => { busy.textContent = waiting ? "the kernel is working …" : ""; }) : null,
    notes: notebook(notes, (json) => hub.notesChanged(json)),
    notesChanged(json) {
      onNotes(json);
      count();
      if (view.kind === "saved") refresh();
    },
    fail: (text) => { alert.textContent = text; },
    say: (text) => { status.textContent = text; },
    placeOf: (number) => (latents.id[number] === number ? number : latents.id.indexOf(number)),
    select, show, refresh, compare,
    give(text, name, type) {
      const link = h("a", { download: name, href: URL.createObjectURL(new Blob([text], { type })) });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    },
  };
  const allKinds = kinds(state, (name) => hub.notes.has(name));
  const list = latentList(hub, allKinds);
  const lines = tokenLines(state, root);
  const plot = scatter(hub);
  const onePage = pages(hub, page, lines);
  const live = livePanel(hub, lines);
  root.prepend(
    h("header", { class: "fb-header" },
      h("div", { class: "fb-titles" }, h("h2", { class: "fb-title" }, ...running(state.title)), metaLine(state)),
      h("div", { class: "fb-tools" }, busy, ...noteTools(hub), themeButton)),
    ...state.warnings.map((text) => h("p", { class: "fb-warning", role: "note" }, "⚠ ", ...running(text))), alert,
    h("div", { class: "fb-toolbar" }, box, filters, comparison()),
    h("div", { class: "fb-body" },
      h("div", { class: "fb-side" }, plot.node, list.node, empty, status,
        h("p", { class: "fb-help", id: `${id}-help` },
          "↑ ↓ choose · Enter opens the page · Esc returns · / searches · ← → walk along an example's tokens")),
      page),
    live.node);
  el.replaceChildren(root);
  const stopTheme = followTheme(root, themeButton, () => plot.draw());

  // ---- filters
  const radios = new Map(), counts = new Map();
  for (const entry of allKinds) {
    const input = h("input", { type: "radio", name: `${id}-kind`, value: entry.key, onchange: () => {
      view.kind = entry.key;
      refresh();
    } });
    input.checked = entry.key === "all";
    radios.set(entry.key, input);
    counts.set(entry, h("span", { class: "fb-count" }));
    filters.append(h("label", { class: "fb-filter" }, input, h("span", { class: `fb-dot fb-kind-${entry.key}` }),
      h("span", {}, entry.label), counts.get(entry)));
  }
  function count() {
    for (const [entry, node] of counts) node.textContent = latents.id.filter((_, i) => entry.test(i)).length;
  }

  // ---- two groups against each other
  function comparison() {
    if (state.groups.length < 2) return null;
    const options = () => [h("option", { value: "" }, "–"),
      ...state.groups.slice(0, 8).map((group, g) => h("option", { value: g }, group.name))];
    hub.sides = ["first group", "second group"].map((label) => h("select", { class: "fb-input", "aria-label": label,
      onchange: () => compare(hub.sides.some((side) => side.value === "") || hub.sides[0].value === hub.sides[1].value
        ? null : hub.sides.map((side) => Number(side.value)), true) }, ...options()));
    return h("div", { class: "fb-tools fb-compare", role: "group", "aria-label": "Compare two groups of prompts" },
      "compare ", hub.sides[0], " with ", hub.sides[1]);
  }
  function compare(pair, typed = false) {
    view.pair = pair;
    if (!typed) hub.sides.forEach((side, k) => { side.value = pair ? String(pair[k]) : ""; });
    if (pair) [view.sort, view.descending] = ["pair", true];
    else if (view.sort === "pair") view.sort = state.contrasts.length ? "auroc0" : null;
    list.buildColumns();
    refresh();
    if (view.current >= 0) onePage.draw(view.current);
  }

  // ---- what is shown
  let remote = new Set();
  function refresh() {
    view.rows = list.find(remote);
    const total = state.n_total || latents.id.length;
    const missing = total > latents.id.length ? ` (${total - latents.id.length} more in the full browser)` : "";
    status.textContent = `${view.rows.length} of ${latents.id.length} latents${missing}`;
    empty.hidden = view.rows.length > 0;
    if (view.rows.length && !view.rows.includes(view.current)) select(view.rows[0], { quiet: true });
    list.refresh();
    plot.draw();
  }

  function select(latent, { quiet = false } = {}) {
    view.current = latent;
    list.reveal();
    list.draw();
    plot.mark();
    if (state.pages[latent] === null && hub.kernel) fetchPage(latent);
    onePage.draw(latent);
    live.follow();
    if (!quiet) onSelect(latents.id[latent]);
    if (!quiet && fill) setLink(latents.name[latent]);
  }

  function fetchPage(latent) {
    hub.kernel.ask("page", { latent: latents.id[latent], known: state.vocab.length }, (reply) => {
      reply.vocab.forEach((text, k) => { state.vocab[reply.vocab_from + k] = text; });
      state.pages[latent] = reply.page;
      if (view.current === latent) onePage.draw(latent);
    }, hub.fail);
  }

  /** Open a latent wherever it is: filters and search that hide it are cleared. */
  function show(latent) {
    if (latent < 0) return;
    if (!view.rows.includes(latent)) {
      box.value = view.text = "";
      view.kind = "all";
      radios.get("all").checked = true;
      view.current = latent;
      refresh();
    }
    select(latent);
  }

  // ---- search and keys
  box.addEventListener("input", () => {
    view.text = box.value;
    remote = new Set();
    refresh();
    const needle = view.text.trim();
    if (hub.kernel && needle.length > 1 && !needle.startsWith("#") && state.pages.includes(null)) {
      hub.kernel.ask("search", { text: needle }, ({ found }) => {
        remote = new Set(found);
        refresh();
      }, hub.fail);
    }
  });
  box.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" || event.key === "Enter") {
      event.preventDefault();
      list.node.focus();
    }
  });
  const keys = fill ? document : root; // alone on a page, the browser listens to all of it
  const typing = (node) => node !== box && /^(TEXTAREA|INPUT|SELECT)$/.test(node.tagName) && node.type !== "radio";
  const onKey = (event) => {
    if (event.key === "/" && event.target !== box && !typing(event.target)) {
      event.preventDefault();
      box.focus();
    } else if (event.key === "Escape") {
      if (event.target === box && box.value) {
        box.value = view.text = "";
        refresh();
      } else list.node.focus();
      lines.hideTip();
    }
  };
  keys.addEventListener("keydown", onKey);

  // ---- links: #latent=3.17
  const linked = () => latents.name.indexOf(decoded(/^#latent=(.+)$/.exec(location.hash)?.[1] ?? ""));
  const follow = () => linked() >= 0 && linked() !== view.current && show(linked());
  if (fill) addEventListener("hashchange", follow);

  const opening = selected === null ? -1 : latents.id.indexOf(selected);
  count();
  refresh();
  if (opening >= 0) select(opening, { quiet: true });
  if (fill) follow();
  return {
    select: (figure) => {
      const latent = latents.id.indexOf(figure);
      if (latent >= 0 && latent !== view.current) show(latent);
    },
    notes: (json) => {
      if (JSON.stringify(JSON.parse(json)) === JSON.stringify(JSON.parse(hub.notes.json()))) return;
      hub.notes.load(json);
      count();
      if (view.current >= 0) onePage.draw(view.current);
    },
    destroy: () => {
      list.destroy();
      plot.destroy();
      stopTheme();
      if (hub.kernel) hub.kernel.close();
      keys.removeEventListener("keydown", onKey);
      removeEventListener("hashchange", follow);
      el.replaceChildren();
    },
  };
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

function setLink(name) {
  try {
    history.replaceState(null, "", `#latent=${encodeURIComponent(name)}`);
  } catch {
    // a frame without an address of its own has no link either
  }
}

function metaLine(state) {
  const parts = Object.entries(state.meta).map(([key, value]) => h("span", { class: "fb-meta" },
    h("span", { class: "fb-faint" }, ...running(key), " "), ...running(value)));
  const notes = state.notes.map((note) => h("span", { class: "fb-meta fb-faint" }, ...running(note)));
  return h("p", { class: "fb-metaline" }, ...parts, ...notes);
}

/** anywidget's entry: the state arrives as JSON text; selection and notes go both ways. */
export default {
  render({ model, el }) {
    let browser = null;
    const build = () => {
      if (browser) browser.destroy();
      browser = null;
      const problem = model.get("error");
      if (problem || !model.get("state")) {
        el.replaceChildren(h("div", { class: "fb" }, h("p", { class: "fb-alert", role: "alert" }, ...running(problem))));
        return;
      }
      const sync = (key) => (value) => {
        model.set(key, value);
        model.save_changes();
      };
      browser = mount(el, JSON.parse(model.get("state")), { selected: model.get("selected"), onSelect: sync("selected"),
        notes: JSON.parse(model.get("notes")), onNotes: sync("notes"), model, canRun: model.get("live_model") });
    };
    const follow = () => browser && browser.select(model.get("selected"));
    const takeNotes = () => browser && browser.notes(model.get("notes"));
    const heard = [["change:state", build], ["change:error", build], ["change:live_model", build],
      ["change:selected", follow], ["change:notes", takeNotes]];
    build();
    heard.forEach(([event, listener]) => model.on(event, listener));
    return () => {
      heard.forEach(([event, listener]) => model.off(event, listener));
      if (browser) browser.destroy();
    };
  },
};
