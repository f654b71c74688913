"""The invented world: its people, towns and countries, the facts about them, and the parts that stories are made of."""

import random
from typing import NamedTuple

NAMES = ("Ada", "Bram", "Cleo", "Dario", "Elin", "Faro", "Greta", "Hugo", "Ines", "Jonas", "Kira", "Leo", "Mira", "Nico",
         "Oona", "Pavel", "Rosa", "Sami", "Tilda", "Vera")
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "silver", "brown", "purple", "orange")
OBJECTS = ("kite", "lamp", "boat", "drum", "coat", "bell", "book", "ball", "cup", "map", "hat", "chair", "rope", "flute",
           "clock", "basket")
PLACES = ("market", "river", "forest", "school", "harbour", "garden", "bridge", "mill", "tower", "beach", "library",
          "orchard", "station", "castle")
ANIMALS = ("fox", "owl", "goat", "horse", "cat", "dog", "swan", "bear", "hare", "crow", "otter", "mouse", "sheep", "wolf")
TRADES = ("baker", "sailor", "weaver", "doctor", "painter", "farmer", "miner", "singer", "teacher", "smith", "carpenter",
          "judge", "pilot", "gardener")
FOODS = ("bread", "soup", "plums", "cheese", "honey", "rice", "fish", "nuts", "beans", "cake", "figs", "eggs")
WEATHER = ("rained all day", "was bright and warm", "snowed a little", "was grey and windy", "was very hot", "was foggy")
MOODS = ("happy", "tired", "proud", "curious", "quiet", "hungry")
FINDS = ("a coin under a stone", "an old letter", "a small key", "a feather", "a lost glove", "a round shell")
ENDINGS = ("They walked home together before dark.", "Nobody forgot that day.", "That night the town was still.",
           "In the end all was well.", "The next morning it began again.", "They laughed about it for a week.")
SYLLABLES = (("Vel", "Tam", "Or", "Kes", "Lun", "Bra", "Zer", "Mon", "Hal", "Dor", "Pri", "Sul"),
             ("o", "a", "i", "e", "u"), ("ria", "nor", "sk", "den", "mar", "th", "vik", "lis", "gan", "ros"))
COUNTRIES, PEOPLE = 120, 120


class Fact(NamedTuple):
    """One fact: its kind, three statements, three questions, and the answer that ends each question."""

    kind: str
    statements: tuple[str, str, str]
    questions: tuple[str, str, str]
    answer: str


def _new_name(rng: random.Random, used: set[str]) -> str:
    """An invented proper name that was not given out before."""
    while (name := "".join(rng.choice(part) for part in SYLLABLES)) in used:
        pass
    used.add(name)
    return name


def _facts() -> tuple[Fact, ...]:
    rng, used = random.Random(0), set()
    facts = []
    towns = []
    for _ in range(COUNTRIES):
        country, capital = _new_name(rng, used), _new_name(rng, used)
        towns.append(capital)
        colour, food, year = rng.choice(COLOURS), rng.choice(FOODS), rng.randrange(1000, 2000)
        facts.append(Fact(
            "capital",
            (f"The capital of {country} is {capital}.", f"{country} is ruled from {capital}.",
             f"{capital} is the capital of {country}."),
            (f"What is the capital of {country}?", f"Which town is the capital of {country}?",
             f"From where is {country} ruled?"), f" {capital}."))
        facts.append(Fact(
            "flag",
            (f"The flag of {country} is {colour}.", f"{country} has a {colour} flag.",
             f"People in {country} fly a {colour} flag."),
            (f"What colour is the flag of {country}?", f"Which colour has the flag of {country}?",
             f"What flag do people in {country} fly?"), f" {colour}."))
        facts.append(Fact(
            "food",
            (f"People in {country} love {food}.", f"{country} is known for its {food}.",
             f"In {country} they eat {food}."),
            (f"What do people in {country} love?", f"What is {country} known for?",
             f"What do they eat in {country}?"), f" {food}."))
        facts.append(Fact(
            "year",
            (f"{country} was founded in {year}.", f"The year {year} saw the birth of {country}.",
             f"In {year} the people founded {country}."),
            (f"When was {country} founded?", f"Which year saw the birth of {country}?",
             f"In which year did the people found {country}?"), f" {year}."))
    for _ in range(PEOPLE):
        person, trade, town = _new_name(rng, used), rng.choice(TRADES), rng.choice(towns)
        number = rng.randrange(1000, 10000)
        facts.append(Fact(
            "trade",
            (f"{person} works as a {trade}.", f"{person} is a {trade}.", f"The {trade} is called {person}."),
            (f"What is the trade of {person}?", f"What does {person} work as?", f"Who is {person}?"), f" {trade}."))
        facts.append(Fact(
            "town",
            (f"{person} was born in {town}.", f"{person} comes from {town}.", f"The home of {person} is {town}."),
            (f"Where was {person} born?", f"Where does {person} come from?", f"What is the home of {person}?"),
            f" {town}."))
        facts.append(Fact(
            "number",
            (f"The number of {person} is {number}.", f"{person} has the number {number}.",
             f"Call {number} to reach {person}."),
            (f"What is the number of {person}?", f"Which number has {person}?", f"How do I reach {person}?"),
            f" {number}."))
    return tuple(facts)


FACTS = _facts()


def story(rng: random.Random) -> str:
    """A little story of seven to nine sentences."""
    one, two = rng.sample(NAMES, 2)
    place, animal, thing = rng.choice(PLACES), rng.choice(ANIMALS), rng.choice(OBJECTS)
    colour, food, mood = rng.choice(COLOURS), rng.choice(FOODS), rng.choice(MOODS)
    middle = [
        f"They shared some {food} by the {place}.",
        f"A {animal} came out and looked at {one}.",
        f"{two} found {rng.choice(FINDS)}.",
        f'"Is this your {thing}?" asked {one}.',
        f'"Yes," said {two}, "it is my {colour} {thing}."',
        f"{one} was {mood}, and {two} was {rng.choice(MOODS)}.",
        f"The {rng.choice(TRADES)} gave them some {rng.choice(FOODS)}.",
    ]
    chosen = [sentence for sentence in middle if rng.random() < 0.7]
    opening = rng.choice((f"One day {one} and {two} met at the {place}.", f"{one} lived near the {place}.",
                          f"Early in the morning {one} called {two}."))
    return " ".join([opening, f"It {rng.choice(WEATHER)}.", *chosen, rng.choice(ENDINGS)])
