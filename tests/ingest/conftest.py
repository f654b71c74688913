"""LoRA adapters as peft saves them, and what peft merges of them."""

import warnings
from pathlib import Path
from typing import Any

import pytest

from quantline.model.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def adapt(tiny_narrow, tmp_path_factory):
    """adapt(base, save, **options) → (adapter folder, the model that peft merges).

    The base is the narrow float32 model if none is named; `save` are options of save_pretrained.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def make(
        base: Path | None = None, save: dict[str, Any] | None = None, **options: Any
    ) -> tuple[Path, Checkpoint]:
        folder = tmp_path_factory.mktemp("adapter")
        settings = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]}
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tied embeddings, and of copies that are saved
            torch.manual_seed(3)
            model = AutoModelForCausalLM.from_pretrained(base or tiny_narrow, dtype=torch.float32)
            model = get_peft_model(model, LoraConfig(**settings | options))
            with torch.no_grad():
                for tensor in model.parameters():
                    if tensor.requires_grad:  # as after training: B is zero before it
                        tensor.add_(0.05 * torch.randn_like(tensor))
            model.save_pretrained(folder / "adapter", **save or {})
            model.merge_and_unload().save_pretrained(folder / "merged")
        return folder / "adapter", Checkpoint(folder / "merged")

    return make
