"""Files that the pages name are there, and pages that everyone sees are short."""

import re

import pytest

from tests.helpers.docs import PAGES
from tests.helpers.project import ROOT

LINK = re.compile(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)")
NAMED_PATH = re.compile(
    r"`((?:conf|quantline|stages|tests|docs|benchmarks|demo|\.github)/[\w./-]*)`"
)
MADE_ON_USE = {"conf/experiment/mine.yaml", "conf/model/mine.yaml", "docs/_build/html/index.html"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files(page):
    targets = [target for target in LINK.findall(page.read_text()) if "://" not in target]
    for target in targets:
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_paths_exist(page):
    for path in NAMED_PATH.findall(page.read_text()):
        assert path in MADE_ON_USE or (ROOT / path).exists(), path


def test_some_pages_name_paths_and_link():
    text = "\n".join(page.read_text() for page in PAGES)
    assert len(NAMED_PATH.findall(text)) > 20
    assert len(LINK.findall(text)) > 40


def test_readme_is_short_and_its_first_screen_says_how_to_start():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    first_screen = "\n".join(lines[:30])
    assert all(words in first_screen for words in ("git clone", "make repro", "make test"))
    assert re.search(r"!\[[^\]]+\]\(docs/images/[\w.-]+\)", first_screen)


def test_images_are_small():
    images = [path for path in (ROOT / "docs/images").iterdir() if path.suffix != ".svg"]
    assert images and all(path.stat().st_size < 300_000 for path in images)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_word_is_lost_as_html(page):
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    prose = re.sub(r"`[^`]*`", "", prose)
    assert not re.findall(r"<[a-z][^>]*>", prose)


@pytest.mark.parametrize(
    "group", ["model", "calibration", "evaluation", "suite", "target", "tracking"]
)
def test_configuration_names_every_choice_of_a_group(group):
    text = (ROOT / "docs/configuration.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith(f"| `{group}` |"))
    choices = {path.stem for path in (ROOT / "conf" / group).glob("[!_]*.yaml")}
    named = set(re.findall(r"`([\w.-]+)`", row)) - {group}
    assert named and named <= choices
    if group != "model":  # whose page says "or a named one"
        assert named == choices
