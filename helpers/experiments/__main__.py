"""Runs too long for a notebook: `python -m helpers.experiments` lists them, with a name it makes one.

Each is resumable: killed at any moment, the same command goes on where it stopped. `... NAME --help` tells its options.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from helpers.experiments import finetuning, relearning, shared_heads, steering, steering_choices
from helpers.experiments.claims import collect_claims
from helpers.experiments.report_page import html_report


@dataclass(frozen=True)
class Experiment:
    """A command, the folders of `data/results` that it fills, and what it costs on one core of a quiet machine."""

    makes: str
    cost: str
    what: str
    main: Callable[[Sequence[str] | None], None]


def _report(_: Sequence[str] | None) -> None:
    collect_claims()
    print(html_report())


EXPERIMENTS = {
    "steering": Experiment("dial", "3 minutes a model, 11 models", "ITI, TruthX and rank-1 over their strengths, "
                           "with random controls, on every coupling and training seed", steering.main),
    "steering-choices": Experiment("choices", "10 minutes a model, 5 models", "ITI, TruthX and rank-1 with other "
                                   "numbers of heads, layers and modules", steering_choices.main),
    "shared-heads": Experiment("shared_heads", "5 minutes a model, 5 models", "the causal test of the shared heads "
                               "with other numbers of heads, layers and models", shared_heads.main),
    "finetuning": Experiment("finetuning", "1 minute an arm, about 700 arms", "all fine-tuning methods, five seeds, "
                             "benign and with poison; --models for further ones, --profile for another profile",
                             finetuning.main),
    "scenarios": Experiment("finetuning-identity, finetuning-same-verbs, finetuning-other-verbs", "1 minute an arm, "
                            "about 90 arms", "a shifted identity, and poison of some verbs", finetuning.main_scenarios),
    "relearning": Experiment("finetuning/attacked", "2 minutes a method", "a later attack on each method's model",
                             relearning.main),
    "report": Experiment("organism", "seconds", "claims.json and report.html from what the notebooks left", _report),
}  # fmt: skip


def listing() -> str:
    """The experiments, a few lines each."""
    return "\n".join(f"{name:<17} {one.what}\n{'':<17} makes data/results/{one.makes.replace(', ', ', data/results/')}"
                     f"; costs {one.cost}" for name, one in EXPERIMENTS.items())  # fmt: skip


def main(words: Sequence[str]) -> int:
    """List the experiments, or run the one that is named; returns the exit status."""
    if not words:
        print(listing())
        return 0
    name, *rest = words
    if name not in EXPERIMENTS:
        print(f"There is no experiment {name!r}; these are: {', '.join(EXPERIMENTS)}.", file=sys.stderr)
        return 2
    sys.argv[0] = f"python -m helpers.experiments {name}"  # what --help says
    EXPERIMENTS[name].main(rest)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
