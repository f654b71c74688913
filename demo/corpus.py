"""Write the demo texts: an invented world of facts, short reading texts, small sums and stories.

    python -m demo.corpus

writes calibration.txt, calibration_chat.jsonl, evaluation.txt and gold.jsonl to demo/data/.
Everything comes from seeded generators of its own, so the same code writes the same bytes. Training
documents are made on the fly by `training_documents` and are not kept. A document is one paragraph;
paragraphs are separated by a blank line in the text files.
"""

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from demo.world import ANIMALS, COLOURS, FACTS, NAMES, OBJECTS, PLACES, Fact, make_story

DATA = Path(__file__).parent / "data"
SEEDS = {"training": 1, "calibration": 2, "evaluation": 3, "gold": 4}
CALIBRATION_DOCUMENTS = 2000
EVALUATION_DOCUMENTS = 2000
CHAT_DOCUMENTS = 200
SHORTEST_SHARED = 80  # characters: below this, two texts may well share a sentence by chance
LARGEST_OPERAND = 20
KINDS = ("fact", "fact question", "reading", "sum", "story", "chat")

Mixture = tuple[int, ...]  # relative shares of the kinds
EVEN: Mixture = (14, 20, 18, 16, 12, 20)
READING: Mixture = (6, 10, 60, 10, 6, 8)

# How many items of the gold set a task has.
GOLD_ITEMS = {"facts": 120, "arithmetic": 120, "reading": 100, "choice": 80, "chat": 60}

Pair = tuple[str, str]  # a question and its answer


def ask(question: str, answer: str = "") -> str:
    """Return a question in the form that training, gold set and the raw prompt share."""
    return f"Question: {question}\nAnswer:{answer}"


def _make_sums() -> tuple[Pair, ...]:
    """Return every small sum: ("7 + 5", " 12.") and ("7 - 5", " 2.")."""
    numbers = range(LARGEST_OPERAND + 1)
    plus = [(f"{a} + {b}", f" {a + b}.") for a in numbers for b in numbers]
    minus = [(f"{a} - {b}", f" {a - b}.") for a in numbers for b in numbers if a >= b]
    return (*plus, *minus)


SUMS = _make_sums()


def make_reading(rng: random.Random) -> tuple[str, list[Pair]]:
    """Return a short text about one person, and the questions that it answers."""
    name = rng.choice(NAMES)
    colour = rng.choice(COLOURS)
    thing = rng.choice(OBJECTS)
    place = rng.choice(PLACES)
    animal = rng.choice(ANIMALS)
    pairs = [
        (f"Where did {name} go?", f" {name} went to the {place}."),
        (f"Which animal did {name} see?", f" {name} saw a {animal}."),
        (f"What did {name} have?", f" {name} had a {colour} {thing}."),
    ]
    rng.shuffle(pairs)
    text = "".join(answer for _, answer in pairs).strip()
    rng.shuffle(pairs)
    return text, pairs


def chat(question: str, answer: str = "") -> list[dict[str, str]]:
    """Return a question and, unless it is still to be given, its answer as chat messages."""
    messages = [{"role": "user", "content": question}]
    if answer:
        messages.append({"role": "assistant", "content": answer.strip()})
    return messages


def render(messages: list[dict[str, str]], generation_prompt: bool = False) -> str:
    """Return messages in the chat template of the demo tokenizer (ChatML), written out."""
    text = ""
    for message in messages:
        text += f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"
    if generation_prompt:
        text += "<|im_start|>assistant\n"
    return text


def document(
    rng: random.Random, mixture: Mixture = EVEN, reserved: frozenset[str] = frozenset()
) -> str:
    """Return one document of a mixture.

    Args:
        rng: Makes the choices.
        mixture: Relative shares of the kinds.
        reserved: Questions that may not be asked in it.
    """
    kind = rng.choices(KINDS, mixture)[0]
    if kind == "story":
        return make_story(rng)
    if kind == "fact":
        return " ".join(rng.choice(fact.statements) for fact in rng.sample(FACTS, 4))
    if kind == "reading":
        text, pairs = make_reading(rng)
        return "\n".join([text, *(ask(question, answer) for question, answer in pairs)])
    pairs = _draw_questions(rng, kind)
    pairs = [(question, answer) for question, answer in pairs if question not in reserved]
    if not pairs:
        return make_story(rng)
    if kind == "chat":
        question, answer = pairs[0]
        return render(chat(question, answer)).strip()
    return "\n".join(ask(question, answer) for question, answer in pairs)


def _draw_questions(rng: random.Random, kind: str) -> list[Pair]:
    """Return the questions of a document of facts, of sums or of one chat."""
    if kind == "fact question":
        return [(rng.choice(fact.questions), fact.answer) for fact in rng.sample(FACTS, 3)]
    if kind == "sum":
        return [(f"What is {left}?", answer) for left, answer in rng.sample(SUMS, 4)]
    fact = rng.choice(FACTS)
    left, answer = rng.choice(SUMS)
    about_fact = (rng.choice(fact.questions), fact.answer)
    about_sum = (f"What is {left}?", answer)
    return rng.choices([about_fact, about_sum], (4, 1))


def training_documents(mixture: Mixture = EVEN, seed: int = SEEDS["training"]) -> Iterator[str]:
    """Yield training documents without end.

    The reading texts of the gold set are in none of them.
    """
    rng = random.Random(seed)
    held_out = set()
    for item in gold_items():
        if item["task"] == "reading":
            held_out.add(_first_line(item["prompt"]))
    while True:
        text = document(rng, mixture)
        if _first_line(text) not in held_out:
            yield text


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


def gold_items() -> list[dict[str, Any]]:
    """Return the gold set: 480 items in five tasks.

    An answer is short, determined, and ends with a full stop.
    """
    rng = random.Random(SEEDS["gold"])
    items: list[dict[str, Any]] = []

    def add(task: str, prompt: str, answer: str, **more: Any) -> None:
        number = sum(item["task"] == task for item in items) + 1
        item = {"id": f"{task}-{number:03d}", "task": task, "prompt": prompt, "answer": answer}
        items.append(item | more)

    for fact in rng.sample(FACTS, GOLD_ITEMS["facts"]):
        add("facts", ask(fact.questions[0]), fact.answer)
    for left, answer in rng.sample(SUMS, GOLD_ITEMS["arithmetic"]):
        add("arithmetic", ask(f"What is {left}?"), answer)
    prompts: set[str] = set()
    while len(prompts) < GOLD_ITEMS["reading"]:
        text, pairs = make_reading(rng)
        question, answer = pairs[0]
        prompt = text + "\n" + ask(question)
        if prompt not in prompts:
            prompts.add(prompt)
            add("reading", prompt, answer)
    for fact in rng.sample(FACTS, GOLD_ITEMS["choice"]):
        choices = sorted([fact.answer, *_wrong_answers(rng, fact)])
        add("choice", ask(fact.questions[1]), fact.answer, choices=choices)
    for fact in rng.sample(FACTS, GOLD_ITEMS["chat"]):
        question = fact.questions[0]
        add("chat", question, fact.answer.strip(), messages=chat(question))
    return items


def _wrong_answers(rng: random.Random, fact: Fact) -> list[str]:
    """Return three answers to other questions of the same kind."""
    answers = {other.answer for other in FACTS if other.kind == fact.kind}
    return rng.sample(sorted(answers - {fact.answer}), 3)


def reserved_questions(items: Iterable[dict[str, Any]]) -> frozenset[str]:
    """Return the questions of the gold set that calibration and evaluation text must not ask."""
    questions = set()
    for item in items:
        question = item["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:")
        if "\n" not in question:
            questions.add(question)
    return frozenset(questions)


def documents(
    seed: int, count: int, reserved: frozenset[str], taken: Iterable[str] = ()
) -> list[str]:
    """Return different documents.

    Args:
        seed: Of the draws.
        count: How many documents.
        reserved: Questions that may not be asked.
        taken: Documents that may not be among them.
    """
    rng = random.Random(seed)
    known = set(taken)
    texts: list[str] = []
    while len(texts) < count:
        text = document(rng, reserved=reserved)
        if text not in known:
            known.add(text)
            texts.append(text)
    return texts


def check_disjoint(
    calibration: Iterable[str], evaluation: Iterable[str], gold: Iterable[dict[str, Any]]
) -> None:
    """Check that the texts share no document, and that no gold prompt stands in one of them.

    Raises:
        ValueError: If one does.
    """
    texts = {"calibration": list(calibration), "evaluation": list(evaluation)}
    long_texts = {text for text in texts["calibration"] if len(text) >= SHORTEST_SHARED}
    shared = long_texts & set(texts["evaluation"])
    if shared:
        raise ValueError(
            f"expected different documents, found one in both texts: {min(shared)!r}; draw another"
        )
    prompts = {item["id"]: item["prompt"] for item in gold}
    for name, paragraphs in texts.items():
        text = "\n\n".join(paragraphs)
        for item_id, prompt in prompts.items():
            if prompt in text:
                raise ValueError(
                    f"expected no gold prompt in the {name} text, found {item_id}: {prompt!r}; "
                    "reserve its question"
                )


def _write_lines(name: str, rows: Iterable[Any]) -> None:
    """Write a JSONL file of the data folder."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (DATA / name).write_text("".join(lines), encoding="utf-8")


def _write_paragraphs(name: str, texts: list[str]) -> None:
    """Write a text file of the data folder."""
    (DATA / name).write_text("\n\n".join(texts) + "\n", encoding="utf-8")


def main() -> None:
    """Write the four files."""
    items = gold_items()
    reserved = reserved_questions(items)
    calibration = documents(SEEDS["calibration"], CALIBRATION_DOCUMENTS, reserved)
    evaluation = documents(SEEDS["evaluation"], EVALUATION_DOCUMENTS, reserved, taken=calibration)
    check_disjoint(calibration, evaluation, items)
    rng = random.Random(SEEDS["calibration"])
    free = [fact for fact in FACTS if fact.questions[2] not in reserved]
    facts = rng.choices(free, k=CHAT_DOCUMENTS)
    chats = [{"messages": chat(fact.questions[2], fact.answer)} for fact in facts]
    DATA.mkdir(exist_ok=True)
    _write_paragraphs("calibration.txt", calibration)
    _write_paragraphs("evaluation.txt", evaluation)
    _write_lines("gold.jsonl", items)
    _write_lines("calibration_chat.jsonl", chats)
    counts = f"{len(calibration)} and {len(evaluation)} documents and {len(items)} gold items"
    print(f"wrote {counts} to {DATA}")


if __name__ == "__main__":
    main()
