"""Write the demo texts: an invented world of facts, short reading texts, small sums and little stories.

    python -m demo.corpus          # writes demo/data/{calibration.txt,calibration_chat.jsonl,evaluation.txt,gold.jsonl}

Everything comes from seeded generators of its own, so the same code writes the same bytes. Training documents are
made on the fly by `training_documents` and are not kept. A document is one paragraph; paragraphs are separated by a
blank line in the text files.
"""

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from demo.world import ANIMALS, COLOURS, FACTS, NAMES, OBJECTS, PLACES, Fact, story

DATA = Path(__file__).parent / "data"
SEEDS = {"training": 1, "calibration": 2, "evaluation": 3, "gold": 4}
CALIBRATION_DOCUMENTS, EVALUATION_DOCUMENTS, CHAT_DOCUMENTS = 2000, 2000, 200
SHORTEST_SHARED = 80  # characters: below this, two texts may well share a sentence by chance
LARGEST_OPERAND = 20
KINDS = ("fact", "fact question", "reading", "sum", "story", "chat")
Mixture = tuple[int, ...]  # relative shares of the kinds
EVEN: Mixture = (14, 20, 18, 16, 12, 20)
READING: Mixture = (6, 10, 60, 10, 6, 8)


def ask(question: str, answer: str = "") -> str:
    """A question in the form that training, gold set and the raw prompt share."""
    return f"Question: {question}\nAnswer:{answer}"


def sums() -> list[tuple[str, str]]:
    """Every small sum: ("7 + 5", " 12.") and ("7 - 5", " 2.")."""
    numbers = range(LARGEST_OPERAND + 1)
    plus = [(f"{a} + {b}", f" {a + b}.") for a in numbers for b in numbers]
    return plus + [(f"{a} - {b}", f" {a - b}.") for a in numbers for b in numbers if a >= b]


def reading(rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
    """A short text about one person, and the questions that it answers, each with its answer."""
    name, colour, thing = rng.choice(NAMES), rng.choice(COLOURS), rng.choice(OBJECTS)
    place, animal = rng.choice(PLACES), rng.choice(ANIMALS)
    pairs = [(f"Where did {name} go?", f" {name} went to the {place}."),
             (f"Which animal did {name} see?", f" {name} saw a {animal}."),
             (f"What did {name} have?", f" {name} had a {colour} {thing}.")]
    rng.shuffle(pairs)
    text = "".join(sentence for _, sentence in pairs).strip()
    rng.shuffle(pairs)
    return text, pairs


def chat(question: str, answer: str = "") -> list[dict[str, str]]:
    """One question and, unless it is still to be given, its answer as chat messages."""
    turns = [{"role": "user", "content": question}]
    return turns + [{"role": "assistant", "content": answer.strip()}] if answer else turns


def render(messages: list[dict[str, str]], generation_prompt: bool = False) -> str:
    """The chat template of the demo tokenizer (ChatML), written out."""
    text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in messages)
    return text + ("<|im_start|>assistant\n" if generation_prompt else "")


def document(rng: random.Random, mixture: Mixture = EVEN, reserved: frozenset[str] = frozenset()) -> str:
    """One document of a mixture; questions in `reserved` are not asked in it."""
    kind = rng.choices(KINDS, mixture)[0]
    if kind == "story":
        return story(rng)
    if kind == "fact":
        return " ".join(rng.choice(fact.statements) for fact in rng.sample(FACTS, 4))
    if kind == "reading":
        text, pairs = reading(rng)
        return "\n".join([text, *(ask(question, answer) for question, answer in pairs)])
    if kind == "fact question":
        pairs = [(rng.choice(fact.questions), fact.answer) for fact in rng.sample(FACTS, 3)]
    elif kind == "sum":
        pairs = [(f"What is {left}?", answer) for left, answer in rng.sample(sums(), 4)]
    else:
        fact = rng.choice(FACTS)
        left, answer = rng.choice(sums())
        pairs = [rng.choices([(rng.choice(fact.questions), fact.answer), (f"What is {left}?", answer)], (4, 1))[0]]
    pairs = [(question, answer) for question, answer in pairs if question not in reserved]
    if not pairs:
        return story(rng)
    if kind == "chat":
        return render(chat(*pairs[0])).strip()
    return "\n".join(ask(question, answer) for question, answer in pairs)


def training_documents(mixture: Mixture = EVEN, seed: int = SEEDS["training"]) -> Iterator[str]:
    """Endless training documents. The reading texts of the gold set are new ones, met in no training document."""
    rng = random.Random(seed)
    held_out = {item["prompt"].partition("\n")[0] for item in gold_items() if item["task"] == "reading"}
    while True:
        text = document(rng, mixture)
        if text.partition("\n")[0] not in held_out:
            yield text


def gold_items() -> list[dict]:
    """The gold set: 480 items in five tasks; an answer is short, determined, and ends with a full stop."""
    rng = random.Random(SEEDS["gold"])
    items: list[dict] = []

    def add(task: str, prompt: str, answer: str, **more) -> None:
        number = sum(item["task"] == task for item in items) + 1
        items.append({"id": f"{task}-{number:03d}", "task": task, "prompt": prompt, "answer": answer, **more})

    def wrong(fact: Fact) -> list[str]:
        others = sorted({other.answer for other in FACTS if other.kind == fact.kind} - {fact.answer})
        return rng.sample(others, 3)

    for fact in rng.sample(FACTS, 120):
        add("facts", ask(fact.questions[0]), fact.answer)
    for left, answer in rng.sample(sums(), 120):
        add("arithmetic", ask(f"What is {left}?"), answer)
    seen: set[str] = set()
    while len(seen) < 100:
        text, pairs = reading(rng)
        question, answer = pairs[0]
        prompt = text + "\n" + ask(question)
        if prompt not in seen:
            seen.add(prompt)
            add("reading", prompt, answer)
    for fact in rng.sample(FACTS, 80):
        add("choice", ask(fact.questions[1]), fact.answer, choices=sorted([fact.answer, *wrong(fact)]))
    for fact in rng.sample(FACTS, 60):
        answer = fact.answer.strip()
        add("chat", fact.questions[0], answer, messages=chat(fact.questions[0]))
    return items


def reserved_questions(items: Iterable[dict]) -> frozenset[str]:
    """Questions of the gold set that the calibration and evaluation texts must not ask."""
    bare = (item["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:") for item in items)
    return frozenset(question for question in bare if "\n" not in question)


def documents(seed: int, count: int, reserved: frozenset[str], taken: Iterable[str] = ()) -> list[str]:
    """`count` different documents that are not in `taken` and ask no reserved question."""
    rng, known, made = random.Random(seed), set(taken), []
    while len(made) < count:
        text = document(rng, reserved=reserved)
        if text not in known:
            known.add(text)
            made.append(text)
    return made


def check_disjoint(calibration: Iterable[str], evaluation: Iterable[str], gold: Iterable[dict]) -> None:
    """Raise ValueError if a document is in both texts or a gold prompt stands in one of them."""
    calibration, evaluation = list(calibration), list(evaluation)
    shared = {text for text in calibration if len(text) >= SHORTEST_SHARED} & set(evaluation)
    if shared:
        raise ValueError(f"expected different documents, found one in both texts: {min(shared)!r}; draw another")
    for name, text in (("calibration", "\n\n".join(calibration)), ("evaluation", "\n\n".join(evaluation))):
        for item in gold:
            if item["prompt"] in text:
                raise ValueError(f"expected no gold prompt in the {name} text, found {item['id']}: "
                                 f"{item['prompt']!r}; reserve its question")


def main() -> None:
    items = gold_items()
    reserved = reserved_questions(items)
    calibration = documents(SEEDS["calibration"], CALIBRATION_DOCUMENTS, reserved)
    evaluation = documents(SEEDS["evaluation"], EVALUATION_DOCUMENTS, reserved, taken=calibration)
    check_disjoint(calibration, evaluation, items)
    rng = random.Random(SEEDS["calibration"])
    free = [fact for fact in FACTS if fact.questions[2] not in reserved]
    chats = [chat(fact.questions[2], fact.answer) for fact in rng.choices(free, k=CHAT_DOCUMENTS)]
    DATA.mkdir(exist_ok=True)
    (DATA / "calibration.txt").write_text("\n\n".join(calibration) + "\n", encoding="utf-8")
    (DATA / "evaluation.txt").write_text("\n\n".join(evaluation) + "\n", encoding="utf-8")
    for name, rows in (("gold.jsonl", items), ("calibration_chat.jsonl", [{"messages": turns} for turns in chats])):
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        (DATA / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    print(f"wrote {len(calibration)} and {len(evaluation)} documents and {len(items)} gold items to {DATA}")


if __name__ == "__main__":
    main()
