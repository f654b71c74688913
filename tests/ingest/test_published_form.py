"""Mixtures that were saved as transformers has them in memory, with experts in one tensor."""

import json
from pathlib import Path

import pytest

from quantline.ingest.published_form import JOINED, split_experts
from quantline.model.checkpoint import Checkpoint
from quantline.model.checkpoint_files import weight_map
from tests.helpers.quantized_sources import plain_tensors

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
EXPERTS = {**SIZES, "tie_word_embeddings": False, "num_experts_per_tok": 2}
FEW = {"moe_intermediate_size": 32, "num_experts": 4}
KINDS = {
    "qwen3_moe": {**EXPERTS, **FEW},  # has a table
    "mixtral": {**EXPERTS, "num_local_experts": 4},  # and other names than transformers' modules
    "olmoe": {**EXPERTS, **FEW},  # has none
}


@pytest.fixture(scope="module")
def forms(tmp_path_factory, make_model):
    """Return a function: kind → (as it is published, the same with joined experts)."""
    import torch
    from transformers import AutoModelForCausalLM

    def make(kind: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(kind)
        published = make_model(folder / "published", kind, **KINDS[kind])
        model = AutoModelForCausalLM.from_pretrained(published, dtype=torch.bfloat16)
        model.save_pretrained(folder / "joined", save_original_format=False)
        (folder / "joined/tokenizer.json").write_bytes((published / "tokenizer.json").read_bytes())
        return published, folder / "joined"

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_joined_experts_come_in_as_they_are_published(kind, forms, project):
    published, joined = forms(kind)
    assert any(JOINED.search(key) for key in weight_map(joined))
    project.compose(f"model.path={joined}")
    project.stage("load")
    wanted, found = plain_tensors(published), plain_tensors(project.root / "artifacts/model")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].tobytes() == tensor.tobytes(), name
    manifest = json.loads((project.root / "artifacts/model/manifest.json").read_text())
    assert manifest["transforms"][0]["step"] == "split_experts"
    assert "model.safetensors" in manifest["files"]
    assert Checkpoint(project.root / "artifacts/model").names == Checkpoint(published).names


def test_experts_that_are_published_in_one_tensor_stay_so(make_model, tmp_path):
    folder = make_model(tmp_path / "model", "gpt_oss", **EXPERTS, num_local_experts=4)
    assert any(JOINED.search(key) for key in weight_map(folder))
    assert split_experts(folder, tmp_path / "split") is None
    assert not (tmp_path / "split").exists()
