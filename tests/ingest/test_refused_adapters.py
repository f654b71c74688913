"""Every adapter that load refuses, with its failure's name and its words."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from quantline.errors import Failure, StageError
from quantline.ingest.lora import CONFIG, WEIGHTS, Adapter, merge
from quantline.model.checkpoint import Checkpoint
from tests.helpers.tensor_files import edit_json, write_tensors

EMBEDDING = "base_model.model.model.embed_tokens"
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


def edit_config(**changes) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / CONFIG, **changes)


def change_adapter(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    """Return what edits the dictionary of an adapter's tensors."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        write_tensors(folder / WEIGHTS, tensors)

    return spoil


def remove_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


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
    "a-base-model": (remove_config, "missing_file", "name the folder that peft saved"),
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
