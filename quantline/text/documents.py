"""Documents from a file or a Hub dataset."""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from quantline.causes import raise_if_of_machine
from quantline.config.texts import COLUMN, MESSAGES, Text
from quantline.errors import Failure, StageError
from quantline.text.text_file import (
    flaw_of,
    json_lines,
    parse_line,
    read_json_lines,
    read_text_file,
)

Document = str | list[dict[str, str]]  # plain text, or chat messages
AnyText = TypeVar("AnyText", bound=Text)
JSON_LINES = (".jsonl", ".ndjson", ".json")
TABLES = (".csv", ".tsv", ".parquet", ".arrow", ".feather", ".xlsx")
TAKEN = "a .txt file, a .jsonl file, or a dataset on the Hub"
# Characters of a document: longer ones are cut, so that no tokenizer gets 50 MB at once.
LONGEST = 1 << 20
LOOKED_AT = 20  # lines of a file of plain text, for what else it could be
PIECE = 2048  # of a text that is one document and has one line


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
        raise_if_of_machine(error)
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
    documents = _from_hub(text) if text.source == "hub" else _from_file(text)
    documents = _divide(documents)
    first, last = (round(share * len(documents)) for share in text.part)
    if not documents[first:last]:
        raise StageError(
            Failure.DATASET_INVALID,
            f"expected documents in {text.path or text.dataset}, found {len(documents)} and none "
            f"in the part {text.part}; blank lines part the documents of a .txt file, and each "
            "line of a .jsonl file is one: give more text, or a larger part",
        )
    return documents[first:last]


def _from_file(text: Text) -> list[Document]:
    path = Path(text.path or "")
    suffix = path.suffix.lower()
    if suffix in TABLES:
        raise StageError(
            Failure.DATASET_INVALID,
            f"expected {TAKEN}, found {path}; write the column with the text as JSON lines: "
            f'{{"{text.column}": "…"}}',
        )
    if suffix not in JSON_LINES:
        return list(_paragraphs(read_text_file(path)))
    documents: list[Document] = []

    def read(number: int, row: Any) -> None:
        document = _document_of(row, text.column)
        if plain_text(document).strip():  # of empty ones only what parts documents would be left
            documents.append(document)

    read_json_lines(
        path,
        read,
        f'{{"{text.column}": "…"}} or {{"messages": [{{"role": "…", "content": "…"}}, …]}}',
    )
    return documents


def misnamed(text: Text) -> str | None:
    """Say that a file of plain text holds JSON lines, which would be read with their brackets."""
    path = Path(text.path or "")
    if text.source == "hub" or path.suffix.lower() in JSON_LINES:
        return None
    lines = [line for _, line in islice(json_lines(read_text_file(path)), LOOKED_AT)]
    try:
        objects = bool(lines) and all(isinstance(parse_line(line), dict) for line in lines)
    except ValueError:
        return None
    if not objects:
        return None
    return (
        f"{path} is read as plain text, and each of its lines is a JSON object: if the texts in "
        f"them are meant, call it {path.stem}.jsonl"
    )


def _paragraphs(content: str) -> Iterator[str]:
    """Yield what blank lines part; a line of white space alone is blank."""
    lines: list[str] = []
    for line in content.split("\n"):
        if line and not line.isspace():
            lines.append(line)
        elif lines:
            yield "\n".join(lines).strip()
            lines = []
    if lines:
        yield "\n".join(lines).strip()


def _divide(documents: list[Document]) -> list[Document]:
    """Part a text that is one document by its lines, else at white space; cut giant documents.

    One document could not be parted into one half for the calibration and one for the evaluation.
    """
    if len(documents) == 1 and isinstance(documents[0], str):
        whole = documents[0]
        paragraphs: list[Document] = list(_paragraphs(whole))
        lines: list[Document] = [line.strip() for line in whole.split("\n") if line.strip()]
        pieces: list[Document] = list(cut_text(whole, PIECE))
        for divided in (paragraphs, lines, pieces):
            if len(divided) > 1:
                documents = divided
                break
    cut: list[Document] = []
    for document in documents:
        if isinstance(document, str) and len(document) > LONGEST:
            cut += cut_text(document, LONGEST)
        else:
            cut.append(document)
    return cut


def cut_text(text: str, longest: int) -> Iterator[str]:
    """Cut a text into pieces, each as long as it can be.

    Args:
        text: The text.
        longest: Characters of a piece at most. It ends at the last blank line among them, else at
            the last line end, else at the last space, else there.
    """
    start = 0
    while len(text) - start > longest:
        half = start + longest // 2  # a piece that ends before is too short
        for separator in ("\n\n", "\n", " "):
            end = text.rfind(separator, half, start + longest)
            if end >= half:
                break
        else:
            end = start + longest
        if piece := text[start:end].strip():
            yield piece
        start = end
    if rest := text[start:].strip():
        yield rest


def _document_of(row: Any, column: str) -> Document:
    """Return the document of a line. Raises ValueError for a line without one."""
    if not isinstance(row, dict):
        raise ValueError(f"{type(row).__name__} in place of an object")
    name = _column_among(row, column)
    if name not in row:
        names = ", ".join(sorted(row)[:10]) or "none"
        raise ValueError(f"no {column!r} among its keys ({names}); the option `column` names it")
    return _check_document(row[name])


def _column_among(names: Iterable[str], column: str) -> str:
    """Return the column to read: chats, where there are any, unless another one is asked for."""
    return MESSAGES if column == COLUMN and MESSAGES in names else column


def _check_document(value: object) -> Document:
    """Return a document. Raises ValueError for what is neither text nor messages with texts."""
    if isinstance(value, str):
        if flaw := flaw_of(value):
            raise ValueError(flaw)
        return value
    if not isinstance(value, list) or not value:
        raise ValueError(f"{type(value).__name__} for a document")
    for message in value:
        texts = (message.get("role"), message.get("content")) if isinstance(message, dict) else ()
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError("a message whose role and content are not both texts")
        for text in texts:
            if flaw := flaw_of(str(text)):
                raise ValueError(flaw)
    return value


def _from_hub(text: Text) -> list[Document]:
    from datasets import load_dataset

    try:
        rows = load_dataset(
            text.dataset, text.dataset_config, split=text.split, revision=text.dataset_revision
        )
    except Exception as error:  # the library raises a dozen kinds; all mean that there is no text
        raise_if_of_machine(error)
        raise _unreachable(text, error) from error
    column = _column_among(rows.column_names, text.column)
    if column not in rows.column_names:
        raise StageError(
            Failure.DATASET_INVALID,
            f"{text.dataset} has the columns {', '.join(rows.column_names)}, not {column!r}; set "
            "column",
        )
    documents = []
    for number, row in enumerate(rows[column], 1):
        if not row or (isinstance(row, str) and not row.strip()):
            continue
        try:
            documents.append(_check_document(row))
        except ValueError as error:
            raise StageError(
                Failure.DATASET_INVALID,
                f"expected text or chat messages in the column {column} of {text.dataset}, found "
                f"in row {number}: {error}; set another column, or write the text to a file and "
                "mend it there",
            ) from None
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
