"""A process that crashes, hangs or takes too much memory is a failure with a name, and nothing of it stays."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from quantline.config.params import Limits
from quantline.errors import Failure, StageError
from quantline.run.child_process import ask

ROOT = Path(__file__).resolve().parent.parent
FRAME = """
import ctypes, os, subprocess, sys, time
from pathlib import Path
from quantline.errors import Failure, StageError
from quantline.run.child_process import answer
def work():
{}
answer(Path(sys.argv[-1]), work)
"""


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """asked(code, *arguments, **limits): what a module answers whose work is this code."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")

    def run(code: str, *arguments: str, **limits) -> dict:
        (tmp_path / "child_module.py").write_text(FRAME.format(textwrap.indent(code, "    ")))
        return ask("child_module", *arguments, limits=Limits(**limits), what="the child")

    return run


def failure(asked, code: str, *arguments: str, **limits) -> StageError:
    with pytest.raises(StageError) as caught:
        asked(code, *arguments, **limits)
    return caught.value


def test_what_the_process_returns_comes_back(asked):
    assert asked("return {'arguments': sys.argv[1:-2], 'out': print('noise')}", "a", "b c") == {"arguments": ["a", "b c"], "out": None}


def test_an_answer_of_any_length_on_stderr_does_not_block(asked):
    assert asked("sys.stderr.write('x' * 1_000_000); return {'done': True}") == {"done": True}


@pytest.mark.parametrize(("code", "words"), [
    ("os.abort()", r"signal 6 \(SIGABRT\): Fatal Python error: Aborted; File .*child_module.py\", line 7 in work"),
    ("ctypes.string_at(0)", r"signal 11 \(SIGSEGV\): Fatal Python error: Segmentation fault"),
    ("os._exit(7)", "exit code 7: it said nothing"),
    ("os._exit(0)", "exit code 0: it said nothing"),
    ("raise KeyError('weights')", "exit code 1: .*KeyError: 'weights'"),
])
def test_a_crash_is_named_with_what_it_was_and_where(asked, code, words):
    error = failure(asked, code)
    assert error.failure == Failure.RUNTIME_CRASHED
    with pytest.raises(StageError, match=f"expected the child to end well, and it ended with {words}.*; try the variant"):
        raise error


@pytest.mark.parametrize(("code", "named", "words"), [
    ("raise StageError(Failure.NON_FINITE, 'no number')", Failure.NON_FINITE, "no number"),
    ("raise MemoryError", Failure.OUT_OF_MEMORY, "MemoryError"),
    ("raise RuntimeError('CUDA out of memory. Tried to allocate')", Failure.OUT_OF_MEMORY, "CUDA out of memory"),
    ("os.kill(os.getpid(), 9)", Failure.OUT_OF_MEMORY, "the child was killed from outside"),
])
def test_failures_that_the_process_names_itself(asked, code, named, words):
    error = failure(asked, code)
    assert error.failure == named and words in str(error)


def test_over_time_all_of_its_processes_end(asked, tmp_path):
    started = time.monotonic()
    error = failure(asked, f"""
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))
time.sleep(600)
""", seconds=5)
    assert error.failure == Failure.TIMED_OUT and time.monotonic() - started < 60
    assert "expected the child to end within 5 s, and it was still running; raise evaluation.limits.seconds" in str(error)
    assert gone(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize("code", [
    "held = bytearray(400 << 20); time.sleep(600)",
    "subprocess.run([sys.executable, '-c', 'import time; held = bytearray(400 << 20); time.sleep(600)'])",
])
def test_over_memory_in_the_process_or_in_one_that_it_started(asked, code):
    error = failure(asked, code, memory_mib=300, seconds=120)
    assert error.failure == Failure.OUT_OF_MEMORY
    assert "expected the child to stay within 300 MiB, found" in str(error) and "raise evaluation.limits.memory_mib" in str(error)


def test_memory_that_is_mapped_and_not_touched_does_not_count(asked):
    assert asked("import mmap; held = mmap.mmap(-1, 8 << 30); time.sleep(0.5); return {'size': len(held)}", memory_mib=300) == {"size": 8 << 30}


def test_it_does_not_outlive_the_stage_that_is_killed(asked, tmp_path):
    (tmp_path / "child_module.py").write_text(FRAME.format(
        f"    Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n    time.sleep(600)"))
    code = "from quantline.config.params import Limits; from quantline.run.child_process import ask; ask('child_module', limits=Limits(), what='it')"
    stage = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline and stage.poll() is None
        time.sleep(0.05)
    stage.send_signal(signal.SIGKILL)
    stage.wait()
    assert gone(int((tmp_path / "pid").read_text()))


def gone(pid: int) -> bool:
    """Whether a process ends within seconds."""
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False
