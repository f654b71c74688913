"""ggml's quantizer and the mixes, against the gguf package and llama.cpp's own quantize."""

import llama_quantize
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, quants
from hypothesis import given
from hypothesis import strategies as st
from rounded import rounded

from quantline.model.architecture import architecture
from quantline.model.checkpoint import Checkpoint
from quantline.config.params import Variant
from quantline.formats.gguf import container as gguf
from quantline.methods.ggml import mixes, quantize as kquant
from quantline.errors import Failure, StageError

# Largest error over the row's largest weight that each type may make.
COARSEST = {"IQ2_S": 0.6, "IQ3_XXS": 0.5, "IQ3_S": 0.4, "IQ4_XS": 0.15, "TQ1_0": 1.0, "TQ2_0": 1.0, "MXFP4": 0.3, "Q2_K": 0.5, "Q3_K": 0.25, "Q4_K": 0.1, "Q5_K": 0.05, "Q6_K": 0.04, "Q8_0": 0.005, "IQ4_NL": 0.15,
            "Q4_0": 0.13, "Q4_1": 0.08, "Q5_0": 0.07, "Q5_1": 0.04}


def rows(seed: int, count: int = 4, width: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


@given(st.integers(0, 2**32 - 1), st.sampled_from(["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "F16", "BF16", "F32"]))
def test_blocks_are_those_of_the_gguf_package(seed, kind):
    weight = rows(seed, 2, 64)
    ours, theirs = kquant.quantize(weight, kind), quants.quantize(weight, GGMLQuantizationType[kind])
    assert np.array_equal(ours, theirs.view(np.uint8).reshape(ours.shape))


@pytest.mark.parametrize("kind", COARSEST)
def test_blocks_stand_for_the_weights(kind):
    weight = rows(1)
    back = quants.dequantize(kquant.quantize(weight, kind), GGMLQuantizationType[kind])
    assert np.abs(back - weight).max() <= COARSEST[kind] * np.abs(weight).max()


@pytest.mark.parametrize("kind", ["Q2_K", "Q4_K", "Q6_K"])
def test_importance_moves_the_error_to_where_it_matters_less(kind):
    weight, importance = rows(2, 64), np.geomspace(1e-3, 10, 256).astype(np.float32)

    def weighted(blocks):
        return float((((quants.dequantize(blocks, GGMLQuantizationType[kind]) - weight) ** 2) * importance).sum())

    assert weighted(kquant.quantize(weight, kind, importance)) < weighted(kquant.quantize(weight, kind))


def test_threads_do_not_show_in_the_bytes(monkeypatch):
    monkeypatch.setattr(kquant, "WEIGHTS_AT_ONCE", 256 * 3)
    weight, importance = rows(3, 10), np.abs(rows(4, 1))[0]
    one, three = (kquant.quantize(weight, "Q4_K", importance, threads) for threads in (1, 3))
    assert np.array_equal(one, three)
    assert np.array_equal(one[4:5], kquant.quantize(weight[4:5], "Q4_K", importance))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_weights_in_half_precision_are_taken_as_they_are(dtype):
    weight = rows(5, 6).astype(dtype)
    whole = kquant.as_float32(weight)
    assert whole.dtype == np.float32 and np.array_equal(whole, weight.astype(np.float32))
    assert np.array_equal(kquant.as_float32(weight.T), weight.T.astype(np.float32))
    for kind in ("Q4_K", "Q8_0"):
        assert np.array_equal(kquant.quantize(weight, kind), kquant.quantize(whole, kind))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(value):
    weight = rows(5)
    weight[1, 7] = value
    with pytest.raises(StageError, match="not finite") as caught:
        kquant.quantize(weight, "Q4_K")
    assert caught.value.failure == Failure.NON_FINITE


def test_a_runtime_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(kquant, "find_spec", lambda name: None)
    kquant._library.cache_clear()
    with pytest.raises(StageError, match="pip install llama-cpp-python") as caught:
        kquant.quantize(rows(6), "Q4_K")
    assert caught.value.failure == Failure.RUNTIME_UNAVAILABLE


@pytest.mark.parametrize("kind", ["IQ1_S", "IQ2_XXS", "IQ2_XS"])
def test_types_at_which_ggml_stops_the_process_are_refused_without_an_importance_matrix(kind):
    with pytest.raises(StageError, match=f"does not make {kind} without one") as caught:
        kquant.quantize(rows(7), kind)
    assert caught.value.failure == Failure.IMPORTANCE_MISSING


@pytest.fixture(scope="module")
def plain_file(tmp_path_factory, make_model):
    """(checkpoint, its 32-bit GGUF, an importance matrix)."""
    folder = tmp_path_factory.mktemp("mixes")
    model = Checkpoint(make_model(folder / "model", hidden_size=256, intermediate_size=256, num_attention_heads=2,
                                  num_key_value_heads=1, num_hidden_layers=1, tie_word_embeddings=False))
    (folder / "bundle").mkdir()
    gguf.write(model, rounded(folder / "quantized", model, bits=0), folder / "bundle",
               Variant(recipe="none", format="gguf", runtime="llama.cpp", dtype="float32"))
    draw, names = np.random.default_rng(0), gguf.tensor_names(model, architecture(model))
    matrix = {place: draw.gamma(1, size=model.shape(name)[-1]).astype(np.float32)
              for name, place in names.items() if place.startswith("blk.") and model.shape(name)[1:]}
    return model, folder / "bundle" / gguf.FILE, matrix


@pytest.mark.parametrize("importance", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("mix", mixes.BASE)
def test_bytes_are_those_of_llama_cpp(mix, importance, plain_file, tmp_path):
    model, source, matrix = plain_file
    facts = architecture(model)
    status, said = llama_quantize.quantize(source, tmp_path / "theirs.gguf", mix, matrix if importance else None)
    known = mixes.Model(facts.layers, facts.tied, facts.heads // facts.kv_heads, importance=importance)
    if status:  # a type that needs an importance matrix
        assert not importance and "requires an importance matrix" in said
        return
    theirs = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "theirs.gguf").tensors}
    for name, place in gguf.tensor_names(model, facts).items():
        tensor = model.tensor(name)
        kind = mixes.requested_type(mix, place, tensor.ndim, known)
        assert theirs[place].tensor_type.name == kind, name
        order = gguf.row_order(facts, name, len(tensor))
        ours = kquant.quantize(np.atleast_2d(tensor if order is None else tensor[order]), kind,
                               matrix.get(place) if importance else None)
        assert np.array_equal(ours.reshape(-1), np.asarray(theirs[place].data).view(np.uint8).reshape(-1)), name
