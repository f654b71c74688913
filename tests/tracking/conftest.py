"""A server that failed one test is asked again by the next."""

import pytest

from quantline.tracking import store


@pytest.fixture(autouse=True)
def forget_failed_servers():
    store._failed.clear()
