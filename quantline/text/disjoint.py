"""The check that what is calibrated on, evaluated on and asked share nothing."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

from quantline.errors import Failure, StageError
from quantline.text.documents import Document, plain_text
from quantline.text.overlap import (
    LONG_RUN,
    RUN,
    Vocabulary,
    Words,
    joined_copies,
    mostly_shared,
    near_copies,
    seen_prompts,
)

SHORTEST = 100  # characters: a shorter document can well stand in two texts by chance
MANY = 0.1  # of all words that stand in such documents: so many do not by chance
SHOWN = 200  # ids in one message
QUOTED = 3  # documents in one message
DOCUMENT = "document-"  # before a document's number in its id

Allowed = bool | Collection[str]


class Overlap(NamedTuple):
    """Documents or questions that stand in another text.

    Attributes:
        what: In a sentence that ends before the ids.
        ids: Of gold items, or "document-<number>" of documents of the evaluation text.
        beginnings: Of some of them.
    """

    what: str
    ids: list[str]
    beginnings: list[str]


def find_overlaps(
    calibration: list[Document], evaluation: list[Document], prompts: Mapping[str, str]
) -> list[Overlap]:
    """Return what the texts share.

    A document of the evaluation text overlaps with the calibration text if nine tenths of its words
    stand there in runs of 13, if one run of 50 words does, or if it is a document there but for one
    word. Documents of less than 100 characters count if they lie in one run of 50 words with those
    beside them, or if those that stand in both have a tenth of all words. A gold prompt overlaps
    with the calibration text if one run of 13 words stands there, or if it is one of so many that
    are documents there, and with the evaluation text if it overlaps like a document.

    Args:
        calibration: Documents that were calibrated on.
        evaluation: Documents to evaluate on.
        prompts: Id of a gold item → its prompt.
    """
    vocabulary = Vocabulary()
    calibrated = vocabulary.words(map(plain_text, calibration))
    texts = [plain_text(document) for document in evaluation]
    evaluated = vocabulary.words(texts)
    asked = vocabulary.words(prompts.values())
    ids = list(prompts)

    copies = near_copies(evaluated, calibrated)
    shared = {
        index
        for index in mostly_shared(evaluated, calibrated) | copies
        if len(texts[index]) >= SHORTEST
    }
    shared |= joined_copies(evaluated, calibrated) | _if_many(copies, evaluated)
    documents = sorted(shared)
    repeated = _if_many(near_copies(asked, calibrated), asked)
    seen = sorted(seen_prompts(asked, calibrated) | repeated)
    measured = sorted(mostly_shared(asked, evaluated))
    found = [
        Overlap(
            "of the evaluation text stand in the calibration text, are copies but for a word, or "
            f"have {LONG_RUN} words in a row from there",
            [f"{DOCUMENT}{index + 1}" for index in documents],
            [texts[index] for index in documents],
        ),
        Overlap(
            f"are gold items whose prompt has {RUN} words in a row from the calibration text, or "
            "is a document there",
            [ids[index] for index in seen],
            [prompts[ids[index]] for index in seen],
        ),
        Overlap(
            "are gold items whose prompt stands in the evaluation text",
            [ids[index] for index in measured],
            [prompts[ids[index]] for index in measured],
        ),
    ]
    return [overlap for overlap in found if overlap.ids]


def _if_many(found: set[int], words: Words) -> set[int]:
    """Return the texts that were found if they have many of all words, else none."""
    lengths = words.lengths()
    return found if lengths[sorted(found)].sum() >= MANY * max(1, lengths.sum()) else set()


def check_disjoint(
    calibration: list[Document],
    evaluation: list[Document],
    prompts: Mapping[str, str],
    allowed: Allowed = False,
) -> list[str]:
    """Check that the texts share nothing, so far as it is not allowed (see `find_overlaps`).

    Args:
        calibration: Documents that were calibrated on.
        evaluation: Documents to evaluate on.
        prompts: Id of a gold item → its prompt.
        allowed: Ids that may overlap; True for all.

    Returns:
        The ids that overlap and are allowed.

    Raises:
        StageError: texts_overlap, with all that is not allowed; config_invalid, for an allowed id
            that is none.
    """
    check_allowed(allowed, len(evaluation), prompts)
    overlaps = find_overlaps(calibration, evaluation, prompts)
    taken: list[str] = []
    lines = []
    offenders: list[str] = []
    for overlap in overlaps:
        if allowed is True:
            rest: list[str] = []
        else:
            rest = [name for name in overlap.ids if name not in (allowed or ())]
        taken += [name for name in overlap.ids if name not in rest]
        if not rest:
            continue
        offenders += rest
        beginnings = dict(zip(overlap.ids, overlap.beginnings, strict=True))
        quotes = ", ".join(repr(beginnings[name][:60]) for name in rest[:QUOTED])
        lines.append(f"  {len(rest)} {overlap.what}: {_named(rest)} (such as {quotes})")
    if lines:
        names = ",".join(offenders[:QUOTED]) + (",…" if len(offenders) > QUOTED else "")
        raise StageError(
            Failure.TEXTS_OVERLAP,
            f"expected calibration, evaluation and gold texts to share nothing, found "
            f"{len(offenders)} overlaps:\n" + "\n".join(lines) + "\nchoose other texts or other "
            f"parts of them, or allow it: evaluation.allow_overlap=[{names}], or true",
        )
    return sorted(set(taken))


def check_allowed(allowed: Allowed, documents: int, prompts: Collection[str]) -> None:
    """Check that the ids that may overlap exist.

    Args:
        allowed: The ids.
        documents: How many documents the evaluation text has.
        prompts: Ids of the gold items.

    Raises:
        StageError: config_invalid.
    """
    if isinstance(allowed, bool):
        return
    unknown = []
    for name in allowed:
        number = name.removeprefix(DOCUMENT)
        is_document = name != number and number.isdecimal() and 1 <= int(number) <= documents
        if name not in prompts and not is_document:
            unknown.append(name)
    if unknown:
        raise StageError(
            Failure.CONFIG_INVALID,
            "expected ids of gold items, or document-1 and so on of the evaluation text, in "
            f"evaluation.allow_overlap, found {_named(unknown)}; take them out",
        )


def _named(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
