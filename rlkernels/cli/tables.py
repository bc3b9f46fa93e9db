"""Tables on a terminal: rich where it is installed, aligned plain text where it is not."""

from collections.abc import Sequence


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, plain: bool = False) -> None:
    """Prints a table; the first column is text, numbers in the others are right-aligned.

    Args:
        plain: never use rich.
    """
    if not plain:
        try:
            from rich.console import Console
            from rich.table import Table
            from rich.text import Text
        except ImportError:
            plain = True
    if plain:
        print(text(title, header, rows), end="")
        return
    console = Console()
    # Piped output keeps whole cells: rich would otherwise wrap a log file at 80 columns.
    width = None if console.is_terminal else max(console.width, 200)
    table = Table(title=title, title_justify="left", title_style="bold")
    for column, name in enumerate(header):
        table.add_column(name, justify="right" if column and numeric(rows, column) else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console(width=width).print(table)


def numeric(rows: Sequence[Sequence[str]], column: int) -> bool:
    """Tells whether the column is one of numbers: at least one cell starts like one, and none with another letter."""
    cells = [row[column].strip() for row in rows if row[column].strip() not in ("", "-")]
    return bool(cells) and all(cell[0].isdigit() or cell[0] in "<+-." for cell in cells)


def text(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table as aligned plain text."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    right = [c > 0 and numeric(rows, c) for c in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(
            cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(cells, widths, right, strict=True)
        ).rstrip()

    return "\n".join(["", title, line(header), line(["-" * w for w in widths]), *map(line, rows)]) + "\n"
