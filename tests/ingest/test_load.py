"""load on good checkpoints: what it brings, links, pins and writes down."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from quantline.files import sha256_file
from quantline.model.checkpoint import Checkpoint
from quantline.text.tokenizer import Tokenizer
from tests.helpers.tensor_files import read_tensors, write_tensors
from tests.helpers.tracking import runs

MODEL = Path("artifacts/model")


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


@pytest.fixture
def source(tiny_model, tmp_path) -> Path:
    """A copy of the tiny model that a test may change."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def test_load_brings_every_file_and_writes_the_manifest(project, tiny_model, capsys):
    project.stage("load")
    manifest = manifest_of(MODEL)
    assert manifest["source"] == {
        "kind": "local",
        "path": str(tiny_model),
        "revision": None,
        "adapter": None,
    }
    assert manifest["model_type"] == "llama"
    assert manifest["task"] == "text-generation"
    assert manifest["dtype"] == "bfloat16"
    assert manifest["transforms"] == []
    assert manifest["sizes"] == {"hidden": 256, "layers": 2, "heads": 4, "vocabulary": 384}
    checkpoint = Checkpoint(tiny_model)
    sizes = [checkpoint.raw(name).size for name in checkpoint.names]
    assert manifest["parameters"] == sum(sizes)
    assert set(manifest["files"]) == {path.name for path in tiny_model.iterdir()}
    for name, entry in manifest["files"].items():
        assert entry == {
            "sha256": sha256_file(tiny_model / name),
            "bytes": (MODEL / name).stat().st_size,
        }
        assert (MODEL / name).read_bytes() == (tiny_model / name).read_bytes()
    output = capsys.readouterr().out
    assert output.startswith("load: LlamaForCausalLM, 1.")
    assert "M parameters in bfloat16" in output


def test_load_twice_gives_the_same_bytes_and_one_mlflow_run(project):
    project.stage("load")
    first = (MODEL / "manifest.json").read_bytes()
    project.stage("load")
    assert (MODEL / "manifest.json").read_bytes() == first
    assert len(runs(project.root)) == 1


def test_load_brings_shards_with_their_index(project, make_model, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96}
    source = make_model(tmp_path / "sharded", max_shard_size="60KB", **sizes)
    assert len(list(source.glob("*.safetensors"))) > 2
    project.compose(f"model.path={source}")
    project.stage("load")
    loaded = Checkpoint(MODEL)
    original = Checkpoint(source)
    assert loaded.names == original.names
    for name in loaded.names:
        assert np.array_equal(loaded.raw(name), original.raw(name))


def test_load_leaves_files_alone_that_no_stage_needs(project, source):
    (source / "optimizer.bin").write_bytes(b"x")
    (source / "helper.py").write_text("raise SystemExit('run!')")
    project.compose(f"model.path={source}")
    project.stage("load")
    assert not {"optimizer.bin", "helper.py"} & {path.name for path in MODEL.iterdir()}


def test_load_leaves_out_a_stored_copy_of_the_tied_head(project, source):
    tensors = read_tensors(source)
    copy = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    write_tensors(source / "model.safetensors", tensors | copy)
    project.compose(f"model.path={source}")
    project.stage("load")
    assert Checkpoint(MODEL).names == sorted(tensors)


def test_load_converts_a_tokenizer_without_tokenizer_json(project, source, tiny_model):
    fast = json.loads((source / "tokenizer.json").read_text())["model"]
    merges = "\n".join(" ".join(pair) for pair in fast["merges"])
    (source / "vocab.json").write_text(json.dumps(fast["vocab"]))
    (source / "merges.txt").write_text("#version: 0.2\n" + merges)
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    config = {"tokenizer_class": "GPT2Tokenizer", **special}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "tokenizer.json").unlink()
    project.compose(f"model.path={source}")
    project.stage("load")
    assert manifest_of(MODEL)["transforms"][0]["step"] == "convert_tokenizer"
    expected = Tokenizer(tiny_model).encode("ada met hugo")
    assert Tokenizer(MODEL).encode("ada met hugo") == expected
    assert not (source / "tokenizer.json").exists()


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_load_knows_the_other_families(project, make_model, tmp_path, family):
    sizes = {"hidden_size": 64, "intermediate_size": 96}
    source = make_model(tmp_path / family, family, **sizes)
    project.compose(f"model.path={source}")
    project.stage("load")
    assert manifest_of(MODEL)["model_type"] == family


def test_load_keeps_the_model_before_when_it_refuses_another(project, source):
    project.stage("load")
    before = sorted(MODEL.iterdir())
    (source / "tokenizer.json").write_text("{}")
    project.compose(f"model.path={source}")
    with pytest.raises(SystemExit):
        project.stage("load")
    assert sorted(MODEL.iterdir()) == before
    assert [path.name for path in MODEL.parent.iterdir()] == ["model"]


def test_load_as_a_command_exits_with_1_and_a_plain_message(project, tmp_path):
    project.compose(f"model.path={tmp_path / 'nowhere'}")
    done = project.command("load")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    expected = "load: load_rejected (missing_file): expected a Hugging Face folder with config.json"
    assert expected in done.stderr
