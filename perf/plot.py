"""The pictures of a sweep, from its CSV alone: `python perf/plot.py results.csv [--out FOLDER]`.

A picture is written only where its columns hold data, and removed where they do not; what is
counted or modelled is labelled "predicted".
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from results import IDENTITY, geometry, read

# each has its colour in every picture
PROVIDERS = ("tridil", "cudnn", "cudnn_nchw", "inductor", "flaggems")
COLOURS = ("#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#8C8C00", "#000000")
MARKERS = "osD^vP*X"
OURS, DENSE, ROOF = COLOURS[0], "#999999", "#2E7D32"
LAYER = ["model", "layer", "pass", "dtype", "layout"]


def layers(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of single layers: neither those of the machine nor those of whole models."""
    rows = frame[(frame["model"] != "(machine)") & (frame["layer"] != "(model)")]
    return rows.assign(layout=rows["layout"].astype(object).fillna(""))


def _names(rows: pd.DataFrame) -> pd.Series:
    """Each row's geometry; the layer's name where it has none."""
    text = geometry(rows)
    return text.where(text != "", rows["layer"])


def geometric_mean(values: pd.Series) -> float:
    return float(np.exp(np.log(values.astype(float)).mean()))


def octave(values: pd.Series) -> pd.Series:
    """The least power of two that is not below each value."""
    return 2 ** np.ceil(np.log2(values.astype(float))).astype(int)


def speedup_cells(rows: pd.DataFrame) -> pd.DataFrame:
    """Geometric mean of `ratio`: a row per octave of dilation, a column per octave of input
    channels of a group; NaN where there is no layer."""
    cells = rows["ratio"].groupby(
        [
            octave(rows["dilation"]).rename("dilation"),
            octave(rows["c"] / rows["groups"]).rename("channels"),
        ]
    )
    return cells.apply(geometric_mean).unstack().sort_index().sort_index(axis=1)


def roofs(frame: pd.DataFrame, dtype: str) -> tuple[float, float] | None:
    """(GB/s of a copy, TFLOP/s of a matrix product) measured on this machine for a dtype, or None;
    a copy of another dtype will do."""
    machine = frame[frame["model"] == "(machine)"]
    copies = machine[machine["pass"] == "copy"].dropna(subset=["gb_s"])
    copies = copies[copies["dtype"] == dtype] if (copies["dtype"] == dtype).any() else copies
    products = machine[(machine["pass"] == "matmul") & (machine["dtype"] == dtype)].dropna(
        subset=["tflops_dense"]
    )
    return (
        None
        if copies.empty or products.empty
        else (float(copies["gb_s"].max()), float(products["tflops_dense"].max()))
    )


def _styles(frame):
    names = [*PROVIDERS, *sorted(set(layers(frame)["provider"]) - set(PROVIDERS))]
    return {
        name: dict(
            color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], zorder=2 + (i == 0)
        )
        for i, name in enumerate(names)
    }


def _by_provider(rows, styles):
    """(rows, label and style) of each provider, in the order of their colours."""
    parts = dict(iter(rows.groupby("provider")))
    return [
        (parts[name], dict(label=name, **style)) for name, style in styles.items() if name in parts
    ]


def _figure(title, machine, width, height, *shape, **options):
    lines = textwrap.wrap(
        machine.replace(" ", "\N{NO-BREAK SPACE}").replace("|\N{NO-BREAK SPACE}", "| "),
        int(14 * width),
    )
    fig = Figure((width, height + 0.5 + 0.16 * len(lines)), layout="constrained")
    fig.suptitle("\n".join([f"tridil: {title}", *lines]), fontsize=9)
    return fig, fig.subplots(*shape, **options)


def _panels(rows, title, machine, width, height, by=("dtype", "layout"), **options):
    """(figure, list of (axes, rows of the panel)): a column of panels per pass, a row per dtype and
    layout; panels without rows are left out."""
    kinds, passes = (
        list(dict.fromkeys(zip(*(rows[key] for key in by)))),
        list(dict.fromkeys(rows["pass"])),
    )
    fig, axes = _figure(
        title,
        machine,
        max(8.5, 1 + width * len(passes)),
        height * len(kinds),
        len(kinds),
        len(passes),
        squeeze=False,
        **options,
    )
    parts, panels = dict(iter(rows.groupby([*by, "pass"], sort=False))), []
    for kind, line in zip(kinds, axes):
        for pass_, ax in zip(passes, line):
            ax.set_title(" ".join([pass_, *filter(None, kind[:2])]), fontsize=9)
            ax.tick_params(labelsize=8)
            ax.set_visible((*kind, pass_) in parts)
            if ax.get_visible():
                panels.append((ax, parts[(*kind, pass_)]))
    return fig, panels


def _legend(fig):
    found = {
        label: handle for ax in fig.axes for handle, label in zip(*ax.get_legend_handles_labels())
    }
    fig.legend(
        found.values(), found, loc="outside lower center", ncols=min(len(found), 6), fontsize=8
    )
    return fig


def overview(frame, machine):
    """Throughput by layer, or MACs over useful ones where nothing is timed; by model where there
    are many layers."""
    timed = frame["ms"].notna().any()
    rows = layers(frame).dropna(subset=["tflops_useful"] if timed else ["executed_macs"])
    if rows.empty:
        return None
    many = rows[["model", "layer"]].drop_duplicates().shape[0] > 60
    names = rows["model"] if many else _names(rows) + " | " + rows["model"]
    order, styles = list(dict.fromkeys(names)), _styles(frame)
    fig, panels = _panels(
        rows,
        f"{'throughput' if timed else 'multiply-accumulates'} by {'model, a mark per layer' if many else 'layer'}",
        machine,
        3,
        0.8 + 0.22 * len(order),
        by=("dtype",) if timed else ("dtype", "layout"),
        sharex=True,
        sharey=True,
    )
    for ax, part in panels:
        y = names[part.index].map(order.index)
        if timed:
            for its, style in _by_provider(part, styles):
                ax.plot(its["tflops_useful"], y[its.index], ls="", ms=5, alpha=0.8, **style)
        else:
            dense, executed = (
                part[column] / part["useful_macs"] for column in ("dense_macs", "executed_macs")
            )
            ax.hlines(y, dense, executed, color="lightgrey", zorder=0)
            ax.plot(dense, y, "o", ms=5, color=DENSE, label="dense (padding multiplied)")
            ax.plot(executed, y, "D", ms=4, color=OURS, label="executed by the default tiles")
            ax.axvline(1, color=ROOF, lw=1, label="useful")
        ax.set(xscale="log", yticks=range(len(order)), ylim=(len(order) - 0.5, -0.5))
        ax.set_yticklabels(order, fontsize=7)
        ax.set_xlabel(
            "useful TFLOP/s (measured)" if timed else "MACs / useful MACs (predicted)", fontsize=8
        )
        ax.grid(which="both", alpha=0.25)
        ax.xaxis.set_major_locator(LogLocator(subs=(1,) if timed else (1, 1.5, 2, 3, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("")
    return _legend(fig)


def speedup(frame, machine):
    """Time of the best cuDNN over tridil's, geometric mean for each dilation and number of
    channels."""
    rows = layers(frame).dropna(subset=["ratio", "dilation", "c", "groups"])
    rows = rows[rows["provider"] == "tridil"]
    if rows.empty:
        return None
    whole = speedup_cells(rows)
    fig, panels = _panels(
        rows,
        "speedup over the fastest cuDNN (geometric mean; in brackets: layers)",
        machine,
        0.9 + 0.5 * whole.shape[1],
        1.2 + 0.42 * whole.shape[0],
        sharex=True,
        sharey=True,
    )
    panels = [
        (ax, part, speedup_cells(part).reindex(index=whole.index, columns=whole.columns))
        for ax, part in panels
    ]
    most = np.clip(np.exp(max(np.nanmax(np.abs(np.log(cells))) for _, _, cells in panels)), 1.25, 4)
    for ax, part, cells in panels:
        counts = part.groupby([octave(part["dilation"]), octave(part["c"] / part["groups"])]).size()
        image = ax.imshow(
            cells, cmap="RdBu", norm=LogNorm(1 / most, most), aspect="auto", origin="lower"
        )
        ax.set_facecolor("#EEEEEE")
        for (row, column), value in np.ndenumerate(cells.to_numpy()):
            if np.isfinite(value):
                ax.text(
                    column,
                    row,
                    f"{value:.2f}\n({counts[cells.index[row], cells.columns[column]]})",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if abs(np.log(value)) > 0.65 * np.log(most) else "black",
                )
        for ticks, label, axis in (
            (cells.columns, "input channels of a group", ax.xaxis),
            (cells.index, "dilation", ax.yaxis),
        ):
            axis.set_ticks(
                range(len(ticks)),
                [str(top) if top <= 2 else f"{top // 2 + 1}-{top}" for top in ticks],
            )
            axis.set_label_text(label, fontsize=8)
        ax.tick_params(axis="x", labelrotation=45, labelsize=7)
    bar = fig.colorbar(
        image,
        ax=fig.axes,
        extend="both",
        aspect=8 * fig.get_figheight(),
        ticks=[1 / most, 1, most],
        format="{x:.2g}",
    )
    bar.set_label("time of cuDNN / time of tridil (measured)", fontsize=8)
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=8)
    return fig


def roofline(frame, machine):
    """Layers under the machine's measured roofs; None where nothing is timed."""
    rows = layers(frame)
    moved = (
        rows["compulsory_bytes"]
        .astype(float)
        .groupby([rows[key] for key in LAYER])
        .transform("max")
    )
    rows = rows.assign(intensity=2 * rows["useful_macs"] / moved).dropna(
        subset=["intensity", "tflops_useful"]
    )
    known = {dtype: found for dtype in set(rows["dtype"]) if (found := roofs(frame, dtype))}
    rows = rows[rows["dtype"].isin(known)]
    if rows.empty:
        return None
    styles = _styles(frame)
    fig, panels = _panels(
        rows,
        "layers under the roofs of this machine",
        machine,
        3.4,
        3.2,
        by=("dtype",),
        sharex=True,
        sharey=True,
    )
    for ax, part in panels:
        gb_s, peak = known[part["dtype"].iloc[0]]
        ends = rows["intensity"].min() / 2, max(rows["intensity"].max(), 1e3 * peak / gb_s) * 2
        x = np.geomspace(*ends, 200)
        ax.plot(
            x,
            np.minimum(1e-3 * gb_s * x, peak),
            color=ROOF,
            label="measured roof: copy, then matrix product",
        )
        reached = f"copy {gb_s:.4g} GB/s\nmatmul {peak:.4g} TFLOP/s\n(measured)"
        ax.text(0.97, 0.04, reached, transform=ax.transAxes, ha="right", fontsize=7, color=ROOF)
        for its, style in _by_provider(part, styles):
            ax.plot(its["intensity"], its["tflops_useful"], ls="", ms=5, alpha=0.7, mew=0, **style)
        ax.set(xscale="log", yscale="log")
        ax.set_xlabel("useful FLOPs / compulsory byte (predicted)", fontsize=8)
        ax.set_ylabel("useful TFLOP/s (measured)", fontsize=8)
        ax.grid(alpha=0.25)
    return _legend(fig)


def over_roof(frame, machine):
    """Predicted time over the roof by kind of layer, where nothing is timed."""
    rows = layers(frame).dropna(subset=["predicted_ms", "roof_ms", "kind"])
    if rows.empty or frame["ms"].notna().any():
        return None
    rows = rows.assign(over=rows["predicted_ms"] / rows["roof_ms"])
    kinds = list(dict.fromkeys(rows["kind"]))
    fig, panels = _panels(
        rows,
        "predicted time over roof, by kind of layer (cost model, not timed)",
        machine,
        3,
        2.6,
        sharex=True,
        sharey=True,
    )
    for ax, part in panels:
        means = part.groupby("kind")["over"].apply(geometric_mean).reindex(kinds)
        ax.bar(
            range(len(kinds)),
            means - 1,
            bottom=1,
            color=OURS,
            alpha=0.5,
            label="geometric mean (number)",
        )
        ax.plot(
            part["kind"].map(kinds.index),
            part["over"],
            "o",
            ms=3,
            alpha=0.4,
            color="black",
            mew=0,
            label="a layer",
        )
        for x, mean in enumerate(means):
            if np.isfinite(mean):
                ax.text(
                    x,
                    0.93,
                    f"{mean:.2f}",
                    ha="center",
                    fontsize=8,
                    transform=ax.get_xaxis_transform(),
                )
        ax.axhline(1, color=ROOF, lw=1, label="roof")
        ax.set_yscale("log", base=2)
        ax.set_ylim(0.9, 1.6 * rows["over"].max())
        ax.yaxis.set_major_formatter("{x:g}")
        ax.set_xticks(range(len(kinds)), kinds, rotation=45, ha="right")
        ax.set_ylabel("predicted time / roof time", fontsize=8)
        ax.set_xlabel("kind", fontsize=8)
    return _legend(fig)


def dilation(frame, machine):
    """Time against dilation on one size of layer; where nothing is timed, predicted MACs and times."""
    classic, timed = layers(frame).query("model == 'classic'"), frame["ms"].notna().any()
    wanted = (
        {"ms": ["ms"]}
        if timed
        else {"MACs": ["dense_macs", "executed_macs"], "time": ["predicted_ms", "roof_ms"]}
    )
    rows = pd.concat(
        [
            classic.dropna(subset=["dilation", *columns]).assign(quantity=name)
            for name, columns in wanted.items()
        ]
    )
    if rows.empty:
        return None
    rows, styles = rows.sort_values("dilation", kind="stable"), _styles(frame)
    size = ", ".join(
        f"{name} {rows[name].iloc[0]:.0f}" for name in "nchwkrs" if rows[name].notna().all()
    )
    title = f"{'time' if timed else 'multiply-accumulates and predicted time'} against dilation, one layer ({size})"
    fig, panels = _panels(
        rows, title, machine, 3, 2.6, by=("dtype", "layout", "quantity"), sharex=True, sharey="row"
    )
    for ax, part in panels:
        quantity, x = part["quantity"].iloc[0], part["dilation"]
        if timed:
            for its, style in _by_provider(part, styles):
                ax.plot(its["dilation"], its["ms"], ms=4, lw=1, **style)
                ax.fill_between(
                    its["dilation"].astype(float),
                    its["ms_q1"],
                    its["ms_q3"],
                    color=style["color"],
                    alpha=0.2,
                    lw=0,
                )
        elif quantity == "MACs":
            ax.plot(
                x,
                part["dense_macs"] / part["useful_macs"],
                "o-",
                color=DENSE,
                ms=4,
                lw=1,
                label="dense (padding multiplied)",
            )
            ax.plot(
                x,
                part["executed_macs"] / part["useful_macs"],
                "D-",
                color=OURS,
                ms=4,
                lw=1,
                label="tridil",
            )
        else:
            ax.plot(x, part["roof_ms"], "_-", color=ROOF, ms=4, lw=1, label="useful, roof")
            ax.plot(x, part["predicted_ms"], "D-", color=OURS, ms=4, lw=1, label="tridil")
        ax.set_xscale("log", base=2)
        ax.set_xticks(sorted(set(x)), [f"{d:.0f}" for d in sorted(set(x))])
        ax.minorticks_off()
        ax.set_xlabel("dilation", fontsize=8)
        ax.set_ylabel(
            "ms (measured)"
            if timed
            else "MACs / useful MACs (predicted)"
            if quantity == "MACs"
            else "ms (predicted)",
            fontsize=8,
        )
        ax.grid(alpha=0.25)
    # of shared axes only when all is drawn
    for ax, _ in panels:
        ax.set_ylim(bottom=0)
    return _legend(fig)


def macs(frame, machine):
    """Dense and executed MACs over useful ones by kind of layer."""
    rows = layers(frame).dropna(subset=["kind", "dense_macs", "executed_macs", "useful_macs"])
    if rows.empty:
        return None
    kinds = list(dict.fromkeys(rows["kind"]))
    title = "multiply-accumulates over the useful ones, summed over the layers of a kind"
    fig, panels = _panels(rows, title, machine, 3.2, 2.6, sharex=True, sharey=True)
    for ax, part in panels:
        sums = (
            part.groupby("kind")[["dense_macs", "executed_macs", "useful_macs"]]
            .sum()
            .reindex(kinds)
        )
        for x, name, label, colour in (
            (-0.2, "dense", "dense (padding multiplied)", DENSE),
            (0.2, "executed", "executed by tridil", OURS),
        ):
            bars = ax.bar(
                np.arange(len(kinds)) + x,
                sums[f"{name}_macs"] / sums["useful_macs"],
                0.4,
                color=colour,
                label=label,
            )
            ax.bar_label(bars, fmt="%.2f", fontsize=6, padding=1)
        ax.axhline(1, color=ROOF, lw=1, label="useful")
        ax.margins(y=0.12)
        ax.set_xticks(range(len(kinds)), kinds, rotation=45, ha="right")
        ax.set_ylabel("MACs / useful MACs (predicted)", fontsize=8)
        ax.set_xlabel("kind", fontsize=8)
    return _legend(fig)


def memory(frame, machine, most: int = 16):
    """Extra memory of the layers that need most of it."""
    rows = layers(frame).dropna(subset=["extra_mib"])
    if rows.empty:
        return None
    rows = rows.assign(layer=_names(rows), extra_mib=rows["extra_mib"].astype(float))
    cells = rows.pivot_table(
        index=["layer", "model", "pass", "dtype"], columns="provider", values="extra_mib"
    )
    cells = cells.loc[cells.max(axis=1).sort_values(ascending=False, kind="stable").index[:most]]
    fig, ax = _figure(
        "extra memory, the layers with most of it",
        machine,
        9,
        1 + len(cells) * (0.12 + 0.1 * cells.shape[1]),
    )
    styles = _styles(frame)
    for i, provider in enumerate(name for name in styles if name in cells):
        y = np.arange(len(cells)) + (i - (cells.shape[1] - 1) / 2) * 0.8 / cells.shape[1]
        bars = ax.barh(
            y,
            cells[provider],
            0.8 / cells.shape[1],
            color=styles[provider]["color"],
            label=provider,
        )
        ax.bar_label(bars, fmt="%.0f", fontsize=6, padding=1)
    ax.set_yticks(
        range(len(cells)), [" ".join(filter(None, key)) for key in cells.index], fontsize=7
    )
    ax.set_ylim(len(cells) - 0.5, -0.5)
    ax.tick_params(axis="x", labelsize=8)
    ax.set_xlabel("peak MiB beyond operands and result (measured)", fontsize=8)
    return _legend(fig)


PICTURES = {
    "results.png": overview,
    "speedup.png": speedup,
    "roofline.png": roofline,
    "over_roof.png": over_roof,
    "dilation.png": dilation,
    "macs.png": macs,
    "memory.png": memory,
}


def write(frame: pd.DataFrame, out: Path, machine: str) -> list[Path]:
    """Writes the pictures that the rows can fill into `out`, `machine` below each title; removes
    the others. Returns the paths."""
    paths = []
    for name, draw in PICTURES.items():
        (out / name).unlink(missing_ok=True)
        if fig := draw(frame, machine):
            fig.savefig(out / name, dpi=120)
            paths.append(out / name)
    return paths


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv", type=Path, help="results.csv of a sweep")
    parser.add_argument(
        "--out", type=Path, help="folder of the pictures (default: that of the CSV)"
    )
    args = parser.parse_args(argv)
    out = args.out or args.csv.parent
    try:
        frame = read(args.csv)
        out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as e:
        parser.error(" ".join(str(e).split()))
    if frame.empty:
        parser.error(f"no rows in {args.csv}: perf/sweep.py writes them")
    frame = frame[frame["target"] == frame["target"].iloc[-1]].drop_duplicates(
        [*{*IDENTITY} - {"code"}], keep="last"
    )
    providers = dict.fromkeys(
        frame["provider"] + " " + frame["version"].astype(object).fillna("").astype(str)
    )
    for path in write(
        frame,
        out,
        f"target {frame['target'].iloc[-1]} | {', '.join(map(str.strip, providers))} | {args.csv.name}",
    ):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
