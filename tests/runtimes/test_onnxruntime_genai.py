"""onnxruntime-genai as a runtime: it loads what the export writes, with onnxruntime's numbers."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from quantline.errors import StageError
from quantline.model.checkpoint import Checkpoint
from quantline.runtimes.runtime import open_runtime
from quantline.runtimes.smoke.tokenizer_parity import compare_tokenizers
from quantline.text.tokenizer import Tokenizer
from tests.helpers.quantized import rounded, tokens_of
from tests.helpers.variants import write_variant

VARIANT = "onnx-fp32-genai"
STAGES = (
    ("load", None),
    ("calibrate", None),
    ("reference", None),
    ("quantize", "none"),
    ("export", VARIANT),
    ("evaluate", VARIANT),
)


@pytest.fixture(scope="module", params=[0, 4], ids=["fp32", "int4"])
def bundle(request, tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("genai")
    source = Checkpoint(tiny_model)
    quantized = rounded(folder / "q", source, bits=request.param)
    write_variant("onnx", folder / "out", source, quantized, runtime="onnxruntime-genai")
    return folder / "out"


@pytest.fixture(scope="module")
def engine(bundle):
    return open_runtime("onnxruntime-genai", bundle, 1)


@pytest.fixture(scope="module")
def onnxruntime(bundle):
    return open_runtime("onnxruntime", bundle, 1)


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 33), (1, 256)])  # the model's longest
def test_logprobs_are_onnxruntimes(engine, onnxruntime, tiny_model, batch, length):
    tokens = tokens_of(Checkpoint(tiny_model), batch, length)
    logprobs = engine.logprobs(tokens)
    assert logprobs.dtype == np.float32
    assert logprobs.shape == (batch, length, 384)
    assert np.abs(logprobs - onnxruntime.logprobs(tokens)).max() <= 1e-4


def test_logprobs_count_the_end_token_inside_a_text(engine, onnxruntime):
    """The library leaves out padding, and many models pad with the end or begin token."""
    tokens = np.array([[0, 5, 6, 0, 8, 9, 0], [5, 6, 7, 8, 0, 0, 9]], np.int32)
    assert np.abs(engine.logprobs(tokens) - onnxruntime.logprobs(tokens)).max() <= 1e-4


def test_generate_is_onnxruntimes_also_past_the_end_token(engine, onnxruntime, tiny_model):
    prompt = tokens_of(Checkpoint(tiny_model), 1, 9)[0].tolist()
    answer = engine.generate(prompt, 24, set())
    assert len(answer) == 24
    assert answer == onnxruntime.generate(prompt, 24, set())
    assert engine.generate(prompt, 24, {answer[5]}) == answer[: answer.index(answer[5])]
    ended = [*prompt, 0]  # 0 ends a text
    answer = engine.generate(ended, 8, set())
    assert len(answer) == 8
    assert answer == onnxruntime.generate(ended, 8, set())


def test_encode_gives_the_sources_ids(engine, tiny_model):
    source = Tokenizer(tiny_model)
    parity = compare_tokenizers(engine, source)
    assert parity.compared > 10
    assert parity.differing == []
    ids = source.encode("ada met hugo by the river, 12.")
    assert engine.decode(ids) == source.decode(ids)
    assert engine.decode([]) == ""


@pytest.mark.e2e
@pytest.mark.slow
def test_export_and_evaluate_serve_a_variant_and_so_do_the_lines_of_its_readme(project):
    project.compose("suite=genai", f"variant=[{VARIANT}]", "recipe=[none]")
    for stage, name in STAGES:
        project.stage(stage, name)
    quality = json.loads((project.root / f"metrics/{VARIANT}.json").read_text())
    assert quality["runtime"] == "onnxruntime-genai"
    assert 0 <= quality["mean_kld"] < 1e-6
    bundle = project.root / "artifacts/exports" / VARIANT
    readme = (bundle / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=bundle
    )
    engine = open_runtime("onnxruntime-genai", bundle, 1)
    answer = engine.decode(engine.generate(engine.encode("Hello"), 24, {0}))
    assert done.stdout.strip().startswith("Hello")
    assert answer.strip() in done.stdout


def test_engine_names_a_bundle_that_it_refuses(tmp_path, bundle):
    (tmp_path / "genai_config.json").write_text((bundle / "genai_config.json").read_text())
    words = r"expected onnxruntime-genai to load .*it says: \w"
    with pytest.raises(StageError, match=words) as caught:
        open_runtime("onnxruntime-genai", tmp_path, 1)
    assert caught.value.failure == "runtime_crashed"
