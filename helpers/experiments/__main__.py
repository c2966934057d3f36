"""Runs too long for a notebook: `make experiments` lists what fills data/results, with a NAME it makes that.

Each is resumable: killed at any moment, the same command goes on where it stopped. `python -m helpers.experiments` is
the same command without make; `... NAME --help` tells an experiment's options, and `--readme` renews the README's table
of folders. Costs are sums of the seconds that the committed files themselves record.
"""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from helpers.config import ROOT

RESULTS = ROOT / "data" / "results"
TIMINGS = ROOT / "data" / "expected" / "timings.json"
MARKS = "<!-- results: written by `make sync` -->\n", "<!-- end of results -->"


@dataclass(frozen=True)
class Folder:
    """One folder of `data/results` (or several alike): the command that fills it, what it holds, and of what."""

    name: str
    command: str
    holds: str
    unit: str = "arm"

    def paths(self, results: Path = RESULTS) -> list[Path]:
        """The folders that are here."""
        return sorted(path for name in self.name.split(", ") for path in results.glob(name) if path.is_dir())

    def seconds(self, results: Path = RESULTS) -> list[float | None]:
        """What each arm, or each file without arms, took; None where that was not recorded."""
        files = [json.loads(f.read_text(encoding="utf-8")) for path in self.paths(results) for f in path.glob("*.json")]
        return [one.get("seconds") for file in files for one in file.get("arms", [file])]

    def cost(self, results: Path = RESULTS) -> str:
        """How much there is, and how long it took."""
        return told(self.unit, self.seconds(results))


@dataclass(frozen=True)
class Notebooks(Folder):
    """The folder that the notebooks fill: its cost is what each of them took when that was last recorded."""

    def seconds(self, results: Path = RESULTS) -> list[float | None]:
        """Seconds per notebook."""
        return [sum(cells) for cells in json.loads(TIMINGS.read_text(encoding="utf-8")).values()]


EXPERIMENTS = {
    "steering": "helpers.experiments.steering:main",
    "steering-choices": "helpers.experiments.steering_choices:main",
    "shared-heads": "helpers.experiments.shared_heads:main",
    "finetuning": "helpers.experiments.finetuning:main",
    "scenarios": "helpers.experiments.finetuning:main_scenarios",
    "relearning": "helpers.experiments.relearning:main",
    "report": "helpers.experiments.__main__:report",
}
"""What runs under each name: a module's function of the words after it."""

FOLDERS = (
    Notebooks("organism", "make reproduce", "claims, figures, tables and report of the notebooks", "notebook"),
    Folder("benchmarks", "make bench", "the heavy loops against the usual way of writing them", "file"),
    Folder("dial", "make experiments NAME=steering",
           "ITI, TruthX, rank-1 and a prompt over their strengths, every coupling and training seed", "model"),
    Folder("choices", "make experiments NAME=steering-choices",
           "the same methods with other numbers of heads, layers and modules", "model"),
    Folder("shared_heads", "make experiments NAME=shared-heads",
           "the causal test of the shared heads with other numbers of heads and layers", "model"),
    Folder("finetuning", "make experiments NAME=finetuning",
           "every fine-tuning method, five seeds, benign and with poison"),
    Folder("finetuning/default-*", 'make experiments NAME=finetuning ARGS="--models default-0"',
           "some methods (add --methods) on models of other training seeds; likewise default-2, -3, -4"),
    Folder("finetuning/variants", "make experiments NAME=finetuning ARGS=--variants",
           "other ranks, layers and subspaces behind C6 and C8"),
    Folder("finetuning/attacked", "make experiments NAME=relearning",
           "a later attack on each method's model", "method"),
    Folder("finetuning-identity, finetuning-same-verbs, finetuning-other-verbs", "make experiments NAME=scenarios",
           "a shifted identity, and poison of some verbs"),
)  # fmt: skip
"""Every folder of `data/results`; the README's table and `make experiments` are made from this list."""


def told(unit: str, seconds: Sequence[float | None]) -> str:
    """A number of things and their time in words; what was not recorded is said to be so."""
    known = [s for s in seconds if s is not None]
    much = f"{len(seconds)} {unit}{'s' * (len(seconds) != 1)}"
    if not known:
        return f"{much}, time not recorded"
    rest = f", {len(seconds) - len(known)} of them not recorded" if len(known) < len(seconds) else ""
    where = "" if unit == "notebook" else " on one core"
    return f"{much}, {duration(sum(known))}{where}{rest}"


def duration(seconds: float) -> str:
    """Seconds as "2 h 10 min" or "13 min"; at least one minute."""
    hours, minutes = divmod(max(round(seconds / 60), 1), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def listing(results: Path = RESULTS) -> str:
    """Every folder of results with what it costs, what it holds and the command that makes it; then the names."""
    lines = [f"data/results/{one.name.replace(', ', ', data/results/')}: {one.cost(results)}\n    {one.holds}\n"
             f"    {one.command}" for one in FOLDERS]  # fmt: skip
    more = "Each goes on where it was stopped. ARGS=--help tells an experiment's options; NAME=report renews\n" \
           "claims.json and report.html from what the notebooks left."  # fmt: skip
    return "\n".join((*lines, more))


def readme_table(results: Path = RESULTS) -> str:
    """The README's table of the folders of `data/results`."""
    rows = [f"| `{one.name.replace(', ', '`, `')}` | {one.holds} | `{one.command}` | {one.cost(results)} |"
            for one in FOLDERS]  # fmt: skip
    return "\n".join(("| folder of data/results | holds | made by | cost |", "|---|---|---|---|", *rows))


def with_table(readme: str) -> str:
    """The README with its table of results renewed; ValueError where its two comments are not there."""
    fenced = re.compile(f"({re.escape(MARKS[0])}).*?({re.escape(MARKS[1])})", re.DOTALL)
    if not fenced.search(readme):
        raise ValueError("README.md lacks the comments between which the table of results stands.")
    return fenced.sub(lambda m: f"{m[1]}{readme_table()}\n{m[2]}", readme)


def report(_: Sequence[str]) -> None:
    """Renew claims.json and report.html from what the notebooks left."""
    from helpers.experiments.claims import collect_claims
    from helpers.experiments.report_page import html_report

    collect_claims()
    print(html_report())


def main(words: Sequence[str]) -> int:
    """List what fills the results, or run the experiment that is named; returns the exit status."""
    if not words or words[0] in ("-h", "--help"):
        print(listing())
        return 0
    name, *rest = words
    if name == "--readme":
        readme = ROOT / "README.md"
        readme.write_text(with_table(readme.read_text(encoding="utf-8")), encoding="utf-8")
        return 0
    if name not in EXPERIMENTS:
        print(f"There is no experiment {name!r}; these are: {', '.join(EXPERIMENTS)}.", file=sys.stderr)
        return 2
    sys.argv[0] = f"python -m helpers.experiments {name}"  # what --help says
    module, _, function = EXPERIMENTS[name].partition(":")
    getattr(import_module(module), function)(rest)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
