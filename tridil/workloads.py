"""Layers of real models, with their provenance: what perf, the tuner and reports run on. Standard
library only."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.resources import files

from .branches import Branches
from .problem import Problem

# about one layer per kind: dilated ResNet, ASPP (one with the dilation beyond the map, one on an
# odd map, one depthwise), 1D, narrow, depthwise, grouped, strided
QUICK = (
    ("tv/deeplabv3_resnet50", "backbone.layer4.1.conv2"),
    ("tv/deeplabv3_resnet50", "classifier.0.convs.1.0"),
    ("tv/deeplabv3_resnet50", "classifier.0.convs.3.0"),
    ("tv/deeplabv3_mobilenet_v3_large", "classifier.0.convs.3.0"),
    ("deeplabv2_vgg16 ASPP-L", "fc6_12"),
    ("smp/DeepLabV3Plus_r101", "decoder.aspp.0.convs.2.0.0"),
    ("VAN-B2", "LKA conv_spatial dw7x7 d3 C320"),
    ("timm/resnext50_32x4d_os8", "layer3.1.conv2"),
    ("RegSeg exp48", "stage16 half d14 gw16"),
    ("WaveNet (r9y9)", "dilated gate conv d32"),
    ("ESPNet-C", "level2 ESP d4 (shared input)"),
    ("ESPNetv2", "level3_0 DownSampler EESP dw stride2 d2"),
)


@dataclass(frozen=True)
class Workload:
    """One layer of a model: `count` times in the model, one convolution `problem` each; source says
    where the sizes come from."""

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
        """Class of the layer: depthwise, grouped, 1D, ASPP (rate 12 and more), narrow (at most 16
        channels in or out) or dense."""
        p = self.problem
        if p.groups > 1:
            return "depthwise" if p.groups == p.c else "grouped"
        return (
            "1D"
            if 1 in (p.h, p.w)
            else "ASPP"
            if _is_aspp(self)
            else "narrow"
            if min(p.c, p.k) <= 16
            else "dense"
        )


def load(dtype: str = "float16", layout: str = "nhwc") -> list[Workload]:
    """All rows of workloads.csv, in order, as problems of `dtype` and `layout`."""
    text = files(__package__).joinpath("workloads.csv").read_text(encoding="utf-8")
    return [_workload(row, dtype, layout) for row in csv.DictReader(text.splitlines())]


def _workload(row: dict, dtype: str, layout: str) -> Workload:
    ((layer, times),) = re.findall(r"^(.*?)(?: \(x(\d+)\))?$", row["layer"])
    sizes = {
        key: int(value) for key, value in row.items() if key not in ("model", "layer", "source")
    }
    n, c, h, w, k, r, s, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, groups = sizes.values()
    problem = Problem(
        n,
        c,
        h,
        w,
        k,
        r,
        s,
        (stride_h, stride_w),
        ((pad_h, pad_h), (pad_w, pad_w)),
        (dil_h, dil_w),
        groups,
        dtype,
        layout,
    )
    return Workload(row["model"], layer, int(times or 1), problem, row["source"])


def _transposed(
    model, layer, n, c, k, size, taps, stride, padding, source, dtype, layout
) -> Workload:
    """A transposed layer as the convolution of its result."""
    dims = 1 if size[0] == 1 else 2
    strides, pads = ((1, stride), (0, padding)) if dims == 1 else ((stride,) * 2, (padding,) * 2)
    h, w = (
        (one - 1) * step - 2 * pad + tap for one, step, pad, tap in zip(size, strides, pads, taps)
    )
    sides = (pads[0], pads[0]), (pads[1], pads[1])
    problem = Problem(n, k, h, w, c, taps[0], taps[1], strides, sides, (1, 1), 1, dtype, layout)
    return Workload(model, layer, 1, problem, source)


def _is_aspp(w: Workload) -> bool:
    """Dilation of at least 12 on both axes of a 2D map, at least 256 channels."""
    return min(w.problem.dilation) >= 12 and w.problem.h > 1 and w.problem.c >= 256


_SEGMENTATION = re.compile(
    r"tv/|smp/|mmseg/|deeplab|D-LinkNet|DinkNet|ESPNet|DRN|HDC|RegSeg|VAN-B2 seg|U2Net|repro pytorch#15054",
    re.IGNORECASE,
)
# the networks that perf/models.py builds whole
_TRAINED = (
    "tv/deeplabv3_resnet50",
    "tv/deeplabv3_resnet101",
    "smp/DeepLabV3Plus_r101",
    "VAN-B2",
    "WaveNet (r9y9)",
)
# transposed layers: (model, layer, images, channels in and out, height and width of the input, taps,
# stride, padding, source)
_TRANSPOSED = (
    *(
        ("U-Net", f"up {c}", 4, c, c // 2, (size, size), (2, 2), 2, 0, "arXiv:1505.04597, figure 1, padded maps of 512x512")
        for c, size in ((1024, 32), (512, 64), (256, 128), (128, 256))
    ),
    *(
        ("DCGAN", f"{c}->{k}", 128, c, k, (size, size), (4, 4), 2, 1, "arXiv:1511.06434, figure 1; 4x4 taps as in pytorch/examples dcgan")
        for c, k, size in ((1024, 512, 4), (512, 256, 8), (256, 128, 16), (128, 3, 32))
    ),
    *(
        ("HiFi-GAN V1", f"up {s}, {c}->{c // 2}", 16, c, c // 2, (1, length), (1, 2 * s), s, s // 2, "arXiv:2010.05646, table of V1; segments of 8192 samples")
        for c, s, length in ((512, 8, 32), (256, 8, 256), (128, 2, 2048), (64, 2, 4096))
    ),
    *(
        ("EnCodec 24 kHz decoder", f"up {s}, {c}->{c // 2}", 8, c, c // 2, (1, length), (1, 2 * s), s, 0, "arXiv:2210.13438, section 3.1: strides 8, 5, 4, 2, twice as many taps; one second")
        for c, s, length in ((512, 8, 75), (256, 5, 600), (128, 4, 3000), (64, 2, 12000))
    ),
)  # fmt: skip
DILATIONS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
SUITES: dict[str, Callable[[Workload], object]] = {
    "quick": lambda w: (w.model, w.layer) in QUICK,
    "aspp": _is_aspp,
    "deeplab": lambda w: "deeplab" in w.model.lower(),
    "segmentation": lambda w: _SEGMENTATION.search(w.model),
    "depthwise": lambda w: w.kind in ("depthwise", "grouped"),
    "audio1d": lambda w: w.problem.h == 1,
    "training": lambda w: w.model in _TRAINED,
    "all": lambda w: True,
    "classic": lambda w: False,
    "transposed": lambda w: False,
    "batch1": lambda w: "deeplab" in w.model.lower() or (w.model, w.layer) in QUICK,
}


def suite(name: str, dtype: str = "float16", layout: str = "nhwc") -> list[Workload]:
    """The workloads of a suite: "quick" (12 layers, about one per kind), "aspp" (28 layers of rate
    12 or more), "deeplab" (those of the DeepLabs), "segmentation" (of all networks for it),
    "depthwise" (88 depthwise and grouped layers), "audio1d" (sequences), "training" (the dilated
    layers of the networks in perf/models.py, at their training batch), "batch1" (quick and deeplab,
    one image each), "classic" (made up: 3x3, 256 channels on 64x64, dilation 1 to 64), "transposed" (16
    upsampling layers, each as the convolution that it transposes: its dgrad is the layer's forward
    pass) or "all" (297).

    Raises ValueError for an unknown name.
    """
    if name not in SUITES:
        raise ValueError(f"unknown suite {name!r}: use one of {', '.join(SUITES)}")
    if name == "classic":
        return [
            Workload(
                "classic",
                f"3x3 d{d}",
                1,
                Problem(
                    8, 256, 64, 64, 256, 3, 3, (1, 1), ((d, d), (d, d)), (d, d), 1, dtype, layout
                ),
                "made up: only the dilation changes",
            )
            for d in DILATIONS
        ]
    if name == "transposed":
        return [_transposed(*row, dtype, layout) for row in _TRANSPOSED]
    chosen = [w for w in load(dtype, layout) if SUITES[name](w)]
    if name == "batch1":
        chosen = [
            replace(w, layer=f"{w.layer} (batch 1)", problem=replace(w.problem, n=1))
            for w in chosen
        ]
        # the first of equal ones
        chosen = list({w.problem: w for w in reversed(chosen)}.values())[::-1]
    return chosen


# parallel branches of the workloads: (model, beginning of the layers' names, whether they share
# their input, whether a 1x1 convolution runs beside them)
_PARALLEL = (
    ("tv/deeplabv3_resnet50", "classifier.0.convs", True, True),
    ("smp/DeepLabV3_r50", "decoder.aspp.convs", True, True),
    ("mmseg/deeplabv3_r50-d8", "decode_head.aspp", True, True),
    ("deeplab-os16 ASPP (paper rates)", "aspp", True, True),
    ("deeplabv2_vgg16 ASPP-L", "fc6", True, False),
    ("ESPNet-C", "level2 ESP", True, False),
    ("ESPNet-C", "level3 ESP", True, False),
    ("RegSeg exp49", "stage16 quarter", False, False),
    ("smp/DeepLabV3Plus_r101", "decoder.aspp.0.convs", True, False),
    ("timm/mixnet_l_os8", "blocks.5.0", False, False),
    ("ESPNetv2", "level3_0 DownSampler", True, False),
)


def branches(dtype: str = "float16", layout: str = "nhwc") -> dict[str, Branches]:
    """Sets of parallel branches of the workloads by name: the ASPP of five DeepLabs, ESPNet's narrow
    ones, RegSeg's per-group dilation, three depthwise sets: DeepLabV3+'s, MixNet's and ESPNetv2's of
    stride 2, and the 1x1 convolutions that follow DeepLabV3+'s."""
    found = {}
    for model, layer, shared, has_1x1 in _PARALLEL:
        problems = [
            w.problem for w in load(dtype, layout) if w.model == model and w.layer.startswith(layer)
        ]
        if has_1x1:
            first = problems[0]
            problems.append(replace(first, r=1, s=1, padding=((0, 0), (0, 0)), dilation=(1, 1)))
        found[f"{model} {layer}"] = Branches(tuple(problems), shared)
    name = "smp/DeepLabV3Plus_r101 decoder.aspp.0.convs"
    one = replace(
        found[name].first, k=256, r=1, s=1, padding=((0, 0), (0, 0)), dilation=(1, 1), groups=1
    )
    found[f"{name} pointwise"] = Branches((one,) * len(found[name].problems), shared_input=False)
    return found
