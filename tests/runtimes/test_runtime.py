"""Logits that are handed over in chunks are those of the whole sequences."""

import numpy as np
import pytest
from scipy.special import log_softmax

from quantline.model.checkpoint import Checkpoint
from quantline.runtimes import llama_cpp, llama_cpp_context, runtime
from quantline.runtimes.runtime import logit_chunks, open_runtime
from tests.helpers.quantized import rounded, tokens_of
from tests.helpers.variants import write_variant

# Runtime → its container, and the type of its weights.
CONTAINERS = {
    "llama.cpp": ("gguf", "float32"),
    "onnxruntime": ("onnx", None),
    "transformers": ("safetensors", None),
}
COUNT = 5
LENGTH = 23


@pytest.fixture(scope="module", params=sorted(CONTAINERS))
def served(request, tmp_path_factory, tiny_model):
    """A runtime, tokens, and their log-probabilities."""
    container, dtype = CONTAINERS[request.param]
    folder = tmp_path_factory.mktemp(container)
    source = Checkpoint(tiny_model)
    quantized = rounded(folder / "quantized", source, bits=0)
    write_variant(container, folder / "bundle", source, quantized, dtype=dtype)
    engine = open_runtime(request.param, folder / "bundle", 2)
    tokens = tokens_of(source, COUNT, LENGTH)
    return engine, tokens, engine.logprobs(tokens)


@pytest.mark.parametrize(
    ("first", "end"),
    [(0, LENGTH), (0, LENGTH - 1), (11, LENGTH - 1), (LENGTH - 2, LENGTH - 1), (3, 4)],
)
@pytest.mark.parametrize(
    ("values", "batch"), [(1 << 25, 512), (384 * 7, 512), (1, 512), (384 * 50, 64), (1 << 25, 8)]
)
def test_logit_chunks_make_up_the_whole(served, first, end, values, batch, monkeypatch):
    engine, tokens, expected = served
    for module in (runtime, llama_cpp):
        monkeypatch.setattr(module, "CHUNK_VALUES", values)
    monkeypatch.setattr(llama_cpp, "BATCH_TOKENS", batch)
    for module in (llama_cpp, llama_cpp_context):
        monkeypatch.setattr(module, "CELL_STEP", 1)
    monkeypatch.setattr(runtime, "CHUNK_TOKENS", batch)
    found = np.full((COUNT, LENGTH, expected.shape[-1]), np.nan, np.float32)
    largest = 0
    for chunk in logit_chunks(engine, tokens, first, end):
        assert np.isnan(found[chunk.rows, chunk.positions]).all()  # each once
        found[chunk.rows, chunk.positions] = log_softmax(chunk.logits, axis=-1)
        largest = max(largest, chunk.logits.size)
    assert np.isnan(found[:, :first]).all()
    assert np.isnan(found[:, end:]).all()
    assert np.abs(found[:, first:end] - expected[:, first:end]).max() < 2e-5
    assert largest <= max(values, expected.shape[-1])


def test_logit_chunks_of_a_runtime_without_them_are_whole_sequences(served):
    engine, tokens, expected = served

    class Plain:
        logprobs = staticmethod(engine.logprobs)

    chunks = list(logit_chunks(Plain(), tokens, 2, LENGTH - 1))
    found = np.concatenate([chunk.logits for chunk in chunks])
    assert np.array_equal(found, expected[:, 2 : LENGTH - 1])


def test_logprobs_of_a_sequence_do_not_depend_on_its_neighbours(served):
    engine, tokens, expected = served
    alone = np.concatenate([engine.logprobs(row[None]) for row in tokens])
    assert np.abs(alone - expected).max() < 2e-5


@pytest.mark.parametrize("served", ["llama.cpp"], indirect=True)
def test_logprobs_do_not_depend_on_the_number_of_threads(served, monkeypatch):
    """Two batches side by side, or one after another, by one thread or by several."""
    engine, tokens, expected = served
    for threads in (1, 3, 4):
        monkeypatch.setattr(engine, "threads", threads)
        assert np.array_equal(engine.logprobs(tokens), expected)
