"""No reader takes a fault of the machine for one of what it reads, or for its absence."""

import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from quantline.config.compose import load_params, present_params
from quantline.config.copied_project import _is_in_git
from quantline.config.grid import read_suite
from quantline.config.texts import Limits
from quantline.errors import Failure, StageError
from quantline.metrics.target_metrics import _tasks
from quantline.run.child_process import call_in_child
from quantline.text import tokenizer
from quantline.text.text_file import read_text_file
from quantline.tracking.run_origin import git_commit
from quantline.tracking.undelivered import Run, keep, kept

NUMBERS = (errno.EMFILE, errno.EIO, errno.ENOMEM)


def failing(number: int) -> Callable[..., object]:
    def call(*_: object, **__: object) -> object:
        raise OSError(number, os.strerror(number))

    return call


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with a file of each kind that is read."""
    monkeypatch.chdir(tmp_path)
    for name in ("params.yaml", "suite.yaml", "text.txt", "gold.jsonl", "tokenizer.json"):
        Path(name).write_text("{}")
    return tmp_path


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(
    "read",
    [
        lambda: load_params("params.yaml"),
        lambda: read_suite(Path("suite.yaml")),
        lambda: read_text_file(Path("text.txt")),
        lambda: _tasks("gold.jsonl"),
        present_params,
        lambda: list(kept()),
    ],
    ids=["params", "suite", "text", "gold", "present params", "kept runs"],
)
def test_a_file_that_cannot_be_read_now_is_neither_wrong_nor_absent(
    folder, monkeypatch, read, number
):
    keep(Run("key", "name"))
    monkeypatch.setattr(Path, "read_text", failing(number))
    monkeypatch.setattr(Path, "read_bytes", failing(number))
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        read()
    assert caught.value.errno == number


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM, errno.EAGAIN])
@pytest.mark.parametrize(
    "start",
    [git_commit, lambda: _is_in_git(Path.cwd(), "text.txt")],
    ids=["commit", "listing"],
)
def test_a_program_that_cannot_start_now_is_not_absent(folder, monkeypatch, start, number):
    monkeypatch.setattr(subprocess, "run", failing(number))
    with pytest.raises(OSError, match=os.strerror(number)):
        start()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM])
def test_an_interpreter_that_cannot_start_now_is_not_absent(folder, monkeypatch, number):
    monkeypatch.setattr(subprocess, "Popen", failing(number))
    with pytest.raises(OSError, match=os.strerror(number)):
        call_in_child("builtins:dict", {}, Limits(), "it")


@pytest.mark.parametrize(
    ("number", "failure"),
    [(errno.EMFILE, Failure.TOO_MANY_OPEN_FILES), (errno.EIO, Failure.DISK_ERROR)],
)
def test_a_tokenizer_that_cannot_be_read_now_is_not_damaged(folder, monkeypatch, number, failure):
    class Fast:
        """Stands in for the library in Rust, which raises plain Exception."""

        @staticmethod
        def from_file(path: str) -> None:
            raise Exception(f"{os.strerror(number)} (os error {number})")

    monkeypatch.setattr(tokenizer, "FastTokenizer", Fast)
    with pytest.raises(StageError) as caught:
        tokenizer.Tokenizer(folder)
    assert caught.value.failure == failure
