"""The committed notebooks are paired, fresh and clean, and the tools that say so notice when they are not."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from helpers.config import ROOT
from helpers.tools import colab, notebooks, pairing
from helpers.tools.notebooks import Progress, main
from helpers.tools.pairing import bad_rules, too_large, unclean

SANITIZER = ROOT / "tests" / "nbval_sanitize.cfg"
HEAD = "# %% [markdown]\n# # A small notebook\n\n"
MARKED = "# %%\n# NBVAL_CHECK_OUTPUT\nprint('checked: x.rate is 0.78 ± 0.02')\n"


def write(folder: Path, text: str, name: str = "00_small") -> Path:
    source = folder / f"{name}.py"
    source.write_text(HEAD + text, encoding="utf-8")
    return source


@pytest.fixture(autouse=True)
def own_results(monkeypatch, tmp_path):
    monkeypatch.setenv("COMPANION_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("COMPANION_ARTIFACTS", str(tmp_path / "artifacts"))


@pytest.fixture
def small(tmp_path) -> Path:
    """A folder with one small executed notebook."""
    folder = tmp_path / "note books"
    folder.mkdir()
    write(folder, "# %%\nvalue = 41\n\n" + MARKED + "\n# %%\nvalue + 1\n")
    notebooks.run(folder, timings=folder / "timings.json")
    return folder


# The committed notebooks


def test_the_eight_notebooks_are_there():
    assert [s.stem for s in pairing.sources()] == list(colab.QUESTIONS)


def test_the_committed_notebooks_are_paired_fresh_and_clean():
    assert pairing.problems() == []


def test_jupytext_finds_nothing_to_update_in_the_committed_notebooks(tmp_path):
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks", ignore=shutil.ignore_patterns(".*"))
    shutil.copy(ROOT / "jupytext.toml", tmp_path)
    files = sorted((tmp_path / "notebooks").glob("*.py"))
    before = {f: f.with_suffix(".ipynb").read_bytes() for f in files}
    command = [sys.executable, "-m", "jupytext", "--quiet", "--update", "--to", "ipynb", *map(str, files)]
    subprocess.run(command, check=True, capture_output=True)
    assert [f.name for f in files if f.with_suffix(".ipynb").read_bytes() != before[f]] == []


def test_every_code_cell_of_the_sources_fits_the_page():
    large = [
        f"{source.stem}, {cell.source.splitlines()[0]}: {sentence}"
        for source in pairing.sources()
        for cell in pairing.read_source(source).cells
        if cell.cell_type == "code"
        for sentence in too_large(cell.source)
    ]
    assert large == []


def test_the_sanitizing_rules_are_read_and_hide_nothing_that_is_compared():
    assert bad_rules(SANITIZER.read_text(encoding="utf-8")) == []


# The tools that watch them


def test_an_executed_notebook_is_clean_and_jupytext_leaves_it_unchanged(small):
    assert pairing.problems(small) == []
    path = small / "00_small.ipynb"
    before = path.read_bytes()
    shutil.copy(ROOT / "jupytext.toml", small)
    command = [sys.executable, "-m", "jupytext", "--quiet", "--update", "--to", "ipynb", str(small / "00_small.py")]
    subprocess.run(command, check=True, capture_output=True)
    assert path.read_bytes() == before


def test_running_twice_gives_the_same_bytes(small):
    before = (small / "00_small.ipynb").read_bytes()
    notebooks.run(small, timings=small / "timings.json")
    assert (small / "00_small.ipynb").read_bytes() == before


def test_printed_text_is_saved_in_one_piece_however_slowly_it_came(tmp_path):
    slow = "import time\nprint('a', flush=True)\ntime.sleep(0.5)\nprint('b', flush=True)\n{}\nprint('c')\n"
    write(tmp_path, "# %%\n" + slow.format("display(1)"))
    notebooks.run(tmp_path, timings=tmp_path / "timings.json")
    outputs = nbformat.read(tmp_path / "00_small.ipynb", as_version=4).cells[-1].outputs
    assert [one.get("text", one.output_type) for one in outputs] == ["a\nb\n", "display_data", "c\n"]


def test_an_edited_notebook_that_was_not_run_again_is_caught_before_and_after_syncing(small):
    source = small / "00_small.py"
    source.write_text(source.read_text().replace("value = 41", "value = 42"))
    assert "differ from the .py" in pairing.problems(small)[0]
    assert [p.name for p in pairing.sync(small)] == ["00_small.ipynb"]
    found = " ".join(pairing.problems(small))
    assert "edited after it ran" in found and "never run" in found
    executed = pairing.read_executed(source)
    assert executed.cells[2].outputs, "outputs of unchanged cells are kept"
    for cell in executed.cells:
        if cell.cell_type == "code":
            cell.execution_count = 1
    pairing.write_executed(executed, source)
    assert "edited after it ran" in pairing.problems(small)[0], "agreement and counts are not freshness"


def test_syncing_what_is_in_step_changes_nothing(small):
    assert pairing.sync(small) == []


def test_a_half_without_the_other_is_caught(small):
    shutil.copy(small / "00_small.ipynb", small / "01_orphan.ipynb")
    write(small, MARKED, "02_never_run")
    found = pairing.problems(small)
    assert any("01_orphan.ipynb: has no source" in f for f in found)
    assert any("02_never_run.py: was never executed" in f for f in found)


def faulty(change) -> list[str]:
    output = nbformat.v4.new_output("stream", name="stdout", text="checked: x is 1\n")
    cell = nbformat.v4.new_code_cell("# NBVAL_CHECK_OUTPUT\nprint(1)", execution_count=1, outputs=[output])
    nb = nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": dict(pairing.KERNEL)})
    change(nb, cell)
    return unclean(nb, nbformat.writes(nb))


def test_a_clean_notebook_has_no_faults():
    assert faulty(lambda nb, cell: None) == []


@pytest.mark.parametrize(
    "said, change",
    [
        ("stderr", lambda nb, c: c.outputs.append(nbformat.v4.new_output("stream", name="stderr", text="warning"))),
        ("widget state", lambda nb, c: nb.metadata.update(widgets={"state": {}})),
        ("never run", lambda nb, c: c.update(execution_count=None)),
        ("not python3", lambda nb, c: nb.metadata.kernelspec.update(name="conda-env-mine")),
        ("one megabyte", lambda nb, c: c.outputs[0].update(text="x" * 1_100_000)),
        ("shows nothing", lambda nb, c: c.update(outputs=[])),
        ("marks no cell", lambda nb, c: c.update(source="print(1)")),
        ("shares the line", lambda nb, c: c.update(source="print(1)  # NBVAL_CHECK_OUTPUT")),
        ("a line of 111 characters", lambda nb, c: c.update(source=c.source + "\n" + "x" * 111)),
        ("has 21 lines", lambda nb, c: c.update(source=c.source + "\n\nx = 1" * 19)),
        ("skipped", lambda nb, c: c.update(source=c.source + "\n# NBVAL_SKIP")),
        ("memory address", lambda nb, c: c.outputs[0].update(text="<object at 0x7f0011223344>")),
        ("ended in KeyError", lambda nb, c: c.outputs.append(nbformat.v4.new_output("error", ename="KeyError"))),
        (
            "shows a figure",
            lambda nb, c: c.outputs.append(nbformat.v4.new_output("display_data", data={"image/svg+xml": "<svg/>"})),
        ),
        (
            "live widget",
            lambda nb, c: c.outputs.append(
                nbformat.v4.new_output("display_data", data={"application/vnd.jupyter.widget-view+json": {}})
            ),
        ),
    ],
)
def test_each_fault_of_a_notebook_is_named(said, change):
    assert any(said in sentence for sentence in faulty(change))


def test_a_code_cell_at_the_limits_of_width_and_length_has_no_faults():
    at_limit = "é" * 110 + "\n\n" + "    \n" + "x = 1\n" * 17
    assert faulty(lambda nb, cell: cell.update(source=f"{cell.source}\n{at_limit}")) == []
    assert too_large("") == []


def test_prose_may_be_as_wide_and_as_long_as_it_likes():
    assert faulty(lambda nb, cell: nb.cells.append(nbformat.v4.new_markdown_cell("word " * 99 + "\nline" * 99))) == []


@pytest.mark.parametrize(
    "rules, said",
    [
        ("regex: \\d+ s\nreplace:\n", "nbval reads 0 of 1"),
        ("regex=\\d+ s\nreplace= X\n", "nbval reads 0 of 1"),
        ("regex: \\d+\nreplace: N\n", "hides a compared line"),
        ("regex: .*\nreplace: X\n", "hides a compared line"),
        ("regex: ± .*\nreplace: X\n", "hides a compared line"),
        ("regex: (\nreplace: X\n", "not a regular expression"),
    ],
)
def test_wrong_sanitizing_rules_are_caught(rules, said):
    assert any(said in sentence for sentence in bad_rules(rules))


def nbval(folder: Path, sanitizer: Path = SANITIZER) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval-lax", "--nbval-current-env"]
    command += ["--nbval-sanitize-with", str(sanitizer), "--rootdir", str(folder), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def plant(folder: Path) -> None:
    """Change one saved output, leaving its cell as it was."""
    source = folder / "00_small.py"
    executed = pairing.read_executed(source)
    output = executed.cells[2].outputs[0]
    output.text = output.text.replace("0.78", "0.79")
    pairing.write_executed(executed, source)


def test_nbval_passes_a_true_output_and_fails_a_planted_one(small):
    done = nbval(small)
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout
    plant(small)
    done = nbval(small)
    assert done.returncode == 1 and "1 failed, 2 passed" in done.stdout, done.stdout


def test_a_wrong_sanitizing_rule_blinds_nbval_and_that_is_why_rules_are_checked(small, tmp_path):
    wrong = tmp_path / "wrong.cfg"
    wrong.write_text("[numbers]\nregex: \\d\\.\\d+\nreplace: NUMBER\n")
    plant(small)
    assert nbval(small, wrong).returncode == 0, "nbval says nothing"
    assert bad_rules(wrong.read_text()), "but the rules' own check does"


def test_warnings_widgets_and_machine_facts_do_not_reach_the_saved_notebook(tmp_path, capsys):
    text = (
        "# %%\nimport sys\nprint('careful', file=sys.stderr)\n\n"
        "# %%\nimport ipywidgets\nipywidgets.IntSlider()\n\n" + MARKED
    )
    write(tmp_path, text)
    arguments = ["run", "00", "--folder", str(tmp_path), "--timings", str(tmp_path / "t.json")]
    assert main(arguments) == 0
    assert "00_small, code cell 1, wrote to stderr: careful" in capsys.readouterr().err
    assert main([*arguments, "--strict"]) == 1
    saved = (tmp_path / "00_small.ipynb").read_text(encoding="utf-8")
    assert "careful\\n" not in saved and "widget-view" not in saved and "version" not in saved
    assert pairing.problems(tmp_path) == []


def test_a_failing_cell_stops_the_run_names_itself_and_leaves_the_file_alone(small, capsys):
    before = (small / "00_small.ipynb").read_bytes()
    write(small, "# %%\nvalue = 1\n\n# %%\nraise KeyError('no such head')\n")
    assert main(["run", "--folder", str(small), "--timings", str(small / "timings.json")]) == 1
    said = capsys.readouterr().err
    assert "00_small: code cell 2 of 2 failed" in said and "no such head" in said
    assert (small / "00_small.ipynb").read_bytes() == before


def test_another_profile_leaves_the_committed_notebooks_alone(small, monkeypatch, tmp_path):
    before = (small / "00_small.ipynb").read_bytes()
    monkeypatch.setenv("COMPANION_PROFILE", "organism-full")
    notebooks.run(small, timings=small / "timings.json")
    assert (small / "00_small.ipynb").read_bytes() == before
    assert (tmp_path / "results" / "organism-full" / "notebooks" / "00_small.ipynb").exists()


def test_an_unknown_notebook_is_refused_with_the_names_there_are(small, capsys):
    assert main(["run", "09", "--folder", str(small)]) == 1
    assert "00_small" in capsys.readouterr().err


def test_the_first_run_records_how_long_each_cell_takes(small):
    assert len(json.loads((small / "timings.json").read_text())["00_small"]) == 3


def test_progress_names_notebook_and_cell_and_estimates_from_the_last_run(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("helpers.tools.notebooks.time.monotonic", lambda: now[0])
    progress = Progress(["00_a", "01_b"], {"00_a": [10.0, 20.0], "01_b": [30.0]}, stream=io.StringIO())
    progress.start(0, 2)
    progress.step(1)
    assert progress.left() == pytest.approx(60)
    now[0] = 104.0
    assert progress.left() == pytest.approx(56)
    assert progress.line() == "[1/2] 00_a · cell 1/2 · 0:04 gone · about 0:56 left"
    progress.start(1, 1)
    now[0] = 160.0
    progress.step(1)
    assert progress.left() == pytest.approx(60), "a machine half as fast takes twice as long"
    progress.expected = {}
    assert "unknown" in progress.line()


def test_a_cells_own_lines_on_how_far_it_is_are_shown_while_it_runs_and_not_saved(tmp_path, monkeypatch):
    arms = 'for i in (1, 2):\n    print(f"{i}/2 arms; about {2 - i} minutes left", flush=True)\n'
    write(tmp_path, f"# %%\n{arms}print('done, and nobody is left')\n")
    shown, heard = [], Progress.heard

    def listen(self, text):
        rest = heard(self, text)
        shown.append(self.line())
        return rest

    monkeypatch.setattr(Progress, "heard", listen)
    notebooks.run(tmp_path, timings=tmp_path / "timings.json")
    cells = nbformat.read(tmp_path / "00_small.ipynb", as_version=4).cells
    assert [o.text for cell in cells for o in cell.get("outputs", [])] == ["done, and nobody is left\n"]
    assert any(line.endswith("gone · 2/2 arms; about 0 minutes left") for line in shown)


def test_only_lines_on_how_far_it_is_are_taken_and_the_next_cell_starts_without():
    progress = Progress(["00_a"], {}, stream=io.StringIO())
    assert progress.heard("a\n1/2 x; about 3 minutes left\nb") == "a\nb" and "about 3 minutes" in progress.line()
    progress.step(2)
    assert "about 3 minutes" not in progress.line()


def test_the_makefile_and_the_runner_keep_notebooks_quiet_alike():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for key, value in (notebooks.QUIET | notebooks.OFFLINE).items():
        assert f"export {key} = {value}\n" in makefile
    assert "HF_HUB_OFFLINE" in os.environ
