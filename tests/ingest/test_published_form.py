"""Mixtures that were saved as transformers has them in memory, with experts in one tensor."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from quantline.errors import Failure, StageError
from quantline.ingest.plain_source import plain_source
from quantline.ingest.published_form import JOINED, _published, split_experts
from quantline.model.checkpoint import Checkpoint
from quantline.model.checkpoint_files import weight_map
from tests.helpers.quantized_sources import edit_tensors, plain_tensors, write_source

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


def test_joined_experts_that_are_quantized_come_in_as_they_are_published(forms, tmp_path):
    """Those of FP8 checkpoints that transformers 5 saved; each stands for what it is joined of."""
    import torch

    def halved(name, weight):
        if ".experts." not in name:
            return None
        codes = (weight.to(torch.float32) / 2).to(torch.float8_e4m3fn)
        return {name: codes, f"{name}_scale_inv": torch.full((len(weight), 1, 1), 2.0)}

    _, joined = forms("qwen3_moe")
    settings = {"quant_method": "fp8", "weight_block_size": None}
    source = write_source(joined, tmp_path / "source", settings, halved)
    (tmp_path / "model").mkdir()
    plain = plain_source(source, tmp_path / "model")
    assert [step["step"] for step in plain.transforms] == ["dequantize", "split_experts"]
    assert [path.name for path in (tmp_path / "model").iterdir()] == [plain.folder.name]
    wanted = plain_tensors(joined)
    found = plain_tensors(plain.folder)
    for number in range(FEW["num_experts"]):
        name = "model.layers.0.mlp.experts"
        whole = wanted[f"{name}.down_proj"][number].astype(np.float32) / 2
        codes = torch.from_numpy(whole).to(torch.float8_e4m3fn).float().numpy()
        down = found[f"{name}.{number}.down_proj.weight"]
        assert np.array_equal(down.astype(np.float32), 2 * codes)
    assert Checkpoint(plain.folder).family is not None


@pytest.mark.parametrize("kind", ["qwen3_moe", "olmoe"])
@pytest.mark.parametrize("form", [(-1,), (8, -1, 64)], ids=["flat", "twice the experts"])
def test_joined_experts_of_another_shape_are_refused_by_their_name(kind, form, forms, tmp_path):
    _, joined = forms(kind)
    source = Path(shutil.copytree(joined, tmp_path / "source"))

    def change(tensors):
        name = next(name for name in tensors if name.endswith("experts.gate_up_proj"))
        tensors[name] = tensors[name].repeat(2, 1, 1).reshape(form)

    edit_tensors(source, change)
    with pytest.raises(StageError, match=r"experts\.gate_up_proj in .* to be \(4,") as caught:
        split_experts(source, tmp_path / "split")
    assert caught.value.failure == Failure.UNSUPPORTED_ARCHITECTURE
    assert not (tmp_path / "split").exists()


def test_joined_experts_of_several_dtypes_are_refused(tmp_path):
    """Values are moved as whole numbers of one width, so they would become others."""

    class Stored:
        def dtype(self, key):
            return {"a": "F16", "b": "BF16"}[key]

        def read(self, key):
            return np.ones(2, np.float16)

    with pytest.raises(StageError, match="found BF16 and F16") as caught:
        list(_published(None, ["a", "b"], Stored()))
    assert caught.value.failure == Failure.UNSUPPORTED_ARCHITECTURE
