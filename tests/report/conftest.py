"""A finished project on a tiny model, for the tests of what its figures belong to."""

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers.project import Project, begin_project

VARIANTS = ("gguf-q4_k_m", "gguf-q4_k_s")  # the second with an importance matrix of the user's
RECIPES = ("q4_k_m", "q4_k_s")
IMPORTANCE = "mine/importance.gguf"
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


def write_adapter(folder: Path) -> None:
    """Write a LoRA adapter for one layer of the tiny model."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    tensors = {
        f"{Q_PROJ}.lora_A.weight": torch.randn(2, 256, generator=generator) / 100,
        f"{Q_PROJ}.lora_B.weight": torch.randn(256, 2, generator=generator) / 100,
    }
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.fixture(scope="session")
def measured(tmp_path_factory, tiny_model, texts, empty_database) -> Path:
    """A project whose two variants are measured; the user's files lie in it."""
    root = begin_project(tmp_path_factory.mktemp("measured"))
    shutil.copy(empty_database, root / "mlflow.db")
    shutil.copytree(tiny_model, root / "mine/model")
    shutil.copytree(texts, root / "mine/texts")
    write_adapter(root / "mine/adapter")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        project = Project(root, Path("mine/model"), Path("mine/texts"))
        project.compose(
            f"variant=[{','.join(VARIANTS)}]",
            f"recipe=[{','.join(RECIPES)}]",
            f"recipes.q4_k_s.importance_file={IMPORTANCE}",
            "model.adapter=mine/adapter",
            "target=any",
            "target.gates=[]",
        )
        for stage in ("load", "calibrate", "reference"):
            project.stage(stage)
        project.stage("quantize", "q4_k_m")
        shutil.copy("artifacts/quantized/q4_k_m/imatrix.gguf", IMPORTANCE)
        project.stage("quantize", "q4_k_s")
        for stage in ("export", "evaluate"):
            for variant in VARIANTS:
                project.stage(stage, variant)
    return root


def copy_of(measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """Return a copy of the finished project, as the working folder."""
    root = tmp_path / "project"
    shutil.copytree(measured, root)
    monkeypatch.chdir(root)
    return Project(root, Path("mine/model"), Path("mine/texts"))
