"""Specs of GPUs against the peaks that their vendors publish."""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest

from tridil import config, cost_model, devices, workloads
from tridil.problem import PASSES

# dense fp16 with fp32 accumulation, tf32, scalar fp32: TFLOP/s of the data sheets
PUBLISHED = {
    "NVIDIA A100": (312, 156, 19.5),
    "NVIDIA A10": (125, 62.5, 31.2),
    "NVIDIA L4": (121, 60, 30.3),
    "NVIDIA GeForce RTX 3090": (71, 35.6, 35.6),
    "NVIDIA GeForce RTX 4090": (165.2, 82.6, 82.6),
    "NVIDIA GeForce RTX 5090": (209.5, 104.8, 104.8),
    "NVIDIA H100 80GB HBM3": (989.4, 494.7, 61.9),
    "NVIDIA H100 PCIe": (756, 378, 48),
    "NVIDIA H200": (989.4, 494.7, 61.9),
    "NVIDIA B200": (2250, 1125, 70),
    "AMD Instinct MI300X": (1307.4, 653.7, 163.4),
    # one die of the two (362.1 and 90.5 or 383 and 95.7 TFLOP/s of both); no tf32, and
    # float32 runs on matrix cores
    "AMD Instinct MI250": (181, 45.3, 45.3),
    "AMD Instinct MI250X": (191.5, 47.9, 47.9),
    "AMD Instinct MI100": (184.6, 46.1, 46.1),
}


@pytest.mark.parametrize("device", devices.DEVICES, ids=lambda d: d.name)
def test_peaks_are_the_published_ones(device):
    per_mac = 2 * device.sms * device.clock / 1e3
    found = (
        per_mac * device.mma_rate("float16"),
        per_mac * device.mma_rate("float32", "tf32"),
        per_mac * device.mma_rate("float32", "ieee"),
    )
    assert found == pytest.approx(PUBLISHED[device.name], rel=0.02)
    assert (
        device.source
        and device.mma_rate("float64") >= device.fma[1]
        and device.limits[1] <= device.limits[0]
    )
    bfloat16 = 92.3 if device.name == "AMD Instinct MI100" else PUBLISHED[device.name][0]
    assert per_mac * device.mma_rate("bfloat16") == pytest.approx(bfloat16, rel=0.02)


@pytest.mark.parametrize(
    "name, target, expected",
    [
        ("NVIDIA H100 80GB HBM3", "cuda:90", "NVIDIA H100 80GB HBM3"),
        ("NVIDIA H100 PCIe", "cuda:90", "NVIDIA H100 PCIe"),
        ("NVIDIA H200", "cuda:90", "NVIDIA H200"),
        ("NVIDIA A100-SXM4-80GB", "cuda:80", "NVIDIA A100"),
        ("NVIDIA A10", "cuda:86", "NVIDIA A10"),
        ("NVIDIA A10G", "cuda:86", "NVIDIA GeForce RTX 3090"),
        ("NVIDIA L4", "cuda:89", "NVIDIA L4"),
        ("AMD Instinct MI300X", "hip:gfx942", "AMD Instinct MI300X"),
        ("AMD Instinct MI250X", "hip:gfx90a", "AMD Instinct MI250X"),
        ("AMD Instinct MI210", "hip:gfx90a", "AMD Instinct MI250"),
        ("AMD Instinct MI100", "hip:gfx908", "AMD Instinct MI100"),
        ("NVIDIA GeForce RTX 4090", "cuda:89", "NVIDIA GeForce RTX 4090"),
        ("Unheard Of", "cuda:100", "NVIDIA B200"),
    ],
)
def test_names_that_drivers_give(name, target, expected):
    assert devices.of_name(name, target).name == expected


@pytest.mark.parametrize(
    "name, change, sms, l2, dram",
    [
        ("NVIDIA H100 80GB HBM3", {}, 132, 50, 3352),
        (
            "NVIDIA H100 PCIe",
            dict(multi_processor_count=114, memory_clock_rate=1593000),
            114,
            50,
            2039,
        ),
        (
            "NVIDIA H20",
            dict(
                multi_processor_count=78,
                L2_cache_size=60 * 2**20,
                memory_clock_rate=3201000,
                memory_bus_width=5120,
            ),
            78,
            60,
            4097,
        ),
        (
            "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
            dict(multi_processor_count=16, L2_cache_size=25 * 2**18),
            16,
            6.25,
            419,
        ),
        ("NVIDIA H200", dict(L2_cache_size=60 * 2**20, memory_clock_rate=0), 132, 60, 4800),
    ],
)
def test_what_the_driver_says_of_a_device(name, change, sms, l2, dram):
    """Slices, unknown and cut-down models have SMs, L2 and memory of their own."""
    properties = SimpleNamespace(
        **dict(
            name=name,
            multi_processor_count=132,
            L2_cache_size=50 * 2**20,
            memory_clock_rate=2619000,
            memory_bus_width=5120,
        )
        | change
    )
    found = devices.of_properties(properties, "cuda:90")
    assert (
        (found.sms, found.l2) == (sms, l2)
        and found.dram == pytest.approx(dram, rel=0.01)
        and found.target == "cuda:90"
    )
    assert (
        devices.of_properties(SimpleNamespace(name=name, multi_processor_count=7), "cuda:90").sms
        == 7
    ), "older PyTorch says less"


@pytest.mark.parametrize(
    "target, like",
    [
        ("cuda:87", "cuda:86"),
        ("cuda:103", "cuda:100"),
        ("cuda:110", "cuda:100"),
        ("cuda:121", "cuda:120"),
    ],
)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_picks_for_a_target_without_a_spec_are_its_own(target, like, dtype):
    """The spec that stands in is only for the model: what it would run must not be what the target
    cannot."""
    device = devices.of_target(target)
    assert device.target == target and replace(device, target=like) == devices.of_target(like)
    layers = [replace(w.problem, dtype=dtype) for w in workloads.suite("quick")]
    for problem, pass_ in product(layers, PASSES):
        assert config.fits(cost_model.best(problem, pass_, target), problem, pass_, target) is None
        assert all(
            config.fits(c, problem, pass_, target) is None
            for c in config.candidates(problem, pass_, target)
        )


def test_unknown_targets_take_the_nearest_older_one():
    for target, name in (
        ("cuda:87", "NVIDIA GeForce RTX 3090"),
        ("cuda:121", "NVIDIA GeForce RTX 5090"),
        ("cuda:75", "NVIDIA A100"),
        ("hip:gfx950", "AMD Instinct MI300X"),
    ):
        assert devices.of_target(target).name == name and devices.of_target(target).limits
    older = {
        "hip:gfx906": "AMD Instinct MI100",
        "hip:gfx90c": "AMD Instinct MI250",
        "hip:gfx941": "AMD Instinct MI250",
        "hip:gfx1100": "AMD Instinct MI300X",
        "hip:gfx9_4_generic": "AMD Instinct MI300X",
    }
    assert {target: devices.of_target(target).name for target in older} == older and all(
        devices.of_target(target).limits for target in older
    )
