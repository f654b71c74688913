"""onnxruntime as a runtime: the numbers of torch on prefill and with the cache, without torch and transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rounded import rounded, tokens_of, torch_greedy, torch_logprobs, torch_model
from scipy.special import log_softmax

from quantline.model.checkpoint import Checkpoint
from quantline.text.tokenizer import Tokenizer
from quantline.config.params import Variant
from quantline.formats.onnx import container
from quantline.runtimes.runtime import open_runtime
from quantline.runtimes.tokenizer_parity import TEXTS, mismatches
from quantline.errors import StageError

TOLERANCE = 1e-3  # in logits


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, tiny_model):
    """The tiny model as float32 ONNX. Read only."""
    folder, model = tmp_path_factory.mktemp("bundle"), Checkpoint(tiny_model)
    (folder / "out").mkdir()
    container.write(model, rounded(folder / "q", model, bits=0), folder / "out",
                    Variant(recipe="rounded", format="onnx", runtime="onnxruntime"))
    return folder / "out"


@pytest.fixture(scope="module")
def engine(bundle):
    return open_runtime("onnxruntime", bundle, 1)


@pytest.fixture(scope="module")
def reference(tiny_model, tmp_path_factory):
    model = Checkpoint(tiny_model)
    return torch_model(model, rounded(tmp_path_factory.mktemp("plain") / "q", model, bits=0))


def logits_of(reference, tokens):
    import torch

    with torch.inference_mode():
        return reference(torch.from_numpy(tokens).long()).logits.numpy()


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 7), (3, 33)])
def test_prefill_agrees_with_torch(engine, reference, tiny_model, batch, length):
    tokens = tokens_of(Checkpoint(tiny_model), batch, length)
    assert np.abs(engine._run(tokens)[0] - logits_of(reference, tokens)).max() <= TOLERANCE
    ours = engine.logprobs(tokens)
    assert ours.dtype == np.float32 and ours.shape == (batch, length, 384)
    assert np.abs(ours - torch_logprobs(reference, tokens)).max() <= TOLERANCE


def test_continuing_with_the_cache_agrees_with_torch(engine, reference, tiny_model):
    tokens = tokens_of(Checkpoint(tiny_model), 2, 20)
    parts, cache = [], None
    for start, end in ((0, 7), (7, 8), (8, 9), (9, 20)):
        logits, *cache = engine._run(tokens[:, start:end], cache)
        parts.append(logits)
    assert cache[0].shape == (2, 2, 20, 64)
    assert np.abs(np.concatenate(parts, 1) - logits_of(reference, tokens)).max() <= TOLERANCE
    assert np.abs(log_softmax(np.concatenate(parts, 1), axis=-1) - engine.logprobs(tokens)).max() <= TOLERANCE


def test_greedy_decoding_is_torchs(engine, reference, tiny_model):
    tokens = tokens_of(Checkpoint(tiny_model), batch=1, length=9)
    wanted = torch_greedy(reference, tokens, 12)
    assert engine.generate(tokens[0].tolist(), 12, set()) == wanted
    stop = wanted[5]
    assert engine.generate(tokens[0].tolist(), 12, {stop}) == wanted[:wanted.index(stop)]


def test_the_bundles_tokenizer_is_the_sources(engine, tiny_model):
    wrong, compared = mismatches(engine, Tokenizer(tiny_model))
    assert (wrong, compared) == ([], len(TEXTS))
    assert engine.decode(engine.encode("ada met <|im_end|> hugo")) == "ada met <|im_end|> hugo"


def test_neither_torch_nor_transformers_is_imported(bundle):
    code = ("import json, sys, numpy as np\nfrom pathlib import Path\nfrom quantline.runtimes.runtime import open_runtime\n"
            "open_runtime('onnxruntime', Path(sys.argv[1]), 1).logprobs(np.zeros((1, 3), np.int32))\n"
            "print(json.dumps(sorted({'torch', 'transformers', 'onnx'} & set(sys.modules))))")
    root = str(Path(__file__).resolve().parent.parent)
    done = subprocess.run([sys.executable, "-c", code, str(bundle)], capture_output=True, text=True, check=True,
                          env=os.environ | {"PYTHONPATH": root})
    assert json.loads(done.stdout) == []


def test_a_graph_that_cannot_be_read_is_a_named_failure(tmp_path, bundle):
    (tmp_path / "model.onnx").write_bytes((bundle / "model.onnx").read_bytes()[:1000])
    with pytest.raises(StageError, match="onnxruntime cannot load .*export it again") as error:
        open_runtime("onnxruntime", tmp_path, 1)
    assert error.value.failure == "runtime_crashed"
