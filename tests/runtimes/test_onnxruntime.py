"""onnxruntime as a runtime: the numbers of torch, without torch and transformers."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from scipy.special import log_softmax

from quantline.errors import StageError
from quantline.formats.onnx.graph import right_graph
from quantline.formats.onnx.subgraphs import names_read
from quantline.model.checkpoint import Checkpoint
from quantline.runtimes.runtime import open_runtime
from quantline.runtimes.smoke.tokenizer_parity import TEXTS, compare_tokenizers
from quantline.text.tokenizer import Tokenizer
from tests.helpers.models import write_tokenizer
from tests.helpers.project import ROOT
from tests.helpers.quantized import (
    rounded,
    tokens_of,
    torch_greedy,
    torch_logprobs,
    torch_model,
)
from tests.helpers.small_models import small_model
from tests.helpers.variants import write_variant

TOLERANCE = 1e-3  # in logits
IMPORTS = """
import json
import sys
from pathlib import Path

import numpy as np

from quantline.runtimes.runtime import open_runtime

open_runtime("onnxruntime", Path(sys.argv[1]), 1).logprobs(np.zeros((1, 3), np.int32))
print(json.dumps(sorted({"torch", "transformers", "onnx"} & set(sys.modules))))
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, tiny_model):
    """The tiny model as float32 ONNX. Read only."""
    folder = tmp_path_factory.mktemp("bundle")
    source = Checkpoint(tiny_model)
    quantized = rounded(folder / "q", source, bits=0)
    write_variant("onnx", folder / "out", source, quantized)
    return folder / "out"


@pytest.mark.parametrize("kind", ["symlink", "hard link"])
def test_a_bundle_of_links_into_a_cache_loads(bundle, engine, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    linked = tmp_path / "größe, 2/bundle"
    linked.mkdir(parents=True)
    large = shutil.copytree(bundle, tmp_path / "large")
    graph = onnx.load(large / "model.onnx")
    onnx.save(graph, large / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    for number, path in enumerate(sorted(large.iterdir())):
        cached = tmp_path / f"cache/{number}/{number}"
        cached.parent.mkdir(parents=True)
        shutil.copy(path, cached)
        make = os.symlink if kind == "symlink" else os.link
        make(cached, linked / path.name)
    assert (linked / "model.onnx.data").is_file()
    tokens = np.arange(8)[None]
    found = open_runtime("onnxruntime", linked, 1).logprobs(tokens)
    assert np.array_equal(found, engine.logprobs(tokens))
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "größe, 2", "large"}


@pytest.fixture(scope="module")
def engine(bundle):
    return open_runtime("onnxruntime", bundle, 1)


@pytest.fixture(scope="module")
def reference(tiny_model, tmp_path_factory):
    source = Checkpoint(tiny_model)
    folder = tmp_path_factory.mktemp("plain")
    return torch_model(source, rounded(folder / "q", source, bits=0))


def torch_logits(reference, tokens: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return reference(torch.from_numpy(tokens).long()).logits.numpy()


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 7), (3, 33)])
def test_logprobs_agree_with_torch(engine, reference, tiny_model, batch, length):
    tokens = tokens_of(Checkpoint(tiny_model), batch, length)
    logits = engine._run(tokens)[0]
    assert np.abs(logits - torch_logits(reference, tokens)).max() <= TOLERANCE
    logprobs = engine.logprobs(tokens)
    assert logprobs.dtype == np.float32
    assert logprobs.shape == (batch, length, 384)
    assert np.abs(logprobs - torch_logprobs(reference, tokens)).max() <= TOLERANCE


def test_run_with_the_cache_agrees_with_torch(engine, reference, tiny_model):
    tokens = tokens_of(Checkpoint(tiny_model), 2, 20)
    parts = []
    past = None
    for start, end in ((0, 7), (7, 8), (8, 9), (9, 20)):
        logits, past = engine._run(tokens[:, start:end], past)
        parts.append(logits)
    logits = np.concatenate(parts, 1)
    assert past.tokens == 20
    assert past.states[0].shape == (2, 2, 20, 64)
    assert np.abs(logits - torch_logits(reference, tokens)).max() <= TOLERANCE
    logprobs = log_softmax(logits, axis=-1)
    assert np.abs(logprobs - engine.logprobs(tokens)).max() <= TOLERANCE


@pytest.mark.parametrize("model_type", ["lfm2", "mamba2"])
def test_states_of_other_kinds_are_carried(tmp_path, model_type):
    """A short convolution beside attention, and a model without anything that grows."""
    model = small_model(model_type, vocab_size=write_tokenizer(tmp_path))
    graph = right_graph(model)
    weights = dict(model.named_parameters(remove_duplicate=False))
    for name in names_read(graph.graph) & set(weights):
        tensor = onnx.numpy_helper.from_array(weights[name].numpy(), name)
        graph.graph.initializer.append(tensor)
    onnx.save(graph, tmp_path / "model.onnx")
    engine = open_runtime("onnxruntime", tmp_path, 1)
    tokens = np.arange(24).reshape(2, 12)
    first, past = engine._run(tokens[:, :5])
    second, past = engine._run(tokens[:, 5:], past)
    assert past.tokens == 12
    expected = torch_logits(model, tokens)
    assert np.abs(np.concatenate((first, second), 1) - expected).max() <= TOLERANCE
    prompt = np.array([[15, 16, 17]])
    assert engine.generate(prompt[0].tolist(), 6, set()) == torch_greedy(model, prompt, 6)


def test_generate_is_torchs_greedy_decoding(engine, reference, tiny_model):
    tokens = tokens_of(Checkpoint(tiny_model), batch=1, length=9)
    prompt = tokens[0].tolist()
    expected = torch_greedy(reference, tokens, 12)
    assert engine.generate(prompt, 12, set()) == expected
    stop = expected[5]
    assert engine.generate(prompt, 12, {stop}) == expected[: expected.index(stop)]


def test_encode_gives_the_sources_ids(engine, tiny_model):
    assert compare_tokenizers(engine, Tokenizer(tiny_model)) == ([], len(TEXTS))
    text = "ada met <|im_end|> hugo"
    assert engine.decode(engine.encode(text)) == text


def test_engine_imports_neither_torch_nor_transformers(bundle):
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, str(bundle)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert json.loads(done.stdout) == []


def test_engine_names_a_graph_that_cannot_be_read(tmp_path, bundle):
    (tmp_path / "model.onnx").write_bytes((bundle / "model.onnx").read_bytes()[:1000])
    with pytest.raises(StageError, match=r"onnxruntime says: .*Protobuf parsing failed") as caught:
        open_runtime("onnxruntime", tmp_path, 1)
    assert caught.value.failure == "runtime_crashed"
