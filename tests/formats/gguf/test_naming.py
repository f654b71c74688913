"""GGUF files have the names and keys that the Hub, llama.cpp, Ollama and LM Studio go by."""

import json
import re
import shutil
from pathlib import Path

import gguf
import pytest

from quantline.formats.gguf.naming import names_of
from quantline.model.checkpoint import Checkpoint
from tests.helpers.gguf import file_of
from tests.helpers.quantized import rounded
from tests.helpers.variants import write_variant

HUB = {"kind": "hub", "id": "Some-Org/Tiny-2M-Instruct-v2", "revision": "abc"}
CARD = {
    "license": "other",
    "license_name": "mine",
    "license_link": "LICENSE",
    "languages": ["en", "de"],
}


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def write_manifest(model: Path, **content: object) -> Checkpoint:
    (model / "manifest.json").write_text(json.dumps(content))
    return Checkpoint(model)


# What the source is → what its file is called.
NAMES = [
    ({"source": HUB}, "Tiny-2M-Instruct-v2-Q4_K_M.gguf"),
    ({"source": HUB | {"adapter": "/a/lora"}}, "Tiny-2M-Instruct-lora-v2-Q4_K_M.gguf"),
    ({"source": {"path": "/models/my finetune"}}, "my-finetune-1.3M-Q4_K_M.gguf"),
    ({"source": {"path": "/m/x.gguf"}, "card": {"name": "Mine"}}, "Mine-1.3M-Q4_K_M.gguf"),
    ({"source": {"path": "/m/mmproj-x"}}, "model-mmproj-x-1.3M-Q4_K_M.gguf"),
    ({"source": {"path": "/m/.."}, "card": {"name": "../a/b\\c"}}, "a-b-c-1.3M-Q4_K_M.gguf"),
    ({"source": {"path": "/models/日本"}}, "model-1.3M-Q4_K_M.gguf"),
]


@pytest.mark.parametrize(("manifest", "name"), NAMES)
def test_names_of_follow_the_convention_of_gguf(model, manifest, name):
    assert names_of(write_manifest(model, **manifest)).file("Q4_K_M") == name


def test_names_of_count_the_experts_of_a_mixture(make_model, tmp_path):
    source = Checkpoint(make_model(tmp_path / "model", "mixtral"))
    assert re.search(r"^model-\dx[\d.]+[KM]-F16.gguf$", names_of(source).file("F16"))


def test_write_says_whose_the_model_is_and_under_which_terms(model, tmp_path):
    source = write_manifest(model, source=HUB, card=CARD)
    quantized = rounded(tmp_path / "quantized", source, bits=0)
    write_variant("gguf", tmp_path / "bundle", source, quantized, dtype="float16")
    file = file_of(tmp_path / "bundle")
    assert file.name == "Tiny-2M-Instruct-v2-F16.gguf"
    fields = gguf.GGUFReader(file).fields
    found = {
        key.removeprefix("general."): field.contents()
        for key, field in fields.items()
        if key.startswith("general.")
    }
    assert found == {
        "architecture": "llama",
        "type": "model",
        "file_type": gguf.LlamaFileType.MOSTLY_F16,
        "quantization_version": gguf.GGML_QUANT_VERSION,
        "name": "Tiny 2M Instruct v2",
        "basename": "Tiny",
        "organization": "Some Org",
        "finetune": "Instruct",
        "version": "v2",
        "size_label": "2M",
        "quantized_by": "quantline",
        "license": "other",
        "license.name": "mine",
        "license.link": "LICENSE",
        "languages": ["en", "de"],
        "base_model.count": 1,
        "base_model.0.name": "Tiny 2M Instruct v2",
        "base_model.0.organization": "Some Org",
        "base_model.0.version": "v2",
        "base_model.0.repo_url": "https://huggingface.co/Some-Org/Tiny-2M-Instruct-v2",
    }
