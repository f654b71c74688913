"""What an artifact was made from, as hashes that its stage writes beside it.

Every stage leaves a lineage file with what it made: the parameters that it read, the user's files,
the artifacts of earlier stages, and the files that it wrote. Each passes on what it was given, so
the lineage of a figure names everything that led to it. An artifact's id is the sha256 of its
lineage file.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from quantline.errors import Failure, StageError
from quantline.files import known_sha256, read_json, write_json
from quantline.paths import ARTIFACTS, EXPORTS, METRICS, MODEL

LINEAGE = "lineage.json"
WEIGHTS = ".safetensors"
# Kind of artifact → the stage that makes it.
STAGES = {
    "model": "load",
    "answers": "answer",
    "calibration": "calibrate",
    "reference": "reference",
    "quantized": "quantize",
    "exports": "export",
    "metrics": "evaluate",
}


@dataclass(frozen=True)
class Lineage:
    """What led to an artifact.

    Attributes:
        params: Key of params.yaml → value.
        files: Path of a file of the user's → sha256.
        artifacts: Name of an artifact → its id; None for one that has no lineage.
        contents: File of the artifact itself → sha256, so far as nothing else checks it.
    """

    params: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    artifacts: dict[str, str | None] = field(default_factory=dict)
    contents: dict[str, str] = field(default_factory=dict)

    def joined(self, other: "Lineage", artifact: str) -> "Lineage":
        """Return this lineage with that of an artifact that was read.

        Raises:
            StageError: artifact_changed, if the two have different values of one thing.
        """
        parts: dict[str, dict[str, Any]] = {}
        for part in ("params", "files", "artifacts"):
            mine = getattr(self, part)
            theirs = getattr(other, part)
            for name in sorted(mine.keys() & theirs.keys()):
                if mine[name] != theirs[name]:
                    raise StageError(
                        Failure.ARTIFACT_CHANGED,
                        f"expected {artifact} to be made from the present {name}, found that it "
                        "was made from another; run `quantline repro`",
                    )
            parts[part] = mine | theirs
        return Lineage(**parts)


def artifact_folder(artifact: str) -> Path:
    """Return the folder with the files of an artifact.

    Args:
        artifact: "model", "answers", "calibration", "reference", "quantized/<recipe>",
            "exports/<variant>", or "metrics/<variant>".
    """
    kind = artifact.partition("/")[0]
    return METRICS if kind == METRICS.name else ARTIFACTS / artifact


def lineage_file(artifact: str) -> Path:
    """Return the lineage file of an artifact (see `artifact_folder`)."""
    kind, _, name = artifact.partition("/")
    if kind == METRICS.name:
        return METRICS / "lineage" / f"{name}.json"
    return artifact_folder(artifact) / LINEAGE


def stage_of(artifact: str) -> str:
    """Return the DVC stage that makes an artifact, such as export@bf16."""
    kind, _, name = artifact.partition("/")
    return f"{STAGES[kind]}@{name}" if name else STAGES[kind]


def artifact_of(stage: str, instance: str | None) -> str | None:
    """Return the artifact that a stage makes; None for a stage that makes none."""
    for kind, maker in STAGES.items():
        if maker == stage:
            return f"{kind}/{instance}" if instance else kind
    return None


def make_again(artifact: str) -> str:
    """Return the advice to make an artifact again, even if DVC takes it for up to date."""
    return f"run `dvc repro --force --single-item {stage_of(artifact)}`, then `quantline repro`"


def artifact_id(artifact: str) -> str | None:
    """Return the sha256 of an artifact's lineage file; None if it has none."""
    path = lineage_file(artifact)
    return known_sha256(path) if path.is_file() else None


def read_lineage(artifact: str) -> Lineage | None:
    """Return what led to an artifact; None if nothing says so.

    Raises:
        StageError: artifact_changed, for a file that no stage wrote.
    """
    path = lineage_file(artifact)
    if not path.is_file():
        return None
    try:
        lineage = Lineage(**read_json(path))
        if all(isinstance(getattr(lineage, part.name), dict) for part in fields(lineage)):
            return lineage
        error: Exception = TypeError("its parts are no tables")
    except (StageError, TypeError) as caught:
        error = caught
    raise StageError(
        Failure.ARTIFACT_CHANGED,
        f"expected the lineage of {artifact} in {path}, as its stage wrote it: {error}; "
        f"{make_again(artifact)}",
    )


def check_contents(artifact: str, thorough: bool = True) -> None:
    """Check an artifact's files against the hashes that its stage wrote.

    Args:
        artifact: Its name; one that is not here, or has no lineage, passes.
        thorough: Whether to hash the model's weights too, which takes as long as reading them, and
            to look for files that the stage did not write.

    Raises:
        StageError: artifact_changed.
    """
    lineage = read_lineage(artifact)
    if lineage is None:
        return
    folder = artifact_folder(artifact)
    for name, expected in sorted(lineage.contents.items()):
        if artifact == MODEL.name and name.endswith(WEIGHTS) and not thorough:
            continue
        path = folder / name
        found = known_sha256(path) if path.is_file() else None
        if found != expected:
            raise StageError(
                Failure.ARTIFACT_CHANGED,
                f"{path} is not what its stage wrote: expected sha256 {expected[:12]}…, found "
                f"{'no such file' if found is None else found[:12] + '…'}; {make_again(artifact)}",
            )
    # Figures of all variants share a folder, and a bundle's other files are in its manifest.
    if not thorough or folder in (METRICS, EXPORTS / folder.name):
        return
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_dir() and name not in lineage.contents and name != LINEAGE:
            raise StageError(
                Failure.ARTIFACT_CHANGED,
                f"expected in {folder} what its stage wrote, found {name} too; remove it, or "
                f"{make_again(artifact)}",
            )


def write_lineage(folder: Path, path: Path, made_from: Lineage, names: Iterable[str]) -> None:
    """Write the lineage of what a stage has made.

    Args:
        folder: Has the files that were made.
        path: The lineage file to write.
        made_from: What led to them.
        names: The files in the folder that are hashed.
    """
    contents = {name: known_sha256(folder / name) for name in sorted(names)}
    write_json(path, asdict(replace(made_from, contents=contents)))
