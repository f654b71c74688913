"""Prompts and answers as ids where they meet, as lm-evaluation-harness makes them."""

import json

import pytest

from quantline.errors import Failure, Reason, StageError
from quantline.metrics.gold_items import GoldItem, load_gold
from quantline.metrics.gold_tokens import tokenize_items
from quantline.text.tokenizer import Tokenizer
from tests.helpers.checkpoint_files import write_files
from tests.helpers.tensor_files import edit_json
from tests.helpers.tokenizers import SENTENCEPIECE, write_byte_level, write_sentencepiece

BYTE_LEVEL = ("gpt2", "llama 3", "qwen2")
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{{ '\\n<answer>\\n' }}"
)
PAIRS = [
    ("The capital of Greece is", " Athens"),
    ("The capital of Greece is ", "Athens"),
    ("Question: where?\nAnswer:", " by the river."),
    ("Question: where?\nAnswer:\n", "by the river"),
    ("def area(r):\n    return", " 3.14 * r ** 2"),
    ("Η Αθήνα είναι", " μεγάλη πόλη"),
    ("你好", "，世界！"),
    ("2 + 2 =   ", "4"),
    ("x", " 🙂👍🏽"),
]


@pytest.fixture(scope="module", params=[*BYTE_LEVEL, *SENTENCEPIECE])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer") / "t"
    write = write_byte_level if request.param in BYTE_LEVEL else write_sentencepiece
    write(folder, request.param)
    (folder / "chat_template.jinja").write_text(CHAT)
    return Tokenizer(folder)


def harness_pair(tokenizer: Tokenizer, context: str, continuation: str):
    """Derive anew what the harness does: spaces move, both are encoded, and then they are cut."""

    def encode(text: str) -> list[int]:
        return tokenizer.fast.encode(text, add_special_tokens=True).ids

    spaces = len(context) - len(context.rstrip())
    if spaces:
        continuation = context[-spaces:] + continuation
        context = context[:-spaces]
    first = encode(context)
    return first, encode(context + continuation)[len(first) :]


@pytest.mark.parametrize(("prompt", "answer"), PAIRS)
def test_tokenize_items_gives_the_ids_of_the_harness(tokenizer, prompt, answer):
    other = answer + "s"
    items = [
        GoldItem(id="forced", prompt=prompt, answer=answer),
        GoldItem(id="choices", prompt=prompt, answer=answer, choices=[other, answer]),
    ]
    forced, choices = tokenize_items(items, tokenizer)
    first, continuation = harness_pair(tokenizer, prompt, answer)
    assert (forced.prompt, forced.continuations) == (first, [continuation])
    assert choices.prompt == first
    assert choices.continuations == [harness_pair(tokenizer, prompt, other)[1], continuation]
    assert choices.answer == 1
    assert choices.divisors == [len(tokens) for tokens in choices.continuations]


def test_tokenize_items_joins_an_answer_to_the_rendered_chat(tokenizer):
    item = GoldItem(
        id="chat", prompt="x", answer="yes", messages=[{"role": "user", "content": "is it?"}]
    )
    (tokenized,) = tokenize_items([item], tokenizer)
    assert tokenized.text == "<user>is it?\n<answer>\n"
    assert tokenized.prompt == tokenizer.encode("<user>is it?\n<answer>")
    (tokens,) = tokenized.continuations
    assert tokenized.prompt + tokens == tokenizer.encode("<user>is it?\n<answer>\nyes")


def test_tokenize_items_generates_from_the_prompt_as_it_is(tokenizer):
    item = GoldItem(id="a", prompt="Answer:\n", answer="4", match="contains")
    (tokenized,) = tokenize_items([item], tokenizer)
    assert tokenized.prompt == tokenizer.prompt("Answer:\n")
    assert tokenized.continuations == []


def test_tokenize_items_begins_a_blank_prompt_with_the_begin_or_end_token(tokenizer):
    (tokenized,) = tokenize_items([GoldItem(id="a", prompt=" ", answer="four")], tokenizer)
    begin = tokenizer.bos if tokenizer.bos is not None else tokenizer.end_tokens[0]
    assert tokenized.prompt == [begin]
    assert tokenized.continuations == [tokenizer.encode(" four")]


@pytest.fixture
def words(tmp_path) -> Tokenizer:
    """A tokenizer of lower-case words that writes [unk] for every other one."""
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    names = ["[unk]", "is", "it", "▁is", "▁it", "▁yes", "▁no", "▁cafe"]
    fast = FastTokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "[unk]"))
    fast.normalizer = normalizers.Lowercase()
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    fast.decoder = decoders.Metaspace(prepend_scheme="never")
    fast.save(str(tmp_path / "tokenizer.json"))
    edit_json(tmp_path / "tokenizer.json")
    return Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("item", "problem"),
    [
        ({"answer": " maybe"}, "say the answer ' maybe'"),
        ({"answer": " Yes"}, "say the answer ' Yes'"),
        ({"answer": " yes", "choices": [" yes", " never"]}, "say the answer ' never'"),
        ({"answer": " café", "match": "contains"}, "say the answer ' café'"),
        (
            {"answer": " maybe", "choices": [" maybe", " never"]},
            "the choices ' maybe' and ' never' are the same 1 tokens",
        ),
        ({"messages": [{"role": "user", "content": "is"}], "answer": " yes"}, "no chat template"),
    ],
)
def test_tokenize_items_names_the_item_and_its_line(item, problem, words, tmp_path):
    lines = [
        {"id": "good", "prompt": "is it", "answer": " yes"},
        {"id": "bad one", "prompt": "is it"} | item,
        {"id": "good too", "prompt": "is it", "answer": "Maybe.*", "match": "regex"},
        {"id": "bad two", "prompt": "is it", "answer": " never"},
    ]
    path = tmp_path / "gold.jsonl"
    path.write_text("\n\n".join(map(json.dumps, lines)))
    with pytest.raises(StageError) as caught:
        tokenize_items(load_gold(path), words)
    assert caught.value.failure == Failure.DATASET_INVALID
    assert caught.value.reason == Reason.EVAL_DATASET_MISSING
    message = str(caught.value)
    assert "item 'bad one' (line 3): " in message
    assert problem in message
    assert "item 'bad two' (line 7): " in message
    assert "good" not in message


def test_tokenize_items_refuses_an_answer_that_joins_the_prompts_last_token(tokenizer):
    """The harness would score an answer without its first letters."""
    whole = "indented"
    for cut in range(1, len(whole)):
        prompt = "    " + whole[:cut]
        context, continuation = harness_pair(tokenizer, prompt, whole[cut:])
        said = tokenizer.decode(context + continuation)
        says_it = continuation and said == tokenizer.decode(tokenizer.prompt(prompt + whole[cut:]))
        item = GoldItem(id="a", prompt=prompt, answer=whole[cut:])
        if says_it:
            tokenize_items([item], tokenizer)
        else:
            with pytest.raises(StageError, match="joins its beginning"):
                tokenize_items([item], tokenizer)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [("a[i] <", "< 2"), ("Рус", "ский"), ("    inden", "nted"), ("a  <", "<")],
)
def test_tokenize_items_scores_no_answer_after_another_text(prompt, answer, tokenizer):
    """What follows the prompt can end with the answer, and its beginning be lost or doubled."""
    items = [GoldItem(id="a", prompt=prompt, answer=answer)]
    try:
        (item,) = tokenize_items(items, tokenizer)
    except StageError as error:
        assert "joins its beginning" in str(error)
        return
    said = tokenizer.decode(item.prompt + item.continuations[0])
    assert said == tokenizer.decode(tokenizer.prompt(prompt + answer))


def test_tokenize_items_joins_no_answer_that_is_generated(tokenizer):
    """The model writes after the prompt as it is, whatever the two would join to."""
    for cut in range(1, 8):
        item = GoldItem(id="a", prompt="indented"[:cut], answer="indented"[cut:], max_tokens=4)
        (tokenized,) = tokenize_items([item], tokenizer)
        assert tokenized.prompt == tokenizer.prompt("indented"[:cut])


def test_tokenize_items_refuses_a_generated_answer_that_is_cut_off(tokenizer):
    item = GoldItem(id="a", prompt="Say it:", answer="by the river and more", max_tokens=2)
    with pytest.raises(StageError, match="2 are generated, so that none could be right"):
        tokenize_items([item], tokenizer)


def test_tokenize_items_ends_answers_wherever_the_model_stops(tmp_path):
    ends = {"generation_config": {"eos_token_id": [2, 7]}}
    folder = write_files(tmp_path / "model", **ends)
    item = GoldItem(id="1", prompt="ada met", answer=" hugo", max_tokens=4)
    (tokenized,) = tokenize_items([item], Tokenizer(folder))
    assert tokenized.end == [0, 2, 7]
