// Questions to a browser state: which kind a latent is, which tokens it peaks on, what search looks through.

const DEAD = -1;

/** The names of the kinds a latent can be, from the two contrasts: only one, both, neither, dead. */
export function kinds(state) {
  const names = state.contrasts.map((contrast) => contrast.name);
  const list = [{ key: "all", label: "all", test: () => true }];
  if (names.length === 1) list.push({ key: "1", label: names[0], test: (kind) => kind === 1 });
  if (names.length >= 2) {
    names.forEach((name, bit) =>
      list.push({ key: String(1 << bit), label: `${name} only`, test: (kind) => kind === 1 << bit }));
    list.push({ key: "many", label: names.length === 2 ? "both" : "several",
      test: (kind) => kind > 0 && (kind & (kind - 1)) !== 0 });
  }
  if (names.length) list.push({ key: "0", label: "neither", test: (kind) => kind === 0 });
  list.push({ key: "dead", label: "dead", test: (kind) => kind === DEAD });
  return list;
}

export function kindOf(state, kind) {
  return kinds(state).find((entry) => entry.key !== "all" && entry.test(kind));
}

/** The tokens at a latent's peaks, most frequent first: what the list shows as its name. */
export function peakTokens(state, page, limit) {
  const counts = new Map();
  for (const [doc, , , peak] of page.examples) {
    const token = state.docs[doc].tokens[peak];
    counts.set(token, (counts.get(token) || 0) + 1);
  }
  return [...counts].sort((a, b) => b[1] - a[1]).slice(0, limit).map(([token]) => state.vocab[token]);
}

/** What text search looks through: the texts around the peaks and the promoted tokens, in lower case. */
export function haystack(state, page) {
  const texts = page.examples.map(([doc, start, stop]) =>
    state.docs[doc].tokens.slice(start, stop).map((token) => state.vocab[token]).join(""));
  const moved = [...page.promoted, ...page.suppressed].map(([token]) => state.vocab[token]);
  return [...texts, moved.join(" ")].join("\n").toLowerCase();
}

/** A function of a latent that computes each value once, when it is first asked for. */
export function remembered(compute) {
  const known = new Map();
  return (i) => {
    if (!known.has(i)) known.set(i, compute(i));
    return known.get(i);
  };
}
