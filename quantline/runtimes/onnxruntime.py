"""onnxruntime on the CPU, without torch and transformers."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from quantline.causes import ADVICE, raise_if_of_machine
from quantline.config.runtimes import RuntimeInfo, register_runtime
from quantline.errors import Failure, StageError
from quantline.runtimes.runtime import LogitChunk, chunks_by_cache, decode_greedily, one_line
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


class Engine:
    """An ONNX bundle with a key-value cache; formats/onnx/graph.py describes inputs and outputs.

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
        cached = [
            value
            for value in self.session.get_inputs()
            if value.name.startswith("past_key_values.")
        ]
        if not cached or any(len(value.shape) != 4 for value in cached):
            names = ", ".join(value.name for value in self.session.get_inputs()) or "none"
            raise StageError(
                Failure.RUNTIME_CRASHED,
                f"expected a graph with inputs past_key_values.* of four dimensions in {path}, "
                f"found the inputs {names}; export the variant again",
            )
        self.cached = [value.name for value in cached]
        self.vocabulary = self.session.get_outputs()[0].shape[-1]
        _, self.kv_heads, _, self.head_dim = cached[0].shape

    def _run(self, tokens: np.ndarray, past: list[np.ndarray] | None = None) -> list[np.ndarray]:
        """Return logits [b, n, vocabulary] and the grown cache for tokens [b, n] after `past`.

        Raises:
            StageError: out_of_memory, runtime_crashed.
        """
        batch, length = tokens.shape
        if past is None:
            empty = np.zeros((batch, self.kv_heads, 0, self.head_dim), np.float32)
            past = [empty] * len(self.cached)
        before = past[0].shape[2]
        positions = np.arange(before, before + length, dtype=np.int64)
        inputs = {
            "input_ids": tokens.astype(np.int64),
            "position_ids": np.ascontiguousarray(np.tile(positions, (batch, 1))),
            "attention_mask": np.ones((batch, before + length), np.int64),
        }
        inputs |= dict(zip(self.cached, past, strict=True))
        try:
            return self.session.run(None, inputs)
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

    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        """Return log-probabilities (see Runtime)."""
        from scipy.special import log_softmax

        return log_softmax(self._run(tokens)[0], axis=-1)

    def logit_chunks(self, tokens: np.ndarray, first: int, end: int) -> Iterator[LogitChunk]:
        """Yield logits chunk by chunk (see ChunkedRuntime)."""

        def run(
            ids: np.ndarray, cache: list[np.ndarray] | None
        ) -> tuple[np.ndarray, list[np.ndarray]]:
            logits, *grown = self._run(ids, cache)
            return logits, grown

        return chunks_by_cache(tokens, first, end, self.vocabulary, run)

    def generate(self, prompt: list[int], max_new_tokens: int, stop: set[int]) -> list[int]:
        """Decode greedily (see Runtime)."""
        logits, *cache = self._run(np.array([prompt]))

        def step(token: int) -> np.ndarray:
            nonlocal cache
            following, *cache = self._run(np.array([[token]]), cache)
            return following[0, -1]

        return decode_greedily(logits[0, -1], step, max_new_tokens, stop)

    def encode(self, text: str) -> list[int]:
        """Return token ids without special tokens around the text."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)
