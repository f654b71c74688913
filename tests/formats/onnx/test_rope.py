"""Rotary embeddings that a graph would freeze are refused, or their limit is said."""

import json
import shutil

import pytest

from quantline.errors import Failure, StageError
from quantline.formats.onnx.rope import check_rope, limits, longest
from quantline.model.checkpoint import Checkpoint
from tests.helpers.quantized import rounded
from tests.helpers.variants import write_variant


def with_rope(source, folder, **parameters) -> Checkpoint:
    """Copy a checkpoint and give it another rotary embedding."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 1e4} | parameters
    (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint(folder)


def test_write_refuses_dynamic_frequencies(tiny_narrow, tmp_path):
    source = with_rope(tiny_narrow, tmp_path / "model", rope_type="dynamic", factor=2.0)
    quantized = rounded(tmp_path / "quantized", source, bits=0)
    with pytest.raises(StageError, match="rope scaling 'dynamic'") as caught:
        write_variant("onnx", tmp_path / "bundle", source, quantized)
    assert caught.value.failure == Failure.UNSUPPORTED_ARCHITECTURE
    assert not list((tmp_path / "bundle").iterdir())


def test_limits_name_the_length_that_short_factors_are_for(tiny_narrow, tmp_path):
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    original = {"original_max_position_embeddings": 64}
    source = with_rope(tiny_narrow, tmp_path / "a", rope_type="longrope", **factors, **original)
    assert longest(source.arch) == 64
    assert "up to 64 tokens" in limits(source.arch)[0]
    check_rope(source.arch)
    plain = with_rope(tiny_narrow, tmp_path / "b", rope_type="linear", factor=2.0)
    assert limits(plain.arch) == []
    assert longest(plain.arch) == plain.arch.max_positions
