"""Artifacts are made once per key, whole or not at all, and finding one changes nothing that follows."""

import errno
import functools
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from helpers import config, store
from helpers.store import (
    artifact,
    cached_json,
    cached_tensors,
    code_version,
    fingerprint,
    to_json,
    write_json,
    write_text,
)


@pytest.fixture(autouse=True)
def own_artifacts(monkeypatch, tmp_path):
    monkeypatch.setenv("COMPANION_ARTIFACTS", str(tmp_path / "artifacts with space"))


def test_the_same_key_is_made_once_and_another_key_again():
    calls = []
    for key in ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 1, "b": 3}):
        cached_json("kind", key, lambda key=key: calls.append(key) or key["b"])
    assert len(calls) == 2


def test_changed_code_never_meets_old_results(monkeypatch):
    assert cached_json("kind", {}, lambda: "old") == "old"
    monkeypatch.setattr(store, "code_version", lambda home: "another")
    assert cached_json("kind", {}, lambda: "new") == "new"


def test_code_version_ignores_prose_and_sees_code(tmp_path):
    def version(text):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}" / "a.py"
        path.parent.mkdir()
        path.write_text(text)
        return code_version(path)

    base = version('"""Doc."""\n\ndef f(x):\n    """One."""\n    return x + 1  # note\n')
    assert version('"""Other\nprose."""\ndef f(x):\n    """Two\n    lines."""\n    return x + 1\n') == base
    assert version("def f(x): return x + 1\n") != base
    assert version('"""Doc."""\n\ndef f(x):\n    """One."""\n    return x - 1  # note\n') != base
    assert version('"""Doc."""\n\ndef f(x):\n    """One."""\n    return "# note"\n') != version(
        '"""Doc."""\n\ndef f(x):\n    """One."""\n    return "# other"\n'
    )


@pytest.fixture
def small_package(monkeypatch, tmp_path):
    """A package `helpers` of its own: `a` imports `room.b` at its top and `c` inside a function; `d` is alone."""
    package = tmp_path / "helpers"
    (package / "room").mkdir(parents=True)
    for name, text in {
        "__init__": "from helpers.d import x\n",
        "a": "from helpers.room import b\n\ndef f():\n    import helpers.c\n    return b.x\n",
        "room/__init__": "",
        "room/b": "x = 1\n",
        "c": "import helpers.a\n",
        "d": "x = 1\n",
    }.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.setattr(store, "ROOT", tmp_path)
    monkeypatch.setattr(store, "PACKAGE", package)
    return package


def test_an_artifact_depends_on_the_code_that_its_maker_imports_and_on_no_other(small_package):
    found = {p.relative_to(small_package).as_posix() for p in store.import_closure(small_package / "a.py")}
    assert found == {"a.py", "c.py", "room/__init__.py", "room/b.py"}
    before = code_version("helpers.a"), code_version("helpers.d")
    (small_package / "room" / "b.py").write_text("x = 22\n")
    assert code_version("helpers.a") != before[0] and code_version("helpers.d") == before[1]
    assert code_version() != code_version("helpers.a"), "without a home, all of the package counts"
    assert code_version("__main__") == code_version()


def test_the_maker_is_found_behind_partial_and_lambda(monkeypatch):
    asked = []
    monkeypatch.setattr(store, "code_version", lambda home: asked.append(home) or "x")
    cached_json("kind", {"k": 1}, functools.partial(dict, a=1))
    cached_json("kind", {"k": 2}, lambda: {})
    cached_tensors("kind", {"k": 3}, lambda: {"x": torch.ones(1)})
    assert asked == ["builtins", __name__, __name__]


def test_draws_follow_the_callers_key_and_not_the_code(monkeypatch):
    def drawn(version):
        monkeypatch.setattr(store, "code_version", lambda home: version)
        return cached_json("kind", {"n": 7}, lambda: float(torch.rand(())))

    assert drawn("one") == drawn("another")


def test_a_failing_make_leaves_nothing_and_is_tried_again():
    def broken(folder):
        (folder / "half").write_text("half")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        artifact("kind", {}, broken)
    assert not list((config.artifacts_dir() / "kind").iterdir())
    assert (artifact("kind", {}, lambda folder: (folder / "whole").write_text("x")) / "whole").exists()


def test_a_killed_make_leaves_no_artifact_and_its_remains_are_swept():
    script = (
        "import time\nfrom helpers.store import artifact\n"
        "def make(f):\n    (f / 'half').write_text('half')\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "artifact('kind', {'k': 1}, make)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    child.kill()
    child.wait()
    kind = config.artifacts_dir() / "kind"
    assert [p.name.partition(".")[2].partition("-")[0] for p in kind.iterdir()] == ["partial"]
    made = artifact("kind", {"k": 1}, lambda folder: (folder / "whole").write_text("x"))
    assert list(kind.iterdir()) == [made] and sorted(p.name for p in made.iterdir()) == ["key.json", "whole"]


def test_the_first_of_two_makers_wins():
    def make(folder):
        (folder / "value").write_text("second")
        first = folder.with_name(folder.name.partition(".")[0])
        first.mkdir()
        (first / "value").write_text("first")

    assert (artifact("kind", {}, make) / "value").read_text() == "first"


def test_making_and_finding_an_artifact_leave_the_random_generators_alike():
    def draws():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def run():
        random.seed(5), np.random.seed(5), torch.manual_seed(5)
        made = cached_json("kind", {"n": 1}, draws)
        return made, draws()

    cold, warm = run(), run()
    assert cold == warm
    assert cached_json("kind", {"n": 2}, draws) != cold[0], "each key has draws of its own"


def test_what_is_made_depends_on_the_key_and_not_on_what_ran_before(monkeypatch, tmp_path):
    made = []
    for seed in (1, 2):
        monkeypatch.setenv("COMPANION_ARTIFACTS", str(tmp_path / str(seed)))
        torch.manual_seed(seed)
        made.append(cached_tensors("kind", {}, lambda: {"x": torch.randn(4)})["x"])
    assert torch.equal(*made)


def test_tensors_and_json_read_the_same_on_the_first_call_and_later():
    shared = torch.arange(6.0).reshape(2, 3)

    def tensors():
        return {"a": shared.T, "b": shared}

    for _ in range(2):
        got = cached_tensors("kind", {}, tensors)
        assert torch.equal(got["a"], shared.T) and torch.equal(got["b"], shared)
        assert cached_json("other", {}, lambda: {"pair": (1, 2.5), 3: None}) == {"pair": [1, 2.5], "3": None}


def test_nan_is_refused_with_its_place(tmp_path):
    with pytest.raises(ValueError, match=r"value\['a'\]\[1\] is nan"):
        write_json(tmp_path / "x.json", {"a": [1.0, float("nan")]})
    assert not list(tmp_path.iterdir())


def test_a_key_that_is_not_data_is_refused():
    with pytest.raises(TypeError, match="function cannot be stored"):
        artifact("kind", {"f": lambda: 0}, lambda folder: None)


def test_a_file_is_replaced_whole(tmp_path):
    path = write_json(tmp_path / "x.json", {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_models_fingerprint_follows_its_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="safetensors"):
        fingerprint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"one")
    first = fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("prose")
    assert fingerprint(tmp_path) == first
    time.sleep(0.01)
    (tmp_path / "model.safetensors").write_bytes(b"two")
    os.utime(tmp_path / "model.safetensors")
    assert fingerprint(tmp_path) != first
    assert fingerprint("owner/name") == "hub:owner/name"


def test_canonical_json_does_not_depend_on_order_or_kind():
    assert to_json({"b": np.float64(0.5), "a": (1, 2)}) == to_json({"a": [1, 2], "b": 0.5})


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["python", "safetensors"],
)
def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_made(error, tmp_path):
    def make(folder):
        (folder / "half").write_text("x")
        raise error

    with pytest.raises(RuntimeError, match="^The disk is full: free some space and run the same again; what was"):
        artifact("sae", {"k": 1}, make)
    assert not [one for one in tmp_path.rglob("*") if "sae" in one.parts and one.is_file()]
    with pytest.raises(ValueError, match="bad"):
        artifact("sae", {"k": 1}, lambda folder: (_ for _ in ()).throw(ValueError("bad")))


def test_a_text_that_does_not_fit_the_disk_leaves_the_old_one(tmp_path, monkeypatch):
    path = write_text(tmp_path / "a.txt", "old")

    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RuntimeError, match="The disk is full"):
        write_text(path, "new")
    assert path.read_text() == "old" and [one.name for one in tmp_path.iterdir()] == ["a.txt"]
