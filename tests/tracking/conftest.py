"""A server that failed one test is asked again by the next; and one that does not answer."""

import pytest

from quantline.tracking import store
from tests.helpers.project import Project
from tests.helpers.tracking import DOWN


@pytest.fixture(autouse=True)
def forget_failed_servers():
    store._failed.clear()


@pytest.fixture
def down(project, monkeypatch) -> Project:
    """A project whose server does not answer."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    project.compose(*DOWN)
    return project
