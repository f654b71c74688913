"""The report as Markdown: the decision and one table."""

from quantline.messages import in_markdown
from quantline.metrics.figure import columns_of
from quantline.report.budgets import describe_counterpart
from quantline.report.build import Report
from quantline.report.experts import describe_experts
from quantline.report.tables import figure_cells
from quantline.report.variant import VariantRow


def render_markdown(report: Report) -> str:
    """Return the decision, a table of the variants, and why not the others."""
    pick = report.pick or "nothing to ship"
    title = in_markdown(f"{report.model}: {pick} (target {report.target['name']})")
    lines = [f"# {title}", ""]
    if report.dequantized:
        lines.append(_item(report.dequantized))
    if report.experts:
        lines.append(_item(describe_experts(report.experts)))
    lines += [_item(reason) for reason in report.reasons]
    lines += [_item(f"not run this time: {sentence}") for sentence in report.refused]
    lines += ["", *variants_table(report)]
    busy = [_item(f"{row.variant}: {row.busy}") for row in report.measured if row.busy]
    if busy:
        lines += ["", "Measured on a busy machine, so that their speeds are too low:", "", *busy]
    fitted = [_item(describe_counterpart(row)) for row in report.variants if row.beside]
    if fitted:
        lines += ["", "Fitted to a budget:", "", *fitted]
    others = []
    for row in report.variants:
        if row.variant != report.pick:
            others.append(_item(f"{row.variant}: {'; '.join(row.why_not)}"))
    if others:
        lines += ["", "Why not the others:", "", *others]
    return "\n".join(lines) + "\n"


def variants_table(report: Report) -> list[str]:
    """Return the lines of a table of all variants."""
    headings = [column.heading for column in columns_of("markdown")]
    lines = [_table_line(["variant", *headings]), "|---|" + "---:|" * len(headings)]
    return lines + [_row_line(row, len(headings)) for row in report.variants]


def _item(text: str) -> str:
    return f"- {in_markdown(text)}"


def _table_line(cells: list[str]) -> str:
    return f"| {' | '.join(map(in_markdown, cells))} |"


def _row_line(row: VariantRow, columns: int) -> str:
    """Return a variant's line of the table, which has so many columns of figures."""
    if not row.is_measured:
        return _table_line([row.variant, row.problem]) + " |" * (columns - 1)
    cells = [
        f"{cell.text} {cell.detail}".rstrip() for cell in figure_cells("markdown", row.figures)
    ]
    name = f"{row.variant} (busy)" if row.busy else row.variant
    return _table_line([name, *cells])
