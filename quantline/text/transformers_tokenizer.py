"""What transformers makes of a folder's tokenizer. Importing this file does not import it.

transformers 5 builds the tokenizers of some classes anew from vocabulary and merges, so that
tokenizer.json alone does not say which ids a text has. What it serves with is what counts here.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from quantline.causes import raise_if_of_machine
from quantline.errors import Failure, StageError
from quantline.files import read_json
from quantline.text.special_tokens import DEFAULT, SpecialTokens
from quantline.text.tokenizer_files import (
    CONFIG,
    GENERATION,
    MAP,
    check_files,
    check_ids,
    check_named_tokens,
    wrong_key,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer
    from transformers import PreTrainedTokenizerBase

SAMPLES = ("a", "0", "é", "the", "<", "\n")  # one of them is tokens in any vocabulary
# Of a tokenizer's model, where no value and an empty one mean the same.
EMPTY = ("continuing_subword_prefix", "end_of_word_suffix")
PARTS = ("model", "normalizer", "pre_tokenizer", "decoder", "added_tokens")


class Answer(NamedTuple):
    """What transformers makes of a folder.

    Attributes:
        kind: Name of the tokenizer's class.
        special: Its special tokens and templates.
        spec: The tokenizer that it encodes with, as the content of a tokenizer.json.
    """

    kind: str
    special: SpecialTokens
    spec: dict[str, Any]


def ask(folder: Path) -> Answer:
    """Ask transformers for the tokenizer of a folder. No code from the folder is run.

    Raises:
        StageError: missing_tokenizer, if transformers refuses it; tokenizer_mismatch, for a key
            that does not say what it should; missing_file, for a file that holds no JSON object.
    """
    check_files(folder)
    with _quiet():
        try:
            config = _config(folder)
            tokenizer = _open(folder, config)
            rows = getattr(config.get_text_config(), "vocab_size", None)
            rows = rows if isinstance(rows, int) else None
            spec = json.loads(tokenizer.backend_tokenizer.to_str())
            begin, finish = _surroundings(tokenizer)
        except Exception as error:  # each class fails in its own way; all mean that none is usable
            raise_if_of_machine(error)
            check_named_tokens(folder)
            raise _refused(folder, error) from error
        _check_encoding(folder, tokenizer, spec)
        ends, unreachable = _ends(folder, tokenizer, rows)
    ids = _ids(folder, tokenizer, rows)
    special = SpecialTokens(
        tokens=dict(tokenizer.special_tokens_map),
        ids=ids,
        begin=begin,
        finish=finish,
        ends=ends,
        unreachable=unreachable,
        templates=_templates(folder, tokenizer),
    )
    _check_letters(folder, special)
    return Answer(type(tokenizer).__name__, special, _without_strangers(folder, spec, rows))


def tokenizer_of(folder: Path, spec: dict[str, Any]) -> "FastTokenizer":
    """Return the tokenizer that `ask` described.

    Raises:
        StageError: missing_tokenizer, if its parts do not fit each other, as in a damaged file.
    """
    from tokenizers import Tokenizer as FastTokenizer

    try:
        return FastTokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the library raises plain Exception
        raise StageError(
            Failure.MISSING_TOKENIZER,
            f"expected a tokenizer in {folder} whose parts fit each other, found otherwise: "
            f"{error}; copy the tokenizer.json that the model was trained with",
        ) from error


def differing_parts(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Return the parts in which two tokenizer.json differ, of those that tokens depend on."""
    return [part for part in PARTS if _plain(ours, part) != _plain(theirs, part)]


def _plain(spec: dict[str, Any], part: str) -> Any:
    value = spec.get(part)
    if part != "model" or not isinstance(value, dict):
        return value
    return {key: None if key in EMPTY and not item else item for key, item in value.items()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' own remarks off the terminal; what is wrong is an exception."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _config(folder: Path) -> Any:
    """Return the model's configuration, which has a say in the tokenizer's class."""
    from transformers import AutoConfig, PreTrainedConfig

    if not (folder / "config.json").is_file():
        return PreTrainedConfig()
    settings = {"trust_remote_code": False, "local_files_only": True}
    try:
        return AutoConfig.from_pretrained(folder, **settings)
    except Exception as error:  # a model type that transformers does not know, as for AutoTokenizer
        raise_if_of_machine(error)
        return PreTrainedConfig.from_pretrained(folder, local_files_only=True)


def _open(folder: Path, config: Any) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        folder, config=config, trust_remote_code=False, local_files_only=True
    )


def _surroundings(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """Return the ids that are put before and behind every text."""
    found = []
    for text in SAMPLES:
        bare = tokenizer(text, add_special_tokens=False).input_ids
        whole = tokenizer(text).input_ids
        for start in range(len(whole) - len(bare) + 1):
            if bare and whole[start : start + len(bare)] == bare:
                found.append((whole[:start], whole[start + len(bare) :]))
                break
    if not found:
        raise ValueError("it puts special tokens inside of texts, or none of them has tokens")
    return found[0]


def _check_encoding(
    folder: Path, tokenizer: "PreTrainedTokenizerBase", spec: dict[str, Any]
) -> None:
    """Refuse what is for training alone: ids by chance, and special tokens written out."""
    dropout = spec["model"].get("dropout")
    if dropout:
        raise wrong_key(
            folder / "tokenizer.json",
            "model.dropout",
            "null, so that a text has the same ids each time,",
            dropout,
        )
    if getattr(tokenizer, "split_special_tokens", False):
        raise wrong_key(
            folder / CONFIG,
            "split_special_tokens",
            "false, so that chats have their special tokens,",
            True,
        )


def _ends(
    folder: Path, tokenizer: "PreTrainedTokenizerBase", rows: int | None
) -> tuple[list[int], list[int]]:
    """Return the ids that end a text, and those among the named ones that cannot come."""
    from transformers import GenerationConfig

    name = GENERATION if (folder / GENERATION).is_file() else "config.json"
    configured: Any = None
    if (folder / name).is_file():
        # As AutoModel does, also where there is no generation_config.json.
        options = {"config_file_name": name, "local_files_only": True}
        if name != GENERATION:
            options["_from_model_config"] = True
        try:
            configured = GenerationConfig.from_pretrained(folder, **options).eos_token_id
        except Exception as error:  # its values are checked in many places
            raise_if_of_machine(error)
            raise StageError(
                Failure.TOKENIZER_MISMATCH,
                f"expected settings for generation in {folder / name}, found some that "
                f"transformers refuses: {error}; mend the file, or leave it out",
            ) from error
    check_ids(folder / name, configured)
    more = configured if isinstance(configured, list) else [configured]
    named = dict.fromkeys(token for token in (tokenizer.eos_token_id, *more) if token is not None)
    ends = [token for token in named if token >= 0 and (rows is None or token < rows)]
    return ends, [token for token in named if token not in ends]


def _ids(folder: Path, tokenizer: "PreTrainedTokenizerBase", rows: int | None) -> dict[str, int]:
    """Return the ids of the special tokens that the embedding has a row for."""
    ids = {}
    for name, text in tokenizer.special_tokens_map.items():
        token = tokenizer.convert_tokens_to_ids(text)
        if token is None:  # an empty text names none
            continue
        if rows is None or token < rows:
            ids[name] = token
            continue
        for file in (CONFIG, MAP):
            path = folder / file
            if path.is_file() and read_json(path).get(name):
                raise StageError(
                    Failure.TOKENIZER_MISMATCH,
                    f"expected {name} {text!r} of {path} to be a token of the model, found none in "
                    f"tokenizer.json; transformers makes it the id {token}, and the embedding has "
                    f"{rows} rows: name a token that the model was trained with, or none",
                )
    return ids


def _templates(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    """Return the chat templates by their names."""
    found = tokenizer.chat_template
    templates = found if isinstance(found, dict) else {DEFAULT: found}
    for name, template in templates.items():
        if not isinstance(name, str) or not isinstance(template, str | None):
            raise wrong_key(
                folder / CONFIG, "chat_template", "a text, or texts with names", template
            )
    return {name: template for name, template in templates.items() if template is not None}


def _without_strangers(folder: Path, spec: dict[str, Any], rows: int | None) -> dict[str, Any]:
    """Leave out what a class adds by default and the embedding has no row for, and cutting."""
    path = folder / "tokenizer.json"
    named: set[str] = set()
    if path.is_file():
        named = {token["content"] for token in read_json(path).get("added_tokens") or []}
    kept = []
    for token in spec["added_tokens"]:
        if rows is None or token["id"] < rows or token["content"] in named:
            kept.append(token)
    return spec | {"added_tokens": kept, "truncation": None, "padding": None}


def _check_letters(folder: Path, special: SpecialTokens) -> None:
    """Refuse half characters, which JSON can hold and UTF-8 cannot."""
    for key, texts in (("chat_template", special.templates), ("tokens", special.tokens)):
        for name, text in texts.items():
            try:
                f"{name}{text}".encode()
            except UnicodeEncodeError as error:
                raise wrong_key(
                    folder / CONFIG, key, "whole characters", f"{name}: {error}"
                ) from None


def _refused(folder: Path, error: Exception) -> StageError:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    kind = None
    if (folder / CONFIG).is_file():
        kind = read_json(folder / CONFIG).get("tokenizer_class")
    named = f" (tokenizer_class {kind!r:.80} in {CONFIG})" if kind is not None else ""
    return StageError(
        Failure.MISSING_TOKENIZER,
        f"expected a tokenizer in {folder} that transformers can use, found one that it refuses"
        f"{named}: {reason}; copy the tokenizer.json and tokenizer_config.json that the model was "
        "trained with into the folder",
    )
