"""ONNX: the graph computes what torch computes, and carries exactly the canonical integers."""

import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from rounded import differing, rounded, tokens_of, torch_logprobs, torch_model
from safetensors.numpy import load_file, save_file

from quantline.quantized.store import GroupedLinear
from quantline.model.checkpoint import Checkpoint
from quantline.config.params import Variant
from quantline.formats.onnx import container
from quantline.formats.onnx import quantized_nodes as onnx_quantize
from quantline.runtimes.runtime import open_runtime
from quantline.errors import StageError


def written(folder, model, quantized):
    folder.mkdir()
    return container.write(model, quantized, folder, Variant(recipe="rounded", format="onnx", runtime="onnxruntime"))


def agree(folder, model, quantized, tolerance=1e-4):
    tokens = tokens_of(model)
    ours = open_runtime("onnxruntime", folder, 1).logprobs(tokens)
    return np.abs(ours - torch_logprobs(torch_model(model, quantized), tokens)).max() <= tolerance


@pytest.fixture
def model(tiny_model):
    return Checkpoint(tiny_model)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tiny_model):
    """The float32 container of the tiny model, its source and its (empty) recipe. Read only."""
    folder, model = tmp_path_factory.mktemp("onnx"), Checkpoint(tiny_model)
    quantized = rounded(folder / "q", model, bits=0)
    requested = written(folder / "out", model, quantized)
    return folder / "out", model, quantized, requested


def test_float32_holds_every_weight_and_the_tied_head_once(plain):
    folder, model, quantized, requested = plain
    assert requested == dict.fromkeys(model.names, "F32")
    assert differing(container, folder, model, quantized) == []
    big = [one for one in onnx.load(folder / "model.onnx").graph.initializer if np.prod(one.dims) >= 384 * 256]
    assert [one.name for one in big if tuple(one.dims) in ((384, 256), (256, 384))] == ["model.embed_tokens.weight"]
    assert sorted(one.name for one in folder.iterdir()) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.onnx", "tokenizer.json",
        "tokenizer_config.json"]


def test_the_same_model_gives_the_same_bytes(tmp_path, plain):
    folder, model, quantized, _ = plain
    written(tmp_path / "again", model, quantized)
    assert (tmp_path / "again/model.onnx").read_bytes() == (folder / "model.onnx").read_bytes()


@pytest.mark.parametrize(("family", "sizes"), [
    ("qwen2", {}), ("qwen3", {"tie_word_embeddings": False}), ("llama", {"num_attention_heads": 8, "hidden_size": 128})])
def test_families_agree_with_torch(tmp_path, make_model, family, sizes):
    model = Checkpoint(make_model(tmp_path / "m", family, **sizes))
    quantized = rounded(tmp_path / "q", model, bits=0)
    written(tmp_path / "out", model, quantized)
    assert differing(container, tmp_path / "out", model, quantized) == []
    assert agree(tmp_path / "out", model, quantized)


def test_equal_weights_keep_their_names(tmp_path, tiny_model):
    """torch's exporter merges initializers that are equal; an override of one of them would then change both."""
    shutil.copytree(tiny_model, tmp_path / "m")
    path = tmp_path / "m/model.safetensors"
    tensors = {name: np.ones_like(one) if one.ndim == 1 else one for name, one in load_file(path).items()}
    tensors["model.layers.0.self_attn.v_proj.weight"] = tensors["model.layers.0.self_attn.k_proj.weight"].copy()
    save_file(tensors, path, metadata={"format": "pt"})
    model = Checkpoint(tmp_path / "m")
    quantized = rounded(tmp_path / "q", model, bits=0, overrides={
        "model.layers.0.input_layernorm.weight": np.full(256, 2, np.float32)})
    written(tmp_path / "out", model, quantized)
    assert differing(container, tmp_path / "out", model, quantized) == []
    assert agree(tmp_path / "out", model, quantized)


@pytest.mark.parametrize(("bits", "group_size", "symmetric", "slot"), [
    (4, 32, False, 4), (4, 128, True, 4), (8, 64, False, 8), (2, 32, False, 2), (3, 32, False, 4), (3, 32, True, 4),
    (4, -1, False, 4)])
def test_matmulnbits_carries_our_integers(tmp_path, model, bits, group_size, symmetric, slot):
    quantized = rounded(tmp_path / "q", model, bits, group_size, symmetric)
    requested = written(tmp_path / "out", model, quantized)
    held = container.read_back(tmp_path / "out", model)
    name = "model.layers.1.mlp.down_proj.weight"
    assert (requested[name], held[name].type) == (f"int{bits}", f"int{slot}")
    assert requested["model.norm.weight"] == held["model.norm.weight"].type == "F32"
    assert differing(container, tmp_path / "out", model, quantized) == []
    assert agree(tmp_path / "out", model, quantized)
    graph = onnx.load(tmp_path / "out/model.onnx").graph
    assert sum(node.op_type == "MatMulNBits" for node in graph.node) == 14
    zeros = [one for one in graph.initializer if one.name.endswith("weight_zero_point")]
    assert len(zeros) == (0 if symmetric and bits == slot else 14)


def test_int8_rows_are_integer_products(tmp_path, model):
    quantized = rounded(tmp_path / "q", model, 8, -1, True)
    requested = written(tmp_path / "out", model, quantized)
    held = container.read_back(tmp_path / "out", model)
    assert requested == {name: one.type for name, one in held.items()}
    assert differing(container, tmp_path / "out", model, quantized) == []
    graph = onnx.load(tmp_path / "out/model.onnx").graph
    assert sum(node.op_type == "MatMulInteger" for node in graph.node) == 14
    assert np.isfinite(open_runtime("onnxruntime", tmp_path / "out", 1).logprobs(tokens_of(model))).all()


def run_layer(linear, x):
    """What onnxruntime computes for one layer on x [n, in]."""
    nodes, tensors = onnx_quantize.nodes_of("layer", linear, "x", "y")
    graph = helper.make_graph(
        nodes, "one layer", [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [len(x), len(linear.integers)])],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)],
                             ir_version=8)
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def random_layer(bits, group_size, symmetric, rows=24, columns=96):
    draw = np.random.default_rng(bits)
    groups = (rows, columns // group_size)
    zeros = np.full(groups, 1 << (bits - 1)) if symmetric else draw.integers(0, 1 << bits, groups)
    return GroupedLinear(draw.integers(0, 1 << bits, (rows, columns)).astype(np.uint8),
                         draw.uniform(0.01, 0.1, groups).astype(np.float32), zeros.astype(np.uint8), bits, group_size,
                         symmetric)


@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 32), (4, 32), (4, 96), (8, 32), (8, 96)])
def test_a_grouped_layer_against_numpy(bits, group_size):
    linear = random_layer(bits, group_size, False)
    x = np.random.default_rng(1).standard_normal((5, 96)).astype(np.float32)
    assert np.allclose(run_layer(linear, x), x @ linear.dequantize().T, atol=1e-4, rtol=1e-5)


def test_an_int8_layer_against_numpy():
    """DynamicQuantizeLinear by ONNX's definition: uint8 activations, one scale and zero point for the whole tensor."""
    linear = random_layer(8, 96, True)
    x = np.random.default_rng(1).standard_normal((5, 96)).astype(np.float32)
    scale = (max(x.max(), 0) - min(x.min(), 0)) / np.float32(255)
    zero = np.clip(np.rint(-min(x.min(), 0) / scale), 0, 255)
    seen = np.clip(np.rint(x / scale) + zero, 0, 255) - zero
    sums = seen.astype(np.int64) @ (linear.integers.astype(np.int64) - 128).T
    assert np.allclose(run_layer(linear, x), sums * scale * linear.scales[:, 0], rtol=1e-5, atol=1e-5)


def test_a_changed_integer_or_scale_is_seen(tmp_path, model):
    quantized = rounded(tmp_path / "q", model)
    written(tmp_path / "out", model, quantized)
    made, module = onnx.load(tmp_path / "out/model.onnx"), "model.layers.0.mlp.gate_proj"
    for part in ("weight_packed", "weight_scale", "weight_zero_point"):
        changed = onnx.ModelProto()
        changed.CopyFrom(made)
        tensor = next(one for one in changed.graph.initializer if one.name == f"{module}.{part}")
        tensor.raw_data = bytes([tensor.raw_data[0] ^ 1]) + tensor.raw_data[1:]
        onnx.save(changed, tmp_path / "out/model.onnx")
        assert differing(container, tmp_path / "out", model, quantized) == [f"{module}.weight"]


def test_a_weight_that_no_node_reads_is_not_there(tmp_path, plain):
    folder, model, quantized, _ = plain
    shutil.copytree(folder, tmp_path / "out")
    made = onnx.load(tmp_path / "out/model.onnx")
    for node in made.graph.node:
        for place, name in enumerate(node.input):
            if name == "model.layers.1.mlp.up_proj.weight":
                node.input[place] = "model.layers.1.mlp.gate_proj.weight"
    onnx.save(made, tmp_path / "out/model.onnx")
    assert differing(container, tmp_path / "out", model, quantized) == ["model.layers.1.mlp.up_proj.weight"]


def test_large_weights_lie_in_a_file_beside_the_graph(tmp_path, model, monkeypatch):
    monkeypatch.setattr(container, "LARGEST_INSIDE", 0)
    quantized = rounded(tmp_path / "q", model, 4, 32)
    written(tmp_path / "out", model, quantized)
    assert (tmp_path / "out/model.onnx").stat().st_size < 500_000 < (tmp_path / "out/model.onnx.data").stat().st_size
    assert differing(container, tmp_path / "out", model, quantized) == []
    assert agree(tmp_path / "out", model, quantized)


def test_groups_that_no_block_divides_are_refused():
    with pytest.raises(StageError, match="groups of 24 weights, which MatMulNBits' smallest block of 16"):
        onnx_quantize.nodes_of("layer", random_layer(4, 24, False), "x", "y")


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("count", [1, 7, 32])
def test_packing_is_undone_by_unpacking(bits, count):
    values = np.random.default_rng(count).integers(0, 1 << bits, (3, count)).astype(np.uint8)
    packed = onnx_quantize.pack(values, bits)
    assert packed.shape == (3, -(-count * bits // 8)) and np.array_equal(onnx_quantize.unpack(packed, bits, count), values)
