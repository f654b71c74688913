"""Statistics on disk: what is of no use is refused, and what is read is what was written."""

import numpy as np
import pytest

from quantline.calibration.store import (
    INFO,
    INPUTS,
    OUTPUTS,
    BlockWriter,
    CalibrationStore,
    check_moments,
)
from quantline.errors import Failure, StageError
from quantline.files import write_json

LAYER = "model.layers.0.mlp.up_proj"
SAME_INPUT = "model.layers.0.mlp.gate_proj"


@pytest.mark.parametrize(
    ("value", "failure"),
    [
        (np.nan, Failure.NON_FINITE),
        (np.inf, Failure.NON_FINITE),
        (0.0, Failure.CALIBRATION_EMPTY),
    ],
)
def test_check_moments_refuses_what_is_of_no_use(value, failure):
    with pytest.raises(StageError) as error:
        check_moments("layer", np.full((2, 2), value, np.float32))
    assert error.value.failure == failure


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
