"""The unquantized model's answers to the smoke prompts, as the stage `answer` stored them."""

from pathlib import Path
from typing import Any

from quantline.errors import Failure, Reason, StageError
from quantline.files import read_json

FILE = "answers.json"


def read_answers(folder: Path) -> list[dict[str, Any]]:
    """Return what the stage stored of each prompt (quantline/metrics/source_answers.py).

    Raises:
        StageError: missing_file (reason export_artifact_missing).
    """
    path = folder / FILE
    if not path.is_file():
        raise StageError(
            Failure.MISSING_FILE,
            f"expected the unquantized model's answers in {path}, found nothing; run "
            "`dvc repro answer`",
            Reason.EXPORT_ARTIFACT_MISSING,
        )
    return read_json(path)["prompts"]
