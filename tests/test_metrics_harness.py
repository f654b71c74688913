"""lm-evaluation-harness's requests against a plain reference that reads one token after another."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.special import log_softmax

from quantline.metrics import scoring
from quantline.metrics.lm_eval_model import Answers
from quantline.metrics.scoring import follow
from quantline.errors import StageError

SIZE, BOS, EOS = 40, 0, 1
WORDS = ["<s>", "</s>", *(chr(97 + index) for index in range(26)), " ", "\n", *("0123456789")]


def after(context: list[int]) -> np.ndarray:
    """Log-probabilities of the token after these; they depend on all of them."""
    return log_softmax(np.random.default_rng([len(context), *context]).normal(size=SIZE) * 3).astype(np.float32)


class Plain:
    """A model whose every distribution is `after`, which notes what it is asked."""

    def __init__(self, most=None):
        self.shapes, self.most, self.asked = [], most, []

    def logprobs(self, tokens):
        self.shapes.append(tokens.shape)
        assert self.most is None or tokens.shape[1] <= self.most
        return np.array([[after(row[:place + 1]) for place in range(len(row))] for row in tokens.tolist()])

    def generate(self, prompt, max_new_tokens, stop):
        self.asked.append((prompt, max_new_tokens, stop))
        ids = []
        while len(ids) < max_new_tokens and (token := int(after(prompt + ids).argmax())) not in stop:
            ids.append(token)
        return ids

    def decode(self, ids):
        return "".join(WORDS[one] for one in ids)


class Letters:
    """A tokenizer of single characters."""

    chat_template, folder, ends = "{{ messages }}", SimpleNamespace(name="letters"), [EOS]

    def __init__(self, bos=None):
        self.bos = bos

    def special(self, name):
        return {"bos_token": BOS, "eos_token": EOS}.get(name)

    def encode(self, text):
        begin = [BOS] if text.startswith("<s>") else []
        return begin + [WORDS.index(one) for one in text.removeprefix("<s>")]

    def decode(self, ids):
        return "".join(WORDS[one] for one in ids)

    def render(self, messages, generation_prompt=False):
        return "".join(f"<s>{one['role']}: {one['content']} \n" for one in messages) + "answer:" * generation_prompt


def asked(*args):
    return SimpleNamespace(args=args)


def likelihood(context: list[int], continuation: list[int]) -> tuple[float, bool]:
    rows = [after(context + continuation[:place]) for place in range(len(continuation))]
    return (sum(float(row[token]) for row, token in zip(rows, continuation, strict=True)),
            all(int(row.argmax()) == token for row, token in zip(rows, continuation, strict=True)))


def ids(text: str) -> list[int]:
    return Letters().encode(text)


def test_log_likelihoods_are_those_of_one_token_after_another():
    requests = [("ada", " met"), ("ada met hugo", "x"), ("a ", "b"), ("", "snow"), ("  ", "a"), ("a", "b" * 9)]
    contexts = [(ids("ada"), ids(" met")), (ids("ada met hugo"), ids("x")), (ids("a"), ids(" b")), ([BOS], ids("snow")),
                ([BOS], ids("  a")), (ids("a"), ids("b" * 9))]
    found = Answers(Plain(), Letters(), 32).loglikelihood([asked(*one) for one in requests])
    for (value, greedy), pair in zip(found, contexts, strict=True):
        assert value == pytest.approx(likelihood(*pair)[0], rel=1e-5) and greedy == likelihood(*pair)[1]


def test_a_greedy_continuation_is_told_as_one():
    written = Plain().generate(ids("ada"), 3, set())
    (_, greedy), (_, other) = Answers(Plain(), Letters(), 32).loglikelihood(
        [asked("ada", Letters().decode(written)), asked("ada", Letters().decode([*written[:2], (written[2] + 1) % 26 + 2]))])
    assert greedy is True and other is False


@pytest.mark.parametrize(("bos", "text", "context"), [(BOS, "ada", [BOS, *ids("ada")]), (BOS, "<s>ada", [BOS, *ids("ada")]), (None, "ada", ids("ada"))])
def test_the_begin_token_stands_once_where_the_tokenizer_adds_one(bos, text, context):
    (value, _), = Answers(Plain(), Letters(bos), 32).loglikelihood([asked(text, " met")])
    assert value == pytest.approx(likelihood(context, ids(" met"))[0], rel=1e-5)


def test_what_is_too_long_loses_its_beginning():
    answers = Answers(Plain(most=8), Letters(), 8)
    (value, _), = answers.loglikelihood([asked("abcdefghij", "klm")])
    assert value == pytest.approx(likelihood(ids("efghij"), ids("klm"))[0], rel=1e-5)
    assert answers.loglikelihood([asked("a", "b" * 8)])[0][0] == pytest.approx(likelihood(ids("a"), ids("b" * 8))[0], rel=1e-5)
    with pytest.raises(StageError, match="continuations of 8 tokens at most.*found one of 9"):
        answers.loglikelihood([asked("a", "b" * 9)])


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 19])
def test_rolling_predicts_each_token_once_with_the_most_context(length):
    text = ("abcdefghijklmnopqrstuvwxyz")[:length]
    found, = Answers(Plain(most=8), Letters(BOS), 8).loglikelihood_rolling([asked(text)])
    whole, wanted = [BOS, *ids(text)], 0.0
    for place in range(length):
        window = place // 8  # whose last token has the full context of eight
        end = min(8 * (window + 1), length)
        wanted += float(after(whole[max(0, end - 8):place + 1])[ids(text)[place]])
    assert found == pytest.approx(wanted, rel=1e-5)


def test_rolling_over_an_empty_text_is_nothing():
    assert Answers(Plain(), Letters(), 8).loglikelihood_rolling([asked(""), asked("a")])[0] == 0


def test_generated_text_ends_at_the_first_stop():
    model, free = Plain(), Plain()
    context = next(one for one in WORDS[2:28] if len(free.generate(ids(one), 20, {EOS})) == 20)
    text, answers = free.decode(free.generate(ids(context), 20, {EOS})), Answers(model, Letters(), 64)
    for until, wanted in ((None, text), ([], text), ([text[9], text[5:7], ""], text[:min(text.find(text[9]), text.find(text[5:7]))]),
                          (text[4:6], text[:text.find(text[4:6])]), ("never", text)):
        settings = {"until": until, "max_new_tokens": 20, "do_sample": False, "temperature": 0.7}
        assert answers.generate_until([asked(context, settings)]) == [wanted]
    assert model.asked[0] == (ids(context), 20, {EOS})


def test_generation_keeps_room_for_what_it_writes():
    model = Plain()
    Answers(model, Letters(), 16).generate_until([asked("abcdefghijklmnop", {"max_gen_toks": 6})])
    assert model.asked == [(ids("ghijklmnop"), 6, {EOS})]


@pytest.mark.parametrize(("settings", "words"), [
    ({"do_sample": True}, "found one that samples"), ({"temperature": 0.8}, "found one that samples"),
    ({}, "fewer tokens than the model's context of 64, found 256"), ({"max_gen_toks": 0}, "found 0")])
def test_what_cannot_be_answered_is_refused(settings, words):
    with pytest.raises(StageError, match=words) as error:
        Answers(Plain(), Letters(), 64).generate_until([asked("ada", settings)])
    assert error.value.failure == "dataset_invalid"


def test_a_model_that_gives_no_number_is_refused():
    model = Plain()
    model.logprobs = lambda tokens: np.full((*tokens.shape, SIZE), np.nan, np.float32)
    with pytest.raises(StageError, match="expected finite log-likelihoods, found nan in ' met'") as error:
        Answers(model, Letters(), 64).loglikelihood([asked("ada", " met")])
    assert error.value.failure == "non_finite"


def test_chat_goes_through_the_template_and_can_be_left_open():
    answers, talk = Answers(Plain(), Letters(), 64), [{"role": "user", "content": "who"}, {"role": "assistant", "content": "ada "}]
    assert answers.apply_chat_template(talk[:1]) == "<s>user: who \nanswer:"
    assert answers.apply_chat_template(talk, add_generation_prompt=False) == "<s>user: who \n<s>assistant: ada"
    assert (answers.chat_template(True), answers.chat_template(False)) == ("{{ messages }}", "")


def test_batches_change_nothing_and_are_kept_small(monkeypatch):
    pairs = [([2 + (seed + place) % 30 for place in range(1 + seed % 5)], [3 + seed % 20] * (1 + seed % 3)) for seed in range(30)]
    found = {}
    for most in (1, 12, 4096):
        monkeypatch.setattr(scoring, "BATCH_TOKENS", most)
        model = Plain()
        found[most] = follow(model, pairs)
        assert model.shapes[0][0] == 1 and all(rows == 1 or rows * width <= most for rows, width in model.shapes)
        if most == 1:
            assert len(model.shapes) == 30
    for one, two, three, (context, continuation) in zip(*found.values(), pairs, strict=True):
        assert np.array_equal(one[0], two[0]) and np.array_equal(one[0], three[0]) and one[1] == two[1] == three[1]
        assert one[0].sum() == pytest.approx(likelihood(context, continuation)[0], rel=1e-5)


def test_a_large_vocabulary_makes_batches_smaller(monkeypatch):
    monkeypatch.setattr(scoring, "BATCH_VALUES", 10 * SIZE)
    model = Plain()
    follow(model, [([2, 3], [4])] * 20)
    assert model.shapes == [(1, 2), *[(5, 2)] * 3, (4, 2)]
