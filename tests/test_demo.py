"""The demo: the same seed writes the same bytes, its texts are disjoint, and its tokenizer and model are as promised."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from demo.corpus import (
    DATA,
    SEEDS,
    check_disjoint,
    documents,
    gold_items,
    render,
    reserved_questions,
    training_documents,
)

MODEL = DATA.parent / "model"
LARGEST_MODEL = 16 * 2**20  # bytes
TOKENIZER = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
GOLD = [json.loads(line) for line in (DATA / "gold.jsonl").read_text(encoding="utf-8").splitlines()]


def paragraphs(name: str) -> list[str]:
    return (DATA / name).read_text(encoding="utf-8").strip("\n").split("\n\n")


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def prompt_of(item: dict) -> str:
    return render(item["messages"], generation_prompt=True) if "messages" in item else item["prompt"]


def test_same_seed_gives_the_same_documents_and_another_seed_others():
    first = documents(5, 40, frozenset())
    assert documents(5, 40, frozenset()) == first
    assert documents(6, 40, frozenset()) != first


def test_the_files_are_what_the_generator_writes():
    assert gold_items() == GOLD
    reserved = reserved_questions(GOLD)
    for name in ("calibration", "evaluation"):
        taken = paragraphs("calibration.txt") if name == "evaluation" else ()
        assert paragraphs(f"{name}.txt")[:50] == documents(SEEDS[name], 50, reserved, taken)


def test_the_files_are_disjoint():
    check_disjoint(paragraphs("calibration.txt"), paragraphs("evaluation.txt"), GOLD)


def test_a_document_in_both_texts_is_refused_by_name():
    shared = max(paragraphs("calibration.txt"), key=len)
    with pytest.raises(ValueError, match="found one in both texts") as caught:
        check_disjoint(paragraphs("calibration.txt"), [*paragraphs("evaluation.txt"), shared], GOLD)
    assert repr(shared) in str(caught.value)


@pytest.mark.parametrize("name", ["calibration", "evaluation"])
def test_a_gold_prompt_in_a_text_is_refused_by_id(name):
    texts = {kind: paragraphs(f"{kind}.txt") for kind in ("calibration", "evaluation")}
    item = next(item for item in GOLD if item["task"] == "reading")
    texts[name].append("Before. " + item["prompt"] + item["answer"])
    with pytest.raises(ValueError, match=f"in the {name} text, found {item['id']}"):
        check_disjoint(**texts, gold=GOLD)


def test_training_never_shows_a_reading_text_of_the_gold_set():
    held_out = {item["prompt"].partition("\n")[0] for item in GOLD if item["task"] == "reading"}
    stream = training_documents()
    assert not held_out & {next(stream).partition("\n")[0] for _ in range(3000)}


def test_gold_schema():
    assert len(GOLD) >= 400
    assert len({item["id"] for item in GOLD}) == len(GOLD)
    assert {item["task"] for item in GOLD} == {"facts", "arithmetic", "reading", "choice", "chat"}
    for item in GOLD:
        assert item["answer"].endswith("."), item["id"]
        assert ("choices" in item) == (item["task"] == "choice"), item["id"]
        assert ("messages" in item) == (item["task"] == "chat"), item["id"]
        if "choices" in item:
            assert item["answer"] in item["choices"] and len(set(item["choices"])) == len(item["choices"]) == 4
        if "messages" in item:
            assert item["messages"][-1] == {"role": "user", "content": item["prompt"]}


def test_prompt_and_answer_are_cut_at_a_token_boundary():
    for item in GOLD:
        prompt = prompt_of(item)
        for answer in item.get("choices", [item["answer"]]):
            assert encode(prompt) + encode(answer) == encode(prompt + answer), item["id"]


def test_evaluation_text_is_long_enough():
    assert sum(len(encode(text)) for text in paragraphs("evaluation.txt")) >= 25_000


def test_chat_calibration_holds_question_and_answer():
    lines = (DATA / "calibration_chat.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 200
    for line in lines:
        assert [turn["role"] for turn in json.loads(line)["messages"]] == ["user", "assistant"]


def test_the_written_out_template_is_that_of_the_tokenizer():
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(MODEL)
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}]
    for messages, ask in ((turns, False), (turns[:1], True)):
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
        assert render(messages, generation_prompt=ask) == expected


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_every_text_survives_the_tokenizer(text):
    assert TOKENIZER.decode(encode(text), skip_special_tokens=False) == text


def test_every_digit_is_a_token_of_its_own():
    assert len(encode("1907")) == 4


def test_model_fits_and_its_rows_are_whole_k_quant_blocks():
    config = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= LARGEST_MODEL
    assert config["hidden_size"] % 256 == config["intermediate_size"] % 256 == 0
    assert config["dtype"] == "bfloat16"
    assert config["vocab_size"] == TOKENIZER.get_vocab_size()
