"""DVC as the commands call it: what it refuses becomes a run event."""

import json
from pathlib import Path

from quantline.cli.program import run_module
from quantline.errors import REASON_OF_STAGE, Failure, Reason
from quantline.run.project_lock import FOLDER
from quantline.run.stage import StageRun

PROGRAM = "quantline.run.dvc_program"
REFUSALS = FOLDER / "refusals.json"
ADVICE = "mend that, and run `quantline repro`"


def run_dvc(*arguments: str) -> tuple[int, list[str]]:
    """Run a command of DVC in the project of the working folder.

    Returns:
        Its exit code, and a sentence for everything that DVC refused. What a stage reports of
        itself is none of that.
    """
    REFUSALS.unlink(missing_ok=True)
    code = run_module(PROGRAM, str(REFUSALS), *arguments)
    return code, refusals_of(REFUSALS, code)


def refusals_of(path: Path, code: int) -> list[str]:
    """Return a sentence for everything that a call of DVC has refused, each with a run event.

    Args:
        path: Where it has written that.
        code: Its exit code.
    """
    sentences = []
    for name, said in _read(path, code):
        stage, _, instance = (name or "").partition("@")
        known = stage in REASON_OF_STAGE
        run = StageRun(stage if known else "repro", instance or None if known else None)
        sentence = f"DVC did not run {name or 'the pipeline'}: {said}; {ADVICE}"
        run.fail(Failure.PIPELINE_REFUSED, sentence, Reason.PIPELINE_REFUSED)
        sentences.append(sentence)
    return sentences


def _read(path: Path, code: int) -> list[tuple[str | None, str]]:
    """Return what DVC refused: the stage, if it is one of one stage, and what DVC said."""
    try:
        return [(name, str(said)) for name, said in json.loads(path.read_text(encoding="utf-8"))]
    except (FileNotFoundError, ValueError):
        return [(None, f"it ended with exit code {code}")] if code else []
