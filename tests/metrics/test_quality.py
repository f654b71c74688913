"""A bundle against the stored reference."""

import numpy as np
import pytest
from scipy.special import log_softmax

from quantline.errors import Failure, StageError
from quantline.metrics.quality import measure_divergence, measure_quality
from quantline.model.output_head import OutputHead
from tests.helpers.capped_model import HIDDEN, LENGTH, VOCABULARY, CappedModel, capped


def test_output_head_biased_scaled_and_soft_capped():
    draw = np.random.default_rng(2)
    weight = draw.normal(size=(VOCABULARY, HIDDEN)).astype(np.float32)
    hidden = draw.normal(size=(LENGTH, HIDDEN)).astype(np.float32)
    bias = np.linspace(-2, 2, VOCABULARY, dtype=np.float32)
    head = OutputHead(weight, scale=2.0, softcap=5.0, bias=bias)
    expected = log_softmax(capped(hidden, weight, bias), axis=-1)
    assert np.allclose(head.logprobs(hidden), expected, atol=1e-5)


@pytest.mark.parametrize("left_out", [None, "bias", "logit_scale", "logit_softcap"])
def test_measure_quality_rebuilds_what_the_family_does_to_its_logits(tmp_path, left_out):
    """The model itself is no distance away, and only if nothing is left out."""
    runtime = CappedModel(tmp_path, left_out)
    metrics, items = measure_quality(runtime, tmp_path)
    assert (metrics["mean_kld"] < 1e-6) == (left_out is None)
    assert items == []
    assert metrics["tokens"] == 2 * (LENGTH - 1)


def test_measure_divergence_counts_tokens_after_a_position(tmp_path):
    runtime = CappedModel(tmp_path)
    figures = measure_divergence(runtime, tmp_path, first=5).summary()
    assert figures["tokens"] == 2 * (LENGTH - 1 - 5)


def test_measure_divergence_refuses_a_vocabulary_that_is_too_small(tmp_path):
    runtime = CappedModel(tmp_path)
    runtime.logprobs = lambda ids: np.zeros((*ids.shape, VOCABULARY - 1), np.float32)
    with pytest.raises(StageError, match="expected at least 17 logits from capped") as caught:
        measure_divergence(runtime, tmp_path)
    assert caught.value.failure == Failure.TOKENIZER_MISMATCH
