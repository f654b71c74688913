"""Standard errors of means and quantiles, and the values of several chunks of tokens."""

import numpy as np
import pytest
import scipy.stats
from threadpoolctl import threadpool_limits

from quantline.metrics.token_values import TokenValues, mean_se, quantile_se


def test_mean_se_is_the_standard_error_of_the_mean():
    values = np.random.default_rng(0).normal(size=30)
    assert mean_se(values) == pytest.approx(scipy.stats.sem(values))


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_quantile_se_is_the_spread_of_that_quantile_over_samples(share):
    samples = np.sort(np.random.default_rng(0).exponential(size=(400, 1000)), axis=1)
    spread = np.quantile(samples, share, axis=1).std()
    errors = [quantile_se(sample, share) for sample in samples]
    assert np.mean(errors) == pytest.approx(spread, rel=0.1)


def test_quantile_se_is_the_same_for_any_number_of_threads():
    for seed in range(6):  # the last bits of some samples alone would show it
        sample = np.sort(np.random.default_rng(seed).exponential(size=20_000))
        found = set()
        for threads in (1, 2, 3):
            with threadpool_limits(threads):
                found |= {(share, quantile_se(sample, share)) for share in (0.5, 0.9, 0.999)}
        assert len(found) == 3


def test_token_values_join_keeps_the_order_of_tokens():
    chunks = []
    for start in (3.0, 1.0):
        values = np.array([start, start + 1])
        chunks.append(TokenValues(values, values, -values, values[::-1], values > 3))
    joined = TokenValues.join(chunks)
    assert joined.kld.tolist() == [3, 4, 1, 2]
    assert joined.ordered_kld.tolist() == [1, 2, 3, 4]
    assert joined.nll.tolist() == [3, 4, 1, 2]
    assert joined.reference_nll.tolist() == [-3, -4, -1, -2]
    assert joined.delta_p.tolist() == [4, 3, 2, 1]
    assert joined.same_top.tolist() == [False, True, False, False]
    assert len(joined) == 4
