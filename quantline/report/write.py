"""The report's files."""

from pathlib import Path

from quantline.files import write_json, write_text
from quantline.report.build import Report
from quantline.report.csv_table import render_csv
from quantline.report.markdown import render_markdown
from quantline.report.page import render_page
from quantline.report.plots import PLOTS, picture, plot_data

PAGE = "compression.html"
JSON = "compression.json"
MARKDOWN = "compression.md"
CSV = "compression.csv"
PLOT_DATA = "plots/pareto.json"
PICTURE = "plots/{}.svg"


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write compression.html, .json, .md and .csv, and what is in plots/.

    Args:
        report: From `collect_report`.
        folder: reports/ of the project.

    Returns:
        The first four, which say the same in four ways.
    """
    write_json(folder / PLOT_DATA, plot_data(report.measured))
    for plot in PLOTS:
        drawn = picture(report.measured, plot, report.pick)
        write_text(folder / PICTURE.format(plot.metric), drawn)
    write_json(folder / JSON, report.to_json())
    write_text(folder / MARKDOWN, render_markdown(report))
    write_text(folder / CSV, render_csv(report))
    write_text(folder / PAGE, render_page(report))
    return [folder / name for name in (PAGE, JSON, MARKDOWN, CSV)]
