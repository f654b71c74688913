"""The demo: the same seed writes the same bytes, and texts, tokenizer and model are as promised."""

import json
from typing import Any

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


def prompt_of(item: dict[str, Any]) -> str:
    if "messages" in item:
        return render(item["messages"], generation_prompt=True)
    return item["prompt"]


def test_documents_are_the_same_with_the_same_seed_alone():
    first = documents(5, 40, frozenset())
    assert documents(5, 40, frozenset()) == first
    assert documents(6, 40, frozenset()) != first


def test_documents_and_gold_items_are_what_the_files_hold():
    assert gold_items() == GOLD
    reserved = reserved_questions(GOLD)
    for name in ("calibration", "evaluation"):
        taken = paragraphs("calibration.txt") if name == "evaluation" else ()
        expected = documents(SEEDS[name], 50, reserved, taken)
        assert paragraphs(f"{name}.txt")[:50] == expected


def test_check_disjoint_takes_the_files():
    check_disjoint(paragraphs("calibration.txt"), paragraphs("evaluation.txt"), GOLD)


def test_check_disjoint_names_a_document_in_both_texts():
    shared = max(paragraphs("calibration.txt"), key=len)
    evaluation = [*paragraphs("evaluation.txt"), shared]
    with pytest.raises(ValueError, match="found one in both texts") as error:
        check_disjoint(paragraphs("calibration.txt"), evaluation, GOLD)
    assert repr(shared) in str(error.value)


@pytest.mark.parametrize("name", ["calibration", "evaluation"])
def test_check_disjoint_names_a_gold_prompt_in_a_text(name):
    texts = {kind: paragraphs(f"{kind}.txt") for kind in ("calibration", "evaluation")}
    item = next(item for item in GOLD if item["task"] == "reading")
    texts[name].append("Before. " + item["prompt"] + item["answer"])
    with pytest.raises(ValueError, match=f"in the {name} text, found {item['id']}"):
        check_disjoint(**texts, gold=GOLD)


def test_training_documents_never_show_a_reading_text_of_the_gold_set():
    held_out = {item["prompt"].partition("\n")[0] for item in GOLD if item["task"] == "reading"}
    assert held_out
    stream = training_documents()
    assert not held_out & {next(stream).partition("\n")[0] for _ in range(3000)}


def test_gold_items_fit_their_schema():
    assert len(GOLD) >= 400
    assert len({item["id"] for item in GOLD}) == len(GOLD)
    tasks = {item["task"] for item in GOLD}
    assert tasks == {"facts", "arithmetic", "reading", "choice", "chat"}
    for item in GOLD:
        assert item["answer"].endswith("."), item["id"]
        assert ("choices" in item) == (item["task"] == "choice"), item["id"]
        assert ("messages" in item) == (item["task"] == "chat"), item["id"]
        if "choices" in item:
            choices = item["choices"]
            assert item["answer"] in choices
            assert len(set(choices)) == len(choices) == 4
        if "messages" in item:
            assert item["messages"][-1] == {"role": "user", "content": item["prompt"]}


def test_gold_prompts_and_answers_meet_at_a_token_boundary():
    for item in GOLD:
        prompt = prompt_of(item)
        for answer in item.get("choices", [item["answer"]]):
            assert encode(prompt) + encode(answer) == encode(prompt + answer), item["id"]


def test_the_evaluation_text_is_long_enough():
    assert sum(len(encode(text)) for text in paragraphs("evaluation.txt")) >= 25_000


def test_the_chat_calibration_holds_question_and_answer():
    lines = (DATA / "calibration_chat.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 200
    for line in lines:
        roles = [message["role"] for message in json.loads(line)["messages"]]
        assert roles == ["user", "assistant"]


def test_render_is_the_template_of_the_tokenizer():
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(MODEL)
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}]
    for part, prompt in ((messages, False), (messages[:1], True)):
        expected = tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=prompt)
        assert render(part, generation_prompt=prompt) == expected


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_the_tokenizer_gives_every_text_back(text):
    assert TOKENIZER.decode(encode(text), skip_special_tokens=False) == text


def test_the_tokenizer_has_a_token_for_every_digit():
    assert len(encode("1907")) == 4


def test_the_model_is_small_and_its_rows_are_complete_k_quant_blocks():
    config = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= LARGEST_MODEL
    assert config["hidden_size"] % 256 == config["intermediate_size"] % 256 == 0
    assert config["dtype"] == "bfloat16"
    assert config["vocab_size"] == TOKENIZER.get_vocab_size()
