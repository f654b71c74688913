"""Templates and regular expressions that never end, or take all memory, end with a name."""

import os
import re
import signal
import time

import psutil
import pytest

from quantline.errors import Failure, StageError
from quantline.run import bounded_call
from quantline.run.bounded_call import BoundedCall, pattern_begins, pattern_in
from quantline.run.leash import is_running
from quantline.text.chat_template import render

CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture
def short(monkeypatch) -> None:
    monkeypatch.setattr(bounded_call, "SECONDS", 1.0)


def failure(call, *arguments) -> StageError:
    with pytest.raises(StageError) as error:
        call(*arguments)
    return error.value


def test_a_bounded_call_returns_what_the_function_does_in_one_process():
    call = BoundedCall(lambda *values: (os.getpid(), values), "it")
    first, values = call(1, "a")
    assert values == (1, "a")
    assert first != os.getpid()
    assert call()[0] == first


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ messages[0].content * 10 ** 10 }}",
        "{% set x = namespace(y='aaaaaaaaaaaaaaaa') %}{% for i in range(60) %}"
        "{% set x.y = x.y + x.y %}{% endfor %}{{ x.y }}",
    ],
)
def test_a_template_that_never_ends_is_named(short, template):
    started = time.monotonic()
    error = failure(render, template, CHAT, False, {})
    assert error.failure in (Failure.TIMED_OUT, Failure.OUT_OF_MEMORY)
    assert "expected the chat template to" in str(error)
    assert time.monotonic() - started < 30
    assert render("{{ messages[0].content }}", CHAT, False, {}) == "hi"


def test_a_call_that_takes_too_much_memory_is_named():
    assert failure(BoundedCall(bytearray, "it"), 1 << 40).failure == Failure.OUT_OF_MEMORY


def test_a_template_that_refuses_is_named_as_before():
    error = failure(render, "{{ raise_exception('no system role') }}", CHAT, False, {})
    assert error.failure == Failure.DATASET_INVALID
    assert "no system role" in str(error)


@pytest.mark.parametrize("call", [pattern_in, pattern_begins])
def test_a_regular_expression_that_never_ends_is_named(short, call):
    error = failure(call, "(a+)+$", "a" * 40 + "b")
    assert error.failure == Failure.TIMED_OUT
    assert call("a+b", "aab")


@pytest.mark.parametrize("pattern", ["^4[0-9]$", "(?i)YES", "a|b", "^$"])
@pytest.mark.parametrize("text", ["42", "yes", "say b", ""])
def test_a_pattern_means_what_it_means_to_python(pattern, text):
    assert pattern_in(pattern, text) == (re.search(pattern, text) is not None)
    assert pattern_begins(pattern, text) == (re.match(pattern, text) is not None)


def test_a_call_whose_process_is_killed_is_named_and_the_next_one_has_another():
    call = BoundedCall(lambda end: os.kill(os.getpid(), signal.SIGKILL) if end else 1, "it")
    assert failure(call, True).failure == Failure.RUNTIME_CRASHED
    assert call(False) == 1


def test_nothing_of_a_call_outlives_the_process_that_made_it():
    parent = os.fork()
    if not parent:
        call = BoundedCall(os.getpid, "it")
        call()
        time.sleep(600)
    children: list[psutil.Process] = []
    while not children:
        time.sleep(0.02)
        children = psutil.Process(parent).children()
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    while is_running(children[0]):
        time.sleep(0.02)
