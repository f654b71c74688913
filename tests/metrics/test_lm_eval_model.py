"""lm-evaluation-harness's requests against a plain reference that reads token after token."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.special import log_softmax

from quantline.errors import StageError
from quantline.metrics import scoring
from quantline.metrics.lm_eval_model import RuntimeLM
from quantline.metrics.scoring import score_continuations

SIZE = 40
BOS = 0
EOS = 1
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["<s>", "</s>", *LETTERS, " ", "\n", *"0123456789"]


def distribution_after(context: list[int]) -> np.ndarray:
    """Return log-probabilities of the token after these; they depend on all of them."""
    draw = np.random.default_rng([len(context), *context])
    return log_softmax(draw.normal(size=SIZE) * 3).astype(np.float32)


class PlainModel:
    """A model with `distribution_after`, which notes what it is asked for."""

    def __init__(self, most_tokens=None):
        self.most_tokens = most_tokens
        self.shapes = []
        self.generated = []

    def logprobs(self, tokens):
        self.shapes.append(tokens.shape)
        assert self.most_tokens is None or tokens.shape[1] <= self.most_tokens
        values = np.empty((*tokens.shape, SIZE), np.float32)
        for index, row in enumerate(tokens.tolist()):
            for place in range(len(row)):
                values[index, place] = distribution_after(row[: place + 1])
        return values

    def generate(self, prompt, max_new_tokens, stop):
        self.generated.append((prompt, max_new_tokens, stop))
        ids = []
        while len(ids) < max_new_tokens:
            token = int(distribution_after(prompt + ids).argmax())
            if token in stop:
                break
            ids.append(token)
        return ids

    def decode(self, ids):
        return "".join(WORDS[token] for token in ids)


class LetterTokenizer:
    """A tokenizer of single characters."""

    chat_template = "{{ messages }}"
    folder = SimpleNamespace(name="letters")
    end_tokens = (EOS,)

    def __init__(self, bos=None):
        self.bos = bos

    def special(self, name):
        return {"bos_token": BOS, "eos_token": EOS}.get(name)

    def encode(self, text):
        begin = [BOS] if text.startswith("<s>") else []
        return begin + [WORDS.index(letter) for letter in text.removeprefix("<s>")]

    def decode(self, ids):
        return "".join(WORDS[token] for token in ids)

    def render(self, messages, generation_prompt=False):
        lines = [f"<s>{message['role']}: {message['content']} \n" for message in messages]
        return "".join(lines) + "answer:" * generation_prompt


def request(*args):
    return SimpleNamespace(args=args)


def ids(text: str) -> list[int]:
    return LetterTokenizer().encode(text)


def likelihood(context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Return the log-likelihood of a continuation, and whether greedy decoding gives it."""
    total = 0.0
    greedy = True
    for place, token in enumerate(continuation):
        row = distribution_after(context + continuation[:place])
        total += float(row[token])
        greedy = greedy and int(row.argmax()) == token
    return total, greedy


def test_loglikelihood_is_that_of_one_token_after_another():
    cases = [
        (("ada", " met"), (ids("ada"), ids(" met"))),
        (("ada met hugo", "x"), (ids("ada met hugo"), ids("x"))),
        (("a ", "b"), (ids("a"), ids(" b"))),
        (("", "snow"), ([BOS], ids("snow"))),
        (("  ", "a"), ([BOS], ids("  a"))),
        (("a", "b" * 9), (ids("a"), ids("b" * 9))),
    ]
    model = RuntimeLM(PlainModel(), LetterTokenizer(), 32)
    answers = model.loglikelihood([request(*texts) for texts, _ in cases])
    for (value, greedy), (_, pair) in zip(answers, cases, strict=True):
        expected, is_greedy = likelihood(*pair)
        assert value == pytest.approx(expected, rel=1e-5)
        assert greedy == is_greedy


def test_loglikelihood_knows_a_greedy_continuation():
    decode = LetterTokenizer().decode
    written = PlainModel().generate(ids("ada"), 3, set())
    other = [*written[:2], (written[2] + 1) % 26 + 2]
    model = RuntimeLM(PlainModel(), LetterTokenizer(), 32)
    (_, first), (_, second) = model.loglikelihood(
        [request("ada", decode(written)), request("ada", decode(other))]
    )
    assert first is True
    assert second is False


@pytest.mark.parametrize(
    ("bos", "text", "context"),
    [
        (BOS, "ada", [BOS, *ids("ada")]),
        (BOS, "<s>ada", [BOS, *ids("ada")]),
        (None, "ada", ids("ada")),
    ],
)
def test_loglikelihood_has_the_begin_token_once_where_the_tokenizer_adds_one(bos, text, context):
    model = RuntimeLM(PlainModel(), LetterTokenizer(bos), 32)
    ((value, _),) = model.loglikelihood([request(text, " met")])
    assert value == pytest.approx(likelihood(context, ids(" met"))[0], rel=1e-5)


def test_loglikelihood_cuts_the_beginning_of_what_is_too_long():
    model = RuntimeLM(PlainModel(most_tokens=8), LetterTokenizer(), 8)
    ((value, _),) = model.loglikelihood([request("abcdefghij", "klm")])
    assert value == pytest.approx(likelihood(ids("efghij"), ids("klm"))[0], rel=1e-5)
    ((value, _),) = model.loglikelihood([request("a", "b" * 8)])
    assert value == pytest.approx(likelihood(ids("a"), ids("b" * 8))[0], rel=1e-5)
    with pytest.raises(StageError, match=r"continuations of 8 tokens at most.*found one of 9"):
        model.loglikelihood([request("a", "b" * 9)])


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 19])
def test_loglikelihood_rolling_predicts_each_token_once_with_the_most_context(length):
    text = LETTERS[:length]
    model = RuntimeLM(PlainModel(most_tokens=8), LetterTokenizer(BOS), 8)
    (value,) = model.loglikelihood_rolling([request(text)])
    with_begin = [BOS, *ids(text)]
    expected = 0.0
    for place in range(length):
        window = place // 8  # whose last token has the full context of eight
        end = min(8 * (window + 1), length)
        context = with_begin[max(0, end - 8) : place + 1]
        expected += float(distribution_after(context)[ids(text)[place]])
    assert value == pytest.approx(expected, rel=1e-5)


def test_loglikelihood_rolling_over_an_empty_text_is_nothing():
    model = RuntimeLM(PlainModel(), LetterTokenizer(), 8)
    assert model.loglikelihood_rolling([request(""), request("a")])[0] == 0


def test_generate_until_ends_at_the_first_stop():
    plain = PlainModel()
    context = next(word for word in LETTERS if len(plain.generate(ids(word), 20, {EOS})) == 20)
    text = plain.decode(plain.generate(ids(context), 20, {EOS}))
    cases = [
        (None, text),
        ([], text),
        ([text[9], text[5:7], ""], text[: min(text.find(text[9]), text.find(text[5:7]))]),
        (text[4:6], text[: text.find(text[4:6])]),
        ("never", text),
    ]
    model = PlainModel()
    for until, expected in cases:
        settings = {"until": until, "max_new_tokens": 20, "do_sample": False, "temperature": 0.7}
        answers = RuntimeLM(model, LetterTokenizer(), 64).generate_until(
            [request(context, settings)]
        )
        assert answers == [expected]
    assert model.generated[0] == (ids(context), 20, {EOS})


def test_generate_until_keeps_room_for_what_it_writes():
    model = PlainModel()
    RuntimeLM(model, LetterTokenizer(), 16).generate_until(
        [request("abcdefghijklmnop", {"max_gen_toks": 6})]
    )
    assert model.generated == [(ids("ghijklmnop"), 6, {EOS})]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"do_sample": True}, "found one that samples"),
        ({"temperature": 0.8}, "found one that samples"),
        ({}, "fewer tokens than the model's context of 64, found 256"),
        ({"max_gen_toks": 0}, "found 0"),
    ],
)
def test_generate_until_refuses_what_cannot_be_answered(settings, words):
    model = RuntimeLM(PlainModel(), LetterTokenizer(), 64)
    with pytest.raises(StageError, match=words) as error:
        model.generate_until([request("ada", settings)])
    assert error.value.failure == "dataset_invalid"


def test_loglikelihood_refuses_a_model_that_gives_no_number():
    plain = PlainModel()
    plain.logprobs = lambda tokens: np.full((*tokens.shape, SIZE), np.nan, np.float32)
    model = RuntimeLM(plain, LetterTokenizer(), 64)
    with pytest.raises(
        StageError, match="expected finite log-likelihoods, found nan in ' met'"
    ) as error:
        model.loglikelihood([request("ada", " met")])
    assert error.value.failure == "non_finite"


def test_runtime_lm_refuses_a_tokenizer_that_begins_no_text(monkeypatch):
    monkeypatch.setattr(LetterTokenizer, "special", lambda self, name: None)
    monkeypatch.setattr(LetterTokenizer, "end_tokens", ())
    with pytest.raises(StageError, match="tasks with an empty context need one") as error:
        RuntimeLM(PlainModel(), LetterTokenizer(), 8)
    assert error.value.failure == "missing_tokenizer"


def test_apply_chat_template_can_leave_the_last_message_open():
    model = RuntimeLM(PlainModel(), LetterTokenizer(), 64)
    chat = [{"role": "user", "content": "who"}, {"role": "assistant", "content": "ada "}]
    assert model.apply_chat_template(chat[:1]) == "<s>user: who \nanswer:"
    expected = "<s>user: who \n<s>assistant: ada"
    assert model.apply_chat_template(chat, add_generation_prompt=False) == expected
    assert model.chat_template(True) == "{{ messages }}"
    assert model.chat_template(False) == ""
    assert model.tokenizer_name == "letters"


def test_score_continuations_in_batches_changes_nothing_and_keeps_them_small(monkeypatch):
    pairs = []
    for seed in range(30):
        context = [2 + (seed + place) % 30 for place in range(1 + seed % 5)]
        pairs.append((context, [3 + seed % 20] * (1 + seed % 3)))
    scores = {}
    for most in (1, 12, 4096):
        monkeypatch.setattr(scoring, "BATCH_TOKENS", most)
        model = PlainModel()
        scores[most] = score_continuations(model, pairs)
        assert model.shapes[0][0] == 1
        for rows, width in model.shapes:
            assert rows == 1 or rows * width <= most
        if most == 1:
            assert len(model.shapes) == 30
    for first, second, third, pair in zip(*scores.values(), pairs, strict=True):
        assert np.array_equal(first.logprobs, second.logprobs)
        assert np.array_equal(first.logprobs, third.logprobs)
        assert first.greedy == second.greedy == third.greedy
        assert first.logprobs.sum() == pytest.approx(likelihood(*pair)[0], rel=1e-5)


def test_score_continuations_with_a_large_vocabulary_makes_batches_smaller(monkeypatch):
    monkeypatch.setattr(scoring, "BATCH_VALUES", 10 * SIZE)
    model = PlainModel()
    score_continuations(model, [([2, 3], [4])] * 20)
    assert model.shapes == [(1, 2), *[(5, 2)] * 3, (4, 2)]
