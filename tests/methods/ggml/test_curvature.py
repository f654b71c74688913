"""Curvature rounding within ggml's grids, against ggml's own rounding and plain references."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from quantline.config.recipes import parse_recipe
from quantline.errors import Failure, StageError
from quantline.methods.ggml.block_types import block_type, dequantize_blocks
from quantline.methods.ggml.blocks import Blocks, BlockType
from quantline.methods.ggml.curvature import (
    DAMPING_IN,
    KQuantCurvature,
    descend_codes,
    quantize_by_curvature,
)
from quantline.methods.ggml.quantize import quantize_blocks
from quantline.methods.ggml.scale_refit import refit_scales
from quantline.methods.integer.curvature import DAMPING_OUT, add_damping, divergence
from quantline.methods.method import LayerStatistics, load_method
from tests.helpers.ggml_layers import (
    TYPES,
    divergence_of_blocks,
    random_layer,
    random_torch_layer,
)


def ggmls_blocks(weight: torch.Tensor, known: BlockType) -> Blocks:
    """Return the blocks of ggml's own rounding without importance."""
    data = quantize_blocks(weight.numpy(), known.name)
    return known.unpack(data.reshape(-1, known.block_bytes))


@pytest.mark.parametrize("ggml_type", TYPES)
def test_quantize_by_curvature_leaves_far_less_divergence_than_ggml(ggml_type):
    weight, hessian, fisher_out = random_layer(1, blocks=2)
    ours, damping = quantize_by_curvature(weight, ggml_type, hessian, fisher_out)
    theirs = quantize_blocks(weight, ggml_type, np.diagonal(hessian))
    assert ours.shape == theirs.shape
    assert ours.dtype == np.uint8
    assert damping == 0.01
    values = []
    for blocks in (ours, theirs):
        stored = quants.dequantize(blocks, GGMLQuantizationType[ggml_type])
        difference = torch.from_numpy(stored - weight)
        values.append(
            divergence(difference, torch.from_numpy(hessian), torch.from_numpy(fisher_out))
        )
    assert 0 < values[0] < 0.7 * values[1]
    expected = quants.dequantize(ours, GGMLQuantizationType[ggml_type])
    assert np.array_equal(dequantize_blocks(ours, ggml_type), expected)


@given(st.integers(0, 10_000), st.sampled_from(TYPES))
@settings(max_examples=20, deadline=None)
def test_refit_scales_and_descend_codes_never_raise_the_divergence(seed, ggml_type):
    known = block_type(ggml_type)
    weight, hessian, fisher_out = random_torch_layer(seed, 4, 256)
    inputs = add_damping(hessian, DAMPING_IN)
    outputs = add_damping(fisher_out, DAMPING_OUT)
    blocks = ggmls_blocks(weight, known)
    before = divergence_of_blocks(blocks, known, weight, inputs, outputs)
    refitted = refit_scales(weight, known, blocks, inputs, outputs)
    between = divergence_of_blocks(refitted, known, weight, inputs, outputs)
    moved = descend_codes(weight, known, refitted, inputs, outputs)
    after = divergence_of_blocks(moved, known, weight, inputs, outputs)
    assert between <= before * (1 + 1e-5)
    assert after <= between * (1 + 1e-5)


def neighbours(known: BlockType, blocks: Blocks) -> list[Blocks]:
    """Return all blocks that differ by one step in one code, one scale or one minimum."""
    least_scale, largest_scale = known.scale_range or (1, 1)
    ranges = [
        (known.lowest_code, len(known.levels) - 1),
        (least_scale, largest_scale),
        (0, known.largest_minimum or 0),
    ]
    found = []
    for number, (least, most) in enumerate(ranges):
        if least == most:
            continue
        values = blocks.fields()[number]
        for index in np.ndindex(values.shape):
            for step in (-1, 1):
                moved = int(values[index]) + step
                if not least <= moved <= most:
                    continue
                fields = list(blocks.fields())
                fields[number] = values.copy()
                fields[number][index] = moved
                found.append(Blocks(*fields))
    return found


@pytest.mark.parametrize("ggml_type", TYPES)
def test_descend_codes_and_refit_scales_end_where_no_single_move_helps(ggml_type):
    """Every move that the format can store, tried one by one."""
    known = block_type(ggml_type)
    weight, hessian, fisher_out = random_torch_layer(2, 2, known.block_size)
    blocks = ggmls_blocks(weight, known)
    for _ in range(40):
        blocks = refit_scales(weight, known, blocks, hessian, fisher_out)
        blocks = descend_codes(weight, known, blocks, hessian, fisher_out)
    least = divergence_of_blocks(blocks, known, weight, hessian, fisher_out)
    moved = neighbours(known, blocks)
    assert len(moved) > weight.numel()
    for other in moved:
        value = divergence_of_blocks(other, known, weight, hessian, fisher_out)
        assert value >= least * (1 - 1e-3)


@pytest.mark.parametrize("ggml_type", TYPES)
def test_quantize_by_curvature_bears_zeros_and_inputs_without_data(ggml_type):
    weight, hessian, fisher_out = random_layer(4)
    weight[0] = 0
    weight[1, :300] = 0
    hessian[7] = 0
    hessian[:, 7] = 0
    blocks, _ = quantize_by_curvature(weight, ggml_type, hessian, fisher_out)
    assert np.isfinite(dequantize_blocks(blocks, ggml_type)).all()


def test_quantize_by_curvature_does_not_depend_on_threads():
    weight, hessian, fisher_out = random_layer(5, 12, 512, 3)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            results.append(quantize_by_curvature(weight, "Q4_K", hessian, fisher_out)[0])
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(results[0], results[1])


def test_quantize_by_curvature_refuses_what_cannot_be_rounded():
    weight, hessian, fisher_out = random_layer(6)
    with pytest.raises(StageError, match="calibrate on more text") as caught:
        quantize_by_curvature(weight, "Q4_K", -hessian, fisher_out)
    assert caught.value.failure == Failure.HESSIAN_NOT_POSITIVE_DEFINITE
    weight[0, 0] = np.nan
    with pytest.raises(StageError, match="not finite") as caught:
        quantize_by_curvature(weight, "Q4_K", hessian, fisher_out)
    assert caught.value.failure == Failure.NON_FINITE


def kquant_curvature(**options) -> KQuantCurvature:
    recipe = {"method": "kquant-curvature", "mix": "Q4_K_M", **options}
    method = load_method(parse_recipe(recipe))
    assert type(method) is KQuantCurvature
    return method


def test_kquant_curvature_uses_the_recipes_rounds_and_damping():
    weight, hessian, fisher_out = random_layer(9)
    statistics = LayerStatistics("layer", torch.from_numpy(hessian), torch.from_numpy(fisher_out))
    importance = np.diagonal(hessian)
    method = kquant_curvature(rounds=1, damping=0.1)
    blocks, extra = method.quantize(weight, "Q4_K", importance, statistics)
    expected, _ = quantize_by_curvature(weight, "Q4_K", hessian, fisher_out, 0.1, 1)
    assert np.array_equal(blocks, expected)
    assert extra == {"damping": 0.1}
    preview = method.preview(weight, "Q4_K", importance, statistics)
    expected, _ = quantize_by_curvature(weight, "Q4_K", hessian, fisher_out, 0.1, rounds=0)
    assert np.array_equal(preview, expected)
    assert not np.array_equal(preview, blocks)
    assert method.preview_rounding == "ggml, with gptq's error feedback in the blocks"


def test_kquant_curvature_leaves_tensors_without_statistics_to_ggml():
    weight, hessian, _ = random_layer(10)
    importance = np.diagonal(hessian)
    method = kquant_curvature()
    expected = quantize_blocks(weight, "Q4_K", importance)
    blocks, extra = method.quantize(weight, "Q4_K", importance, None)
    assert np.array_equal(blocks, expected)
    assert extra == {}
    assert np.array_equal(method.preview(weight, "Q4_K", importance, None), expected)


@pytest.mark.parametrize("scaling", [True, False])
def test_kquant_curvature_scales_inputs_if_the_recipe_wants_it(scaling):
    assert kquant_curvature(scaling=scaling).scales_inputs == scaling
