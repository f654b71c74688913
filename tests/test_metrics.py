"""Figures against plain references, and what they must refuse."""

import json

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from scipy.special import log_softmax

from stages.metrics import gold, quality
from stages.metrics.divergence import Divergence, OutputHead, quantile_se
from stages.metrics.significance import compare_gold, compare_tasks, paired_bootstrap, wilson
from stages.tracking import Failure, StageError

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
    collected.add(hidden, other, tokens)
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
    collected.add(hidden, head.logprobs(hidden), tokens)
    found = collected.summary()
    assert (found["mean_kld"], found["perplexity_delta"], found["same_top_p"]) == (0, 0, 1)


def test_every_figure_but_the_greatest_has_its_standard_error():
    head, hidden, other, tokens = setting(0)
    collected = Divergence(head)
    collected.add(hidden, other, tokens)
    found = collected.summary()
    assert {name for name in found if not name.endswith("_se") and f"{name}_se" not in found} == {"max_kld", "tokens"}


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_the_standard_error_of_a_quantile_is_the_spread_of_that_quantile_over_samples(share):
    samples = np.sort(np.random.default_rng(0).exponential(size=(400, 1000)), axis=1)
    spread = np.quantile(samples, share, axis=1).std()
    assert np.mean([quantile_se(sample, share) for sample in samples]) == pytest.approx(spread, rel=0.1)


def test_nan_is_refused():
    head, hidden, other, tokens = setting(0)
    other[3, 2] = np.nan
    collected = Divergence(head)
    collected.add(hidden, other, tokens)
    with pytest.raises(StageError, match="mean_kld") as caught:
        collected.summary()
    assert caught.value.failure == Failure.NON_FINITE


def test_soft_capped_and_scaled_logits():
    head = OutputHead(np.eye(3, dtype=np.float32), scale=2.0, softcap=5.0)
    hidden = np.array([[1, 3, 9]], np.float32)
    expected = scipy.special.log_softmax(5 * np.tanh(2 * hidden / 5))
    assert np.allclose(head.logprobs(hidden), expected, atol=1e-6)


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


def test_the_reference_is_rebuilt_with_what_the_family_does_to_its_logits(tmp_path):
    """A runtime that answers as the capped and scaled model does is no distance away."""
    draw = np.random.default_rng(0)
    weight, hidden = (draw.normal(size=size).astype(np.float32) for size in ((VOCABULARY, HIDDEN), (2, LENGTH, HIDDEN)))
    tokens = draw.integers(0, VOCABULARY, (2, LENGTH)).astype(np.int32)
    save_file({"hidden": hidden, "tokens": tokens}, tmp_path / "hidden.safetensors")
    save_file({"weight": weight}, tmp_path / "head.safetensors")
    (tmp_path / "gold.jsonl").touch()
    (tmp_path / "reference.json").write_text(json.dumps({"logit_scale": 2.0, "logit_softcap": 1.5}))

    class Capped:
        def logprobs(self, ids: np.ndarray) -> np.ndarray:
            return log_softmax(1.5 * np.tanh(2.0 * hidden @ weight.T / 1.5), axis=-1)

    metrics, items = quality.measure(Capped(), tmp_path)
    assert metrics["mean_kld"] == pytest.approx(0, abs=1e-6) and items == []
    assert metrics["tokens"] == 2 * (LENGTH - 1)
