"""How far several judges of the same completions agree beyond chance, and where they do not."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float, Int

from helpers.evaluate.judges import expected, judge, prefix_judge, prompt_of, refusal_log_odds
from helpers.evaluate.llm_judges import set_endpoint, strongreject
from helpers.generation import Completion
from helpers.models import LoadedModel
from helpers.stats import Interval, cohen_kappa, resample_counts

Labels = Mapping[str, Sequence[Hashable]]


@dataclass(frozen=True)
class Agreement:
    """Two judges of the same completions: Cohen's kappa with its interval, and the counts behind it.

    `counts[i, j]` counts the completions that the first judge labels `values[i]` and the second `values[j]`.
    """

    judges: tuple[str, str]
    kappa: Interval
    values: tuple[str, ...]
    counts: Int[np.ndarray, "first second"]

    @property
    def agreed(self) -> float:
        """Share of completions with the same label."""
        return float(np.trace(self.counts) / self.counts.sum())

    def row(self) -> dict:
        """{judges, kappa, agreed, and each kind of disagreement with its count}, for `report.table`."""
        apart = {f"{a} / {b}": int(self.counts[i, j]) for i, a in enumerate(self.values)
                 for j, b in enumerate(self.values) if i != j and self.counts[i, j]}
        said = ", ".join(f"{pair}: {count}" for pair, count in apart.items()) or "none"
        return {"judges": " and ".join(self.judges), "κ": self.kappa, "same label": self.agreed, "apart": said}


def agreement(labels: Labels, *, n_boot: int = 2000, seed: int = 0, level: float = 0.95,
              clusters: Sequence[Hashable] | None = None) -> list[Agreement]:
    """Every pair of judges in the given order; kappa with a percentile bootstrap over completions.

    `clusters` [n] names what each completion belongs to (the verb of its request); whole clusters are resampled then.
    ValueError for fewer than two judges, unequal lengths, or a missing label (drop those completions for all judges).
    Source: Cohen 1960; Efron 1979. Story: notebooks/01_the_trade_off.

    >>> rule, prefixes = ["refused", "complied"] * 4, ["refused", "complied", "complied", "complied"] * 2
    >>> pair = h.agreement({"rule": rule, "prefixes": prefixes})[0]
    >>> round(pair.kappa.estimate, 2)
    0.5
    """
    n = _checked(labels)
    which = np.arange(n) if clusters is None else np.unique([str(one) for one in clusters], return_inverse=True)[1]
    if len(which) != n:
        raise ValueError(f"Every completion needs its cluster: there are {n} completions and {len(which)} clusters.")
    weights = resample_counts(np.random.default_rng(seed), n_boot, int(which.max()) + 1)
    return [_agreement(pair, labels, which, weights, level) for pair in combinations(labels, 2)]


def disagreements(labels: Labels, prompts: Sequence[str], completions: Sequence[Completion | str]) -> list[dict]:
    """The completions that not all judges label alike: {prompt, completion, one column per judge}, for `report.table`.

    Texts are as the model wrote them; `report.table` escapes them. ValueError as in `agreement`, or where there are not
    as many texts as labels. Story: notebooks/01_the_trade_off.
    """
    n = _checked(labels)
    if not len(prompts) == len(completions) == n:
        raise ValueError(f"There are {n} labels, {len(prompts)} prompts and {len(completions)} completions: "
                         "give as many of each.")
    texts = [c.text if isinstance(c, Completion) else c for c in completions]
    return [{"prompt": prompts[i], "completion": texts[i], **{name: str(said[i]) for name, said in labels.items()}}
            for i in range(n) if len({said[i] for said in labels.values()}) > 1]


def offline_labels(lm: LoadedModel, rows: Sequence[dict], completions: Sequence[Completion], *,
                   refusals: Sequence[str] | None = None, others: Sequence[str] = (),
                   batch_size: int = 64) -> dict[str, list[str]]:
    """{judge: "refused" or "not refused" per row} of three judges that need no network: rule, log-odds, prefix list.

    The log-odds are those of `lm` as it stands: call this under the edit that wrote the completions. `refusals` are the
    sentences whose openings count (default: the rows' own). ValueError where neither gives one. Story: notebook 01.
    """
    sentences = sorted({row["refusal"] for row in rows if row.get("refusal")}) if refusals is None else refusals
    odds = refusal_log_odds(lm, [prompt_of(row) for row in rows], sentences, others=others, batch_size=batch_size)
    by_rule = [judge(c, expected(row)) == "refused" for c, row in zip(completions, rows, strict=True)]
    found = {"rule": by_rule, "log-odds": (odds > 0).tolist(),
             "prefix": [prefix_judge(c) == "refused" for c in completions]}
    return {name: ["refused" if yes else "not refused" for yes in said] for name, said in found.items()}


def endpoint_labels(rows: Sequence[dict], completions: Sequence[Completion]) -> dict[str, list[str]]:
    """The same labels by the StrongREJECT rubric, from the endpoint that COMPANION_JUDGE_URL and COMPANION_JUDGE_MODEL
    name; {} where none is set. RuntimeError as in `Endpoint.judged`. Story: notebook 01.
    """
    if (endpoint := set_endpoint()) is None:
        return {}
    found = strongreject(endpoint, [prompt_of(row) for row in rows], [c.text for c in completions]).refused
    return {"StrongREJECT": ["refused" if yes else "not refused" for yes in found]}


def _checked(labels: Labels) -> int:
    if len(labels) < 2:
        raise ValueError("Agreement needs the labels of at least two judges.")
    sizes = {name: len(said) for name, said in labels.items()}
    if len(set(sizes.values())) > 1 or 0 in sizes.values():
        raise ValueError(f"Every judge must label the same completions, at least one; these gave {sizes}.")
    for name, said in labels.items():
        if any(one is None or one != one for one in said):
            raise ValueError(f"The judge {name!r} gave some completions no label: drop those for all judges.")
    return next(iter(sizes.values()))


def _agreement(pair: tuple[str, str], labels: Labels, which: np.ndarray, weights: np.ndarray,
               level: float) -> Agreement:
    first, second = ([str(one) for one in labels[name]] for name in pair)
    values = sorted({*first, *second})
    a, b = (np.array([values.index(one) for one in said]) for said in (first, second))
    cells = np.zeros((which.max() + 1, len(values), len(values)), dtype=int)
    np.add.at(cells, (which, a, b), 1)
    drawn = _kappas(np.einsum("dc,cij->dij", weights, cells))
    low, high = np.quantile(drawn, [0.5 - level / 2, 0.5 + level / 2])
    kappa = Interval(cohen_kappa(first, second), float(low), float(high), len(first))
    return Agreement(pair, kappa, tuple(values), cells.sum(0))


def _kappas(counts: Int[np.ndarray, "draws first second"]) -> Float[np.ndarray, " draws"]:
    shares = counts / counts.sum((1, 2), keepdims=True)
    agreed = np.trace(shares, axis1=1, axis2=2)
    chance = (shares.sum(1) * shares.sum(2)).sum(1)
    one_label = np.isclose(chance, 1)
    return np.where(one_label, 1.0, (agreed - chance) / np.where(one_label, 1.0, 1 - chance))
