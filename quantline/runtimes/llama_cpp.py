"""llama.cpp through llama-cpp-python's low-level interface, without torch and transformers."""

import ctypes
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from quantline.config.runtimes import RuntimeInfo, register_runtime
from quantline.errors import Failure, StageError
from quantline.model.gguf_files import model_files
from quantline.run.memory import allowed_bytes
from quantline.runtimes.llama_cpp_context import CELL_STEP, Context
from quantline.runtimes.llama_cpp_log import LOG, load_library
from quantline.runtimes.runtime import CHUNK_VALUES, LogitChunk, decode_greedily

BATCH_TOKENS = 512  # run at once, which is what llama.cpp computes at once
BESIDE_WEIGHTS = 512 << 20  # bytes that a process has besides: libraries, caches, logits
PARALLEL_CONTEXTS = 2  # each runs batches of its own where sequences are short

register_runtime(
    RuntimeInfo(
        name="llama.cpp",
        engine="quantline.runtimes.llama_cpp:Engine",
        modules=("llama_cpp",),
        formats=("gguf",),
        install="pip install llama-cpp-python",
        kv_bytes=2,
        server="quantline.runtimes.servers:llama_cpp_server",
    )
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
        self.llama = load_library()
        self.version = self.llama.__version__
        settings = self.llama.llama_model_default_params()
        settings.n_gpu_layers = 0
        files = model_files(bundle)
        path = files[0] if files else bundle / "model.gguf"
        # llama.cpp puts weights into an order that its kernels read faster, in memory of its own.
        needed = sum(file.stat().st_size for file in files) + BESIDE_WEIGHTS
        settings.use_extra_bufts = needed <= allowed_bytes()
        if not settings.use_extra_bufts:
            self.version += ", weights read from the file, larger than memory"
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

    def sequences_at_once(self, length: int) -> int:
        """Return how many sequences of a length are run together (see DivisibleRuntime)."""
        parts = _parts(length)
        batch, values = BATCH_TOKENS // parts, CHUNK_VALUES // parts
        return max(1, min(batch // max(length, CELL_STEP), values // self.vocabulary))

    def logit_chunks(self, tokens: np.ndarray, first: int, end: int) -> Iterator[LogitChunk]:
        """Yield logits chunk by chunk (see ChunkedRuntime).

        Short sequences go in batches through PARALLEL_CONTEXTS contexts at once, each computed by
        its share of the threads: threads that work at one batch wait for each other after every
        operation. Which sequences share a batch does not depend on the number of threads.
        """
        count, length = tokens.shape
        parts = _parts(length)
        batch = BATCH_TOKENS // parts
        values = CHUNK_VALUES // parts
        step = self.sequences_at_once(length)
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


def _parts(length: int) -> int:
    """Return how many contexts share the tokens and values of a batch of such sequences."""
    short = max(length, CELL_STEP) <= BATCH_TOKENS // PARALLEL_CONTEXTS
    return PARALLEL_CONTEXTS if short else 1
