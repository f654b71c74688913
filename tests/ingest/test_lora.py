"""Merged LoRA adapters have peft's own numbers."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantline.ingest.lora import merge
from quantline.model.checkpoint import Checkpoint

MODEL = Path("artifacts/model")


@pytest.fixture(scope="module")
def bases(make_model, tmp_path_factory):
    """bases(family, **sizes): a small float32 model of a family, made once."""
    import torch

    made: dict[str, Path] = {}

    def base(family: str, **sizes: Any) -> Path:
        key = json.dumps([family, sizes])
        if key not in made:
            usual = {"hidden_size": 32, "intermediate_size": 48, "tie_word_embeddings": False}
            folder = tmp_path_factory.mktemp("base") / family
            made[key] = make_model(folder, family, dtype=torch.float32, **usual | sizes)
        return made[key]

    return base


# Kind of adapter → peft's options, and how many tensors of the base it changes.
OPTIONS: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({}, 4),
    "rank-stabilized": ({"use_rslora": True}, 4),
    "patterns": (
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 40}},
        4,
    ),
    "patterns-with-signs": (
        {"rank_pattern": {r"layers\.[01]\.mlp\..*": 2, "proj": 9}, "alpha_pattern": {"^q": 4}},
        4,
    ),
    "dora": ({"use_dora": True}, 4),
    "complete-modules": ({"modules_to_save": ["lm_head"]}, 5),
    "complete-norms": ({"modules_to_save": ["norm"]}, 9),
    "head": ({"target_modules": ["lm_head", "q_proj"]}, 3),
    "embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, 3),
    "embedding-and-head": ({"target_modules": ["embed_tokens", "lm_head"], "use_rslora": True}, 2),
    "rows": ({"trainable_token_indices": [7, 3]}, 5),
    "rows-of-both": ({"trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [9]}}, 6),
    "copies": ({"save": {"save_embedding_layers": True}}, 4),
}
# The same on other families: the family and its sizes, peft's options, and the tensors.
OTHERS: dict[str, tuple[str, dict[str, Any], dict[str, Any], int]] = {
    "biases": ("qwen2", {}, {"bias": "all"}, 10),
    "biases-of-lora": ("qwen2", {}, {"bias": "lora_only"}, 6),
    "bias-of-b": ("qwen2", {}, {"lora_bias": True, "target_modules": ["q_proj"]}, 4),
    "other-way": ("gpt2", {}, {"target_modules": ["c_attn"], "fan_in_fan_out": True}, 2),
    "dora-other-way": ("gpt2", {}, {"target_modules": ["c_attn"], "use_dora": True}, 2),
    "renamed-head": ("gpt_neox", {}, {"target_modules": ["lm_head", "dense"]}, 3),
    "router": ("mixtral", {}, {"target_modules": ["gate", "v_proj"]}, 4),
    "tied-copies": (
        "llama",
        {"tie_word_embeddings": True},
        {"save": {"save_embedding_layers": True}},
        4,
    ),
    "tied-rows": (
        "llama",
        {"tie_word_embeddings": True},
        {"trainable_token_indices": [7, 3]},
        5,
    ),
}


def check_merged(source: Path, adapted: tuple[Path, Checkpoint], count: int, folder: Path) -> None:
    """Merge an adapter and compare every tensor with what peft makes of it."""
    shutil.copytree(source, folder)
    base = Checkpoint(source)
    adapter, expected = adapted
    step = merge(base, adapter, folder)
    merged = Checkpoint(folder)
    assert merged.names == expected.names
    changed = []
    for name in merged.names:
        if not np.array_equal(merged.raw(name), base.raw(name)):
            changed.append(name)
        np.testing.assert_allclose(
            merged.raw(name), expected.raw(name), rtol=1e-5, atol=1e-6, err_msg=name
        )
    assert len(changed) == step["tensors"] == count


@pytest.mark.parametrize("case", OPTIONS)
def test_merge_equals_peft(case, adapt, tiny_narrow, tmp_path):
    options, count = OPTIONS[case]
    check_merged(tiny_narrow, adapt(**options), count, tmp_path / "merged")


@pytest.mark.parametrize("case", OTHERS)
def test_merge_equals_peft_on_other_families(case, adapt, bases, tmp_path):
    family, sizes, options, count = OTHERS[case]
    base = bases(family, **sizes)
    check_merged(base, adapt(base, **options), count, tmp_path / "merged")


def test_load_merges_into_shards_and_leaves_the_source_alone(project, adapt, make_model, tmp_path):
    import torch

    folder, _ = adapt()
    source = make_model(
        tmp_path / "sharded",
        hidden_size=64,
        intermediate_size=176,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
        max_shard_size="50KB",
    )
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    project.compose(f"model.path={source}", f"model.adapter={folder}")
    project.stage("load")
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    manifest = json.loads((MODEL / "manifest.json").read_text())
    assert manifest["transforms"] == [
        {
            "step": "merge_lora",
            "adapter": str(folder),
            "r": 4,
            "lora_alpha": 12,
            "use_rslora": False,
            "use_dora": False,
            "rank_pattern": {},
            "alpha_pattern": {},
            "tensors": 4,
        }
    ]
    assert manifest["source"]["adapter"] == str(folder)
    assert "adapter/adapter_model.safetensors" in manifest["files"]
    base = Checkpoint(source)
    merged = Checkpoint(MODEL)
    assert merged.names == base.names
    for name in merged.names:
        unchanged = np.array_equal(merged.raw(name), base.raw(name))
        assert unchanged != ("q_proj" in name or "down_proj" in name), name
        assert merged.stored_dtype(name) == "BF16"
