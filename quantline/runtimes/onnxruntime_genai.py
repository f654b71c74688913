"""onnxruntime-genai on the CPU: it brings its own tokenizer, cache and decoding loop."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from quantline.causes import raise_if_of_machine
from quantline.config.runtimes import RuntimeInfo, register_runtime
from quantline.errors import Failure, StageError
from quantline.runtimes.runtime import decode_greedily, one_line
from quantline.runtimes.without_links import without_links

if TYPE_CHECKING:
    import onnxruntime_genai

register_runtime(
    RuntimeInfo(
        name="onnxruntime-genai",
        engine="quantline.runtimes.onnxruntime_genai:Engine",
        modules=("onnxruntime_genai",),
        formats=("onnx",),
        install="pip install 'quantline[genai]'",
        kv_bytes=4,
    )
)


class Engine:
    """An ONNX bundle with genai_config.json (formats/onnx/genai_config.py writes it).

    Raises:
        StageError: runtime_crashed, if the library refuses the bundle.
    """

    name = "onnxruntime-genai"
    device = "cpu"

    def __init__(self, bundle: Path, threads: int | None) -> None:
        """Load the bundle."""
        import onnxruntime_genai as genai

        genai.disable_telemetry_events()
        self.genai = genai
        self.version = genai.__version__
        options = {
            "intra_op_num_threads": threads or os.cpu_count(),
            "log_severity_level": 3,
            "session.intra_op.allow_spinning": "0",  # as in onnxruntime.py
        }
        try:
            with without_links(bundle) as folder:
                config = genai.Config(str(folder))
                config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
                self.model = genai.Model(config)
                self.tokenizer = genai.Tokenizer(self.model)
        except Exception as error:  # its exceptions have no class in common
            raise_if_of_machine(error)
            raise StageError(
                Failure.RUNTIME_CRASHED,
                f"expected onnxruntime-genai to load {bundle}, found that it refuses (it says: "
                f"{one_line(error)}); export the variant again if a file is damaged, else take "
                "runtime onnxruntime",
            ) from error
        self.tokenizer.update_options(add_special_tokens="false", skip_special_tokens="false")

    def _generator(self, batch: int, length: int) -> "onnxruntime_genai.Generator":
        """Return `batch` empty sequences with room for `length` tokens each."""
        parameters = self.genai.GeneratorParams(self.model)
        parameters.set_search_options(batch_size=batch, max_length=length, do_sample=False)
        return self.genai.Generator(self.model, parameters)

    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        """Return log-probabilities (see Runtime)."""
        from scipy.special import log_softmax

        generator = self._generator(*tokens.shape)
        generator.append_tokens(np.ascontiguousarray(tokens, np.int32))
        return log_softmax(generator.get_output("logits"), axis=-1)

    def generate(self, prompt: list[int], max_new_tokens: int, stop: set[int]) -> list[int]:
        """Decode greedily (see Runtime)."""
        generator = self._generator(1, len(prompt) + max_new_tokens)
        # The library's own choice of the next token would end at the model's end token, also
        # where `stop` does not name it.
        generator.append_tokens(np.array(prompt, np.int32))

        def step(token: int) -> np.ndarray:
            generator.append_tokens(np.array([token], np.int32))
            return generator.get_logits()[0, -1]

        return decode_greedily(generator.get_logits()[0, -1], step, max_new_tokens, stop)

    def encode(self, text: str) -> list[int]:
        """Return token ids without special tokens around the text."""
        return self.tokenizer.encode(text).tolist()

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids."""
        return self.tokenizer.decode(np.array(ids, np.int32)) if ids else ""
