"""The files of a bundle, and whether they are what its manifest says."""

from pathlib import Path
from typing import Any

from quantline.errors import Failure, Reason, StageError
from quantline.files import describe_files, read_json
from quantline.run.lineage import LINEAGE, make_again

MANIFEST = "manifest.json"
SMOKE = "smoke.json"
README = "README.md"
# The files that say what a bundle is; one of the same name in a folder below is a file like others.
DESCRIPTIONS = (MANIFEST, SMOKE, README, LINEAGE)
# What lies in a repository of the Hub, and in a folder that its client downloaded, besides files.
OF_THE_HUB = (".git", ".gitattributes", ".cache")
AGAIN = "export the variant again"


def files_of_bundle(folder: Path) -> dict[str, dict[str, Any]]:
    """Return {path: {sha256, bytes}} of the files that a bundle consists of."""
    names = set()
    for path in folder.rglob("*"):
        place = path.relative_to(folder)
        if path.is_file() and place.parts[0] not in OF_THE_HUB:
            names.add(place.as_posix())
    return describe_files(folder, names - set(DESCRIPTIONS))


def check_bundle(folder: Path) -> dict[str, Any]:
    """Check the bundle of a project against its manifest, to the byte.

    Returns:
        The manifest, which has the name of the folder's variant.

    Raises:
        StageError: missing_file (reason export_artifact_missing), artifact_changed.
    """
    again = f"{AGAIN}: {make_again(f'exports/{folder.name}')}"
    manifest = read_manifest(folder)
    if manifest["variant"] != folder.name:
        raise StageError(
            Failure.ARTIFACT_CHANGED,
            f"expected the bundle of {folder.name} at {folder}, found that of "
            f"{manifest['variant']}; {again}",
        )
    check_files(folder, manifest, again)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a bundle, whatever its folder is called.

    Raises:
        StageError: missing_file (reason export_artifact_missing); artifact_changed, for a file that
            no export wrote.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise StageError(
            Failure.MISSING_FILE,
            f"expected a bundle at {folder}, found no {MANIFEST}; export it first",
            Reason.EXPORT_ARTIFACT_MISSING,
        )
    manifest = read_json(path)
    absent = [key for key in ("artifact_sha256", "files", "variant") if key not in manifest]
    files = manifest.get("files")
    are_described = isinstance(files, dict) and all(map(_describes_a_file, files.values()))
    if absent or not are_described:
        raise StageError(
            Failure.ARTIFACT_CHANGED,
            f"expected the manifest of a bundle in {path}, found one without "
            f"{', '.join(absent) or 'a table of files'}; {AGAIN}",
        )
    return manifest


def _describes_a_file(entry: object) -> bool:
    """Whether an entry of a manifest has a hash and a size."""
    if not isinstance(entry, dict):
        return False
    return isinstance(entry.get("sha256"), str) and isinstance(entry.get("bytes"), int)


def check_files(folder: Path, manifest: dict[str, Any], again: str = AGAIN) -> None:
    """Check that a bundle has the files of its manifest, and no others, to the byte.

    Args:
        folder: The bundle.
        manifest: The content of its manifest.
        again: The advice if they are others.

    Raises:
        StageError: artifact_changed.
    """
    expected = manifest["files"]
    found = files_of_bundle(folder)
    for name in sorted({*expected, *found}):
        if found.get(name) != expected.get(name):
            raise StageError(
                Failure.ARTIFACT_CHANGED,
                f"{folder / name} is not what its manifest says: expected "
                f"{_describe(expected.get(name))}, found {_describe(found.get(name))}; {again}",
            )


def _describe(entry: dict[str, Any] | None) -> str:
    """Describe a file by its entry in a manifest."""
    if entry is None:
        return "no such file"
    return f"{entry['bytes']} bytes with sha256 {entry['sha256'][:12]}…"
