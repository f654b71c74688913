"""Merged LoRA adapters have peft's own numbers, and adapters that do not fit are refused."""

import json
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from quantline.errors import Failure, StageError
from quantline.ingest.lora import CONFIG, WEIGHTS, Adapter, merge
from quantline.model.checkpoint import Checkpoint
from tests.helpers.tensor_files import edit_json, write_tensors

MODEL = Path("artifacts/model")
EMBEDDING = "base_model.model.model.embed_tokens"
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


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


def edit_config(**changes) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / CONFIG, **changes)


def change_adapter(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    """Return what edits the dictionary of an adapter's tensors."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        write_tensors(folder / WEIGHTS, tensors)

    return spoil


def remove_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def only_pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def damage(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"x" * 20)


def add_a_layer_that_is_not_there(tensors: dict[str, np.ndarray]) -> None:
    tensors[Q_PROJ.replace("0", "7") + ".lora_A.weight"] = tensors[f"{Q_PROJ}.lora_A.weight"]


MISMATCH = "adapter_mismatch"
# What is wrong with the adapter → (what makes it so, the failure, words of the message).
REFUSED: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "no-file": (remove_weights, "missing_file", "adapter_model.safetensors"),
    "pickle": (only_pickle, "unsafe_checkpoint", "only a pickle"),
    "not-lora": (edit_config(peft_type="IA3"), MISMATCH, "IA3"),
    "pissa": (edit_config(init_lora_weights="pissa"), MISMATCH, "pissa"),
    "replicated-layers": (
        edit_config(layer_replication=[[0, 2]]),
        MISMATCH,
        "layer_replication",
    ),
    "wrong-rank": (edit_config(r=8), MISMATCH, "rank 8"),
    "rank-as-text": (edit_config(r="4"), MISMATCH, "a whole number above 0 for r"),
    "alpha-infinite": (edit_config(lora_alpha=float("inf")), MISMATCH, "lora_alpha"),
    "pattern-as-text": (edit_config(rank_pattern="down_proj"), MISMATCH, "rank_pattern"),
    "pattern-of-text": (edit_config(alpha_pattern={"q_proj": "9"}), MISMATCH, "alpha_pattern"),
    "pattern-broken": (edit_config(alpha_pattern={"(": 9}), MISMATCH, "alpha_pattern"),
    "unknown-option": (edit_config(use_tomorrow={"x": 1}), MISMATCH, "use_tomorrow"),
    "rows-without-numbers": (
        change_adapter(
            lambda tensors: tensors.update(
                {f"{EMBEDDING}.token_adapter.trainable_tokens_delta": np.ones((2, 64), np.float32)}
            )
        ),
        MISMATCH,
        "trainable_token_indices",
    ),
    "resized": (
        change_adapter(
            lambda tensors: tensors.update({f"{EMBEDDING}.weight": np.ones((390, 64), np.float32)})
        ),
        MISMATCH,
        "its vocabulary was resized",
    ),
    "other-base": (
        change_adapter(
            lambda tensors: tensors.update(
                {f"{Q_PROJ}.base_layer.weight": np.ones((64, 64), np.float32)}
            )
        ),
        MISMATCH,
        "name the base model",
    ),
    "stacked-experts": (
        change_adapter(
            lambda tensors: tensors.update(
                {"base_model.model.model.layers.0.mlp.experts.lora_A.weight": np.ones((4, 64))}
            )
        ),
        MISMATCH,
        "does not have",
    ),
    "half-a-pair": (
        change_adapter(lambda tensors: tensors.pop(f"{Q_PROJ}.lora_B.weight")),
        MISMATCH,
        "down, up",
    ),
    "other-model": (change_adapter(add_a_layer_that_is_not_there), MISMATCH, "does not have"),
    "wrong-width": (
        change_adapter(
            lambda tensors: tensors.update({f"{Q_PROJ}.lora_A.weight": np.ones((4, 9), np.float32)})
        ),
        MISMATCH,
        "(64, 64)",
    ),
    "nan": (
        change_adapter(lambda tensors: tensors[f"{Q_PROJ}.lora_A.weight"].fill(np.nan)),
        "non_finite",
        "q_proj",
    ),
    "damaged": (damage, MISMATCH, "damaged"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_load_refuses_an_adapter(case, adapt, project, tiny_narrow, tmp_path, capsys):
    spoil, failure, words = REFUSED[case]
    folder = Path(shutil.copytree(adapt()[0], tmp_path / "adapter"))
    spoil(folder)
    project.compose(f"model.path={tiny_narrow}", f"model.adapter={folder}")
    with pytest.raises(SystemExit) as stopped:
        project.stage("load")
    assert stopped.value.code == 1
    message = capsys.readouterr().err
    assert f"load: load_rejected ({failure}): " in message
    assert words in message
    assert project.events()[-1]["payload"]["failure"] == failure
    assert not list((project.root / "artifacts").iterdir())


def test_adapter_refuses_a_tied_embedding(tiny_model, tmp_path):
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    embedding = np.zeros((384, 256), np.float32)
    write_tensors(tmp_path / WEIGHTS, {"base_model.model.model.embed_tokens.weight": embedding})
    words = r"share between embedding and head, found .*; untie the base first"
    with pytest.raises(StageError, match=words):
        Adapter(tmp_path, Checkpoint(tiny_model))


def test_adapter_config_bounds_the_time_of_patterns(adapt, tiny_narrow, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(adapt()[0], tmp_path / "adapter"))
    edit_json(folder / CONFIG, rank_pattern={r"(([a-z_.0-9])+)+!": 2})
    monkeypatch.setattr("quantline.run.bounded_call.SECONDS", 0.5)
    started = time.monotonic()
    shutil.copytree(tiny_narrow, tmp_path / "merged")
    with pytest.raises(StageError, match="regular expression to end within") as caught:
        merge(Checkpoint(tiny_narrow), folder, tmp_path / "merged")
    assert caught.value.failure == Failure.TIMED_OUT
    assert time.monotonic() - started < 5
