"""The README of a bundle says how to serve this very bundle."""

import pytest
from huggingface_hub import ModelCard

from quantline.errors import ConfigError
from quantline.formats.bundle.readme import bundle_readme
from quantline.formats.container import load_container


def manifest_of(format: str, recipe: dict, **changes) -> dict:
    step = {"step": "export", "layout": changes.pop("layout", "compressed-tensors")}
    manifest = {
        "variant": "v",
        "recipe": {"name": "r"} | recipe,
        "format": format,
        "runtime": "x",
        "bits_per_weight": 4.25,
        "size_bytes": 3 * 2**20,
        "artifact_sha256": "a" * 64,
        "files": {},
        "source": {"kind": "local", "path": "/home/me/models/mine"},
        "tensors": {
            "a": {"actual": "int4", "weights": 3},
            "b": {"actual": "BF16", "weights": 1},
        },
        "calibration": {"sha256": "c" * 64, "tokens": 1024},
        "versions": {"onnx": "1.0", "gguf": "absent"},
        "created_by": "export-1",
        "layers": {} if recipe["method"] == "none" else {"x": {}},
        "transforms": [step],
    }
    return manifest | changes


def serve(format: str, recipe: dict, **changes) -> str:
    return load_container(format).serve(manifest_of(format, recipe, **changes))


def test_bundle_readme_says_what_the_bundle_is():
    manifest = manifest_of("onnx", {"method": "rtn"})
    text = bundle_readme(manifest, "## Serve it\n\nSo.\n")
    _, _, body = text.partition("---\n\n")
    assert body == (
        "# mine, v\n\n"
        "mine, rounded by rtn: recipe r (rtn) in onnx, measured in x. 4.25 bits per weight, "
        "3.0 MiB.\n"
        "What was done to it, step by step, is in manifest.json; what it answers, in smoke.json.\n"
        f"\n    artifact sha256  {'a' * 64}\n\n"
        "## Serve it\n\nSo.\n\n"
        "## How it was made\n\n"
        "* source: mine\n"
        "* recipe: name r, method rtn\n"
        "* types of weights: int4 75.0%, BF16 25.0%\n"
        f"* calibration: sha256 {'c' * 64}, tokens 1024\n"
        "* made by: quantline, export-1, with onnx 1.0\n\n"
        "## Terms\n\n"
        "The source names no licence and has no file with one. Ask whoever made it before you "
        "hand this on.\n"
    )


HUB = {"kind": "hub", "id": "you/Tiny-1B-Instruct", "revision": "abc"}


def test_bundle_readme_is_a_card_that_the_hub_takes():
    card = {"license": "llama3", "license_link": "LICENSE", "languages": ["en", "no"]}
    manifest = manifest_of("safetensors", {"method": "gptq"}, source=HUB, card=card)
    data = ModelCard(bundle_readme(manifest, "")).data.to_dict()
    assert data == {
        "base_model": "you/Tiny-1B-Instruct",
        "base_model_relation": "quantized",
        "language": ["en", "no"],
        "library_name": "transformers",
        "license": "llama3",
        "license_link": "LICENSE",
        "pipeline_tag": "text-generation",
        "quantized_by": "quantline",
        "tags": ["quantline", "gptq", "safetensors"],
    }


def test_bundle_readme_names_a_base_model_that_is_given():
    manifest = manifest_of("gguf", {"method": "kquant"})
    assert "base_model" not in ModelCard(bundle_readme(manifest, "")).data.to_dict()
    given = ModelCard(bundle_readme(manifest, "", base_model="you/base")).data.to_dict()
    assert given["base_model"] == "you/base"
    assert given["base_model_relation"] == "quantized"


def test_bundle_readme_points_to_a_licence_that_has_no_name():
    card = {"legal": ["LICENSE", "NOTICE"]}
    text = bundle_readme(manifest_of("gguf", {"method": "kquant"}, card=card), "")
    data = ModelCard(text).data.to_dict()
    assert (data["license"], data["license_link"]) == ("other", "LICENSE")
    assert "Its own texts lie beside this one: LICENSE, NOTICE." in text


def test_bundle_readme_lets_no_name_write_markdown_or_metadata():
    name = "x\n---\nlicense: mit\n[y](z) <script>"
    manifest = manifest_of("gguf", {"method": "kquant"}, card={"name": name})
    text = bundle_readme(manifest, "")
    assert "license" not in ModelCard(text).data.to_dict()
    assert "<script>" not in text
    assert "\\[y\\](z)" in text


def test_bundle_readme_says_that_the_source_is_quantized():
    step = {"step": "dequantize", "method": "fp8", "dtype": "bfloat16"}
    manifest = manifest_of("onnx", {"method": "rtn"}, transforms=[step])
    assert "in smoke.json.\nThe source is quantized by fp8. What it" in bundle_readme(manifest, "")


@pytest.mark.parametrize(
    ("recipe", "layout", "packages"),
    [
        ({"method": "none"}, "compressed-tensors", "torch transformers"),
        (
            {"method": "gptq", "bits": 4},
            "compressed-tensors",
            "torch transformers compressed-tensors",
        ),
        ({"method": "fp8"}, "compressed-tensors", "torch transformers compressed-tensors"),
        ({"method": "gptq", "bits": 4}, "gptq", "torch transformers gptqmodel"),
        ({"method": "awq", "bits": 4}, "awq", "torch transformers gptqmodel"),
    ],
)
def test_serve_of_safetensors_installs_what_its_layout_needs(recipe, layout, packages):
    assert f"(`pip install {packages}`)" in serve("safetensors", recipe, layout=layout)


@pytest.mark.parametrize(
    ("recipe", "few"),
    [
        ({"method": "none"}, False),
        ({"method": "int8"}, False),
        ({"method": "rtn", "bits": 8}, False),
        ({"method": "rtn", "bits": 3}, True),
        ({"method": "rtn", "bits": 2}, True),
    ],
)
def test_serve_of_safetensors_says_where_vllm_has_kernels(recipe, few):
    text = serve("safetensors", recipe)
    assert "vllm serve ." in text
    assert ("on NVIDIA GPUs alone" in text) == few


def test_serve_of_safetensors_says_whether_it_was_tried_in_vllm():
    recipe = {"method": "gptq", "bits": 4}
    assert "it was not tried there" in serve("safetensors", recipe, runtime="transformers")
    assert "In vLLM, in which it was measured:" in serve("safetensors", recipe, runtime="vllm")


def test_serve_of_safetensors_says_what_transformers_alone_does_not_load():
    recipe = {"method": "gptq", "bits": 4}
    alone = serve("safetensors", recipe)
    assert "AutoModelForCausalLM.from_pretrained" in alone
    helped = serve("safetensors", recipe, helped="missing keys, 8 in all, such as a.b")
    assert "does not load this bundle (missing keys, 8 in all, such as a.b)" in helped
    assert 'open_runtime("transformers"' in helped
    assert "AutoModelForCausalLM" not in helped


def test_serve_of_gguf_names_the_first_file():
    files = {f"model-0000{number}-of-00002.gguf": {} for number in (2, 1)}
    text = serve("gguf", {"method": "none"}, files=files)
    assert "llama-server --model model-00001-of-00002.gguf" in text
    assert "00002-of" not in text


def test_serve_of_onnx_is_for_the_runtime_that_the_bundle_was_made_for():
    plain = serve("onnx", {"method": "none"}, files={"model.onnx": {}})
    assert "pip install onnxruntime tokenizers numpy" in plain
    genai = serve("onnx", {"method": "none"}, files={"genai_config.json": {}})
    assert "pip install onnxruntime-genai" in genai


def test_load_container_refuses_an_unknown_format():
    with pytest.raises(ConfigError, match=r"unknown format 'ggu'.*did you mean gguf"):
        load_container("ggu")
