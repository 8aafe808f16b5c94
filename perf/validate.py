"""The cost model against the clock, and what it predicts where there is none: `python perf/sweep.py
--validate-model`."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from providers import PROVIDERS, precision_of

from tridil import config as cfg
from tridil import cost_model, testing
from tridil.clock import turns

NOT_MEASURED = "not measured, for want of a GPU: rank correlation and regret. Every time below is predicted by tridil/cost_model.py"


def predicted(layers, passes, device) -> pd.DataFrame:
    """One row per layer and pass: the model's pick on `device` (a tridil.devices.Device), its
    predicted time, the roof, and what limits it."""
    rows = []
    for w in layers:
        for pass_ in passes:
            precision = precision_of(w.problem)
            config = cost_model.best(w.problem, pass_, device, precision)
            found = cost_model.predict(w.problem, pass_, config, device, precision)
            rows.append(
                {
                    "model": w.model,
                    "layer": w.layer,
                    "kind": w.kind,
                    "pass": pass_,
                    "dtype": w.problem.dtype,
                    "device": device.name,
                    "config": f"{config.kernel} {cfg.describe(config)}",
                    "predicted_ms": 1e3 * found.seconds,
                    "roof_ms": 1e3 * cost_model.roof(w.problem, device, precision),
                    "limiter": found.limiter,
                    "cudnn_estimate_ms": 1e3
                    * cost_model.cudnn(w.problem, pass_, device, precision),
                    "executed/useful": cfg.executed_macs(w.problem, pass_, config)
                    / w.problem.useful_macs,
                }
            )
    return pd.DataFrame(rows)


def by_kind(frame: pd.DataFrame) -> pd.DataFrame:
    """Geometric means of predicted time / roof and of the cuDNN estimate / predicted time, for each
    kind of layer and pass."""
    groups = frame.assign(
        roof=np.log(frame["predicted_ms"] / frame["roof_ms"]),
        cudnn=np.log(frame["cudnn_estimate_ms"] / frame["predicted_ms"]),
    ).groupby(["kind", "pass"], sort=False)
    table = np.exp(groups[["roof", "cudnn"]].mean()).rename(
        columns={"roof": "predicted time / roof", "cudnn": "cuDNN estimate / predicted time"}
    )
    return table.assign(rows=groups.size()).round(2).reset_index()


def measured(gpu, layers, passes, device, most: int = 10):
    """Rows with predicted and measured milliseconds of up to `most` candidates per layer and pass,
    the pick first, then spread evenly over the ranking. Kernels are compiled between the
    measurements."""
    chosen = {}
    for w, pass_ in product(layers, passes):
        ranking = cost_model.rank(w.problem, pass_, device, precision_of(w.problem))
        chosen[w, pass_] = [
            ranking[i] for i in dict.fromkeys(np.linspace(0, len(ranking) - 1, most).astype(int))
        ]
    jobs = [
        (w.problem, pass_, precision_of(w.problem), config)
        for (w, pass_), configs in chosen.items()
        for config in configs
    ]
    with gpu.compiling(jobs, device.target) as compiled:
        for (w, pass_), configs in chosen.items():
            precision = precision_of(w.problem)
            x, weight, _, dy = testing.random_tensors(w.problem, gpu.device)
            operands = [
                t.contiguous(memory_format=torch.channels_last)
                for t in {"fprop": (x, weight), "dgrad": (dy, weight), "wgrad": (dy, x)}[pass_]
            ]
            sets = [
                operands,
                *(
                    [t.clone() for t in operands]
                    for _ in range(turns(w.problem.bytes, gpu.l2_bytes) - 1)
                ),
            ]
            for config in configs:
                row = {
                    "model": w.model,
                    "layer": w.layer,
                    "kind": w.kind,
                    "pass": pass_,
                    "dtype": w.problem.dtype,
                    "config": f"{config.kernel} {cfg.describe(config)}",
                    "predicted_ms": 1e3
                    * cost_model.predict(w.problem, pass_, config, device, precision).seconds,
                    "ms": float("nan"),
                    "failure": None,
                }
                try:
                    compiled(w.problem, pass_, precision, config)
                    row["ms"] = gpu.times(
                        [PROVIDERS["tridil"].make(w.problem, pass_, *pair, config) for pair in sets]
                    )["ms"]
                # a config that cannot run is a finding, not the end
                except Exception as e:
                    row["failure"] = f"{type(e).__name__}: {e}".replace("\n", " ")[:300]
                yield row


def quality(frame: pd.DataFrame) -> pd.DataFrame:
    """For each layer and pass: Spearman's rank correlation of predicted and measured times, and
    regret: time of the pick / best measured time."""
    rows = []
    for (model, layer, kind, pass_, dtype), part in frame.groupby(
        ["model", "layer", "kind", "pass", "dtype"], sort=False
    ):
        timed = part[part["ms"].notna()]
        pick, best = part["ms"].iloc[0], timed["ms"].min()
        rows.append(
            {
                "model": model,
                "layer": layer,
                "kind": kind,
                "pass": pass_,
                "dtype": dtype,
                "timed": len(timed),
                "rank correlation": timed["predicted_ms"].rank().corr(timed["ms"].rank()),
                "regret": pick / best,
                "measured / predicted": pick / part["predicted_ms"].iloc[0],
            }
        )
    return pd.DataFrame(rows)


def run(gpu, layers, passes, device, out: Path, console) -> int:
    """Writes model.csv to `out`, of measurements row by row, and prints the tables; after Ctrl-C of
    what there is."""
    path, stopped = out / "model.csv", False
    if gpu is None:
        frame = predicted(layers, passes, device)
        frame.to_csv(path, index=False)
        lines = [NOT_MEASURED, "", by_kind(frame).to_string(index=False)]
    else:
        rows = []
        try:
            for row in measured(gpu, layers, passes, device):
                rows.append(row)
                pd.DataFrame([row]).to_csv(
                    path, mode="w" if len(rows) == 1 else "a", header=len(rows) == 1, index=False
                )
        except KeyboardInterrupt:
            stopped = True
        frame = pd.DataFrame(rows)
        lines = (
            summary(frame, device)
            if len(frame) and frame["ms"].notna().any()
            else ["nothing was measured"]
        )
    console.print(
        "\n".join(lines + ["interrupted"] * stopped), markup=False, highlight=False, soft_wrap=True
    )
    return int("failure" in frame and frame["failure"].notna().any()) or 130 * stopped


def summary(frame: pd.DataFrame, device) -> list[str]:
    """The lines of `run` with a GPU."""
    table = quality(frame)
    regret, scale = (
        np.exp(np.log(table[name]).mean()) for name in ("regret", "measured / predicted")
    )
    return [
        table.round(3).to_string(index=False),
        "",
        f"rank correlation {table['rank correlation'].median():.2f} (median), regret {regret:.3f} (geometric mean), "
        f"{table['regret'].max():.2f} (worst), measured / predicted {scale:.2f} (geometric mean), all measured on {device.name}",
    ]
