"""Let the unquantized model answer the smoke prompts: what the answers of bundles are held against.

python -m stages.answer     # artifacts/model, evaluation.smoke_prompts → artifacts/answers/
"""

from quantline.metrics.source_answers import write_answers
from quantline.model.checkpoint import Checkpoint
from quantline.paths import ANSWERS, MODEL
from quantline.run.stage import StageRun, stage_run


def answer(run: StageRun) -> None:
    """Run the stage."""
    evaluation = run.params.evaluation
    with run.output(ANSWERS) as folder:
        answers = write_answers(
            Checkpoint(MODEL), evaluation.smoke_prompts, evaluation.smoke_tokens, folder
        )
        run.inputs.record(folder)
    run.set_summary("; ".join(f"{one['prompt']!r} → {one['output']!r}" for one in answers))


if __name__ == "__main__":
    with stage_run("answer") as run:
        answer(run)
