// Questions to a browser state: which kind a latent is, which tokens it peaks on, what search looks through.

const DEAD = -1;

/** The kinds a latent can be shown as: only one contrast, both, neither, dead; dense and saved go across them. */
export function kinds(state, saved = () => false) {
  const kind = state.latents.kind;
  const names = state.contrasts.map((contrast) => contrast.name);
  const list = [{ key: "all", label: "all", test: () => true, across: true }];
  if (names.length === 1) list.push({ key: "1", label: names[0], test: (i) => kind[i] === 1 });
  if (names.length >= 2) {
    names.forEach((name, bit) =>
      list.push({ key: String(1 << bit), label: `${name} only`, bit, test: (i) => kind[i] === 1 << bit }));
    list.push({ key: "many", label: names.length === 2 ? "both" : "several",
      test: (i) => kind[i] > 0 && (kind[i] & (kind[i] - 1)) !== 0 });
  }
  if (names.length) list.push({ key: "0", label: "neither", test: (i) => kind[i] === 0 });
  list.push({ key: "dead", label: "dead", test: (i) => kind[i] === DEAD });
  list.push({ key: "dense", label: "dense", test: (i) => state.latents.density[i] > state.dense, across: true });
  list.push({ key: "saved", label: "saved", test: (i) => saved(state.latents.name[i]), across: true });
  return list;
}

const known = new WeakMap(); // kinds of a state, made once

export function kindOf(state, latent) {
  if (!known.has(state)) known.set(state, kinds(state).filter((entry) => !entry.across));
  return known.get(state).find((entry) => entry.test(latent));
}

/** The tokens at a latent's peaks, most frequent first: what the list shows as its name. */
export function peakTokens(state, latent) {
  return state.tops[latent].map((token) => state.vocab[token]);
}

/** What text search looks through: the texts around the peaks and the promoted tokens, in lower case. */
export function haystack(state, latent) {
  const page = state.pages[latent];
  if (!page) return peakTokens(state, latent).join("\n").toLowerCase();
  const texts = page.examples.map(([doc, start, stop]) =>
    state.docs[doc].tokens.slice(start, stop).map((token) => state.vocab[token]).join(""));
  const moved = [...page.promoted, ...page.suppressed].map(([token]) => state.vocab[token]);
  return [...texts, moved.join(" ")].join("\n").toLowerCase();
}

/** A function of a latent that computes each value once (again when `version` gives something new). */
export function remembered(compute, version = () => 0) {
  const found = new Map();
  return (i) => {
    const at = found.get(i);
    if (at && at[0] === version(i)) return at[1];
    const value = compute(i);
    found.set(i, [version(i), value]);
    return value;
  };
}
