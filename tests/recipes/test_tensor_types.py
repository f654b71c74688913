"""Types and importance of the tensors of a model, and how wrong ones fail."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from quantline.config.recipes import parse_recipe
from quantline.errors import Failure, StageError
from quantline.formats.gguf.imatrix import (
    Entry,
    ImportanceMatrix,
    read_importance,
    write_importance,
)
from quantline.model.checkpoint import Checkpoint
from quantline.recipes.tensor_types import TensorTypes, is_70b
from tests.helpers.ggml_recipes import (
    CalibratedModel,
    calibrated_model,
    context_of,
    kquant,
    quantize_by,
)

# A tensor of the file, and a row of an entry for it.
NAME = "blk.1.attn_v.weight"
ROW = np.ones((1, 256))

Entries = dict[str, Entry]


@pytest.fixture(scope="module")
def model(tmp_path_factory, make_model) -> CalibratedModel:
    """A dense model."""
    folder = tmp_path_factory.mktemp("dense")
    source = make_model(folder / "model", intermediate_size=256, num_hidden_layers=3)
    return calibrated_model(folder, source, 3, 33, with_file=True)


def tensor_types(model: CalibratedModel, recipe: dict[str, Any]) -> TensorTypes:
    source = model.source
    return TensorTypes(parse_recipe(recipe), source, source.arch, model.calibration)


def entry(sums: np.ndarray, *counts: float) -> Entry:
    return Entry(sums.astype(np.float32), np.array(counts or (4,), np.float32))


def replaced_by(bad: Entry) -> Callable[[Entries], None]:
    def change(entries: Entries) -> None:
        entries[NAME] = bad

    return change


def without_name(entries: Entries) -> None:
    del entries[NAME]


BAD_MATRICES = {
    "missing": (without_name, Failure.IMPORTANCE_MISSING, f"an entry for {NAME}"),
    "NaN": (
        replaced_by(entry(ROW * np.nan)),
        Failure.IMPORTANCE_INVALID,
        rf"{NAME}\.in_sum2",
    ),
    "infinite": (replaced_by(entry(ROW * np.inf)), Failure.IMPORTANCE_INVALID, "infinity"),
    "negative": (replaced_by(entry(-ROW)), Failure.IMPORTANCE_INVALID, "not negative"),
    "narrow": (replaced_by(entry(ROW[:, :32])), Failure.IMPORTANCE_INVALID, "256 numbers"),
    "several": (
        replaced_by(entry(np.ones((2, 256)), 4, 4)),
        Failure.IMPORTANCE_INVALID,
        "256",
    ),
    "no tokens": (replaced_by(entry(ROW, 0)), Failure.IMPORTANCE_INVALID, "tokens that"),
    "NaN tokens": (replaced_by(entry(ROW, np.nan)), Failure.IMPORTANCE_INVALID, ".counts"),
    "empty": (Entries.clear, Failure.IMPORTANCE_INVALID, "entries, found none"),
}


@pytest.mark.parametrize("name", BAD_MATRICES)
def test_importance_of_a_bad_matrix_is_a_named_failure(model, name, tmp_path):
    change, failure, words = BAD_MATRICES[name]
    entries = dict(tensor_types(model, kquant("Q4_K_M")).matrix.entries)
    change(entries)
    path = tmp_path / "bad.gguf"
    write_importance(path, ImportanceMatrix(entries, ("b",), 2, 25), "llama")
    recipe = kquant("Q4_K_M", importance_file=str(path))
    with pytest.raises(StageError, match=words) as caught:
        quantize_by(recipe, model, tmp_path / "quantized")
    assert caught.value.failure == failure


@pytest.mark.parametrize(
    ("content", "failure"),
    [
        (None, Failure.MISSING_FILE),
        (b"", Failure.IMPORTANCE_INVALID),
        (b"GGUF" + b"\xff" * 40, Failure.IMPORTANCE_INVALID),
        ("a model", Failure.IMPORTANCE_INVALID),
    ],
)
def test_read_importance_names_what_is_no_importance_matrix(model, content, failure, tmp_path):
    path = model.file if content == "a model" else tmp_path / "bad.gguf"
    if isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(StageError, match=str(path)) as caught:
        read_importance(path)
    assert caught.value.failure == failure


def test_read_importance_refuses_sums_without_counts(tmp_path):
    path = tmp_path / "bad.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["b"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 1)
    writer.add_tensor("blk.0.attn_q.weight.in_sum2", np.ones((1, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(StageError, match=r"attn_q\.weight\.counts in F32, found no tensor"):
        read_importance(path)


@pytest.mark.parametrize("mix", ["IQ2_XS", "IQ3_XXS", "Q2_K_S"])
def test_importance_is_asked_for_by_mixes_that_are_garbage_without(model, mix, tmp_path):
    recipe = kquant(mix, importance=False)
    with pytest.raises(StageError, match=r"garbage without one.*importance: true") as caught:
        quantize_by(recipe, model, tmp_path / "quantized")
    assert caught.value.failure == Failure.IMPORTANCE_MISSING


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("attn_(", "regular expression"),
        ("attn_x", "it matches none"),
        ("attn_norm", "it matches none"),
    ],
)
def test_tensor_types_refuses_an_override_that_matches_nothing(model, pattern, words):
    with pytest.raises(StageError, match=words) as caught:
        tensor_types(model, kquant("Q4_K_M", overrides={pattern: "Q8_0"}))
    assert caught.value.failure == Failure.CONFIG_INVALID


def test_types_of_an_override_that_no_row_fits_are_its_substitutes(tmp_path, tiny_narrow):
    overrides = {"ffn_down": "Q6_K", "ffn_up": "IQ4_XS"}
    recipe = kquant("Q8_0", importance=False, overrides=overrides)
    ctx = context_of(recipe, Checkpoint(tiny_narrow), None, tmp_path)
    types = ctx.tensor_types
    down = types.types("model.layers.0.mlp.down_proj.weight")
    assert down == ("Q6_K", "F16")  # 176 is no multiple of 32
    up = types.types("model.layers.0.mlp.up_proj.weight")
    assert up == ("IQ4_XS", "IQ4_NL")
    assert types.is_overridden("blk.0.ffn_up.weight")
    assert not types.is_overridden("blk.0.ffn_gate.weight")
    assert types.is_quantized("blk.0.ffn_gate.weight")
    assert not types.is_quantized("output_norm.weight")


@pytest.mark.parametrize(
    ("rule", "layers", "kv_heads", "expected"),
    [
        ("never", 80, 2, False),
        ("with shared keys", 80, 2, True),
        ("with shared keys", 80, 4, False),
        ("with shared keys", 79, 2, False),
        ("always", 80, 4, True),
        ("always", 32, 4, False),
    ],
)
def test_is_70b_follows_the_familys_rule(model, rule, layers, kv_heads, expected):
    arch = model.source.arch
    in_gguf = replace(arch.family.gguf, counts_as_70b=rule)
    family = replace(arch.family, gguf=in_gguf)
    arch = replace(arch, family=family, layers=layers, heads=4, kv_heads=kv_heads)
    assert is_70b(arch) == expected


def test_write_importance_says_what_it_wrote(model, tmp_path):
    types = tensor_types(model, kquant("Q4_K_M"))
    report = types.write_importance(tmp_path)
    assert report.pop("sha256")
    assert report == types.importance_summary()
    assert report == {
        "file": "imatrix.gguf",
        "chunks": 3,
        "dataset": "a/text.txt",
        "entries": 21,
    }
    assert sorted(read_importance(tmp_path / "imatrix.gguf").entries) == sorted(
        types.matrix.entries
    )
    without = tensor_types(model, kquant("Q4_K_M", importance=False))
    assert without.write_importance(tmp_path / "none") is None
    assert not Path(tmp_path / "none").exists()
