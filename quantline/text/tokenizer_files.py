"""The small files that a tokenizer is made of, and what none of them may say."""

from pathlib import Path
from typing import Any

from quantline.errors import Failure, StageError
from quantline.files import read_json
from quantline.text.special_tokens import template_files

CONFIG = "tokenizer_config.json"
MAP = "special_tokens_map.json"
ADDED = "added_tokens.json"
GENERATION = "generation_config.json"
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def check_files(folder: Path) -> None:
    """Refuse what transformers would take in silence, or refuse without the file's name.

    Raises:
        StageError: tokenizer_mismatch; missing_file, for a file that holds no JSON object.
    """
    for name in (CONFIG, MAP, ADDED, GENERATION, "config.json", *template_files(folder)):
        _check_file(folder / name)
    _check_file(folder / "chat_template.jinja")
    source = GENERATION if (folder / GENERATION).is_file() else "config.json"
    if (folder / source).is_file():
        check_ids(folder / source, read_json(folder / source).get("eos_token_id"))


def _check_file(path: Path) -> None:
    """Check that a file, if it is there, is text in UTF-8, and an object if it is JSON."""
    if not path.is_file():
        return
    try:
        if path.suffix == ".json":
            read_json(path)
        else:
            path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, RecursionError) as error:
        raise StageError(
            Failure.TOKENIZER_MISMATCH,
            f"expected text in UTF-8 in {path}, not nested without end, found: {error}; fetch it "
            "again",
        ) from None


def check_named_tokens(folder: Path) -> None:
    """Name the key that transformers refuses, if it is one of a special token.

    Raises:
        StageError: tokenizer_mismatch.
    """
    for name in (CONFIG, MAP):
        stored = read_json(folder / name) if (folder / name).is_file() else {}
        for key in NAMED:
            value = stored.get(key)
            if isinstance(value, dict):
                described = isinstance(value.get("content"), str)
                # In the map, transformers knows without being told.
                if described and (name == MAP or value.get("__type") == "AddedToken"):
                    continue
            elif value is None or isinstance(value, str):
                continue
            raise wrong_key(
                folder / name, key, "a text, null, or an AddedToken with its __type", value
            )


def check_ids(path: Path, value: Any) -> None:
    """Refuse ends of a text that are no ids. Raises StageError: tokenizer_mismatch."""
    ids = value if isinstance(value, list) else [value]
    for one in ids:
        if one is not None and (isinstance(one, bool) or not isinstance(one, int)):
            raise wrong_key(path, "eos_token_id", "a token's id, or a list of them", value)


def wrong_key(path: Path, key: str, expected: str, found: Any) -> StageError:
    """Return the error for a key of a file that does not say what it should."""
    return StageError(
        Failure.TOKENIZER_MISMATCH,
        f"expected {expected} for {key} in {path}, found {found!r:.80}; mend the file, or fetch "
        "it again",
    )
