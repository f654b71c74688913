"""Curvature rounding within ggml's grids, against ggml's own rounding and plain references."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from quantline.methods.ggml import curvature as kquant_curvature, quantize as kquant
from quantline.methods.integer.curvature import DAMPING_OUT, damped, divergence
from quantline.methods.ggml.block_types import Blocks, block_type, dequantize
from quantline.methods.integer.gptq import inverse_factor
from quantline.methods.ggml.curvature import DAMPING_IN, descend_codes, feed_back, round_block
from quantline.methods.ggml.scale_refit import half, refit
from quantline.errors import Failure, StageError

TYPES = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


def layer(seed: int, rows: int = 8, width: int = 512, blocks: int = 1):
    """weight [rows, width], H and G, float32: correlated as those of a model are."""
    draw = np.random.default_rng(seed)

    def factor(size: int) -> np.ndarray:
        mixed = draw.normal(size=(3 * size, size)) @ (np.eye(size) + draw.normal(size=(size, size)) / size**0.5)
        return (mixed.T @ mixed / len(mixed)).astype(np.float32)

    weight = draw.normal(size=(rows, width)) * np.exp(0.3 * draw.normal(size=(rows, width // 32))).repeat(32, 1)
    return weight.astype(np.float32), factor(width), np.stack([factor(rows // blocks) for _ in range(blocks)])


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(one) for one in arrays]


def figure(blocks: Blocks, kind, weight, moment, factors) -> float:
    return divergence(torch.from_numpy(kind.dequantize(blocks)).reshape(weight.shape) - weight, moment, factors)


@pytest.mark.parametrize("kind", TYPES)
def test_the_divergence_is_far_below_that_of_ggmls_own_rounding(kind):
    weight, moment, factors = layer(1, blocks=2)
    ours, damping = kquant_curvature.quantize(weight, kind, moment, factors)
    theirs = kquant.quantize(weight, kind, np.diagonal(moment))
    assert ours.shape == theirs.shape and ours.dtype == np.uint8 and damping == 0.01
    found = [divergence(*tensors(quants.dequantize(one, GGMLQuantizationType[kind]) - weight, moment, factors))
             for one in (ours, theirs)]
    assert 0 < found[0] < 0.7 * found[1]
    assert np.array_equal(dequantize(ours, kind), quants.dequantize(ours, GGMLQuantizationType[kind]))


@given(st.integers(0, 10_000), st.sampled_from(TYPES))
@settings(max_examples=20, deadline=None)
def test_neither_scales_nor_codes_raise_the_figure(seed, kind):
    one, (weight, moment, factors) = block_type(kind), tensors(*layer(seed, 4, 256))
    inner, outer = damped(moment, DAMPING_IN), damped(factors, DAMPING_OUT)
    blocks = one.unpack(kquant.quantize(weight.numpy(), kind).reshape(-1, one.bytes))
    before = figure(blocks, one, weight, inner, outer)
    moved = refit(weight, one, blocks, inner, outer)
    between = figure(moved, one, weight, inner, outer)
    after = figure(descend_codes(weight, one, moved, inner, outer), one, weight, inner, outer)
    assert between <= before * (1 + 1e-5) and after <= between * (1 + 1e-5)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ4_XS"])
def test_the_scales_of_sub_blocks_hear_of_those_of_the_block(kind):
    """With d far off, one pass lowers the figure to nearly what ten do only if later moves start from those before."""
    one, (weight, moment, factors) = block_type(kind), tensors(*layer(7, 4, 512))
    blocks = one.unpack(kquant.quantize(weight.numpy(), kind).reshape(-1, one.bytes))
    blocks = Blocks(*blocks.parts()[:3], (blocks.d * np.float16(1.3)), blocks.dmin)
    first = moved = refit(weight, one, blocks, moment, factors)
    for _ in range(9):
        moved = refit(weight, one, moved, moment, factors)
    found = [figure(each, one, weight, moment, factors) for each in (blocks, first, moved)]
    assert found[1] - found[2] < 0.1 * (found[0] - found[2])


@pytest.mark.parametrize("kind", TYPES)
def test_after_many_rounds_no_code_and_no_scale_alone_helps(kind):
    """Every move that the format can store, tried one by one."""
    one, (weight, moment, factors) = block_type(kind), tensors(*layer(2, 2, one_block(kind)))
    blocks = one.unpack(kquant.quantize(weight.numpy(), kind).reshape(-1, one.bytes))
    for _ in range(40):
        blocks = descend_codes(weight, one, refit(weight, one, blocks, moment, factors), moment, factors)
    least = figure(blocks, one, weight, moment, factors)
    low = [one.lowest, *(one.scales or (1, 1))[:1], 0]
    high = [len(one.levels) - 1, *(one.scales or (1, 1))[1:], one.minima or 0]
    for part, (below, above) in enumerate(zip(low, high, strict=True)):
        values = blocks.parts()[part]
        if below == above or (part == 2 and not one.minima):
            continue
        for place in np.ndindex(values.shape):
            for move in (-1, 1):
                other = [values.copy() if at == part else kept for at, kept in enumerate(blocks.parts())]
                if below <= int(values[place]) + move <= above:
                    other[part][place] = int(values[place]) + move
                    assert figure(Blocks(*other), one, weight, moment, factors) >= least * (1 - 1e-3)


def one_block(kind: str) -> int:
    return block_type(kind).size


def test_error_feedback_is_gptqs(monkeypatch):
    """Column by column as in the paper's algorithm 1, in double, with the grid that ggml gives the updated weights."""
    one, (weight, moment) = block_type("Q4_K"), tensors(*layer(3)[:2])
    found, _ = feed_back(weight, one, moment, 0.01)
    upper, _ = inverse_factor(moment, 0.01)
    left, upper = weight.double().numpy().copy(), upper.double().numpy()
    codes = found.codes.reshape(weight.shape)
    for start in (0, 256):
        span = slice(start, start + 256)
        data = kquant.quantize(left[:, span].astype(np.float32), "Q4_K", np.diagonal(moment)[span])
        scale, minimum = (part.repeat(32, 1) for part in one.unpack(data).grid)
        for j in range(start, start + 256):
            s, m = scale[:, j - start], minimum[:, j - start]
            code = np.clip(np.rint((left[:, j] + m) / s), 0, 15)
            assert (code == codes[:, j]).mean() >= 7 / 8
            error = (left[:, j] - (s * codes[:, j] - m)) / upper[j, j]  # go on with ours, so that ties do not spread
            left[:, j + 1:] -= np.outer(error, upper[j, j + 1:])


def test_a_code_without_a_scale_stays_and_its_error_is_passed_on():
    one = block_type("Q3_K")
    weight = torch.from_numpy(np.zeros((1, 256), np.float32))
    blocks = one.unpack(kquant.quantize(weight.numpy(), "Q3_K").reshape(-1, one.bytes))
    found, errors = round_block(weight + 1, one, blocks, torch.eye(256))
    assert np.array_equal(found.codes, blocks.codes) and np.array_equal(errors, np.ones((1, 256)))


@pytest.mark.parametrize("kind", TYPES)
def test_zeros_and_inputs_that_are_never_seen(kind):
    weight, moment, factors = layer(4)
    weight[0], weight[1, :300] = 0, 0
    moment[7], moment[:, 7] = 0, 0
    back = dequantize(kquant_curvature.quantize(weight, kind, moment, factors)[0], kind)
    assert np.isfinite(back).all()


@given(st.floats(-70000, 70000, width=32) | st.floats(-(2.0**-13), 2.0**-13, width=32))
def test_halves_are_numpys(value):
    with np.errstate(over="ignore"):
        assert np.float32(half(np.float32(value))) == np.float32(np.float16(value))


def test_threads_do_not_show_in_the_bytes():
    weight, moment, factors = layer(5, 12, 512, 3)
    threads, made = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            made.append(kquant_curvature.quantize(weight, "Q4_K", moment, factors)[0])
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(*made)


def test_what_cannot_be_rounded_is_refused():
    weight, moment, factors = layer(6)
    with pytest.raises(StageError, match="calibrate on more text") as caught:
        kquant_curvature.quantize(weight, "Q4_K", -moment, factors)
    assert caught.value.failure == Failure.HESSIAN_NOT_POSITIVE_DEFINITE
    weight[0, 0] = np.nan
    with pytest.raises(StageError, match="not finite") as caught:
        kquant_curvature.quantize(weight, "Q4_K", moment, factors)
    assert caught.value.failure == Failure.NON_FINITE
