"""Two folders that change places in one step, or do not, and why."""

import ctypes
import errno
import os
from pathlib import Path

import pytest

from quantline import durable
from quantline.durable import replace_folder


class Renaming:
    """Stands in for the C library, whose renameat2 ends with an error."""

    def __init__(self, number: int) -> None:
        self.number = number

    def renameat2(self, *_: object) -> int:
        ctypes.set_errno(self.number)
        return -1


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """A new folder, and the old one whose name it is to get."""
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    return tmp_path / "new", tmp_path / "old"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_folder_is_replaced_where_two_names_cannot_change_places(folders, monkeypatch, number):
    monkeypatch.setattr(durable.ctypes, "CDLL", lambda *_, **__: Renaming(number))
    new, old = folders
    replace_folder(new, old)
    assert (old / "file").read_text() == "new"
    assert list(old.parent.iterdir()) == [old]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_an_error_of_the_system_leaves_both_folders(folders, monkeypatch, number):
    monkeypatch.setattr(durable.ctypes, "CDLL", lambda *_, **__: Renaming(number))
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        replace_folder(*folders)
    assert (caught.value.filename, caught.value.filename2) == tuple(map(str, folders))
    assert [(folder / "file").read_text() for folder in folders] == ["new", "old"]
