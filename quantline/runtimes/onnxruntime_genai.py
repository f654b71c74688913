"""onnxruntime-genai on the CPU: the library that serves ONNX models with its own tokenizer, cache and decoding loop."""

import json
import os
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai
from scipy.special import log_softmax

from quantline.runtimes.runtime import greedy
from quantline.errors import Failure, StageError

genai.disable_telemetry_events()


class Engine:
    """An ONNX bundle with genai_config.json (quantline/formats/onnx/genai_config.py writes it).

    Raises StageError(runtime_crashed) if the library refuses it.
    """

    name, version, device = "onnxruntime-genai", genai.__version__, "cpu"

    def __init__(self, bundle: Path, threads: int | None) -> None:
        options = {"intra_op_num_threads": threads or os.cpu_count(), "log_severity_level": 3,
                   "session.intra_op.allow_spinning": "0"}  # as in quantline/runtimes/onnxruntime.py
        try:
            config = genai.Config(str(bundle))
            config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
            self.model = genai.Model(config)
            self.tokenizer = genai.Tokenizer(self.model)
        except Exception as error:  # its exceptions have no class in common
            raise StageError(Failure.RUNTIME_CRASHED, f"onnxruntime-genai cannot load {bundle}: {error}; "
                                                      "export it again") from error
        self.tokenizer.update_options(add_special_tokens="false", skip_special_tokens="false")

    def _generator(self, batch: int, length: int) -> genai.Generator:
        """An empty sequence, or `batch` of them, with room for `length` tokens."""
        parameters = genai.GeneratorParams(self.model)
        parameters.set_search_options(batch_size=batch, max_length=length, do_sample=False)
        return genai.Generator(self.model, parameters)

    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        generator = self._generator(*tokens.shape)
        generator.append_tokens(np.ascontiguousarray(tokens, np.int32))
        return log_softmax(generator.get_output("logits"), axis=-1)

    def generate(self, prompt: list[int], max_new_tokens: int, stop: set[int]) -> list[int]:
        generator = self._generator(1, len(prompt) + max_new_tokens)
        # Not its own choice of the next token: that ends at the model's end token, also where `stop` does not name it.
        generator.append_tokens(np.array(prompt, np.int32))

        def step(token: int) -> np.ndarray:
            generator.append_tokens(np.array([token], np.int32))
            return generator.get_logits()[0, -1]

        return greedy(generator.get_logits()[0, -1], step, max_new_tokens, stop)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).tolist()

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(np.array(ids, np.int32)) if ids else ""
