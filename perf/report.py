"""What a sweep leaves behind: the table on the terminal, results.md, pictures and report.html."""

from __future__ import annotations

from pathlib import Path

import page
import pandas as pd
import plot
from results import COLUMNS, summary, table
from rich.console import Console
from rich.markup import escape


def report(
    frame: pd.DataFrame, machine: str, notes: list[str], out: Path, console: Console
) -> None:
    """Terminal table (a heading per layer), results.md, the pictures of plot.py, report.html."""
    view, lines = table(frame), notes + summary(frame)
    titles = (
        frame["model"] + " " + frame["layer"] + (" | " + frame["problem"].astype(object)).fillna("")
    )
    heads = [column.split("\n") for column in view]
    widths = [max(map(len, [*head, *view[column]])) for head, column in zip(heads, view)]

    def line(cells):
        return " ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths))
        )

    depth = max(map(len, heads))
    text = [line(cells) for cells in zip(*([""] * (depth - len(head)) + head for head in heads))]
    for title, cells, previous in zip(titles, view.itertuples(index=False), [None, *titles]):
        text += [f"[bold]{escape(title)}[/bold]"] * (title != previous) + [line(cells)]
    console.print("\n".join(text), highlight=False, soft_wrap=True)
    console.print("\n".join(["", machine, *lines]), markup=False, highlight=False, soft_wrap=True)

    cells = [
        ["layer", *(column.replace("/\n", "/").replace("\n", " ") for column in view)],
        ["---"] * (1 + view.shape[1]),
        *(
            [title.replace(" | ", ": "), *row]
            for title, row in zip(titles, view.itertuples(index=False))
        ),
    ]
    legend = [
        f"- `{name}`{f' ({column.kind})' if column.kind else ''}: {column.meaning}"
        for name, column in COLUMNS.items()
    ]
    text = [
        "# Sweep",
        "",
        machine,
        "",
        *(f"- {item}" for item in lines),
        "",
        *("| " + " | ".join(row) + " |" for row in cells),
        "",
        "Columns of results.csv:",
        "",
        *legend,
        "",
    ]
    (out / "results.md").write_text("\n".join(text), encoding="utf-8")
    page.write(frame, out, machine, notes, plot.write(frame, out, machine))
