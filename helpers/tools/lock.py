"""`python -m helpers.tools.lock`: write requirements.lock, the versions installed here of what pyproject.toml asks.

The lock holds the closure of the project's dependencies with the extras `notebooks` and `dev`: names, versions.
"""

import importlib.metadata
import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

from helpers.config import ROOT
from helpers.store import write_text

EXTRAS = ("notebooks", "dev")
LOCK = ROOT / "requirements.lock"
HEADER = "# Exact versions for `make`; written by `make lock`, which follows pyproject.toml. Do not edit.\n"


def canonical(name: str) -> str:
    """Return a distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def asked_for(extras: tuple[str, ...] = EXTRAS, root: Path = ROOT) -> list[Requirement]:
    """Return the requirements that pyproject.toml lists, with those of the given extras."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    return [Requirement(text) for one in lists for text in one]


def closure(requirements: list[Requirement]) -> dict[str, str]:
    """Return name → version of the requirements and all they need, as installed; RuntimeError names what is missing."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(r, "") for r in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonical(requirement.name)
        try:
            here = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError as error:
            raise RuntimeError(f"{name} is not installed here; install the project with its extras first.") from error
        found[name] = here.version.partition("+")[0]
        for one in {"", *requirement.extras} - {e for n, e in seen if n == name}:
            seen.add((name, one))
            waiting += [(Requirement(text), one) for text in here.requires or ()]
    return found


def read_lock(path: Path = LOCK) -> dict[str, str]:
    """Return name → version of a lock file."""
    lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return {canonical(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def versions_to_lock() -> dict[str, str]:
    """Return the closure of what the project asks for, without the GPU runtime that torch brings on some machines."""
    return {n: v for n, v in closure(asked_for()).items() if not n.startswith(("nvidia-", "cuda-", "triton"))}


def write_lock(path: Path = LOCK) -> Path:
    """Write the lock of what is installed."""
    versions = versions_to_lock()
    return write_text(path, HEADER + "".join(f"{name}=={versions[name]}\n" for name in sorted(versions)))


if __name__ == "__main__":
    print(write_lock())
