"""calibrate: what it writes, that it repeats itself to the byte, and how it fails."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from safetensors.numpy import load_file

from quantline.calibration.collect import Moments
from quantline.model.checkpoint import Checkpoint
from quantline.model.safetensors_writer import SafetensorsStream
from quantline.text.tokenizer import Tokenizer
from quantline.errors import StageError


@pytest.fixture
def loaded(project, tiny_model):
    """The project with artifacts/model in place."""
    shutil.copytree(tiny_model, project.root / "artifacts/model")
    return project


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(project, capsys, failure, words):
    with pytest.raises(SystemExit) as stop:
        project.stage("calibrate")
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert f"calibrate: calibration_failed ({failure}): " in error and words in error
    last = project.events()[-1]
    assert last["severity"] == "error" and last["reason_code"] == "calibration_failed"
    assert last["payload"]["failure"] == failure and words in last["summary"]
    assert [path.name for path in (project.root / "artifacts").iterdir()] == ["model"]


def test_calibrate_writes_tokens_moments_and_what_they_are_of(loaded, tiny_model, texts, capsys):
    loaded.stage("calibrate")
    folder = loaded.root / "artifacts/calibration"
    info = json.loads((folder / "calibration.json").read_text())
    documents = (texts / "calibration.txt").read_text().strip().split("\n\n")
    tokens = load_file(folder / "tokens.safetensors")["tokens"]
    assert np.array_equal(tokens, Tokenizer(tiny_model).pack(documents, 8, 64)) and tokens.shape == (8, 64)
    assert (info["tokens"], info["sequences"], info["length"], info["seed"]) == (512, 8, 64, 0)
    moments = Moments(folder)
    assert len(moments.layers) == 14 and {moments.tokens(name) for name in moments.layers} == {512}
    for name in moments.layers:
        moment = moments.moment(name)
        assert moment.dtype == np.float32 and np.allclose(moment, moment.T) and (np.diagonal(moment) >= 0).all()
    assert moments.moment("model.layers.0.mlp.down_proj").shape == (512, 512)
    assert set(moments.provenance()) == {"text_sha256", "tokens", "seed"}
    assert capsys.readouterr().out.startswith("calibrate: 512 tokens, second moments of 8 inputs of 14 layers")


def test_calibrate_twice_gives_the_same_bytes(loaded):
    loaded.stage("calibrate")
    first = files(loaded.root / "artifacts/calibration")
    loaded.stage("calibrate")
    assert files(loaded.root / "artifacts/calibration") == first


def stopped(project, where: str, count: int) -> None:
    """A calibrate process that the system kills when it has written `count` files of a kind, inputs or outputs."""
    code = f"""
import os
from stages import calibrate
from quantline.calibration import collect as moments
from quantline.run.stage import stage_run
close, done = moments._Parts.close, []
def closing(self, block):
    close(self, block)
    done.append(self.kind)
    if done.count({where!r}) == {count}:
        os.kill(os.getpid(), 9)
moments._Parts.close = closing
with stage_run("calibrate") as run:
    calibrate.calibrate(run)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=project.root, check=False, capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == -9
    assert not (project.root / "artifacts/calibration").exists()


@pytest.mark.parametrize(("where", "count"), [("inputs", 1), ("inputs", 2), ("outputs", 1), ("outputs", 2)])
def test_a_killed_run_goes_on_at_the_block_where_it_stopped(loaded, capsys, where, count):
    loaded.stage("calibrate")
    wanted = files(loaded.root / "artifacts/calibration")
    shutil.rmtree(loaded.root / "artifacts/calibration")
    stopped(loaded, where, count)
    partial = loaded.root / "artifacts/.calibration.partial"
    kept = {path.name: path.stat().st_mtime_ns for path in partial.glob("*puts-*")}
    assert len(kept) == (count if where == "inputs" else 2 + count)
    loaded.stage("calibrate")
    assert "goes on where an earlier run stopped" in capsys.readouterr().out
    assert files(loaded.root / "artifacts/calibration") == wanted and not partial.exists()
    assert {name: (loaded.root / "artifacts/calibration" / name).stat().st_mtime_ns for name in kept} == kept


def test_a_killed_run_does_not_go_on_with_another_text(loaded, capsys):
    stopped(loaded, "inputs", 1)
    loaded.compose("calibration.sequences=4")
    loaded.stage("calibrate")
    assert "does not go on where an earlier run stopped: calibration changed since" in capsys.readouterr().out
    assert json.loads((loaded.root / "artifacts/calibration/calibration.json").read_text())["tokens"] == 256


def test_a_short_text_is_told(loaded, capsys):
    loaded.compose("calibration.sequences=9999")
    loaded.stage("calibrate")
    assert "of 9999 sequences" in capsys.readouterr().out


def test_chat_goes_through_the_template(loaded, tiny_model, tmp_path):
    chats = [[{"role": "user", "content": f"ada met hugo {i}?"}, {"role": "assistant", "content": "by the river"}]
             for i in range(12)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    loaded.compose(f"calibration.path={tmp_path / 'chat.jsonl'}", "calibration.length=32")
    loaded.stage("calibrate")
    tokens = load_file(loaded.root / "artifacts/calibration/tokens.safetensors")["tokens"]
    tokenizer = Tokenizer(tiny_model)
    begin = tokenizer.encode("<|im_start|>user\nada met hugo 0?<|im_end|>\n<|im_start|>assistant\nby the river")
    assert tokens.reshape(-1)[:len(begin)].tolist() == begin


def test_a_text_that_fills_no_sequence(loaded, capsys, tmp_path):
    (tmp_path / "short.txt").write_text("ada met hugo")
    loaded.compose(f"calibration.path={tmp_path / 'short.txt'}")
    refused(loaded, capsys, "calibration_empty", "at least 64 tokens")


def test_an_absent_text(loaded, capsys, tmp_path):
    loaded.compose(f"calibration.path={tmp_path / 'none.txt'}")
    refused(loaded, capsys, "dataset_invalid", "none.txt")


def change_weight(project, name, value):
    """Fill one tensor of artifacts/model with a value."""
    folder = project.root / "artifacts/model"
    base = Checkpoint(folder)
    tensors = {one: base.raw(one).copy() for one in base.names}
    tensors[name].fill(value)
    with SafetensorsStream(folder / "model.safetensors", base.names) as stream:
        for one, tensor in tensors.items():
            stream.add(one, tensor)


def test_inputs_that_are_all_zero(loaded, capsys):
    change_weight(loaded, "model.layers.1.input_layernorm.weight", 0)
    refused(loaded, capsys, "calibration_empty", "model.layers.1.self_attn.q_proj")


def test_inputs_that_overflow(loaded, capsys):
    change_weight(loaded, "model.layers.1.post_attention_layernorm.weight", 1e38)
    refused(loaded, capsys, "non_finite", "model.layers.1.mlp.gate_proj")


def test_a_layer_that_was_not_calibrated_is_no_moment(loaded):
    loaded.stage("calibrate")
    with pytest.raises(StageError, match="run calibrate again"):
        Moments(loaded.root / "artifacts/calibration").moment("lm_head")


def test_a_model_that_was_not_loaded(project, capsys):
    with pytest.raises(SystemExit):
        project.stage("calibrate")
    assert "calibration_failed (missing_" in capsys.readouterr().err
    assert not (project.root / "artifacts").exists()
