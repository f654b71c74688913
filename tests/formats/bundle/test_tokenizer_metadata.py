"""Special tokens and chat template of a bundle are compared with the source's."""

import json
import shutil

import gguf
import pytest

from quantline.formats.bundle.tokenizer_metadata import (
    metadata_differences,
    metadata_of_tokenizer,
)
from quantline.formats.container import load_container
from quantline.formats.gguf.vocabulary import write_vocabulary
from quantline.text.tokenizer import Tokenizer
from tests.helpers.bundles import NONE, export, loaded_model, store_of


def test_metadata_of_tokenizer_has_ids_and_template(tiny_model):
    source = Tokenizer(tiny_model)
    metadata = metadata_of_tokenizer(source)
    assert metadata["chat_template"] == source.chat_template
    assert metadata["chat_template"]
    ids = {"bos": 0, "eos": 0, "unk": None, "pad": 0}
    assert {token: metadata[token] for token in ids} == ids
    assert metadata["adds_bos"] is False


def test_metadata_differences_finds_none_in_gguf_metadata(tmp_path, tiny_model):
    source = Tokenizer(tiny_model)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    write_vocabulary(writer, source, 384)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    container = load_container("gguf")
    assert container.tokenizer_metadata(tmp_path)["chat_template"] == source.chat_template
    assert metadata_differences(container, tmp_path, source) == {}


@pytest.mark.parametrize("format", ["safetensors", "onnx"])
def test_metadata_differences_finds_what_was_changed(tmp_path, tiny_model, format):
    folder = shutil.copytree(tiny_model, tmp_path / "m")
    container = load_container(format)
    source = Tokenizer(tiny_model)
    assert metadata_differences(container, folder, source) == {}
    path = folder / "tokenizer_config.json"
    before = '"eos_token": "<|endoftext|>"'
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, '"eos_token": "<|im_end|>"'))
    (folder / "chat_template.jinja").write_text("another")
    assert metadata_differences(container, folder, source) == {
        "eos": (0, 2),
        "ends": ([0], [2, 0]),
        "chat_template": (source.chat_template, "another"),
    }


@pytest.mark.parametrize("format", ["safetensors", "onnx", "gguf"])
def test_every_format_keeps_named_templates_and_all_ends(tmp_path, tiny_model, format):
    folder = shutil.copytree(tiny_model, tmp_path / "m")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("tools")
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    model = loaded_model(tmp_path / "loaded", folder)
    export(tmp_path / "bundle", model, store_of(tmp_path / "store", model, NONE), format)
    container = load_container(format)
    source = Tokenizer(model)
    found = container.tokenizer_metadata(tmp_path / "bundle")
    assert found["named_templates"] == {"tool_use": "tools"}
    assert found["chat_template"] == source.chat_template
    assert found.get("ends", [0, 2]) == source.end_tokens == [0, 2]
    assert metadata_differences(container, tmp_path / "bundle", source) == {}
    manifest = json.loads((tmp_path / "bundle/manifest.json").read_text())
    kept = {"additional_chat_templates/tool_use.jinja", "special_tokens.json"}
    assert kept <= set(manifest["files"]) or format == "gguf"
