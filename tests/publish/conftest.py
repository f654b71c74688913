"""A finished project on a tiny model, to publish from."""

import pytest

from tests.helpers.project import Project
from tests.report.conftest import copy_of, measured

__all__ = ["measured"]


@pytest.fixture
def project(measured, tmp_path, monkeypatch) -> Project:
    """A copy of it, as the working folder."""
    return copy_of(measured, tmp_path, monkeypatch)
