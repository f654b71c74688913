"""The converter out of the source distribution of llama-cpp-python."""

import io
import re
import subprocess
import tarfile
from pathlib import Path

import pytest

from quantline.errors import StageError
from quantline.files import sha256_file
from quantline.formats.gguf.converter import release
from tests.helpers.project import ROOT

VERSION = "0.0.1"
TOP = f"llama_cpp_python-{VERSION}"
INSIDE = f"{TOP}/vendor/llama.cpp"
NEEDED = {f"{INSIDE}/{name}": f"# {name}\n" for name in release.NEEDED}


def write_archive(path: Path, files: dict[str, str], links: dict[str, str] | None = None) -> Path:
    """Write an archive of texts by name, and of links by name."""
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type = tarfile.SYMTYPE
            member.linkname = target
            archive.addfile(member)
    return path


@pytest.fixture
def known(monkeypatch):
    """known(archive) makes an archive the one that is known for VERSION."""
    return lambda path: monkeypatch.setitem(release.ARCHIVES, VERSION, sha256_file(path))


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_keep_takes_the_converter_with_its_licence_and_nothing_else(tmp_path, known):
    others = {
        f"{TOP}/setup.py": "raise SystemExit('run')",
        f"{INSIDE}/src/llama.cpp": "int main;",
        f"{INSIDE}/conversion/llama.py": "# llama",
        f"{INSIDE}/conversion/notes.txt": "no code",
        f"{INSIDE}/conversion/../../../../escaped.py": "# out",
        "/vendor/llama.cpp/LICENSE": "absolute",
    }
    archive = write_archive(tmp_path / "a.tar.gz", NEEDED | others)
    known(archive)
    release.keep(archive, VERSION, tmp_path / "kept")
    wanted = {*release.NEEDED, "conversion/llama.py", release.ORIGIN}
    assert names_in(tmp_path / "kept") == wanted
    assert release.is_kept(tmp_path / "kept", VERSION)
    assert names_in(tmp_path) == {"a.tar.gz", *(f"kept/{name}" for name in wanted)}


REFUSED = {
    "a link": ({}, {f"{INSIDE}/conversion/base.py": "/etc/passwd"}, "plain files"),
    "a large file": (
        {f"{INSIDE}/conversion/base.py": "#" * (release.LARGEST_FILE + 1)},
        {},
        "plain files",
    ),
    "no licence": ({f"{INSIDE}/LICENSE": None}, {}, "vendor/llama.cpp/LICENSE"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_keep_refuses_an_archive_with(case, tmp_path, known):
    changes, links, words = REFUSED[case]
    files = {name: text for name, text in (NEEDED | changes).items() if text is not None}
    archive = write_archive(tmp_path / "a.tar.gz", files, links)
    known(archive)
    with pytest.raises(StageError, match=words) as error:
        release.keep(archive, VERSION, tmp_path / "kept")
    assert error.value.failure == "converter_unavailable"
    assert names_in(tmp_path) == {"a.tar.gz"}


def test_keep_refuses_another_archive_than_the_known_one(tmp_path, known):
    archive = write_archive(tmp_path / "a.tar.gz", NEEDED)
    known(archive)
    write_archive(archive, NEEDED | {f"{INSIDE}/conversion/evil.py": ""})
    with pytest.raises(StageError, match="expected sha256"):
        release.keep(archive, VERSION, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_the_locked_version_is_known():
    found = re.search(r"^llama_cpp_python==(\S+)", (ROOT / "requirements.lock").read_text(), re.M)
    assert found and found[1] in release.ARCHIVES


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """An environment and a cache without a converter."""
    monkeypatch.setattr(release.sys, "prefix", str(tmp_path / "environment"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(release, "versions", lambda package: {package: VERSION})
    return tmp_path


def test_release_converter_fetches_once(nowhere, known, monkeypatch):
    archive = write_archive(nowhere / "a.tar.gz", NEEDED)
    known(archive)
    commands = []

    def run(command, **_):
        commands.append(command)
        target = Path(command[command.index("--dest") + 1])
        (target / "llama_cpp_python.tar.gz").write_bytes(archive.read_bytes())
        requirements = Path(command[command.index("--requirement") + 1]).read_text()
        assert f"=={VERSION} --hash=sha256:{release.ARCHIVES[VERSION]}" in requirements
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(release.subprocess, "run", run)
    folder = release.release_converter()
    assert folder == nowhere / f"cache/quantline/llama.cpp-{VERSION}"
    assert release.release_converter() == folder
    assert len(commands) == 1


def test_release_converter_says_what_to_run_without_the_index(nowhere, known, monkeypatch):
    known(write_archive(nowhere / "a.tar.gz", NEEDED))
    monkeypatch.setattr(
        release.subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(command, 1, "", "ERROR: no route\n"),
    )
    with pytest.raises(StageError) as error:
        release.release_converter()
    assert error.value.failure == "converter_unavailable"
    for words in ("ERROR: no route", "run `make`", "model.converter=/path/to/llama.cpp"):
        assert words in str(error.value)


def test_release_converter_refuses_a_version_without_a_known_hash(nowhere):
    with pytest.raises(StageError, match=r"found 0\.0\.1") as error:
        release.release_converter()
    assert error.value.failure == "converter_unavailable"
