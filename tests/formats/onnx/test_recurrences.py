"""Linear attention by one operator: what transformers' own loops compute, in torch and in ONNX."""

import io
import warnings

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from transformers.models.kimi_linear import modeling_kimi_linear
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.qwen3_next import modeling_qwen3_next

from quantline.formats.onnx import recurrences
from quantline.formats.onnx.recurrences import delta_rule, in_place_of_loops, mamba_1, mamba_2
from quantline.formats.onnx.symbolics import OPSET, registered

TEXTS = 2
HEADS = 4
WIDTH = 8


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def delta_inputs(tokens: int, per_channel: bool) -> dict[str, torch.Tensor]:
    shape = (TEXTS, tokens, HEADS)
    decay = draw(*shape, WIDTH) if per_channel else draw(*shape)
    return {
        "query": draw(*shape, WIDTH, seed=1),
        "key": draw(*shape, WIDTH, seed=2),
        "value": draw(*shape, 6),
        "g": -decay.abs(),
        "beta": draw(*shape, seed=3).sigmoid(),
        "initial_state": draw(TEXTS, HEADS, WIDTH, 6),
    }


def close(found, expected) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(torch.allclose(one, other, atol=1e-4, rtol=1e-4) for one, other in pairs)


@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize("per_channel", [False, True])
def test_delta_rule_is_what_the_models_compute(tokens, per_channel):
    own = modeling_qwen3_next.torch_chunk_gated_delta_rule
    if per_channel:
        own = modeling_kimi_linear.chunk_kimi_delta_attention
    inputs = delta_inputs(tokens, per_channel)
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    assert close(delta_rule(**inputs, **options), own(**inputs, **options))


@pytest.mark.parametrize("limits", [(0.0, float("inf")), (0.01, 0.5)])
def test_mamba_2_is_what_the_model_computes(limits):
    tokens = 19
    inputs = {
        "hidden_states": draw(TEXTS, tokens, HEADS, WIDTH),
        "dt": draw(TEXTS, tokens, HEADS),
        "A": -draw(HEADS).abs(),
        "B": draw(TEXTS, tokens, 2, 5, seed=1),
        "C": draw(TEXTS, tokens, 2, 5, seed=2),
        "chunk_size": 8,
        "D": draw(HEADS, seed=3),
        "dt_bias": draw(HEADS, seed=4),
        "initial_states": draw(TEXTS, HEADS, WIDTH, 5),
        "dt_softplus": True,
        "dt_limit": limits,
        "return_final_states": True,
    }
    assert close(mamba_2(**inputs), modeling_mamba2.mamba2_chunk_scan(**inputs))


def test_mamba_1_is_what_the_model_computes_and_goes_on_from_a_state():
    inputs = {
        "hidden_states": draw(TEXTS, 6, 9),
        "dt": draw(TEXTS, 6, 9, seed=1),
        "B": draw(TEXTS, 5, 9, seed=2),
        "C": draw(TEXTS, 5, 9, seed=3),
        "z": draw(TEXTS, 6, 9, seed=4),
    }
    rest = {"A": -draw(6, 5).abs(), "D": draw(6), "delta_bias": draw(6, seed=1)}
    rest |= {"delta_softplus": True, "return_last_state": True}
    own = modeling_mamba.mamba_selective_scan(**inputs, **rest)
    assert close(mamba_1(**inputs, **rest), own)
    first, state = mamba_1(**{name: one[..., :4] for name, one in inputs.items()}, **rest)
    later = {name: one[..., 4:] for name, one in inputs.items()}
    second, state = mamba_1(**later, **rest, initial_state=state)
    assert close((torch.cat((first, second), -1), state), own)


class _DeltaRule(nn.Module):
    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return delta_rule(*inputs, output_final_state=True)


@pytest.mark.parametrize("per_channel", [False, True])
def test_linear_attention_in_onnxruntime_is_that_of_torch(per_channel):
    names = list(delta_inputs(2, per_channel))
    axes = {name: {0: "batch", 1: "sequence"} for name in names[:-1]}
    file = io.BytesIO()
    with registered(), in_place_of_loops(nn.Identity()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _DeltaRule(),
            tuple(delta_inputs(3, per_channel).values()),
            file,
            input_names=names,
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,
            custom_opsets={"com.microsoft": 1},
        )
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    inputs = delta_inputs(17, per_channel)
    found = session.run(None, {name: one.numpy() for name, one in inputs.items()})
    expected = delta_rule(**inputs, output_final_state=True)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other.numpy(), rtol=1e-4, atol=1e-4)


def test_in_place_of_loops_puts_the_models_functions_back():
    model = nn.Sequential()
    model.append(type("Any", (nn.Module,), {"__module__": modeling_mamba2.__name__})())
    own = modeling_mamba2.mamba2_chunk_scan
    with in_place_of_loops(model):
        assert modeling_mamba2.mamba2_chunk_scan is recurrences.mamba_2
    assert modeling_mamba2.mamba2_chunk_scan is own
