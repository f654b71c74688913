"""llama.cpp through llama-cpp-python's low-level interface, without torch and transformers."""

import ctypes
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from quantline.config.runtimes import RuntimeInfo, register_runtime
from quantline.errors import ADVICE, Failure, StageError
from quantline.runtimes.runtime import CHUNK_VALUES, LogitChunk, decode_greedily

KV_TYPE = 0  # ggml's F32: the cache is in full precision, so that figures show the weights alone
BATCH_TOKENS = 512  # run at once, which is what llama.cpp computes at once
PARALLEL_CONTEXTS = 2  # each runs batches of its own where sequences are short
CELL_STEP = 256  # llama.cpp gives each sequence a multiple of so many places in the cache
ERROR_LEVEL = 4  # ggml's GGML_LOG_LEVEL_ERROR
CONTINUED_LEVEL = 5  # GGML_LOG_LEVEL_CONT: the line before goes on
QUOTED_LINES = 2  # of llama.cpp's errors: the last is often only that it failed

register_runtime(
    RuntimeInfo(
        name="llama.cpp",
        engine="quantline.runtimes.llama_cpp:Engine",
        modules=("llama_cpp",),
        formats=("gguf",),
        install="pip install llama-cpp-python",
        kv_bytes=2,
    )
)


class Log:
    """What llama.cpp last said at the level of errors; all else that it says is dropped.

    What goes wrong is seen in return values, and why it did stands in the log alone.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._lines: deque[str] = deque(maxlen=20)
        self._level = 0

    def hear(self, level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
        """Take a part of the log, as llama_log_set's callback."""
        if level != CONTINUED_LEVEL:
            self._level = level
        if self._level != ERROR_LEVEL:
            return
        said = text.decode(errors="replace")
        if level == CONTINUED_LEVEL and self._lines:
            self._lines[-1] += said
        else:
            self._lines.append(said)

    def clear(self) -> None:
        """Forget what was said."""
        self._lines.clear()

    def reason(self) -> str:
        """Return llama.cpp's own last words, for a message."""
        lines = [line.strip() for line in self._lines if line.strip()]
        return "; ".join(lines[-QUOTED_LINES:]) or "it gave no reason"


LOG = Log()


@cache
def _log_callback() -> Any:
    """Return LOG as llama.cpp calls it. It is kept, because llama.cpp holds its address."""
    import llama_cpp

    return llama_cpp.llama_log_callback(LOG.hear)


def _load_library() -> ModuleType:
    """Import llama_cpp, with its log led to LOG also if another user of it led it elsewhere."""
    import llama_cpp

    llama_cpp.llama_log_set(_log_callback(), ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    return llama_cpp


class Context:
    """llama.cpp's working memory for a model."""

    def __init__(self, llama: ModuleType, model: Any, vocabulary: int) -> None:
        """Make no context yet: `prepare` knows its size."""
        self.llama = llama
        self.model = model
        self.vocabulary = vocabulary
        self.handle: Any = None
        self.room = (0, 0, 0)  # sequences, places of each, tokens at once

    def prepare(self, sequences: int, length: int, threads: int, batch: int) -> None:
        """Empty the context, and make room in it.

        Each sequence has a cache of its own. In a shared one it would also look at, and then mask,
        the cells of all others, and its logits would depend on its neighbours by rounding.

        Args:
            sequences: How many.
            length: Tokens of each sequence.
            threads: That compute.
            batch: Tokens that are run at once.

        Raises:
            StageError: out_of_memory, or runtime_crashed where llama.cpp names another reason.
        """
        llama = self.llama
        needed = (sequences, -(-length // CELL_STEP) * CELL_STEP, batch)
        if any(have < need for have, need in zip(self.room, needed, strict=True)):
            if self.handle is not None:
                llama.llama_free(self.handle)
            self.room = needed
            settings = llama.llama_context_default_params()
            settings.n_ctx = sequences * needed[1]
            settings.n_seq_max = sequences
            settings.kv_unified = False
            settings.n_batch = batch
            settings.n_ubatch = batch
            settings.type_k = KV_TYPE
            settings.type_v = KV_TYPE
            settings.flash_attn_type = 0
            LOG.clear()
            self.handle = llama.llama_init_from_model(self.model, settings)
            if not self.handle:
                raise _no_context(settings.n_ctx)
        llama.llama_set_n_threads(self.handle, threads, threads)
        llama.llama_memory_clear(llama.llama_get_memory(self.handle), True)

    def decode(self, tokens: np.ndarray, start: int, wanted: slice) -> np.ndarray:
        """Run tokens and return the logits of some of them.

        Args:
            tokens: int32 [b, n], one row per sequence.
            start: Position of the first token in its sequence.
            wanted: The columns whose logits are returned.

        Returns:
            float32 [b, columns, vocabulary] in llama.cpp's own memory, where the next call
            overwrites them.

        Raises:
            StageError: runtime_crashed.
        """
        llama = self.llama
        sequences, count = tokens.shape
        ids = np.ascontiguousarray(tokens, np.int32)
        positions = np.tile(np.arange(start, start + count, dtype=np.int32), sequences)
        owners = np.repeat(np.arange(sequences, dtype=np.int32), count)
        ones = np.ones(ids.size, np.int32)
        outputs = np.zeros((sequences, count), np.int8)
        outputs[:, wanted] = 1
        # llama.cpp wants a pointer to each token's list of sequences, which has one entry.
        addresses = owners.ctypes.data + 4 * np.arange(ids.size, dtype=np.uint64)

        def pointer(array: np.ndarray, kind: Any) -> Any:
            return array.ctypes.data_as(ctypes.POINTER(kind))

        batch = llama.llama_batch(
            n_tokens=ids.size,
            token=pointer(ids, llama.llama_token),
            pos=pointer(positions, llama.llama_pos),
            n_seq_id=pointer(ones, ctypes.c_int32),
            seq_id=pointer(addresses, ctypes.POINTER(llama.llama_seq_id)),
            logits=pointer(outputs, ctypes.c_int8),
        )
        LOG.clear()
        status = llama.llama_decode(self.handle, batch)
        if status:
            raise StageError(
                Failure.RUNTIME_CRASHED,
                f"expected llama_decode to return 0 for {ids.size} tokens, found {status} "
                f"(llama.cpp says: {LOG.reason()}); mend that, or leave the variant out",
            )
        columns = len(range(count)[wanted])
        if not columns:
            return np.empty((sequences, 0, self.vocabulary), np.float32)
        shape = (sequences, columns, self.vocabulary)
        return np.ctypeslib.as_array(llama.llama_get_logits(self.handle), shape)


def _no_context(tokens: int) -> StageError:
    """Return the error for a context that llama.cpp does not make."""
    reason = LOG.reason()
    # It names no cause of its own where the system gives it no memory.
    is_memory = "alloc" in reason or "memory" in reason or reason == Log().reason()
    failure = Failure.OUT_OF_MEMORY if is_memory else Failure.RUNTIME_CRASHED
    advice = ADVICE[Failure.OUT_OF_MEMORY] if is_memory else "mend that, or leave the variant out"
    return StageError(
        failure,
        f"expected llama.cpp to make a context of {tokens} tokens, found that it refuses "
        f"(llama.cpp says: {reason}); {advice}",
    )


class Engine:
    """A GGUF bundle on the CPU.

    Raises:
        StageError: runtime_crashed, if llama.cpp cannot load the file.
    """

    name = "llama.cpp"
    device = "cpu"

    def __init__(self, bundle: Path, threads: int | None) -> None:
        """Load the file, or the first of a split model's files."""
        self.llama = _load_library()
        self.version = self.llama.__version__
        settings = self.llama.llama_model_default_params()
        settings.n_gpu_layers = 0
        path = min(bundle.glob("model*.gguf"), default=bundle / "model.gguf")
        LOG.clear()
        self.model = self.llama.llama_model_load_from_file(str(path).encode(), settings)
        if not self.model:
            raise StageError(
                Failure.RUNTIME_CRASHED,
                f"expected llama.cpp to load {path}, found that it refuses (llama.cpp says: "
                f"{LOG.reason()}); export the variant again if the file is damaged, else take "
                "another format",
            )
        self.tokens = self.llama.llama_model_get_vocab(self.model)
        self.vocabulary = self.llama.llama_vocab_n_tokens(self.tokens)
        self.threads = threads or os.cpu_count() or 1
        self.contexts = [
            Context(self.llama, self.model, self.vocabulary) for _ in range(PARALLEL_CONTEXTS)
        ]

    def logit_chunks(self, tokens: np.ndarray, first: int, end: int) -> Iterator[LogitChunk]:
        """Yield logits chunk by chunk (see ChunkedRuntime).

        Short sequences go in batches through PARALLEL_CONTEXTS contexts at once, each computed by
        its share of the threads: threads that work at one batch wait for each other after every
        operation. Which sequences share a batch does not depend on the number of threads.
        """
        count, length = tokens.shape
        short = max(length, CELL_STEP) <= BATCH_TOKENS // PARALLEL_CONTEXTS
        parts = PARALLEL_CONTEXTS if short else 1
        batch = BATCH_TOKENS // parts
        values = CHUNK_VALUES // parts
        step = max(1, min(batch // max(length, CELL_STEP), values // self.vocabulary))
        contexts_used = parts if self.threads % parts == 0 and count > step else 1
        most_positions = max(1, values // (step * self.vocabulary))

        def chunks_of_context(number: int) -> Iterator[LogitChunk]:
            context = self.contexts[number]
            for begin in range(number * step, count, contexts_used * step):
                rows = slice(begin, min(count, begin + step))
                context.prepare(step, length, self.threads // contexts_used, batch)
                start = 0
                while start < length:
                    position = max(start, first)
                    stop = min(length, start + batch // step, position + most_positions)
                    covered = slice(position, max(position, min(stop, end)))
                    wanted = slice(position - start, covered.stop - start)
                    logits = context.decode(tokens[rows, start:stop], start, wanted)
                    if logits.size:
                        yield LogitChunk(rows, covered, logits)
                    start = stop

        def submit(chunks: Iterator[LogitChunk]) -> Future[LogitChunk | None]:
            return pool.submit(next, chunks, None)

        with ThreadPoolExecutor(contexts_used) as pool:
            all_chunks = map(chunks_of_context, range(contexts_used))
            waiting = deque((chunks, submit(chunks)) for chunks in all_chunks)
            while waiting:
                chunks, future = waiting.popleft()
                chunk = future.result()
                if chunk is not None:
                    yield chunk
                    # Not before: the context's next batch overwrites this chunk.
                    waiting.append((chunks, submit(chunks)))

    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        """Return log-probabilities (see Runtime)."""
        from scipy.special import log_softmax

        logprobs = np.empty((*tokens.shape, self.vocabulary), np.float32)
        for chunk in self.logit_chunks(tokens, 0, tokens.shape[1]):
            logprobs[chunk.rows, chunk.positions] = log_softmax(chunk.logits, axis=-1)
        return logprobs

    def generate(self, prompt: list[int], max_new_tokens: int, stop: set[int]) -> list[int]:
        """Decode greedily (see Runtime)."""
        context = self.contexts[0]
        context.prepare(1, len(prompt) + max_new_tokens, self.threads, BATCH_TOKENS)
        position = 0

        def run(*ids: int) -> np.ndarray:
            nonlocal position
            for start in range(0, len(ids), BATCH_TOKENS):
                part = np.array([ids[start : start + BATCH_TOKENS]], np.int32)
                logits = context.decode(part, position, slice(part.size - 1, part.size))
                position += part.size
            return logits[0, 0]

        return decode_greedily(run(*prompt), run, max_new_tokens, stop)

    def encode(self, text: str) -> list[int]:
        """Return token ids without special tokens around the text."""
        return self._encode(text, whole=False)

    def encode_whole(self, text: str) -> list[int]:
        """Return token ids with the special tokens around the text (see ServingRuntime)."""
        return self._encode(text, whole=True)

    def stops_at(self, token: int) -> bool:
        """Whether llama.cpp holds a token for an end of generation."""
        return bool(self.llama.llama_vocab_is_eog(self.tokens, token))

    def _encode(self, text: str, whole: bool) -> list[int]:
        data = text.encode()
        room = len(data) + 16
        ids = (self.llama.llama_token * room)()
        count = self.llama.llama_tokenize(self.tokens, data, len(data), ids, room, whole, True)
        if count < 0:
            raise StageError(
                Failure.TOKENIZER_MISMATCH,
                f"expected at most {room} tokens for {len(data)} bytes, found {-count} in "
                "llama.cpp; choose another format",
            )
        return list(ids[:count])

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids."""
        pieces = []
        buffer = ctypes.create_string_buffer(512)
        for token in ids:
            size = self.llama.llama_token_to_piece(self.tokens, token, buffer, len(buffer), 0, True)
            pieces.append(buffer.raw[:size])
        return b"".join(pieces).decode("utf-8", errors="replace")
