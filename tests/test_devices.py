"""Specs of GPUs against the peaks that their vendors publish."""
import pytest

from tridil import devices

# dense fp16 with fp32 accumulation, tf32, scalar fp32: TFLOP/s of the data sheets
PUBLISHED = {"NVIDIA A100": (312, 156, 19.5), "NVIDIA A10": (125, 62.5, 31.2), "NVIDIA L4": (121, 60, 30.3),
             "NVIDIA GeForce RTX 3090": (71, 35.6, 35.6),
             "NVIDIA GeForce RTX 4090": (165.2, 82.6, 82.6), "NVIDIA GeForce RTX 5090": (209.5, 104.8, 104.8),
             "NVIDIA H100 80GB HBM3": (989.4, 494.7, 61.9), "NVIDIA H100 PCIe": (756, 378, 48), "NVIDIA H200": (989.4, 494.7, 61.9),
             "NVIDIA B200": (2250, 1125, 70), "AMD Instinct MI300X": (1307.4, 653.7, 163.4),
             # one die of the two (362.1 and 90.5 or 383 and 95.7 TFLOP/s of both); no tf32, and float32 runs on matrix cores
             "AMD Instinct MI250": (181, 45.3, 45.3), "AMD Instinct MI250X": (191.5, 47.9, 47.9), "AMD Instinct MI100": (184.6, 46.1, 46.1)}


@pytest.mark.parametrize("device", devices.DEVICES, ids=lambda d: d.name)
def test_peaks_are_the_published_ones(device):
    per_mac = 2 * device.sms * device.clock / 1e3
    found = per_mac * device.mma_rate("float16"), per_mac * device.mma_rate("float32", "tf32"), per_mac * device.mma_rate("float32", "ieee")
    assert found == pytest.approx(PUBLISHED[device.name], rel=0.02)
    assert device.source and device.mma_rate("float64") >= device.fma[1] and device.limits[1] <= device.limits[0]
    bfloat16 = 92.3 if device.name == "AMD Instinct MI100" else PUBLISHED[device.name][0]
    assert per_mac * device.mma_rate("bfloat16") == pytest.approx(bfloat16, rel=0.02)


@pytest.mark.parametrize("name, target, expected", [
    ("NVIDIA H100 80GB HBM3", "cuda:90", "NVIDIA H100 80GB HBM3"), ("NVIDIA H100 PCIe", "cuda:90", "NVIDIA H100 PCIe"),
    ("NVIDIA H200", "cuda:90", "NVIDIA H200"), ("NVIDIA A100-SXM4-80GB", "cuda:80", "NVIDIA A100"), ("NVIDIA A10", "cuda:86", "NVIDIA A10"),
    ("NVIDIA A10G", "cuda:86", "NVIDIA GeForce RTX 3090"), ("NVIDIA L4", "cuda:89", "NVIDIA L4"),
    ("AMD Instinct MI300X", "hip:gfx942", "AMD Instinct MI300X"), ("AMD Instinct MI250X", "hip:gfx90a", "AMD Instinct MI250X"),
    ("AMD Instinct MI210", "hip:gfx90a", "AMD Instinct MI250"), ("AMD Instinct MI100", "hip:gfx908", "AMD Instinct MI100"),
    ("NVIDIA GeForce RTX 4090", "cuda:89", "NVIDIA GeForce RTX 4090"), ("Unheard Of", "cuda:100", "NVIDIA B200")])
def test_names_that_drivers_give(name, target, expected):
    assert devices.of_name(name, target).name == expected


def test_unknown_targets_take_the_nearest_older_one():
    assert devices.of_target("cuda:87").target == "cuda:86" and devices.of_target("cuda:121").target == "cuda:120"
    assert devices.of_target("cuda:75").target == "cuda:80" and devices.of_target("hip:gfx950").target == "hip:gfx942"
    older = {"hip:gfx906": "hip:gfx908", "hip:gfx90c": "hip:gfx90a", "hip:gfx941": "hip:gfx90a", "hip:gfx1100": "hip:gfx942",
             "hip:gfx9_4_generic": "hip:gfx942"}
    assert {target: devices.of_target(target).target for target in older} == older and devices.of_target("cuda:103").target == "cuda:100"
