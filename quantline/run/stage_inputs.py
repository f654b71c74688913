"""What each stage reads, hashed when it starts and looked at again before it ends.

dvc.yaml says the same to DVC; a test compares the two.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from quantline.config.compose import load_params
from quantline.config.params import Params
from quantline.config.stale import flatten
from quantline.errors import Failure, StageError, StaleError
from quantline.files import known_sha256
from quantline.paths import METRICS
from quantline.run.lineage import (
    LINEAGE,
    Lineage,
    artifact_id,
    check_contents,
    lineage_file,
    read_lineage,
    write_lineage,
)


class Reads(NamedTuple):
    """What a stage reads; {recipe} and {variant} stand for names.

    Attributes:
        params: Keys of params.yaml.
        files: Those keys that hold the path of a file.
        artifacts: Names of artifacts, as `artifact_folder` takes them.
    """

    params: tuple[str, ...]
    files: tuple[str, ...] = ()
    artifacts: tuple[str, ...] = ()


# In the order in which they run.
READS = {
    "load": Reads(("model",)),
    "answer": Reads(("evaluation.smoke_prompts", "evaluation.smoke_tokens"), artifacts=("model",)),
    "calibrate": Reads(("calibration", "seed"), ("calibration.path",), ("model",)),
    "reference": Reads(
        (
            "calibration",
            "evaluation.source",
            "evaluation.path",
            "evaluation.dataset",
            "evaluation.dataset_config",
            "evaluation.split",
            "evaluation.column",
            "evaluation.dataset_revision",
            "evaluation.part",
            "evaluation.sequences",
            "evaluation.length",
            "evaluation.gold",
            "evaluation.allow_overlap",
        ),
        ("calibration.path", "evaluation.path", "evaluation.gold"),
        ("model", "calibration"),
    ),
    "quantize": Reads(
        ("recipes.{recipe}",), ("recipes.{recipe}.importance_file",), ("model", "calibration")
    ),
    "export": Reads(
        (
            "variants.{variant}",
            "evaluation.pythons",
            "evaluation.smoke_prompts",
            "evaluation.smoke_tokens",
        ),
        artifacts=("model", "answers", "quantized/{recipe}"),
    ),
    "evaluate": Reads(
        ("variants.{variant}", "evaluation.pythons", "evaluation.speed"),
        artifacts=("exports/{variant}", "reference"),
    ),
}
# What DVC watches in place of a text or a model; the path itself is a parameter too.
WATCHED = ("model.watch", "model.adapter_watch", "calibration.watch")
# Stage → the files that its lineage hashes; all of them where it is not named. A bundle's manifest
# has the hashes of the others.
HASHED: dict[str, tuple[str, ...]] = {"export": ("README.md", "manifest.json", "smoke.json")}


def reads_of(stage: str, instance: str | None, params: Params) -> Reads:
    """Return what a stage reads, with the names of its recipe or variant."""
    names = {"recipe": instance, "variant": instance}
    if stage != "quantize" and instance in params.variants:
        names["recipe"] = params.variants[instance].recipe
    return Reads(*(tuple(key.format(**names) for key in keys) for keys in READS[stage]))


def values_read(reads: Reads, params: Params) -> dict[str, Any]:
    """Return the parameters that a stage reads, by dotted key."""
    values = {}
    for key, value in flatten(params.model_dump(mode="json")).items():
        is_read = any(key == name or key.startswith(f"{name}.") for name in reads.params)
        if is_read and key not in WATCHED:
            values[key] = value
    return values


def hash_files(reads: Reads, params: Params) -> dict[str, str]:
    """Return path → sha256 of the user's files that a stage reads, so far as they exist."""
    values = flatten(params.model_dump(mode="json"))
    files = {}
    for key in reads.files:
        path = values.get(key)
        if path and Path(path).is_file():
            files[path] = known_sha256(Path(path))
    return files


class StageInputs:
    """What one run of a stage reads."""

    def __init__(self, stage: str, instance: str | None, params: Params) -> None:
        """Hash everything, and check the artifacts against what their stages wrote.

        The model's weights are left to the comparison: twenty recipes would read them twenty times.

        Raises:
            StageError: artifact_changed.
        """
        self.stage = stage
        self.instance = instance
        self.reads = reads_of(stage, instance, params)
        self.values = values_read(self.reads, params)
        self.files = hash_files(self.reads, params)
        self.artifacts = {artifact: artifact_id(artifact) for artifact in self.reads.artifacts}
        for artifact in self.reads.artifacts:
            check_contents(artifact, thorough=False)

    def record(self, folder: Path, files: Mapping[str, str] | None = None) -> None:
        """Write the lineage of the artifact that the stage has made.

        Args:
            folder: The artifact, before it takes its name.
            files: Path → sha256 of files of the user's that the stage found by itself.

        Raises:
            StageError: artifact_changed, as `made_from` does.
            StaleError: As `made_from` does.
        """
        names = HASHED.get(self.stage)
        if names is None:
            paths = (path for path in folder.rglob("*") if path.is_file())
            found = {path.relative_to(folder).as_posix() for path in paths}
            names = tuple(sorted(found - {LINEAGE}))
        write_lineage(folder, folder / LINEAGE, self.made_from(files or {}), names)

    def record_figures(self, paths: Iterable[Path]) -> None:
        """Write the lineage of figures, which lie in metrics/; raises as `record` does."""
        names = [path.relative_to(METRICS).as_posix() for path in paths]
        path = lineage_file(f"{METRICS.name}/{self.instance}")
        write_lineage(METRICS, path, self.made_from({}), names)

    def made_from(self, files: Mapping[str, str]) -> Lineage:
        """Return what led to the stage's artifact.

        Args:
            files: Path → sha256 of files of the user's that the stage found by itself.

        Raises:
            StageError: artifact_changed, if what the stage read is another by now, or if two
                artifacts that it read were made from different things.
            StaleError: If params.yaml is another by now.
        """
        if values_read(self.reads, load_params()) != self.values:
            raise StaleError(
                f"expected params.yaml to stay as it was while {self.stage} ran, found that it "
                "changed; run `quantline repro` again, and nothing else meanwhile"
            )
        for artifact, before in self.artifacts.items():
            if artifact_id(artifact) != before:
                raise _changed_meanwhile(artifact)
        for path, before in self.files.items():
            if not Path(path).is_file() or known_sha256(Path(path)) != before:
                raise _changed_meanwhile(path)
        made_from = Lineage(self.values, self.files | dict(files), dict(self.artifacts))
        for artifact in self.artifacts:
            upstream = read_lineage(artifact)
            if upstream is not None:
                made_from = made_from.joined(upstream, artifact)
        return made_from


def _changed_meanwhile(name: str) -> StageError:
    return StageError(
        Failure.ARTIFACT_CHANGED,
        f"expected {name} to stay as it was while the stage ran, found that it changed; run "
        "`quantline repro` again, and nothing else meanwhile",
    )
