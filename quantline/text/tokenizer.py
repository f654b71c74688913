"""Text to token ids with the checkpoint's own tokenizer, without importing transformers."""

from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as Fast

from quantline.model.checkpoint import read_json
from quantline.text.documents import Document
from quantline.errors import Failure, StageError

SLOW = ("tokenizer.model", "vocab.json")  # what older checkpoints have instead of tokenizer.json


def convert_slow(folder: Path) -> dict | None:
    """Write tokenizer.json beside a tokenizer that has none; returns the step for the manifest's transforms.

    transformers converts, with its own code alone. Raises StageError(missing_tokenizer) if it cannot.
    """
    if (folder / "tokenizer.json").is_file():
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    except Exception as error:  # each tokenizer class fails in its own way; all mean that there is no usable one
        raise StageError(Failure.MISSING_TOKENIZER, f"expected a tokenizer that transformers converts to tokenizer.json, "
                                                    f"found one that it refuses: {error}") from error
    return {"step": "convert_tokenizer", "class": type(tokenizer).__name__}


class Tokenizer:
    """The tokenizer of a Hugging Face folder. Raises StageError(missing_tokenizer) if there is no tokenizer.json."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "tokenizer.json").is_file():
            raise StageError(Failure.MISSING_TOKENIZER,
                             f"expected tokenizer.json in {folder}, found none; run load again")
        try:
            self.fast = Fast.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # noqa: BLE001  the library raises plain Exception for a damaged file
            raise StageError(Failure.MISSING_TOKENIZER, f"expected a readable {folder / 'tokenizer.json'}: {error}") from None
        self.fast.no_truncation()
        self.fast.no_padding()
        config = folder / "tokenizer_config.json"
        self.config = read_json(config) if config.is_file() else {}

    def encode(self, text: str) -> list[int]:
        """Token ids without the special tokens that the tokenizer puts around a text."""
        return self.fast.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.fast.decode(ids, skip_special_tokens=False)

    def special(self, name: str) -> int | None:
        """The id of the token that tokenizer_config.json calls `bos_token`, `eos_token`, …"""
        token = self.config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        return self.fast.token_to_id(token) if token else None

    @cached_property
    def ends(self) -> list[int]:
        """The tokens that end a text that the model writes: the end token, then those of generation_config.json."""
        path = self.folder / "generation_config.json"
        more = read_json(path).get("eos_token_id") if path.is_file() else None
        ids = [self.special("eos_token"), *(more if isinstance(more, list) else [more])]
        return list(dict.fromkeys(one for one in ids if one is not None))

    @cached_property
    def bos(self) -> int | None:
        """The token that begins every text, if the tokenizer adds one."""
        bos = self.special("bos_token")
        added = self.fast.encode("a", add_special_tokens=True).ids[:1] == [bos]
        return bos if bos is not None and (added or self.config.get("add_bos_token")) else None

    @cached_property
    def chat_template(self) -> str | None:
        path = self.folder / "chat_template.jinja"
        return path.read_text(encoding="utf-8") if path.is_file() else self.config.get("chat_template")

    def render(self, messages: list[dict[str, str]], generation_prompt: bool = False) -> str:
        """Chat messages through the model's template, in a sandbox. Raises StageError if it has none."""
        from jinja2.exceptions import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if not self.chat_template:
            raise StageError(Failure.DATASET_INVALID, "the text holds chat messages and the model has no chat template")
        def refuse(message: str) -> None:
            raise TemplateError(message)

        # As transformers renders templates, less the clock: the same messages give the same text on every day.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=["jinja2.ext.loopcontrols"])
        environment.globals |= {"raise_exception": refuse}
        names = {name: self.fast.id_to_token(self.special(name)) if self.special(name) is not None else ""
                 for name in ("bos_token", "eos_token")}
        try:
            template = environment.from_string(self.chat_template)
            return template.render(messages=messages, add_generation_prompt=generation_prompt, **names)
        except (TemplateError, TypeError, KeyError) as error:
            raise StageError(Failure.DATASET_INVALID, f"the chat template refuses these messages: {error}") from None

    def prompt(self, text: str, messages: list[dict[str, str]] | None = None) -> list[int]:
        """A prompt as the model expects it: the chat template, or the begin token and the text."""
        if messages:
            return self.encode(self.render(messages, generation_prompt=True))
        return ([] if self.bos is None else [self.bos]) + self.encode(text)

    def pack(self, documents: list[Document], sequences: int, length: int) -> np.ndarray:
        """Up to `sequences` full sequences of tokens, int32 [n, length].

        Documents follow one another, parted by the begin or else the end token; each sequence starts with the begin
        token if the tokenizer adds one. Raises StageError(calibration_empty) if the text fills no sequence.
        """
        between = self.bos if self.bos is not None else self.special("eos_token")
        begin = [] if self.bos is None else [self.bos]
        room, stream = length - len(begin), []
        for document in documents:
            stream += self.encode(document if isinstance(document, str) else self.render(document))
            stream += [] if between is None else [between]
            if len(stream) >= room * sequences:
                break
        count = min(sequences, len(stream) // room)
        if not count:
            raise StageError(Failure.CALIBRATION_EMPTY, f"expected at least {length} tokens of text, found {len(stream)}; "
                                                        "give more text or shorter sequences")
        return np.array([begin + stream[i * room:(i + 1) * room] for i in range(count)], np.int32)
