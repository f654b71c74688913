"""The report as one self-contained HTML file."""

import base64
import hashlib
import re
from itertools import zip_longest
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from quantline.config.compose import as_yaml
from quantline.files import MIB
from quantline.messages import printable
from quantline.metrics.figure import columns_of
from quantline.recipes.grid_counts import describe_grids
from quantline.report import tables
from quantline.report.answers import answers_by_prompt
from quantline.report.beside_full import beside_full, full_precision
from quantline.report.build import Report
from quantline.report.csv_table import render_csv
from quantline.report.experts import describe_experts, modules_of_experts
from quantline.report.plots import PLOTS, pareto_svg
from quantline.report.point_titles import filter_words

MOST_FLIPS = 60  # of a variant on the page
MOST_MODULES = 16  # of experts that the page shows without being asked


def render_page(report: Report) -> str:
    """Return the page. All text is escaped; nothing is fetched from anywhere."""
    environment = page_environment()
    # The page's policy allows this script and no other, wherever it may come from.
    script = environment.get_template("page.js.jinja").render()
    environment.globals |= {
        "mib": MIB,
        "most_modules": MOST_MODULES,
        "most_flips": MOST_FLIPS,
        "columns_of": columns_of,
        "describe_grids": describe_grids,
        "count_gates": tables.count_gates,
        "figure_cells": tables.figure_cells,
        "find_gate": tables.find_gate,
        "serve_parts": serve_parts,
        "beside_full": beside_full,
    }
    measured = report.measured
    picked = report.picked
    checkout = "" if report.commit == "unknown" else f"git checkout {report.commit}\n"
    return environment.get_template("page.html.jinja").render(
        report=report,
        measured=measured,
        gates=picked.gates if picked else [],
        reasons=_reasons_beside_gates(report),
        plots=_plots(report),
        experts=modules_of_experts(report.experts),
        experts_said=describe_experts(report.experts),
        fitted=[row for row in report.variants if row.budget],
        answers=answers_by_prompt(report),
        full=full_precision(report),
        csv=quote(render_csv(report)),
        harness=tables.lm_eval_columns(measured),
        machines=tables.describe_machines(measured),
        params_yaml=as_yaml(report.params),
        checkout=checkout,
        script=Markup(script),
        script_hash=script_hash(script),
    )


def page_environment(*folders: Path) -> Environment:
    """Return what renders the pages' templates: all text is escaped, and its signs are visible.

    Args:
        *folders: With templates, besides those of this room.
    """
    environment = Environment(
        loader=FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    environment.globals["filter_words"] = filter_words
    return environment


def _visible(value: Any) -> Any:
    """Return a text whose control characters, and changes of direction, can be seen."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return printable(value)
    return value


def script_hash(script: str) -> str:
    """Return a script's source expression of a Content-Security-Policy."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _reasons_beside_gates(report: Report) -> list[str]:
    """Return the reasons without what the pick's gates say, which stands in a list of its own."""
    picked = report.picked
    sentences = [gate["said"] for gate in picked.gates] if picked else []
    return [reason for reason in report.reasons if reason not in sentences]


def _plots(report: Report) -> list[dict[str, Any]]:
    """Return {svg, caption} of each plot that there are figures for."""
    plots = []
    for plot in PLOTS:
        rows = [row for row in report.measured if plot.metric in row.metrics]
        if rows:
            # Made here from numbers and checked names, so no text of a model is in it.
            svg = Markup(pareto_svg(rows, plot, report.pick))
            caption = f"{plot.full_title}; the line joins the Pareto front, the pick is bold."
            plots.append({"svg": svg, "caption": caption})
    return plots


def serve_parts(text: str) -> list[tuple[str, str]]:
    """Return the lines in a bundle's README that serve it as (words, code) by turns.

    Either may be empty.
    """
    parts = re.split(r"^```\w*$", text, flags=re.MULTILINE)
    stripped = [part.strip("\n") for part in parts]
    words = [part.strip() for part in stripped[::2]]
    return list(zip_longest(words, stripped[1::2], fillvalue=""))
