"""The report as a table in a terminal."""

import sys
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from quantline.messages import plain
from quantline.metrics.figure import cli_columns
from quantline.report.experts import describe_experts

PARETO = "◆"  # as on the page; the word does not fit beside eight figures


def print_report(report: dict[str, Any], file: TextIO | None = None) -> None:
    """Print a report as a table, and the pick with its reasons.

    Args:
        report: The content of reports/compression.json.
        file: Where to; by default stdout.
    """
    console = Console(file=file or sys.stdout)
    console.print(_table(report))
    if any(row["pareto"] for row in report["variants"]):
        console.print(f"{PARETO} on the Pareto front of size and divergence")
    name = _text(report["target"]["name"])
    console.print(f"\nShip for {name}: [bold]{_text(report['pick'] or 'none of them')}[/bold]")
    for reason in report["reasons"]:
        console.print(f"  - {_text(reason)}", highlight=False)
    for sentence in report.get("refused", []):
        console.print(f"  - not run this time: {_text(sentence)}", highlight=False)
    if report.get("experts"):
        console.print(f"  - {_text(describe_experts(report['experts']))}", highlight=False)
    busy = [row for row in report["variants"] if row["speed"].get("busy")]
    if busy:
        names = ", ".join(row["variant"] for row in busy)
        said = "; ".join(busy[0]["speed"]["busy"])
        console.print(
            f"  * measured on a busy machine, so that speeds are too low: {_text(names)}; "
            f"of the first, {_text(said)}",
            highlight=False,
        )


def _text(text: str) -> str:
    """Return a text for rich, which is neither markup nor control of the terminal."""
    return escape(plain(text))


def _table(report: dict[str, Any]) -> Table:
    columns = cli_columns()
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))  # eight figures in 80 columns
    table.add_column("variant", overflow="fold")
    for column in columns:
        table.add_column(column.heading, justify="right", no_wrap=True)
    table.add_column("", min_width=len("pick*"))
    for row in report["variants"]:
        figures = row["metrics"] | row["speed"]
        style = ""
        remark = PARETO if row["pareto"] else ""
        if row["status"] != "ok":
            style = "red"
            remark = "stale" if row["status"] == "stale" else f"failed: {row['failure']}"
        elif row["variant"] == report["pick"]:
            style = "bold green"
            remark = "pick"
        if row["speed"].get("busy"):
            remark = f"{remark}*"
        cells = [column.text(figures.get(column.key)) for column in columns]
        table.add_row(_text(row["variant"]), *cells, _text(remark), style=style)
    return table
