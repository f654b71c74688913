"""llama.cpp through llama-cpp-python's low-level interface, without torch and transformers."""

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

import llama_cpp as llama
import numpy as np
from scipy.special import log_softmax

from stages.runtimes import greedy
from stages.tracking import Failure, StageError

F32 = 0  # ggml_type of the KV cache: full precision, so that the figures show the weights alone


@llama.llama_log_callback
def _quiet(level, text, user_data):
    """llama.cpp's log is dropped; what goes wrong is seen in its return values."""


class Engine:
    """A GGUF bundle."""

    name, version, device = "llama.cpp", llama.__version__, "cpu"

    def __init__(self, bundle: Path, threads: int | None) -> None:
        llama.llama_log_set(_quiet, ctypes.c_void_p())
        llama.llama_backend_init()
        settings = llama.llama_model_default_params()
        settings.n_gpu_layers = 0
        path = min(bundle.glob("model*.gguf"), default=bundle / "model.gguf")  # of a split model, the first
        self.model = llama.llama_model_load_from_file(str(path).encode(), settings)
        if not self.model:
            raise StageError(Failure.RUNTIME_CRASHED, f"llama.cpp cannot load {path}; export it again")
        self.vocabulary = llama.llama_model_get_vocab(self.model)
        self.size = llama.llama_vocab_n_tokens(self.vocabulary)
        self.threads, self.context, self.room = threads or os.cpu_count(), None, 0

    def _prepare(self, length: int) -> None:
        """A context with an empty cache for one sequence of `length` tokens.

        One at a time: in a shared cache each sequence would also look at, and then mask, the cells of all others, and
        what a sequence gets would depend on its neighbours by the rounding of other sums.
        """
        if self.context is None or self.room < length:
            if self.context is not None:
                llama.llama_free(self.context)
            settings, self.room = llama.llama_context_default_params(), max(length, 256)
            settings.n_ctx, settings.n_batch, settings.n_ubatch = self.room, self.room, 512
            settings.n_threads = settings.n_threads_batch = self.threads
            settings.type_k = settings.type_v = F32
            settings.flash_attn_type = 0
            self.context = llama.llama_init_from_model(self.model, settings)
            if not self.context:
                raise StageError(Failure.OUT_OF_MEMORY, f"llama.cpp cannot make a context of {self.room} tokens")
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)

    def _decode(self, tokens: Sequence[int], start: int, last_only: bool) -> np.ndarray:
        """Logits float32 [n, V], or of the last token alone, for n tokens at positions from `start`."""
        count = len(tokens)
        batch = llama.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i] = token, start + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = not last_only or i == count - 1
            status = llama.llama_decode(self.context, batch)
        finally:
            llama.llama_batch_free(batch)
        if status:
            raise StageError(Failure.RUNTIME_CRASHED, f"llama_decode returned {status} for {count} tokens")
        rows = 1 if last_only else count
        return np.ctypeslib.as_array(llama.llama_get_logits(self.context), (rows, self.size)).copy()

    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        found = np.empty((*tokens.shape, self.size), np.float32)
        for row, sequence in zip(found, tokens.tolist(), strict=True):
            self._prepare(len(sequence))
            row[:] = log_softmax(self._decode(sequence, 0, False), axis=-1)
        return found

    def generate(self, prompt: list[int], max_new_tokens: int, stop: set[int]) -> list[int]:
        self._prepare(len(prompt) + max_new_tokens)
        position = len(prompt) - 1

        def step(token: int) -> np.ndarray:
            nonlocal position
            position += 1
            return self._decode([token], position, True)[0]

        return greedy(self._decode(prompt, 0, True)[0], step, max_new_tokens, stop)

    def encode(self, text: str) -> list[int]:
        data = text.encode()
        room = len(data) + 16
        ids = (llama.llama_token * room)()
        count = llama.llama_tokenize(self.vocabulary, data, len(data), ids, room, False, True)
        if count < 0:
            raise StageError(Failure.TOKENIZER_MISMATCH, f"llama.cpp needs {-count} tokens for {len(data)} bytes")
        return list(ids[:count])

    def decode(self, ids: list[int]) -> str:
        pieces, buffer = [], ctypes.create_string_buffer(512)
        for token in ids:
            size = llama.llama_token_to_piece(self.vocabulary, token, buffer, len(buffer), 0, True)
            pieces.append(buffer.raw[:size])
        return b"".join(pieces).decode("utf-8", errors="replace")
