"""Every command in the documentation and in the workflows is one that exists."""

import re
import shutil
from itertools import pairwise

import pytest
import typer

from quantline.cli import app
from quantline.cli.grid import grid_options
from quantline.config.compose import compose
from quantline.config.grid import write_grid
from quantline.sweeps.plan import make_plan
from quantline.sweeps.space import read_space
from quantline.sweeps.study import first_choices
from tests.helpers.docs import PAGES, commands_called
from tests.helpers.project import ROOT

GROUP = typer.main.get_command(app)
QUANTLINE = commands_called("quantline")
COMPOSING = ("compose", "repro", "pick")
SUITES_OF_GRID = {"sweep", "k-quants"}  # that a call of `quantline grid` in the pages makes
MAKEFILE = (ROOT / "Makefile").read_text()


def first_value(override: str) -> str:
    """Return the first experiment of an override with several values: x=3,4 → x=3."""
    return override if "[" in override or "{" in override else override.partition(",")[0]


def test_pages_call_each_command_of_quantline():
    assert {page.name for page in PAGES} >= {"README.md", "CONTRIBUTING.md", "quickstart.md"}
    called = {arguments[0] for _, arguments in QUANTLINE}
    assert called >= set(GROUP.commands)


@pytest.mark.parametrize("page, arguments", QUANTLINE)
def test_app_takes_the_commands_of_the_pages(page, arguments, tmp_path):
    name, *rest = arguments
    if name == "--help":
        return
    context = GROUP.commands[name].make_context(name, list(rest))
    if name in COMPOSING:
        made = {f"suite={suite}" for suite in SUITES_OF_GRID}
        overrides = context.params["overrides"] or []
        compose([override for override in overrides if override not in made], root=ROOT)
    if name == "sweep":
        space = read_space(context.params["overrides"])
        choices = first_choices(space)
        assert make_plan(space, choices, ROOT).variants
    if name == "grid":
        shutil.copytree(ROOT / "conf", tmp_path / "conf")
        parameters = context.params
        options = grid_options(context.args)
        points = write_grid(
            tmp_path / "conf",
            parameters["method"],
            options,
            parameters["format"],
            parameters["suite"],
        )
        assert points


@pytest.mark.parametrize("page, arguments", commands_called("dvc"))
def test_compose_takes_the_overrides_of_experiments(page, arguments):
    overrides = []
    for word, following in pairwise(arguments):
        if word == "-S":
            overrides.append(first_value(following))
    if arguments[:2] == ("exp", "run"):
        assert overrides
        compose(overrides, root=ROOT)


@pytest.mark.parametrize("page, arguments", commands_called("make"))
def test_makefile_has_the_targets_of_the_pages(page, arguments):
    targets = re.findall(r"^([\w$()./-]+):", MAKEFILE, re.MULTILINE)
    for argument in arguments:
        assert argument.replace(".venv", "$(VENV)") in targets


def test_suites_of_the_pages_are_in_conf_or_made_by_grid():
    text = "\n".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"\bsuite=([\w-]+)", text))
    there = {path.stem for path in (ROOT / "conf/suite").glob("*.yaml")}
    assert named and named <= there | SUITES_OF_GRID
