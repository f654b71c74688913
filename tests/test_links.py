"""Files that share bytes instead of copying them, as far as the file system can."""

import pytest

from quantline import links
from quantline.links import clone_or_copy, link


def refuse(*_):
    raise OSError("not here")


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    path.write_bytes(b"weights")
    return path


def test_link_shares_bytes_and_falls_back_to_a_copy(tmp_path, source, monkeypatch):
    assert link(source, tmp_path / "shared") in ("reflink", "hard link")
    monkeypatch.setattr(links.fcntl, "ioctl", refuse)
    assert link(source, tmp_path / "hard") == "hard link"
    assert (tmp_path / "hard").stat().st_ino == source.stat().st_ino
    monkeypatch.setattr(links.os, "link", refuse)
    assert link(source, tmp_path / "copy") == "copy"
    for name in ("shared", "hard", "copy"):
        assert (tmp_path / name).read_bytes() == b"weights"


def test_link_goes_to_the_file_that_a_symbolic_link_leads_to(tmp_path, source):
    (tmp_path / "symbolic").symlink_to(source)
    link(tmp_path / "symbolic", tmp_path / "folder/target")
    assert not (tmp_path / "folder/target").is_symlink()
    assert (tmp_path / "folder/target").read_bytes() == b"weights"


@pytest.mark.parametrize("can_clone", [True, False])
def test_clone_or_copy_is_never_a_hard_link(tmp_path, source, monkeypatch, can_clone):
    """DVC makes what it caches read-only, and that would be the user's own file."""
    if not can_clone:
        monkeypatch.setattr(links.fcntl, "ioctl", refuse)
    clone_or_copy(source, tmp_path / "copy")
    assert (tmp_path / "copy").stat().st_ino != source.stat().st_ino
    (tmp_path / "copy").write_bytes(b"changed")
    assert source.read_bytes() == b"weights"
