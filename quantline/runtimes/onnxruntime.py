"""onnxruntime on the CPU, without torch and transformers."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
from scipy.special import log_softmax
from tokenizers import Tokenizer

from quantline.runtimes.runtime import Piece, continued, greedy
from quantline.errors import Failure, StageError


class Engine:
    """An ONNX bundle with a KV cache (quantline/formats/onnx/graph.py says which inputs and outputs).

    Raises StageError(runtime_crashed) if onnxruntime refuses the graph.
    """

    name, version, device = "onnxruntime", onnxruntime.__version__, "cpu"

    def __init__(self, bundle: Path, threads: int | None) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or os.cpu_count()
        options.log_severity_level = 3
        # Threads that spin while they wait slow down everything else on the machine, the next measurement too.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self.session = onnxruntime.InferenceSession(bundle / "model.onnx", options,
                                                        providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no class in common
            raise StageError(Failure.RUNTIME_CRASHED, f"onnxruntime cannot load {bundle / 'model.onnx'}: {error}; "
                                                      "export it again") from error
        self.tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        cached = [one for one in self.session.get_inputs() if one.name.startswith("past_key_values.")]
        self.cached = [one.name for one in cached]
        self.size = self.session.get_outputs()[0].shape[-1]
        _, self.kv_heads, _, self.head_dim = cached[0].shape

    def _run(self, tokens: np.ndarray, past: list[np.ndarray] | None = None) -> list[np.ndarray]:
        """Logits [b, n, V] and the grown cache for tokens [b, n] after `past`."""
        batch, length = tokens.shape
        if past is None:
            past = [np.zeros((batch, self.kv_heads, 0, self.head_dim), np.float32)] * len(self.cached)
        before = past[0].shape[2]
        positions = np.arange(before, before + length, dtype=np.int64)
        return self.session.run(None, {
            "input_ids": tokens.astype(np.int64), "position_ids": np.ascontiguousarray(np.tile(positions, (batch, 1))),
            "attention_mask": np.ones((batch, before + length), np.int64), **dict(zip(self.cached, past, strict=True))})

    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        return log_softmax(self._run(tokens)[0], axis=-1)

    def pieces(self, tokens: np.ndarray, first: int, end: int) -> Iterator[Piece]:
        def run(ids: np.ndarray, cache: list[np.ndarray] | None) -> tuple[np.ndarray, list[np.ndarray]]:
            logits, *cache = self._run(ids, cache)
            return logits, cache

        return continued(tokens, first, end, self.size, run)

    def generate(self, prompt: list[int], max_new_tokens: int, stop: set[int]) -> list[int]:
        logits, *cache = self._run(np.array([prompt]))

        def step(token: int) -> np.ndarray:
            nonlocal cache
            following, *cache = self._run(np.array([[token]]), cache)
            return following[0, -1]

        return greedy(logits[0, -1], step, max_new_tokens, stop)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)
