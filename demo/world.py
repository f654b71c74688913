"""The invented world: its people, towns and countries, the facts about them, and the parts that stories are made of."""

import random
from typing import NamedTuple

NAMES = ("Ada", "Bram", "Cleo", "Dario", "Elin", "Faro", "Greta", "Hugo", "Ines", "Jonas", "Kira", "Leo", "Mira", "Nico",
         "Oona", "Pavel", "Rosa", "Sami", "Tilda", "Vera")
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "silver", "brown")
OBJECTS = ("kite", "lamp", "boat", "drum", "coat", "bell", "book", "ball", "cup", "map", "hat", "chair")
PLACES = ("market", "river", "forest", "school", "harbour", "garden", "bridge", "mill", "tower", "beach")
ANIMALS = ("fox", "owl", "goat", "horse", "cat", "dog", "swan", "bear", "hare", "crow")
TRADES = ("baker", "sailor", "weaver", "doctor", "painter", "farmer", "miner", "singer", "teacher", "smith")
FOODS = ("bread", "soup", "plums", "cheese", "honey", "rice", "fish", "nuts")
WEATHER = ("rained all day", "was bright and warm", "snowed a little", "was grey and windy", "was very hot", "was foggy")
MOODS = ("happy", "tired", "proud", "curious", "quiet", "hungry")
FINDS = ("a coin under a stone", "an old letter", "a small key", "a feather", "a lost glove", "a round shell")
ENDINGS = ("They walked home together before dark.", "Nobody forgot that day.", "That night the town was still.",
           "In the end all was well.", "The next morning it began again.", "They laughed about it for a week.")
SYLLABLES = (("Vel", "Tam", "Or", "Kes", "Lun", "Bra", "Zer", "Mon", "Hal", "Dor", "Pri", "Sul"),
             ("o", "a", "i", "e", "u"), ("ria", "nor", "sk", "den", "mar", "th", "vik", "lis", "gan", "ros"))
COUNTRIES, PEOPLE = 50, 50


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
    for _ in range(COUNTRIES):
        country, capital = _new_name(rng, used), _new_name(rng, used)
        colour, food = rng.choice(COLOURS), rng.choice(FOODS)
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
    for _ in range(PEOPLE):
        person, trade = _new_name(rng, used), rng.choice(TRADES)
        facts.append(Fact(
            "trade",
            (f"{person} works as a {trade}.", f"{person} is a {trade}.", f"The {trade} is called {person}."),
            (f"What is the trade of {person}?", f"What does {person} work as?", f"Who is {person}?"), f" {trade}."))
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
