"""Recipes in ggml's blocks on whole models: the files are llama.cpp's own."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from quantline.errors import Failure, StageError
from quantline.formats.bundle.verify_container import check_container
from quantline.formats.container import load_container
from quantline.formats.gguf.architectures import gguf_names
from quantline.formats.gguf.imatrix import (
    FILE,
    Entry,
    ImportanceMatrix,
    read_importance,
    write_importance,
)
from quantline.methods.ggml.block_types import dequantize_blocks, plain_grid_of
from quantline.methods.ggml.quantize import quantize_blocks
from quantline.methods.integer.grid import Grid
from quantline.methods.integer.round_to_nearest import round_to_nearest
from quantline.quantized.store import QuantizedModel
from quantline.recipes import ggml
from quantline.recipes.ggml import diagonal_errors, weighted_square
from tests.helpers import llama_quantize
from tests.helpers.ggml_recipes import (
    CalibratedModel,
    assert_same_tensors,
    calibrated_model,
    importance_in,
    kquant,
    quantize_by,
    tensors_in,
)
from tests.helpers.gguf import file_of
from tests.helpers.variants import write_variant


@pytest.fixture(scope="module")
def model(tmp_path_factory, make_model) -> CalibratedModel:
    """A dense model."""
    folder = tmp_path_factory.mktemp("dense")
    source = make_model(folder / "model", intermediate_size=256, num_hidden_layers=3)
    return calibrated_model(folder, source, 3, 33, with_file=True)


def export(model: CalibratedModel, quantized: QuantizedModel, bundle: Path) -> dict[str, str]:
    """Write the GGUF file; return source tensor → requested type."""
    return write_variant("gguf", bundle, model.source, quantized)


def check(
    model: CalibratedModel, quantized: QuantizedModel, bundle: Path, requested: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """Read the file back, where no type may be another than was asked for."""
    container = load_container("gguf")
    return check_container(container, bundle, model.source, quantized, requested, True)


@pytest.mark.parametrize("mix", ["Q4_K_M", pytest.param("IQ3_XXS", marks=pytest.mark.slow), "Q4_0"])
def test_quantize_block_with_our_importance_makes_llama_cpps_file(model, mix, tmp_path):
    quantized = quantize_by(kquant(mix), model, tmp_path / "quantized")
    importance = importance_in(tmp_path / "quantized" / FILE)
    theirs = tmp_path / "theirs.gguf"
    status, log = llama_quantize.quantize(model.file, theirs, mix, importance)
    assert status == 0, log
    export(model, quantized, tmp_path / "out")
    assert_same_tensors(tensors_in(file_of(tmp_path / "out")), tensors_in(theirs))


@pytest.mark.parametrize(
    "mix", ["Q4_K_M", pytest.param("IQ2_S", marks=pytest.mark.slow), "MXFP4_MOE"]
)
def test_quantize_block_puts_experts_in_one_tensor_with_an_importance_each(
    mix, tmp_path, make_model
):
    source = make_model(
        tmp_path / "model",
        "mixtral",
        intermediate_size=256,
        num_hidden_layers=1,
        num_local_experts=4,
        tie_word_embeddings=False,
    )
    model = calibrated_model(tmp_path, source, 3, 33, with_file=True)
    quantized = quantize_by(kquant(mix), model, tmp_path / "quantized")
    requested = export(model, quantized, tmp_path / "out")
    importance = importance_in(tmp_path / "quantized" / FILE)
    experts = importance["blk.0.ffn_down_exps.weight"]
    assert experts.shape == (4, 256)
    assert len(np.unique(experts, axis=0)) == 4
    theirs = tmp_path / "theirs.gguf"
    status, log = llama_quantize.quantize(model.file, theirs, mix, importance)
    assert status == 0, log
    assert_same_tensors(tensors_in(file_of(tmp_path / "out")), tensors_in(theirs))
    checked = check(model, quantized, tmp_path / "out", requested)
    assert len(checked) == len(model.source.names)


def test_quantize_block_writes_importance_as_the_tool_does(model, tmp_path):
    """It is the mean square of the inputs."""
    quantize_by(kquant("Q4_K_M"), model, tmp_path / "quantized")
    path = tmp_path / "quantized" / FILE
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    expected = {
        "general.type": "imatrix",
        "imatrix.datasets": ["a/text.txt"],
        "imatrix.chunk_count": 3,
        "imatrix.chunk_size": 33,
    }
    assert {key: fields[key] for key in expected} == expected
    shapes = {tensor.name: tuple(map(int, tensor.shape)) for tensor in reader.tensors}
    assert len(shapes) == 2 * 3 * 7
    assert shapes["blk.2.ffn_down.weight.in_sum2"] == (256, 1)
    assert shapes["blk.2.ffn_down.weight.counts"] == (1, 1)
    importance = importance_in(path)
    entries = read_importance(path).entries
    layers = {"blk.0.attn_q": "0.self_attn.q_proj", "blk.2.ffn_down": "2.mlp.down_proj"}
    for part, layer in layers.items():
        values = importance[f"{part}.weight"]
        diagonal = np.diagonal(model.calibration.hessian(f"model.layers.{layer}"))
        np.testing.assert_allclose(values, diagonal[None], rtol=1e-6)
        assert np.array_equal(entries[f"{part}.weight"].values(), values)


def test_gguf_file_says_where_its_importance_comes_from(model, tmp_path):
    quantized = quantize_by(kquant("Q4_K_M"), model, tmp_path / "quantized")
    export(model, quantized, tmp_path / "out")
    fields = gguf.GGUFReader(file_of(tmp_path / "out")).fields
    expected = {
        "quantize.imatrix.file": "imatrix.gguf",
        "quantize.imatrix.dataset": "a/text.txt",
        "quantize.imatrix.entries_count": 21,
        "quantize.imatrix.chunks_count": 3,
    }
    assert {key: fields[key].contents() for key in expected} == expected
    assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_K_M
    without = quantize_by(kquant("Q4_K_M", importance=False), model, tmp_path / "without")
    export(model, without, tmp_path / "plain")
    fields = gguf.GGUFReader(file_of(tmp_path / "plain")).fields
    assert "quantize.imatrix.file" not in fields
    assert not (tmp_path / "without" / FILE).exists()


def test_quantize_block_uses_an_importance_matrix_of_the_tool(model, tmp_path):
    generator = np.random.default_rng(0)
    entries = {}
    for name, gguf_name in gguf_names(model.source).items():
        shape = model.source.shape(name)
        if gguf_name.startswith("blk.") and len(shape) > 1:
            sums = generator.gamma(1, 50, (1, shape[-1])).astype(np.float32)
            entries[gguf_name] = Entry(sums, np.array([50], np.float32))
    given = tmp_path / "given.gguf"
    write_importance(given, ImportanceMatrix(entries, ("b",), 2, 25), "llama")
    recipe = kquant("Q4_K_M", importance_file=str(given))
    quantized = quantize_by(recipe, model, tmp_path / "quantized")
    theirs = tmp_path / "theirs.gguf"
    status, log = llama_quantize.quantize(model.file, theirs, "Q4_K_M", importance_in(given))
    assert status == 0, log
    export(model, quantized, tmp_path / "out")
    assert_same_tensors(tensors_in(file_of(tmp_path / "out")), tensors_in(theirs))
    assert quantized.report["importance"]["file"].endswith("given.gguf")


OVERRIDES = {r"blk\.[02]\.ffn_up": "Q8_0", "attn_k": "F16", "token_embd": "Q5_K"}


def test_overrides_take_precedence_as_in_llama_cpp_and_are_what_the_file_holds(model, tmp_path):
    recipe = kquant("Q4_K_M", overrides=OVERRIDES)
    quantized = quantize_by(recipe, model, tmp_path / "quantized")
    requested = export(model, quantized, tmp_path / "out")
    tensors = tensors_in(file_of(tmp_path / "out"))
    theirs = llama_quantize.types_of(model.file, "Q4_K_M", True, OVERRIDES)
    assert {name: tensor.tensor_type.name for name, tensor in tensors.items()} == theirs
    ups = [theirs[f"blk.{layer}.ffn_up.weight"] for layer in range(3)]
    assert ups == ["Q8_0", "Q4_K", "Q8_0"]
    checked = check(model, quantized, tmp_path / "out", requested)
    up = checked["model.layers.2.mlp.up_proj.weight"]
    assert (up["requested"], up["actual"]) == ("Q8_0", "Q8_0")
    assert checked["model.embed_tokens.weight"]["actual"] == "Q5_K"


def test_quantize_block_treats_widths_that_no_block_divides_as_llama_cpp(tmp_path, tiny_narrow):
    """Rows of 176 and 64."""
    model = calibrated_model(tmp_path, tiny_narrow, 3, 33, with_file=True)
    quantized = quantize_by(kquant("IQ4_XS"), model, tmp_path / "quantized")
    requested = export(model, quantized, tmp_path / "out")
    importance = importance_in(tmp_path / "quantized" / FILE)
    theirs = tmp_path / "theirs.gguf"
    status, log = llama_quantize.quantize(model.file, theirs, "IQ4_XS", importance)
    assert status == 0, log
    tensors = tensors_in(file_of(tmp_path / "out"))
    assert_same_tensors(tensors, tensors_in(theirs))
    types = {tensor.tensor_type.name for tensor in tensors.values()}
    assert types == {"F32", "F16", "IQ4_NL", "Q8_0"}
    with pytest.raises(StageError, match=r"found (F16|IQ4_NL|Q8_0)") as caught:
        check(model, quantized, tmp_path / "out", requested)
    assert caught.value.failure == Failure.TYPE_SUBSTITUTED


class OneLayer:
    """The part of a context that `diagonal_errors` reads: one calibrated layer."""

    def __init__(self, importance: np.ndarray) -> None:
        self.calibration = self
        self.layers = ["q_proj"]
        self.importance = importance

    def hessian_diagonal(self, layer: str) -> np.ndarray:
        return self.importance


@pytest.mark.parametrize(
    "ggml_type",
    ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "IQ4_NL", "IQ3_XXS"],
)
def test_diagonal_errors_are_those_of_what_blocks_stand_for(ggml_type):
    generator = np.random.default_rng(1)
    weight = generator.standard_normal((6, 512), np.float32)
    importance = generator.exponential(size=512).astype(np.float32) ** 2
    data = quantize_blocks(weight, ggml_type, importance)
    report = diagonal_errors(OneLayer(importance), "q_proj", weight, ggml_type, data)
    errors = (dequantize_blocks(data, ggml_type) - weight).astype(np.float64)
    assert report["diagonal_error"] == pytest.approx(float((errors**2 * importance).sum()), 1e-5)
    assert report["error_rows"] == 6
    grid = plain_grid_of(ggml_type)
    if ggml_type.startswith("IQ"):
        assert grid is None
        assert report["rtn_diagonal_error"] is None
    else:
        nearest = round_to_nearest(torch.from_numpy(weight), Grid(*grid)).dequantize()
        expected = float(((nearest - weight) ** 2 @ importance).sum())
        assert report["rtn_diagonal_error"] == pytest.approx(expected, rel=1e-4)


def test_weighted_square_is_the_same_for_any_number_of_threads():
    generator = np.random.default_rng(0)
    difference = generator.normal(size=(256, 8960)).astype(np.float32)
    importance = generator.random(8960).astype(np.float32)
    found = set()
    for threads in (1, 2, 3):
        with threadpool_limits(threads):
            found.add(weighted_square(difference, importance))
    assert len(found) == 1
    assert found.pop() == pytest.approx((difference.astype(float) ** 2 @ importance).sum(), 1e-6)


def test_diagonal_errors_of_a_tall_matrix_come_from_some_rows(monkeypatch):
    weight = np.random.default_rng(3).standard_normal((400, 256), np.float32)
    ctx = OneLayer(np.ones(256, np.float32))
    data = quantize_blocks(weight, "Q4_K", ctx.importance)
    of_all = diagonal_errors(ctx, "q_proj", weight, "Q4_K", data)
    monkeypatch.setattr(ggml, "ERROR_ROWS", 100)
    of_some = diagonal_errors(ctx, "q_proj", weight, "Q4_K", data)
    assert of_all["error_rows"] == 400
    assert of_some["error_rows"] == 100
    for figure in ("diagonal_error", "rtn_diagonal_error"):
        assert of_some[figure] == pytest.approx(of_all[figure], rel=0.05)
        assert of_some[figure] != of_all[figure]


def test_diagonal_errors_are_lower_with_importance():
    generator = np.random.default_rng(2)
    weight = generator.standard_normal((8, 512), np.float32)
    importance = generator.exponential(size=512).astype(np.float32) ** 3
    errors = []
    for weights in (importance, None):
        data = quantize_blocks(weight, "Q3_K", weights)
        report = diagonal_errors(OneLayer(importance), "q_proj", weight, "Q3_K", data)
        errors.append(report["diagonal_error"])
    assert errors[0] < errors[1]


def test_diagonal_errors_say_nothing_of_what_was_not_calibrated_or_not_rounded():
    weight = np.ones((2, 256), np.float32)
    ctx = OneLayer(weight[0])
    data = quantize_blocks(weight, "Q8_0")
    assert diagonal_errors(ctx, "embed", weight, "Q8_0", data) == {}
    assert diagonal_errors(ctx, None, weight, "Q8_0", data) == {}
    floats = weight.astype(np.float16).view(np.uint8)
    assert diagonal_errors(ctx, "q_proj", weight, "F16", floats) == {}


def test_quantize_block_reports_the_errors_of_calibrated_matrices(model, tmp_path):
    reports = quantize_by(kquant("Q4_K_M"), model, tmp_path / "quantized").report["tensors"]
    assert reports.keys() == set(model.source.names)
    calibrated = {f"{layer}.weight" for layer in model.calibration.layers}
    assert len(calibrated) == 21
    for name, report in reports.items():
        assert report["importance"] == (name in calibrated)
        assert report["shape"] == list(model.source.shape(name))
        if name in calibrated:
            assert report["tokens"] == 99
            assert 0 < report["diagonal_error"] < report["rtn_diagonal_error"]
        else:
            assert report["tokens"] == 0
            assert "diagonal_error" not in report


def test_quantize_block_by_kquant_does_without_torch():
    """In a process of its own, since this one has torch."""
    import subprocess
    import sys

    code = (
        "import sys\n"
        "import quantline.methods.ggml.quantize, quantline.recipes.ggml\n"
        "import quantline.recipes.tensor_types, quantline.recipes.budget.fit\n"
        "print([name for name in ('torch', 'numba', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
