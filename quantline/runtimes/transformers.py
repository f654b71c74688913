"""transformers in float32 (the GPTQ layout in float16, as its kernels want), on a GPU if any."""

import contextlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from quantline.config.runtimes import RuntimeInfo, register_runtime
from quantline.runtimes.continued_model import ContinuedModel, Read
from quantline.runtimes.runtime import (
    LogitChunk,
    chunks_by_cache,
    decode_greedily,
    sequences_by_cache,
)

register_runtime(
    RuntimeInfo(
        name="transformers",
        engine="quantline.runtimes.transformers:Engine",
        modules=(
            "torch",
            "transformers.models.auto.modeling_auto",
            "transformers.models.auto.tokenization_auto",
        ),
        formats=("safetensors",),
        install="pip install transformers",
        kv_bytes=2,
        server="quantline.runtimes.servers:vllm_server",
    )
)


class Engine:
    """A safetensors bundle. Quantized weights are expanded to floats for the computation.

    Attributes:
        helped: Why transformers alone did not load it; None if it did.

    Raises:
        StageError: As `load_model` does.
    """

    name = "transformers"

    def __init__(self, bundle: Path, threads: int | None) -> None:
        """Load the folder."""
        import torch
        import transformers

        from quantline.model.same_bits import same_bits

        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(threads or os.cpu_count() or 1)
        self.torch = torch
        self._same_bits = same_bits
        self.version = transformers.__version__
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        config = json.loads((bundle / "config.json").read_text(encoding="utf-8"))
        method = config.get("quantization_config", {}).get("quant_method")
        dtype = torch.float16 if method == "gptq" else torch.float32
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(
            bundle, trust_remote_code=False, local_files_only=True
        )
        # compressed-tensors' progress bars cannot be switched off, and its last one comes with
        # the first forward pass.
        with contextlib.redirect_stderr(io.StringIO()):
            self.model = self._load(bundle, dtype)
            self.logprobs(np.zeros((1, 1), np.int32))

    def _load(self, bundle: Path, dtype: Any) -> Any:
        """Return the model in its type, and keep whether transformers needed help."""
        from quantline.runtimes.load_model import load_model

        model, self.helped = load_model(bundle, dtype)
        for parameter in model.parameters():
            # Experts are expanded in the precision of their scales.
            if parameter.dtype == self.torch.bfloat16:
                parameter.data = parameter.data.to(dtype)
        return model.to(self.device).eval()

    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        """Return log-probabilities (see Runtime)."""
        torch = self.torch
        with torch.inference_mode(), self._same_bits():
            ids = torch.from_numpy(tokens.astype(np.int64)).to(self.device)
            logits = self.model(input_ids=ids, use_cache=False).logits
            return torch.log_softmax(logits.float(), -1).cpu().numpy()

    def sequences_at_once(self, length: int) -> int:
        """Return how many sequences of a length are run together (see DivisibleRuntime)."""
        return sequences_by_cache(length, self._vocabulary)

    @property
    def _vocabulary(self) -> int:
        return self.model.config.get_text_config().vocab_size

    def logit_chunks(self, tokens: np.ndarray, first: int, end: int) -> Iterator[LogitChunk]:
        """Yield logits chunk by chunk (see ChunkedRuntime)."""
        torch = self.torch
        continued = ContinuedModel(self.model)

        def run(ids: np.ndarray, read: Read | None) -> tuple[np.ndarray, Read]:
            following = torch.from_numpy(ids.astype(np.int64)).to(self.device)
            with torch.inference_mode(), self._same_bits():
                logits, read = continued.run(following, read)
                return logits.float().cpu().numpy(), read

        return chunks_by_cache(tokens, first, end, self._vocabulary, run)

    def generate(self, prompt: list[int], max_new_tokens: int, stop: set[int]) -> list[int]:
        """Decode greedily (see Runtime)."""
        torch = self.torch
        continued = ContinuedModel(self.model)
        read = None

        def run(ids: list[int]) -> np.ndarray:
            nonlocal read
            following = torch.tensor([ids], device=self.device)
            with torch.inference_mode():
                logits, read = continued.run(following, read, logits_to_keep=1)
            return logits[0, -1].float().cpu().numpy()

        return decode_greedily(run(prompt), lambda token: run([token]), max_new_tokens, stop)

    def encode(self, text: str) -> list[int]:
        """Return token ids without special tokens around the text."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode_whole(self, text: str) -> list[int]:
        """Return token ids with the special tokens around the text (see ServingRuntime)."""
        return self.tokenizer.encode(text)

    def stops_at(self, token: int) -> bool:
        """Whether the tokenizer or the model's generation ends a text with a token."""
        ends = self.model.generation_config.eos_token_id
        more = ends if isinstance(ends, list) else [ends]
        return token in (self.tokenizer.eos_token_id, *more)

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)
