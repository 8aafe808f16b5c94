"""Suites of real layers: the rows arrive whole, and each suite is what it says."""

import csv
from importlib.resources import files

import pytest

from tridil import workloads


def test_every_row_of_the_csv_arrives():
    with files("tridil").joinpath("workloads.csv").open(encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f))
    layers = workloads.load()
    assert len(rows) == len(layers) == 297
    for row, layer in zip(rows, layers):
        p = layer.problem
        assert [row[name] for name in "NCHWKRS"] == [
            str(v) for v in (p.n, p.c, p.h, p.w, p.k, p.r, p.s)
        ]
        assert [int(row[name]) for name in ("stride_h", "stride_w", "groups")] == [
            *p.stride,
            p.groups,
        ]
        assert ((int(row["pad_h"]),) * 2, (int(row["pad_w"]),) * 2) == p.padding
        assert [int(row["dil_h"]) if p.r > 1 else 1, int(row["dil_w"]) if p.s > 1 else 1] == list(
            p.dilation
        )
        assert layer.source == row["source"] and row["source"]
        assert row["layer"] == layer.layer + (f" (x{layer.count})" if layer.count > 1 else "")


def test_count_comes_from_the_name():
    by_name = {w.name: w for w in workloads.load()}
    assert by_name["tv/deeplabv3_resnet101 backbone.layer3.1.conv2"].count == 22
    assert by_name["deeplabv2_vgg16 ASPP-L fc6_12"].count == 1
    assert by_name["mmseg/erfnet NonBottleneck1d d2 (3x1)"].count == 2
    assert len(by_name) == 297  # names identify layers


def test_dtype_and_layout_reach_the_problems():
    assert {(w.problem.dtype, w.problem.layout) for w in workloads.load("bfloat16", "nchw")} == {
        ("bfloat16", "nchw")
    }


def test_aspp_multiplies_much_padding():
    layers = [w.problem for w in workloads.suite("aspp")]
    assert len(layers) == 28
    assert all(min(p.dilation) >= 12 and p.h > 1 and p.c >= 256 for p in layers)
    assert sum(p.dense_macs for p in layers) / sum(p.useful_macs for p in layers) == pytest.approx(
        1.76, abs=0.005
    )


def test_quick_has_every_kind():
    layers = workloads.suite("quick")
    assert len(layers) == len(workloads.QUICK) == 12
    kinds = {
        "dilation beyond the map": lambda p: p.dilation[0] > p.h,
        "depthwise": lambda p: p.groups == p.c,
        "grouped": lambda p: 1 < p.groups < p.c,
        "1D": lambda p: p.h == 1,
        "narrow": lambda p: p.c < 16,
        "strided": lambda p: p.stride != (1, 1),
        "dilated ResNet": lambda p: p.groups == 1 and p.dilation == (4, 4) and p.c == p.k == 512,
        "ASPP": lambda p: p.dilation == (12, 12) and p.c == 2048,
        "odd map": lambda p: p.h == 41,
    }
    for kind, is_kind in kinds.items():
        assert any(is_kind(w.problem) for w in layers), kind


def test_suites_are_what_they_say():
    layers = {name: workloads.suite(name) for name in workloads.SUITES}
    assert all(len({w.name for w in found}) == len(found) > 0 for found in layers.values())
    assert len(layers["depthwise"]) == 88 and all(w.problem.groups > 1 for w in layers["depthwise"])
    assert all(w.problem.h == 1 for w in layers["audio1d"]) and {
        "WaveNet (r9y9)",
        "Conv-TasNet",
    } <= {w.model for w in layers["audio1d"]}
    assert set(layers["deeplab"]) < set(layers["segmentation"]) and all(
        w.problem.h > 1 for w in layers["segmentation"]
    )
    assert all(w.problem.n == 1 for w in layers["batch1"]) and len(
        {w.problem for w in layers["batch1"]}
    ) == len(layers["batch1"])
    assert [w.problem.dilation[0] for w in layers["classic"]] == [
        1,
        2,
        4,
        8,
        12,
        16,
        24,
        32,
        48,
        64,
    ]
    assert (
        len({(w.problem.n, w.problem.c, w.problem.p, w.problem.q) for w in layers["classic"]}) == 1
    )
    assert len({w.model for w in layers["training"]}) == 5


def test_all_is_everything():
    assert workloads.suite("all") == workloads.load()


def test_unknown_suite_lists_the_names():
    with pytest.raises(
        ValueError, match="unknown suite 'vision': use one of quick, aspp, deeplab, segmentation"
    ):
        workloads.suite("vision")
