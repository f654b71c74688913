"""The protocol of an engine, and what several engines share."""

from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from quantline.config.runtimes import RUNTIMES
from quantline.errors import Failure, StageError
from quantline.registry import load_object

CHUNK_VALUES = 1 << 25  # logits that a runtime hands over at once, so that a large vocabulary fits
CHUNK_TOKENS = 2048
WHOLE_TEXT = 1 << 31  # sequences


class Runtime(Protocol):
    """A loaded model.

    Life cycle: the class is named in a RuntimeInfo and called with a bundle's folder and a number
    of threads (None: one per core). `encode` and `decode` use the bundle's own tokenizer.
    """

    name: str
    version: str
    device: str

    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        """Return natural log-probabilities of the token after each token.

        Args:
            tokens: int32 [batch, length].

        Returns:
            float32 [batch, length, vocabulary].
        """

    def generate(self, prompt: list[int], max_new_tokens: int, stop: set[int]) -> list[int]:
        """Decode greedily with a key-value cache; return the new tokens without the stop token."""

    def encode(self, text: str) -> list[int]:
        """Return token ids, without special tokens around the text."""

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids."""


@runtime_checkable
class ServingRuntime(Protocol):
    """A runtime whose own server begins and ends texts as the bundle says, without being told."""

    def encode_whole(self, text: str) -> list[int]:
        """Return token ids, with the special tokens around the text."""

    def stops_at(self, token: int) -> bool:
        """Whether a generated text ends at a token."""


class LogitChunk(NamedTuple):
    """Logits of some positions of some sequences.

    Attributes:
        rows: Which sequences.
        positions: Which positions.
        logits: float32 [sequences, positions, vocabulary], or log-probabilities. They hold until
            the next chunk is asked for.
    """

    rows: slice
    positions: slice
    logits: np.ndarray


@runtime_checkable
class ChunkedRuntime(Protocol):
    """A runtime that can hand over part of a sequence's logits."""

    def logit_chunks(self, tokens: np.ndarray, first: int, end: int) -> Iterator[LogitChunk]:
        """Yield chunks that cover `tokens` from position `first` to before `end`."""


@runtime_checkable
class DivisibleRuntime(ChunkedRuntime, Protocol):
    """A chunked runtime that says where a text can be divided with the same bits."""

    def sequences_at_once(self, length: int) -> int:
        """Return how many sequences of a length are run together."""


def engine_class(name: str) -> Callable[[Path, int | None], Runtime]:
    """Import the class of an engine, and the modules that it needs.

    Raises:
        StageError: runtime_unavailable, if it is not installed.
    """
    info = RUNTIMES[name]
    try:
        for module in info.modules:
            import_module(module)
        engine = load_object(info.engine)
    except ImportError as error:
        raise _unavailable(name, error) from error
    assert callable(engine), info.engine
    return engine


def open_runtime(name: str, bundle: Path, threads: int | None = None) -> Runtime:
    """Load a bundle in a runtime.

    Raises:
        StageError: runtime_unavailable, if the engine is not installed.
    """
    try:
        return engine_class(name)(bundle, threads)
    except ImportError as error:
        raise _unavailable(name, error) from error


def _unavailable(name: str, error: ImportError) -> StageError:
    return StageError(
        Failure.RUNTIME_UNAVAILABLE,
        f"expected {name}, and cannot import it: {error}; install it: {RUNTIMES[name].install}",
    )


def one_line(error: Exception) -> str:
    """Return a library's own words in one line, for a message."""
    return " ".join(str(error).split()) or type(error).__name__


def sequences_at_once(runtime: Runtime, length: int) -> int:
    """Return how many sequences of a length a runtime runs together.

    A text can be measured in parts of so many, or of a multiple, with the same bits. A chunked
    runtime that does not say so measures all of a text in one part.
    """
    if isinstance(runtime, DivisibleRuntime):
        return runtime.sequences_at_once(length)
    return WHOLE_TEXT if isinstance(runtime, ChunkedRuntime) else max(1, CHUNK_TOKENS // length)


def logit_chunks(
    runtime: Runtime, tokens: np.ndarray, first: int, end: int
) -> Iterator[LogitChunk]:
    """Yield chunks that cover tokens int32 [n, length] from position `first` to before `end`."""
    if isinstance(runtime, ChunkedRuntime):
        yield from runtime.logit_chunks(tokens, first, end)
        return
    count, length = tokens.shape
    step = sequences_at_once(runtime, length)
    for start in range(0, count, step):
        rows = slice(start, min(count, start + step))
        logprobs = runtime.logprobs(tokens[rows])
        yield LogitChunk(rows, slice(first, end), logprobs[:, first:end])


def sequences_by_cache(length: int, vocabulary: int) -> int:
    """Return how many sequences of a length `chunks_by_cache` runs together."""
    return max(1, min(CHUNK_TOKENS // length, CHUNK_VALUES // (length * vocabulary)))


def chunks_by_cache(
    tokens: np.ndarray,
    first: int,
    end: int,
    vocabulary: int,
    run: Callable[[np.ndarray, Any], tuple[np.ndarray, Any]],
) -> Iterator[LogitChunk]:
    """Yield chunks of a runtime that continues from its key-value cache.

    Args:
        tokens: int32 [n, length].
        first: First position to cover.
        end: Position before which to stop.
        vocabulary: Width of the logits.
        run: Called with ids int32 [b, m] and a cache (None where a sequence begins); returns
            logits [b, m, vocabulary] and the grown cache.
    """
    count, length = tokens.shape
    step = sequences_by_cache(length, vocabulary)
    width = max(1, CHUNK_VALUES // (step * vocabulary))
    for start in range(0, count, step):
        rows = slice(start, min(count, start + step))
        cache = None
        for position in range(0, length, width):
            logits, cache = run(tokens[rows, position : position + width], cache)
            covered = slice(max(position, first), min(position + width, end))
            if covered.start < covered.stop:
                inside = logits[:, covered.start - position : covered.stop - position]
                yield LogitChunk(rows, covered, inside)


def decode_greedily(
    logits: np.ndarray,
    step: Callable[[int], np.ndarray],
    max_new_tokens: int,
    stop: set[int],
) -> list[int]:
    """Take the most probable token again and again.

    Args:
        logits: The prompt's last logits [vocabulary].
        step: Called with a token; returns the logits after it.
        max_new_tokens: How many tokens to take at most.
        stop: Tokens that end the text and are no part of it.
    """
    ids: list[int] = []
    while len(ids) < max_new_tokens:
        token = int(np.argmax(logits))
        if token in stop:
            break
        ids.append(token)
        if len(ids) < max_new_tokens:
            logits = step(token)
    return ids
