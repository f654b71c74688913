"""The unquantized model's answers to the smoke prompts, as the stage `answer` stored them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantline.errors import Failure, Reason, StageError
from quantline.files import check_made, read_json

if TYPE_CHECKING:
    from quantline.text.tokenizer import Tokenizer

FILE = "answers.json"


def read_answers(folder: Path) -> list[dict[str, Any]]:
    """Return what the stage stored of each prompt (quantline/metrics/source_answers.py).

    Raises:
        StageError: missing_file (reason export_artifact_missing).
    """
    path = folder / FILE
    check_made(path, "answer", Reason.EXPORT_ARTIFACT_MISSING, "the unquantized model's answers")
    return read_json(path)["prompts"]


def prompt_ids(tokenizer: "Tokenizer", prompt: str) -> list[int]:
    """Return the tokens of a smoke prompt.

    Raises:
        StageError: config_invalid, if there are none.
    """
    ids = tokenizer.prompt(prompt)
    if not ids:
        raise StageError(
            Failure.CONFIG_INVALID,
            f"expected evaluation.smoke_prompts that the tokenizer makes tokens of, found "
            f"{prompt!r}, of which it makes none; give some text",
        )
    return ids
