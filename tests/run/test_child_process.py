"""A process that crashes, hangs or outgrows memory is a failure with a name, and leaves nothing."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from quantline.config.texts import Limits
from quantline.errors import Failure, Reason, StageError
from quantline.run.child_process import call_in_child
from tests.helpers.project import ROOT

MODULE = """
import ctypes
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

from quantline.errors import Failure, Reason, StageError


def work(**arguments):
{body}
"""
# Starts a child process and is then killed itself.
STAGE = """
from quantline.config.texts import Limits
from quantline.run.child_process import call_in_child

call_in_child("child_module:work", {}, Limits(), "it")
"""
IN_A_GRANDCHILD = "import time; held = bytearray(400 << 20); time.sleep(600)"


def write_module(folder: Path, body: str) -> None:
    """Write a module whose function `work` has this body; its 14th line is the first of that."""
    (folder / "child_module.py").write_text(MODULE.format(body=textwrap.indent(body, "    ")))


@pytest.fixture
def call(tmp_path, monkeypatch) -> Callable[..., dict]:
    """call(body, arguments, **limits): what a function with this body returns in a child."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")

    def run(body: str, arguments: dict | None = None, **limits) -> dict:
        write_module(tmp_path, body)
        return call_in_child("child_module:work", arguments or {}, Limits(**limits), "the child")

    return run


def failure(call, body: str, **limits) -> StageError:
    with pytest.raises(StageError) as error:
        call(body, **limits)
    return error.value


def ends(pid: int) -> bool:
    """Whether a process ends within seconds."""
    for _ in range(100):
        if not psutil.pid_exists(pid):
            return True
        if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_call_in_child_returns_what_the_function_returns(call):
    body = "print('noise')\nreturn {'arguments': arguments, 'pid': os.getpid()}"
    arguments = {"first": "a", "second": ["b c", 1.5, None]}
    result = call(body, arguments)
    assert result["arguments"] == arguments
    assert result["pid"] != os.getpid()


def test_call_in_child_takes_any_amount_of_noise_on_stderr(call):
    assert call("sys.stderr.write('x' * 1_000_000)\nreturn {'done': True}") == {"done": True}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            "os.abort()",
            r"signal 6 \(SIGABRT\): Fatal Python error: Aborted; "
            r"File .*child_module.py\", line 14 in work",
        ),
        ("ctypes.string_at(0)", r"signal 11 \(SIGSEGV\): Fatal Python error: Segmentation fault"),
        ("os._exit(7)", "exit code 7: it wrote no error"),
        ("os._exit(0)", "exit code 0: it wrote no error"),
        ("raise KeyError('weights')", "exit code 1: .*KeyError: 'weights'"),
    ],
)
def test_call_in_child_says_what_a_crash_was_and_where(call, body, words):
    error = failure(call, body)
    assert error.failure == Failure.RUNTIME_CRASHED
    expected = f"expected the child to end well, and it ended with {words}.*; try the variant"
    assert re.match(expected, str(error))


@pytest.mark.parametrize(
    ("body", "named", "words"),
    [
        ("raise StageError(Failure.NON_FINITE, 'no number')", Failure.NON_FINITE, "no number"),
        ("raise MemoryError", Failure.OUT_OF_MEMORY, "MemoryError"),
        (
            "raise RuntimeError('CUDA out of memory. Tried to allocate')",
            Failure.OUT_OF_MEMORY,
            "CUDA out of memory",
        ),
        (
            "os.kill(os.getpid(), 9)",
            Failure.OUT_OF_MEMORY,
            "the child was killed from outside",
        ),
    ],
)
def test_call_in_child_passes_on_failures_that_have_a_name(call, body, named, words):
    error = failure(call, body)
    assert error.failure == named
    assert words in str(error)
    assert error.reason is None


def test_call_in_child_passes_on_the_reason_of_a_failure(call):
    reason = "Reason.EVAL_DATASET_MISSING"
    error = failure(call, f"raise StageError(Failure.DATASET_INVALID, 'no data', {reason})")
    assert (error.failure, error.reason) == (Failure.DATASET_INVALID, Reason.EVAL_DATASET_MISSING)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("child_module:no_such_function", "AttributeError"),
        ("no_such_module_of_the_test:work", "ModuleNotFoundError"),
    ],
)
def test_call_in_child_names_a_function_that_does_not_exist(call, function, words):
    call("return {}")  # so that the module is there
    with pytest.raises(StageError, match=words) as error:
        call_in_child(function, {}, Limits(), "the child")
    assert error.value.failure == Failure.RUNTIME_CRASHED


def test_call_in_child_names_an_interpreter_that_does_not_start():
    with pytest.raises(StageError, match=r"/nowhere/python does not start: .*; mend") as error:
        call_in_child("child_module:work", {}, Limits(), "the child", "/nowhere/python")
    assert error.value.failure == Failure.RUNTIME_UNAVAILABLE


def test_call_in_child_shows_another_interpreter_the_package_through_a_link_alone(
    call, tmp_path, monkeypatch
):
    """What is installed beside quantline here is not for that interpreter."""
    monkeypatch.chdir(tmp_path)  # Python looks there first
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    write_module(
        tmp_path,
        "import quantline\nreturn {'path': quantline.__path__[0], 'first': sys.path[1]}",
    )
    result = call_in_child("child_module:work", {}, Limits(), "the child", str(python))
    package = Path(result["path"])
    assert package.name == "quantline"
    assert package.parent == Path(result["first"])
    assert package.parent != ROOT


def test_call_in_child_ends_all_processes_of_a_child_over_time(call, tmp_path):
    started = time.monotonic()
    pid_file = tmp_path / "pid"
    body = f"""
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
Path({str(pid_file)!r}).write_text(str(child.pid))
time.sleep(600)
"""
    error = failure(call, body, seconds=5)
    assert error.failure == Failure.TIMED_OUT
    assert time.monotonic() - started < 60
    assert (
        "expected the child to end within 5 s, and it was still running; "
        "raise evaluation.limits.seconds"
    ) in str(error)
    assert ends(int(pid_file.read_text()))


@pytest.mark.parametrize(
    "body",
    [
        "held = bytearray(400 << 20)\ntime.sleep(600)",
        f"subprocess.run([sys.executable, '-c', {IN_A_GRANDCHILD!r}])",
    ],
    ids=["in the child", "in a process that it started"],
)
def test_call_in_child_names_a_child_over_memory(call, body):
    error = failure(call, body, memory_mib=300, seconds=120)
    assert error.failure == Failure.OUT_OF_MEMORY
    assert "expected the child to stay within 300 MiB, found" in str(error)
    assert "raise evaluation.limits.memory_mib" in str(error)


def test_call_in_child_does_not_count_memory_that_is_mapped_and_not_touched(call):
    body = "held = mmap.mmap(-1, 8 << 30)\ntime.sleep(0.5)\nreturn {'size': len(held)}"
    assert call(body, memory_mib=300) == {"size": 8 << 30}


def test_call_in_child_keeps_the_end_of_any_amount_of_noise(call):
    body = "sys.stderr.write('x\\n' * 20_000_000)\nraise KeyError('the reason')"
    assert "KeyError: 'the reason'" in str(failure(call, body, memory_mib=400))


def test_call_in_child_names_a_panic_of_a_library_in_rust(call):
    body = "raise type('PanicException', (BaseException,), {})('index out of bounds')"
    error = failure(call, body)
    assert error.failure == Failure.RUNTIME_CRASHED
    assert "PanicException: index out of bounds" in str(error)


@pytest.mark.parametrize("grandchild", [False, True])
def test_the_child_does_not_outlive_a_stage_that_is_killed(tmp_path, grandchild):
    pid_file = tmp_path / "pid"
    say = f"Path({str(pid_file)!r}).write_text(str(os.getpid()))\ntime.sleep(600)"
    if grandchild:
        code = f"import os, time; from pathlib import Path; {say}".replace("\n", "; ")
        say = f"subprocess.run([sys.executable, '-c', {code!r}])"
    write_module(tmp_path, say)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    stage = subprocess.Popen([sys.executable, "-c", STAGE], env=environment)
    deadline = time.monotonic() + 60
    while not pid_file.is_file() or not pid_file.read_text():
        assert time.monotonic() < deadline
        assert stage.poll() is None
        time.sleep(0.05)
    stage.send_signal(signal.SIGKILL)
    stage.wait()
    assert ends(int(pid_file.read_text()))


def test_a_process_whose_parent_was_gone_before_it_asked_ends_at_once():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    code = f"from quantline.run.leash import end_with_parent; end_with_parent({gone.pid}); print(1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (137, b"")


def test_what_a_child_does_is_told_while_it_works(call, monkeypatch, capsys):
    from quantline.run import progress

    monkeypatch.setattr(progress, "LINE_S", 0.1)
    body = """
        from quantline.run.progress import counting
        with counting("divergence", "token", 100) as advance:
            time.sleep(0.3)  # so that it is written at once
            advance(40)
            time.sleep(0.7)
        return {}
    """
    call(textwrap.dedent(body))
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("child, divergence: 40 of 100 tokens in ") for line in lines)
