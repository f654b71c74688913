"""llama.cpp through llama-cpp-python's low-level interface, without torch and transformers."""

import ctypes
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import llama_cpp as llama
import numpy as np
from scipy.special import log_softmax

from quantline.runtimes.runtime import PIECE_VALUES, Piece, greedy
from quantline.errors import Failure, StageError

F32 = 0  # ggml_type of the KV cache: full precision, so that the figures show the weights alone
BATCH_TOKENS = 512  # run at once, which is what llama.cpp computes at once
LANES = 2  # batches that share them where sequences are short
CELLS = 256  # llama.cpp gives each sequence a multiple of so many places in the cache


@llama.llama_log_callback
def _quiet(level, text, user_data):
    """llama.cpp's log is dropped; what goes wrong is seen in its return values."""


class Context:
    """llama.cpp's working memory for a model whose vocabulary has `size` tokens."""

    def __init__(self, model, size: int) -> None:
        self.model, self.size, self.handle, self.room = model, size, None, (0, 0, 0)

    def prepare(self, sequences: int, length: int, threads: int, batch: int) -> None:
        """Make it empty, with room for `sequences` of `length` tokens of which `batch` are run at once.

        Each has a cache of its own: in a shared one it would also look at, and then mask, the cells of all others, and
        what a sequence gets would depend on its neighbours by the rounding of other sums.
        """
        asked = sequences, -(-length // CELLS) * CELLS, batch
        if any(have < needed for have, needed in zip(self.room, asked, strict=True)):
            if self.handle is not None:
                llama.llama_free(self.handle)
            settings, self.room = llama.llama_context_default_params(), asked
            settings.n_ctx, settings.n_seq_max, settings.kv_unified = sequences * self.room[1], sequences, False
            settings.n_batch = settings.n_ubatch = batch
            settings.type_k = settings.type_v = F32
            settings.flash_attn_type = 0
            self.handle = llama.llama_init_from_model(self.model, settings)
            if not self.handle:
                raise StageError(Failure.OUT_OF_MEMORY, f"llama.cpp cannot make a context of {settings.n_ctx} tokens")
        llama.llama_set_n_threads(self.handle, threads, threads)
        llama.llama_memory_clear(llama.llama_get_memory(self.handle), True)

    def decode(self, tokens: np.ndarray, start: int, inside: slice) -> np.ndarray:
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
        status = llama.llama_decode(self.handle, batch)
        if status:
            raise StageError(Failure.RUNTIME_CRASHED, f"llama_decode returned {status} for {ids.size} tokens")
        kept = len(range(count)[inside])
        if not kept:
            return np.empty((sequences, 0, self.size), np.float32)
        return np.ctypeslib.as_array(llama.llama_get_logits(self.handle), (sequences, kept, self.size))


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
        self.threads, self.contexts = threads or os.cpu_count(), [Context(self.model, self.size) for _ in range(LANES)]

    def pieces(self, tokens: np.ndarray, first: int, end: int) -> Iterator[Piece]:
        """Short sequences go in LANES batches at a time, each computed by its share of the threads: threads that work at
        one batch wait for each other after every operation. What goes together does not depend on the number of threads.
        """
        count, length = tokens.shape
        parts = LANES if max(length, CELLS) <= BATCH_TOKENS // LANES else 1
        batch, values = BATCH_TOKENS // parts, PIECE_VALUES // parts
        step = max(1, min(batch // max(length, CELLS), values // self.size))
        lanes = parts if self.threads % parts == 0 and count > step else 1

        def lane(number: int) -> Iterator[Piece]:
            context, most = self.contexts[number], max(1, values // (step * self.size))  # positions with logits
            for begin in range(number * step, count, lanes * step):
                rows, start = slice(begin, min(count, begin + step)), 0
                context.prepare(step, length, self.threads // lanes, batch)
                while start < length:
                    place = max(start, first)
                    stop = min(length, start + batch // step, place + most)
                    inside = slice(place, max(place, min(stop, end)))
                    logits = context.decode(tokens[rows, start:stop], start, slice(place - start, inside.stop - start))
                    if logits.size:
                        yield rows, inside, logits
                    start = stop

        with ThreadPoolExecutor(lanes) as pool:
            ahead = deque((stream, pool.submit(next, stream, None)) for stream in map(lane, range(lanes)))
            while ahead:
                stream, coming = ahead.popleft()
                piece = coming.result()
                if piece is not None:
                    yield piece
                    ahead.append((stream, pool.submit(next, stream, None)))  # not before: it overwrites the piece

    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        found = np.empty((*tokens.shape, self.size), np.float32)
        for rows, places, logits in self.pieces(tokens, 0, tokens.shape[1]):
            found[rows, places] = log_softmax(logits, axis=-1)
        return found

    def generate(self, prompt: list[int], max_new_tokens: int, stop: set[int]) -> list[int]:
        context, position = self.contexts[0], 0
        context.prepare(1, len(prompt) + max_new_tokens, self.threads, BATCH_TOKENS)

        def step(*ids: int) -> np.ndarray:
            nonlocal position
            for start in range(0, len(ids), BATCH_TOKENS):
                part = np.array([ids[start:start + BATCH_TOKENS]], np.int32)
                logits = context.decode(part, position, slice(part.size - 1, part.size))
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
