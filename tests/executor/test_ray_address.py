"""A Ray cluster that nobody answers for is named at once; Ray itself would wait for minutes."""

import socket

import pytest

from quantline.errors import Failure, StageError
from quantline.executor.ray_workers import check_answers


def test_an_address_where_nobody_listens_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        check_answers(f"127.0.0.1:{port}")
    with pytest.raises(StageError, match=f"expected a Ray cluster at 127.0.0.1:{port}") as error:
        check_answers(f"127.0.0.1:{port}")
    assert error.value.failure is Failure.RUNTIME_UNAVAILABLE


@pytest.mark.parametrize("address", [None, "auto", "local", "ray://head:10001/x"])
def test_other_forms_are_left_to_ray(address):
    check_answers(address)
