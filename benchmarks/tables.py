"""Tables on the terminal."""

from collections.abc import Iterable, Sequence

from rich.table import Table

TEXT_TITLES = (
    "mix",
    "rounded by",
    "size of",
    "type",
    "recipe or tool",
)  # of columns that hold no numbers


def number_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Return a table without lines, with numbers on the right and texts on the left.

    Args:
        titles: Of the columns.
        rows: The cells of each row.
    """
    table = Table(box=None)
    for title in titles:
        table.add_column(title, justify="left" if title in TEXT_TITLES else "right")
    for row in rows:
        table.add_row(*row)
    return table
