"""Kinds of quantized weights: what they stand for, and what they refuse to hold."""

import ml_dtypes
import numpy as np
import pytest

from quantline.errors import StageError
from quantline.quantized.storages import STORAGES
from quantline.quantized.tensors import FloatLinear, GroupedLinear
from quantline.registry import load_object
from tests.helpers.random_weights import random_float8, random_grouped


@pytest.mark.parametrize(("row", "column"), [(0, 0), (3, 31), (3, 32), (5, 63)])
def test_grouped_linear_stands_for_integers_less_zeros_times_scales(row, column):
    linear = random_grouped()
    group = column // 32
    step = float(linear.integers[row, column]) - linear.zeros[row, group]
    expected = np.float32(step * linear.scales[row, group])
    assert linear.dequantize()[row, column] == expected


def test_grouped_linear_refuses_parts_that_do_not_fit():
    good = random_grouped()
    with pytest.raises(ValueError, match="bits"):
        GroupedLinear(good.integers, good.scales, good.zeros, 3, 32, False)
    with pytest.raises(ValueError, match="scales"):
        GroupedLinear(good.integers, good.scales[:, :1], good.zeros, 4, 32, False)
    with pytest.raises(StageError, match="finite"):
        GroupedLinear(good.integers, good.scales * np.nan, good.zeros, 4, 32, False)


def test_float_linear_refuses_what_is_not_finite():
    good = random_float8()
    broken = good.values.copy()
    broken[1, 2] = np.nan
    for values, scales in ((broken, good.scales), (good.values, good.scales * np.inf)):
        with pytest.raises(StageError, match="finite"):
            FloatLinear(values, scales)


@pytest.mark.parametrize("linear", [random_grouped(), random_float8()], ids=lambda it: it.storage)
def test_from_parts_restores_what_describe_and_parts_say(linear):
    assert load_object(STORAGES[linear.storage]) is type(linear)
    parts = linear.parts()
    assert all(part.dtype in (np.uint8, np.float32) for part in parts.values())
    restored = type(linear).from_parts(parts.__getitem__, linear.describe())
    assert np.array_equal(restored.dequantize(), linear.dequantize())
    assert (restored.kind, restored.scheme) == (linear.kind, linear.scheme)


def test_scheme_says_what_layers_of_one_layout_share():
    assert random_grouped().scheme == ("int4", False, 32, False)
    assert random_grouped(group_size=64).scheme == ("int4", False, 64, True)
    assert random_float8().scheme == ("float8", True, 64, True)
    assert random_float8().values.dtype == ml_dtypes.float8_e4m3fn
