"""Tables of figures, some of which must not be above or below a limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

from rich import box
from rich.table import Table


class Column(NamedTuple):
    """What a column shows, how, and what it must be; a heading in brackets: for information, no limit applies."""

    heading: str
    key: str
    form: str
    at_most: Optional[float] = None
    at_least: Optional[float] = None


Row = dict[str, Any]
"""`name`, `strategy`, and the figures by the key of their column; None where there is none."""


def table_of(title: str, columns: Sequence[Column], rows: Sequence[Row], *, strategy: str = "strategy") -> Table:
    """Return the table of all rows; `strategy` is the heading of what tells the rows of a case apart."""
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("case", no_wrap=True)
    table.add_column(strategy, no_wrap=True)
    for column in columns:
        table.add_column(column.heading, justify="right", no_wrap=True)
    for row in rows:
        cells = ("not installed" if row[each.key] is None else f"{row[each.key]:{each.form}}" for each in columns)
        table.add_row(row["name"], row["strategy"], *cells)
    return table


def misses_of(columns: Sequence[Column], rows: Sequence[Row]) -> list[str]:
    """Return one line for each figure that is not what it must be."""
    misses = []
    for row in rows:
        for column in columns:
            value = row[column.key]
            figure = f"{row['name']}, {row['strategy']}: {column.heading}"
            if value is not None and column.at_most is not None and value > column.at_most:
                misses.append(f"{figure} is {value:{column.form}}, must be at most {column.at_most:{column.form}}")
            if value is not None and column.at_least is not None and value < column.at_least:
                misses.append(f"{figure} is {value:{column.form}}, must be at least {column.at_least:{column.form}}")
    return misses
