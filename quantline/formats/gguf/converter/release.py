"""The converter of the llama.cpp that is linked, out of llama-cpp-python's source distribution.

The archive is known by its hash, no code of it is run, and of its files only the converter's are
kept, with their licence:

python -m quantline.formats.gguf.converter.release llama_cpp_python-0.3.36.tar.gz

`make` does so with the archive that it builds llama.cpp from. Elsewhere the first export that needs
the converter fetches the archive with pip.
"""

import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from quantline.errors import Failure, StageError
from quantline.files import read_json, sha256_file, versions, write_json
from quantline.folders import atomic_folder

PACKAGE = "llama-cpp-python"
# Version → sha256 of its source distribution on the package index.
ARCHIVES = {"0.3.36": "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"}
SCRIPT = "convert_hf_to_gguf.py"
# What is kept of vendor/llama.cpp: the script, what it imports, and the licences of both.
KEPT = re.compile(
    rf"{re.escape(SCRIPT)}|LICENSE|conversion/[\w/]+\.py|gguf-py/LICENSE|gguf-py/gguf/[\w/]+\.py"
)
NEEDED = (SCRIPT, "LICENSE", "conversion/__init__.py", "gguf-py/gguf/__init__.py")
LARGEST_FILE = 4 << 20  # bytes; the largest of them has 200 KiB
LARGEST_TOTAL = 32 << 20
ORIGIN = "origin.json"  # beside the files: the package, its version, and the archive's hash
LAST_LINES = 3  # of pip that an error quotes


def release_converter() -> Path:
    """Return the folder of the converter of the llama.cpp that is installed, fetched if need be.

    Raises:
        StageError: runtime_unavailable, if llama-cpp-python is absent; converter_unavailable, if
            the archive of its version is not known or cannot be fetched.
    """
    version = versions(PACKAGE)[PACKAGE]
    if version == "absent":
        raise StageError(
            Failure.RUNTIME_UNAVAILABLE,
            f"expected {PACKAGE}, whose llama.cpp has the converter, found none; install it: "
            f"pip install {PACKAGE}",
        )
    for folder in places(version):
        if is_kept(folder, version):
            return folder
    return fetch(version)


def places(version: str) -> list[Path]:
    """Return where the converter of a version may lie: in the environment, or in the user's cache.

    The first is for `make`, the second for what is fetched.
    """
    name = f"llama.cpp-{version}"
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return [Path(sys.prefix) / "share/quantline" / name, Path(cache) / "quantline" / name]


def is_kept(folder: Path, version: str) -> bool:
    """Whether a folder has the converter of a version, from an archive with the hash it should."""
    origin = folder / ORIGIN
    return origin.is_file() and read_json(origin) == _origin(version)


def _origin(version: str) -> dict[str, Any]:
    return {"package": PACKAGE, "version": version, "sha256": ARCHIVES.get(version)}


def fetch(version: str) -> Path:
    """Download the archive of a version with pip, and keep its converter in the user's cache.

    Raises:
        StageError: converter_unavailable; converter_failed, as `keep` does.
    """
    expected = known_hash(version)
    target = places(version)[-1]
    with tempfile.TemporaryDirectory() as temporary:
        requirements = Path(temporary) / "requirements.txt"
        requirements.write_text(f"{PACKAGE}=={version} --hash=sha256:{expected}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
        command += ["--no-binary", PACKAGE, "--dest", temporary, "--requirement", str(requirements)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        archives = list(Path(temporary).glob("*.tar.gz"))
        if done.returncode or not archives:
            said = " ".join(done.stderr.strip().splitlines()[-LAST_LINES:])
            raise StageError(
                Failure.CONVERTER_UNAVAILABLE,
                f"expected to fetch the source of {PACKAGE} {version}, which has the converter of "
                f"llama.cpp that this model needs for GGUF, found that pip cannot ({said}); run it "
                "again with a connection to the package index, or run `make`, or name your own "
                "checkout of llama.cpp: model.converter=/path/to/llama.cpp",
            )
        keep(archives[0], version, target)
    return target


def known_hash(version: str) -> str:
    """Return the hash of a version's archive. Raises StageError: converter_unavailable."""
    if version not in ARCHIVES:
        raise StageError(
            Failure.CONVERTER_UNAVAILABLE,
            f"expected {PACKAGE} {', '.join(ARCHIVES)}, whose converter is known by its hash, "
            f"found {version}; install one of them, or name a checkout of the llama.cpp of "
            f"{version}: model.converter=/path/to/llama.cpp",
        )
    return ARCHIVES[version]


def keep(archive: Path, version: str, target: Path) -> None:
    """Put the converter's files of an archive into a folder, which appears whole or not at all.

    Args:
        archive: The source distribution.
        version: Of llama-cpp-python.
        target: The folder.

    Raises:
        StageError: converter_unavailable, for another archive than the one that is known, and for
            files in it that are not what they should be.
    """
    expected = known_hash(version)
    found = sha256_file(archive)
    if found != expected:
        raise _unfit(archive, f"sha256 {expected}", found)
    with atomic_folder(target) as folder:
        total = 0
        with tarfile.open(archive) as members:
            for member, name in _kept_members(members):
                total += member.size
                if not member.isfile() or member.size > LARGEST_FILE or total > LARGEST_TOTAL:
                    raise _unfit(
                        archive,
                        f"plain files of at most {LARGEST_FILE} bytes, {LARGEST_TOTAL} in all",
                        f"{member.name} of {member.size}",
                    )
                content = members.extractfile(member)
                assert content is not None, "it is a plain file"
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.read())
        for name in NEEDED:
            if not (folder / name).is_file():
                raise _unfit(archive, f"vendor/llama.cpp/{name}", "no such file")
        write_json(folder / ORIGIN, _origin(version))


def _kept_members(members: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, str]]:
    """Yield the archive's entries that belong to the converter, with their names in llama.cpp."""
    for member in members:
        parts = PurePosixPath(member.name).parts
        name = "/".join(parts[3:])
        inside = parts[1:3] == ("vendor", "llama.cpp") and ".." not in parts
        if inside and KEPT.fullmatch(name):
            yield member, name


def _unfit(archive: Path, expected: str, found: object) -> StageError:
    return StageError(
        Failure.CONVERTER_UNAVAILABLE,
        f"expected {expected} in {archive}, found {found}; fetch the source distribution of "
        f"{PACKAGE} again",
    )


def main() -> None:
    """Keep the converter of an archive in the environment of this Python."""
    version = versions(PACKAGE)[PACKAGE]
    keep(Path(sys.argv[1]), version, places(version)[0])


if __name__ == "__main__":
    main()
