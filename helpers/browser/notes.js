// The reader's notes on latents and saved lists of them: kept as JSON, and always shown as text.

import { h, running } from "./text.js";

/** Notes { notes: {name: text}, lists: {list: [names]} }; `changed(json)` hears every change. */
export function notebook(given, changed) {
  let data = { notes: { ...given.notes }, lists: { ...given.lists } };
  let list = Object.keys(data.lists)[0] || "saved";
  const has = (name) => (Object.hasOwn(data.lists, list) ? data.lists[list] : []).includes(name);
  const tell = () => changed(JSON.stringify(data));

  function panel(name) {
    const text = h("textarea", { class: "fb-note", rows: 2, "aria-label": `Note on latent ${name}`, maxlength: 20000,
      placeholder: "your note on this latent", spellcheck: "false", onchange: () => {
        if (text.value) data.notes = { ...data.notes, [name]: text.value };
        else data.notes = Object.fromEntries(Object.entries(data.notes).filter(([key]) => key !== name));
        tell();
      } });
    text.value = Object.hasOwn(data.notes, name) ? data.notes[name] : "";
    const options = h("datalist", { id: `fb-lists-${Math.random().toString(36).slice(2)}` },
      ...Object.keys(data.lists).map((key) => h("option", { value: key })));
    const chosen = h("input", { class: "fb-input", type: "text", "aria-label": "Name of the list", list: options.id,
      maxlength: 80, value: list, onchange: () => {
        list = chosen.value.trim() || "saved";
        mark();
        tell();
      } });
    const save = h("button", { type: "button", class: "fb-button fb-save", onclick: () => {
      const own = Object.hasOwn(data.lists, list) ? data.lists[list] : [];
      data.lists = { ...data.lists, [list]: has(name) ? own.filter((one) => one !== name) : [...own, name] };
      mark();
      tell();
    } });
    const mark = () => {
      save.setAttribute("aria-pressed", String(has(name)));
      save.textContent = has(name) ? "★ in the list" : "☆ save to list";
    };
    mark();
    return h("div", { class: "fb-section" }, h("h4", {}, "notes"), text,
      h("div", { class: "fb-tools" }, save, chosen, options));
  }

  return {
    panel, has,
    get list() { return list; },
    members: () => (Object.hasOwn(data.lists, list) ? data.lists[list] : []),
    json: () => JSON.stringify(data, null, 1),
    load(text) {
      const found = JSON.parse(text);
      const texts = Object.values(found.notes), lists = Object.values(found.lists);
      if (!texts.every((one) => typeof one === "string") || !lists.every((one) => Array.isArray(one))) throw Error();
      data = { notes: found.notes, lists: found.lists };
      if (!Object.hasOwn(data.lists, list)) list = Object.keys(data.lists)[0] || list;
    },
  };
}

/** Buttons that write the notes to a file and read them from one. */
export function noteTools(hub) {
  const file = h("input", { type: "file", accept: ".json,application/json", class: "fb-hidden", tabindex: -1,
    "aria-hidden": "true", onchange: async () => {
      const [chosen] = file.files;
      if (!chosen) return;
      try {
        hub.notes.load(await chosen.text());
        hub.fail("");
        hub.notesChanged(hub.notes.json());
      } catch {
        hub.fail("This file holds no notes; give one that was saved here (JSON with \"notes\" and \"lists\").");
      }
      file.value = "";
    } });
  return [h("button", { type: "button", class: "fb-button", onclick: () => hub.give(hub.notes.json(), "notes.json",
    "application/json") }, "save notes"),
  h("button", { type: "button", class: "fb-button", onclick: () => file.click() }, "load notes"), file];
}
