"""Whether texts overlap: long runs of words that stand in both.

Runs of 13 words are the field's habit for questions that a model may have seen (Brown et al. 2020,
appendix C), and runs of 50 for text that was copied (Lee et al. 2022, section 4.1). Words are
compared in lower case and without punctuation; scripts without spaces have words of one character.
How a letter is encoded (Unicode's NFKC) and where documents are parted makes no difference.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from hashlib import blake2b

import numpy as np

RUN = 13  # words
LONG_RUN = 50  # words: no document has one by chance
SHARE = 0.9  # of a document's words that stand in shared runs
CHANGED = 2  # words: a blank more or less makes two of one
MOST_CANDIDATES = 100  # texts that share a half with one, and are compared with it
BATCH = 1 << 20  # words that are held as text at once
# Han, kana, and scripts of South East Asia: written without spaces.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")
MULTIPLIERS = np.random.default_rng(0).integers(1, 1 << 62, RUN, dtype=np.uint64) * 2 + 1
FACTOR = np.uint64(0x9E3779B97F4A7C15)


class Words:
    """Texts as numbers of words.

    Attributes:
        ids: uint64 [n], of all texts one after the other.
        ends: Where each text ends.
    """

    def __init__(self, ids: np.ndarray, ends: np.ndarray) -> None:
        """Take the numbers."""
        self.ids = ids
        self.ends = ends
        self._runs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def lengths(self) -> np.ndarray:
        """Return the number of words of each text."""
        return np.diff(self.ends, prepend=0)

    def runs(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the runs of so many words within one text.

        Returns:
            Their hashes uint64 [m], and where in `ids` they begin [m].
        """
        if length not in self._runs:
            self._runs[length] = self._find_runs(length)
        return self._runs[length]

    def _find_runs(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        hashes = self.runs_of_all(length)
        # A run that reaches into the next text is none.
        text_ends = np.repeat(self.ends, self.lengths())[: len(hashes)]
        starts = np.flatnonzero(np.arange(len(hashes)) + length <= text_ends)
        return hashes[starts], starts

    def runs_of_all(self, length: int) -> np.ndarray:
        """Return the hash of the run from each word on, of all texts as one: uint64 [m]."""
        count = len(self.ids) - length + 1
        if count < 1:
            return np.empty(0, np.uint64)
        hashes = np.zeros(count, np.uint64)
        for place in range(length):
            mixed = (self.ids[place : place + count] + np.uint64(1)) * MULTIPLIERS[place]
            hashes = (hashes + (mixed ^ (mixed >> np.uint64(29)))) * FACTOR
        return hashes


class Vocabulary:
    """Numbers words, the same word in all texts alike."""

    def __init__(self) -> None:
        """Know no word."""
        self._numbers: dict[str, int] = {}

    def words(self, texts: Iterable[str]) -> Words:
        """Return the words of some texts."""
        parts = [np.empty(0, np.uint64)]
        ends: list[int] = []
        total = 0
        batch: list[str] = []
        for text in texts:
            found = WORD.findall(unicodedata.normalize("NFKC", text).lower())
            batch += found
            total += len(found)
            ends.append(total)
            if len(batch) >= BATCH:
                parts.append(self._number(batch))
                batch = []
        parts.append(self._number(batch))
        return Words(np.concatenate(parts), np.array(ends, np.int64))

    def _number(self, words: list[str]) -> np.ndarray:
        numbers = self._numbers
        for word in dict.fromkeys(words):
            numbers.setdefault(word, len(numbers))
        return np.fromiter(map(numbers.__getitem__, words), np.uint64, len(words))


def shared_runs(words: Words, seen: Words) -> np.ndarray:
    """Return where runs of RUN words begin that stand in other texts too: bool [n]."""
    hashes, starts = words.runs(RUN)
    begins = np.zeros(len(words.ids), bool)
    begins[starts[np.isin(hashes, seen.runs(RUN)[0])]] = True
    return begins


def _per_text(words: Words, flags: np.ndarray) -> np.ndarray:
    """Return how many words of each text have a flag."""
    counts = np.concatenate([[0], np.cumsum(flags)])
    return np.diff(counts[words.ends], prepend=0)


def seen_prompts(prompts: Words, seen: Words) -> set[int]:
    """Return the prompts, by index, of which one run of RUN words stands in the other texts."""
    return set(np.flatnonzero(_per_text(prompts, shared_runs(prompts, seen))).tolist())


def mostly_shared(words: Words, seen: Words) -> set[int]:
    """Return the texts, by index, that stand in other texts, or have long runs from there.

    That is: SHARE of the words lie in shared runs of RUN words, or one run of LONG_RUN is shared.
    """
    begins = shared_runs(words, seen)
    share = _mostly(words, _covered(begins, RUN))
    return set(np.flatnonzero(share | (_per_text(words, _long(begins)) > 0)).tolist())


def joined_copies(words: Words, seen: Words) -> set[int]:
    """Return the texts, by index, that lie in a run of LONG_RUN words that stands in other texts.

    It may go on from one text to the next, here and there: many short texts that follow one another
    have it, and parts of a longer one.
    """
    begins = np.zeros(len(words.ids), bool)
    found = np.isin(words.runs_of_all(RUN), seen.runs_of_all(RUN))
    begins[: len(found)] = found
    return set(np.flatnonzero(_mostly(words, _covered(_long(begins), LONG_RUN))).tolist())


def _mostly(words: Words, flags: np.ndarray) -> np.ndarray:
    """Whether SHARE of the words of each text have a flag."""
    return _per_text(words, flags) >= np.maximum(1, SHARE * words.lengths())


def _covered(begins: np.ndarray, length: int) -> np.ndarray:
    """Return which words lie in runs of a length that begin in some places: bool [n]."""
    changes = np.zeros(len(begins) + length, np.int64)
    changes[: len(begins)] += begins
    changes[length:] -= begins
    return np.cumsum(changes)[: len(begins)] > 0


def _long(begins: np.ndarray) -> np.ndarray:
    """Return where runs of LONG_RUN words begin, of where those of RUN do: bool [n]."""
    # A long run is as many short ones, each a word after the other.
    several = LONG_RUN - RUN + 1
    counts = np.concatenate([[0], np.cumsum(begins)])
    long = np.zeros(len(begins), bool)
    if len(begins) >= several:
        long[: len(begins) - several + 1] = counts[several:] - counts[:-several] == several
    return long


def near_copies(words: Words, seen: Words) -> set[int]:
    """Return the texts, by index, that are another text but for one word in one place.

    Texts of less than two runs have to be the same in every word.
    """
    places: dict[bytes, list[int]] = defaultdict(list)
    for index, text in enumerate(_texts(seen)):
        for key in _halves(text):
            places[key].append(index)
    others = _texts(seen)
    found = set()
    for index, text in enumerate(_texts(words)):
        candidates: set[int] = set()
        for key in _halves(text):
            candidates.update(places.get(key, [])[:MOST_CANDIDATES])
        if any(_is_near(text, others[other]) for other in candidates):
            found.add(index)
    return found


def _texts(words: Words) -> list[np.ndarray]:
    """Return the words of each text."""
    return np.split(words.ids, words.ends[:-1]) if len(words.ends) else []


def _halves(text: np.ndarray) -> list[bytes]:
    """Return keys of a text's halves: two texts that differ in one place share one of them."""
    count = len(text)
    if count < 2 * RUN + 1:
        return [text.tobytes()]
    keys = []
    # The other text may have a word more or less.
    for shorter, longer in ((count - 1, count), (count, count), (count, count + 1)):
        half = (shorter - 1) // 2
        for side, part in enumerate((text[:half], text[-half:])):
            label = f"{shorter} {longer} {side} ".encode()
            keys.append(blake2b(label + part.tobytes(), digest_size=16).digest())
    return keys


def _is_near(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two texts are the same but for a word of the longer one."""
    shortest = min(len(one), len(other))
    longest = max(len(one), len(other))
    first = _common(one[:shortest], other[:shortest])
    last = _common(one[::-1][:shortest], other[::-1][:shortest])
    changed = longest - min(first + last, shortest)
    return changed == 0 or (changed <= CHANGED and shortest >= 2 * RUN)


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """Return how many words two texts of one length begin with alike."""
    differ = np.flatnonzero(one != other)
    return int(differ[0]) if len(differ) else len(one)
