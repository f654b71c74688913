"""Sums over the vocabulary, block by block."""

import numpy as np
import pytest
from scipy.special import log_softmax

from quantline.metrics import softmax


@pytest.mark.parametrize("cached", [1, 3 * 4000, 1 << 16])
def test_merge_blocks_keeps_the_divergence_of_near_equal_distributions(cached, monkeypatch):
    """Of sums as large as 10, where one side hands over log-probabilities, some 1e-5 is left."""
    monkeypatch.setattr(softmax, "CACHED_VALUES", cached)
    draw = np.random.default_rng(0)
    logits = draw.normal(0, 3, (40, 4000)).astype(np.float32)
    noise = draw.normal(0, 1e-2, logits.shape).astype(np.float32)
    second = log_softmax(logits + noise, axis=-1)
    blocks = [
        softmax.block_sums(logits[:, tokens], second[:, tokens])
        for tokens in (slice(1500), slice(1500, None))
    ]
    merged = softmax.merge_blocks(
        np.stack([block.high for block in blocks]),
        np.stack([block.total for block in blocks]),
        np.stack([block.weighted for block in blocks]),
    )
    divergence = merged.mean_difference - merged.log_sum + softmax.normalizers(second).log_sum
    p = log_softmax(logits.astype(np.float64), axis=-1)
    q = log_softmax(second.astype(np.float64), axis=-1)
    assert np.abs(divergence - (np.exp(p) * (p - q)).sum(-1)).max() < 2e-7
