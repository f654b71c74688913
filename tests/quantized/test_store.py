"""The canonical store of quantized weights survives the disk."""

import numpy as np
import pytest

from quantline.quantized.store import QuantizedModel, QuantizedWriter
from quantline.quantized.tensors import FloatLinear, GgmlBlocks
from tests.helpers.random_weights import random_float8, random_grouped

LAYER = "model.layers.0.mlp.up_proj"


def test_quantized_model_reads_what_the_writer_wrote(tmp_path):
    linear = random_grouped()
    blocks = np.arange(288, dtype=np.uint8).reshape(2, 144)
    writer = QuantizedWriter(tmp_path)
    writer.add_linear(LAYER, linear)
    writer.add_override("model.norm.weight", np.ones(4, np.float32) * 2)
    writer.add_ggml_blocks("model.embed_tokens.weight", GgmlBlocks("Q4_K", blocks, (2, 256)))
    writer.close({"method": "test"})

    model = QuantizedModel(tmp_path)
    assert model.linears == [LAYER]
    assert model.overrides == ["model.norm.weight"]
    assert model.ggml_names == ["model.embed_tokens.weight"]
    assert model.report["method"] == "test"
    assert not model.activations_rounded
    stored = model.linear(LAYER)
    for field in ("integers", "scales", "zeros"):
        assert np.array_equal(getattr(stored, field), getattr(linear, field))
    assert (stored.bits, stored.group_size, stored.symmetric) == (4, 32, False)
    assert np.array_equal(model.override("model.norm.weight"), [2, 2, 2, 2])
    stored_blocks = model.ggml_blocks("model.embed_tokens.weight")
    assert (stored_blocks.type, stored_blocks.shape) == ("Q4_K", (2, 256))
    assert np.array_equal(stored_blocks.data, blocks)


def test_with_outside_has_the_embedding_and_the_head_among_its_linears(tmp_path):
    embedding = random_grouped(seed=2)
    writer = QuantizedWriter(tmp_path)
    writer.add_linear(LAYER, random_grouped(seed=1))
    writer.add_outside("embed", embedding)
    writer.add_outside("head", random_grouped(seed=3))
    writer.close({})
    model = QuantizedModel(tmp_path)
    assert (model.linears, model.outside) == ([LAYER], ["embed", "head"])
    assert model.with_outside().linears == ["embed", "head", LAYER]
    stored = model.with_outside().linear("embed")
    assert np.array_equal(stored.integers, embedding.integers)
    assert model.linears == [LAYER]


def test_quantized_model_reads_eight_bit_floats(tmp_path):
    linear = random_float8()
    writer = QuantizedWriter(tmp_path)
    writer.add_linear(LAYER, linear)
    writer.close({"activations": "dynamic"})
    model = QuantizedModel(tmp_path)
    stored = model.linear(LAYER)
    assert isinstance(stored, FloatLinear)
    assert model.activations_rounded
    assert model.report["contents"]["linears"][LAYER] == {"kind": "float8", "part": "rest"}
    assert np.array_equal(stored.dequantize(), linear.dequantize())


def test_quantized_writer_continues_after_the_parts_that_are_complete(tmp_path):
    writer = QuantizedWriter(tmp_path)
    writer.add_linear("a", random_grouped(seed=1))
    writer.close_part("block-000", {"layers": {"a": {"error": 0.5}}})
    writer.add_linear("b", random_grouped(seed=2))  # and then the process is killed

    writer = QuantizedWriter(tmp_path)
    assert writer.report_of("block-000") == {"layers": {"a": {"error": 0.5}}}
    assert writer.report_of("block-001") is None
    writer.add_linear("b", random_grouped(seed=3))
    writer.close_part("block-001", {})
    writer.close({})
    model = QuantizedModel(tmp_path)
    assert model.linears == ["a", "b"]
    for name, seed in (("a", 1), ("b", 3)):
        assert np.array_equal(model.linear(name).integers, random_grouped(seed=seed).integers)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "block-000.safetensors",
        "block-001.safetensors",
        "quantized.json",
    ]


def test_quantized_model_has_no_linear_that_was_not_added(tmp_path):
    QuantizedWriter(tmp_path).close({})
    with pytest.raises(KeyError):
        QuantizedModel(tmp_path).linear(LAYER)
