"""Scaling the inputs of a block: what is folded into what, and what is taken back."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from quantline.config.recipes import parse_recipe
from quantline.errors import Failure, StageError
from quantline.methods.integer.awq import Awq
from quantline.methods.method import InputScales
from quantline.model.architecture import Architecture
from quantline.model.checkpoint import Checkpoint
from quantline.model.family import InputGroup
from quantline.quantized.store import QuantizedWriter
from quantline.recipes.context import QuantizationContext
from quantline.recipes.input_scaling import (
    BlockScales,
    divided_tensors,
    quantize_block,
    search_block_scales,
)
from tests.helpers.calibrated import calibrate_into
from tests.helpers.quantized import tokens_of

AWQ = {"method": "awq", "bits": 3, "group_size": 32, "symmetric": False}


def context(folder, model, **options) -> QuantizationContext:
    checkpoint = Checkpoint(model)
    calibration = calibrate_into(folder / "calibration", checkpoint, tokens_of(checkpoint))
    recipe = parse_recipe(AWQ | options)
    return QuantizationContext(
        recipe, checkpoint, checkpoint.arch, calibration, QuantizedWriter(folder)
    )


@pytest.fixture(scope="module")
def dense(tmp_path_factory, tiny_narrow) -> QuantizationContext:
    """All four inputs of its blocks can be scaled."""
    return context(tmp_path_factory.mktemp("dense"), tiny_narrow, group_size=-1)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory, make_model) -> QuantizationContext:
    """Its experts' up has no scales of its own."""
    folder = tmp_path_factory.mktemp("mixture")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_local_experts": 4}
    model = make_model(
        folder / "model", "mixtral", num_hidden_layers=1, tie_word_embeddings=False, **sizes
    )
    return context(folder, model)


def test_block_scales_unfold_takes_back_what_fold_did():
    weights = {"up": torch.ones(3, 2), "down": torch.ones(2, 3)}
    block = BlockScales(weights)
    scales = torch.tensor([1.0, 2.0, 4.0])
    block.fold("norm", ("up",), torch.tensor([2.0, 3.0]), 0.5)
    block.fold("up", ("down",), scales, 1.0)
    assert torch.equal(block.row_divisors["up"], scales) and torch.equal(
        block.input_scales["down"], scales
    )
    block.unfold("up")
    assert list(block.folded) == ["norm"]
    assert torch.equal(block.row_divisors["up"], torch.ones(3))
    assert torch.equal(block.input_scales["down"], torch.ones(3))
    assert torch.equal(block.input_scales["up"], torch.tensor([2.0, 3.0]))


def test_search_block_scales_unscales_what_a_layer_cannot_bear(dense, monkeypatch):
    search = Awq.search_scales

    def refuse_divided_up(self, shared, divisors):
        gate_and_up = len(shared.weights) == 2
        if gate_and_up and divisors is not None:
            assert not torch.equal(divisors[1], torch.ones_like(divisors[1]))
            return None
        if not gate_and_up:
            ones = torch.ones_like(shared.weights[0][0])
            return InputScales(2 * ones, 1.0)
        return search(self, shared, divisors)

    monkeypatch.setattr(Awq, "search_scales", refuse_divided_up)
    groups = dense.arch.input_groups(0)
    block = search_block_scales(dense, groups)
    prefix = dense.arch.prefix(0)
    down = f"{prefix}mlp.down_proj"
    up = f"{prefix}mlp.up_proj"
    assert up not in block.folded
    assert torch.equal(block.input_scales[down], torch.ones_like(block.input_scales[down]))
    assert torch.equal(block.row_divisors[up], torch.ones_like(block.row_divisors[up]))
    value = f"{prefix}self_attn.v_proj"
    assert block.folded[value] == ((f"{prefix}self_attn.o_proj",), 1.0)


def test_search_block_scales_divides_an_experts_up_by_powers_of_two(mixture):
    groups = mixture.arch.input_groups(0)
    block = search_block_scales(mixture, groups)
    experts = [name for name in block.folded if ".experts." in name]
    assert len(experts) == 4
    for name in experts:
        exponents = block.row_divisors[name].log2()
        assert torch.equal(exponents, exponents.round())


def test_quantize_block_tells_of_powers_of_two_and_keeps_the_rest_of_the_steps(mixture):
    report = quantize_block(mixture, 0)
    steps = {step["into"]: step for step in report["transforms"]}
    experts = {name for name in steps if ".experts." in name}
    assert len(experts) == 4 and len(steps) > len(experts)
    for name, step in steps.items():
        assert step["step"] == "fold_scales" and set(step["of"]) <= set(report["layers"])
        assert step.get("powers_of_two", False) == (name in experts)
        assert 0 <= step["reach"] <= 1


def test_divided_tensors_make_up_for_the_scales_with_a_norms_offset(dense):
    norm = f"{dense.arch.prefix(0)}input_layernorm"
    scales = np.linspace(0.5, 2, 64, dtype=np.float32)
    weight = dense.source.tensor(f"{norm}.weight")
    tensors = divided_tensors(dense.source, norm, scales, 0.0)
    assert list(tensors) == [f"{norm}.weight"]
    assert np.array_equal(tensors[f"{norm}.weight"], weight / scales)
    values = divided_tensors(dense.source, norm, scales, 1.0)[f"{norm}.weight"]
    assert np.allclose((1 + values) * scales, 1 + weight, rtol=1e-5)
    assert not divided_tensors(dense.source, norm, scales, None)  # and there is no bias


def without_folding(ctx: QuantizationContext) -> QuantizationContext:
    """Return a context whose family knows of nothing that scales can be folded into."""
    family = ctx.arch.family
    inputs = tuple(InputGroup(group.linears) for group in family.block.inputs)
    family = replace(family, block=replace(family.block, inputs=inputs))
    return replace(ctx, arch=replace(ctx.arch, family=family))


def test_quantize_block_refuses_a_family_that_scales_can_be_folded_nowhere(dense):
    with pytest.raises(StageError, match="which awq needs, and found none; take gptq") as caught:
        quantize_block(without_folding(dense), 0)
    assert caught.value.failure == Failure.UNSUPPORTED_ARCHITECTURE


def test_quantize_block_rounds_a_block_without_scales_if_others_have_some(dense, monkeypatch):
    """And says why: blocks of one model may be unlike each other."""
    found = Architecture.input_groups

    def groups_of(arch, layer):
        groups = found(arch, layer)
        if layer:
            return groups
        return [InputGroup(group.linears, reason="its norm has no weight") for group in groups]

    monkeypatch.setattr(Architecture, "input_groups", groups_of)
    report = quantize_block(dense, 0)
    assert report["transforms"] == []
    assert set(report["layers"]) == set(dense.arch.linears_of(0))
    for layer in report["layers"].values():
        assert layer["unscaled"] == "its norm has no weight"
        assert layer["error"] <= layer["rtn_error"]
