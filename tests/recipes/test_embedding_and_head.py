"""The embedding and the output head in grouped integers."""

import numpy as np
import pytest

from quantline.calibration.store import CalibrationStore
from quantline.config.recipes import Recipe, parse_recipe
from quantline.model.checkpoint import Checkpoint
from quantline.quantized.store import QuantizedModel, QuantizedWriter
from quantline.recipes import embedding_and_head
from quantline.recipes.context import QuantizationContext
from tests.helpers.calibrated import calibrate_into
from tests.helpers.quantized import tokens_of

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
OPTIONS = {"bits": 3, "group_size": "auto", "symmetric": False}


@pytest.fixture(scope="module")
def tied(tmp_path_factory, tiny_model) -> tuple[Checkpoint, CalibrationStore]:
    checkpoint = Checkpoint(tiny_model)
    folder = tmp_path_factory.mktemp("tied") / "calibration"
    return checkpoint, calibrate_into(folder, checkpoint, tokens_of(checkpoint))


@pytest.fixture(scope="module")
def untied(tmp_path_factory, tiny_narrow) -> tuple[Checkpoint, CalibrationStore]:
    checkpoint = Checkpoint(tiny_narrow)
    folder = tmp_path_factory.mktemp("untied") / "calibration"
    return checkpoint, calibrate_into(folder, checkpoint, tokens_of(checkpoint))


def quantize(model, folder, method: str, **options) -> QuantizedModel:
    recipe: Recipe = parse_recipe({"method": method, **OPTIONS, **options})
    checkpoint, calibration = model
    folder.mkdir(exist_ok=True)
    writer = QuantizedWriter(folder)
    context = QuantizationContext(recipe, checkpoint, checkpoint.arch, calibration, writer)
    writer.close(embedding_and_head.quantize(context))
    return QuantizedModel(folder)


def test_quantize_rounds_a_tied_head_once_and_eight_bits_to_nearest(tied, tmp_path):
    quantized = quantize(tied, tmp_path, "gptq")
    assert quantized.linears == [] and quantized.outside == [EMBEDDING]
    linear = quantized.with_outside().linear(EMBEDDING)
    assert (linear.bits, linear.group_size, linear.symmetric) == (8, 32, True)
    weight = tied[0].tensor(f"{EMBEDDING}.weight")
    assert np.abs(linear.dequantize() - weight).max() <= 0.51 * linear.scales.max()
    report = quantized.report["outside"][EMBEDDING]
    assert (report["bits"], report["rounding"]) == (8, "nearest") and "error" not in report


def test_quantize_rounds_an_embedding_and_a_head_of_its_own(untied, tmp_path):
    quantized = quantize(untied, tmp_path, "rtn", scales="minmax")
    assert quantized.outside == [HEAD, EMBEDDING]


@pytest.mark.parametrize(
    ("method", "options"), [("gptq", {}), ("awq", {}), ("awq", {"rounding": "gptq"})]
)
@pytest.mark.parametrize("model", ["tied", "untied"])
def test_quantize_rounds_four_bits_by_the_method_never_worse_than_to_nearest(
    request, model, method, options, tmp_path
):
    given = request.getfixturevalue(model)
    quantized = quantize(given, tmp_path, method, embedding_bits=4, **options)
    for report in quantized.report["outside"].values():
        assert report["bits"] == 4
        assert 0 < report["error"] < report["rtn_error"]


def test_quantize_rounds_in_parts_as_at_once(tied, tmp_path, monkeypatch):
    whole = quantize(tied, tmp_path / "whole", "gptq", embedding_bits=4).with_outside()
    monkeypatch.setattr(embedding_and_head, "ROWS_AT_ONCE", 100)
    parts = quantize(tied, tmp_path / "parts", "gptq", embedding_bits=4).with_outside()
    expected = whole.linear(EMBEDDING)
    found = parts.linear(EMBEDDING)
    assert np.array_equal(found.integers, expected.integers)
    assert np.array_equal(found.scales, expected.scales)


def test_quantize_leaves_rows_that_no_group_size_divides(tied, tmp_path):
    quantized = quantize(tied, tmp_path, "gptq", group_size=-1)
    assert quantized.outside == [] and quantized.report["outside"] == {}
