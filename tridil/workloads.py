"""Layers of real models, with their provenance: what perf, the tuner and reports run on. Standard library only."""
from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from importlib.resources import files

from .problem import Problem

# about one layer per kind: dilated ResNet, ASPP (one with the dilation beyond the map, one on an odd map, one depthwise), 1D, narrow,
# depthwise, grouped, strided
QUICK = (("tv/deeplabv3_resnet50", "backbone.layer4.1.conv2"), ("tv/deeplabv3_resnet50", "classifier.0.convs.1.0"),
         ("tv/deeplabv3_resnet50", "classifier.0.convs.3.0"), ("tv/deeplabv3_mobilenet_v3_large", "classifier.0.convs.3.0"),
         ("deeplabv2_vgg16 ASPP-L", "fc6_12"), ("smp/DeepLabV3Plus_r101", "decoder.aspp.0.convs.2.0.0"),
         ("VAN-B2", "LKA conv_spatial dw7x7 d3 C320"), ("timm/resnext50_32x4d_os8", "layer3.1.conv2"), ("RegSeg exp48", "stage16 half d14 gw16"),
         ("WaveNet (r9y9)", "dilated gate conv d32"), ("ESPNet-C", "level2 ESP d4 (shared input)"),
         ("ESPNetv2", "level3_0 DownSampler EESP dw stride2 d2"))


@dataclass(frozen=True)
class Workload:
    """One layer of a model: `count` times in the model, one convolution `problem` each; source says where the sizes come from."""
    model: str
    layer: str
    count: int
    problem: Problem
    source: str

    @property
    def name(self) -> str:
        return f"{self.model} {self.layer}"

    @property
    def kind(self) -> str:
        """Class of the layer: depthwise, grouped, 1D, ASPP (rate 12 and more), narrow (at most 16 channels in or out) or dense."""
        p = self.problem
        if p.groups > 1:
            return "depthwise" if p.groups == p.c else "grouped"
        return "1D" if 1 in (p.h, p.w) else "ASPP" if _is_aspp(self) else "narrow" if min(p.c, p.k) <= 16 else "dense"


def load(dtype: str = "float16", layout: str = "nhwc") -> list[Workload]:
    """All rows of workloads.csv, in order, as problems of `dtype` and `layout`."""
    with files(__package__).joinpath("workloads.csv").open(encoding="utf-8", newline="") as f:
        return [_workload(row, dtype, layout) for row in csv.DictReader(f)]


def _workload(row: dict, dtype: str, layout: str) -> Workload:
    layer, times = re.fullmatch(r"(.*?)(?: \(x(\d+)\))?", row["layer"]).groups()
    sizes = {key: int(value) for key, value in row.items() if key not in ("model", "layer", "source")}
    n, c, h, w, k, r, s, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, groups = sizes.values()
    problem = Problem(n, c, h, w, k, r, s, (stride_h, stride_w), ((pad_h, pad_h), (pad_w, pad_w)), (dil_h, dil_w), groups, dtype, layout)
    return Workload(row["model"], layer, int(times or 1), problem, row["source"])


def _is_aspp(w: Workload) -> bool:
    """Dilation of at least 12 on both axes of a 2D map, at least 256 channels."""
    return min(w.problem.dilation) >= 12 and w.problem.h > 1 and w.problem.c >= 256


SUITES = {"quick": lambda w: (w.model, w.layer) in QUICK, "aspp": _is_aspp, "deeplab": lambda w: "deeplab" in w.model.lower(), "all": lambda w: True}


def suite(name: str, dtype: str = "float16", layout: str = "nhwc") -> list[Workload]:
    """The workloads of a suite: "quick" (12 layers, about one per kind), "aspp" (28 layers of rate 12 or more), "deeplab" (those of the DeepLabs)
    or "all" (297).

    Raises ValueError for an unknown name.
    """
    if name not in SUITES:
        raise ValueError(f"unknown suite {name!r}: use one of {', '.join(SUITES)}")
    return [w for w in load(dtype, layout) if SUITES[name](w)]
