"""transformers in float32 (the GPTQ layout in float16, the one its kernels take), on a GPU where there is one."""

import contextlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantline.runtimes.runtime import Piece, continued, greedy
from quantline.errors import Failure, StageError

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


class Engine:
    """A safetensors bundle. Quantized weights are expanded to float32 for the computation.

    Raises StageError: runtime_crashed if transformers does not find every weight (it would draw random ones),
    runtime_unavailable if the layout needs a package that is not installed.
    """

    name, version = "transformers", transformers.__version__

    def __init__(self, bundle: Path, threads: int | None) -> None:
        torch.set_num_threads(threads or os.cpu_count())
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        config = json.loads((bundle / "config.json").read_text(encoding="utf-8")).get("quantization_config", {})
        dtype = torch.float16 if config.get("quant_method") == "gptq" else torch.float32
        self.tokenizer = AutoTokenizer.from_pretrained(bundle, trust_remote_code=False, local_files_only=True)
        # compressed-tensors' progress bars cannot be switched off, and its last one comes with the first forward pass.
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                self.model, found = AutoModelForCausalLM.from_pretrained(
                    bundle, dtype=dtype, trust_remote_code=False, local_files_only=True, output_loading_info=True)
            except ImportError as error:  # the layouts gptq and awq need a package of their own
                raise StageError(Failure.RUNTIME_UNAVAILABLE, f"transformers cannot load this layout here: {error}; "
                                                              "install it: pip install 'quantline[gptqmodel]'") from None
            wrong = {kind: sorted(map(str, names)) for kind, names in found.items() if names}
            if wrong:
                raise StageError(Failure.RUNTIME_CRASHED, f"expected every weight of {bundle} to find its place in "
                                                          f"transformers, found {wrong}; export it again")
            for parameter in self.model.parameters():
                if parameter.dtype == torch.bfloat16:  # experts, which are expanded in the precision of their scales
                    parameter.data = parameter.data.to(dtype)
            self.model = self.model.to(self.device).eval()
            self.logprobs(np.zeros((1, 1), np.int32))

    @torch.inference_mode()
    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        ids = torch.from_numpy(tokens.astype(np.int64)).to(self.device)
        logits = self.model(input_ids=ids, use_cache=False).logits
        return torch.log_softmax(logits.float(), -1).cpu().numpy()

    def pieces(self, tokens: np.ndarray, first: int, end: int) -> Iterator[Piece]:
        @torch.inference_mode()
        def run(ids: np.ndarray, cache: object) -> tuple[np.ndarray, object]:
            out = self.model(input_ids=torch.from_numpy(ids.astype(np.int64)).to(self.device), past_key_values=cache,
                             use_cache=True)
            return out.logits.float().cpu().numpy(), out.past_key_values

        return continued(tokens, first, end, self.model.config.get_text_config().vocab_size, run)

    @torch.inference_mode()
    def generate(self, prompt: list[int], max_new_tokens: int, stop: set[int]) -> list[int]:
        cache = None

        def run(ids: list[int]) -> np.ndarray:
            nonlocal cache
            out = self.model(input_ids=torch.tensor([ids], device=self.device), past_key_values=cache,
                             use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            return out.logits[0, -1].float().cpu().numpy()

        return greedy(run(prompt), lambda token: run([token]), max_new_tokens, stop)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)
