"""Settings of the whole test run: what the notebooks left is looked at after they ran."""

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put tests/test_results.py last."""
    items.sort(key=lambda item: item.path.name == "test_results.py")
