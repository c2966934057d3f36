"""What a rebuilding must not change: `python -m helpers.tools.freeze write FILE`, work, then `... check FILE`.

A snapshot holds a digest of every claim (without its seconds and code version), section, table and figure among a
profile's results, and the name of every test. `check` names what differs and ends with 1, or ends with 0.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from helpers.config import ROOT, results_dir
from helpers.store import to_json, write_json

FROZEN = ("claims/*.json", "sections/*", "tables/*", "figures/*.svg")
NOT_FROZEN = {"seconds", "code_version"}
"""What differs between two runs of the same code, or by a change that moves no number."""


def snapshot(folder: Path) -> dict[str, str]:
    """{file: digest} of what is frozen among the results in a folder."""
    files = sorted(path for pattern in FROZEN for path in folder.glob(pattern) if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(_bare(path)).hexdigest() for path in files}


def test_names() -> list[str]:
    """The name of every test, without its file: one that moved is the same test."""
    command = [sys.executable, "-m", "pytest", "tests", "--collect-only", "-q"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted(line.partition("::")[2] for line in found.splitlines() if "::" in line)


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line for each file that changed, came or went, and for each test that is gone."""
    old, new = before["files"], now["files"]
    lines = [f"{name} {'is new' if name not in old else 'is gone' if name not in new else 'changed'}"
             for name in sorted(old | new) if old.get(name) != new.get(name)]
    gone = Counter(before["tests"]) - Counter(now["tests"])
    return lines + [f"test {name} is gone" for name in sorted(gone.elements())]


def main(words: list[str] | None = None) -> int:
    """Write or check a snapshot; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m helpers.tools.freeze", description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=("write", "check"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--results", type=Path, default=None, help="a profile's results (default: this profile's)")
    given = parser.parse_args(words)
    now = {"files": snapshot(given.results or results_dir()), "tests": test_names()}
    if given.command == "write":
        write_json(given.file, now)
        return 0
    found = differences(json.loads(given.file.read_text(encoding="utf-8")), now)
    print(*found or ["Nothing that was frozen has changed."], sep="\n")
    return int(bool(found))


def _bare(path: Path) -> bytes:
    if path.suffix != ".json":
        return path.read_bytes()
    return to_json(_without(json.loads(path.read_text(encoding="utf-8")))).encode()


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without(inner) for key, inner in value.items() if key not in NOT_FROZEN}
    return [_without(inner) for inner in value] if isinstance(value, list) else value


if __name__ == "__main__":
    sys.exit(main())
