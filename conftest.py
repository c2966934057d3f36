"""How the whole test run is laid out: two workers, one for the notebooks in their order, and what they left last."""

import pytest
from xdist.scheduler import LoadFileScheduling

LAST = "test_results.py"


class InTwo(LoadFileScheduling):
    """The tests of a file stay in one worker; so do all notebooks, with tests/test_results.py behind them.

    A notebook finds in the store what those before it computed, and shared fixtures are made once.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "notebooks" if file.startswith("notebooks") or file.endswith(LAST) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> InTwo:
    """Lay the tests out so where several workers run them (-n 2)."""
    return InTwo(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the notebooks first, since they take longest, and what looks at what they left last."""
    items.sort(key=lambda item: (item.path.suffix != ".ipynb", item.path.name == LAST))
