"""Artifacts keyed by what made them: the same question asked twice is computed once, also across a killed run.

`artifact` hands a folder to `make`, and the folder appears under its final name only when `make` has returned. The key
is the caller's dictionary plus the code that `make` runs: its module and what that imports, so changed code never meets
old results, and other code leaves them alone. Each `make` runs with the global random generators seeded from the
caller's key alone and put back afterwards: an edit that changes no mathematics changes no number, and a run that finds
an artifact and a run that makes it continue alike.
"""

import ast
import contextlib
import dataclasses
import errno
import functools
import hashlib
import io
import json
import math
import os
import random
import shutil
import tokenize
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.config import ROOT, artifacts_dir, locate

PACKAGE = ROOT / "helpers"


def plain(value: Any) -> Any:
    """Return `value` as JSON can hold it (dataclasses, paths, tuples, sets, arrays, scalars); TypeError otherwise."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, set | frozenset):
        return sorted(plain(v) for v in value)
    if isinstance(value, Path):
        inside = value.resolve().is_relative_to(ROOT)
        return (value.resolve().relative_to(ROOT) if inside else value).as_posix()
    if isinstance(value, np.ndarray | Tensor):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"A {type(value).__name__} cannot be stored as JSON; pass numbers, text, lists or dictionaries.")


def to_json(value: Any, *, indent: int | None = 1) -> str:
    """Return canonical JSON (sorted keys); ValueError where a number is NaN or infinite, which JSON cannot hold."""
    try:
        return json.dumps(plain(value), sort_keys=True, indent=indent, allow_nan=False, ensure_ascii=False)
    except ValueError as error:
        raise ValueError(f"JSON holds no NaN or infinity, and {_first_bad(value)}; mend what computed it.") from error


def _first_bad(value: Any, at: str = "value") -> str:
    value = plain(value)
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        if found := _first_bad(inner, f"{at}[{key!r}]"):
            return found
    return f"{at} is {value}" if isinstance(value, float) and not math.isfinite(value) else ""


@contextlib.contextmanager
def full_disk_in_words() -> Iterator[None]:
    """RuntimeError in one sentence where the disk is full, whoever writes: Python, safetensors or torch."""
    try:
        yield
    except Exception as error:
        if getattr(error, "errno", None) != errno.ENOSPC and os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise RuntimeError(
            "The disk is full: free some space and run the same again; what was finished is kept and not made anew."
        ) from error


def write_text(path: str | Path, text: str) -> Path:
    """Write a file so that readers see the old one or the whole new one, never a part."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with full_disk_in_words():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def write_json(path: str | Path, value: Any) -> Path:
    """Write canonical JSON atomically; ValueError for NaN and infinity."""
    return write_text(path, to_json(value) + "\n")


def _bare_source(text: str) -> str:
    """Return Python source without comments, docstrings and blank lines, so that writing prose recomputes nothing."""
    lines = text.splitlines()
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    cuts = [token.start + token.end for token in tokens if token.type == tokenize.COMMENT]
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, documented) and ast.get_docstring(node):
            doc = node.body[0]
            last = lines[doc.end_lineno - 1].encode()[: doc.end_col_offset].decode()
            cuts.append((doc.lineno, doc.col_offset, doc.end_lineno, len(last)))
    for top, left, bottom, right in sorted(cuts, reverse=True):
        lines[top - 1 : bottom] = [lines[top - 1][:left] + lines[bottom - 1][right:]] + [""] * (bottom - top)
    return "\n".join(line.rstrip() for line in lines if line.strip())


@functools.cache
def _bare_file(path: Path, size: int, changed_ns: int) -> tuple[str, frozenset[Path]]:
    """A file's source without prose, and the files of `helpers` that it imports, at its top or inside functions."""
    text = path.read_text(encoding="utf-8")
    try:
        tree, bare = ast.parse(text), _bare_source(text)
    except SyntaxError:  # a file that does not parse counts as it stands
        return text, frozenset()
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    found = {file for name in names if name.startswith(f"{PACKAGE.name}.") for file in _files_of(name)}
    return bare, frozenset(found - {path})


def _files_of(module: str) -> list[Path]:
    """The file of a module of `helpers`, with the `__init__` files of its rooms; [] for a name that is no module.

    The package's own `__init__` only hands names on, when they are asked for, and counts nowhere.
    """
    parts = module.split(".")[1:]
    rooms = [PACKAGE.joinpath(*parts[: i + 1], "__init__.py") for i in range(len(parts))]
    return [p for p in (*rooms, PACKAGE.joinpath(*parts).with_suffix(".py")) if p.is_file()]


def import_closure(start: Path) -> list[Path]:
    """Return a Python file and all files of `helpers` that it imports, directly or through others, sorted."""
    seen, todo = set(), [start]
    while todo:
        path = todo.pop()
        if path not in seen:
            seen.add(path)
            stat = path.stat()
            todo += _bare_file(path, stat.st_size, stat.st_mtime_ns)[1]
    return sorted(seen)


def code_version(home: str | Path | None = None) -> str:
    """Return a short hash of the code behind a module of `helpers` (by name) or a file: it and all that it imports.

    Comments, docstrings and blank lines do not count. Without a home, or with one outside the package (a notebook's own
    cell), all of `helpers` counts.
    """
    digest = hashlib.sha256()
    for path in _code_behind(home):
        stat = path.stat()
        name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
        digest.update(f"{name}\n{_bare_file(path, stat.st_size, stat.st_mtime_ns)[0]}\n".encode())
    return digest.hexdigest()[:12]


def _code_behind(home: str | Path | None) -> list[Path]:
    if isinstance(home, Path) and home.is_file():
        return import_closure(home)
    own = _files_of(home)[-1:] if isinstance(home, str) and home.startswith(f"{PACKAGE.name}.") else []
    return import_closure(own[0]) if own else sorted(PACKAGE.rglob("*.py"))


def _home(make: Callable[..., Any]) -> str:
    """The name of the module that a function was written in, also behind `functools.partial`."""
    while isinstance(make, functools.partial):
        make = make.func
    return getattr(make, "__module__", "") or ""


@functools.cache
def _sha256(path: Path, size: int, changed_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(model: str | Path) -> str:
    """Return a short hash of a model folder's weights, config and tokenizer; a Hugging Face id stands for itself."""
    folder = Path(locate(model))
    if not folder.is_dir():
        return f"hub:{model}"
    wanted = [p for p in sorted(folder.iterdir()) if p.suffix in {".safetensors", ".json", ".jinja", ".model"}]
    if not any(p.suffix == ".safetensors" for p in wanted):
        raise FileNotFoundError(f"{folder} holds no .safetensors weights; point to a saved Hugging Face model folder.")
    stats = [(p, p.stat()) for p in wanted]
    parts = [f"{p.name} {_sha256(p, s.st_size, s.st_mtime_ns)}" for p, s in stats]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def weights_digest(model: torch.nn.Module) -> str:
    """Return a short hash of every weight as it is in memory, whatever file the model came from."""
    total = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        total.update(name.encode() + weight.detach().float().cpu().numpy().tobytes())
    return total.hexdigest()[:16]


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and torch inside the block, and put their state back after it."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed % 2**63)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _digest(value: Any) -> str:
    return hashlib.sha256(to_json(value, indent=None).encode()).hexdigest()


def artifact(kind: str, key: Mapping[str, Any], make: Callable[[Path], Any], *, home: str | None = None) -> Path:
    """Return the folder that `make(folder)` fills, making it only where no finished one with this key exists.

    `home` names the module whose code makes it (default: the one that `make` was written in). Interrupted or failing
    makes leave nothing under the final name. Two processes may make the same one; the first to finish wins.
    """
    asked = {"kind": kind, "key": plain(key)}
    full_key = asked | {"code": code_version(home or _home(make))}
    digest = _digest(full_key)
    folder = artifacts_dir() / kind / digest[:20]
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        with seeded(int(_digest(asked)[:15], 16)), full_disk_in_words():
            make(partial)
        write_json(partial / "key.json", full_key)
        try:
            os.replace(partial, folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _sweep(folder: Path) -> None:
    """Remove what killed processes left of this artifact."""
    for left in folder.parent.glob(f"{folder.name}.partial-*"):
        process = int(left.name.rpartition("-")[2])
        if process == os.getpid() or not _alive(process):
            shutil.rmtree(left, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def cached_json(kind: str, key: Mapping[str, Any], make: Callable[[], Any]) -> Any:
    """Return `make()` as read back from JSON (tuples are lists on the first call too), computing it once per key."""
    folder = artifact(kind, key, lambda to: write_json(to / "value.json", make()), home=_home(make))
    return json.loads((folder / "value.json").read_text(encoding="utf-8"))


def cached_tensors(kind: str, key: Mapping[str, Any], make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the named tensors of `make()` on the CPU as read back from safetensors, computing them once per key."""

    def save(to: Path) -> None:
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in make().items()}, to / "tensors.safetensors")

    return load_file(artifact(kind, key, save, home=_home(make)) / "tensors.safetensors")
