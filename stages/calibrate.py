"""Run the unquantized model once over the calibration text and keep what every method needs.

python -m stages.calibrate     # artifacts/model, calibration section → artifacts/calibration/
"""

from quantline.calibration.calibrate import CalibrationRun
from quantline.files import folder_bytes, sha256_json
from quantline.model.checkpoint import Checkpoint
from quantline.paths import CALIBRATION, MODEL
from quantline.run.code_digest import code_digest
from quantline.run.stage import StageRun, stage_run

LOGGED = ("text", "text_sha256", "dataset_revision", "sequences", "length")


def calibrate(run: StageRun) -> None:
    """Run the stage."""
    checkpoint = Checkpoint(MODEL)
    calibration = CalibrationRun(checkpoint, run.params.calibration, run.params.seed)
    key = calibration.inputs_key() | {"code": code_digest("calibrate")}
    with run.resumable_output(CALIBRATION, key) as folder:
        info = calibration.collect(folder, run.params.executor)
        run.inputs.record(folder)
    run.track(
        key=f"calibration:{sha256_json(info)}:{sha256_json(checkpoint.config)}",
        name="calibration",
        params={key: info[key] for key in LOGGED},
        metrics={"tokens": info["tokens"], "layers": len(info["layers"])},
        files=[CALIBRATION / "calibration.json"],
    )
    run.set_summary(calibration.summary(info, folder_bytes(CALIBRATION)))


if __name__ == "__main__":
    with stage_run("calibrate") as run:
        calibrate(run)
