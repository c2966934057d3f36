"""A run killed at a random moment and started again ends with the claims of one that was left alone."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.config import ROOT

CELLS = """# %% [markdown]
# # A small argument

# %%
import os, time
from types import SimpleNamespace
import torch
from helpers import store
from helpers.experiments import claims

def draw(step):
    open(os.environ["MADE_LOG"], "a").write(f"{name} {{step}}\\n")
    time.sleep(0.4)
    return torch.randn(8).tolist()

# %%
torch.manual_seed(0)
rows = [store.cached_json("draws", {{"notebook": {name!r}, "step": step}}, lambda: draw(step)) for step in range(4)]
after = float(torch.rand(()))

# %%
# NBVAL_CHECK_OUTPUT
values = torch.tensor(rows).mean(dim=0)
estimate = SimpleNamespace(estimate=float(values.mean()) + after, low=-9.0, high=9.0)
control = ("none", SimpleNamespace(estimate=0.0, low=-1.0, high=1.0))
row = claims.claim({claim!r}, estimate=estimate, control=control, verdict="not reproduced", unit="draws",
                   n_prompts=8, n_seeds=1, notebook={name!r})
print("claimed", row["id"], row["estimate"])
"""


class Setting:
    """Two small notebooks with folders of their own, run by the command that `make reproduce` runs.

    `code` is a copy of the package, so that nobody's edit falls between two runs that are compared.
    """

    def __init__(self, home: Path, code: Path):
        self.home, self.code, self.log = home, code, home / "made.log"
        (home / "notebooks").mkdir(parents=True)
        for name, claim in (("00_first", "C1"), ("01_second", "C2")):
            (home / "notebooks" / f"{name}.py").write_text(CELLS.format(name=name, claim=claim), encoding="utf-8")

    def start(self) -> subprocess.Popen:
        command = [sys.executable, "-m", "helpers.tools.notebooks", "run", "--folder", str(self.home / "notebooks")]
        command += ["--timings", str(self.home / "timings.json")]
        own = {"RESULTS": str(self.home / "results"), "ARTIFACTS": str(self.home / "artifacts"), "PROFILE": "organism"}
        env = {**os.environ, **{f"COMPANION_{k}": v for k, v in own.items()}, "MADE_LOG": str(self.log)}
        env |= {"PYTHONPATH": str(self.code), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            command, env=env, cwd=self.code, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def finish(self) -> "Setting":
        run = self.start()
        said, _ = run.communicate(timeout=900)
        assert run.returncode == 0, said
        return self

    def made(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def claims(self) -> list[dict]:
        rows = json.loads((self.home / "results" / "organism" / "claims.json").read_text(encoding="utf-8"))
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    def executed(self) -> list[bytes]:
        return [path.read_bytes() for path in sorted((self.home / "notebooks").glob("*.ipynb"))]


@pytest.fixture(scope="module")
def code(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("code")
    shutil.copytree(ROOT / "helpers", home / "helpers", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "jupytext.toml", home)
    return home


@pytest.fixture(scope="module")
def alone(tmp_path_factory, code) -> Setting:
    """A run that was left alone, with how long it took."""
    setting = Setting(tmp_path_factory.mktemp("left alone") / "home", code)
    began = time.monotonic()
    setting.finish()
    setting.took = time.monotonic() - began
    return setting


@pytest.mark.slow
def test_a_killed_run_started_again_ends_with_the_same_claims(tmp_path, code, alone):
    killed = Setting(tmp_path / "killed", code)
    moment = random.SystemRandom().uniform(0.25, 0.9) * alone.took
    run = killed.start()
    time.sleep(moment)
    run.send_signal(signal.SIGKILL)
    run.wait()
    time.sleep(2)  # its kernel notices that the parent is gone
    begun = len(killed.made())
    killed.finish()
    where = f"killed after {moment:.1f} of {alone.took:.1f} s, with {begun} of 8 steps begun"
    assert killed.claims() == alone.claims(), where
    assert killed.executed() == alone.executed(), where
    again = {step for step in killed.made() if killed.made().count(step) > 1}
    assert set(killed.made()) == set(alone.made()) and len(again) <= 1, f"only what was running is made again; {where}"
    assert (killed.home / "results" / "organism" / "report.html").exists()


@pytest.mark.slow
def test_two_runs_on_one_machine_claim_the_same_to_the_last_digit(tmp_path, code, alone):
    again = Setting(tmp_path / "again", code).finish()
    assert again.claims() == alone.claims() and again.executed() == alone.executed()
    assert again.claims()[0]["estimate"] is not None
