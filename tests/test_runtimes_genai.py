"""onnxruntime-genai as a runtime: it loads what the export writes, and its numbers are onnxruntime's."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from rounded import rounded, tokens_of

from quantline.model.checkpoint import Checkpoint
from quantline.text.tokenizer import Tokenizer
from quantline.config.params import Variant
from quantline.formats.onnx import container
from quantline.formats.onnx import genai_config as onnx_genai
from quantline.runtimes.runtime import open_runtime
from quantline.runtimes.tokenizer_parity import mismatches
from quantline.errors import StageError


def export(folder, source, runtime="onnxruntime-genai", bits=0):
    model = Checkpoint(source)
    (folder / "out").mkdir(parents=True)
    container.write(model, rounded(folder / "q", model, bits=bits), folder / "out", Variant(recipe="r", format="onnx", runtime=runtime))
    return folder / "out"


@pytest.fixture(scope="module", params=[0, 4], ids=["fp32", "int4"])
def bundle(request, tmp_path_factory, tiny_model):
    return export(tmp_path_factory.mktemp("genai"), tiny_model, bits=request.param)


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 33), (1, 256)])  # 256: the model's longest
def test_logprobs_are_onnxruntimes(bundle, tiny_model, batch, length):
    tokens = tokens_of(Checkpoint(tiny_model), batch, length)
    ours, plain = (open_runtime(name, bundle, 1).logprobs(tokens) for name in ("onnxruntime-genai", "onnxruntime"))
    assert ours.dtype == np.float32 and ours.shape == (batch, length, 384)
    assert np.abs(ours - plain).max() <= 1e-4


def test_the_end_token_in_a_text_is_looked_at(bundle):
    """The library leaves out padding, and many models pad with the token that ends or begins a text."""
    tokens = np.array([[0, 5, 6, 0, 8, 9, 0], [5, 6, 7, 8, 0, 0, 9]], np.int32)
    ours, plain = (open_runtime(name, bundle, 1).logprobs(tokens) for name in ("onnxruntime-genai", "onnxruntime"))
    assert np.abs(ours - plain).max() <= 1e-4


def test_greedy_decoding_is_onnxruntimes_also_past_the_end_token(bundle, tiny_model):
    prompt = tokens_of(Checkpoint(tiny_model), 1, 9)[0].tolist()
    engine, plain = (open_runtime(name, bundle, 1) for name in ("onnxruntime-genai", "onnxruntime"))
    written = engine.generate(prompt, 24, set())
    assert len(written) == 24 and written == plain.generate(prompt, 24, set())
    assert engine.generate(prompt, 24, {written[5]}) == written[:written.index(written[5])]
    ended = engine.generate([*prompt, 0], 8, set())  # 0 ends a text
    assert ended == plain.generate([*prompt, 0], 8, set()) and len(ended) == 8


def test_its_tokenizer_is_the_sources(bundle, tiny_model):
    engine, source = open_runtime("onnxruntime-genai", bundle, 1), Tokenizer(tiny_model)
    wrong, compared = mismatches(engine, source)
    assert compared > 10
    assert wrong == []
    ids = source.encode("ada met hugo by the river, 12.")
    assert engine.decode(ids) == source.decode(ids) and engine.decode([]) == ""


def test_the_configuration_is_written_for_this_runtime_alone(tmp_path, tiny_model):
    assert not (export(tmp_path / "a", tiny_model, "onnxruntime") / onnx_genai.FILE).exists()
    about = json.loads((export(tmp_path / "b", tiny_model) / onnx_genai.FILE).read_text())["model"]
    assert (about["vocab_size"], about["context_length"], about["eos_token_id"], about["pad_token_id"]) == (384, 256, [0], -1)
    assert (about["decoder"]["head_size"], about["decoder"]["num_key_value_heads"], about["decoder"]["num_hidden_layers"]) == (64, 2, 2)


def test_a_variant_is_exported_and_measured_and_the_lines_of_its_readme_serve_it(project):
    project.compose("suite=genai", "variant=[onnx-fp32-genai]", "recipe=[none]")
    name = "onnx-fp32-genai"
    for stage, instance in (("load", None), ("calibrate", None), ("reference", None), ("quantize", "none"), ("export", name), ("evaluate", name)):
        project.stage(stage, instance)
    quality = json.loads((project.root / f"metrics/{name}.json").read_text())
    assert quality["runtime"] == "onnxruntime-genai" and 0 <= quality["mean_kld"] < 1e-6
    bundle = project.root / "artifacts/exports" / name
    code = re.search(r"```python\n(.*?)```", (bundle / "README.md").read_text(), re.DOTALL)[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=bundle)
    engine = open_runtime("onnxruntime-genai", bundle, 1)
    prompt = engine.encode("Hello")
    assert done.stdout.strip().startswith("Hello") and engine.decode(engine.generate(prompt, 24, {0})).strip() in done.stdout


def test_a_bundle_that_it_refuses_is_a_named_failure(tmp_path, bundle):
    (tmp_path / "genai_config.json").write_text((bundle / "genai_config.json").read_text())
    with pytest.raises(StageError, match="onnxruntime-genai cannot load .*export it again") as error:
        open_runtime("onnxruntime-genai", tmp_path, 1)
    assert error.value.failure == "runtime_crashed"
