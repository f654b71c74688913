"""Text to token ids with the checkpoint's own tokenizer, without importing transformers."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as FastTokenizer

from quantline.errors import Failure, StageError
from quantline.files import read_json
from quantline.text.documents import LONGEST, Document, cut_text

SLOW_FILES = ("tokenizer.model", "vocab.json")  # of older checkpoints, in place of tokenizer.json


def convert_slow_tokenizer(folder: Path) -> dict[str, Any] | None:
    """Write tokenizer.json beside a tokenizer that has none, converted by transformers.

    Returns:
        The step for the manifest's transforms; None if there was nothing to do.

    Raises:
        StageError: missing_tokenizer, if transformers cannot convert it with its own code alone.
    """
    if (folder / "tokenizer.json").is_file():
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    except Exception as error:  # each class fails in its own way; all mean that none is usable
        raise StageError(
            Failure.MISSING_TOKENIZER,
            "expected a tokenizer that transformers converts to tokenizer.json, found one that it "
            f"refuses: {error}; copy the tokenizer.json of the model into the folder",
        ) from error
    return {"step": "convert_tokenizer", "class": type(tokenizer).__name__}


class Tokenizer:
    """The tokenizer of a Hugging Face folder.

    Raises:
        StageError: missing_tokenizer, if there is no tokenizer.json or it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        """Read tokenizer.json and tokenizer_config.json."""
        self.folder = folder
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise StageError(
                Failure.MISSING_TOKENIZER,
                f"expected tokenizer.json in {folder}, found none; run load again",
            )
        try:
            self.fast = FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for a damaged file
            raise StageError(
                Failure.MISSING_TOKENIZER,
                f"expected a readable {path}: {error}; copy the one that the model was trained "
                "with",
            ) from None
        self.fast.no_truncation()
        self.fast.no_padding()
        config = folder / "tokenizer_config.json"
        self.config = read_json(config) if config.is_file() else {}

    def encode(self, text: str) -> list[int]:
        """Return token ids without the special tokens that the tokenizer puts around a text."""
        return self.fast.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, special tokens included."""
        return self.fast.decode(ids, skip_special_tokens=False)

    def special(self, name: str) -> int | None:
        """Return the id of what tokenizer_config.json calls `bos_token`, `eos_token` and so on."""
        token = self.config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        return self.fast.token_to_id(token) if token else None

    @cached_property
    def end_tokens(self) -> list[int]:
        """The tokens that end a text: the end token, then those of generation_config.json."""
        path = self.folder / "generation_config.json"
        configured = read_json(path).get("eos_token_id") if path.is_file() else None
        more = configured if isinstance(configured, list) else [configured]
        ids = [self.special("eos_token"), *more]
        return list(dict.fromkeys(token for token in ids if token is not None))

    @cached_property
    def bos(self) -> int | None:
        """The token that begins every text, if the tokenizer adds one."""
        bos = self.special("bos_token")
        if bos is None:
            return None
        adds = self.fast.encode("a", add_special_tokens=True).ids[:1] == [bos]
        return bos if adds or self.config.get("add_bos_token") else None

    @cached_property
    def chat_template(self) -> str | None:
        """The Jinja template of chats, if the model has one."""
        path = self.folder / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        return self.config.get("chat_template")

    def render(self, messages: list[dict[str, str]], generation_prompt: bool = False) -> str:
        """Render chat messages with the model's template, in a sandbox.

        transformers renders the same, but with a clock: here messages give the same text every day.

        Raises:
            StageError: dataset_invalid, if the model has no template or it refuses the messages.
        """
        from jinja2.exceptions import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if not self.chat_template:
            raise StageError(
                Failure.DATASET_INVALID,
                "expected a chat template for the text's chat messages, and the model has no chat "
                "template; give plain text",
            )

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = raise_exception
        names = {}
        for name in ("bos_token", "eos_token"):
            token = self.special(name)
            names[name] = self.fast.id_to_token(token) if token is not None else ""
        try:
            template = environment.from_string(self.chat_template)
            return template.render(
                messages=messages, add_generation_prompt=generation_prompt, **names
            )
        except (TemplateError, TypeError, KeyError) as error:
            raise StageError(
                Failure.DATASET_INVALID,
                f"the chat template refuses these messages: {error}; change them to what it takes",
            ) from None

    def prompt(self, text: str, messages: list[dict[str, str]] | None = None) -> list[int]:
        """Return a prompt as the model expects it: the chat template, or begin token and text."""
        if messages:
            return self.encode(self.render(messages, generation_prompt=True))
        begin = [] if self.bos is None else [self.bos]
        return begin + self.encode(text)

    def pack(self, documents: list[Document], sequences: int, length: int) -> np.ndarray:
        """Pack documents into full sequences of tokens.

        Documents follow one another, separated by the begin or else the end token; each sequence
        starts with the begin token if the tokenizer adds one.

        Args:
            documents: The text.
            sequences: How many sequences to make at most.
            length: Tokens of a sequence.

        Returns:
            int32 [sequences, length].

        Raises:
            StageError: calibration_empty, if the text fills no sequence.
        """
        separator = self.bos if self.bos is not None else self.special("eos_token")
        begin = [] if self.bos is None else [self.bos]
        room = length - len(begin)
        stream: list[int] = []
        for document in documents:
            text = document if isinstance(document, str) else self.render(document)
            for piece in [text] if len(text) <= LONGEST else cut_text(text, LONGEST):
                stream += self.encode(piece)
                if len(stream) >= room * sequences:
                    break
            if separator is not None:
                stream.append(separator)
            if len(stream) >= room * sequences:
                break
        count = min(sequences, len(stream) // room)
        if not count:
            raise StageError(
                Failure.CALIBRATION_EMPTY,
                f"expected at least {length} tokens of text, found {len(stream)}; give more text "
                "or shorter sequences",
            )
        rows = [begin + stream[i * room : (i + 1) * room] for i in range(count)]
        return np.array(rows, np.int32)
