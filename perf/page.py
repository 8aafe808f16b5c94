"""report.html of a sweep: pictures and the full table in one file that needs no network; columns
sort, a box filters rows."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path

import pandas as pd
from results import COLUMNS, geometry, is_broken, summary, table

CAPTIONS = {
    "results.png": "Layer by layer",
    "speedup.png": "Speedup over cuDNN by dilation and channels",
    "roofline.png": "Under the roofs of the machine",
    "over_roof.png": "Predicted time over the roof",
    "dilation.png": "Against dilation",
    "macs.png": "Multiply-accumulates by kind of layer",
    "memory.png": "Extra memory",
}
STYLE = """
:root { color-scheme: light dark; --line: #8884; --head: #eef1f5; --bad: #c0392b33 }
@media (prefers-color-scheme: dark) { :root { --head: #2a2e35 } }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1500px; padding: 1rem }
figure { margin: 1.5rem 0 } figcaption { font-weight: 600; margin-bottom: .4rem }
figure { overflow-x: auto } img { max-width: max(100%, 48rem); height: auto; background: #fff; border-radius: 6px }
.machine, li, td:last-child { overflow-wrap: anywhere } .scroll { overflow: auto; max-height: 85vh; border: 1px solid var(--line) }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
td, th { padding: .25rem .5rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
td:nth-child(-n+4), td:last-child, th:nth-child(-n+4), th:last-child { text-align: left } tr.bad { background: var(--bad) }
th { position: sticky; top: 0; background: var(--head); vertical-align: bottom; padding: 0 }
th button { all: unset; box-sizing: border-box; width: 100%; padding: .4rem .5rem; cursor: pointer; white-space: pre-line }
th button:focus-visible { outline: 2px solid } [aria-sort=ascending] button::after { content: " \\25B2" }
[aria-sort=descending] button::after { content: " \\25BC" }
input { font: inherit; padding: .3rem .5rem; width: min(24rem, 100%); box-sizing: border-box }
dt { font-family: monospace } dd { margin-left: 1.5rem }
"""
SCRIPT = """
const [head, body] = [document.querySelector("thead"), document.querySelector("tbody")], rows = [...body.rows];
const number = text => text === "inf" ? Infinity : parseFloat(text);
[...head.rows[0].cells].forEach((th, i) => th.firstChild.addEventListener("click", () => {
  const order = th.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending", sign = order === "ascending" ? 1 : -1;
  for (const other of head.rows[0].cells) other.removeAttribute("aria-sort");
  th.setAttribute("aria-sort", order);
  const text = row => row.cells[i].textContent, filled = rows.filter(text), numeric = filled.every(row => !isNaN(number(text(row))));
  filled.sort((a, b) => sign * (numeric ? number(text(a)) - number(text(b)) || 0 : text(a).localeCompare(text(b))));
  body.append(...filled, ...rows.filter(row => !text(row)));   // empty cells last, in either order
}));
const box = document.querySelector("input"), count = document.querySelector("output");
const texts = new Map(rows.map(row => [row, [...row.cells].map(cell => cell.textContent).join(" ").toLowerCase()]));
const filter = () => {
  const words = box.value.toLowerCase().split(/\\s+/);
  for (const row of rows) row.hidden = !words.every(word => texts.get(row).includes(word));
  count.textContent = `${rows.filter(row => !row.hidden).length} of ${rows.length} rows`;
};
box.addEventListener("input", filter);
filter();
"""


def write(
    frame: pd.DataFrame, out: Path, machine: str, notes: list[str], images: list[Path]
) -> Path:
    """Writes report.html: machine, notes, summary, the pictures inline, the table of results.table
    with the layers' geometry and names."""
    view = table(frame)
    others = frame["also"].astype(object).fillna("")
    view.insert(0, "geometry", geometry(frame))
    view.insert(
        1,
        "layer",
        frame["model"] + " " + frame["layer"] + others.where(others == "", "; " + others),
    )
    view["problem"] = frame["problem"].astype(object).fillna("")
    heads = "".join(
        f'<th scope="col"><button type="button">{escape(column)}</button></th>' for column in view
    )
    rows = "\n".join(
        f"<tr{' class=bad' * bad}>"
        + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells)
        + "</tr>"
        for cells, bad in zip(view.itertuples(index=False), is_broken(frame))
    )
    figures = "\n".join(
        f'<figure><figcaption>{CAPTIONS[path.name]}</figcaption><img alt="{CAPTIONS[path.name]}" '
        f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"></figure>'
        for path in images
    )
    columns = "".join(
        f"<dt>{escape(name)}{f' ({column.kind})' if column.kind else ''}</dt><dd>{escape(column.meaning)}</dd>"
        for name, column in COLUMNS.items()
    )
    path = out / "report.html"
    path.write_text(
        f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>tridil: sweep</title><style>{STYLE}</style></head><body>
<h1>tridil: sweep</h1><p class="machine">{escape(machine)}</p>
<ul>{"".join(f"<li>{escape(line)}</li>" for line in [*notes, *summary(frame)])}</ul>
{figures}
<h2>All rows</h2><p><label>Filter <input type="search" placeholder="words that a row must contain"></label> <output></output></p>
<div class="scroll" tabindex="0"><table><thead><tr>{heads}</tr></thead><tbody>
{rows}
</tbody></table></div>
<details><summary>Columns of results.csv</summary><dl>{columns}</dl></details>
<script>{SCRIPT}</script></body></html>
""",
        encoding="utf-8",
    )
    return path
