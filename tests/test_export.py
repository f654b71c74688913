"""export: the whole bundle, and that a failure has a name and leaves nothing."""

import itertools
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from rounded import rounded

from stages import export, smoke
from quantline.model.checkpoint import Checkpoint
from quantline.text.tokenizer import Tokenizer
from quantline.config.compose import load_params
from quantline.config.params import Variant
from quantline.formats.onnx import container as onnx_container
from quantline.formats import tokenizer_metadata as vocabulary
from quantline.errors import StageError

RECIPES = {"none": {"bits": 0}, "rtn-w4g128": {"group_size": 128}, "int8": {"bits": 8, "group_size": -1, "symmetric": True}}


@pytest.fixture
def ready(project, tiny_model):
    """The project with a model and quantized weights in place, as if load and quantize had run."""
    project.compose("suite=default")
    shutil.copytree(tiny_model, "artifacts/model")
    about = {"source": {"kind": "local", "path": "m", "revision": None, "adapter": None}, "transforms": [],
             "files": {"model.safetensors": {"sha256": "0" * 64, "bytes": 1}}}
    (project.root / "artifacts/model/manifest.json").write_text(json.dumps(about))
    params = load_params()
    for name, how in RECIPES.items():
        recipe = {"name": name, **params.recipes[name].model_dump(mode="json")}
        rounded(project.root / "artifacts/quantized" / name, Checkpoint(tiny_model), recipe=recipe, **how)
    return project


def bundle_of(project, variant):
    folder = project.root / "artifacts/exports" / variant
    return folder, json.loads((folder / "manifest.json").read_text()), json.loads((folder / "smoke.json").read_text())


def refused(project, capsys, variant, reason, failure, words):
    with pytest.raises(SystemExit) as stop:
        project.stage("export", variant)
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert f"export {variant}: {reason} ({failure}): " in error and words in error
    last = project.events()[-1]
    assert (last["severity"], last["reason_code"], last["payload"]["failure"]) == ("error", reason, failure)
    assert words in last["summary"] and last["payload"]["instance"] == variant
    exports = project.root / "artifacts/exports"
    assert not exports.exists() or list(exports.iterdir()) == []


@pytest.mark.parametrize("variant", ["bf16", "rtn-w4g128", "onnx-fp32", "onnx-int8"])
def test_a_bundle_has_everything_that_it_promises(ready, capsys, variant):
    ready.stage("export", variant)
    folder, manifest, smoke = bundle_of(ready, variant)
    assert set(manifest) >= {"variant", "recipe", "format", "runtime", "source", "transforms", "tensors",
                             "bits_per_weight", "size_bytes", "files", "versions", "calibration", "created_by"}
    there = {path.name for path in folder.iterdir()}
    assert there == {*manifest["files"], "manifest.json", "smoke.json", "README.md"}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= set(manifest["files"])
    assert manifest["size_bytes"] == sum((folder / name).stat().st_size for name in manifest["files"])
    assert all(one["requested"] == one["actual"] for one in manifest["tensors"].values())
    assert len(manifest["tensors"]) == len(Checkpoint(ready.root / "artifacts/model").names)
    weights = sum(one["weights"] for one in manifest["tensors"].values())
    stored = sum(one["bytes"] for one in manifest["tensors"].values())
    assert manifest["bits_per_weight"] == 8 * stored / weights
    assert manifest["substituted_share"] == 0 and manifest["transforms"][-1]["step"] == "export"
    assert smoke["passed"] and [one["prompt"] for one in smoke["prompts"]] == load_params().evaluation.smoke_prompts
    for one in smoke["prompts"]:
        assert len(one["token_ids"]) == 4 and one["seconds"] > 0 and one["passed"]
        assert one["checks"] == dict.fromkeys(("finite", "non_empty", "tokenizer_parity", "repeatable", "vocabulary"), True)
    size, bits = manifest["size_bytes"] / 2**20, manifest["bits_per_weight"]
    assert capsys.readouterr().out.startswith(f"export {variant}: {size:.1f} MiB, {bits:.2f} bits per weight, ")
    assert ready.events()[-1]["reason_code"] == "stage_finished"


def test_exporting_again_gives_the_same_bundle_and_no_second_run(ready):
    from mlflow.tracking import MlflowClient

    hashes = []
    for _ in range(2):
        ready.stage("export", "bf16")
        hashes.append(bundle_of(ready, "bf16")[1]["artifact_sha256"])
    client = MlflowClient(tracking_uri=f"sqlite:///{ready.root}/mlflow.db")
    found = client.search_runs([one.experiment_id for one in client.search_experiments()])
    assert len(set(hashes)) == 1 and [one.info.run_name for one in found] == ["bf16"]
    tags = found[0].data.tags
    assert tags["quantline.key"] == f"bf16:{hashes[0]}" and tags["artifact_sha256"] == hashes[0]
    assert {"recipe_sha256", "git_commit", "model", "format", "runtime"} <= set(tags)
    assert found[0].data.params["method"] == "none" and found[0].data.metrics["bits_per_weight"] == 16
    assert {one.path for one in client.list_artifacts(found[0].info.run_id)} == {"manifest.json", "smoke.json"}


@pytest.mark.parametrize("variant", ["rtn-w4g128", "onnx-fp32"])
def test_the_readmes_python_lines_run(ready, variant):
    ready.stage("export", variant)
    folder, manifest, _ = bundle_of(ready, variant)
    text = (folder / "README.md").read_text()
    assert manifest["artifact_sha256"] in text and ("vllm serve" in text) == (manifest["format"] == "safetensors")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_missing_weights_say_which_stage_makes_them(ready, capsys):
    shutil.rmtree("artifacts/quantized/int8")
    refused(ready, capsys, "onnx-int8", "export_artifact_missing", "missing_file", "run `dvc repro quantize@int8`")


def test_weights_of_another_recipe_than_asked_are_not_exported(ready, capsys):
    ready.compose("suite=default", "recipes.rtn-w4g128.bits=8")
    refused(ready, capsys, "rtn-w4g128", "export_run_failed", "artifact_changed", "run `dvc repro quantize@rtn-w4g128`")


def test_a_container_that_holds_something_else_fails(ready, capsys, monkeypatch):
    from quantline.formats.safetensors.layouts import compressed_tensors as compressed

    written = compressed.tensors

    def wrong(module, linear, dtype):
        tensors = written(module, linear, dtype)
        if module == "model.layers.1.mlp.down_proj":
            tensors[f"{module}.weight_packed"] ^= 1
        return tensors

    monkeypatch.setattr(compressed, "tensors", wrong)
    refused(ready, capsys, "rtn-w4g128", "export_run_failed", "readback_mismatch",
            "model.layers.1.mlp.down_proj.weight reads back with other values")


COUNTER = itertools.count()


class Broken:
    """A runtime that is right but for one thing."""

    def __init__(self, engine, **changes):
        self.engine, self.changes = engine, changes

    def __getattr__(self, name):
        return self.changes.get(name) or getattr(self.engine, name)


@pytest.fixture
def tried(ready, monkeypatch):
    """tried(**changes): the smoke test of the source's own folder, in a runtime that is right but for these."""
    def run(*overrides: str, **changes) -> dict:
        ready.compose("suite=default", *overrides)
        opened, params = smoke.open_runtime, load_params()
        monkeypatch.setattr(smoke, "open_runtime", lambda *given: Broken(opened(*given), **changes))
        return smoke.smoke(ready.root / "artifacts/model", params.variants["bf16"], params, 384)

    return run


@pytest.mark.parametrize(("changes", "failure", "words"), [
    ({"logprobs": lambda tokens: np.full((*tokens.shape, 384), np.nan, np.float32)}, "smoke_failed", "failed finite"),
    ({"generate": lambda ids, count, stop: []}, "smoke_failed", "failed non_empty"),
    ({"generate": lambda ids, count, stop: [next(COUNTER) % 300]}, "smoke_failed", "failed repeatable"),
    ({"logprobs": lambda tokens: np.zeros((*tokens.shape, 380), np.float32)}, "smoke_failed", "failed vocabulary"),
    ({"encode": lambda text: [1, 2, 3]}, "tokenizer_mismatch", "[1, 2, 3] instead of"),
])
def test_a_runtime_that_misbehaves_fails_the_bundle(tried, changes, failure, words):
    with pytest.raises(StageError) as caught:
        tried(**changes)
    assert caught.value.failure == failure and words in str(caught.value)


def test_a_tokenizer_that_differs_is_told_where_the_variant_asks_for_that(tried, tiny_model):
    right = Tokenizer(tiny_model).encode
    trace = tried("+variants.bf16.tokenizer=report", encode=lambda text: [1, 2, 3] if "Русский" in text else right(text))
    tokenizer = trace["tokenizer"]
    assert [text[:7] for text in tokenizer["texts_differing"]] == ["Русский"] and tokenizer["texts_compared"] > 20


def test_a_smoke_test_that_crashes_or_takes_too_long_fails_the_bundle(ready, capsys, monkeypatch, tmp_path):
    crash = tmp_path / "python"
    crash.write_text(f"#!{sys.executable}\nimport os\nos.abort()\n")
    crash.chmod(0o755)
    ready.compose("suite=default", f"+evaluation.pythons.transformers={crash}")
    refused(ready, capsys, "bf16", "export_run_failed", "runtime_crashed", "the smoke test of bf16 to end well, and it ended with signal 6")
    ready.compose("suite=default", "evaluation.limits.seconds=0.01")
    refused(ready, capsys, "bf16", "export_run_failed", "timed_out", "the smoke test of bf16 to end within 0.01 s")
    ready.compose("suite=default", "+evaluation.pythons.transformers=/nowhere/python")
    refused(ready, capsys, "bf16", "export_run_failed", "runtime_unavailable", "mend evaluation.pythons")


@pytest.mark.parametrize(("name", "find", "put", "words"), [
    ("chat_template.jinja", "assistant", "helper", "expected chat_template"),
    ("tokenizer_config.json", '"eos_token": "<|endoftext|>"', '"eos_token": "<|im_end|>"', "expected eos 0 in the bundle, found 2"),
])
def test_special_tokens_and_chat_template_are_the_sources(ready, capsys, monkeypatch, name, find, put, words):
    written = export.load_format("safetensors").write

    def wrong(model, quantized, folder, variant):
        requested = written(model, quantized, folder, variant)
        text = (folder / name).read_text()
        assert find in text
        (folder / name).write_text(text.replace(find, put))
        return requested

    monkeypatch.setattr(export.load_format("safetensors"), "write", wrong)
    refused(ready, capsys, "bf16", "export_run_failed", "tokenizer_mismatch", words)


def test_what_gguf_metadata_holds_is_what_the_tokenizer_says(tmp_path, tiny_model):
    import gguf

    from quantline.formats.gguf.vocabulary import add_vocabulary

    source = Tokenizer(tiny_model)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    add_vocabulary(writer, source, 384)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert vocabulary.of_bundle(tmp_path)["chat_template"] == source.chat_template
    assert vocabulary.differences(tmp_path, source) == {}


def test_three_bits_in_slots_of_four_are_told_or_refused(tmp_path, tiny_model):
    model = Checkpoint(tiny_model)
    quantized = rounded(tmp_path / "q", model, bits=3)
    (tmp_path / "out").mkdir()
    requested = onnx_container.write(model, quantized, tmp_path / "out",
                                     Variant(recipe="rounded", format="onnx", runtime="onnxruntime"))
    given = (onnx_container, tmp_path / "out", model, quantized, requested)
    tensors = export.check_container(*given, fail_on_substitution=False)
    weights = sum(one["weights"] for one in tensors.values())
    told, = export.substitutions(tensors, weights)
    assert (told["requested"], told["actual"], len(told["tensors"])) == ("int3", "int4", 14)
    assert told["share"] == sum(tensors[name]["weights"] for name in told["tensors"]) / weights
    assert tensors[told["tensors"][0]]["bits_per_weight"] == 4 + (32 + 4) / 32
    with pytest.raises(StageError, match="expected int3 for .* and 13 more, found int4") as error:
        export.check_container(*given, fail_on_substitution=True)
    assert error.value.failure == "type_substituted"


def test_the_command_line(ready):
    done = ready.command("export", "bf16")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"export bf16: [\d.]+ MiB, 16\.00 bits per weight, [\d.]+ s\n", done.stdout) and done.stderr == ""
