"""llama.cpp through llama-cpp-python's low-level interface, without torch and transformers."""

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import llama_cpp as llama
import numpy as np
from scipy.special import log_softmax

from stages.runtimes import PIECE_VALUES, Piece, greedy
from stages.tracking import Failure, StageError

F32 = 0  # ggml_type of the KV cache: full precision, so that the figures show the weights alone
BATCH_TOKENS = 512  # run at once, which is what llama.cpp computes at once
CELLS = 256  # llama.cpp gives each sequence a multiple of so many places in the cache


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
        self.threads, self.context, self.room = threads or os.cpu_count(), None, (0, 0)

    def _prepare(self, sequences: int, length: int) -> None:
        """A context with an empty cache for `sequences` of `length` tokens.

        Each has a cache of its own: in a shared one it would also look at, and then mask, the cells of all others, and
        what a sequence gets would depend on its neighbours by the rounding of other sums.
        """
        if self.context is None or self.room[0] < sequences or self.room[1] < length:
            if self.context is not None:
                llama.llama_free(self.context)
            settings, self.room = llama.llama_context_default_params(), (sequences, -(-length // CELLS) * CELLS)
            settings.n_ctx, settings.n_seq_max, settings.kv_unified = sequences * self.room[1], sequences, False
            settings.n_batch = settings.n_ubatch = BATCH_TOKENS
            settings.n_threads = settings.n_threads_batch = self.threads
            settings.type_k = settings.type_v = F32
            settings.flash_attn_type = 0
            self.context = llama.llama_init_from_model(self.model, settings)
            if not self.context:
                raise StageError(Failure.OUT_OF_MEMORY, f"llama.cpp cannot make a context of {settings.n_ctx} tokens")
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)

    def _decode(self, tokens: np.ndarray, start: int, inside: slice) -> np.ndarray:
        """Logits float32 [b, m, V] of the m positions `inside` tokens int32 [b, n], whose first is at position `start`. They
        lie in llama.cpp's own memory, where the next call overwrites them.
        """
        (sequences, count), pointer = tokens.shape, ctypes.POINTER
        ids = np.ascontiguousarray(tokens, np.int32)
        places = np.tile(np.arange(start, start + count, dtype=np.int32), sequences)
        numbers = np.repeat(np.arange(sequences, dtype=np.int32), count)
        ones = np.ones(ids.size, np.int32)
        wanted = np.zeros((sequences, count), np.int8)
        wanted[:, inside] = 1
        owners = numbers.ctypes.data + 4 * np.arange(ids.size, dtype=np.uint64)  # where each token's sequence stands
        batch = llama.llama_batch(
            n_tokens=ids.size, token=ids.ctypes.data_as(pointer(llama.llama_token)),
            pos=places.ctypes.data_as(pointer(llama.llama_pos)), n_seq_id=ones.ctypes.data_as(pointer(ctypes.c_int32)),
            seq_id=owners.ctypes.data_as(pointer(pointer(llama.llama_seq_id))),
            logits=wanted.ctypes.data_as(pointer(ctypes.c_int8)))
        status = llama.llama_decode(self.context, batch)
        if status:
            raise StageError(Failure.RUNTIME_CRASHED, f"llama_decode returned {status} for {ids.size} tokens")
        kept = len(range(count)[inside])
        if not kept:
            return np.empty((sequences, 0, self.size), np.float32)
        return np.ctypeslib.as_array(llama.llama_get_logits(self.context), (sequences, kept, self.size))

    def pieces(self, tokens: np.ndarray, first: int, end: int) -> Iterator[Piece]:
        count, length = tokens.shape
        step = max(1, min(BATCH_TOKENS // max(length, CELLS), PIECE_VALUES // self.size))
        most = max(1, PIECE_VALUES // (step * self.size))  # positions with logits
        for begin in range(0, count, step):
            rows, start = slice(begin, min(count, begin + step)), 0
            self._prepare(step, length)
            while start < length:
                place = max(start, first)
                stop = min(length, start + BATCH_TOKENS // step, place + most)
                inside = slice(place, max(place, min(stop, end)))
                logits = self._decode(tokens[rows, start:stop], start, slice(place - start, inside.stop - start))
                if logits.size:
                    yield rows, inside, logits
                start = stop

    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        found = np.empty((*tokens.shape, self.size), np.float32)
        for rows, places, logits in self.pieces(tokens, 0, tokens.shape[1]):
            found[rows, places] = log_softmax(logits, axis=-1)
        return found

    def generate(self, prompt: list[int], max_new_tokens: int, stop: set[int]) -> list[int]:
        self._prepare(1, len(prompt) + max_new_tokens)
        position = 0

        def step(*ids: int) -> np.ndarray:
            nonlocal position
            for start in range(0, len(ids), BATCH_TOKENS):
                part = np.array([ids[start:start + BATCH_TOKENS]], np.int32)
                logits = self._decode(part, position, slice(part.size - 1, part.size))
                position += part.size
            return logits[0, 0]

        return greedy(step(*prompt), step, max_new_tokens, stop)

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
