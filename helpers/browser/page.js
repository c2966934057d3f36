// The page of one latent: statistics, histogram, moved tokens, examples, neighbours, heads, the reader's notes.

import { h, number, percent, rate, running, tint, visible } from "./text.js";
import { areaInterval, meanDifference, pairArea, shareInterval } from "./statistics.js";
import { kindOf } from "./latents.js";
import { copyFigure, pageFigure } from "./figure.js";

/** A group's name with its mark; the same everywhere. */
export function groupChip(state, g) {
  return h("span", { class: "fb-group" }, h("span", { class: `fb-mark fb-mark-${g % 6}`, "aria-hidden": "true" }),
    ...running(state.groups[g].name));
}

/** Pages drawn into `page`; returns { draw }. `hub` knows the state, the chosen pair of groups, and how to select. */
export function pages(hub, page, lines) {
  const { state, view } = hub;
  const latents = state.latents;
  let sideBySide = false;

  function draw(i) {
    const content = state.pages[i];
    const entry = kindOf(state, i);
    const title = h("h3", { class: "fb-heading" }, h("span", {}, "Latent ", h("bdi", {}, ...running(latents.name[i]))),
      entry ? h("span", { class: `fb-badge fb-kind-${entry.key}` }, entry.label) : null,
      latents.density[i] > state.dense ? h("span", { class: "fb-badge" }, "dense") : null);
    page.setAttribute("aria-label", `Latent ${latents.name[i]}`);
    page.replaceChildren(title, statistics(i), ...(content ? rest(i, content) : [waiting()]));
    page.scrollTop = 0;
    lines.hideTip();
  }

  const waiting = () => h("p", { class: "fb-empty" }, hub.kernel ? "The kernel is making this page …"
    : "This page is made by a running kernel; run the cell to see it.");
  const rest = (i, content) => [histogram(content), moved(content), examples(i, content), quantiles(i, content),
    neighbours(content), heads(content), hub.notes.panel(latents.name[i]),
    h("p", { class: "fb-tools" }, h("button", { type: "button", class: "fb-button",
      onclick: () => copyFigure(hub, pageFigure(hub, lines, i), `latent-${latents.name[i]}`) }, "copy page as SVG"))];

  function area(name, estimate, low, high, text) {
    return h("dl", { class: "fb-stat" }, h("dt", {}, `AUROC ${name}`), h("dd", {}, h("b", {}, rate(estimate)),
      h("span", { class: "fb-faint" }, ` ${rate(low)} to ${rate(high)}`)), h("dd", { class: "fb-faint" }, text));
  }

  function statistics(i) {
    const box = h("div", { class: "fb-statistics" });
    state.contrasts.forEach((contrast, c) => box.append(area(contrast.name, latents.auroc[c][i], latents.low[c][i],
      latents.high[c][i], `${contrast.positive} above ${contrast.negative}`)));
    if (view.pair) {
      const [a, b] = view.pair.map((g) => ({ ...state.groups[g], mean: latents.mean[g][i], sd: latents.sd[g][i] }));
      const estimate = pairArea(state, ...view.pair, i);
      const [low, high] = areaInterval(estimate, a.n, b.n);
      const [difference, from, to] = meanDifference(a, b);
      const node = area("of your pair", estimate, low, high, `${a.name} above ${b.name}`);
      node.classList.add("fb-pairstat");
      node.append(h("dd", {}, "mean difference ", h("b", {}, number(difference)),
        h("span", { class: "fb-faint" }, ` ${number(from)} to ${number(to)}`)));
      box.append(node);
    }
    state.effects.forEach((name, k) => box.append(h("dl", { class: "fb-stat" }, h("dt", {}, ...running(name)),
      h("dd", {}, h("b", {}, number(latents.effect[k][i]))))));
    box.append(
      h("dl", { class: "fb-stat" }, h("dt", {}, "density"), h("dd", {}, h("b", {}, percent(latents.density[i]))),
        h("dd", { class: "fb-faint" }, "of all tokens")),
      h("dl", { class: "fb-stat" }, h("dt", {}, "max act"), h("dd", {}, h("b", {}, number(latents.max[i]))),
        h("dd", { class: "fb-faint" }, "largest activation")));
    const table = h("table", { class: "fb-groups" },
      h("thead", {}, h("tr", {}, ...["prompts", "n", "active in (95 %)", "mean peak"].map((text) =>
        h("th", { scope: "col" }, text)))),
      h("tbody", {}, ...state.groups.map((group, g) => {
        const bar = h("span", { class: "fb-share" });
        const share = latents.fires[g][i], [low, high] = shareInterval(share, group.n);
        bar.style.setProperty("--width", `${100 * share}%`);
        return h("tr", {}, h("th", { scope: "row" }, groupChip(state, g)), h("td", {}, group.n),
          h("td", {}, bar, h("span", { class: "fb-percent" }, percent(share)), h("span", { class: "fb-faint" },
            ` ${(100 * low).toFixed(0)} to ${(100 * high).toFixed(0)}`)), h("td", {}, number(latents.mean_peak[g][i])));
      })));
    return h("div", {}, box, table);
  }

  function histogram({ histogram: [low, high, counts] }) {
    const box = h("div", { class: "fb-section fb-histograms" }, h("h4", {}, "largest activation in each text (what the AUROC compares)"));
    if (low === high) return h("div", {});
    for (const g of groupsShown()) {
      const total = state.groups[g].n, shares = counts[g].map((count) => count / total);
      const described = `${state.groups[g].name}: ${percent(shares[0])} silent, ` + shares.slice(1).map((share, k) =>
        `${percent(share)} from ${number(low + (k * (high - low)) / 10)}`).join(", ");
      const bars = h("div", { class: "fb-histogram", role: "img", "aria-label": described });
      counts[g].forEach((count, k) => {
        const bar = h("span", { class: k ? "fb-bin" : "fb-bin fb-silent", title: k
          ? `${count} of ${total} from ${number(low + ((k - 1) * (high - low)) / 10)} to ${number(low + (k * (high - low)) / 10)}`
          : `${count} of ${total} silent`, "data-count": count });
        bar.style.setProperty("--height", `${100 * shares[k]}%`);
        bars.append(bar);
      });
      box.append(h("div", { class: "fb-histrow" }, groupChip(state, g), bars));
    }
    box.append(h("div", { class: "fb-histrow fb-faint" }, h("span"), h("div", { class: "fb-histscale" },
      h("span", {}, "silent"), h("span", {}, number(low)), h("span", {}, number(high)))));
    return box;
  }

  const groupsShown = () => view.pair || state.groups.map((_, g) => g);

  function moved(content) {
    if (!content.promoted.length && !content.suppressed.length) return h("div", {});
    const largest = Math.max(...[...content.promoted, ...content.suppressed].map(([, value]) => Math.abs(value)));
    const line = (label, tokens) => h("div", { class: "fb-moved" }, h("h4", {}, label), h("div", {},
      ...tokens.map(([token, value]) => {
        const chip = h("bdi", { class: "fb-chip fb-token", "data-value": number(value),
          "data-token": state.vocab[token] }, ...visible(state.vocab[token]));
        chip.style.background = tint(value, largest);
        return chip;
      })));
    return h("div", { class: "fb-effects" }, line("promotes", content.promoted),
      line("suppresses", content.suppressed));
  }

  function examples(i, content) {
    const section = h("div", { class: "fb-examples" });
    if (!content.examples.length) {
      section.append(h("p", { class: "fb-empty" }, "This latent is dead: it was not active on any of the prompts."));
      return section;
    }
    const beside = (sideBySide || view.pair) && state.groups.length > 1;
    const toggle = h("button", { type: "button", class: "fb-button", "aria-pressed": String(Boolean(beside)),
      onclick: () => {
        sideBySide = !beside;
        if (beside && view.pair) hub.compare(null);
        else draw(view.current);
        page.querySelector(".fb-examples .fb-button").focus();
      } }, "groups side by side");
    section.append(h("div", { class: "fb-exhead" }, h("h4", {}, "top activating examples"),
      state.groups.length > 1 ? toggle : null, scale(content, latents.max[i])));
    const list = (some, head) => h("ol", { class: "fb-exlist" },
      ...some.map((one) => lines.example(one, latents.max[i], head)));
    if (!beside) {
      section.append(list(content.examples, (g) => groupChip(state, g)));
      return section;
    }
    section.append(h("div", { class: "fb-columns" }, ...groupsShown().map((g) => {
      const own = content.examples.filter(([doc]) => state.docs[doc].group === g);
      return h("div", {}, h("h5", {}, groupChip(state, g)), own.length ? list(own, () => h("span"))
        : h("p", { class: "fb-faint" }, "not active here"));
    })));
    return section;
  }

  function quantiles(i, content) {
    if (!content.quantiles.length) return h("div", {});
    return h("div", { class: "fb-section" }, h("h4", {}, "examples at other quantiles of the texts it is active in"),
      h("ol", { class: "fb-exlist fb-quantiles" }, ...content.quantiles.map(([q, one]) => lines.example(one, latents.max[i],
        (g) => h("span", {}, `${100 * q} %  `, groupChip(state, g))))));
  }

  function scale(content, maximum) {
    const signed = content.examples.some(([, , , , values]) => values.some((x, k) => k % 2 && x < 0));
    return h("span", { class: "fb-scale" }, signed ? number(-Math.abs(maximum)) : "0",
      h("span", { class: `fb-ramp${signed ? " fb-ramp-signed" : ""}`, "aria-hidden": "true" }),
      number(Math.abs(maximum)));
  }

  function neighbours(content) {
    const row = (label, title, pairs) => h("div", { class: "fb-moved" }, h("h4", { title }, label), h("div", {},
      ...pairs.map(([id, value]) => {
        const at = hub.placeOf(id);
        const text = at < 0 ? `#${id}` : latents.name[at];
        return h("button", { type: "button", class: "fb-button fb-near", disabled: at < 0, onclick: () => hub.show(at),
          title: `open latent ${text}` }, h("bdi", {}, ...running(text)), h("span", { class: "fb-faint" }, ` ${rate(value)}`));
      }), pairs.length ? null : h("span", { class: "fb-faint" }, "none")));
    return h("div", { class: "fb-section" }, h("h4", {}, "nearest latents"),
      row("direction", "cosine of the decoder rows, within one SAE", content.cosine),
      row("same tokens", "Jaccard index of the tokens on which both are active", content.together));
  }

  function heads({ heads: shares }) {
    if (!shares.length) return h("div", {});
    const most = Math.max(...shares);
    return h("div", { class: "fb-section" }, h("h4", {}, "heads its direction lies in (share of squared norm)"),
      h("div", { class: "fb-heads" }, ...shares.map((share, head) => {
        const bar = h("span", { class: "fb-head-bar" });
        bar.style.setProperty("--height", `${(100 * share) / most}%`);
        return h("div", { class: "fb-head-one", title: `head ${head}: ${percent(share)}` }, bar,
          h("span", { class: "fb-faint" }, head), h("span", { class: "fb-hidden" }, `: ${percent(share)} `));
      })));
  }

  return { draw };
}
