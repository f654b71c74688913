"""Whether a variant's figures are those of the present parameters, files and artifacts."""

from pathlib import Path
from typing import Any, NamedTuple

from quantline.config.params import Params
from quantline.errors import Failure, StageError
from quantline.files import known_sha256
from quantline.metrics.results import ResultFiles
from quantline.model.checkpoint_files import listing_sha256
from quantline.paths import METRICS
from quantline.run.lineage import (
    Lineage,
    artifact_folder,
    artifact_id,
    check_contents,
    lineage_file,
    make_again,
    read_lineage,
    stage_of,
)
from quantline.run.stage_inputs import READS, reads_of, values_read

ABSENT = "absent"
REPRO = "run `quantline repro`"


class StaleLink(NamedTuple):
    """A stage whose result is not that of its present inputs.

    Attributes:
        stage: As DVC names it, such as quantize@gptq-w4g128.
        reason: What it was made from, and what is there now.
    """

    stage: str
    reason: str


def chain_of(variant: str, params: Params) -> dict[str, tuple[str, str | None]]:
    """Return the artifacts that lead to a variant's figures.

    Returns:
        Artifact → its stage and the stage's instance, in the order in which they are made.
    """
    recipe = params.variants[variant].recipe
    return {
        "model": ("load", None),
        "answers": ("answer", None),
        "calibration": ("calibrate", None),
        "reference": ("reference", None),
        f"quantized/{recipe}": ("quantize", recipe),
        f"exports/{variant}": ("export", variant),
        f"{METRICS.name}/{variant}": ("evaluate", variant),
    }


def stale_links(variant: str, params: Params) -> list[StaleLink]:
    """Return the stages on the way to a variant's figures whose results are not the present ones.

    An artifact that is not here, as after `dvc pull` of the figures alone, is judged by what the
    figures say of it.

    Args:
        variant: Its figures are on disk.
        params: The present parameters.

    Raises:
        StageError: artifact_changed, if figures or a lineage file were edited.
    """
    measured = f"{METRICS.name}/{variant}"
    whole = read_lineage(measured)
    if whole is None:
        advice = make_again(measured)
        reason = f"nothing says what its figures were measured on; {advice}"
        return [StaleLink(stage_of(measured), reason)]
    links = []
    for artifact in chain_of(variant, params):
        if _has_lost_lineage(artifact, whole):
            reason = f"nothing says any more what {artifact} was made from; {make_again(artifact)}"
            links.append(StaleLink(stage_of(artifact), reason))
        if name := _contradiction(whole, read_lineage(artifact)):
            reason = f"its lineage and that of {artifact} do not agree on {name}"
            links.append(StaleLink(stage_of(measured), reason))
    for artifact, (stage, instance) in chain_of(variant, params).items():
        here = read_lineage(artifact)
        difference = _difference(stage, instance, here or whole, params)
        if difference:
            links.append(StaleLink(stage_of(artifact), difference))
    if not links:
        _check_figures_are_named(variant, whole)
        for artifact in chain_of(variant, params):
            check_contents(artifact)
    return links


def _check_figures_are_named(variant: str, lineage: Lineage) -> None:
    """Check that the lineage of figures has the hashes of all. Raises artifact_changed."""
    files = ResultFiles.of(METRICS, variant)
    for path in (files.quality, files.speed, files.answers):
        if path.relative_to(METRICS).as_posix() not in lineage.contents:
            measured = f"{METRICS.name}/{variant}"
            raise StageError(
                Failure.ARTIFACT_CHANGED,
                f"expected the hash of {path} in {lineage_file(measured)}, found none; "
                f"{make_again(measured)}",
            )


def _has_lost_lineage(artifact: str, whole: Lineage) -> bool:
    """Whether an artifact is here without the lineage file that the figures know."""
    known = whole.artifacts.get(artifact) is not None
    return known and artifact_folder(artifact).is_dir() and not lineage_file(artifact).is_file()


def _contradiction(whole: Lineage, part: Lineage | None) -> str | None:
    """Return the first thing of which two lineages say different things."""
    if part is None:
        return None
    pairs = (
        (whole.params, part.params),
        (whole.files, part.files),
        (whole.artifacts, part.artifacts),
    )
    for mine, theirs in pairs:
        for name, value in sorted(theirs.items()):
            if mine.get(name) != value:
                return name
    return None


def stale_stages(params: Params) -> list[StaleLink]:
    """Return the stale stages on the way to any figures, in the order in which they run.

    Figures that are not there, or that were edited, are left out.
    """
    links: dict[str, StaleLink] = {}
    for variant in params.variants:
        if not lineage_file(f"{METRICS.name}/{variant}").is_file():
            continue
        try:
            for link in stale_links(variant, params):
                links.setdefault(link.stage, link)
        except StageError:
            continue
    order = list(READS)
    return sorted(links.values(), key=lambda link: order.index(link.stage.partition("@")[0]))


def _difference(stage: str, instance: str | None, lineage: Lineage, params: Params) -> str | None:
    """Return the first thing that a stage would read otherwise today; None if there is none."""
    reads = reads_of(stage, instance, params)
    present = values_read(reads, params)
    names = tuple(f"{name}." for name in reads.params)
    recorded = {}
    for key, value in lineage.params.items():
        if key in reads.params or key.startswith(names):
            recorded[key] = value
    for key in sorted(present.keys() | recorded.keys()):
        before: Any = recorded.get(key, ABSENT)
        now: Any = present.get(key, ABSENT)
        if before != now:
            return f"{key} was {before} and is {now}"
    for path in _files_of(stage, reads.files, present, lineage):
        expected = lineage.files.get(path)
        found = _hash_of(path)
        if found != expected:
            if found is None:
                return f"{path} is gone"
            changed = "has other files now" if path.endswith("/") else "has changed since"
            return f"{path} {changed}"
    for artifact in reads.artifacts:
        found = artifact_id(artifact)
        if found is not None and found != lineage.artifacts.get(artifact):
            return f"{artifact} was made again since"
    return None


def _hash_of(path: str) -> str | None:
    """Return the hash of a user's file, or of the names in a folder; None if it is not there."""
    if path.endswith("/"):
        return listing_sha256(Path(path)) if Path(path).is_dir() else None
    return known_sha256(Path(path)) if Path(path).is_file() else None


def _files_of(
    stage: str, keys: tuple[str, ...], values: dict[str, Any], lineage: Lineage
) -> list[str]:
    """Return the files of the user's that a stage read; of a model, those that load found.

    A model whose whole folder is not here, as with a colleague's, is judged by what was made of it.
    """
    if stage != next(iter(READS)):
        return [values[key] for key in keys if values.get(key)]
    folders = [values.get("model.path"), values.get("model.adapter")]
    below = tuple(f"{folder}/" for folder in folders if folder and Path(folder).exists())
    return [path for path in sorted(lineage.files) if below and path.startswith(below)]
