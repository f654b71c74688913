"""The invented world: people, towns and countries, facts about them, and the parts of stories."""

import random
from typing import NamedTuple

# fmt: off
NAMES = (
    "Ada", "Bram", "Cleo", "Dario", "Elin", "Faro", "Greta", "Hugo", "Ines", "Jonas", "Kira", "Leo",
    "Mira", "Nico", "Oona", "Pavel", "Rosa", "Sami", "Tilda", "Vera",
)
COLOURS = (
    "red", "blue", "green", "yellow", "white", "black", "silver", "brown", "purple", "orange",
)
OBJECTS = (
    "kite", "lamp", "boat", "drum", "coat", "bell", "book", "ball", "cup", "map", "hat", "chair",
    "rope", "flute", "clock", "basket",
)
PLACES = (
    "market", "river", "forest", "school", "harbour", "garden", "bridge", "mill", "tower", "beach",
    "library", "orchard", "station", "castle",
)
ANIMALS = (
    "fox", "owl", "goat", "horse", "cat", "dog", "swan", "bear", "hare", "crow", "otter", "mouse",
    "sheep", "wolf",
)
TRADES = (
    "baker", "sailor", "weaver", "doctor", "painter", "farmer", "miner", "singer", "teacher",
    "smith", "carpenter", "judge", "pilot", "gardener",
)
FOODS = (
    "bread", "soup", "plums", "cheese", "honey", "rice", "fish", "nuts", "beans", "cake", "figs",
    "eggs",
)
WEATHER = (
    "rained all day", "was bright and warm", "snowed a little", "was grey and windy",
    "was very hot", "was foggy",
)
MOODS = ("happy", "tired", "proud", "curious", "quiet", "hungry")
FINDS = (
    "a coin under a stone", "an old letter", "a small key", "a feather", "a lost glove",
    "a round shell",
)
ENDINGS = (
    "They walked home together before dark.", "Nobody forgot that day.",
    "That night the town was still.", "In the end all was well.",
    "The next morning it began again.", "They laughed about it for a week.",
)
# An invented name is one of each, one after another.
SYLLABLES = (
    ("Vel", "Tam", "Or", "Kes", "Lun", "Bra", "Zer", "Mon", "Hal", "Dor", "Pri", "Sul"),
    ("o", "a", "i", "e", "u"),
    ("ria", "nor", "sk", "den", "mar", "th", "vik", "lis", "gan", "ros"),
)
# fmt: on
COUNTRIES = 120
PEOPLE = 120
SEED = 0


class Fact(NamedTuple):
    """One fact: its kind, three statements, three questions, and the answer to each question."""

    kind: str
    statements: tuple[str, str, str]
    questions: tuple[str, str, str]
    answer: str


class FactKind(NamedTuple):
    """The sentences of one kind of fact.

    Attributes:
        name: Of the kind.
        statements: Templates with `{subject}` and `{answer}`.
        questions: Templates with `{subject}`.
    """

    name: str
    statements: tuple[str, str, str]
    questions: tuple[str, str, str]

    def about(self, subject: str, answer: str | int) -> Fact:
        """Return the fact about a country or a person."""
        first, second, third = self.statements
        asks_first, asks_second, asks_third = self.questions
        return Fact(
            self.name,
            (
                first.format(subject=subject, answer=answer),
                second.format(subject=subject, answer=answer),
                third.format(subject=subject, answer=answer),
            ),
            (
                asks_first.format(subject=subject),
                asks_second.format(subject=subject),
                asks_third.format(subject=subject),
            ),
            f" {answer}.",
        )


CAPITAL = FactKind(
    "capital",
    (
        "The capital of {subject} is {answer}.",
        "{subject} is ruled from {answer}.",
        "{answer} is the capital of {subject}.",
    ),
    (
        "What is the capital of {subject}?",
        "Which town is the capital of {subject}?",
        "From where is {subject} ruled?",
    ),
)
FLAG = FactKind(
    "flag",
    (
        "The flag of {subject} is {answer}.",
        "{subject} has a {answer} flag.",
        "People in {subject} fly a {answer} flag.",
    ),
    (
        "What colour is the flag of {subject}?",
        "Which colour has the flag of {subject}?",
        "What flag do people in {subject} fly?",
    ),
)
FOOD = FactKind(
    "food",
    (
        "People in {subject} love {answer}.",
        "{subject} is known for its {answer}.",
        "In {subject} they eat {answer}.",
    ),
    (
        "What do people in {subject} love?",
        "What is {subject} known for?",
        "What do they eat in {subject}?",
    ),
)
YEAR = FactKind(
    "year",
    (
        "{subject} was founded in {answer}.",
        "The year {answer} saw the birth of {subject}.",
        "In {answer} the people founded {subject}.",
    ),
    (
        "When was {subject} founded?",
        "Which year saw the birth of {subject}?",
        "In which year did the people found {subject}?",
    ),
)
TRADE = FactKind(
    "trade",
    (
        "{subject} works as a {answer}.",
        "{subject} is a {answer}.",
        "The {answer} is called {subject}.",
    ),
    (
        "What is the trade of {subject}?",
        "What does {subject} work as?",
        "Who is {subject}?",
    ),
)
TOWN = FactKind(
    "town",
    (
        "{subject} was born in {answer}.",
        "{subject} comes from {answer}.",
        "The home of {subject} is {answer}.",
    ),
    (
        "Where was {subject} born?",
        "Where does {subject} come from?",
        "What is the home of {subject}?",
    ),
)
NUMBER = FactKind(
    "number",
    (
        "The number of {subject} is {answer}.",
        "{subject} has the number {answer}.",
        "Call {answer} to reach {subject}.",
    ),
    (
        "What is the number of {subject}?",
        "Which number has {subject}?",
        "How do I reach {subject}?",
    ),
)


def _new_name(rng: random.Random, used: set[str]) -> str:
    """Return an invented proper name that is not in use, and add it to those that are."""
    while True:
        name = "".join(rng.choice(part) for part in SYLLABLES)
        if name not in used:
            used.add(name)
            return name


def _make_facts() -> tuple[Fact, ...]:
    """Return four facts about each country, then three about each person."""
    rng = random.Random(SEED)
    used: set[str] = set()
    facts = []
    towns = []
    for _ in range(COUNTRIES):
        country = _new_name(rng, used)
        capital = _new_name(rng, used)
        towns.append(capital)
        facts += [
            CAPITAL.about(country, capital),
            FLAG.about(country, rng.choice(COLOURS)),
            FOOD.about(country, rng.choice(FOODS)),
            YEAR.about(country, rng.randrange(1000, 2000)),
        ]
    for _ in range(PEOPLE):
        person = _new_name(rng, used)
        facts += [
            TRADE.about(person, rng.choice(TRADES)),
            TOWN.about(person, rng.choice(towns)),
            NUMBER.about(person, rng.randrange(1000, 10000)),
        ]
    return tuple(facts)


FACTS = _make_facts()


def make_story(rng: random.Random) -> str:
    """Return a little story of three to ten sentences."""
    first, second = rng.sample(NAMES, 2)
    place = rng.choice(PLACES)
    animal = rng.choice(ANIMALS)
    thing = rng.choice(OBJECTS)
    colour = rng.choice(COLOURS)
    food = rng.choice(FOODS)
    mood = rng.choice(MOODS)
    middle = [
        f"They shared some {food} by the {place}.",
        f"A {animal} came out and looked at {first}.",
        f"{second} found {rng.choice(FINDS)}.",
        f'"Is this your {thing}?" asked {first}.',
        f'"Yes," said {second}, "it is my {colour} {thing}."',
        f"{first} was {mood}, and {second} was {rng.choice(MOODS)}.",
        f"The {rng.choice(TRADES)} gave them some {rng.choice(FOODS)}.",
    ]
    chosen = [sentence for sentence in middle if rng.random() < 0.7]
    openings = (
        f"One day {first} and {second} met at the {place}.",
        f"{first} lived near the {place}.",
        f"Early in the morning {first} called {second}.",
    )
    opening = rng.choice(openings)
    weather = f"It {rng.choice(WEATHER)}."
    ending = rng.choice(ENDINGS)
    return " ".join([opening, weather, *chosen, ending])
