"""The figures of a bundle, measured against the unquantized model."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quantline.config.texts import Limits, Speed, Text
from quantline.folders import atomic_folder

if TYPE_CHECKING:
    from quantline.calibration.store import CalibrationStore
    from quantline.metrics.results import Results
    from quantline.model.checkpoint import Checkpoint

SPEED = Speed(prompt_tokens=128, new_tokens=32, repetitions=5)


def make_reference(
    model: "Checkpoint",
    calibration: "CalibrationStore",
    calibrated_on: Text,
    text: Text,
    folder: Path | str,
    *,
    gold: Path | str | None = None,
    allow_overlap: bool | Sequence[str] = False,
) -> Path:
    """Run the unquantized model on an evaluation text: what bundles are measured by.

    Args:
        model: From `load_checkpoint`.
        calibration: From `calibrate`.
        calibrated_on: The text that `calibrate` was given; it must share no document with `text`.
        text: The evaluation text, from `text_file`.
        folder: Where to put the reference.
        gold: A file of questions, as JSON lines.
        allow_overlap: Ids of gold items and documents that may stand in the other texts too, as the
            error names them; True for all.

    Returns:
        The folder.

    Raises:
        StageError: texts_overlap, dataset_invalid, artifact_changed, non_finite.
    """
    from quantline.metrics import reference

    target = Path(folder)
    questions = Path(gold) if gold else None
    with atomic_folder(target) as new:
        reference.make_reference(
            model.folder, calibration.folder, calibrated_on, text, questions, new, allow_overlap
        )
    return target


def measure(
    bundle: Path | str,
    reference: Path | str,
    folder: Path | str,
    *,
    speed: Speed = SPEED,
    limits: Limits | None = None,
) -> "Results":
    """Measure a bundle from its files, in a fresh process, in its runtime.

    Args:
        bundle: From `export`.
        reference: From `make_reference`.
        folder: Where to put the figures of all bundles.
        speed: How speed is measured.
        limits: Of time and memory.

    Raises:
        StageError: artifact_changed, if the bundle is not what its manifest says;
            runtime_unavailable, runtime_crashed, timed_out, out_of_memory, non_finite.
    """
    from quantline.formats.bundle.manifest import check_bundle
    from quantline.metrics.measuring_process import Measuring, measure_in_child
    from quantline.metrics.results import ResultFiles, write_results

    path = Path(bundle)
    manifest = check_bundle(path)
    runtime = manifest["runtime"]
    measuring = Measuring(path, runtime, Path(reference), limits or Limits())
    measured = measure_in_child(measuring, speed)
    return write_results(ResultFiles.of(Path(folder), path.name), manifest, runtime, measured)
