"""Text to token ids with the checkpoint's own tokenizer."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as FastTokenizer

from quantline.causes import raise_if_of_machine
from quantline.errors import Failure, StageError
from quantline.text import chat_template, transformers_tokenizer
from quantline.text.documents import LONGEST, Document, cut_text
from quantline.text.special_tokens import read_special_tokens

SLOW_FILES = ("tokenizer.model", "vocab.json")  # of older checkpoints, in place of tokenizer.json


class Tokenizer:
    """The tokenizer of a Hugging Face folder, as transformers has it.

    In a folder that `load` made, or an export, the answers lie in a file. For any other folder
    transformers is asked.

    Raises:
        StageError: missing_tokenizer, if there is no tokenizer.json or it is damaged;
            tokenizer_mismatch and missing_file as `transformers_tokenizer.ask` does.
    """

    def __init__(self, folder: Path) -> None:
        """Read tokenizer.json and what is special about it."""
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
            raise_if_of_machine(error)
            raise StageError(
                Failure.MISSING_TOKENIZER,
                f"expected a readable {path}: {error}; copy the one that the model was trained "
                "with",
            ) from None
        special = read_special_tokens(folder)
        if special is None:
            answer = transformers_tokenizer.ask(folder)
            special = answer.special
            spec = json.loads(self.fast.to_str())
            if transformers_tokenizer.differing_parts(spec, answer.spec):
                self.fast = transformers_tokenizer.tokenizer_of(folder, answer.spec)
        self.specials = special
        self.fast.no_truncation()
        self.fast.no_padding()

    @cached_property
    def spec(self) -> dict[str, Any]:
        """The tokenizer as the content of a tokenizer.json."""
        spec: dict[str, Any] = json.loads(self.fast.to_str())
        return spec

    def encode(self, text: str) -> list[int]:
        """Return token ids without the special tokens that the tokenizer puts around a text."""
        return self.fast.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, special tokens included."""
        return self.fast.decode(ids, skip_special_tokens=False)

    def special(self, name: str) -> int | None:
        """Return the id of what transformers calls `bos_token`, `eos_token` and so on."""
        return self.specials.ids.get(name)

    @property
    def end_tokens(self) -> list[int]:
        """The tokens that end a text: the tokenizer's, then those that generation stops at."""
        return self.specials.ends

    @property
    def begin(self) -> list[int]:
        """The tokens that are put before every text; most tokenizers put one or none."""
        return self.specials.begin

    @property
    def bos(self) -> int | None:
        """The token that begins every text, if the tokenizer adds one."""
        return self.begin[0] if self.begin else None

    @property
    def chat_template(self) -> str | None:
        """The Jinja template of chats, if the model has one that serves by itself."""
        return self.specials.default_template

    def render(self, messages: list[dict[str, str]], generation_prompt: bool = False) -> str:
        """Render chat messages with the model's template.

        Raises:
            StageError: dataset_invalid, if the model has no template or it refuses the messages.
        """
        if not self.chat_template:
            templates = self.specials.templates
            names = ", ".join(sorted(name for name, text in templates.items() if text))
            found = "an empty one" if templates else "that the model has no chat template"
            if names:
                found = f"none but those named {names}"
            raise StageError(
                Failure.DATASET_INVALID,
                f"expected a chat template for the text's chat messages, found {found}; give plain "
                "text, or a template named default",
            )
        return chat_template.render(
            self.chat_template, messages, generation_prompt, self.specials.tokens
        )

    def prompt(self, text: str, messages: list[dict[str, str]] | None = None) -> list[int]:
        """Return a prompt as the model expects it: the chat template, or begin token and text.

        A template writes the begin token itself, where the model wants one.
        """
        if messages:
            return self.encode(self.render(messages, generation_prompt=True))
        return self.begin + self.encode(text)

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
        begin = self.begin
        end = self.special("eos_token")
        separator = begin or ([] if end is None else [end])
        room = length - len(begin)
        stream: list[int] = []
        for document in documents:
            text = document if isinstance(document, str) else self.render(document)
            for piece in [text] if len(text) <= LONGEST else cut_text(text, LONGEST):
                stream += self.encode(piece)
                if len(stream) >= room * sequences:
                    break
            stream += separator
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
