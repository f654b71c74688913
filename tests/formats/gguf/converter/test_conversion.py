"""GGUF of models without a table, by a converter."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest

from quantline.config.compose import load_params
from quantline.config.texts import Limits
from quantline.errors import StageError
from quantline.formats.gguf.container import GgufContainer
from quantline.formats.gguf.converter import conversion, script
from quantline.formats.gguf.converter.conversion import conversion_of
from quantline.formats.gguf.converter.release import SCRIPT
from quantline.formats.gguf.imatrix import read_importance
from quantline.formats.gguf.source import source_for_gguf
from quantline.model.checkpoint import Checkpoint
from quantline.model.gguf_checkpoint import FILE, conversion_folder
from quantline.runtimes import converted_logits
from quantline.runtimes.runtime import open_runtime
from tests.helpers.gguf import file_of
from tests.helpers.granite import MULTIPLIERS, NO_PROJECTOR, converted_copy, write_converter
from tests.helpers.llama_quantize import quantize as quantize_with_llama_cpp
from tests.helpers.models import place_model
from tests.helpers.project import ROOT, Project
from tests.helpers.quantized import rounded, tokens_of, torch_logprobs, torch_model
from tests.helpers.variants import variant

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
    for name in params.variants:
        ready.stage("export", name)
        ready.stage("evaluate", name)
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
    assert step["path"] == str(tmp_path / "checkout" / SCRIPT)
    assert len(step["sha256"]) == 64
    assert step["outtype"] == "bf16"
    assert step["commit"] is None
    assert step["logits"]["dtype"] == "F32"
    assert step["logits"]["mean_kld"] < 1e-6
    fields = gguf.GGUFReader(file_of(bundles["gguf-q4_k_m"])).fields
    assert fields["granite.logit_scale"].contents() == 4.0
    assert "quantline.recipe" in fields

    # Types and bytes are those that llama.cpp makes of the converter's file.
    matrix = read_importance(ready.root / "artifacts/quantized/q4_k_m/imatrix.gguf")
    importance = {name: entry.values() for name, entry in matrix.entries.items()}
    assert len(importance) == 14
    target = tmp_path / "theirs.gguf"
    converted = ready.root / "artifacts/model-gguf" / FILE
    status, log = quantize_with_llama_cpp(
        converted, target, "Q4_K_M", importance, {"attn_v": "Q8_0"}
    )
    assert status == 0, log
    ours = tensors_of(file_of(bundles["gguf-q4_k_m"]))
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
        *script.ENVIRONMENT,
        "HF_HUB_OFFLINE",
        "PYTHONNOUSERSITE",
        "PYTHONDONTWRITEBYTECODE",
    }


# What a converter does → (the statement that does it, the failure, words of the message).
FAILURES = {
    "exits": (
        "sys.exit('no idea what a ' + gguf_name + ' is')",
        "converter_failed",
        "exit code 1: it does not know this model, or config.json lacks a key that it asks for; "
        "take another format, or a newer checkout of llama.cpp (model.converter); its last words: "
        "no idea what a",
    ),
    "writes nothing": ("sys.exit(0)", "converter_failed", "no file written"),
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


def test_conversion_of_keeps_nothing_of_a_conversion_that_failed(granite, tmp_path):
    with pytest.raises(StageError):
        converted_copy(granite, tmp_path, FAILURES["exits"][0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkout", "model"]


def test_conversion_of_converts_once_for_what_stays_the_same(granite, tmp_path, monkeypatch):
    first = converted_copy(granite, tmp_path)
    checkout = str(tmp_path / "checkout")
    runs = []
    run_script = conversion.run_script
    monkeypatch.setattr(
        conversion, "run_script", lambda *given: runs.append(given) or run_script(*given)
    )
    assert conversion_of(first.folder, checkout).stamp() == first.stamp()
    assert not runs
    before = first.note["step"]
    write_converter(tmp_path / "checkout", "tensor = tensor * 1")
    assert conversion_of(first.folder, checkout).note["step"]["sha256"] != before["sha256"]
    assert len(runs) == 1


# What the converter does with towers → what of them a bundle has, and what is said.
TOWERS = {
    "arguments.outfile.write_bytes(b'towers'); sys.exit()": (b"towers", []),
    NO_PROJECTOR: (None, ["no images and no sound"]),
}


@pytest.mark.parametrize(
    "projector",
    [pytest.param(case, marks=[pytest.mark.slow] * (case == NO_PROJECTOR)) for case in TOWERS],
)
def test_a_bundle_has_the_towers_that_the_converter_knows(projector, granite, tmp_path):
    content, words = TOWERS[projector]
    model = tmp_path / "model"
    place_model(granite, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").unlink()
    (model / "config.json").write_text(json.dumps(config | {"vision_config": {"depth": 2}}))
    source = conversion_of(model, write_converter(tmp_path / "checkout", projector=projector))
    container = GgufContainer()
    quantized = rounded(tmp_path / "q", source.checkpoint, bits=0)
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    container.write(source, quantized, bundle, variant("gguf"))
    names = {path.name: path for path in bundle.iterdir()}
    (file,) = (name for name in names if not name.startswith("mmproj"))
    names.pop(file)
    found = next(iter(names.values()), None)
    assert all(name.startswith("mmproj-model-") for name in names)
    assert (found.read_bytes() if found else None) == content
    said = container.limits(source)
    assert [limit[: len(word)] for limit, word in zip(said, words, strict=True)] == words
    text = container.serve({"files": dict.fromkeys(path.name for path in bundle.iterdir())})
    assert f"--model {file}" in text
    assert ("--mmproj mmproj-model-" in text) == (content is not None)


# A change of one tensor → whether it is noticed: one that changes nothing is not.
CHANGES = {
    "tensor = tensor * np.float32(1.02) if gguf_name == 'blk.1.attn_norm.weight' else tensor": True,
    "tensor = tensor * 1": False,
}


@pytest.mark.parametrize(
    "change",
    [pytest.param(case, marks=[pytest.mark.slow] * (not CHANGES[case])) for case in CHANGES],
)
def test_check_logits_notices_one_changed_tensor(change, granite, tmp_path, monkeypatch):
    monkeypatch.setattr(
        converted_logits,
        "call_in_child",
        lambda function, arguments, limits, label: converted_logits.compare(**arguments),
    )
    converted = converted_copy(granite, tmp_path, change)
    if not CHANGES[change]:
        converted_logits.check_logits(converted, Limits(), 1)
        assert converted.step["logits"]["relative_error"] < 1e-4
        return
    for _ in range(2):  # what was measured is kept
        with pytest.raises(StageError) as error:
            converted_logits.check_logits(converted, Limits(), 1)
        assert error.value.failure == "converter_failed"
        assert "llama.cpp computes another model" in str(error.value)


def test_a_cap_of_logits_is_denied_only_where_the_file_has_none():
    cap = "gemma4.final_logit_softcapping"
    without = SimpleNamespace(architecture_name="gemma4", fields={})
    assert converted_logits.settings_to_try(without) == [{}, {cap: 0.0}]
    capped = SimpleNamespace(architecture_name="gemma4", fields={cap: None})
    assert converted_logits.settings_to_try(capped) == [{}]


def test_placeholders_of_images_are_not_among_the_tokens_to_compare(granite):
    checkpoint = Checkpoint(granite)
    parts = {"folder": granite, "arch": checkpoint.arch, "shape": checkpoint.shape}
    plain = SimpleNamespace(**parts, config={})
    before = {*converted_logits.tokens_to_compare(plain).ravel().tolist()}
    named = {"image_token_id": min(before), "vision_config": {"end_token_ids": [max(before), None]}}
    wrapper = SimpleNamespace(**parts, config=named)
    after = {*converted_logits.tokens_to_compare(wrapper).ravel().tolist()}
    assert not after & {min(before), max(before)}


def test_check_logits_names_a_file_that_llama_cpp_does_not_load(granite, tmp_path):
    change = "tensor = tensor[:, :128] if 'ffn_up' in gguf_name else tensor"
    converted = converted_copy(granite, tmp_path, change)
    with pytest.raises(StageError) as error:
        converted_logits.compare(str(converted.folder), 1)
    assert error.value.failure == "converter_failed"
    assert "expected llama.cpp's converter to make a file that llama.cpp loads" in str(error.value)


def test_provenance_is_another_when_a_part_of_the_converter_changes(tmp_path):
    path = script.find_script(write_converter(tmp_path / "checkout"))
    first = script.provenance(path)
    assert (first["path"], first["commit"]) == (str(path), None)
    part = path.parent / "conversion/granite.py"
    part.parent.mkdir()
    part.write_text("MODELS = []\n")
    assert script.provenance(path)["sha256"] != first["sha256"]


def test_a_missing_converter_fails_gguf_alone(ready, tmp_path, capsys):
    shutil.rmtree(tmp_path / "checkout")
    ready.stage("load")
    assert not conversion_folder(ready.root / "artifacts/model").exists()
    assert read_json(ready.root / "artifacts/model/manifest.json")["converter"] == str(
        tmp_path / "checkout"
    )
    with pytest.raises(StageError) as error:
        source_for_gguf(ready.root / "artifacts/model")
    assert error.value.failure == "missing_file"
    assert "expected a checkout of llama.cpp with convert_hf_to_gguf.py" in str(error.value)
