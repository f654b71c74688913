"""Gold items scored by a model that is known through and through."""

import numpy as np
import pytest

from quantline.errors import Failure, StageError
from quantline.metrics import scoring
from quantline.metrics.gold_set import TokenizedItem, accuracy
from quantline.metrics.scoring import first_stop, score_items

VOCABULARY = 17
HIT = np.log(0.9)
MISS = np.log(0.1 / (VOCABULARY - 1))


class ChainModel:
    """A model that is sure that the token after t is t + 1; a token's text is its letter."""

    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        values = np.full((*tokens.shape, VOCABULARY), MISS, np.float32)
        for place in np.ndindex(tokens.shape):
            values[(*place, (tokens[place] + 1) % VOCABULARY)] = HIT
        return values

    def generate(self, prompt: list[int], max_new_tokens: int, stop: set[int]) -> list[int]:
        ids: list[int] = []
        while len(ids) < max_new_tokens:
            token = ((ids or prompt)[-1] + 1) % VOCABULARY
            if token in stop:
                break
            ids.append(token)
        return ids

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("a") + token) for token in ids)


def forced(name: str, prompt: list[int], *tokens: int) -> TokenizedItem:
    return TokenizedItem(name, "task", "?", "x", "forced", prompt, [list(tokens)], 0, [len(tokens)])


def generated(match: str, reference: str, **options) -> TokenizedItem:
    """Return an item whose prompt the chain continues with cdefghij…"""
    options = {"max_tokens": 6} | options
    return TokenizedItem("g", "task", "?", reference, "generated", [1], [], 0, [], match, **options)


def test_score_items_counts_an_answer_whose_every_token_is_the_most_probable():
    right, wrong = score_items(
        ChainModel(), [forced("right", [1, 2], 3, 4), forced("wrong", [1, 2], 3, 5)]
    )
    assert (right.correct, right.said) == (True, "de")
    assert right.likelihoods == pytest.approx([HIT])
    # It goes on in another way from the second token.
    assert (wrong.correct, wrong.said) == (False, "de…")
    assert wrong.likelihoods == pytest.approx([(HIT + MISS) / 2])
    assert accuracy([right, wrong]) == {"all": 0.5, "task": 0.5}


@pytest.mark.parametrize(
    ("divisors", "answer"),
    [([1, 1], "cj"), ([2, 4], "cdej"), ([9, 9], "cj"), ([9, 10], "cdej")],
)
def test_score_items_takes_the_most_likely_choice_divided_as_the_item_asks(divisors, answer):
    """Both miss a token: sums favour the shorter, tokens and characters the longer."""
    choices = [[2, 9], [2, 3, 4, 9]]
    item = TokenizedItem("c", "task", "?", "x", "choices", [1], choices, 0, divisors)
    (result,) = score_items(ChainModel(), [item])
    assert result.likelihoods == pytest.approx([(HIT + MISS) / 2, (3 * HIT + MISS) / 4])
    assert (result.said, result.correct) == (answer, answer == "cj")


@pytest.mark.parametrize(
    ("item", "correct", "answer"),
    [
        (generated("exact", "cdefgh"), True, "cdefgh"),
        (generated("exact", "cde"), False, "cdefgh"),
        (generated("exact", " cde\n", stop=["zz", "h", "fg"]), True, "cde"),
        (generated("exact", "cd", max_tokens=2), True, "cd"),
        (generated("contains", "efg"), True, "cdefgh"),
        (generated("contains", "efg", stop=["f"]), False, "cde"),
        (generated("contains", "cd", stop=["c"]), False, ""),
        (generated("regex", "^c.e"), True, "cdefgh"),
        (generated("regex", "e$"), False, "cdefgh"),
        (generated("regex", "e$", end=[5]), True, "cde"),
    ],
)
def test_score_items_matches_a_generated_answer_up_to_its_first_stop(item, correct, answer):
    (result,) = score_items(ChainModel(), [item])
    assert (result.correct, result.said, result.likelihoods) == (correct, answer, [])


def test_score_items_in_batches_changes_neither_scores_nor_their_order(monkeypatch):
    items = [
        forced(str(number), list(range(number % 5 + 1)), number % 5 + 1, number % 7)
        for number in range(40)
    ]
    items.insert(7, generated("contains", "d"))
    together = score_items(ChainModel(), items)
    assert [result.id for result in together] == [item.id for item in items]
    monkeypatch.setattr(scoring, "BATCH_TOKENS", 8)
    assert score_items(ChainModel(), items) == together


def test_score_items_refuses_a_likelihood_that_is_nan(monkeypatch):
    def no_numbers(self, tokens):
        return np.full((*tokens.shape, VOCABULARY), np.nan, np.float32)

    monkeypatch.setattr(ChainModel, "logprobs", no_numbers)
    with pytest.raises(StageError, match="gold item a") as caught:
        score_items(ChainModel(), [forced("a", [1], 2)])
    assert caught.value.failure == Failure.NON_FINITE


def test_first_stop_is_the_first_in_the_text():
    assert first_stop("abcdef", ["e", "cd", "zz"]) == "ab"
    assert first_stop("abc", []) == "abc"
    assert first_stop("abc", ["a"]) == ""
