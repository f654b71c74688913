"""Figures of tokens against plain references, and what they must refuse."""

import ml_dtypes
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax

from quantline.errors import Failure, StageError
from quantline.metrics.divergence import DivergenceCollector
from quantline.model import output_head
from quantline.model.output_head import OutputHead

VOCABULARY = 17
HIDDEN = 5
LENGTH = 12


def draw_sequence(seed: int):
    """Return a head, hidden states, another model's log-probabilities, and the tokens."""
    draw = np.random.default_rng(seed)
    head = OutputHead(draw.normal(size=(VOCABULARY, HIDDEN)).astype(np.float32))
    hidden = draw.normal(size=(LENGTH, HIDDEN)).astype(np.float32)
    logits = draw.normal(size=(LENGTH, VOCABULARY)).astype(np.float32)
    return head, hidden, log_softmax(logits, axis=-1), draw.integers(0, VOCABULARY, LENGTH)


def summary(head, hidden, logprobs, tokens) -> dict[str, float]:
    """Return the figures of every token but the first."""
    collector = DivergenceCollector(head)
    collector.add(hidden[:-1], logprobs[:-1], tokens[1:])
    return collector.summary()


@given(st.integers(0, 2**32 - 1))
def test_summary_agrees_with_a_plain_reference(seed):
    head, hidden, logprobs, tokens = draw_sequence(seed)
    figures = summary(head, hidden, logprobs, tokens)
    logits = hidden.astype(np.float64) @ head.weight.astype(np.float64).T
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    q = np.exp(logprobs.astype(np.float64))
    kld = np.array([scipy.stats.entropy(p[i], q[i]) for i in range(LENGTH - 1)])
    following = tokens[1:]
    rows = np.arange(LENGTH - 1)
    assert figures["mean_kld"] == pytest.approx(kld.mean(), abs=1e-5)
    assert figures["max_kld"] == pytest.approx(kld.max(), abs=1e-5)
    assert figures["mean_kld_se"] == pytest.approx(scipy.stats.sem(kld), abs=1e-5)
    nll = -np.log(q[rows, following])
    perplexity = np.exp(nll.mean())
    assert figures["perplexity"] == pytest.approx(perplexity, rel=1e-4)
    error = perplexity * scipy.stats.sem(nll)
    assert figures["perplexity_se"] == pytest.approx(error, rel=1e-3)
    difference = q[rows, following] - p[rows, following]
    rms = np.sqrt((difference**2).mean())
    assert figures["rms_delta_p"] == pytest.approx(rms, abs=1e-5)
    # llama.cpp's delta method.
    rms_se = scipy.stats.sem(difference**2) / (2 * figures["rms_delta_p"])
    assert figures["rms_delta_p_se"] == pytest.approx(rms_se, abs=1e-5)
    assert figures["mean_delta_p"] == pytest.approx(difference.mean(), abs=1e-5)
    assert figures["mean_delta_p_se"] == pytest.approx(scipy.stats.sem(difference), abs=1e-5)
    same = (p.argmax(-1) == q.argmax(-1))[:-1]
    assert figures["same_top_p"] == pytest.approx(same.mean())
    assert figures["same_top_p_se"] == pytest.approx(scipy.stats.sem(same))
    assert figures["mean_kld"] >= 0


def test_summary_of_the_same_distribution_has_no_divergence():
    head, hidden, _, tokens = draw_sequence(0)
    figures = summary(head, hidden, head.logits(hidden), tokens)
    assert figures["mean_kld"] == pytest.approx(0, abs=1e-12)
    assert figures["perplexity_delta"] == pytest.approx(0, abs=1e-12)
    assert figures["same_top_p"] == 1


def test_summary_has_a_standard_error_for_every_figure_but_the_greatest():
    figures = summary(*draw_sequence(0))
    values = {name for name in figures if not name.endswith("_se")}
    assert {name for name in values if f"{name}_se" not in figures} == {"max_kld", "tokens"}
    assert len(values) > 5


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("token", [0, 2, VOCABULARY - 1])
def test_summary_refuses_logits_that_are_not_finite(value, token):
    head, hidden, logprobs, tokens = draw_sequence(0)
    logprobs[3, token] = value
    with pytest.raises(StageError, match="mean_kld") as caught:
        summary(head, hidden, logprobs, tokens)
    assert caught.value.failure == Failure.NON_FINITE


@pytest.mark.parametrize("resident", [0, 1 << 26])
@pytest.mark.parametrize(
    ("block", "most"),
    [(1, 1024), (3 * HIDDEN, 1024), (1 << 21, 1024), (1 << 21, 4), (1 << 21, 1)],
)
def test_add_takes_the_head_in_blocks_of_the_vocabulary(block, most, resident, monkeypatch):
    """Sums before a block with a greater logit are scaled down; half precision is exact."""
    _, hidden, logprobs, tokens = draw_sequence(7)
    weight = np.random.default_rng(3).normal(size=(VOCABULARY, HIDDEN)).astype(ml_dtypes.bfloat16)
    at_once = summary(OutputHead(weight.astype(np.float32)), hidden, logprobs, tokens)
    monkeypatch.setattr(output_head, "BLOCK_VALUES", block)
    monkeypatch.setattr(output_head, "BLOCK_TOKENS", most)
    monkeypatch.setattr(output_head, "RESIDENT_VALUES", resident)
    head = OutputHead(weight)
    assert (head.weight.dtype == np.float32) == (resident > 0)
    in_blocks = summary(head, hidden, logprobs, tokens)
    assert in_blocks == pytest.approx(at_once, rel=1e-6, abs=1e-6)


def test_add_in_chunks_gives_the_same_tokens():
    head, hidden, logprobs, tokens = draw_sequence(4)
    collector = DivergenceCollector(head)
    for start, end in ((0, 4), (4, LENGTH - 1)):
        collector.add(hidden[start:end], logprobs[start:end], tokens[start + 1 : end + 1])
    at_once = summary(head, hidden, logprobs, tokens)
    assert collector.summary() == pytest.approx(at_once, rel=1e-6, abs=1e-6)


def test_add_with_a_padded_vocabulary_takes_probability_from_the_others():
    head, hidden, logprobs, tokens = draw_sequence(1)
    plain = summary(head, hidden, logprobs, tokens)
    # Three tokens of weight 1 beside others of 1 in all.
    padding = np.zeros((LENGTH, 3), np.float32)
    padded = summary(head, hidden, np.concatenate([logprobs, padding], 1), tokens)
    assert padded["mean_kld"] == pytest.approx(plain["mean_kld"] + np.log(4), abs=1e-6)
