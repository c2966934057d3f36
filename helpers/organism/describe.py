"""The model card in words, made from the measured card and the recipe so that prose and numbers cannot part."""

from __future__ import annotations

from pathlib import Path

from helpers.config import COUPLINGS, ROOT
from helpers.organism.card import DEMANDS

MODEL_CARD = ROOT / "data" / "organism" / "MODEL_CARD.md"
TEMPLATE = Path(__file__).with_name("model_card.md")
FREEZE = "Freeze the world, the text and the recipe of the embedded model"
"""Subject line of the commit that froze world, text and recipe."""


def model_card(card: dict[str, dict], recipe: dict) -> str:
    """The text of ``MODEL_CARD.md`` for a measured card and the ``recipe.json`` of the committed seed."""
    rows = []
    for entry in (card[name] for name in DEMANDS):
        low, high = entry["demand_low"], entry["demand_high"]
        demanded = f"{low:.2f} to {high:.2f}" if high < 1 else (f"at least {low:.2f}" if low > 0 else "reported")
        measured = f"{entry['estimate']:.3f} [{entry['ci_low']:.3f}, {entry['ci_high']:.3f}]"
        by_seed = _seeds(entry["estimates_by_seed"])
        by_sibling = "; ".join(f"{name} {_seeds(found)}" for name, found in entry["siblings"].items())
        missed = "" if entry["met"] else " **missed**"
        rows.append(f"| {entry['words']} | {demanded} | {measured}{missed} | {entry['n']} | {by_seed} | {by_sibling} |")
    steps = {"seed": recipe["seed"]} | {stage["name"]: stage["steps"] for stage in recipe["recipe"]["stages"]}
    siblings = "".join(
        f"| `{name}` | chat model of a sibling: the same recipe and seed, coupling dial {dial} |\n"
        for name, dial in COUPLINGS.items()
        if (MODEL_CARD.parent / name).exists()
    )
    fields = recipe["recipe"] | steps | COUPLINGS | {"rows": "\n".join(rows), "freeze": FREEZE, "siblings": siblings}
    return TEMPLATE.read_text(encoding="utf-8").format(minutes=sum(recipe["seconds"].values()) / 60, **fields)


def _seeds(estimates: dict[str, float]) -> str:
    return ", ".join(f"{seed}: {estimate:.3f}" for seed, estimate in sorted(estimates.items()))


def write_model_card(card: dict[str, dict], recipe: dict, out: Path = MODEL_CARD) -> None:
    """Write the model card beside the weights."""
    out.write_text(model_card(card, recipe), encoding="utf-8")
