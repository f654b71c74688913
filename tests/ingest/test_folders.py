"""Folders as people have them: load takes them as transformers does, or refuses them by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from quantline.cli.program import app
from quantline.config.params import Model
from quantline.errors import Failure, StageError
from quantline.ingest import verify
from quantline.ingest.fetch import fetch
from quantline.ingest.load import load
from quantline.model.checkpoint import Checkpoint
from quantline.model.checkpoint_files import INDEX, SINGLE
from tests.helpers.models import transformers_model
from tests.helpers.tensor_files import edit_json

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
Spoil = Callable[[Path], object]


@pytest.fixture(scope="module")
def tied(make_model, tmp_path_factory) -> Path:
    """A small float32 Llama whose head is its embedding. Read only."""
    import torch

    sizes = {"hidden_size": 32, "intermediate_size": 48, "dtype": torch.float32}
    return make_model(tmp_path_factory.mktemp("folders") / "tied", **sizes)


@pytest.fixture
def folder(tied, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(tied, tmp_path / "model"))


def model_of(folder: Path) -> Model:
    return Model(source="local", path=str(folder), watch=str(folder))


def loaded(folder: Path) -> tuple[Checkpoint, tuple[str, ...]]:
    """Load a folder; return what became of it, and what was said."""
    target = folder.parent / "loaded"
    target.mkdir()
    result = load(model_of(folder), target)
    return Checkpoint(target), result.notes


def store(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def shard(folder: Path, files: dict[str, Callable[[str], bool]], scale: float = 1.0) -> None:
    """Write shards, each with the tensors that its condition names, and an index."""
    tensors = load_file(folder / SINGLE)
    listed = {}
    for file, holds in files.items():
        part = {name: scale * tensor for name, tensor in tensors.items() if holds(name)}
        save_file(part, folder / file, metadata={"format": "pt"})
        listed |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": listed}))


def logits_of(folder: Path) -> np.ndarray:
    import torch

    with torch.no_grad():
        return transformers_model(folder)(torch.arange(3, 20)[None]).logits.numpy()


def test_load_takes_a_tied_tensor_under_the_name_of_the_head(folder, tied):
    def move(tensors: dict[str, np.ndarray]) -> None:
        tensors[HEAD] = tensors.pop(EMBEDDING)

    store(folder, move)
    checkpoint, _ = loaded(folder)
    assert EMBEDDING in checkpoint.names
    assert HEAD not in checkpoint.names
    assert np.array_equal(checkpoint.raw(EMBEDDING), Checkpoint(tied).raw(EMBEDDING))
    assert np.array_equal(logits_of(checkpoint.folder), logits_of(tied))


def test_load_takes_model_safetensors_before_an_older_sharded_set(folder, tied):
    shard(folder, {"model-00001-of-00001.safetensors": lambda name: True}, scale=3.0)
    checkpoint, notes = loaded(folder)
    assert [path.name for path in checkpoint.folder.glob("model*")] == [SINGLE]
    assert SINGLE in notes[0]
    assert INDEX in notes[0]
    assert np.array_equal(checkpoint.raw(EMBEDDING), Checkpoint(tied).raw(EMBEDDING))
    assert np.array_equal(logits_of(folder), logits_of(checkpoint.folder))


def test_load_leaves_out_what_no_stage_needs(folder, tied):
    (folder / "optimizer.pt").write_bytes(b"x")
    (folder / "rng_state.pth").symlink_to("/nowhere/rng_state.pth")
    (folder / "circle").symlink_to("circle")
    (folder / ".git").mkdir()
    (folder / "checkpoint-500").mkdir()
    shutil.copy(folder / "config.json", folder / "checkpoint-500")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"left over")
    (folder / "model.fp16.safetensors").write_bytes(b"a variant")
    (folder / "consolidated.safetensors").write_bytes(b"another layout")
    (folder / "adapter_config.json").write_text("{}")
    checkpoint, notes = loaded(folder)
    made = {"manifest.json", "configuration.json", "special_tokens.json"}
    kept = {path.name for path in checkpoint.folder.iterdir()}
    assert kept == {path.name for path in tied.iterdir()} | made
    assert "model.adapter" in notes[0]


def test_load_takes_a_folder_inside_a_snapshot_of_the_cache(tied, tmp_path):
    snapshot = tmp_path / "models--a--b/snapshots/abc/inner"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "models--a--b/blobs"
    blobs.mkdir()
    for path in tied.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../../blobs/{path.name}")
    checkpoint, _ = loaded(snapshot)
    assert not any(path.is_symlink() for path in checkpoint.folder.iterdir())


def test_load_takes_an_empty_shard_and_a_tensor_that_two_shards_hold_alike(folder, tied):
    files = {"a.safetensors": lambda name: True, "b.safetensors": lambda name: "norm" in name}
    shard(folder, files)
    save_file({}, folder / "c.safetensors")
    index = json.loads((folder / INDEX).read_text())
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(json.dumps(index))
    checkpoint, _ = loaded(folder)
    assert checkpoint.names == Checkpoint(tied).names


def unequal_copies(folder: Path) -> None:
    shard(folder, {"a.safetensors": lambda name: True, "b.safetensors": lambda name: True})
    tensors = load_file(folder / "b.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / "b.safetensors")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "a.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    (folder / SINGLE).unlink()


def nothing_tied(folder: Path) -> None:
    edit_json(folder / "config.json", tie_word_embeddings=False)


def dangling(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to("blobs/gone")

    return spoil


def rename(name: str, new: str) -> Spoil:
    return lambda folder: (folder / name).rename(folder / new)


def only_adapter(folder: Path) -> None:
    rename("config.json", "adapter_config.json")(folder)


def only_inner(folder: Path) -> None:
    (folder / "snapshots/abc").mkdir(parents=True)
    rename("config.json", "snapshots/abc/config.json")(folder)


# What is wrong with the folder → (what makes it so, the failure, words of the message).
REFUSED: dict[str, tuple[Spoil, str, str]] = {
    "shards that differ": (unequal_copies, "missing_shard", r"a\.safetensors and in b\.safetens"),
    "untied without a head": (nothing_tied, "missing_shard", "lm_head"),
    "more blocks than there are": (
        lambda folder: edit_json(folder / "config.json", num_hidden_layers=1000),
        "missing_shard",
        "expected 1000 blocks, .* of 2",
    ),
    "weights nowhere": (dangling(SINGLE), "missing_shard", "blobs/gone"),
    "configuration nowhere": (dangling("config.json"), "missing_file", "blobs/gone"),
    "tokenizer's settings nowhere": (
        dangling("tokenizer_config.json"),
        "missing_file",
        "tokenizer_config.json, found a link to blobs/gone",
    ),
    "configuration in another case": (
        rename("config.json", "Config.json"),
        "missing_file",
        "Config.json, whose case is another",
    ),
    "weights in another case": (
        rename(SINGLE, "Model.safetensors"),
        "missing_shard",
        "Model.safetensors, whose case is another",
    ),
    "a variant alone": (
        rename(SINGLE, "model.fp16.safetensors"),
        "missing_shard",
        "it has model.fp16.safetensors",
    ),
    "an adapter alone": (only_adapter, "missing_file", "as model.adapter"),
    "a model in an inner folder": (only_inner, "missing_file", "one in snapshots/abc"),
    "an empty file": (
        lambda folder: (folder / SINGLE).write_bytes(b""),
        "missing_shard",
        "damaged",
    ),
    "a header too long": (
        lambda folder: (folder / SINGLE).write_bytes((2**62).to_bytes(8, "little") + b"{}"),
        "missing_shard",
        "damaged",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_load_refuses_a_folder(case, folder):
    spoil, failure, words = REFUSED[case]
    spoil(folder)
    with pytest.raises(StageError, match=words) as caught:
        loaded(folder)
    assert caught.value.failure == failure


def test_fetch_names_links_in_a_circle(folder):
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to(SINGLE)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": SINGLE}}))
    with pytest.raises(StageError, match="in a circle") as caught:
        fetch(model_of(folder))
        Checkpoint(folder)
    assert caught.value.failure == Failure.PATH_ESCAPE


def test_check_fit_names_both_tensors_that_should_be_one(folder):
    store(folder, lambda tensors: tensors.update({HEAD: -tensors[EMBEDDING]}))
    with pytest.raises(StageError, match=f"{EMBEDDING} and {HEAD}"):
        verify.check_fit(Checkpoint(folder))


def test_compose_names_links_that_dvc_cannot_follow(project, folder, monkeypatch, tmp_path):
    from typer.testing import CliRunner

    (folder / "rng_state.pth").symlink_to("/nowhere/rng_state.pth")
    (folder / "itself").symlink_to(".")
    (folder / "fine").symlink_to("config.json")
    overrides = ["model=local", f"model.path={folder}", "calibration=file", "evaluation=file"]
    text = tmp_path / "text.txt"
    text.write_text("a text")
    overrides += [f"calibration.path={text}", f"evaluation.path={text}"]
    done = CliRunner().invoke(app, ["compose", *overrides])
    assert done.exit_code == 1
    said = " ".join(done.output.split())
    assert "rng_state.pth" in said
    assert "itself" in said
    assert "fine" not in said
