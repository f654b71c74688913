"""A sweep's page, as one self-contained HTML file, and its JSON beside it."""

import csv
import io
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from quantline.files import MIB, write_json, write_text
from quantline.metrics.figure import columns_of
from quantline.paths import REPORTS
from quantline.report import tables
from quantline.report.page import page_environment, script_hash
from quantline.report.plots import PLOTS, pareto_svg
from quantline.sweeps.curves import TITLE, curves_svg
from quantline.sweeps.grid_report import GridReport
from quantline.sweeps.results import Result

FOLDER = REPORTS / "sweeps"


def write_pages(report: GridReport, root: Path) -> list[Path]:
    """Write reports/sweeps/<name>.html, .json and .csv, and return their paths."""
    folder = root / FOLDER
    page = folder / f"{report.name}.html"
    data = folder / f"{report.name}.json"
    table = folder / f"{report.name}.csv"
    write_json(data, report.to_json())
    write_text(table, render_csv(report))
    write_text(page, render_page(report))
    return [page, data, table]


def render_page(report: GridReport) -> str:
    """Return the page. All text is escaped; nothing is fetched from anywhere."""
    environment = page_environment(Path(__file__).parent)
    script = environment.get_template("page.js.jinja").render()
    environment.globals |= {
        "mib": MIB,
        "columns_of": columns_of,
        "count_gates": tables.count_gates,
        "figure_cells": tables.figure_cells,
        "last_part": lambda key: key.rpartition(".")[2],
    }
    picked = report.picked
    return environment.get_template("sweep.html.jinja").render(
        report=report,
        plots=_plots(report),
        keys=list(report.axes),
        adopted=adopting(picked) if picked else "",
        csv=quote(render_csv(report)),
        script=Markup(script),
        script_hash=script_hash(script),
    )


def adopting(result: Result) -> str:
    """Return the command that makes a result the project's own; "" if it is already."""
    if not result.experiment:
        return ""
    return shlex.join(["quantline", "repro", *result.overrides])


def _plots(report: GridReport) -> list[dict[str, Any]]:
    """Return {svg, caption} of each plot."""
    measured = report.measured
    if not measured:
        return []
    # Made from numbers and checked names, so no text of a model is in them.
    curves = Markup(curves_svg(measured, list(report.axes), report.pick))
    caption = (
        f"{TITLE}, by method, with one standard error. The grey line is the Pareto front of these "
        "two: no variant lies below it."
    )
    plots = [{"svg": curves, "caption": caption, "wide": True}]
    for plot in PLOTS:
        rows = [result.row for result in measured if plot.metric in result.row.metrics]
        if rows:
            svg = Markup(pareto_svg(rows, plot, report.pick))
            said = f"{plot.full_title}; the line joins the Pareto front, the pick is bold."
            plots.append({"svg": svg, "caption": said, "wide": False})
    return plots


def render_csv(report: GridReport) -> str:
    """Return all figures as a table for other programs, a line for each variant."""
    figures: dict[str, None] = {}
    for result in report.measured:
        numbers = [
            key for key, value in result.row.figures.items() if isinstance(value, int | float)
        ]
        figures |= dict.fromkeys(sorted(numbers))
    keys = list(report.axes)
    head = ["variant", "method", "format", *keys, "status", "pareto", "pick", *figures]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    for result in report.results:
        row = result.row
        values = [result.choice.get(key, "") for key in keys]
        known = [row.variant, result.method, row.format, *values, row.status]
        marks = [str(row.pareto).lower(), str(row.variant == report.pick).lower()]
        writer.writerow([*known, *marks, *(row.figures.get(key, "") for key in figures)])
    return text.getvalue()
