"""Documents from a file or a Hub dataset, and the check that texts share none."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from quantline.config.params import Text
from quantline.errors import Failure, StageError

Document = str | list[dict[str, str]]  # plain text, or chat messages
SHARED_LENGTH = 100  # characters: a shorter paragraph can well stand in two texts by chance
PROMPT_LENGTH = 20


def pinned(text: Text) -> Text:
    """The same text; a Hub dataset's revision becomes the commit that it is now, so that it can be recorded."""
    if text.source != "hub":
        return text
    from huggingface_hub import HfApi, constants, errors

    if constants.HF_HUB_OFFLINE:
        return text
    try:
        commit = HfApi().dataset_info(text.dataset, revision=text.dataset_revision).sha
    except (errors.HTTPError, OSError) as error:
        raise StageError(Failure.NETWORK_UNAVAILABLE, f"cannot get the dataset {text.dataset}: {error}") from error
    return text.model_copy(update={"dataset_revision": commit})


def documents(text: Text) -> list[Document]:
    """The documents of a text, or the part of them that it asks for.

    Raises StageError(dataset_invalid) for a file that is absent, empty or malformed (with the line's number).
    """
    found = _from_hub(text) if text.source == "hub" else _from_file(Path(text.path))
    start, end = (round(share * len(found)) for share in text.part)
    if not found[start:end]:
        raise StageError(Failure.DATASET_INVALID, f"expected documents in {text.path or text.dataset}, found "
                                                  f"{len(found)} and none in the part {text.part}")
    return found[start:end]


def _from_file(path: Path) -> list[Document]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StageError(Failure.DATASET_INVALID, f"expected UTF-8 text in {path}: {error}") from error
    if path.suffix != ".jsonl":
        return [part.strip() for part in content.replace("\r\n", "\n").split("\n\n") if part.strip()]
    found: list[Document] = []
    for number, line in enumerate(content.rstrip("\n").split("\n"), 1):
        try:
            row = json.loads(line)
            found.append(_document(row["messages"] if "messages" in row else row["text"]))
        except (ValueError, KeyError, TypeError) as error:
            raise StageError(Failure.DATASET_INVALID, f'{path} line {number}: expected {{"text": "…"}} or {{"messages": '
                                                      f'[{{"role": "…", "content": "…"}}, …]}}, found: {error}') from None
    return found


def _document(value: object) -> Document:
    """A document as it is. Raises TypeError for what is neither text nor messages with texts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise TypeError(f"{type(value).__name__} for a document")
    for turn in value:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), str):
            raise TypeError("a message without role and content")
    return value


def _from_hub(text: Text) -> list[Document]:
    from datasets import load_dataset

    try:
        rows = load_dataset(text.dataset, text.dataset_config, split=text.split, revision=text.dataset_revision)
    except Exception as error:  # the library raises a dozen kinds; all of them mean that there is no text
        raise StageError(Failure.NETWORK_UNAVAILABLE, f"cannot get the dataset {text.dataset}: {error}") from error
    column = "messages" if "messages" in rows.column_names else text.column
    if column not in rows.column_names:
        raise StageError(Failure.DATASET_INVALID, f"{text.dataset} has the columns {', '.join(rows.column_names)}, "
                                                  f"not {column!r}; set column")
    return [_document(row) for row in rows[column] if row and (not isinstance(row, str) or row.strip())]


def plain(document: Document) -> str:
    """A document's text; the turns of a chat one after another."""
    return document if isinstance(document, str) else "\n".join(turn["content"] for turn in document)


def sha256_documents(found: Iterable[Document]) -> str:
    """sha256 over the documents in order."""
    return hashlib.sha256("\0".join(plain(document) for document in found).encode()).hexdigest()


def check_disjoint(calibration: list[Document], evaluation: list[Document], prompts: dict[str, str]) -> None:
    """Raise StageError(texts_overlap) if the texts share a document, or a gold prompt stands in one of them.

    Only documents of at least 100 characters and prompts ({id: prompt}) of at least 20 count.
    """
    ours, theirs = [plain(one) for one in calibration], [plain(one) for one in evaluation]
    shared = sorted({text for text in ours if len(text) >= SHARED_LENGTH} & set(theirs))
    if shared:
        raise StageError(Failure.TEXTS_OVERLAP,
                         f"expected calibration and evaluation texts to share no document, found {len(shared)} in both, "
                         f"such as {shared[0][:80]!r}; choose other files or other parts of the file")
    for name, text in (("calibration", "\n\n".join(ours)), ("evaluation", "\n\n".join(theirs))):
        for item, prompt in prompts.items():
            if len(prompt) >= PROMPT_LENGTH and prompt in text:
                raise StageError(Failure.TEXTS_OVERLAP, f"the prompt of gold item {item} stands in the {name} text; "
                                                        "take it out of one of them")
