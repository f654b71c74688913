"""load on good checkpoints: what it brings, links, pins and writes down."""

import json
import shutil

import numpy as np
import pytest

from quantline.ingest import reflink as links
from quantline.model.checkpoint import Checkpoint
from quantline.model.safetensors_writer import SafetensorsStream
from quantline.text.tokenizer import Tokenizer
from quantline.files import sha256_file


def test_load_brings_every_file_and_writes_the_manifest(project, tiny_model, capsys):
    project.stage("load")
    made = project.root / "artifacts/model"
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["source"] == {"kind": "local", "path": str(tiny_model), "revision": None, "adapter": None}
    assert manifest["model_type"] == "llama" and manifest["task"] == "text-generation"
    assert manifest["dtype"] == "bfloat16" and manifest["transforms"] == []
    assert manifest["sizes"] == {"hidden": 256, "layers": 2, "heads": 4, "vocabulary": 384}
    checkpoint = Checkpoint(tiny_model)
    assert manifest["parameters"] == sum(checkpoint.raw(name).size for name in checkpoint.names)
    assert set(manifest["files"]) == {path.name for path in tiny_model.iterdir()}
    for name, about in manifest["files"].items():
        assert about == {"sha256": sha256_file(tiny_model / name), "bytes": (made / name).stat().st_size}
        assert (made / name).read_bytes() == (tiny_model / name).read_bytes()
    out = capsys.readouterr().out
    assert out.startswith("load: LlamaForCausalLM, 1.") and "M parameters in bfloat16" in out


def test_load_twice_gives_the_same_bytes_and_one_mlflow_run(project):
    project.stage("load")
    first = (project.root / "artifacts/model/manifest.json").read_bytes()
    project.stage("load")
    assert (project.root / "artifacts/model/manifest.json").read_bytes() == first
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{project.root / 'mlflow.db'}")
    assert len(client.search_runs([client.get_experiment_by_name("quantline").experiment_id])) == 1


def test_load_brings_shards_with_their_index(project, make_model, tmp_path):
    source = make_model(tmp_path / "sharded", hidden_size=64, intermediate_size=96, max_shard_size="60KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    project.compose(f"model.path={source}")
    project.stage("load")
    made, base = Checkpoint(project.root / "artifacts/model"), Checkpoint(source)
    assert made.names == base.names
    for name in made.names:
        assert np.array_equal(made.raw(name), base.raw(name))


def test_load_leaves_files_alone_that_no_stage_needs(project, tiny_model, tmp_path):
    source = tmp_path / "model"
    shutil.copytree(tiny_model, source)
    (source / "optimizer.bin").write_bytes(b"x")
    (source / "helper.py").write_text("raise SystemExit('run!')")
    project.compose(f"model.path={source}")
    project.stage("load")
    assert not {"optimizer.bin", "helper.py"} & {path.name for path in (project.root / "artifacts/model").iterdir()}


def test_load_takes_a_cache_snapshot_whose_files_are_links(project, tiny_model, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(tiny_model.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    project.compose(f"model.path={snapshot}")
    project.stage("load")
    assert not any(path.is_symlink() for path in (project.root / "artifacts/model").iterdir())


def test_a_stored_copy_of_the_tied_head_is_not_part_of_the_model(project, tiny_model, tmp_path):
    source = tmp_path / "model"
    shutil.copytree(tiny_model, source)
    base = Checkpoint(tiny_model)
    with SafetensorsStream(source / "model.safetensors", [*base.names, "lm_head.weight"]) as stream:
        for name in base.names:
            stream.add(name, base.raw(name))
        stream.add("lm_head.weight", base.raw("model.embed_tokens.weight"))
    project.compose(f"model.path={source}")
    project.stage("load")
    assert Checkpoint(project.root / "artifacts/model").names == base.names


def test_load_converts_a_tokenizer_without_tokenizer_json(project, tiny_model, tmp_path):
    source = tmp_path / "model"
    shutil.copytree(tiny_model, source)
    fast = json.loads((source / "tokenizer.json").read_text())["model"]
    (source / "vocab.json").write_text(json.dumps(fast["vocab"]))
    (source / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in fast["merges"]))
    (source / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>",
         "unk_token": "<|endoftext|>"}))
    (source / "tokenizer.json").unlink()
    project.compose(f"model.path={source}")
    project.stage("load")
    made = project.root / "artifacts/model"
    assert json.loads((made / "manifest.json").read_text())["transforms"][0]["step"] == "convert_tokenizer"
    assert Tokenizer(made).encode("ada met hugo") == Tokenizer(tiny_model).encode("ada met hugo")
    assert not (source / "tokenizer.json").exists()


def test_link_shares_bytes_and_falls_back_to_a_copy(tmp_path, monkeypatch):
    source = tmp_path / "a"
    source.write_bytes(b"weights")
    assert links.link(source, tmp_path / "shared") in ("reflink", "hard link")

    def refuse(*_):
        raise OSError("not here")

    monkeypatch.setattr(links.fcntl, "ioctl", refuse)
    assert links.link(source, tmp_path / "hard") == "hard link"
    assert (tmp_path / "hard").stat().st_ino == source.stat().st_ino
    monkeypatch.setattr(links.os, "link", refuse)
    assert links.link(source, tmp_path / "copy") == "copy"
    assert {(tmp_path / name).read_bytes() for name in ("shared", "hard", "copy")} == {b"weights"}


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_load_knows_the_other_families(project, make_model, tmp_path, family):
    source = make_model(tmp_path / family, family, hidden_size=64, intermediate_size=96)
    project.compose(f"model.path={source}")
    project.stage("load")
    assert json.loads((project.root / "artifacts/model/manifest.json").read_text())["model_type"] == family
