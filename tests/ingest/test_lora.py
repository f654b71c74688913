"""Merged LoRA adapters have peft's own numbers, and adapters that do not fit are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from quantline.errors import StageError
from quantline.ingest.lora import CONFIG, WEIGHTS, Adapter, merge
from quantline.model.checkpoint import Checkpoint
from tests.helpers.tensor_files import edit_json, write_tensors

MODEL = Path("artifacts/model")
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def adapt(tiny_narrow, tmp_path_factory):
    """adapt(**options) → (adapter folder, merged tensors by peft) on the narrow float32 model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def make(**options) -> tuple[Path, dict[str, np.ndarray]]:
        folder = tmp_path_factory.mktemp("adapter")
        settings = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            base = AutoModelForCausalLM.from_pretrained(tiny_narrow, dtype=torch.float32)
            model = get_peft_model(base, LoraConfig(**settings | options))
            with torch.no_grad():
                for tensor in model.parameters():
                    if tensor.requires_grad:  # as after training: B is zero before it
                        tensor.add_(0.05 * torch.randn_like(tensor))
        model.save_pretrained(folder)
        merged = model.merge_and_unload().state_dict()
        return folder, {name: tensor.numpy() for name, tensor in merged.items()}

    return make


# Kind of adapter → peft's options, and how many tensors of the base it changes.
OPTIONS = {
    "plain": ({}, 4),
    "rank-stabilized": ({"use_rslora": True}, 4),
    "patterns": (
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 40}},
        4,
    ),
    "dora": ({"use_dora": True}, 4),
    "complete-modules": ({"modules_to_save": ["lm_head"]}, 5),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_merge_equals_peft(case, adapt, tiny_narrow, tmp_path):
    options, count = OPTIONS[case]
    folder, expected = adapt(**options)
    shutil.copytree(tiny_narrow, tmp_path / "merged")
    base = Checkpoint(tiny_narrow)
    step = merge(base, folder, tmp_path / "merged")
    merged = Checkpoint(tmp_path / "merged")
    changed = []
    for name in merged.names:
        if not np.array_equal(merged.raw(name), base.raw(name)):
            changed.append(name)
        np.testing.assert_allclose(
            merged.raw(name), expected[name], rtol=1e-5, atol=1e-6, err_msg=name
        )
    assert len(changed) == step["tensors"] == count


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
    words = r"share between embedding and head, found .*; merge this one with peft first"
    with pytest.raises(StageError, match=words):
        Adapter(tmp_path, Checkpoint(tiny_model))
