"""`make experiments`: what fills data/results, what it took, and how one is made again."""

import json
import re
import subprocess
import sys
from importlib import import_module

import pytest

from helpers.config import ROOT
from helpers.experiments import __main__ as command
from helpers.experiments import relearning, steering, steering_choices
from helpers.experiments.__main__ import EXPERIMENTS, FOLDERS, Folder, duration, told


def test_every_folder_of_results_is_listed_with_the_command_that_made_it():
    home = ROOT / "data" / "results"
    listed = [path for one in FOLDERS for path in one.paths()]
    assert len(set(listed)) == len(listed) and all(one.paths() for one in FOLDERS)
    tracked = subprocess.run(["git", "ls-files", "data/results"], cwd=ROOT, capture_output=True, text=True).stdout
    of_notebooks = {"claims", "figures", "sections", "tables"}
    holding = {(ROOT / name).parent for name in tracked.split("\n") if name}
    assert {path for path in holding if path.name not in of_notebooks} == set(listed) and home not in holding
    said = command.listing()
    for one in FOLDERS:
        assert one.command in said and one.holds in said and one.cost() in said


def test_every_command_of_the_list_is_one_that_exists():
    targets = set(re.findall(r"(?m)^([a-z]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8")))
    for one in FOLDERS:
        assert one.command.split()[1] in targets
    named = {word.partition("=")[2] for one in FOLDERS for word in one.command.split() if word.startswith("NAME=")}
    assert named == set(EXPERIMENTS) - {"report"}
    for where in EXPERIMENTS.values():
        module, _, function = where.partition(":")
        assert callable(getattr(import_module(module), function))


def test_a_cost_is_the_sum_of_the_seconds_in_the_files(tmp_path):
    (tmp_path / "a" / "inner").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "1.json").write_text(json.dumps({"arms": [{"seconds": 3000}, {"seconds": 4200.0}]}))
    (tmp_path / "a" / "2.json").write_text(json.dumps({"arms": [{"seconds": 600}]}))
    (tmp_path / "a" / "inner" / "3.json").write_text(json.dumps({"arms": [{"seconds": 9999}]}))
    (tmp_path / "b" / "4.json").write_text(json.dumps({"seconds": 61}))
    assert Folder("a", "", "").cost(tmp_path) == "3 arms, 2 h 10 min on one core"
    assert Folder("a/inner, b", "", "", "file").cost(tmp_path) == "2 files, 2 h 48 min on one core"
    assert Folder("a/in*", "", "").cost(tmp_path) == "1 arm, 2 h 47 min on one core"
    (tmp_path / "b" / "5.json").write_text("{}")
    assert Folder("b", "", "", "model").cost(tmp_path) == "2 models, 1 min on one core, 1 of them not recorded"
    (tmp_path / "b" / "4.json").write_text("{}")
    assert Folder("b", "", "", "model").cost(tmp_path) == "2 models, time not recorded"


def test_time_is_told_in_hours_and_minutes():
    assert [duration(s) for s in (1, 89, 91, 3569, 3571, 7800)] == [
        "1 min", "1 min", "2 min", "59 min", "1 h 0 min", "2 h 10 min"]  # fmt: skip
    assert told("notebook", [60.0, 60.0]) == "2 notebooks, 2 min"


def test_the_readme_holds_the_list():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert command.with_table(readme) == readme, "run `make sync`"
    assert command.readme_table() in readme and "make experiments NAME=" in readme
    with pytest.raises(ValueError, match="lacks the comments"):
        command.with_table("nothing")


def test_an_unknown_name_is_one_sentence_and_status_2(capsys):
    assert command.main(["no such"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1
    assert said.err.startswith("There is no experiment 'no such'; these are: steering, ")


def test_a_name_runs_its_command_with_the_words_that_follow(monkeypatch, capsys):
    given = []
    monkeypatch.setattr(steering, "main", given.append)
    monkeypatch.setattr(sys, "argv", ["x"])
    assert command.main(["steering", "default-0", "--workers", "1"]) == 0
    assert given == [["default-0", "--workers", "1"]]
    assert command.main([]) == 0 and "data/results/dial" in capsys.readouterr().out


def test_listing_loads_no_torch():
    code = "import sys; from helpers.experiments.__main__ import main; main([]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_make_hands_name_and_options_on(tmp_path):
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text(encoding="utf-8"))
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\necho "$@"\ncase "$*" in *nope*) exit 2 ;; esac\n')
    python.chmod(0o755)

    def make(*words: str) -> tuple[int, str]:
        done = subprocess.run(["make", "-so", ".venv/complete", "experiments", *words], cwd=tmp_path,
                              capture_output=True, text=True, check=False)  # fmt: skip
        return done.returncode, done.stdout.strip()

    assert make() == (0, "-m helpers.experiments")
    assert make("NAME=finetuning", "ARGS=--models default-0") == (
        0, "-m helpers.experiments finetuning --models default-0")  # fmt: skip
    assert make("NAME=nope")[0] == 2


@pytest.mark.parametrize("module", [steering_choices, "shared_heads"])
def test_a_run_over_models_tells_the_time_left(module, monkeypatch, tmp_path, capsys):
    module = import_module(f"helpers.experiments.{module}") if isinstance(module, str) else module
    monkeypatch.setattr("helpers.config.population", lambda: {("default", n): f"m{n}" for n in range(3)})
    took = iter((1, 90, 120))  # the first comes from the store
    now = iter((0.0, 1.0, 91.0, 211.0))
    monkeypatch.setattr("helpers.experiments.progress.time.perf_counter", lambda: next(now))
    monkeypatch.setattr(module, "run", lambda *_: {"seconds": next(took)})
    module.main(["--out", str(tmp_path)])
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("1/3 default-0, 1 s; about ")
    assert second == "2/3 default-1, 90 s; about 2 minutes left"  # one of a minute and a half
    assert third == "3/3 default-2, 120 s; about 0 minutes left"


@pytest.mark.parametrize("module", [steering_choices, relearning])
def test_an_interrupted_run_says_how_it_goes_on(module, monkeypatch, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run" if module is steering_choices else "attacked", stop)
    with pytest.raises(SystemExit, match="give the same command again"):
        module.main(["default-0", "--out", str(tmp_path)] if module is steering_choices else [])
    assert not list(tmp_path.iterdir())
