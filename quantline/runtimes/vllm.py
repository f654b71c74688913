"""vLLM on a GPU, for safetensors in any layout. Untested on hardware: written against vLLM 0.33's interface.

vLLM pins its own torch and transformers, so it needs an environment of its own, which `evaluation.pythons` names.
"""

import contextlib
import os
from pathlib import Path

import numpy as np
import vllm
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

from quantline.errors import Failure, StageError


class Engine:
    """A safetensors bundle, computed with vLLM's kernels in the bundle's own type of numbers.

    Raises StageError(runtime_crashed) if vLLM refuses it.
    """

    name, version, device = "vllm", vllm.__version__, "cuda"

    def __init__(self, bundle: Path, threads: int | None) -> None:
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        try:
            self.model = LLM(model=str(bundle), trust_remote_code=False, seed=0, max_logprobs=-1,
                             enable_prefix_caching=False, generation_config="vllm", disable_log_stats=True)
        except Exception as error:  # vLLM's, torch's, CUDA's
            raise StageError(Failure.RUNTIME_CRASHED, f"vLLM cannot load {bundle}: {type(error).__name__}: {error}; "
                                                      "look whether it has kernels for this layout") from error
        self.tokenizer = self.model.get_tokenizer()

    def _run(self, prompts: list[list[int]], **settings) -> list:
        """vLLM's outputs of greedy decoding, in the order of the prompts."""
        parameters = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, **settings)
        given = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        return self.model.generate(given, parameters, use_tqdm=False)

    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        found = None
        for row, sequence in enumerate(tokens.tolist()):  # one at a time: vLLM hands over Python lists
            output, = self._run([sequence], max_tokens=1, prompt_logprobs=-1, logprobs=-1, flat_logprobs=True)
            after = [(output.prompt_logprobs, place) for place in range(1, len(sequence))]
            after.append((output.outputs[0].logprobs, 0))
            for place, (flat, position) in enumerate(after):
                ids, values = _at(flat, position)
                if found is None:
                    found = np.full((*tokens.shape, max(ids) + 1), -np.inf, np.float32)
                found[row, place, ids] = values
        return found

    def generate(self, prompt: list[int], max_new_tokens: int, stop: set[int]) -> list[int]:
        output, = self._run([prompt], max_tokens=max_new_tokens, stop_token_ids=sorted(stop))
        ids = list(output.outputs[0].token_ids)
        with contextlib.suppress(StopIteration):  # the token that stopped it is among them
            return ids[:next(place for place, token in enumerate(ids) if token in stop)]
        return ids

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def _at(flat, position: int) -> tuple[list[int], list[float]]:
    """Token ids and natural log-probabilities that a FlatLogprobs holds for a position (vllm/logprobs.py)."""
    part = slice(flat.start_indices[position], flat.end_indices[position])
    return flat.token_ids[part], flat.logprobs[part]
