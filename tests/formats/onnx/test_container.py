"""ONNX: the graph computes what torch computes, and carries exactly the quantized integers."""

import shutil

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from quantline.formats.container import load_container
from quantline.formats.onnx import sizes
from quantline.model.checkpoint import Checkpoint
from quantline.runtimes.runtime import open_runtime
from tests.helpers.quantized import (
    differing,
    rounded,
    tokens_of,
    torch_logprobs,
    torch_model,
)
from tests.helpers.variants import write_variant

CONTAINER = load_container("onnx")


def agrees_with_torch(folder, source, quantized, tolerance=1e-4) -> bool:
    tokens = tokens_of(source)
    found = open_runtime("onnxruntime", folder, 1).logprobs(tokens)
    expected = torch_logprobs(torch_model(source, quantized, outside=True), tokens)
    return np.abs(found - expected).max() <= tolerance


@pytest.fixture
def source(tiny_model):
    return Checkpoint(tiny_model)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tiny_model):
    """The float32 container of the tiny model, its source, its empty store, and the types."""
    folder = tmp_path_factory.mktemp("onnx")
    source = Checkpoint(tiny_model)
    quantized = rounded(folder / "quantized", source, bits=0)
    requested = write_variant("onnx", folder / "out", source, quantized)
    return folder / "out", source, quantized, requested


def test_write_in_float32_holds_every_weight_and_the_tied_head_once(plain):
    folder, source, quantized, requested = plain
    assert requested == dict.fromkeys(source.names, "F32")
    assert differing(CONTAINER, folder, source, quantized) == []
    initializers = onnx.load(folder / "model.onnx").graph.initializer
    shapes = ((384, 256), (256, 384))
    as_large = [tensor.name for tensor in initializers if tuple(tensor.dims) in shapes]
    assert as_large == ["model.embed_tokens.weight"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.onnx",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_write_gives_the_same_bytes_for_the_same_model(tmp_path, plain):
    folder, source, quantized, _ = plain
    write_variant("onnx", tmp_path / "again", source, quantized)
    again = (tmp_path / "again/model.onnx").read_bytes()
    assert again == (folder / "model.onnx").read_bytes()


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("qwen2", {}),
        ("qwen3", {"tie_word_embeddings": False}),
        ("llama", {"num_attention_heads": 8, "hidden_size": 128}),
    ],
)
def test_write_agrees_with_torch(tmp_path, make_model, family, sizes):
    source = Checkpoint(make_model(tmp_path / "m", family, **sizes))
    quantized = rounded(tmp_path / "q", source, bits=0)
    write_variant("onnx", tmp_path / "out", source, quantized)
    assert differing(CONTAINER, tmp_path / "out", source, quantized) == []
    assert agrees_with_torch(tmp_path / "out", source, quantized)


def test_write_keeps_the_names_of_equal_weights(tmp_path, tiny_model):
    """torch's exporter merges equal initializers; an override of one would then change both."""
    shutil.copytree(tiny_model, tmp_path / "m")
    path = tmp_path / "m/model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            tensors[name] = np.ones_like(tensor)
    layer = "model.layers.0.self_attn"
    tensors[f"{layer}.v_proj.weight"] = tensors[f"{layer}.k_proj.weight"].copy()
    save_file(tensors, path, metadata={"format": "pt"})
    source = Checkpoint(tmp_path / "m")
    norm = {"model.layers.0.input_layernorm.weight": np.full(256, 2, np.float32)}
    quantized = rounded(tmp_path / "q", source, bits=0, overrides=norm)
    write_variant("onnx", tmp_path / "out", source, quantized)
    assert differing(CONTAINER, tmp_path / "out", source, quantized) == []
    assert agrees_with_torch(tmp_path / "out", source, quantized)


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "slot"),
    [
        (4, 32, False, 4),
        (4, 128, True, 4),
        (8, 64, False, 8),
        (2, 32, False, 2),
        (3, 32, False, 4),
        (3, 32, True, 4),
        (4, -1, False, 4),
    ],
)
def test_write_carries_our_integers_in_matmul_nbits(
    tmp_path, source, bits, group_size, symmetric, slot
):
    quantized = rounded(tmp_path / "q", source, bits, group_size, symmetric)
    requested = write_variant("onnx", tmp_path / "out", source, quantized)
    stored = CONTAINER.read_back(tmp_path / "out", source)
    name = "model.layers.1.mlp.down_proj.weight"
    assert (requested[name], stored[name].type) == (f"int{bits}", f"int{slot}")
    assert requested["model.norm.weight"] == stored["model.norm.weight"].type == "F32"
    assert differing(CONTAINER, tmp_path / "out", source, quantized) == []
    # With eight bits, inputs of layers are rounded too.
    assert agrees_with_torch(tmp_path / "out", source, quantized, 0.1 if bits == 8 else 1e-4)
    graph = onnx.load(tmp_path / "out/model.onnx").graph
    assert sum(node.op_type == "MatMulNBits" for node in graph.node) == 14
    zeros = [tensor for tensor in graph.initializer if tensor.name.endswith("weight_zero_point")]
    assert len(zeros) == (0 if symmetric and bits == slot else 14)


def test_write_carries_int8_rows_in_blocks_that_share_a_scale(tmp_path, source):
    quantized = rounded(tmp_path / "q", source, 8, -1, True)
    requested = write_variant("onnx", tmp_path / "out", source, quantized)
    stored = CONTAINER.read_back(tmp_path / "out", source)
    assert requested == {name: tensor.type for name, tensor in stored.items()}
    assert differing(CONTAINER, tmp_path / "out", source, quantized) == []
    assert agrees_with_torch(tmp_path / "out", source, quantized, tolerance=0.2)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("is_tied", [True, False])
def test_write_reads_embedding_and_head_from_the_same_integers(tmp_path, make_model, is_tied, bits):
    source = Checkpoint(make_model(tmp_path / "m", "llama", tie_word_embeddings=is_tied))
    quantized = rounded(tmp_path / "q", source, outside=bits)
    requested = write_variant("onnx", tmp_path / "out", source, quantized)
    embedding = "model.embed_tokens"
    head = embedding if is_tied else "lm_head"
    assert requested[f"{embedding}.weight"] == requested[f"{head}.weight"] == f"int{bits}"
    assert differing(CONTAINER, tmp_path / "out", source, quantized) == []
    graph = onnx.load(tmp_path / "out/model.onnx").graph
    nodes = {node.op_type: node for node in graph.node}
    gather = nodes["GatherBlockQuantized"]
    assert gather.input[0] == f"{embedding}.weight_packed"
    product = next(node for node in graph.node if f"{head}.weight_packed" in node.input[1:])
    assert product.op_type == "MatMulNBits"
    tolerance = 0.05 if bits == 8 else 1e-4
    assert agrees_with_torch(tmp_path / "out", source, quantized, tolerance)


def test_write_keeps_large_matrices_in_float16_where_others_are_rounded(tmp_path, source):
    quantized = rounded(tmp_path / "q", source)
    requested = write_variant("onnx", tmp_path / "out", source, quantized)
    stored = CONTAINER.read_back(tmp_path / "out", source)
    name = "model.embed_tokens.weight"
    assert requested[name] == stored[name].type == "F16"
    assert stored[name].bits == 16
    assert requested["model.norm.weight"] == stored["model.norm.weight"].type == "F32"
    assert differing(CONTAINER, tmp_path / "out", source, quantized) == []


def test_write_keeps_float32_where_float16_overflows(tmp_path, source):
    name = "model.embed_tokens.weight"
    values = source.tensor(name).copy()
    values[3, 5] = 1e5
    quantized = rounded(tmp_path / "q", source, overrides={name: values})
    requested = write_variant("onnx", tmp_path / "out", source, quantized)
    stored = CONTAINER.read_back(tmp_path / "out", source)
    assert (requested[name], stored[name].type) == ("F16", "F32")
    assert differing(CONTAINER, tmp_path / "out", source, quantized) == []


def test_write_halves_an_unquantized_model_on_request(tmp_path, plain):
    folder, source, quantized, _ = plain
    write_variant("onnx", tmp_path / "out", source, quantized, dtype="float16")
    assert differing(CONTAINER, tmp_path / "out", source, quantized) == []
    half = (tmp_path / "out/model.onnx").stat().st_size
    assert half < 0.6 * (folder / "model.onnx").stat().st_size
    assert agrees_with_torch(tmp_path / "out", source, quantized, 0.01)


def test_read_back_sees_a_changed_integer_or_scale(tmp_path, source):
    quantized = rounded(tmp_path / "q", source)
    write_variant("onnx", tmp_path / "out", source, quantized)
    path = tmp_path / "out/model.onnx"
    original = onnx.load(path)
    module = "model.layers.0.mlp.gate_proj"
    for part in ("weight_packed", "weight_scale", "weight_zero_point"):
        changed = onnx.ModelProto()
        changed.CopyFrom(original)
        tensors = {tensor.name: tensor for tensor in changed.graph.initializer}
        tensor = tensors[f"{module}.{part}"]
        tensor.raw_data = bytes([tensor.raw_data[0] ^ 1]) + tensor.raw_data[1:]
        onnx.save(changed, path)
        assert differing(CONTAINER, tmp_path / "out", source, quantized) == [f"{module}.weight"]


def test_read_back_leaves_out_a_weight_that_no_node_reads(tmp_path, plain):
    folder, source, quantized, _ = plain
    shutil.copytree(folder, tmp_path / "out")
    model = onnx.load(tmp_path / "out/model.onnx")
    weight = "model.layers.1.mlp.up_proj.weight"
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            if name == weight:
                node.input[position] = "model.layers.1.mlp.gate_proj.weight"
    onnx.save(model, tmp_path / "out/model.onnx")
    assert differing(CONTAINER, tmp_path / "out", source, quantized) == [weight]


def test_read_back_leaves_out_zero_points_that_no_node_reads(tmp_path, source):
    quantized = rounded(tmp_path / "q", source)
    write_variant("onnx", tmp_path / "out", source, quantized)
    path = tmp_path / "out/model.onnx"
    model = onnx.load(path)
    module = "model.layers.0.mlp.gate_proj"
    nodes = {node.name: node for node in model.graph.node}
    assert nodes[module].input.pop() == f"{module}.weight_zero_point"
    onnx.save(model, path)
    assert differing(CONTAINER, tmp_path / "out", source, quantized) == [f"{module}.weight"]


def test_write_puts_large_weights_into_a_file_beside_the_graph(tmp_path, source, monkeypatch):
    monkeypatch.setattr(sizes, "LARGEST_INSIDE", 0)
    quantized = rounded(tmp_path / "q", source, 4, 32)
    write_variant("onnx", tmp_path / "out", source, quantized)
    graph_bytes = (tmp_path / "out/model.onnx").stat().st_size
    data_bytes = (tmp_path / "out/model.onnx.data").stat().st_size
    assert graph_bytes < 500_000 < data_bytes
    assert differing(CONTAINER, tmp_path / "out", source, quantized) == []
    assert agrees_with_torch(tmp_path / "out", source, quantized)
