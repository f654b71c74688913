"""What llama.cpp makes of a GGUF file: its tokens, and its logits.

llama.cpp is who such a file was made for, so what is read from it has to be what llama.cpp reads.
"""

import ctypes
import logging
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import numpy as np

from quantline.errors import Failure, StageError

LOGGER = "llama-cpp-python"  # of the package that llama.cpp's own lines go through


def _library() -> ModuleType:
    """Import llama-cpp-python, and keep llama.cpp's lines off the terminal."""
    import llama_cpp

    logging.getLogger(LOGGER).setLevel(logging.CRITICAL)
    return llama_cpp


class _Model:
    """A context manager around a file that llama.cpp has open."""

    def __init__(self, path: Path, vocabulary_only: bool) -> None:
        """Open nothing yet."""
        self.path = path
        self.vocabulary_only = vocabulary_only
        self.llama = _library()

    def __enter__(self) -> Self:
        llama = self.llama
        settings = llama.llama_model_default_params()
        settings.vocab_only = self.vocabulary_only
        self.model = llama.llama_model_load_from_file(str(self.path).encode(), settings)
        if not self.model:
            raise StageError(
                Failure.UNSUPPORTED_ARCHITECTURE,
                f"expected a file that llama.cpp opens, found that it refuses {self.path}; fetch "
                "it again, or start from the model's Hugging Face folder",
            )
        self.vocabulary = llama.llama_model_get_vocab(self.model)
        return self

    def __exit__(self, *_: object) -> None:
        self.llama.llama_model_free(self.model)


class Vocabulary(_Model):
    """The tokens of a file as llama.cpp has them, without the weights."""

    def __init__(self, path: Path) -> None:
        """Open nothing yet."""
        super().__init__(path, vocabulary_only=True)

    @property
    def adds_begin(self) -> bool:
        """Whether a text begins with the token of beginnings."""
        return bool(self.llama.llama_vocab_get_add_bos(self.vocabulary))

    @property
    def adds_end(self) -> bool:
        """Whether a text ends with the token of ends."""
        return bool(self.llama.llama_vocab_get_add_eos(self.vocabulary))

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text, without those around it."""
        octets = text.encode()
        room = len(octets) + 8
        tokens = (self.llama.llama_token * room)()
        count = self.llama.llama_tokenize(
            self.vocabulary, octets, len(octets), tokens, room, False, True
        )
        return list(tokens[: max(count, 0)])


def logits_of(path: Path, tokens: np.ndarray) -> np.ndarray:
    """Return llama.cpp's logits of a text.

    Args:
        path: The file.
        tokens: int32 [n].

    Returns:
        float32 [n, vocabulary].

    Raises:
        StageError: unsupported_architecture, if llama.cpp does not run the file; out_of_memory.
    """
    with _Model(path, vocabulary_only=False) as opened:
        llama = opened.llama
        settings = llama.llama_context_default_params()
        count = len(tokens)
        settings.n_ctx = settings.n_batch = settings.n_ubatch = count
        settings.type_k = settings.type_v = 0  # F32
        settings.flash_attn_type = 0
        context = llama.llama_init_from_model(opened.model, settings)
        if not context:
            raise StageError(
                Failure.OUT_OF_MEMORY,
                f"expected llama.cpp to make a context of {count} tokens for {path}, found that it "
                "refuses; close other programs",
            )
        try:
            return _decode(llama, context, opened, np.ascontiguousarray(tokens, np.int32))
        finally:
            llama.llama_free(context)


def _decode(llama: ModuleType, context: Any, opened: _Model, tokens: np.ndarray) -> np.ndarray:
    """Run one batch, and return a copy of the logits of all its tokens."""
    count = len(tokens)
    batch = llama.llama_batch_init(count, 0, 1)
    try:
        batch.n_tokens = count
        for place in range(count):
            batch.token[place] = int(tokens[place])
            batch.pos[place] = place
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = 0
            batch.logits[place] = 1
        status = llama.llama_decode(context, batch)
    finally:
        llama.llama_batch_free(batch)
    if status:
        raise StageError(
            Failure.UNSUPPORTED_ARCHITECTURE,
            f"expected llama.cpp to run {opened.path}, found status {status}; start from the "
            "model's Hugging Face folder",
        )
    rows = llama.llama_vocab_n_tokens(opened.vocabulary)
    pointer = ctypes.cast(llama.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
    return np.ctypeslib.as_array(pointer, (count, rows)).copy()
