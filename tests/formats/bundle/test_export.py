"""A bundle has all that it promises, and exporting GGUF needs no torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantline.config.containers import CONTAINERS
from quantline.errors import Failure, Reason, StageError
from quantline.formats.bundle.export import container_packages, summarize, transforms
from quantline.formats.bundle.manifest import check_bundle
from quantline.model.checkpoint import Checkpoint
from quantline.model.gguf_checkpoint import GgufCheckpoint, conversion_folder
from tests.helpers.bundles import NONE, RTN, TRACE, export, loaded_model, store_of
from tests.helpers.gguf import file_of
from tests.helpers.project import ROOT
from tests.helpers.variants import variant, write_variant

KEYS = {
    "variant",
    "recipe",
    "format",
    "runtime",
    "task",
    "experts",
    "source",
    "card",
    "transforms",
    "tensors",
    "layers",
    "limits",
    "substituted_share",
    "bits_per_weight",
    "layer_bits_per_weight",
    "size_bytes",
    "files",
    "artifact_sha256",
    "versions",
    "calibration",
    "created_by",
}
EXPORTS = {
    "safetensors": RTN,
    "gguf": NONE,
    "onnx": RTN,
}
HEAVY = """
import json
import sys
from pathlib import Path

from quantline.quantized.store import QuantizedModel
from tests.helpers.bundles import export

model, store, bundle = map(Path, sys.argv[1:])
export(bundle, model, QuantizedModel(store), "gguf")
print(json.dumps(sorted({"torch", "numba", "transformers"} & set(sys.modules))))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_model) -> Path:
    return loaded_model(tmp_path_factory.mktemp("loaded") / "model", tiny_model)


@pytest.mark.parametrize("format", EXPORTS)
def test_export_bundle_makes_everything_that_a_bundle_promises(tmp_path, model, format):
    quantized = store_of(tmp_path / "q", model, EXPORTS[format])
    bundle = tmp_path / "variant"
    manifest = export(bundle, model, quantized, format)
    assert set(manifest) == KEYS
    assert json.loads((bundle / "manifest.json").read_text()) == manifest
    assert check_bundle(bundle) == manifest
    assert json.loads((bundle / "smoke.json").read_text()) == TRACE | {"rows": 384}
    readme = (bundle / "README.md").read_text()
    assert "\n# m, variant\n" in readme
    assert manifest["artifact_sha256"] in readme
    names = {path.name for path in bundle.iterdir()}
    assert names == {*manifest["files"], "manifest.json", "smoke.json", "README.md"}
    assert set(manifest["tensors"]) == set(Checkpoint(model).names)
    assert all(tensor["requested"] == tensor["actual"] for tensor in manifest["tensors"].values())
    weights = sum(tensor["weights"] for tensor in manifest["tensors"].values())
    stored = sum(tensor["bytes"] for tensor in manifest["tensors"].values())
    assert manifest["bits_per_weight"] == 8 * stored / weights
    assert manifest["size_bytes"] == sum(
        (bundle / name).stat().st_size for name in manifest["files"] if name != "Modelfile"
    )
    assert manifest["substituted_share"] == 0
    assert [step["step"] for step in manifest["transforms"]] == ["convert_tokenizer", "export"]
    assert manifest["created_by"] == "export-0123"
    assert manifest["source"]["files"]["model.safetensors"]["bytes"] == 1


def test_readme_says_what_the_smoke_test_found_of_loading(tmp_path, model):
    quantized = store_of(tmp_path / "q", model, RTN)
    export(tmp_path / "variant", model, quantized, "safetensors", helped="missing keys, such as a")
    readme = (tmp_path / "variant/README.md").read_text()
    assert "transformers alone does not load this bundle (missing keys, such as a)" in readme


def test_export_bundle_is_the_same_when_it_is_made_again(tmp_path, model):
    quantized = store_of(tmp_path / "q", model, RTN)
    first = export(tmp_path / "a/variant", model, quantized, "safetensors")
    second = export(tmp_path / "b/variant", model, quantized, "safetensors")
    assert first == second


def test_export_bundle_reports_types_that_a_container_lacks(tmp_path, model):
    quantized = store_of(tmp_path / "q", model, RTN | {"bits": 3})
    manifest = export(tmp_path / "variant", model, quantized, "onnx")
    step = manifest["transforms"][-1]
    assert (step["step"], step["requested"], step["actual"]) == ("substitute", "int3", "int4")
    assert manifest["substituted_share"] == step["share"] > 0
    assert summarize(manifest).endswith("% of the weights in int4 instead of int3")


def test_export_bundle_fails_on_substitution_where_the_recipe_says_so(tmp_path, model):
    quantized = store_of(tmp_path / "q", model, RTN | {"bits": 3, "substitution": "fail"})
    with pytest.raises(StageError, match="found int4") as caught:
        export(tmp_path / "variant", model, quantized, "onnx")
    assert caught.value.failure == Failure.TYPE_SUBSTITUTED


def test_export_bundle_needs_a_model(tmp_path, model):
    quantized = store_of(tmp_path / "q", model, NONE)
    with pytest.raises(StageError, match="run `dvc repro load`") as caught:
        export(tmp_path / "variant", tmp_path, quantized, "gguf")
    assert caught.value.failure == Failure.MISSING_FILE
    assert caught.value.reason == Reason.EXPORT_ARTIFACT_MISSING


def test_export_bundle_of_gguf_imports_neither_torch_nor_numba_nor_transformers(tmp_path, model):
    store_of(tmp_path / "q", model, NONE)
    done = subprocess.run(
        [sys.executable, "-c", HEAVY, str(model), str(tmp_path / "q"), str(tmp_path / "variant")],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_transforms_names_the_converter_of_a_converted_source(tmp_path, model):
    quantized = store_of(tmp_path / "q", model, NONE)
    folder = loaded_model(tmp_path / "m", model.parent / "model")
    write_variant("gguf", tmp_path / "gguf", Checkpoint(folder), quantized)
    beside = conversion_folder(folder)
    beside.mkdir()
    file_of(tmp_path / "gguf").rename(beside / "converted.gguf")
    (beside / "conversion.json").write_text('{"step": {"step": "convert"}}')
    (beside / "logits.json").write_text('{"mean_kld": 0}')
    loaded = {"transforms": []}
    exported = variant("gguf")
    source = GgufCheckpoint(folder)
    steps = transforms(source, loaded, quantized, exported, [])
    assert [step["step"] for step in steps] == ["convert", "export"]
    assert steps[0]["logits"] == {"mean_kld": 0}
    steps = transforms(Checkpoint(folder), loaded, quantized, exported, [])
    assert [step["step"] for step in steps] == ["export"]


def test_container_packages_are_those_of_all_containers():
    built_in = {"gguf", "onnx", "safetensors"} & set(CONTAINERS)
    packages = set()
    for name in built_in:
        packages.update(CONTAINERS[name].packages)
    assert packages == {
        "compressed-tensors",
        "gguf",
        "llama-cpp-python",
        "onnx",
        "onnxruntime",
        "safetensors",
        "tokenizers",
        "torch",
        "transformers",
    }
    assert packages <= container_packages()


def test_summarize_says_size_and_bits():
    manifest = {"size_bytes": 3 * 2**19, "bits_per_weight": 4.567, "transforms": []}
    assert summarize(manifest) == "1.5 MiB, 4.57 bits per weight"
