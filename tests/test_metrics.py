"""Figures against plain references, and what they must refuse."""

import json

import ml_dtypes
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from scipy.special import log_softmax

from quantline.metrics import gold_set as gold, quality, softmax
from quantline.model import output_head
from quantline.metrics.divergence import Divergence, quantile_se
from quantline.model.output_head import OutputHead
from quantline.metrics.significance import compare_gold, compare_tasks, paired_bootstrap, wilson
from quantline.errors import Failure, StageError

VOCABULARY, HIDDEN, LENGTH = 17, 5, 12


def setting(seed: int):
    draw = np.random.default_rng(seed)
    head = OutputHead(draw.normal(size=(VOCABULARY, HIDDEN)).astype(np.float32))
    hidden = draw.normal(size=(LENGTH, HIDDEN)).astype(np.float32)
    other = log_softmax(draw.normal(size=(LENGTH, VOCABULARY)).astype(np.float32), axis=-1)
    return head, hidden, other, draw.integers(0, VOCABULARY, LENGTH)


@given(st.integers(0, 2**32 - 1))
def test_divergence_agrees_with_a_plain_reference(seed):
    head, hidden, other, tokens = setting(seed)
    collected = Divergence(head)
    collected.add(hidden[:-1], other[:-1], tokens[1:])
    found = collected.summary()
    logits = hidden.astype(np.float64) @ head.weight.astype(np.float64).T
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    q = np.exp(other.astype(np.float64))
    kld = np.array([scipy.stats.entropy(p[i], q[i]) for i in range(LENGTH - 1)])
    following = tokens[1:]
    rows = np.arange(LENGTH - 1)
    assert found["mean_kld"] == pytest.approx(kld.mean(), abs=1e-5)
    assert found["max_kld"] == pytest.approx(kld.max(), abs=1e-5)
    assert found["mean_kld_se"] == pytest.approx(scipy.stats.sem(kld), abs=1e-5)
    nll = -np.log(q[rows, following])
    assert found["perplexity"] == pytest.approx(np.exp(nll.mean()), rel=1e-4)
    assert found["perplexity_se"] == pytest.approx(np.exp(nll.mean()) * scipy.stats.sem(nll), rel=1e-3)
    difference = q[rows, following] - p[rows, following]
    assert found["rms_delta_p"] == pytest.approx(np.sqrt((difference**2).mean()), abs=1e-5)
    rms_se = scipy.stats.sem(difference**2) / (2 * found["rms_delta_p"])  # llama.cpp's delta method
    assert found["rms_delta_p_se"] == pytest.approx(rms_se, abs=1e-5)
    assert (found["mean_delta_p"], found["mean_delta_p_se"]) == pytest.approx(
        (difference.mean(), scipy.stats.sem(difference)), abs=1e-5)
    same = (p.argmax(-1) == q.argmax(-1))[:-1]
    assert (found["same_top_p"], found["same_top_p_se"]) == pytest.approx((same.mean(), scipy.stats.sem(same)))
    assert found["mean_kld"] >= 0


def test_the_same_distribution_has_no_divergence():
    head, hidden, _, tokens = setting(0)
    collected = Divergence(head)
    collected.add(hidden[:-1], head.logits(hidden[:-1]), tokens[1:])
    found = collected.summary()
    assert (found["mean_kld"], found["perplexity_delta"]) == pytest.approx((0, 0), abs=1e-12) and found["same_top_p"] == 1


def test_every_figure_but_the_greatest_has_its_standard_error():
    head, hidden, other, tokens = setting(0)
    collected = Divergence(head)
    collected.add(hidden[:-1], other[:-1], tokens[1:])
    found = collected.summary()
    assert {name for name in found if not name.endswith("_se") and f"{name}_se" not in found} == {"max_kld", "tokens"}


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_the_standard_error_of_a_quantile_is_the_spread_of_that_quantile_over_samples(share):
    samples = np.sort(np.random.default_rng(0).exponential(size=(400, 1000)), axis=1)
    spread = np.quantile(samples, share, axis=1).std()
    assert np.mean([quantile_se(sample, share) for sample in samples]) == pytest.approx(spread, rel=0.1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 2, VOCABULARY - 1])
def test_logits_that_are_not_finite_are_refused(value, place):
    head, hidden, other, tokens = setting(0)
    other[3, place] = value
    collected = Divergence(head)
    collected.add(hidden[:-1], other[:-1], tokens[1:])
    with pytest.raises(StageError, match="mean_kld") as caught:
        collected.summary()
    assert caught.value.failure == Failure.NON_FINITE


@pytest.mark.parametrize("cached", [1, 3 * 4000, 1 << 16])
def test_the_divergence_of_near_equal_distributions_is_not_lost_in_rounding(cached, monkeypatch):
    """One of some 1e-5 is what is left of sums that are as large as 10, where one side hands over log-probabilities."""
    monkeypatch.setattr(softmax, "CACHED_VALUES", cached)
    draw = np.random.default_rng(0)
    logits = draw.normal(0, 3, (40, 4000)).astype(np.float32)
    other = log_softmax(logits + draw.normal(0, 1e-2, logits.shape).astype(np.float32), axis=-1)
    parts = [softmax.block_sums(logits[:, tokens], other[:, tokens]) for tokens in (slice(1500), slice(1500, None))]
    high, _, total, weighted = map(np.stack, zip(*parts, strict=True))
    normalizer, mean, _ = softmax.merged(high, total, weighted)
    true, its = (log_softmax(one.astype(np.float64), axis=-1) for one in (logits, other))
    found = mean - normalizer + softmax.normalizers(other)[0]
    assert np.abs(found - (np.exp(true) * (true - its)).sum(-1)).max() < 2e-7


@pytest.mark.parametrize("resident", [0, 1 << 26])
@pytest.mark.parametrize(("block", "most"), [(1, 1024), (3 * HIDDEN, 1024), (1 << 21, 1024), (1 << 21, 4), (1 << 21, 1)])
def test_the_head_is_taken_in_blocks_of_the_vocabulary(block, most, resident, monkeypatch):
    """What has gone before a block with a greater logit is scaled down; a half-precision head is converted exactly."""
    _, hidden, other, tokens = setting(7)
    weight = np.random.default_rng(3).normal(size=(VOCABULARY, HIDDEN)).astype(ml_dtypes.bfloat16)
    whole = Divergence(OutputHead(weight.astype(np.float32)))
    whole.add(hidden[:-1], other[:-1], tokens[1:])
    monkeypatch.setattr(output_head, "BLOCK_VALUES", block)
    monkeypatch.setattr(output_head, "BLOCK_TOKENS", most)
    monkeypatch.setattr(output_head, "RESIDENT_VALUES", resident)
    parts = Divergence(OutputHead(weight))
    assert (parts.head.weight.dtype == np.float32) == (resident > 0)
    parts.add(hidden[:-1], other[:-1], tokens[1:])
    assert parts.summary() == pytest.approx(whole.summary(), rel=1e-6, abs=1e-6)


def test_a_padded_vocabulary_takes_probability_from_the_others():
    head, hidden, other, tokens = setting(1)
    plain, padded = Divergence(head), Divergence(head)
    plain.add(hidden[:-1], other[:-1], tokens[1:])
    more = np.concatenate([other, np.zeros((LENGTH, 3), np.float32)], 1)  # three tokens of weight 1 beside others of 1 in all
    padded.add(hidden[:-1], more[:-1], tokens[1:])
    assert padded.summary()["mean_kld"] == pytest.approx(plain.summary()["mean_kld"] + np.log(4), abs=1e-6)


def capped(hidden: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return 5 * np.tanh(2.0 * (hidden @ weight.T + bias) / 5)


def test_biased_scaled_and_soft_capped_logits():
    head, hidden, _, _ = setting(2)
    bias = np.linspace(-2, 2, VOCABULARY, dtype=np.float32)
    head = OutputHead(head.weight, scale=2.0, softcap=5.0, bias=bias)
    expected = log_softmax(capped(hidden, head.weight, bias), axis=-1)
    assert np.allclose(head.logprobs(hidden), expected, atol=1e-5)


def results(answers: list[bool]) -> list[gold.GoldResult]:
    return [gold.GoldResult(str(i), "task", correct, []) for i, correct in enumerate(answers)]


def test_flips_and_the_exact_mcnemar_test():
    found = compare_gold(results([True] * 8 + [False] * 2), results([False] * 5 + [True] * 4 + [False]))
    assert (found["gold_lost"], found["gold_won"], found["gold_flips"], found["gold_items"]) == (5, 1, 6, 10)
    assert found["gold_accuracy_delta"] == pytest.approx(-0.4)
    assert found["gold_p_value"] == pytest.approx(scipy.stats.binomtest(5, 6).pvalue)
    assert compare_gold(results([True]), results([True]))["gold_p_value"] == 1


@pytest.mark.parametrize(("hits", "n"), [(0, 9), (9, 9), (5, 9), (479, 480)])
def test_the_interval_of_a_share_is_wilsons(hits, n):
    wanted = scipy.stats.binomtest(hits, n).proportion_ci(0.9, method="wilson")
    assert wilson(hits, n, 0.9) == pytest.approx((wanted.low, wanted.high))


def test_the_bootstrap_of_the_difference_holds_it_as_often_as_it_says():
    lost, won, n, draw = 0.06, 0.02, 300, np.random.default_rng(1)
    held = 0
    for a, b, _ in draw.multinomial(n, [lost, won, 1 - lost - won], size=300):
        low, high = paired_bootstrap(a, b, n, 0.9)
        held += low <= won - lost <= high
    assert 0.86 <= held / 300 <= 0.94
    assert paired_bootstrap(12, 3, 100) == paired_bootstrap(12, 3, 100)


def test_no_flip_among_few_items_does_not_prove_that_there_is_no_difference():
    few, many = paired_bootstrap(0, 0, 9), paired_bootstrap(0, 0, 900)
    assert few[0] < -0.05 < many[0] < 0 < many[1] < 0.05 < few[1]


def test_each_task_is_compared_on_its_own():
    def of(task: str, answers: list[bool]) -> list[gold.GoldResult]:
        return [gold.GoldResult(f"{task}{i}", task, correct, []) for i, correct in enumerate(answers)]

    tasks = compare_tasks(of("b", [True, True]) + of("a", [True]), of("b", [True, False]) + of("a", [True]))
    assert list(tasks) == ["a", "b"]
    assert (tasks["b"]["accuracy"], tasks["b"]["lost"], tasks["b"]["items"]) == (0.5, 1, 2)
    assert tasks["a"]["flips"] == 0


def test_other_items_are_not_compared():
    with pytest.raises(ValueError, match="same gold items"):
        compare_gold(results([True, False]), results([True]))


@pytest.mark.parametrize("left_out", [None, "bias", "logit_scale", "logit_softcap"])
def test_the_reference_is_rebuilt_with_what_the_family_does_to_its_logits(tmp_path, left_out):
    """A runtime that answers as the biased, scaled and capped model does is no distance away, and only then."""
    draw = np.random.default_rng(0)
    weight, hidden, bias = (draw.normal(size=size).astype(np.float32)
                            for size in ((VOCABULARY, HIDDEN), (2, LENGTH, HIDDEN), VOCABULARY))
    tokens = draw.integers(0, VOCABULARY, (2, LENGTH)).astype(np.int32)
    save_file({"hidden": hidden, "tokens": tokens}, tmp_path / "hidden.safetensors")
    save_file({"weight": weight} | ({} if left_out == "bias" else {"bias": bias}), tmp_path / "head.safetensors")
    (tmp_path / "gold.jsonl").touch()
    facts = {"logit_scale": 2.0, "logit_softcap": 5.0} | ({left_out: {"logit_scale": 1.0}.get(left_out)} if left_out else {})
    (tmp_path / "reference.json").write_text(json.dumps(facts))

    class Capped:
        def logprobs(self, ids: np.ndarray) -> np.ndarray:
            assert np.array_equal(ids, tokens)
            return log_softmax(capped(hidden, weight, bias), axis=-1)

    metrics, items = quality.measure(Capped(), tmp_path)
    assert (metrics["mean_kld"] < 1e-6) == (left_out is None) and items == []
    assert metrics["tokens"] == 2 * (LENGTH - 1)
    assert quality.divergence(Capped(), tmp_path, first=5).summary()["tokens"] == 2 * (LENGTH - 1 - 5)
