"""calibrate: what it writes, that it repeats itself to the byte, and how it fails."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from quantline.calibration.block_files import BlockWriter
from quantline.calibration.store import CalibrationStore
from quantline.errors import StageError
from quantline.model.block_runner import BlockRun
from quantline.paths import CALIBRATION, MODEL, QUANTIZED
from quantline.text.tokenizer import Tokenizer
from tests.helpers.injection import kill_after_calls
from tests.helpers.models import place_model
from tests.helpers.project import Project
from tests.helpers.tensor_files import read_tensors, write_tensors

PARTIAL = Path("artifacts/.calibration.partial")


@pytest.fixture
def loaded(project, tiny_model) -> Project:
    """The project with artifacts/model in place."""
    place_model(tiny_model, MODEL)
    return project


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_refused(project: Project, capsys, failure: str, words: str) -> None:
    """Run the stage, which has to fail by name and leave nothing."""
    with pytest.raises(SystemExit) as stopped:
        project.stage("calibrate")
    assert stopped.value.code == 1
    message = capsys.readouterr().err
    assert f"calibrate: calibration_failed ({failure}): " in message
    assert words in message
    event = project.events()[-1]
    assert (event["severity"], event["reason_code"]) == ("error", "calibration_failed")
    assert event["payload"]["failure"] == failure
    assert words in event["summary"]
    assert [path.name for path in MODEL.parent.iterdir()] == ["model"]


def test_calibrate_writes_tokens_and_statistics(loaded, tiny_model, texts, capsys):
    loaded.stage("calibrate")
    info = json.loads((CALIBRATION / "calibration.json").read_text())
    documents = (texts / "calibration.txt").read_text().strip().split("\n\n")
    tokens = load_file(CALIBRATION / "tokens.safetensors")["tokens"]
    assert tokens.shape == (8, 64)
    assert np.array_equal(tokens, Tokenizer(tiny_model).pack(documents, 8, 64))
    assert (info["tokens"], info["sequences"], info["length"]) == (512, 8, 64)
    assert info["seed"] == 0
    store = CalibrationStore(CALIBRATION)
    assert len(store.layers) == 14
    for name in store.layers:
        assert store.tokens(name) == 512
        hessian = store.hessian(name)
        assert hessian.dtype == np.float32
        assert np.allclose(hessian, hessian.T)
        assert (np.diagonal(hessian) >= 0).all()
    assert store.hessian("model.layers.0.mlp.down_proj").shape == (512, 512)
    assert set(store.provenance()) == {"text_sha256", "tokens", "seed"}
    counted = info["effective_tokens"]
    assert 1 < counted["fewest"] <= counted["median"] <= 512
    said = capsys.readouterr().out
    assert said.startswith(
        "calibrate: 512 tokens (counted by their gradients, they are as good as "
    )
    assert "second moments of 8 inputs of 14 layers" in said


def test_calibrate_counts_tokens_alike_on_request(loaded, capsys):
    loaded.compose("calibration.weights=equal")
    loaded.stage("calibrate")
    assert json.loads((CALIBRATION / "calibration.json").read_text())["effective_tokens"] is None
    assert not list(CALIBRATION.glob("weighted-*"))
    summary = "calibrate: 512 tokens, second moments of 8 inputs of 14 layers"
    assert capsys.readouterr().out.startswith(summary)
    assert CalibrationStore(CALIBRATION).hessian("model.layers.0.mlp.down_proj").any()


def test_calibrate_twice_gives_the_same_bytes(loaded):
    loaded.stage("calibrate")
    first = files(CALIBRATION)
    loaded.stage("calibrate")
    assert files(CALIBRATION) == first


def kill_after(project: Project, kind: str, count: int) -> None:
    """Run the stage in a process that is killed when it has written `count` files of a kind."""

    def counts(writer: BlockWriter, block: int) -> bool:
        return writer.kind == kind

    kill_after_calls(project.root, "calibrate", None, BlockWriter, "close", count, counts)
    assert not CALIBRATION.exists()


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("inputs", 1),
        pytest.param("inputs", 2, marks=pytest.mark.slow),
        ("outputs", 1),
        pytest.param("outputs", 2, marks=pytest.mark.slow),
    ],
)
def test_calibrate_resumes_at_the_block_where_it_was_killed(loaded, capsys, kind, count):
    loaded.stage("calibrate")
    expected = files(CALIBRATION)
    shutil.rmtree(CALIBRATION)
    kill_after(loaded, kind, count)
    written = {path.name: path.stat().st_mtime_ns for path in PARTIAL.glob("*puts-*")}
    assert len(written) == (count if kind == "inputs" else 2 + count)
    loaded.stage("calibrate")
    assert "resumes where a killed run stopped" in capsys.readouterr().out
    assert files(CALIBRATION) == expected
    assert not PARTIAL.exists()
    remaining = {name: (CALIBRATION / name).stat().st_mtime_ns for name in written}
    assert remaining == written


@pytest.mark.slow
def test_calibrate_starts_over_with_another_text(loaded, capsys):
    kill_after(loaded, "inputs", 1)
    loaded.compose("calibration.sequences=4")
    loaded.stage("calibrate")
    sentence = "starts over, because calibration changed since a run was killed"
    assert sentence in capsys.readouterr().out
    assert json.loads((CALIBRATION / "calibration.json").read_text())["tokens"] == 256


def test_calibrate_starts_over_with_other_code(loaded, capsys, monkeypatch):
    kill_after(loaded, "inputs", 1)
    monkeypatch.setattr("stages.calibrate.code_digest", lambda stage: "another")
    loaded.stage("calibrate")
    sentence = "starts over, because code changed since a run was killed"
    assert sentence in capsys.readouterr().out


def test_calibrate_says_that_a_text_is_short(loaded, capsys):
    loaded.compose("calibration.sequences=9999")
    loaded.stage("calibrate")
    assert "of 9999 sequences" in capsys.readouterr().out


def test_calibrate_puts_chat_through_the_template(loaded, tiny_model, tmp_path):
    lines = []
    for number in range(12):
        chat = [
            {"role": "user", "content": f"ada met hugo {number}?"},
            {"role": "assistant", "content": "by the river"},
        ]
        lines.append(json.dumps({"messages": chat}) + "\n")
    (tmp_path / "chat.jsonl").write_text("".join(lines))
    loaded.compose(f"calibration.path={tmp_path / 'chat.jsonl'}", "calibration.length=32")
    loaded.stage("calibrate")
    tokens = load_file(CALIBRATION / "tokens.safetensors")["tokens"]
    begin = Tokenizer(tiny_model).encode(
        "<|im_start|>user\nada met hugo 0?<|im_end|>\n<|im_start|>assistant\nby the river"
    )
    assert tokens.reshape(-1)[: len(begin)].tolist() == begin


def test_calibrate_refuses_a_text_that_fills_no_sequence(loaded, capsys, tmp_path):
    (tmp_path / "short.txt").write_text("ada met hugo")
    loaded.compose(f"calibration.path={tmp_path / 'short.txt'}")
    assert_refused(loaded, capsys, "calibration_empty", "at least 64 tokens")


def test_calibrate_refuses_an_absent_text(loaded, capsys, tmp_path):
    loaded.compose(f"calibration.path={tmp_path / 'none.txt'}")
    assert_refused(loaded, capsys, "dataset_invalid", "none.txt")


def fill_weight(name: str, value: float) -> None:
    """Fill one tensor of artifacts/model with a value."""
    tensors = read_tensors(MODEL)
    tensors[name].fill(value)
    write_tensors(MODEL / "model.safetensors", tensors)


def test_inputs_that_are_all_zero_stop_no_other_layer(loaded):
    fill_weight("model.layers.1.input_layernorm.weight", 0)
    loaded.stage("calibrate")
    store = CalibrationStore(CALIBRATION)
    for name in store.layers:
        dead = name.startswith("model.layers.1.self_attn.")
        assert ("no input reached it" in store.problems(name, gradients=False)) is dead
    loaded.compose("recipe=[gptq-w4g128]", "variant=[gptq-w4g128]")
    loaded.stage("quantize", "gptq-w4g128")
    report = json.loads((QUANTIZED / "gptq-w4g128/quantized.json").read_text())
    said = {
        name: layer["fallback"] for name, layer in report["layers"].items() if "fallback" in layer
    }
    assert len(said) == 4
    assert set(said.values()) == {"rounded as if all mattered alike: no input reached it"}
    warnings = [event["summary"] for event in loaded.events() if event["severity"] == "warning"]
    assert sorted(warnings) == sorted(f"{name}: {how}" for name, how in said.items())


def test_one_sequence_on_which_the_model_overflows_is_left_out(loaded, monkeypatch):
    """As if its tokens were not there, for all layers behind the overflow."""
    loaded.stage("calibrate")
    sound = CalibrationStore(CALIBRATION)
    final_hidden = BlockRun.__init__

    def with_nan(self, *arguments, **options):
        final_hidden(self, *arguments, **options)
        self.hidden[0][0, 3] = float("nan")

    monkeypatch.setattr(BlockRun, "__init__", with_nan)
    shutil.rmtree(CALIBRATION)
    loaded.stage("calibrate")
    store = CalibrationStore(CALIBRATION)
    for name in store.layers:
        assert store.problems(name, gradients=True) == []
        left_out = store.coverage(name)["not_finite"]
        assert 1 <= left_out <= 64  # a sequence has 64
        difference = store.hessian_diagonal(name) / sound.hessian_diagonal(name)
        assert np.isfinite(difference).all()
        assert 0.5 < np.median(difference) < 2
        assert np.isfinite(store.fisher_out(name)).all()


def test_calibrate_refuses_inputs_that_overflow(loaded, capsys):
    fill_weight("model.layers.1.post_attention_layernorm.weight", 1e38)
    assert_refused(loaded, capsys, "non_finite", "model.layers.1.mlp.gate_proj")


def test_calibrate_keeps_nothing_of_layers_that_no_method_rounds(loaded):
    loaded.stage("calibrate")
    with pytest.raises(StageError, match="run calibrate again"):
        CalibrationStore(CALIBRATION).hessian("lm_head")


def test_calibrate_needs_a_loaded_model(project, capsys):
    with pytest.raises(SystemExit):
        project.stage("calibrate")
    assert "calibration_failed (missing_" in capsys.readouterr().err
    assert not (project.root / "artifacts").exists()
