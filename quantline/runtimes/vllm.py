"""vLLM on a GPU, for safetensors in any layout. Untested on hardware: written against vLLM 0.33.

vLLM pins its own torch and transformers, so it needs an environment of its own, which
`evaluation.pythons` names.
"""

import contextlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from quantline.causes import raise_if_of_machine
from quantline.config.runtimes import RuntimeInfo, register_runtime
from quantline.errors import Failure, StageError

register_runtime(
    RuntimeInfo(
        name="vllm",
        engine="quantline.runtimes.vllm:Engine",
        modules=("vllm", "vllm.inputs"),
        formats=("safetensors",),
        install="make an environment of its own from requirements-vllm.txt, and name it in "
        "evaluation.pythons.vllm",
        kv_bytes=2,
        server="quantline.runtimes.servers:vllm_server",
    )
)


class Engine:
    """A safetensors bundle, computed with vLLM's kernels in the bundle's own number type.

    Raises:
        StageError: runtime_crashed, if vLLM refuses the bundle.
    """

    name = "vllm"
    device = "cuda"

    def __init__(self, bundle: Path, threads: int | None) -> None:
        """Load the folder; vLLM chooses its own threads."""
        import vllm

        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        self.vllm = vllm
        self.version = vllm.__version__
        try:
            self.model = vllm.LLM(
                model=str(bundle),
                trust_remote_code=False,
                seed=0,
                max_logprobs=-1,
                enable_prefix_caching=False,
                generation_config="vllm",
                disable_log_stats=True,
            )
        except Exception as error:  # vLLM's, torch's, CUDA's
            raise_if_of_machine(error)
            raise StageError(
                Failure.RUNTIME_CRASHED,
                f"vLLM cannot load {bundle}: {type(error).__name__}: {error}; look whether it has "
                "kernels for this layout",
            ) from error
        self.tokenizer = self.model.get_tokenizer()

    def _run(self, prompts: list[list[int]], **settings: Any) -> list[Any]:
        """Return vLLM's outputs of greedy decoding, in the order of the prompts."""
        from vllm.inputs import TokensPrompt

        parameters = self.vllm.SamplingParams(
            temperature=0.0, ignore_eos=True, detokenize=False, **settings
        )
        tokens = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        return self.model.generate(tokens, parameters, use_tqdm=False)

    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        """Return log-probabilities (see Runtime)."""
        logprobs = None
        for row, sequence in enumerate(tokens.tolist()):  # vLLM hands over Python lists
            (output,) = self._run(
                [sequence], max_tokens=1, prompt_logprobs=-1, logprobs=-1, flat_logprobs=True
            )
            # The first token has no log-probability; the generated one gives those after the last.
            entries = [(output.prompt_logprobs, index) for index in range(1, len(sequence))]
            entries.append((output.outputs[0].logprobs, 0))
            for position, (flat, index) in enumerate(entries):
                ids, values = _entries_at(flat, index)
                if logprobs is None:
                    shape = (*tokens.shape, max(ids) + 1)
                    logprobs = np.full(shape, -np.inf, np.float32)
                logprobs[row, position, ids] = values
        assert logprobs is not None, "no tokens"
        return logprobs

    def generate(self, prompt: list[int], max_new_tokens: int, stop: set[int]) -> list[int]:
        """Decode greedily (see Runtime)."""
        (output,) = self._run([prompt], max_tokens=max_new_tokens, stop_token_ids=sorted(stop))
        ids = list(output.outputs[0].token_ids)
        with contextlib.suppress(StopIteration):  # the token that stopped it is among them
            return ids[: next(index for index, token in enumerate(ids) if token in stop)]
        return ids

    def encode(self, text: str) -> list[int]:
        """Return token ids without special tokens around the text."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def _entries_at(flat: Any, index: int) -> tuple[list[int], list[float]]:
    """Return token ids and log-probabilities of one entry of vLLM's FlatLogprobs."""
    part = slice(flat.start_indices[index], flat.end_indices[index])
    return flat.token_ids[part], flat.logprobs[part]
