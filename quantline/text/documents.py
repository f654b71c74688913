"""Documents from a file or a Hub dataset, and the check that texts share none."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from quantline.config.texts import Text
from quantline.errors import Failure, StageError

Document = str | list[dict[str, str]]  # plain text, or chat messages
AnyText = TypeVar("AnyText", bound=Text)
# Characters: a shorter paragraph or prompt can well stand in two texts by chance.
SHARED_DOCUMENT = 100
SHARED_PROMPT = 20


def pin_revision(text: AnyText) -> AnyText:
    """Return the text with a Hub dataset's revision replaced by the commit that it is now.

    Raises:
        StageError: network_unavailable.
    """
    if text.source != "hub":
        return text
    from huggingface_hub import HfApi, constants, errors

    if constants.HF_HUB_OFFLINE:
        return text
    try:
        info = HfApi().dataset_info(text.dataset or "", revision=text.dataset_revision)
    except (errors.HTTPError, OSError) as error:
        raise _unreachable(text, error) from error
    return text.model_copy(update={"dataset_revision": info.sha})


def _unreachable(text: Text, error: Exception) -> StageError:
    return StageError(
        Failure.NETWORK_UNAVAILABLE,
        f"cannot get the dataset {text.dataset}: {error}; try again, or take a text from a file",
    )


def read_documents(text: Text) -> list[Document]:
    """Return the part of a text's documents that it asks for.

    Raises:
        StageError: dataset_invalid, for a file that is absent, empty or malformed (with the line's
            number); network_unavailable.
    """
    documents = _from_hub(text) if text.source == "hub" else _from_file(Path(text.path or ""))
    first, last = (round(share * len(documents)) for share in text.part)
    if not documents[first:last]:
        raise StageError(
            Failure.DATASET_INVALID,
            f"expected documents in {text.path or text.dataset}, found {len(documents)} and none "
            f"in the part {text.part}; give more text, or a larger part",
        )
    return documents[first:last]


def _from_file(path: Path) -> list[Document]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StageError(
            Failure.DATASET_INVALID,
            f"expected UTF-8 text in {path}: {error}; give the path of such a file",
        ) from error
    if path.suffix != ".jsonl":
        paragraphs = content.replace("\r\n", "\n").split("\n\n")
        return [paragraph.strip() for paragraph in paragraphs if paragraph.strip()]
    documents: list[Document] = []
    for number, line in enumerate(content.rstrip("\n").split("\n"), 1):
        try:
            row = json.loads(line)
            value = row["messages"] if "messages" in row else row["text"]
            documents.append(_check_document(value))
        except (ValueError, KeyError, TypeError) as error:
            raise StageError(
                Failure.DATASET_INVALID,
                f'{path} line {number}: expected {{"text": "…"}} or {{"messages": '
                f'[{{"role": "…", "content": "…"}}, …]}}, found: {error}; mend the line',
            ) from None
    return documents


def _check_document(value: object) -> Document:
    """Return a document. Raises TypeError for what is neither text nor messages with texts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise TypeError(f"{type(value).__name__} for a document")
    for message in value:
        texts = (message.get("role"), message.get("content")) if isinstance(message, dict) else ()
        if not texts or not all(isinstance(text, str) for text in texts):
            raise TypeError("a message without role and content")
    return value


def _from_hub(text: Text) -> list[Document]:
    from datasets import load_dataset

    try:
        rows = load_dataset(
            text.dataset, text.dataset_config, split=text.split, revision=text.dataset_revision
        )
    except Exception as error:  # the library raises a dozen kinds; all mean that there is no text
        raise _unreachable(text, error) from error
    column = "messages" if "messages" in rows.column_names else text.column
    if column not in rows.column_names:
        raise StageError(
            Failure.DATASET_INVALID,
            f"{text.dataset} has the columns {', '.join(rows.column_names)}, not {column!r}; set "
            "column",
        )
    documents = []
    for row in rows[column]:
        if row and (not isinstance(row, str) or row.strip()):
            documents.append(_check_document(row))
    return documents


def plain_text(document: Document) -> str:
    """Return a document's text; of a chat, its messages one after another."""
    if isinstance(document, str):
        return document
    return "\n".join(message["content"] for message in document)


def sha256_documents(documents: Iterable[Document]) -> str:
    """Return the sha256 over the documents in order."""
    text = "\0".join(plain_text(document) for document in documents)
    return hashlib.sha256(text.encode()).hexdigest()


def check_disjoint(
    calibration: list[Document], evaluation: list[Document], prompts: dict[str, str]
) -> None:
    """Check that the texts share no document, and that no gold prompt stands in one of them.

    Only documents of at least SHARED_DOCUMENT characters and prompts of at least SHARED_PROMPT
    count.

    Args:
        calibration: Documents that were calibrated on.
        evaluation: Documents to evaluate on.
        prompts: Id of a gold item → its prompt.

    Raises:
        StageError: texts_overlap.
    """
    calibration_texts = [plain_text(document) for document in calibration]
    evaluation_texts = [plain_text(document) for document in evaluation]
    long = {text for text in calibration_texts if len(text) >= SHARED_DOCUMENT}
    shared = sorted(long & set(evaluation_texts))
    if shared:
        raise StageError(
            Failure.TEXTS_OVERLAP,
            "expected calibration and evaluation texts to share no document, found "
            f"{len(shared)} in both, such as {shared[0][:80]!r}; choose other files or other "
            "parts of the file",
        )
    texts = {
        "calibration": "\n\n".join(calibration_texts),
        "evaluation": "\n\n".join(evaluation_texts),
    }
    for name, text in texts.items():
        for item, prompt in prompts.items():
            if len(prompt) >= SHARED_PROMPT and prompt in text:
                raise StageError(
                    Failure.TEXTS_OVERLAP,
                    f"the prompt of gold item {item} stands in the {name} text; take it out of "
                    "one of them",
                )
