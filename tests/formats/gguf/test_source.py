"""Who makes a GGUF file: quantline's tables, or a converter."""

import json

import pytest

from quantline.formats.gguf import source
from quantline.model.checkpoint import Checkpoint
from tests.helpers.models import place_model


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The converters that a file was asked of."""
    converters: list[str] = []

    def conversion_of(folder, converter):
        converters.append(converter)
        return "converted"

    monkeypatch.setattr(source, "conversion_of", conversion_of)
    return converters


def with_converter(model, folder, converter):
    """Copy a model to a folder, as load writes it with a choice of converter."""
    place_model(model, folder)
    (folder / "manifest.json").write_text(json.dumps({"converter": converter}))
    return folder


@pytest.mark.parametrize("converter", ["auto", None])
def test_source_for_gguf_is_the_checkpoint_of_a_family_with_a_table(
    converter, tiny_model, tmp_path, asked
):
    folder = with_converter(tiny_model, tmp_path / "model", converter)
    assert isinstance(source.source_for_gguf(folder), Checkpoint)
    assert asked == []


def test_source_for_gguf_is_the_named_converters_for_every_family(tiny_model, tmp_path, asked):
    folder = with_converter(tiny_model, tmp_path / "model", "/llama.cpp")
    assert source.source_for_gguf(folder) == "converted"
    assert asked == ["/llama.cpp"]


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "granite", "architectures": ["GraniteForCausalLM"]},  # without a table
        {"hidden_act": "gelu"},  # with one that does not hold it
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    ],
)
def test_source_for_gguf_takes_the_converter_where_no_table_serves(
    change, tiny_model, tmp_path, asked
):
    folder = with_converter(tiny_model, tmp_path / "model", "auto")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | change))
    assert source.source_for_gguf(folder) == "converted"
    assert asked == ["auto"]
    (folder / "manifest.json").write_text(json.dumps({"converter": None}))
    assert isinstance(source.source_for_gguf(folder), Checkpoint)  # which write() refuses
