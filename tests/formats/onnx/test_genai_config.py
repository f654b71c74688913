"""genai_config.json, which onnxruntime-genai reads."""

import json
import shutil

import onnx
import pytest
from onnx import TensorProto, helper

from quantline.errors import Failure, StageError
from quantline.formats.onnx import genai_config
from quantline.model.checkpoint import Checkpoint
from tests.helpers.quantized import rounded
from tests.helpers.tensor_files import edit_json
from tests.helpers.variants import write_variant

STATES = {"past_key_values.0.key": (2, 0, 64), "past_key_values.0.value": (2, 0, 64)}


def graph(states: dict[str, tuple[int, ...]]) -> onnx.ModelProto:
    """Return a graph with these inputs, and nothing in it."""
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape])
        for name, shape in states.items()
    ]
    return helper.make_model(helper.make_graph([], "empty", inputs, []))


def test_write_makes_the_configuration_for_its_runtime_alone(tmp_path, tiny_model):
    source = Checkpoint(tiny_model)
    quantized = rounded(tmp_path / "q", source, bits=0)
    write_variant("onnx", tmp_path / "plain", source, quantized)
    assert not (tmp_path / "plain" / genai_config.FILE).exists()
    write_variant("onnx", tmp_path / "genai", source, quantized, runtime=genai_config.RUNTIME)
    config = json.loads((tmp_path / "genai" / genai_config.FILE).read_text())["model"]
    assert config["vocab_size"] == 384
    assert config["context_length"] == 256
    assert config["eos_token_id"] == [0]
    assert config["pad_token_id"] == -1
    decoder = config["decoder"]
    assert decoder["head_size"] == 64
    assert decoder["num_key_value_heads"] == 2
    assert decoder["num_hidden_layers"] == 2


def test_make_config_needs_a_token_that_ends_a_text(tmp_path, tiny_model):
    folder = shutil.copytree(tiny_model, tmp_path / "m")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "generation_config.json").unlink()
    edit_json(folder / "config.json", eos_token_id=None)
    with pytest.raises(StageError, match="expected a token that ends a text") as caught:
        genai_config.make_config(Checkpoint(folder), graph(STATES), "model.onnx")
    assert caught.value.failure == Failure.MISSING_TOKENIZER


@pytest.mark.parametrize(
    "states",
    [
        {"past_states.0.conv": (64, 3)},
        {"past_key_values.1.key": (2, 0, 16), "past_key_values.1.value": (2, 0, 32)},
        {"past_key_values.2.key": (2, 0, 64), "past_key_values.2.value": (2, 0, 64)},
    ],
    ids=["another state", "another size", "a layer without any"],
)
def test_make_config_refuses_states_that_the_library_does_not_know(tiny_model, states):
    with pytest.raises(StageError, match="take runtime onnxruntime") as caught:
        genai_config.make_config(Checkpoint(tiny_model), graph(STATES | states), "model.onnx")
    assert caught.value.failure == Failure.UNSUPPORTED_ARCHITECTURE
