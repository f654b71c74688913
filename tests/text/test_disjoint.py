"""Texts that share documents, copies but for a character, or questions; and what is no overlap."""

import random
import unicodedata

import pytest

from quantline.errors import Failure, StageError
from quantline.text.disjoint import check_disjoint
from quantline.text.documents import Document
from tests.helpers.models import sentences

CALIBRATION: list[Document] = [*sentences(1, 40)]
EVALUATION: list[Document] = [*sentences(2, 30)]
DOCUMENT = sentences(1, 40)[7]
QUESTION = "Which of the two towers that stand by the old river did Ada see first in the morning?"
CHINESE = "中国的首都是哪里，它有多少人口，从什么时候开始成为首都？"


def replaced(text: str, place: int, letter: str) -> str:
    return text[:place] + letter + text[place + 1 :]


def refuse(calibration, evaluation, prompts, **options) -> str:
    """Check that an overlap is refused and return the message."""
    with pytest.raises(StageError) as error:
        check_disjoint(calibration, evaluation, prompts, **options)
    assert error.value.failure == Failure.TEXTS_OVERLAP
    return str(error.value)


@pytest.mark.parametrize(
    "copy",
    [
        DOCUMENT,
        DOCUMENT.upper() + "!",
        DOCUMENT.replace(" ", "\n"),
        DOCUMENT.replace(" ", "  ", 1),
        DOCUMENT + " and some more",
        " ".join(DOCUMENT.split()[4:]),
        [{"role": "user", "content": DOCUMENT}],
    ],
)
def test_check_disjoint_refuses_a_document_of_both_texts(copy):
    message = refuse(CALIBRATION, [*EVALUATION, copy], {})
    assert "1 of the evaluation text stand in the calibration text" in message
    assert "document-31 " in message


def test_check_disjoint_refuses_a_copy_that_differs_in_any_one_character():
    for place in range(0, len(DOCUMENT), 3):
        for copy in (replaced(DOCUMENT, place, "q"), replaced(DOCUMENT, place, " ")):
            assert "document-1 " in refuse(CALIBRATION, [copy], {})


def test_check_disjoint_refuses_fifty_words_in_a_row():
    calibration = " ".join(random.Random(3).choices(sentences(4, 9), k=4))
    words = calibration.split()[5:55]
    others = sentences(5, 6)
    message = refuse([calibration], [" ".join([*others[:3], *words, *others[3:]])], {})
    assert "50 words in a row" in message
    check_disjoint([calibration], [" ".join([*others[:3], *words[:30], *others[3:]])], {})


@pytest.mark.parametrize("question", [QUESTION, CHINESE])
def test_check_disjoint_refuses_a_prompt_with_a_long_run_of_the_calibration_text(question):
    prompts = {"g-1": "Who?", "g-2": f"Answer in one word. {question}\nAnswer:"}
    text = f"It was late. {question.upper()} Nobody knew."
    message = refuse([*CALIBRATION, text], EVALUATION, prompts)
    assert "1 are gold items whose prompt has 13 words in a row from the calibration" in message
    assert ": g-2 (" in message and "g-1" not in message
    message = refuse(CALIBRATION, [*EVALUATION, text], {"g-3": question})
    assert "prompt stands in the evaluation text: g-3 " in message


def test_check_disjoint_takes_short_coincidences():
    common = "who met hugo by the river then?"
    calibration = [*CALIBRATION, f"And so {common} Nobody.", "Yes. " * 12, "All rights reserved."]
    evaluation = [*EVALUATION, "Yes. " * 12, "All rights reserved.", "", "42"]
    assert check_disjoint(calibration, evaluation, {"g-1": common, "g-2": ""}) == []
    assert check_disjoint([], [], {}) == []


def test_check_disjoint_lists_all_offenders_and_takes_those_that_are_allowed():
    copies = [replaced(str(text), 5, "q") for text in CALIBRATION[:12]]
    evaluation = [*EVALUATION, *copies]
    prompts = {"g-1": str(CALIBRATION[20]), "g-2": "a question"}
    message = refuse(CALIBRATION, evaluation, prompts)
    offenders = [f"document-{number}" for number in range(31, 43)]
    assert "found 13 overlaps" in message
    assert ", ".join(offenders) + " (such as" in message
    assert ": g-1 (" in message
    assert "evaluation.allow_overlap=[document-31,document-32,document-33,…]" in message

    assert "found 1 overlaps" in refuse(CALIBRATION, evaluation, prompts, allowed=offenders)
    everything = sorted([*offenders, "g-1"])
    assert check_disjoint(CALIBRATION, evaluation, prompts, [*offenders, "g-1"]) == everything
    assert check_disjoint(CALIBRATION, evaluation, prompts, True) == everything


@pytest.mark.parametrize("name", ["g-2", "document-0", "document-31", "document-x", "document-"])
def test_check_disjoint_refuses_an_allowed_id_that_is_none(name):
    with pytest.raises(StageError, match=f"found {name};") as error:
        check_disjoint(CALIBRATION, EVALUATION, {"g-1": "who?"}, ["g-1", "document-30", name])
    assert error.value.failure == Failure.CONFIG_INVALID


def short_lines(seed: int, count: int = 200) -> list[Document]:
    """Return lines of eight words, each too short to count by itself."""
    words = [word for text in sentences(seed, 60) for word in text.split()]
    drawn = random.Random(seed).choices(words, k=8 * count)
    return [" ".join(drawn[8 * number : 8 * number + 8]) for number in range(count)]


LINES = short_lines(11)


@pytest.mark.parametrize(
    ("calibration", "evaluation"),
    [
        (LINES, LINES),
        (["\n".join(map(str, LINES))], LINES),
        (LINES, ["\n".join(map(str, LINES))]),
        (LINES, LINES[:40:2] + short_lines(12, 150)),
    ],
    ids=["the same file", "parted into lines", "joined", "some of many"],
)
def test_check_disjoint_refuses_many_short_documents_of_both_texts(calibration, evaluation):
    assert "document-1" in refuse(calibration, evaluation, {})


def test_check_disjoint_takes_a_few_short_documents_of_both_texts():
    check_disjoint(LINES, [*LINES[:30:10], *short_lines(12)], {})


def test_check_disjoint_refuses_questions_that_are_the_calibration_text():
    prompts = {f"g-{number}": str(line) for number, line in enumerate(LINES[:20])}
    assert "20 are gold items" in refuse(LINES, EVALUATION, prompts)
    check_disjoint(
        LINES,
        EVALUATION,
        {**{f"e-{n}": text for n, text in enumerate(sentences(8, 9))}, "g": str(LINES[0])},
    )


def test_check_disjoint_refuses_a_copy_in_another_encoding_of_its_letters():
    accented = DOCUMENT.replace("e", "é")
    wide = "".join(chr(ord(one) + 0xFEE0) if one.isalnum() else one for one in DOCUMENT)
    for original, copy in ((accented, unicodedata.normalize("NFD", accented)), (DOCUMENT, wide)):
        refuse([original], [*EVALUATION, copy], {})
