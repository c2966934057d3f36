"""The notebooks' commands; see `python -m helpers.notebooks --help`."""

import argparse
import sys
import time
from pathlib import Path

from helpers.config import ROOT, profile, results_dir
from helpers.notebooks.hygiene import bad_rules
from helpers.notebooks.pairing import FOLDER, problems, sync
from helpers.notebooks.progress import clock
from helpers.notebooks.running import TIMINGS, NotebookFailed, run
from helpers.report import collect_claims, html_report

SANITIZER = ROOT / "tests" / "nbval_sanitize.cfg"


def main(words: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m helpers.notebooks", description="Run and check the notebooks.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help in (
        ("run", "execute the notebooks in order, then write claims.json and report.html"),
        ("sync", "copy the cells of each .py into its .ipynb, keeping outputs of unchanged cells"),
        ("check", "say which notebooks are not paired, not fresh or not clean"),
    ):
        command = commands.add_parser(name, help=help)
        command.add_argument("--folder", type=Path, default=FOLDER, help="where the notebooks are")
        if name == "run":
            command.add_argument("only", nargs="*", help="run only notebooks whose names start so, such as 03")
            command.add_argument("--timings", type=Path, default=TIMINGS, help="seconds per cell of the last run")
            command.add_argument("--record", action="store_true", help="keep this run's seconds as the estimate")
            command.add_argument("--strict", action="store_true", help="fail if a cell wrote to stderr")
    given = parser.parse_args(words)
    try:
        return {"run": _run, "sync": _sync, "check": _check}[given.command](given)
    except (NotebookFailed, ValueError, FileNotFoundError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The same command takes up what was computed.", file=sys.stderr)
        return 130


def _run(given: argparse.Namespace) -> int:
    began = time.monotonic()
    ran = run(given.folder, given.only, given.timings, given.record)
    print(*ran.stderr, sep="\n", end="\n" if ran.stderr else "", file=sys.stderr)
    if not given.only:
        rows = collect_claims()
        report = html_report()
        for row in rows:
            print(f"{row['id']}  {row['verdict']:<15}  {row['claim']}")
        took = clock(time.monotonic() - began)
        print(f"Profile {profile().name}, {took}: {results_dir() / 'claims.json'} and {report.name}")
    return 1 if given.strict and ran.stderr else 0


def _sync(given: argparse.Namespace) -> int:
    for path in sync(given.folder):
        print(f"updated {path.name}")
    return 0


def _check(given: argparse.Namespace) -> int:
    found = problems(given.folder) + bad_rules(SANITIZER.read_text(encoding="utf-8"))
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
