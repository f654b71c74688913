"""Files that share bytes instead of copying them, as far as the file system can."""

import errno
import os

import pytest

from quantline import links
from quantline.causes import NOT_OFFERED
from quantline.links import clone_or_copy, link
from tests.helpers.full_disk import largest_file

# No other way would help, and each has to be said.
TRUE_ERRORS = [
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES),
]


def refuse(number):
    def call(*_):
        raise OSError(number, os.strerror(number))

    return call


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    path.write_bytes(b"weights")
    return path


@pytest.mark.parametrize("number", sorted(NOT_OFFERED))
def test_link_shares_bytes_and_falls_back_to_a_copy(tmp_path, source, monkeypatch, number):
    assert link(source, tmp_path / "shared") in ("reflink", "hard link")
    monkeypatch.setattr(links.fcntl, "ioctl", refuse(number))
    assert link(source, tmp_path / "hard") == "hard link"
    assert (tmp_path / "hard").stat().st_ino == source.stat().st_ino
    monkeypatch.setattr(links.os, "link", refuse(number))
    assert link(source, tmp_path / "copy") == "copy"
    for name in ("shared", "hard", "copy"):
        assert (tmp_path / name).read_bytes() == b"weights"


@pytest.mark.parametrize("give", [link, clone_or_copy])
@pytest.mark.parametrize("number", TRUE_ERRORS)
def test_no_other_way_hides_an_error_of_the_system(tmp_path, source, monkeypatch, number, give):
    monkeypatch.setattr(links.fcntl, "ioctl", refuse(number))
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        give(source, tmp_path / "target")
    assert caught.value.errno == number
    assert not (tmp_path / "target").exists()
    assert source.read_bytes() == b"weights"


@pytest.mark.parametrize("number", TRUE_ERRORS)
def test_no_copy_hides_an_error_of_a_hard_link(tmp_path, source, monkeypatch, number):
    monkeypatch.setattr(links.fcntl, "ioctl", refuse(errno.EOPNOTSUPP))
    monkeypatch.setattr(links.os, "link", refuse(number))
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        link(source, tmp_path / "target")
    assert caught.value.errno == number


@pytest.mark.parametrize("give", [link, clone_or_copy])
def test_a_target_that_cannot_be_opened_keeps_its_error(tmp_path, source, monkeypatch, give):
    opened = links.Path.open

    def too_many(path, mode):
        return refuse(errno.EMFILE)() if path.name == "target" else opened(path, mode)

    monkeypatch.setattr(links.Path, "open", too_many)
    with pytest.raises(OSError, match="Too many open files"):
        give(source, tmp_path / "target")


def test_a_copy_on_a_full_disk_keeps_its_error(tmp_path, source, monkeypatch):
    monkeypatch.setattr(links.fcntl, "ioctl", refuse(errno.EOPNOTSUPP))
    with largest_file(3), pytest.raises(OSError, match="File too large"):
        clone_or_copy(source, tmp_path / "target")


def test_link_goes_to_the_file_that_a_symbolic_link_leads_to(tmp_path, source):
    (tmp_path / "symbolic").symlink_to(source)
    link(tmp_path / "symbolic", tmp_path / "folder/target")
    assert not (tmp_path / "folder/target").is_symlink()
    assert (tmp_path / "folder/target").read_bytes() == b"weights"


@pytest.mark.parametrize("can_clone", [True, False])
def test_clone_or_copy_is_never_a_hard_link(tmp_path, source, monkeypatch, can_clone):
    """DVC makes what it caches read-only, and that would be the user's own file."""
    if not can_clone:
        monkeypatch.setattr(links.fcntl, "ioctl", refuse(errno.EOPNOTSUPP))
    clone_or_copy(source, tmp_path / "copy")
    assert (tmp_path / "copy").stat().st_ino != source.stat().st_ino
    (tmp_path / "copy").write_bytes(b"changed")
    assert source.read_bytes() == b"weights"
