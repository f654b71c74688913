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


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_change_part_replaces_tensors_and_adds_overrides(tmp_path):
    linear, other = random_grouped(seed=1), random_grouped(seed=2)
    writer = QuantizedWriter(tmp_path)
    for name in (LAYER, "other"):
        writer.add_linear(name, linear)
    writer.add_override("a.weight", np.ones(4, np.float32))
    writer.close_part("block-000", {"layers": {LAYER: {"error": 1.0}}})
    norms = {"a.weight": np.zeros(4, np.float32), "b.weight": np.full(4, 2, np.float32)}
    writer.change_part("block-000", {f"{LAYER}.scales": other.scales}, norms)
    writer.change_part("norms", {}, {"c.weight": np.full(2, 3, np.float32)})
    assert writer.report_of("block-000") == {"layers": {LAYER: {"error": 1.0}}}
    assert writer.so_far().linears == [LAYER, "other"]
    writer.close({})
    model = QuantizedModel(tmp_path)
    assert np.array_equal(model.linear(LAYER).scales, other.scales)
    assert np.array_equal(model.linear(LAYER).integers, linear.integers)
    assert np.array_equal(model.linear("other").scales, linear.scales)
    assert model.overrides == ["a.weight", "b.weight", "c.weight"]
    assert [model.override(name)[0] for name in model.overrides] == [0, 2, 3]


@pytest.mark.parametrize("owner", ["write_tensors", "os.replace", "sync", "write_json"])
def test_change_part_that_is_killed_leaves_a_whole_part(tmp_path, monkeypatch, owner):
    """And the next change makes of it what this one would have made."""
    writer = QuantizedWriter(tmp_path)
    writer.add_linear(LAYER, random_grouped(seed=1))
    writer.close_part("block-000", {})
    before = contents(tmp_path)
    scales = random_grouped(seed=2).scales
    change = ({f"{LAYER}.scales": scales}, {"a.weight": np.zeros(4, np.float32)})

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(f"quantline.quantized.store.{owner}", killed)
        writer.change_part("block-000", *change)
    left = {name: data for name, data in contents(tmp_path).items() if name[0] != "."}
    assert left.keys() == before.keys()
    is_new = owner in ("sync", "write_json")
    assert (left["block-000.safetensors"] != before["block-000.safetensors"]) == is_new
    found = writer.so_far().linear(LAYER).scales
    assert np.array_equal(found, scales) == is_new
    writer.change_part("block-000", *change)
    assert np.array_equal(writer.so_far().linear(LAYER).scales, scales)
    assert writer.so_far().overrides == ["a.weight"]
