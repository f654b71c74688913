"""Run the unquantized model on the evaluation text and the gold set: what variants are measured by.

python -m stages.reference     # artifacts/model, evaluation section → artifacts/reference/
"""

from pathlib import Path

from quantline.files import MIB, sha256_json
from quantline.metrics.reference import make_reference
from quantline.paths import CALIBRATION, MODEL, REFERENCE
from quantline.run.stage import StageRun, stage_run
from quantline.tracking.run_content import evaluation_datasets

HIDDEN = REFERENCE / "hidden.safetensors"


def reference(run: StageRun) -> None:
    """Run the stage."""
    calibration = run.params.calibration
    evaluation = run.params.evaluation
    gold = Path(evaluation.gold) if evaluation.gold else None
    with run.output(REFERENCE) as folder:
        info = make_reference(
            MODEL, CALIBRATION, calibration, evaluation, gold, folder, evaluation.allow_overlap
        )
        run.inputs.record(folder)
    run.track(
        key=f"reference:{sha256_json(info)}",
        name="reference",
        params={key: info[key] for key in ("text_sha256", "gold_sha256")},
        metrics={
            "perplexity": info["perplexity"],
            "tokens": info["tokens"],
            "gold": info["gold_accuracy"],
        },
        files=[REFERENCE / "reference.json"],
        datasets=evaluation_datasets(evaluation, info),
    )
    answers = "no gold set"
    if info["gold_items"]:
        accuracy = info["gold_accuracy"]["all"]
        answers = f"gold accuracy {accuracy:.3f} on {info['gold_items']} items"
    run.set_summary(
        f"perplexity {info['perplexity']:.3f} on {info['tokens']} tokens, {answers}, "
        f"{HIDDEN.stat().st_size / MIB:.1f} MiB"
    )


if __name__ == "__main__":
    with stage_run("reference") as run:
        reference(run)
