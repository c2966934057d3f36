"""Threads sleep while they wait wherever torch is loaded after `helpers`, and a notebook's cells follow the load."""

import os
import re
import subprocess
import sys
import time

import nbformat
import pytest
import torch
from threadpoolctl import threadpool_limits

from helpers import threads
from helpers.tools import colab
from helpers.tools import notebooks as running

POLICY = "OMP_WAIT_POLICY"


def turns(code: str, **env: str) -> int:
    """How many times GNU's OpenMP lets a waiting thread look before it sleeps, in a fresh Python that runs `code`."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    env = clean | {"OMP_DISPLAY_ENV": "verbose"} | env
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    found = re.search(r"GOMP_SPINCOUNT = '(\d+|INFINITE)'", done.stderr)
    if found is None:
        pytest.skip("this torch comes with another OpenMP than GNU's, which does not say it")
    return int(found[1].replace("INFINITE", "9" * 12))


def test_threads_sleep_after_a_short_look_where_helpers_is_imported_before_torch():
    assert turns("import helpers, torch") == 20_000
    assert turns("from helpers import models") == 20_000, "the package comes before what its modules load"


def test_torch_imported_first_keeps_spinning_which_is_why_the_setup_cell_imports_helpers():
    assert turns("import torch, helpers") > 20_000


def test_the_users_own_policy_wins():
    assert turns("import helpers, torch", OMP_WAIT_POLICY="ACTIVE") > 20_000
    assert turns("import helpers, torch", OMP_WAIT_POLICY="PASSIVE") == 0
    assert turns("import helpers, torch", GOMP_SPINCOUNT="7") == 7


def test_importing_helpers_loads_neither_torch_nor_anything_that_colab_may_lack():
    heavy = "[m for m in ('torch', 'numpy', 'psutil', 'threadpoolctl') if m in sys.modules]"
    code = f"import sys, helpers; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("own, followed", [(None, True), ("2", False)])
def test_a_kernel_has_it_after_the_setup_cell_and_follows_the_load_unless_the_user_chose(
    tmp_path, monkeypatch, own, followed
):
    for name in (POLICY, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    if own:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    monkeypatch.setenv("COMPANION_RESULTS", str(tmp_path / "results"))
    look = "helpers.threads.SHARE.follow in get_ipython().events.callbacks['pre_run_cell']"
    cells = [colab.setup_cell(), f"print(os.environ['{POLICY}'], 'torch' in sys.modules, {look})"]
    (tmp_path / "00_small.py").write_text("".join(f"# %%\n{cell}\n\n" for cell in cells))
    running.run(tmp_path, timings=tmp_path / "timings.json")
    last = nbformat.read(tmp_path / "00_small.ipynb", as_version=4).cells[-1]
    assert last.outputs[0].text == f"PASSIVE False {followed}\n"


# Following the load


class Machine:
    """A kernel on a machine of four cores, where others may `spend` some of them for a while between two cells."""

    def __init__(self) -> None:
        self.clock, self.others, self.share = 100.0, 0.0, threads.Share()
        self.share.follow()

    def spend(self, cores: float, seconds: float = 10.0) -> int:
        self.clock, self.others = self.clock + seconds, self.others + cores * seconds
        self.share.follow()
        return torch.get_num_threads()


@pytest.fixture
def machine(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "used", lambda: (found.clock, found.others) if found else (100.0, 0.0))
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 4)
    torch.set_num_threads(4)
    found = None
    found = Machine()
    yield found
    threadpool_limits(before)
    torch.set_num_threads(before)


def test_each_cell_gets_the_cores_that_were_free_and_at_least_one(machine):
    assert [machine.spend(cores) for cores in (0.0, 0.4, 1.1, 2.0, 4.0, 0.1)] == [4, 4, 3, 2, 1, 4]


def test_a_moment_says_too_little_to_change_anything(machine):
    assert machine.spend(4.0, seconds=0.1) == 4


def test_a_number_that_somebody_else_set_stays(machine):
    assert machine.spend(2.0) == 2
    torch.set_num_threads(3)
    assert machine.spend(0.0) == 3 and machine.spend(4.0) == 3
    with machine.share.whole():
        assert torch.get_num_threads() == 3


def test_a_training_that_rounding_steers_has_the_threads_of_a_quiet_machine_and_gives_them_back(machine):
    machine.spend(3.0)

    @machine.share.whole()
    def train() -> int:
        return torch.get_num_threads()

    assert (train(), train(), torch.get_num_threads()) == (4, 4, 1)
    assert machine.spend(0.0) == train() == 4


def test_what_others_use_does_not_grow_by_what_this_process_computes():
    (began, before), own = threads.used(), time.process_time()
    while time.process_time() < own + 0.5:
        sum(range(10_000))
    ended, after = threads.used()
    everything = (ended - began) * (os.cpu_count() or 1)
    assert after - before <= everything - 0.5 + 0.1  # clocks tick in hundredths of a second
