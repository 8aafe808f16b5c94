"""Specs of GPUs against the peaks that their vendors publish."""
import pytest

from tridil import devices

# dense fp16 with fp32 accumulation, tf32, scalar fp32: TFLOP/s of the data sheets
PUBLISHED = {"NVIDIA A100": (312, 156, 19.5), "NVIDIA A10": (125, 62.5, 31.2), "NVIDIA L4": (121, 60, 30.3),
             "NVIDIA GeForce RTX 3090": (71, 35.6, 35.6),
             "NVIDIA GeForce RTX 4090": (165.2, 82.6, 82.6), "NVIDIA GeForce RTX 5090": (209.5, 104.8, 104.8),
             "NVIDIA H100 80GB HBM3": (989.4, 494.7, 61.9), "NVIDIA H100 PCIe": (756, 378, 48), "NVIDIA H200": (989.4, 494.7, 61.9),
             "NVIDIA B200": (2250, 1125, 70), "AMD Instinct MI300X": (1307.4, 653.7, 163.4)}


@pytest.mark.parametrize("device", devices.DEVICES, ids=lambda d: d.name)
def test_peaks_are_the_published_ones(device):
    per_mac = 2 * device.sms * device.clock / 1e3
    found = per_mac * device.mma_rate("float16"), per_mac * device.mma_rate("float32", "tf32"), per_mac * device.mma_rate("float32", "ieee")
    assert found == pytest.approx(PUBLISHED[device.name], rel=0.02)
    assert device.source and device.mma_rate("bfloat16") == device.mma_rate("float16") and device.mma_rate("float64") >= device.fma[1]


@pytest.mark.parametrize("name, target, expected", [
    ("NVIDIA H100 80GB HBM3", "cuda:90", "NVIDIA H100 80GB HBM3"), ("NVIDIA H100 PCIe", "cuda:90", "NVIDIA H100 PCIe"),
    ("NVIDIA H200", "cuda:90", "NVIDIA H200"), ("NVIDIA A100-SXM4-80GB", "cuda:80", "NVIDIA A100"), ("NVIDIA A10", "cuda:86", "NVIDIA A10"),
    ("NVIDIA A10G", "cuda:86", "NVIDIA GeForce RTX 3090"), ("NVIDIA L4", "cuda:89", "NVIDIA L4"),
    ("AMD Instinct MI300X", "hip:gfx942", "AMD Instinct MI300X"),
    ("NVIDIA GeForce RTX 4090", "cuda:89", "NVIDIA GeForce RTX 4090"), ("Unheard Of", "cuda:100", "NVIDIA B200")])
def test_names_that_drivers_give(name, target, expected):
    assert devices.of_name(name, target).name == expected


def test_unknown_targets_take_the_nearest_older_one():
    assert devices.of_target("cuda:87").target == "cuda:86" and devices.of_target("cuda:121").target == "cuda:120"
    assert devices.of_target("cuda:75").target == "cuda:80" and devices.of_target("hip:gfx950").target == "hip:gfx942"
