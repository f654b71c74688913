"""ggml's quantizer, against the gguf package and llama.cpp's own quantize."""

from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, quants
from hypothesis import given
from hypothesis import strategies as st

from quantline.config.recipes import parse_recipe
from quantline.errors import Failure, StageError
from quantline.formats.gguf.architectures import gguf_names, row_order
from quantline.methods.ggml import quantize
from quantline.methods.ggml.mix_rules import BASE_TYPES, ModelTraits
from quantline.methods.ggml.mixes import requested_type
from quantline.methods.ggml.quantize import NEEDS_IMPORTANCE, as_float32, quantize_blocks
from quantline.methods.method import load_method
from quantline.model.checkpoint import Checkpoint
from tests.helpers import llama_quantize
from tests.helpers.gguf import file_of, write_unquantized

pytestmark = pytest.mark.xdist_group("ggml tables")  # each process makes them for seconds

# Largest error over the weight's largest number that each type may make.
LARGEST_ERRORS = {
    "IQ2_S": 0.6,
    "IQ3_XXS": 0.5,
    "IQ3_S": 0.4,
    "IQ4_XS": 0.15,
    "TQ1_0": 1.0,
    "TQ2_0": 1.0,
    "MXFP4": 0.3,
    "Q2_K": 0.5,
    "Q3_K": 0.25,
    "Q4_K": 0.1,
    "Q5_K": 0.05,
    "Q6_K": 0.04,
    "Q8_0": 0.005,
    "IQ4_NL": 0.15,
    "Q4_0": 0.13,
    "Q4_1": 0.08,
    "Q5_0": 0.07,
    "Q5_1": 0.04,
}
SLOW = ("IQ1_S", "IQ1_M", "IQ2_XS", "IQ2_XXS")  # whose tables take seconds
# Types that the gguf package quantizes too.
SIMPLE_TYPES = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "F16", "BF16", "F32"]


def normal_rows(seed: int, count: int = 4, width: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def dequantize(blocks: np.ndarray, ggml_type: str) -> np.ndarray:
    return quants.dequantize(blocks, GGMLQuantizationType[ggml_type])


@given(st.integers(0, 2**32 - 1), st.sampled_from(SIMPLE_TYPES))
def test_quantize_blocks_makes_those_of_the_gguf_package(seed, ggml_type):
    weight = normal_rows(seed, 2, 64)
    blocks = quantize_blocks(weight, ggml_type)
    expected = quants.quantize(weight, GGMLQuantizationType[ggml_type])
    assert np.array_equal(blocks, expected.view(np.uint8).reshape(blocks.shape))


@pytest.mark.parametrize("ggml_type", LARGEST_ERRORS)
def test_quantize_blocks_makes_blocks_that_stand_for_the_weights(ggml_type):
    weight = normal_rows(1)
    stored = dequantize(quantize_blocks(weight, ggml_type), ggml_type)
    assert np.abs(stored - weight).max() <= LARGEST_ERRORS[ggml_type] * np.abs(weight).max()


@pytest.mark.parametrize("ggml_type", ["Q2_K", "Q4_K", "Q6_K"])
def test_quantize_blocks_moves_errors_to_where_they_matter_less(ggml_type):
    weight = normal_rows(2, 64)
    importance = np.geomspace(1e-3, 10, 256).astype(np.float32)

    def weighted_error(blocks: np.ndarray) -> float:
        return float(((dequantize(blocks, ggml_type) - weight) ** 2 * importance).sum())

    with_importance = quantize_blocks(weight, ggml_type, importance)
    without = quantize_blocks(weight, ggml_type)
    assert weighted_error(with_importance) < weighted_error(without)


def test_quantize_blocks_does_not_depend_on_threads(monkeypatch):
    monkeypatch.setattr(quantize, "WEIGHTS_AT_ONCE", 256 * 3)
    weight = normal_rows(3, 10)
    importance = np.abs(normal_rows(4, 1))[0]
    blocks = quantize_blocks(weight, "Q4_K", importance, threads=1)
    assert np.array_equal(blocks, quantize_blocks(weight, "Q4_K", importance, threads=3))
    assert np.array_equal(blocks[4:5], quantize_blocks(weight[4:5], "Q4_K", importance))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_quantize_blocks_takes_weights_in_half_precision_as_they_are(dtype):
    weight = normal_rows(5, 6).astype(dtype)
    converted = as_float32(weight)
    assert converted.dtype == np.float32
    assert np.array_equal(converted, weight.astype(np.float32))
    assert np.array_equal(as_float32(weight.T), weight.T.astype(np.float32))
    for ggml_type in ("Q4_K", "Q8_0"):
        blocks = quantize_blocks(weight, ggml_type)
        assert np.array_equal(blocks, quantize_blocks(converted, ggml_type))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_quantize_blocks_refuses_weights_that_are_not_finite(value):
    weight = normal_rows(5)
    weight[1, 7] = value
    with pytest.raises(StageError, match="not finite") as caught:
        quantize_blocks(weight, "Q4_K")
    assert caught.value.failure == Failure.NON_FINITE


def test_quantize_blocks_keeps_large_numbers_where_a_type_holds_them():
    """Gemma 4 has factors of 1e30 for the frequencies that are not rotated."""
    factors = np.array([[1.0, 1e30]], np.float32)
    assert quantize_blocks(factors, "F32").view(np.float32).tolist() == factors.tolist()
    with pytest.raises(StageError, match="at most") as caught:
        quantize_blocks(np.tile(factors, (1, 16)), "Q8_0")
    assert caught.value.failure == Failure.NON_FINITE


def test_quantize_blocks_names_a_ggml_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    quantize._ggml_library.cache_clear()
    with pytest.raises(StageError, match="pip install llama-cpp-python") as caught:
        quantize_blocks(normal_rows(6), "Q4_K")
    assert caught.value.failure == Failure.RUNTIME_UNAVAILABLE


@pytest.mark.parametrize("ggml_type", ["IQ1_S", "IQ2_XXS", "IQ2_XS"])
def test_quantize_blocks_refuses_types_at_which_ggml_stops_without_importance(ggml_type):
    assert ggml_type in NEEDS_IMPORTANCE
    with pytest.raises(StageError, match=f"does not make {ggml_type} without one") as caught:
        quantize_blocks(normal_rows(7), ggml_type)
    assert caught.value.failure == Failure.IMPORTANCE_MISSING


@pytest.mark.parametrize("kernel", ["ggml", "numba"])
def test_kquant_rounds_with_the_recipes_kernel(kernel, monkeypatch):
    recipe = parse_recipe({"method": "kquant", "mix": "Q4_K_M", "kernel": kernel})
    method = load_method(recipe)
    assert type(method) is quantize.KQuant
    assert not method.scales_inputs
    weight = normal_rows(8)
    importance = np.abs(normal_rows(9, 1))[0]
    expected = quantize_blocks(weight, "Q4_K", importance)
    used = []
    original = quantize_blocks

    def listen(*arguments, **options):
        used.append(options["kernel"])
        return original(*arguments, **options)

    monkeypatch.setattr(quantize, "quantize_blocks", listen)
    blocks, extra = method.quantize(weight, "Q4_K", importance, None)
    assert np.array_equal(blocks, expected)
    assert extra == {}
    assert np.array_equal(method.preview(weight, "Q4_K", importance, None), expected)
    assert used == [kernel, kernel]
    assert method.preview_rounding == "ggml"


class Unquantized(NamedTuple):
    """A model, its 32-bit file, and an importance matrix by names in the file."""

    source: Checkpoint
    file: str
    matrix: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def unquantized(tmp_path_factory, make_model) -> Unquantized:
    folder = tmp_path_factory.mktemp("mixes")
    model = make_model(
        folder / "model",
        hidden_size=256,
        intermediate_size=256,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=1,
        tie_word_embeddings=False,
    )
    written = write_unquantized(folder, model, "float32")
    generator = np.random.default_rng(0)
    matrix = {}
    for name, gguf_name in gguf_names(written.source).items():
        shape = written.source.shape(name)
        if gguf_name.startswith("blk.") and len(shape) > 1:
            matrix[gguf_name] = generator.gamma(1, size=shape[-1]).astype(np.float32)
    return Unquantized(written.source, file_of(written.bundle), matrix)


@pytest.mark.parametrize("with_importance", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize(
    "mix",
    [pytest.param(mix, marks=[pytest.mark.slow] * (mix in SLOW)) for mix in BASE_TYPES],
)
def test_quantize_blocks_makes_llama_cpps_bytes(mix, with_importance, unquantized, tmp_path):
    source, file, matrix = unquantized
    importance = matrix if with_importance else {}
    arch = source.arch
    traits = ModelTraits(
        arch.layers, arch.tied, arch.heads // arch.kv_heads, has_importance=with_importance
    )
    names = gguf_names(source)
    types = {}
    for name, gguf_name in names.items():
        types[name] = requested_type(mix, gguf_name, len(source.shape(name)), traits)
    if not with_importance:
        status, log = llama_quantize.quantize(file, tmp_path / "theirs.gguf", mix)
        if status:
            assert "requires an importance matrix" in log
            return
    # Ours come first: llama.cpp frees the tables that ggml takes seconds to make.
    ours = {}
    for name, gguf_name in names.items():
        tensor = source.tensor(name)
        order = row_order(arch, name, len(tensor))
        ordered = np.atleast_2d(tensor if order is None else tensor[order])
        ours[name] = quantize_blocks(ordered, types[name], importance.get(gguf_name))
    status, log = llama_quantize.quantize(
        file, tmp_path / "theirs.gguf", mix, matrix if with_importance else None
    )
    assert status == 0, log
    theirs = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "theirs.gguf").tensors}
    assert set(names.values()) == set(theirs)
    for name, gguf_name in names.items():
        assert theirs[gguf_name].tensor_type.name == types[name], name
        expected = np.asarray(theirs[gguf_name].data).view(np.uint8)
        assert np.array_equal(ours[name].reshape(-1), expected.reshape(-1)), name
