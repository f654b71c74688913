"""Statistics on disk: what is of no use is refused, and what is read is what was written."""

import numpy as np
import pytest

from quantline.calibration.block_files import INPUTS, OUTPUTS, BlockWriter
from quantline.calibration.store import INFO, CalibrationStore, effective_tokens, problem_of
from quantline.errors import Failure, StageError
from quantline.files import write_json

LAYER = "model.layers.0.mlp.up_proj"
SAME_INPUT = "model.layers.0.mlp.gate_proj"


@pytest.mark.parametrize(
    ("diagonal", "problem"),
    [
        ([1.0, 0.0], None),
        ([0.0, 0.0], "zero"),
        ([1e-40, 0.0], "zero"),
        ([-1.0, 0.5], "zero"),
        ([np.nan, 1.0], "not finite"),
        ([np.inf, 1.0], "not finite"),
        ([1e30, 1.0], "not finite"),
    ],
)
def test_problem_of_names_moments_that_are_of_no_use(diagonal, problem):
    assert problem_of(np.array(diagonal, np.float32)) == problem


def test_a_layer_whose_moments_are_of_no_use_gets_the_identity(tmp_path):
    names = {kind: f"model.layers.0.{kind}" for kind in ("sound", "zero", "infinite")}
    values = {"sound": 3.0, "zero": 0.0, "infinite": np.inf}
    inputs = BlockWriter(tmp_path, INPUTS)
    outputs = BlockWriter(tmp_path, OUTPUTS)
    for kind, name in names.items():
        moments = np.eye(2, dtype=np.float32)
        moments[moments > 0] = values[kind]
        peak = np.full(2, 5.0, np.float32)
        inputs.add(name, moments, peak=peak, sample=np.ones((4, 2), np.float16))
        outputs.add(name, moments[None])
    inputs.close(0)
    outputs.close(0)
    layers = {name: {"moments": name, "tokens": 4, "block": 0} for name in names.values()}
    write_json(tmp_path / INFO, {"layers": layers, "curvature": True, "tokens": 4})
    store = CalibrationStore(tmp_path)
    for kind, said in (
        ("sound", []),
        ("zero", ["no input reached it", "no gradient reached it"]),
        ("infinite", ["its inputs are not finite", "the gradients at its outputs are not finite"]),
    ):
        name = names[kind]
        assert store.problems(name, gradients=True) == said
        assert store.problems(name, gradients=False) == said[:1]
        np.testing.assert_allclose(store.hessian(name), 3 * np.eye(2), atol=1e-5)
        np.testing.assert_allclose(store.fisher_out(name), 3 * np.eye(2)[None], atol=1e-5)
        np.testing.assert_allclose(store.hessian_diagonal(name), [3, 3])
        assert store.input_peak(name).tolist() == ([1, 1] if said else [5, 5])
        assert np.isfinite(store.input_sample(name)).all()


@pytest.fixture
def moments() -> np.ndarray:
    rows = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    return rows.T @ rows / 40


@pytest.fixture
def written(tmp_path, moments):
    """Return a function that writes a calibration of two layers that read one input."""

    def write(**layer) -> CalibrationStore:
        inputs = BlockWriter(tmp_path, INPUTS)
        peak = np.arange(1, 7, dtype=np.float32)
        sample = np.full((3, 6), 0.5, np.float16)
        inputs.add(LAYER, moments, peak=peak, sample=sample)
        inputs.close(0)
        outputs = BlockWriter(tmp_path, OUTPUTS)
        for name in (LAYER, SAME_INPUT):
            outputs.add(name, np.stack([moments, 2 * moments]))
        outputs.close(0)
        entry = {"moments": LAYER, "tokens": 40, "block": 0} | layer
        info = {
            "layers": {LAYER: entry, SAME_INPUT: entry},
            "curvature": True,
            "text_sha256": "aa",
            "tokens": 40,
            "seed": 0,
        }
        write_json(tmp_path / INFO, info)
        return CalibrationStore(tmp_path)

    return write


def test_calibration_store_reads_what_the_block_writer_wrote(written, moments):
    store = written()
    assert store.layers == sorted([LAYER, SAME_INPUT])
    assert store.has_gradients
    for layer in store.layers:
        hessian = store.hessian(layer)
        assert hessian.dtype == np.float32
        np.testing.assert_allclose(hessian, moments, rtol=1e-2, atol=1e-3)
        np.testing.assert_array_equal(store.hessian_diagonal(layer), np.diagonal(moments))
        np.testing.assert_array_equal(store.input_peak(layer), np.arange(1, 7))
        np.testing.assert_array_equal(store.input_sample(layer), [np.arange(1, 7) / 2] * 3)
        assert store.fisher_out(layer).shape == (2, 6, 6)
        diagonal = np.diagonal(moments)
        expected = np.concatenate([diagonal, 2 * diagonal])
        np.testing.assert_array_equal(store.output_importance(layer), expected)
        assert store.input_key(layer) == LAYER
        assert store.coverage(layer) == {"tokens": 40}
        assert store.tokens(layer) == 40
    assert store.provenance() == {"text_sha256": "aa", "tokens": 40, "seed": 0}


def test_hessian_is_shrunk_towards_its_diagonal(written, moments):
    store = written()
    whole = store.hessian(LAYER).copy()
    for share in (0.25, 1.0, 0.0):
        expected = (1 - share) * whole + share * np.diag(np.diagonal(whole))
        np.testing.assert_allclose(store.hessian(LAYER, share), expected, rtol=1e-6)
        np.testing.assert_array_equal(store.hessian(LAYER, share).diagonal(), whole.diagonal())
    assert store.hessian(LAYER, 0.5) is store.hessian(SAME_INPUT, 0.5)  # read once


def test_fisher_out_of_several_blocks_is_what_was_written(written, moments):
    fisher_out = written().fisher_out(LAYER)
    expected = np.stack([moments, 2 * moments])
    np.testing.assert_allclose(fisher_out, expected, rtol=1e-2, atol=1e-3)


def test_fisher_out_of_one_block_is_what_was_written(tmp_path, moments):
    writer = BlockWriter(tmp_path, OUTPUTS)
    writer.add(LAYER, moments[None])
    writer.close(0)
    entry = {"moments": LAYER, "tokens": 40, "block": 0}
    write_json(tmp_path / INFO, {"layers": {LAYER: entry}, "curvature": True})
    fisher_out = CalibrationStore(tmp_path).fisher_out(LAYER)
    np.testing.assert_allclose(fisher_out, moments[None], rtol=1e-2, atol=1e-3)


def test_calibration_store_knows_nothing_of_other_layers(written):
    store = written()
    assert store.input_key("lm_head") is None
    assert store.coverage("lm_head") == {"tokens": 0}
    with pytest.raises(StageError, match="run calibrate again"):
        store.hessian("lm_head")


def test_hessian_needs_tokens_or_an_undercalibrated_expert(written):
    store = written(tokens=0)
    for read in (store.hessian, store.hessian_diagonal):
        with pytest.raises(StageError, match="saw no calibration tokens") as error:
            read(LAYER)
        assert error.value.failure == Failure.CALIBRATION_EMPTY
    store = written(tokens=0, starved=True)
    assert store.coverage(LAYER) == {"tokens": 0, "starved": True}
    assert store.hessian(LAYER).shape == (6, 6)


def test_fisher_out_needs_a_calibration_with_gradients(written):
    store = written()
    store.info["curvature"] = False
    with pytest.raises(StageError, match=r"set calibration\.curvature=true") as error:
        store.fisher_out(LAYER)
    assert error.value.failure == Failure.CALIBRATION_EMPTY


def test_effective_tokens_of_a_model_whose_layers_are_all_too_narrow_are_none(tmp_path):
    assert effective_tokens(tmp_path, {}) is None
