"""vLLM's adapter, against a stand-in that takes and gives only what vLLM 0.33 does."""

import sys
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np
import pytest

from quantline.errors import StageError
from quantline.runtimes.runtime import open_runtime

SIZE = 32


def logprobs_after(context: list[int]) -> np.ndarray:
    """Return the stand-in's log-probabilities of the next token, which depend on all before."""
    logits = np.random.default_rng([len(context), *context]).normal(size=SIZE)
    return (logits - np.log(np.exp(logits).sum())).astype(np.float32)


# The stand-in: names, defaults and rules as in vllm/entrypoints/llm.py, sampling_params.py,
# outputs.py and logprobs.py.
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
        """Add the token itself, then all by rank; nothing for the first token of a prompt."""
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
        return [0] * add_special_tokens + [ord(character) % SIZE for character in text]

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(97 + token) for token in ids if token or not skip_special_tokens)


class LLM:
    def __init__(
        self,
        model: str,
        *,
        trust_remote_code=False,
        seed=0,
        max_logprobs=20,
        enable_prefix_caching=True,
        generation_config="auto",
        disable_log_stats=False,
    ):
        if "broken" in model:
            raise ValueError("no kernel for this layout")
        assert not trust_remote_code
        assert not enable_prefix_caching
        assert generation_config == "vllm"
        self.most = SIZE if max_logprobs == -1 else max_logprobs

    def get_tokenizer(self):
        return Tokenizer()

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        assert sampling_params.temperature == 0
        assert sampling_params.ignore_eos
        assert not use_tqdm
        for count in (sampling_params.logprobs, sampling_params.prompt_logprobs):
            assert count is None or (SIZE if count == -1 else count) <= self.most
        return [
            self._answer(list(prompt["prompt_token_ids"]), sampling_params) for prompt in prompts
        ]

    def _answer(self, prompt, parameters):
        assert parameters.flat_logprobs or parameters.logprobs is None
        of_prompt = FlatLogprobs()
        of_prompt.append(None)
        for position in range(1, len(prompt)):
            of_prompt.append(logprobs_after(prompt[:position]), prompt[position])
        ids = []
        of_answer = FlatLogprobs()
        stops = parameters.stop_token_ids or []
        while len(ids) < parameters.max_tokens and not (ids and ids[-1] in stops):
            values = logprobs_after(prompt + ids)
            ids.append(int(values.argmax()))
            of_answer.append(values, ids[-1])
        output = CompletionOutput(ids, None if parameters.logprobs is None else of_answer)
        return RequestOutput(None if parameters.prompt_logprobs is None else of_prompt, [output])


@pytest.fixture
def stand_in(monkeypatch):
    """The stand-in in vLLM's place."""
    vllm = ModuleType("vllm")
    inputs = ModuleType("vllm.inputs")
    vllm.LLM = LLM
    vllm.SamplingParams = SamplingParams
    vllm.__version__ = "0.33.0"
    vllm.inputs = inputs
    inputs.TokensPrompt = dict
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.inputs", inputs)


def test_logprobs_has_the_whole_distribution_after_every_token(stand_in, tmp_path):
    tokens = np.array([[1, 2, 3, 4], [6, 5, 0, 1]], np.int32)
    engine = open_runtime("vllm", tmp_path)
    found = engine.logprobs(tokens)
    assert found.dtype == np.float32
    assert found.shape == (2, 4, SIZE)
    for sequence, values in zip(tokens.tolist(), found, strict=True):
        expected = [logprobs_after(sequence[: position + 1]) for position in range(4)]
        assert np.array_equal(values, expected)
    first = open_runtime("vllm", tmp_path).logprobs(tokens[:, :1])
    assert np.array_equal(first[0, 0], logprobs_after([1]))


def test_generate_is_greedy_and_ends_before_a_stop(stand_in, tmp_path):
    engine = open_runtime("vllm", tmp_path)
    prompt = [1, 2]
    expected = []
    for _ in range(9):
        expected.append(int(logprobs_after(prompt + expected).argmax()))
    assert engine.generate(prompt, 9, set()) == expected
    stop = expected[4]
    assert engine.generate(prompt, 9, {stop}) == expected[: expected.index(stop)]


def test_encode_takes_text_without_special_tokens(stand_in, tmp_path):
    engine = open_runtime("vllm", tmp_path)
    assert engine.encode("ab") == [ord("a") % SIZE, ord("b") % SIZE]
    assert engine.decode([0, 1]) == "ab"


def test_engine_names_a_bundle_that_vllm_refuses(stand_in, tmp_path):
    words = r"vLLM cannot load .*no kernel for this layout"
    with pytest.raises(StageError, match=words) as caught:
        open_runtime("vllm", tmp_path / "broken")
    assert caught.value.failure == "runtime_crashed"


@pytest.mark.parametrize(
    ("name", "package", "advice"),
    [
        ("vllm", "vllm", r"requirements-vllm\.txt"),
        ("onnxruntime-genai", "onnxruntime_genai", r"pip install 'quantline\[genai\]'"),
    ],
)
def test_open_runtime_says_how_to_install_what_is_missing(
    monkeypatch, tmp_path, name, package, advice
):
    monkeypatch.setitem(sys.modules, package, None)
    words = rf"expected {name}, and cannot import it: .*install it: .*{advice}"
    with pytest.raises(StageError, match=words) as caught:
        open_runtime(name, tmp_path)
    assert caught.value.failure == "runtime_unavailable"
