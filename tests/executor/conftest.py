"""A function that items of these tests name."""

import pytest

from quantline.executor.item import FUNCTIONS


@pytest.fixture(autouse=True)
def squares(monkeypatch) -> None:
    """Let items name the function `square`."""
    monkeypatch.setitem(FUNCTIONS, "square", ("tests.helpers.squares", "square"))
