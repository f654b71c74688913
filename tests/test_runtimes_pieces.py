"""Logits handed over in parts are those of the whole sequences, whatever the size of a part."""

import numpy as np
import pytest
from rounded import rounded, tokens_of
from scipy.special import log_softmax

from quantline.runtimes import runtime as runtimes
from quantline.model.checkpoint import Checkpoint
from quantline.config.params import Variant
from quantline.formats.container import load_format
from quantline.runtimes import llama_cpp
from quantline.runtimes.runtime import open_runtime, pieces

CONTAINERS = {"llama.cpp": ("gguf", "float32"), "onnxruntime": ("onnx", None), "transformers": ("safetensors", None)}
COUNT, LENGTH = 5, 23


@pytest.fixture(scope="module", params=sorted(CONTAINERS))
def engine(request, tmp_path_factory, tiny_model):
    """(a runtime, tokens, their log-probabilities)."""
    name, dtype = CONTAINERS[request.param]
    folder, model = tmp_path_factory.mktemp(name), Checkpoint(tiny_model)
    quantized = rounded(folder / "quantized", model, bits=0)
    (folder / "bundle").mkdir()
    variant = Variant(recipe="none", format=name, runtime=request.param, dtype=dtype)
    load_format(name).write(model, quantized, folder / "bundle", variant)
    runtime, tokens = open_runtime(request.param, folder / "bundle", 2), tokens_of(model, COUNT, LENGTH)
    return runtime, tokens, runtime.logprobs(tokens)


@pytest.mark.parametrize(("first", "end"), [(0, LENGTH), (0, LENGTH - 1), (11, LENGTH - 1), (LENGTH - 2, LENGTH - 1), (3, 4)])
@pytest.mark.parametrize(("values", "batch"), [(1 << 25, 512), (384 * 7, 512), (1, 512), (384 * 50, 64), (1 << 25, 8)])
def test_parts_make_up_the_whole(engine, first, end, values, batch, monkeypatch):
    runtime, tokens, whole = engine
    for module in (runtimes, llama_cpp):
        monkeypatch.setattr(module, "PIECE_VALUES", values)
    monkeypatch.setattr(llama_cpp, "BATCH_TOKENS", batch)
    monkeypatch.setattr(llama_cpp, "CELLS", 1)
    monkeypatch.setattr(runtimes, "PIECE_TOKENS", batch)
    found, largest = np.full((COUNT, LENGTH, whole.shape[-1]), np.nan, np.float32), 0
    for rows, places, logits in pieces(runtime, tokens, first, end):
        assert np.isnan(found[rows, places]).all()  # each once
        found[rows, places], largest = log_softmax(logits, axis=-1), max(largest, logits.size)
    assert np.isnan(found[:, :first]).all() and np.isnan(found[:, end:]).all()
    assert np.abs(found[:, first:end] - whole[:, first:end]).max() < 2e-5
    assert largest <= max(values, whole.shape[-1])


def test_a_runtime_without_parts_hands_over_whole_sequences(engine):
    class Plain:
        logprobs = staticmethod(engine[0].logprobs)

    found = [part for *_, part in pieces(Plain(), engine[1], 2, LENGTH - 1)]
    assert np.array_equal(np.concatenate(found), engine[2][:, 2:LENGTH - 1])


def test_a_sequence_does_not_feel_its_neighbours(engine):
    runtime, tokens, whole = engine
    assert np.abs(np.concatenate([runtime.logprobs(row[None]) for row in tokens]) - whole).max() < 2e-5


@pytest.mark.parametrize("engine", ["llama.cpp"], indirect=True)
def test_the_number_of_threads_does_not_show(engine, monkeypatch):
    """Two batches side by side, or one after another, by one thread or by several."""
    runtime, tokens, whole = engine
    for threads in (1, 3, 4):
        monkeypatch.setattr(runtime, "threads", threads)
        assert np.array_equal(runtime.logprobs(tokens), whole)
