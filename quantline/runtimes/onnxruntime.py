"""onnxruntime on the CPU, without torch and transformers."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from quantline.causes import ADVICE, raise_if_of_machine
from quantline.config.runtimes import RuntimeInfo, register_runtime
from quantline.errors import Failure, StageError
from quantline.runtimes.runtime import (
    LogitChunk,
    chunks_by_cache,
    decode_greedily,
    one_line,
    sequences_by_cache,
)
from quantline.runtimes.without_links import without_links

register_runtime(
    RuntimeInfo(
        name="onnxruntime",
        engine="quantline.runtimes.onnxruntime:Engine",
        modules=("onnxruntime", "tokenizers"),
        formats=("onnx",),
        install="pip install onnxruntime",
        kv_bytes=4,
    )
)


# What the names of inputs begin with that are states: keys and values, and those of convolutions
# and recurrences.
STATES = ("past_key_values.", "past_states.")
TOKEN_INPUTS = ("input_ids", "position_ids", "attention_mask")
DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


class Past(NamedTuple):
    """What a model carries from token to token.

    Attributes:
        tokens: How many there were.
        states: In the order of the graph's inputs.
    """

    tokens: int
    states: list[np.ndarray]


class Engine:
    """An ONNX bundle with its states; formats/onnx/trace.py describes inputs and outputs.

    Raises:
        StageError: runtime_crashed, if onnxruntime refuses the graph.
    """

    name = "onnxruntime"
    device = "cpu"

    def __init__(self, bundle: Path, threads: int | None) -> None:
        """Load model.onnx and tokenizer.json."""
        import onnxruntime
        from tokenizers import Tokenizer

        self.version = onnxruntime.__version__
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or os.cpu_count()
        options.log_severity_level = 3
        # Threads that spin while they wait slow down whatever else the machine does.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = bundle / "model.onnx"
        try:
            with without_links(bundle) as folder:
                self.session = onnxruntime.InferenceSession(
                    folder / path.name, options, providers=["CPUExecutionProvider"]
                )
        except Exception as error:  # its exceptions have no class in common
            raise_if_of_machine(error)
            raise StageError(
                Failure.RUNTIME_CRASHED,
                f"expected onnxruntime to load {path}, found that it refuses (onnxruntime says: "
                f"{one_line(error)}); export the variant again if the file is damaged, else take "
                "another format",
            ) from error
        self.tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.states = [value for value in self.inputs.values() if value.name.startswith(STATES)]
        unknown = set(self.inputs) - {*TOKEN_INPUTS, *(value.name for value in self.states)}
        if "input_ids" not in self.inputs or not self.states or unknown:
            names = ", ".join(self.inputs) or "none"
            raise StageError(
                Failure.RUNTIME_CRASHED,
                f"expected a graph with inputs input_ids and past_key_values.* or past_states.* in "
                f"{path}, found the inputs {names}; export the variant again",
            )
        self.vocabulary = self.session.get_outputs()[0].shape[-1]

    def _empty(self, batch: int) -> Past:
        """Return the states before the first token: zeros, and nothing of what grows."""
        sizes = {"batch": batch, "past": 0}
        states = []
        for value in self.states:
            shape = [size if isinstance(size, int) else sizes[size] for size in value.shape]
            states.append(np.zeros(shape, DTYPES[value.type]))
        return Past(0, states)

    def _run(self, tokens: np.ndarray, past: Past | None = None) -> tuple[np.ndarray, Past]:
        """Return logits [b, n, vocabulary] and the states after tokens [b, n] that follow `past`.

        Raises:
            StageError: out_of_memory, runtime_crashed.
        """
        batch, length = tokens.shape
        past = past or self._empty(batch)
        positions = np.arange(past.tokens, past.tokens + length, dtype=np.int64)
        inputs = {
            "input_ids": tokens.astype(np.int64),
            "position_ids": np.ascontiguousarray(np.tile(positions, (batch, 1))),
            "attention_mask": np.ones((batch, past.tokens + length), np.int64),
        }
        inputs = {name: values for name, values in inputs.items() if name in self.inputs}
        names = [value.name for value in self.states]
        inputs |= dict(zip(names, past.states, strict=True))
        try:
            logits, *states = self.session.run(None, inputs)
        except Exception as error:  # its exceptions have no class in common
            words = one_line(error)
            full = "allocate" in words.lower() or "bad_alloc" in words
            failure = Failure.OUT_OF_MEMORY if full else Failure.RUNTIME_CRASHED
            raise StageError(
                failure,
                f"expected onnxruntime to run {batch} sequences of {length} tokens, found that it "
                f"stops (onnxruntime says: {words}); "
                f"{ADVICE.get(failure, 'take another format')}",
            ) from error
        return logits, Past(past.tokens + length, states)

    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        """Return log-probabilities (see Runtime)."""
        from scipy.special import log_softmax

        return log_softmax(self._run(tokens)[0], axis=-1)

    def sequences_at_once(self, length: int) -> int:
        """Return how many sequences of a length are run together (see DivisibleRuntime)."""
        return sequences_by_cache(length, self.vocabulary)

    def logit_chunks(self, tokens: np.ndarray, first: int, end: int) -> Iterator[LogitChunk]:
        """Yield logits chunk by chunk (see ChunkedRuntime)."""
        return chunks_by_cache(tokens, first, end, self.vocabulary, self._run)

    def generate(self, prompt: list[int], max_new_tokens: int, stop: set[int]) -> list[int]:
        """Decode greedily (see Runtime)."""
        logits, past = self._run(np.array([prompt]))

        def step(token: int) -> np.ndarray:
            nonlocal past
            following, past = self._run(np.array([[token]]), past)
            return following[0, -1]

        return decode_greedily(logits[0, -1], step, max_new_tokens, stop)

    def encode(self, text: str) -> list[int]:
        """Return token ids without special tokens around the text."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)
