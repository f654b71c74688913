"""Special tokens and chat template of a bundle are compared with the source's."""

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
