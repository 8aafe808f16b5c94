"""What others measured, beside what tridil predicts, and how the estimate of ATen (tridil/cudnn.py)
fares.

    python perf/published.py              KernelBench's convolutions on H100; a GPU measures them, too
    python perf/published.py --problems 76,82 --budget 60
    python perf/published.py --miopen     what MIOpen's best solvers take for padding, on AMD

The rows and where they come from: perf/data/README.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "perf")]
from layers import FORMATS, attempt  # noqa: E402
from providers import PROVIDERS, Gpu, precision_of  # noqa: E402

from tridil import choice, cost_model, cudnn, devices, drivers, workloads  # noqa: E402
from tridil import config as cfg  # noqa: E402
from tridil.problem import Problem  # noqa: E402

DATA = Path(__file__).resolve().parent / "data"
# the rows that the constants of ATen's estimate were fitted to; all others judge it, though the
# formulas were chosen with all rows in view
# numbers of KernelBench's problems
FIT = {
    "published": (55, 67, 69, 81),
    "measured": {
        "backbone.layer4.1.conv2": ("nhwc",),
        "classifier.0.convs.1.0": ("nhwc",),
        "layer3.1.conv2": ("nhwc",),
        "s3.b2.conv2.conv": ("nhwc", "nchw"),
        "s4.b1.conv2.conv": ("nhwc", "nchw"),
        "blocks.6.0.conv_dw": ("nhwc",),
        "blocks.5.0.conv_dw.1": ("nchw",),
        "level2 ESP d4 (shared input)": ("nhwc", "nchw"),
        "decoder.aspp.0.convs.2.0.0": ("nhwc", "nchw"),
        "LKA conv_spatial dw7x7 d3 C320": ("nhwc", "nchw"),
    },
}
# shorter rows are the host's time as well
LEAST_MS = 0.03
PROVIDED = ("tridil", "cudnn", "tridil_nchw", "cudnn_nchw")
AMD = {
    "MI100 (gfx908, 120 CU)": "AMD Instinct MI100",
    "MI210 or MI250 (gfx90a, 104 CU)": "AMD Instinct MI250",
    # names in the file -> in tridil/devices.py
    "MI250 (gfx90a, 110 CU)": "AMD Instinct MI250X",
}
DTYPES = {"FP16": "float16", "BF16": "bfloat16", "FP32": "float32"}


def problem_of(row: dict) -> tuple[Problem, str] | None:
    """(problem, pass) of a row of kernelbench_h100.csv; None for an operator that tridil has not.

    A transposed convolution is the dgrad of the convolution from its output's channels and size to
    its input's.
    """
    if row["operator"] not in ("Conv1d", "Conv2d", "ConvTranspose1d", "ConvTranspose2d"):
        return None
    pairs = [tuple(row[f"{name}_{axis}"] for axis in "hw") for name in ("stride", "pad", "dil")]
    stride, pad, dilation = pairs
    n, c, k, sides = row["N"], row["C"], row["K"], (row["H"], row["W"])
    is_transposed = row["operator"].startswith("ConvTranspose")
    # without output_padding, as in all of them
    if is_transposed:
        taps = row["R"], row["S"]
        c, k, sides = (
            k,
            c,
            tuple(
                (size - 1) * s - 2 * p + d * (t - 1) + 1
                for size, s, p, d, t in zip(sides, stride, pad, dilation, taps)
            ),
        )
    problem = Problem(
        n,
        c,
        *sides,
        k,
        row["R"],
        row["S"],
        stride,
        tuple((p, p) for p in pad),
        dilation,
        row["groups"],
        row["dtype"],
        row["layout"],
    )
    return problem, "dgrad" if is_transposed else "fprop"


def kernelbench() -> pd.DataFrame:
    """Rows of the published file with the problem and the pass (None: not covered)."""
    rows = pd.read_csv(DATA / "kernelbench_h100.csv").to_dict("records")
    return pd.DataFrame(
        [
            {
                "no": row["problem"],
                "operator": row["operator"],
                "gpu": row["gpu"],
                "eager": row["torch_eager_ms"],
                "inductor": row["inductor_ms"],
                **dict(zip(("problem", "pass"), problem_of(row) or (None, None))),
            }
            for row in rows
        ]
    )


def predicted(problem: Problem, pass_: str, device: devices.Device) -> dict:
    """Milliseconds, all predicted: the roof, tridil on channels_last tensors, its copies of
    operands that are not, ATen's estimate."""
    config = cost_model.best(problem, pass_, device)
    found = cost_model.predict(problem, pass_, config, device)
    copies = found.parts.get(cost_model.COPIES, 0.0)
    return {
        "kind": cudnn.kind(problem, pass_),
        "roof": 1e3 * cost_model.roof(problem, device),
        "tridil": 1e3 * (found.seconds - copies),
        "copies": 1e3 * copies,
        "estimate": 1e3 * cudnn.seconds(problem, pass_, device),
    }


def compared(rows: pd.DataFrame) -> pd.DataFrame:
    """The covered rows with `predicted` beside them."""
    rows = rows[rows["problem"].notna()].reset_index(drop=True)
    found = pd.DataFrame(
        [
            predicted(row["problem"], row["pass"], devices.of_name(row["gpu"], "cuda:90"))
            for _, row in rows.iterrows()
        ]
    )
    return pd.concat([rows, found], axis=1)


def by_kind(rows: pd.DataFrame) -> pd.DataFrame:
    """Geometric means over the rows of `compared`, for each kind: eager mode over the roof,
    Inductor, tridil without and with its copies."""
    over = {
        "roof": rows["roof"],
        "inductor": rows["inductor"],
        "tridil": rows["tridil"],
        "copied": rows["tridil"] + rows["copies"],
    }
    groups = (
        rows[["kind"]]
        .assign(**{name: rows["eager"] / ms for name, ms in over.items()})
        .groupby("kind")
    )
    return groups[list(over)].agg(geometric_mean).assign(rows=groups.size()).reset_index()


def evidence() -> pd.DataFrame:
    """Every time of ATen that is known, with the estimate of it: kind, source, name, problem, pass,
    ms, estimate (ms), fitted."""
    rows = [
        {
            "source": "published",
            "name": f"{row['no']} on {row['gpu']}",
            "problem": row["problem"],
            "pass": row["pass"],
            "gpu": row["gpu"],
            "ms": row["eager"],
            "fitted": row["no"] in FIT["published"],
        }
        for _, row in kernelbench().dropna(subset="problem").iterrows()
    ]
    layers = {(w.model, w.layer): w.problem for w in workloads.load()}
    for row in pd.read_csv(DATA / "h200_cudnn.csv").to_dict("records"):
        rows.append(
            {
                "source": "measured",
                "name": f"{row['layer']} {row['layout']}",
                "gpu": "NVIDIA H200",
                "pass": row["pass"],
                "ms": row["ms"],
                "problem": replace(
                    layers[row["model"], row["layer"]], dtype=row["dtype"], layout=row["layout"]
                ),
                "fitted": row["layout"] in FIT["measured"].get(row["layer"], ()),
            }
        )
    rows = [
        row
        | {
            "kind": cudnn.kind(row["problem"], row["pass"]),
            "estimate": 1e3
            * cudnn.seconds(row["problem"], row["pass"], devices.of_name(row["gpu"], "cuda:90")),
        }
        for row in rows
        if row["ms"] >= LEAST_MS
    ]
    return pd.DataFrame(rows)


def judged(rows: pd.DataFrame) -> pd.DataFrame:
    """For each kind of layer, of the rows that were fitted and of those that judge: number,
    geometric mean and extremes of estimate / time."""
    rows = rows.assign(
        rows_are=np.where(rows["fitted"], "fitted", "judging"), ratio=rows["estimate"] / rows["ms"]
    )
    whole = rows.assign(kind="all")
    groups = pd.concat([rows, whole]).groupby(["rows_are", "kind"])["ratio"]
    return groups.agg(
        published=lambda r: int((rows["source"][r.index] == "published").sum()),
        rows="size",
        mean=geometric_mean,
        least="min",
        most="max",
    ).reset_index()


def geometric_mean(values) -> float:
    return float(np.exp(np.log(values).mean()))


def measured(gpu, rows: pd.DataFrame, device: devices.Device, budget: float) -> pd.DataFrame:
    """Milliseconds of the distinct problems by PROVIDED, until `budget` seconds are over; `differs`
    is the largest difference between tridil and cuDNN over the largest result; failure says why
    there is none."""
    deadline, jobs, found = time.monotonic() + budget, [], []
    for no, problem, pass_ in (
        rows.dropna(subset="problem")
        .drop_duplicates("problem")[["no", "problem", "pass"]]
        .itertuples(index=False, name=None)
    ):
        for p in (replace(problem, layout=layout) for layout in FORMATS):
            precision = precision_of(p)
            jobs.append(
                (
                    no,
                    p,
                    pass_,
                    precision,
                    choice.decide(
                        p, pass_, device.target, precision, torch.device(gpu.device)
                    ).config,
                )
            )
    with gpu.compiling([job[1:] for job in jobs], device.target) as compiled:
        for no in dict.fromkeys(job[0] for job in jobs):
            if time.monotonic() > deadline:
                break
            mine = {job[1].layout: job[1:] for job in jobs if job[0] == no}
            for job in mine.values():
                compiled(*job)
            found.append(attempt({"no": no, "pass": mine["nchw"][1]}, lambda: _times(gpu, mine)))
    return pd.DataFrame(found)


def _times(gpu, jobs: dict) -> dict:
    """Of one problem, whose (problem, pass, precision, config) are jobs[layout]."""
    problem, pass_, *_ = jobs["nchw"]
    shapes = problem.x_shape if pass_ == "fprop" else problem.y_shape, problem.w_shape
    tensors, found, differs, ours = (
        [
            torch.randn(shape, device=gpu.device).to(getattr(torch, problem.dtype))
            for shape in shapes
        ],
        {},
        0.0,
        None,
    )
    for name in PROVIDED:
        runs = PROVIDERS[name]
        problem, pass_, _, config = jobs[runs.layout]
        with runs.setting():
            call = runs.make(
                problem,
                pass_,
                *(t.contiguous(memory_format=FORMATS[runs.layout]) for t in tensors),
                config,
            )
            result, found[name] = call(), gpu.times([call])["ms"]
        if name.startswith("tridil"):
            ours = result
        else:
            differs = max(differs, ((ours - result).abs().max() / result.abs().max()).item())
    return found | {"differs": differs}


def miopen(n: list[int] | None = None) -> pd.DataFrame:
    """For each GPU and pass of MIOpen's rows of 2048 to 256 channels on 28x28 (all dtypes and batch
    sizes, or those in n): geometric means of the best time of the 3x3 at d=36 over that of the 1x1
    and over that at d=12, beside MACs; times over the roof of the GPU."""
    rows = pd.read_csv(DATA / "miopen_dilated.csv")
    rows = rows[
        (rows["c"] == 2048)
        & (rows["k"] == 256)
        & (rows["h"] == 28)
        & (rows["n"].isin(n) if n else True)
    ]
    rows = rows.assign(case=np.where(rows["r"] == 1, "1x1", "d" + rows["dil_h"].astype(str)))
    times = rows.pivot(
        index=["gpu", "pass", "dtype", "n"], columns="case", values="best_ms"
    ).reset_index()
    counts = pd.DataFrame(
        [_of_case(row, case) for row in times.to_dict("records") for case in ("1x1", "d12", "d36")]
    )
    useful, executed, roof, estimate = (
        counts[name].to_numpy().reshape(-1, 3).T
        for name in ("useful", "executed", "roof", "estimate")
    )
    times = times.assign(
        over_1x1=times["d36"] / times["1x1"],
        over_d12=times["d36"] / times["d12"],
        useful=useful[2] / useful[1],
        executed=executed[2] / executed[1],
        executed_1x1=executed[2] / useful[0],
        roof_1x1=times["1x1"] / roof[0],
        roof_d36=times["d36"] / roof[2],
        estimate=estimate[2] / times["d36"],
    )
    groups = times.groupby(["gpu", "pass"])
    mean = groups[
        [
            "over_1x1",
            "over_d12",
            "useful",
            "executed",
            "executed_1x1",
            "roof_1x1",
            "roof_d36",
            "estimate",
        ]
    ].agg(geometric_mean)
    return mean.assign(
        rows=groups.size(), least=groups["over_1x1"].min(), most=groups["over_1x1"].max()
    ).reset_index()


def _of_case(row: dict, case: str) -> dict:
    """Useful MACs (those of d=36 are those of the 1x1), MACs that tridil's default tiles execute,
    roof and estimate of the library in ms."""
    d, taps = (1, 1) if case == "1x1" else (int(case[1:]), 3)
    pad = d if taps > 1 else 0
    problem = Problem(
        row["n"],
        2048,
        28,
        28,
        256,
        taps,
        taps,
        (1, 1),
        ((pad, pad), (pad, pad)),
        (d, d),
        1,
        DTYPES[row["dtype"]],
        "nhwc",
    )
    device = next(device for device in devices.DEVICES if device.name == AMD[row["gpu"]])
    config = cost_model.best(problem, row["pass"], device, "ieee")
    return {
        "useful": problem.useful_macs,
        "executed": cfg.executed_macs(problem, row["pass"], config),
        "roof": 1e3 * cost_model.roof(problem, device, "ieee"),
        "estimate": 1e3 * cudnn.seconds(problem, row["pass"], device, "ieee"),
    }


def table(rows: pd.DataFrame, names: dict[str, str]) -> str:
    return (
        rows[list(names)]
        .rename(columns=names)
        .to_string(index=False, float_format=lambda v: f"{v:.3g}", na_rep="-")
    )


def show_miopen() -> None:
    print(
        "MIOpen's best solver, published (find-db of October 2024): 3x3 at d=36 on 28x28, 2048 -> 256 channels, of which one tap reads the image,\n"
        "geometric means over dtypes and batch sizes; MACs of tridil are counted from its default tiles, roofs and the estimate predicted\n"
    )
    print(
        table(
            miopen(),
            {
                "gpu": "GPU",
                "pass": "pass",
                "rows": "rows",
                "over_1x1": "time / 1x1",
                "least": "least",
                "most": "most",
                "executed_1x1": "tridil's MACs / 1x1",
                "over_d12": "time / d=12",
                "useful": "useful MACs / d=12",
                "executed": "tridil's MACs / d=12",
                "roof_1x1": "1x1 / roof",
                "roof_d36": "d=36 / roof",
                "estimate": "estimate / d=36",
            },
        )
    )
    print(
        "\nIt does not prove that cuDNN does the same, nor that tridil is faster on AMD: its kernels compile for these GPUs and were never\n"
        "timed there. The times are of one find-db; the file says neither the memory format nor the clocks."
    )


def main(argv=None, gpu: Gpu | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--miopen", action="store_true", help="MIOpen's table instead")
    parser.add_argument(
        "--problems",
        type=lambda text: [int(no) for no in text.split(",")],
        help="numbers of KernelBench's problems, like 76,82",
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=180,
        help="seconds that measuring may take (default: 180); what is left then is named",
    )
    args = parser.parse_args(argv)
    if args.miopen:
        show_miopen()
        return 0
    rows = kernelbench()
    if args.problems:
        unknown = set(args.problems) - set(rows["no"])
        if unknown:
            parser.error(
                f"--problems {','.join(map(str, sorted(unknown)))}: the file has {', '.join(map(str, rows['no'].unique()))}"
            )
        rows = rows[rows["no"].isin(args.problems)]
    print(
        "Milliseconds. Published: eager, inductor (float32 with tf32, NCHW). Predicted: roof; tridil on channels_last tensors, and the\n"
        "copies that it makes of NCHW ones; the estimate of ATen\n"
    )
    columns = (
        "no",
        "operator",
        "gpu",
        "kind",
        "roof",
        "tridil",
        "copies",
        "estimate",
        "eager",
        "inductor",
    )
    beside = compared(rows)
    print(table(beside, dict(zip(columns, columns))))
    print("\nEager mode over the others, geometric means\n")
    print(
        table(
            by_kind(beside),
            {
                "kind": "kind",
                "rows": "rows",
                "roof": "over roof",
                "inductor": "over inductor",
                "tridil": "over tridil",
                "copied": "over tridil with copies",
            },
        )
    )
    if missing := sorted({row["operator"] for _, row in rows[rows["problem"].isna()].iterrows()}):
        print(f"\nnot covered by tridil: {', '.join(missing)}")
    print(
        f"\nEstimate of ATen over its time, geometric means of published and measured rows of at least {LEAST_MS} ms: those that it was fitted\n"
        "to, and those that judge it\n"
    )
    print(
        table(
            judged(evidence()),
            {
                "rows_are": "rows",
                "kind": "kind",
                "rows": "number",
                "published": "published",
                "mean": "estimate / time",
                "least": "least",
                "most": "most",
            },
        )
    )
    if gpu is None and torch.cuda.is_available():
        gpu = Gpu()
    if gpu is None:
        return 0
    found = measured(gpu, rows, gpu.spec(drivers.target()), args.budget)
    found = found.reindex(columns=["no", "pass", *PROVIDED, "differs", "failure"])
    if len(found):
        shown = found.dropna(axis=1, how="all")
        print(
            f"\nMilliseconds, measured on {gpu.describe()[0]} (median); largest difference between tridil's and cuDNN's results\n"
        )
        print(table(shown, dict(zip(shown, shown))))
    if left := [
        str(no) for no in rows.dropna(subset="problem")["no"].unique() if no not in set(found["no"])
    ]:
        print(
            f"\nleft when {args.budget:g} s were over; to measure them: python perf/published.py --problems {','.join(left)}"
        )
    return int((found["failure"].notna() | (found["differs"] > 1e-2)).any())


if __name__ == "__main__":
    sys.exit(main())
