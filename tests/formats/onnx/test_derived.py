"""ONNX of models without a table: names by structure, experts of every form, unlike blocks."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from quantline.formats.container import load_container
from quantline.formats.onnx.graph import names_of_paths
from quantline.model.checkpoint import Checkpoint
from quantline.model.empty_model import empty_model
from quantline.quantized.store import QuantizedModel
from quantline.runtimes.runtime import open_runtime
from tests.helpers.models import write_tokenizer
from tests.helpers.quantized import differing, rounded, tokens_of, torch_logprobs
from tests.helpers.small_models import small_model
from tests.helpers.variants import write_variant

CONTAINER = load_container("onnx")


def checkpoint_of(folder: Path, model_type: str) -> Checkpoint:
    """Write a small model of transformers, and open it."""
    folder.mkdir()
    model = small_model(model_type, vocab_size=write_tokenizer(folder))
    model.to(torch.bfloat16).save_pretrained(folder)
    return CONTAINER.open_source(folder)


def model_of(checkpoint: Checkpoint, quantized: QuantizedModel) -> Any:
    """Return quantline's torch model with the values that the integers stand for."""
    model = empty_model(checkpoint)
    tensors = {}
    for path, name in names_of_paths(checkpoint).items():
        layer = name.removesuffix(".weight")
        rounded_one = layer in quantized.linears
        values = quantized.linear(layer).dequantize() if rounded_one else checkpoint.number(name)
        tensors[path] = torch.from_numpy(np.array(values))
    model.load_state_dict(tensors, assign=True, strict=False)
    model.tie_weights()
    return model.eval()


@pytest.mark.parametrize(
    "model_type", ["lfm2", "gpt_oss", pytest.param("qwen3_next", marks=pytest.mark.slow)]
)
def test_write_gives_derived_models_their_integers(tmp_path, model_type):
    source = checkpoint_of(tmp_path / "m", model_type)
    quantized = rounded(tmp_path / "q", source, bits=4, group_size=16)
    assert len(quantized.linears) > 8
    requested = write_variant("onnx", tmp_path / "out", source, quantized)
    stored = CONTAINER.read_back(tmp_path / "out", source)
    assert requested == {name: tensor.type for name, tensor in stored.items()}
    assert differing(CONTAINER, tmp_path / "out", source, quantized) == []
    tokens = tokens_of(source, 2, 40)
    found = open_runtime("onnxruntime", tmp_path / "out", 1).logprobs(tokens)
    expected = torch_logprobs(model_of(source, quantized), tokens)
    assert np.abs(found - expected).max() < 1e-3


def test_write_keeps_what_the_model_never_reads(tmp_path, tiny_model):
    """Such as keys of a layer that takes those of another one."""
    (tmp_path / "m").mkdir()
    for path in tiny_model.iterdir():
        (tmp_path / "m" / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "m/model.safetensors"
    extra = {"model.layers.0.extra.weight": np.ones((2, 3), np.float32)}
    save_file(load_file(path) | extra, path, metadata={"format": "pt"})
    source = Checkpoint(tmp_path / "m")
    quantized = rounded(tmp_path / "q", source, bits=0)
    write_variant("onnx", tmp_path / "out", source, quantized)
    assert differing(CONTAINER, tmp_path / "out", source, quantized) == []


def test_limits_say_what_a_graph_of_a_wrapper_lacks(tiny_model):
    arch = Checkpoint(tiny_model).arch
    source: Any = SimpleNamespace(arch=arch, structure=SimpleNamespace(passed=("a", "b")))
    assert "the graph is the text decoder; 2 tensors" in CONTAINER.limits(source)[0]
