"""Models without a table come in through a converter that the user names."""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest

from quantline.config.compose import load_params
from quantline.errors import StageError
from quantline.formats.gguf.imatrix import read_importance
from quantline.ingest import llama_cpp_converter
from quantline.model.checkpoint import Checkpoint
from quantline.model.gguf_checkpoint import FILE
from quantline.runtimes.runtime import open_runtime
from tests.helpers.granite import MULTIPLIERS, converted_copy, write_converter
from tests.helpers.llama_quantize import quantize as quantize_with_llama_cpp
from tests.helpers.project import ROOT, Project
from tests.helpers.quantized import rounded, tokens_of, torch_logprobs, torch_model

VARIANTS = ("gguf-f32", "gguf-q4_k_m", "gguf-q4_k_m-curvature")


@pytest.fixture(scope="module")
def granite(tmp_path_factory, make_model):
    return make_model(tmp_path_factory.mktemp("granite") / "model", "granite", **MULTIPLIERS)


@pytest.fixture
def ready(project, granite, tmp_path, monkeypatch) -> Project:
    """A project with the model and its converter, before load."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for the process that evaluate starts
    project.base += [
        "recipe=[none,q4_k_m,q4_k_m-curvature]",
        f"variant=[{','.join(VARIANTS)}]",
        f"model.path={granite}",
        f"model.converter={write_converter(tmp_path / 'checkout')}",
        "+recipes.q4_k_m.overrides={attn_v: Q8_0}",
    ]
    project.compose()
    return project


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def tensors_of(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.slow
def test_convert_leads_from_a_checkpoint_to_figures(ready, granite, tmp_path):
    for stage in ("load", "calibrate", "reference"):
        ready.stage(stage)
    params = load_params()
    for recipe in params.recipes:
        ready.stage("quantize", recipe)
    for variant in params.variants:
        ready.stage("export", variant)
        ready.stage("evaluate", variant)
    bundles = {name: ready.root / "artifacts/exports" / name for name in VARIANTS}

    # The file computes what torch does, and what was measured says so too.
    source = Checkpoint(granite)
    tokens = tokens_of(source, 2, 48)
    expected = torch_logprobs(
        torch_model(source, rounded(tmp_path / "unquantized", source, bits=0)), tokens
    )
    logprobs = open_runtime("llama.cpp", bundles["gguf-f32"], 1).logprobs(tokens)
    assert np.abs(logprobs - expected).max() <= 1e-3
    divergence = {
        name: read_json(ready.root / f"metrics/{name}.json")["mean_kld"] for name in VARIANTS
    }
    assert divergence["gguf-f32"] < 1e-6 < divergence["gguf-q4_k_m-curvature"]
    assert divergence["gguf-q4_k_m-curvature"] < divergence["gguf-q4_k_m"]

    # The manifest names the converter, and the file has the settings that it wrote.
    manifest = read_json(bundles["gguf-q4_k_m"] / "manifest.json")
    step = next(step for step in manifest["transforms"] if step["step"] == "convert")
    assert step["path"] == str(tmp_path / "checkout" / llama_cpp_converter.SCRIPT)
    assert len(step["sha256"]) == 64
    assert step["outtype"] == "bf16"
    assert step["commit"] is None
    fields = gguf.GGUFReader(bundles["gguf-q4_k_m"] / "model.gguf").fields
    assert fields["granite.logit_scale"].contents() == 4.0
    assert "quantline.recipe" in fields

    # Types and bytes are those that llama.cpp makes of the converter's file.
    matrix = read_importance(ready.root / "artifacts/quantized/q4_k_m/imatrix.gguf")
    importance = {name: entry.values() for name, entry in matrix.entries.items()}
    assert len(importance) == 14
    target = tmp_path / "theirs.gguf"
    converted = ready.root / "artifacts/model" / FILE
    status, log = quantize_with_llama_cpp(
        converted, target, "Q4_K_M", importance, {"attn_v": "Q8_0"}
    )
    assert status == 0, log
    ours = tensors_of(bundles["gguf-q4_k_m"] / "model.gguf")
    theirs = tensors_of(target)
    assert ours.keys() == theirs.keys()
    assert ours["blk.0.attn_v.weight"].tensor_type.name == "Q8_0"
    for name, tensor in ours.items():
        assert tensor.tensor_type == theirs[name].tensor_type, name
        our_bytes = np.asarray(tensor.data).view(np.uint8)
        their_bytes = np.asarray(theirs[name].data).view(np.uint8)
        assert np.array_equal(our_bytes, their_bytes), name


def test_convert_gives_the_converter_no_more_of_the_environment_than_it_needs(
    granite, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    converted_copy(granite, tmp_path)
    names = set((tmp_path / "checkout/environment").read_text().split())
    assert names
    assert names - {"LC_CTYPE"} <= {
        *llama_cpp_converter.ENVIRONMENT,
        "HF_HUB_OFFLINE",
        "PYTHONNOUSERSITE",
        "PYTHONDONTWRITEBYTECODE",
    }


# What a converter does → (the statement that does it, the failure, words of the message).
FAILURES = {
    "exits": (
        "sys.exit('no idea what a ' + gguf_name + ' is')",
        "converter_failed",
        "exit code 1; take a newer checkout of llama.cpp, or add to config.json a key that the "
        "script asks for; its last words: no idea what a",
    ),
    "writes nothing": ("sys.exit(0)", "converter_failed", "no file written"),
    "wrong shape": (
        "tensor = tensor[:, :128] if 'ffn_up' in gguf_name else tensor",
        "converter_failed",
        "blk.0.ffn_up.weight (512, 256), as model.layers.0.mlp.up_proj.weight is, found (512, 128)",
    ),
    "short embedding": (
        "tensor = tensor[:300] if 'embd' in gguf_name else tensor",
        "converter_failed",
        "token_embd.weight (384, 256), found (300, 256)",
    ),
    "no embedding": (
        "gguf_name = gguf_name.replace('token_embd', 'tokens')",
        "converter_failed",
        "found no such tensor",
    ),
    "quantized": (
        "tensor_type = gguf.GGMLQuantizationType.Q8_0 if 'ffn_up' in gguf_name else tensor_type",
        "converter_failed",
        "found Q8_0",
    ),
    "not finite": (
        "tensor = tensor / 0 if 'ffn_up' in gguf_name else tensor",
        "non_finite",
        "in blk.0.ffn_up.weight",
    ),
    "no GGUF": (
        "Path(arguments.outfile).write_text('GGUF'); sys.exit(0)",
        "converter_failed",
        "one that cannot be read",
    ),
}


SLOW = ("writes nothing", "short embedding", "quantized", "no GGUF")


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in FAILURES],
)
def test_convert_names_what_a_converter_did_wrong(case, granite, tmp_path):
    change, failure, words = FAILURES[case]
    with pytest.raises(StageError) as error:
        converted_copy(granite, tmp_path, change)
    assert error.value.failure == failure
    assert words in str(error.value)


def test_provenance_is_another_when_a_part_of_the_converter_changes(tmp_path):
    script = llama_cpp_converter.find_script(write_converter(tmp_path / "checkout"))
    first = llama_cpp_converter.provenance(script)
    assert (first["path"], first["commit"]) == (str(script), None)
    part = script.parent / "conversion/granite.py"
    part.parent.mkdir()
    part.write_text("MODELS = []\n")
    assert llama_cpp_converter.provenance(script)["sha256"] != first["sha256"]


def test_load_leaves_nothing_of_a_conversion_that_failed(ready, tmp_path, capsys):
    write_converter(tmp_path / "checkout", FAILURES["exits"][0])
    with pytest.raises(SystemExit):
        ready.stage("load")
    assert "load: load_rejected (converter_failed): expected " in capsys.readouterr().err
    assert list((ready.root / "artifacts").iterdir()) == []


def test_load_names_a_missing_converter(ready, tmp_path, capsys):
    shutil.rmtree(tmp_path / "checkout")
    with pytest.raises(SystemExit):
        ready.stage("load")
    assert (
        "load_rejected (missing_file): expected a checkout of llama.cpp with convert_hf_to_gguf.py"
    ) in capsys.readouterr().err


def test_load_points_to_converters_where_none_is_named(ready, capsys):
    ready.compose("model.converter=null")
    with pytest.raises(SystemExit):
        ready.stage("load")
    message = capsys.readouterr().err
    assert "(unsupported_architecture)" in message
    assert "model.converter=/path/to/llama.cpp" in message
