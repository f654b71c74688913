"""vLLM's adapter, held against a stand-in that takes only what vLLM 0.33 takes and answers in its containers."""

import sys
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np
import pytest

from quantline.runtimes.runtime import open_runtime
from quantline.errors import StageError

SIZE = 32


def row(context: list[int]) -> np.ndarray:
    """The stand-in's log-probabilities of the token after these, which depend on all of them."""
    logits = np.random.default_rng([len(context), *context]).normal(size=SIZE)
    return (logits - np.log(np.exp(logits).sum())).astype(np.float32)


# The stand-in: names, defaults and rules as in vllm/entrypoints/llm.py, sampling_params.py, outputs.py and logprobs.py.
@dataclass
class SamplingParams:
    temperature: float = 1.0
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    flat_logprobs: bool = False
    detokenize: bool = True


@dataclass
class FlatLogprobs:
    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def append(self, values: np.ndarray | None, token: int = 0) -> None:
        """The token itself, then all by rank; nothing for the first token of a prompt."""
        self.start_indices.append(len(self.logprobs))
        if values is not None:
            ids = [token, *np.argsort(-values).tolist()]
            self.token_ids += ids
            self.logprobs += values[ids].tolist()
        self.end_indices.append(len(self.logprobs))


@dataclass
class CompletionOutput:
    token_ids: list[int]
    logprobs: FlatLogprobs | None


@dataclass
class RequestOutput:
    prompt_logprobs: FlatLogprobs | None
    outputs: list[CompletionOutput]


class Tokenizer:
    def encode(self, text, add_special_tokens=True):
        return [0] * add_special_tokens + [ord(one) % SIZE for one in text]

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(97 + one) for one in ids if one or not skip_special_tokens)


class LLM:
    def __init__(self, model: str, *, trust_remote_code=False, seed=0, max_logprobs=20, enable_prefix_caching=True,
                 generation_config="auto", disable_log_stats=False):
        if "broken" in model:
            raise ValueError("no kernel for this layout")
        assert not trust_remote_code and not enable_prefix_caching and generation_config == "vllm"
        self.most = SIZE if max_logprobs == -1 else max_logprobs

    def get_tokenizer(self):
        return Tokenizer()

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        assert sampling_params.temperature == 0 and sampling_params.ignore_eos and not use_tqdm
        for asked in (sampling_params.logprobs, sampling_params.prompt_logprobs):
            assert asked is None or (SIZE if asked == -1 else asked) <= self.most
        return [self._answer(list(prompt["prompt_token_ids"]), sampling_params) for prompt in prompts]

    def _answer(self, prompt, asked):
        assert asked.flat_logprobs or asked.logprobs is None
        told = FlatLogprobs()
        told.append(None)
        for place in range(1, len(prompt)):
            told.append(row(prompt[:place]), prompt[place])
        ids, sampled = [], FlatLogprobs()
        while len(ids) < asked.max_tokens and not (ids and ids[-1] in (asked.stop_token_ids or [])):
            values = row(prompt + ids)
            ids.append(int(values.argmax()))
            sampled.append(values, ids[-1])
        return RequestOutput(told if asked.prompt_logprobs is not None else None,
                             [CompletionOutput(ids, sampled if asked.logprobs is not None else None)])


@pytest.fixture
def stand_in(monkeypatch):
    made, inputs = ModuleType("vllm"), ModuleType("vllm.inputs")
    made.LLM, made.SamplingParams, made.__version__, made.inputs = LLM, SamplingParams, "0.33.0", inputs
    inputs.TokensPrompt = dict
    monkeypatch.setitem(sys.modules, "vllm", made)
    monkeypatch.setitem(sys.modules, "vllm.inputs", inputs)
    monkeypatch.delitem(sys.modules, "quantline.runtimes.vllm", raising=False)
    yield
    sys.modules.pop("quantline.runtimes.vllm", None)


def test_every_position_has_the_whole_distribution_of_the_token_after_it(stand_in, tmp_path):
    tokens = np.array([[1, 2, 3, 4], [6, 5, 0, 1]], np.int32)
    found = open_runtime("vllm", tmp_path).logprobs(tokens)
    assert found.dtype == np.float32 and found.shape == (2, 4, SIZE)
    for sequence, values in zip(tokens.tolist(), found, strict=True):
        assert np.array_equal(values, [row(sequence[:place + 1]) for place in range(4)])
    assert np.array_equal(open_runtime("vllm", tmp_path).logprobs(tokens[:, :1])[0, 0], row([1]))


def test_generation_is_greedy_and_ends_before_a_stop(stand_in, tmp_path):
    engine, wanted = open_runtime("vllm", tmp_path), [1, 2]
    for _ in range(9):
        wanted.append(int(row(wanted).argmax()))
    assert engine.generate([1, 2], 9, set()) == wanted[2:]
    stop = wanted[6]
    assert engine.generate([1, 2], 9, {stop}) == wanted[2:2 + wanted[2:].index(stop)]


def test_text_is_taken_without_special_tokens(stand_in, tmp_path):
    engine = open_runtime("vllm", tmp_path)
    assert engine.encode("ab") == [ord("a") % SIZE, ord("b") % SIZE] and engine.decode([0, 1]) == "ab"


def test_a_bundle_that_vllm_refuses_is_a_named_failure(stand_in, tmp_path):
    with pytest.raises(StageError, match="vLLM cannot load .*no kernel for this layout") as error:
        open_runtime("vllm", tmp_path / "broken")
    assert error.value.failure == "runtime_crashed"


@pytest.mark.parametrize(("name", "module", "how"), [
    ("vllm", "vllm", "requirements-vllm.txt"), ("onnxruntime-genai", "onnxruntime_genai", r"pip install 'quantline\[genai\]'")])
def test_where_it_is_not_installed_the_error_says_how(monkeypatch, tmp_path, name, module, how):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"quantline.runtimes.{module}", raising=False)
    with pytest.raises(StageError, match=f"expected {name}, and cannot import it: .*install it: .*{how}") as error:
        open_runtime(name, tmp_path)
    assert error.value.failure == "runtime_unavailable"
