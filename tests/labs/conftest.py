"""Every test of this folder is a `lab` test: several nodes on one machine, which leave nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from runs.conftest import alone, tiny  # noqa: F401 - fixtures


@pytest.hookimpl(tryfirst=True)  # before those who leave out what is marked
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks them; the hook hears of the whole collection."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.lab)
