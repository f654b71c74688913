"""Whether a bundle, wherever it lies, is what was exported, and whether figures belong to it."""

from pathlib import Path
from typing import Any

from quantline.config.params import Params
from quantline.errors import Failure, StageError
from quantline.files import MIB, known_sha256, read_json, sha256_json
from quantline.formats.bundle.manifest import DESCRIPTIONS, MANIFEST, check_files, read_manifest
from quantline.paths import EXPORTS, METRICS
from quantline.report.rows import read_row
from quantline.run.lineage import LINEAGE

SHOWN = 12  # digits of a hash


def verify_bundle(folder: Path, figures: Path | None = None) -> str:
    """Check a bundle by itself.

    Args:
        folder: The bundle.
        figures: The file metrics/<variant>.json that is said to be its own.

    Returns:
        What was found, in a sentence.

    Raises:
        StageError: missing_file; artifact_changed, if a file is not what was exported or the
            figures are those of other bytes.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    _check_hashes(folder, manifest)
    sha256 = manifest["artifact_sha256"]
    size = sum(entry["bytes"] for entry in manifest["files"].values()) / MIB
    sentence = (
        f"{folder}: {manifest['variant']}, sha256 {sha256[:SHOWN]}…, {len(manifest['files'])} "
        f"files, {size:.1f} MiB as exported"
    )
    if figures is None:
        return f"{sentence}; no figures were given"
    found = read_json(figures).get("artifact_sha256")
    if found != sha256:
        raise StageError(
            Failure.ARTIFACT_CHANGED,
            f"expected figures of sha256 {sha256[:SHOWN]}… in {figures}, found those of "
            f"{str(found)[:SHOWN]}…; measure the bundle again",
        )
    _check_figures(figures)
    return f"{sentence}; {figures} was measured on these bytes"


def _check_hashes(folder: Path, manifest: dict[str, Any]) -> None:
    """Check the files that the manifest leaves out, and itself. Raises artifact_changed."""
    hashes = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    expected = sha256_json(hashes)
    if manifest["artifact_sha256"] != expected:
        raise StageError(
            Failure.ARTIFACT_CHANGED,
            f"{folder / MANIFEST} contradicts itself: expected artifact_sha256 "
            f"{expected[:SHOWN]}…, found {str(manifest['artifact_sha256'])[:SHOWN]}…; export the "
            "variant again",
        )
    lineage = folder / LINEAGE
    if not lineage.is_file():
        return
    contents = _contents_in(lineage)
    for name in sorted({MANIFEST, *contents} & set(DESCRIPTIONS)):
        path = folder / name
        if not path.is_file() or contents.get(name) != known_sha256(path):
            raise StageError(
                Failure.ARTIFACT_CHANGED,
                f"{path} is not what its stage wrote; export the variant again",
            )


def _check_figures(figures: Path) -> None:
    """Check figures against the lineage that lies where their stage puts it, if it is there.

    Raises:
        StageError: artifact_changed.
    """
    lineage = figures.parent / "lineage" / figures.name
    if lineage.is_file() and _contents_in(lineage).get(figures.name) != known_sha256(figures):
        raise StageError(
            Failure.ARTIFACT_CHANGED,
            f"{figures} is not what its stage wrote; measure the bundle again",
        )


def _contents_in(lineage: Path) -> dict[str, Any]:
    """Return file → sha256 as a lineage file has it; nothing if it has none."""
    contents = read_json(lineage).get("contents")
    return contents if isinstance(contents, dict) else {}


def verify_variant(name: str, params: Params) -> str:
    """Check a variant of the project of the working folder: bundle, figures and lineage.

    Returns:
        What was found, in a sentence.

    Raises:
        StageError: As `verify_bundle` does; stale; and what stopped a variant that has no figures.
    """
    sentence = verify_bundle(EXPORTS / name, METRICS / f"{name}.json")
    row = read_row(name, params)
    if not row.is_measured:
        raise StageError(Failure(str(row.failure)), str(row.message))
    return f"{sentence}, from the present parameters, files and artifacts"
