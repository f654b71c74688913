"""The gold set: its lines, one bad one at a time, and how items are scored."""

import json

import numpy as np
import pytest

from quantline.metrics import gold_set as gold, scoring
from quantline.errors import Failure, Reason, StageError

VOCABULARY = 17


class Chain:
    """A model that is sure that the token after t is t + 1; a token's text is its letter."""

    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        values = np.full((*tokens.shape, VOCABULARY), np.log(0.1 / (VOCABULARY - 1)), np.float32)
        for place in np.ndindex(tokens.shape):
            values[(*place, (tokens[place] + 1) % VOCABULARY)] = np.log(0.9)
        return values

    def generate(self, prompt: list[int], max_new_tokens: int, stop: set[int]) -> list[int]:
        ids = []
        while len(ids) < max_new_tokens and (token := ((ids or prompt)[-1] + 1) % VOCABULARY) not in stop:
            ids.append(token)
        return ids

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("a") + token) for token in ids)


def forced(name: str, prompt: list[int], *tokens: int) -> gold.TokenizedItem:
    return gold.TokenizedItem(name, "task", "?", "x", "forced", prompt, [list(tokens)], 0, [len(tokens)])


def choice(name: str, prompt: list[int], *choices: list[int], answer: int, divisors: list[int]) -> gold.TokenizedItem:
    return gold.TokenizedItem(name, "task", "?", "x", "choices", prompt, list(choices), answer, divisors)


def written(match: str, reference: str, **more) -> gold.TokenizedItem:
    """The chain writes cdefghij… after this prompt."""
    return gold.TokenizedItem("w", "task", "?", reference, "generated", [1], [], 0, [], match, **{"max_tokens": 6} | more)


def test_an_answer_counts_when_every_token_of_it_is_the_most_probable():
    right, wrong = scoring.score(Chain(), [forced("right", [1, 2], 3, 4), forced("wrong", [1, 2], 3, 5)])
    assert (right.correct, right.said, right.likelihoods) == (True, "de", pytest.approx([np.log(0.9)]))
    assert (wrong.correct, wrong.said) == (False, "de…")  # it goes on in another way from the second token
    assert wrong.likelihoods == pytest.approx([(np.log(0.9) + np.log(0.1 / (VOCABULARY - 1))) / 2])
    assert gold.accuracy([right, wrong]) == {"all": 0.5, "task": 0.5}


@pytest.mark.parametrize(("divisors", "said"), [([1, 1], "cj"), ([2, 4], "cdej"), ([9, 9], "cj"), ([9, 10], "cdej")])
def test_a_choice_is_the_most_likely_divided_as_the_item_asks(divisors, said):
    """Both miss a token: by sums the shorter is ahead, by tokens the longer with more hits, and by characters too."""
    item = choice("c", [1], [2, 9], [2, 3, 4, 9], answer=0, divisors=divisors)
    [found] = scoring.score(Chain(), [item])
    hit, miss = np.log(0.9), np.log(0.1 / (VOCABULARY - 1))
    assert found.likelihoods == pytest.approx([(hit + miss) / 2, (3 * hit + miss) / 4])
    assert (found.said, found.correct) == (said, said == "cj")


@pytest.mark.parametrize(("item", "correct", "said"), [
    (written("exact", "cdefgh"), True, "cdefgh"), (written("exact", "cde"), False, "cdefgh"),
    (written("exact", " cde\n", stop=["zz", "h", "fg"]), True, "cde"), (written("exact", "cd", max_tokens=2), True, "cd"),
    (written("contains", "efg"), True, "cdefgh"), (written("contains", "efg", stop=["f"]), False, "cde"),
    (written("contains", "cd", stop=["c"]), False, ""), (written("regex", "^c.e"), True, "cdefgh"),
    (written("regex", "e$"), False, "cdefgh"), (written("regex", "e$", end=[5]), True, "cde")])
def test_a_generated_answer_ends_at_the_first_stop_and_is_matched_as_asked(item, correct, said):
    [found] = scoring.score(Chain(), [item])
    assert (found.correct, found.said, found.likelihoods) == (correct, said, [])


def test_batches_do_not_change_scores_nor_their_order(monkeypatch):
    items = [forced(str(n), list(range(n % 5 + 1)), n % 5 + 1, n % 7) for n in range(40)]
    items.insert(7, written("contains", "d"))
    together = scoring.score(Chain(), items)
    assert [result.id for result in together] == [item.id for item in items]
    monkeypatch.setattr(scoring, "BATCH_TOKENS", 8)
    assert scoring.score(Chain(), items) == together


def test_a_nan_likelihood_is_refused(monkeypatch):
    monkeypatch.setattr(Chain, "logprobs", lambda self, tokens: np.full((*tokens.shape, VOCABULARY), np.nan, np.float32))
    with pytest.raises(StageError) as caught:
        scoring.score(Chain(), [forced("a", [1], 2)])
    assert caught.value.failure == Failure.NON_FINITE


def lines(path, *items: dict | str):
    path.write_text("".join((item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)) + "\n" for item in items))
    return path


def bad(**change) -> dict:
    """An item with something wrong; None takes a key away."""
    item = {"id": "b", "prompt": "x", "answer": "y"} | change
    return {key: value for key, value in item.items() if value is not None}


@pytest.mark.parametrize(("line", "words"), [
    ("{", "one JSON object"), ("[]", "one JSON object"), ("", "one JSON object"), (bad(answer=None), "answer: Field required"),
    (bad(id="a"), "the id 'a' again"), (bad(answer=""), "answer: "), (bad(huh=1), "huh: "), (bad(id=3), "id: "),
    (bad(choices=["z", "w"]), "among the choices"), (bad(choices=["y"]), "choices: "), (bad(choices=["y", "y"]), "each choice once"),
    (bad(choices=["y", 3]), "choices.1: "), (bad(prompt=None), "prompt is empty"), (bad(task="flips"), "needs another name"),
    (bad(messages=[{"role": "user"}]), "messages.0.content"), (bad(messages=[]), "messages: "), (bad(messages="hi"), "messages: "),
    (bad(match="near"), "match: "), (bad(match="regex", answer="("), "no regular expression"), (bad(max_tokens=0), "max_tokens: "),
    (bad(max_tokens="3"), "max_tokens: "), (bad(stop="."), "stop: "), (bad(normalize="length"), "goes with choices"),
    (bad(choices=["y", "z"], max_tokens=3), "is not generated"), (bad(prompt=None, messages=[3]), "messages.0"),
])
def test_a_bad_line_is_named_by_its_number(line, words, tmp_path):
    path = lines(tmp_path / "gold.jsonl", {"id": "a", "prompt": "p \u2028 q", "answer": "r"}, line)
    if line == "":
        path.write_text(path.read_text() + '{"id": "c", "prompt": "p", "answer": "r"}\n')
    with pytest.raises(StageError, match="line 2") as caught:
        gold.load_gold(path)
    assert words in str(caught.value)
    assert (caught.value.failure, caught.value.reason) == (Failure.DATASET_INVALID, Reason.EVAL_DATASET_MISSING)


def test_the_prompt_of_a_chat_is_its_last_message(tmp_path):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "who?"}]
    [item] = gold.load_gold(lines(tmp_path / "gold.jsonl", {"id": "a", "messages": messages, "answer": "ada"}))
    assert item.prompt == "who?" and item.chat == messages and not item.generated


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_gold_set_that_is_not_there_or_no_text(tmp_path, content):
    if content:
        (tmp_path / "none.jsonl").write_bytes(content)
    with pytest.raises(StageError) as caught:
        gold.load_gold(tmp_path / "none.jsonl")
    assert caught.value.reason == Reason.EVAL_DATASET_MISSING
