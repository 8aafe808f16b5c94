"""Specs of GPUs: what the tile rules and the cost model know of hardware. Figures are the vendors',
dense (no sparsity), or marked as assumed."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any


@dataclass(frozen=True)
class Device:
    """One GPU model. Rates are per SM (AMD: compute unit) and clock.

    clock: GHz at which the published tensor peak is reached. mma: dense multiply-accumulates of
    float16 and bfloat16, of tf32, of float64 on matrix units with accumulation in fp32 (fp64). fma:
    multiply-accumulates in (float32, float64) of the scalar pipes; AMD's matrix cores take float32
    as it is, theirs is that rate. l2_clock: bytes from L2. dram: 10^9 bytes/s. l2: MiB. bfloat16:
    its rate over that of float16.
    """

    name: str
    target: str
    sms: int
    clock: float
    mma: tuple[int, int, int]
    fma: tuple[int, int]
    l2_clock: float
    l2: float
    dram: float
    source: str
    bfloat16: float = 1

    @property
    def limits(self) -> tuple[int, int, int, int]:
        """(shared memory of an SM, shared memory of a program, threads, programs): CUDA C++
        programming guide, "Technical specifications per compute capability"; AMD CDNA ISA guides.
        """
        return _LIMITS[_nearest(self.target, _LIMITS)]

    def mma_rate(self, dtype: str, precision: str = "tf32") -> int:
        """Multiply-accumulates per SM and clock of a tile product of `dtype`: on matrix units, or
        (ieee float32) on the scalar pipes."""
        if dtype == "float32":
            return self.mma[1] if precision == "tf32" and self.mma[1] else self.fma[0]
        if dtype == "float64":
            return max(self.mma[2], self.fma[1])
        return int(self.mma[0] * (self.bfloat16 if dtype == "bfloat16" else 1))

    def has_tensor_cores(self, dtype: str, precision: str = "tf32") -> bool:
        """Whether `mma_rate` is that of matrix units."""
        if dtype == "float32":
            return precision == "tf32" and self.mma[1] > 0
        return dtype != "float64" or self.mma[2] > self.fma[1]


# targets that Triton compiles for and the kernels are written for
KNOWN = (
    *(f"cuda:{arch}" for arch in (80, 86, 87, 89, 90, 100, 103, 110, 120, 121)),
    *(f"hip:gfx{arch}" for arch in ("908", "90a", "942", "950", "1100", "1101", "1200", "1201")),
)
_LIMITS = {
    "cuda:80": (167936, 166912, 2048, 32),
    "cuda:86": (102400, 101376, 1536, 16),
    "cuda:87": (167936, 166912, 1536, 16),
    "cuda:89": (102400, 101376, 1536, 24),
    "cuda:90": (233472, 232448, 2048, 32),
    "cuda:100": (233472, 232448, 2048, 32),
    "cuda:110": (233472, 232448, 1536, 24),
    "cuda:120": (102400, 101376, 1536, 24),
    "hip:gfx942": (65536, 65536, 2048, 32),
    "hip:gfx90a": (65536, 65536, 2048, 32),
    "hip:gfx908": (65536, 65536, 2560, 32),
}

# the first device of a target stands for it where no GPU is present. l2_clock: A100 from its
# whitepaper (5120 bytes per clock), MI300X from the CDNA3 whitepaper (2 KiB per clock and die),
# MI250 and MI100 from theirs (128 bytes of each of 32 channels), the others assumed. H100's clock
# is that of its published tensor peak. An MI250 is two of the dies listed here, each a device of
# its own
_AMPERE = (
    "NVIDIA A100 Tensor Core GPU Architecture whitepaper v1.0, tables 1 to 4; A100 80GB datasheet"
)
_GA102 = "NVIDIA Ampere GA102 GPU Architecture whitepaper v2.1, tables 2 and 9"
_ADA = "NVIDIA Ada GPU Architecture whitepaper v2.1, appendix A"
_CDNA2 = "AMD CDNA 2 Architecture whitepaper; AMD Instinct MI200 series data sheet, half of what it says of both dies"
_HOPPER = "NVIDIA H100 Tensor Core GPU Architecture whitepaper v1.04, tables 1 to 3"
DEVICES = (
    Device("NVIDIA A100", "cuda:80", 108, 1.41, (1024, 512, 64), (64, 32), 47.4, 40, 2039, _AMPERE),
    Device(
        "NVIDIA GeForce RTX 3090", "cuda:86", 82, 1.695, (256, 128, 0), (128, 2), 24, 6, 936, _GA102
    ),
    Device(
        "NVIDIA A10",
        "cuda:86",
        72,
        1.695,
        (512, 256, 0),
        (128, 2),
        24,
        6,
        600,
        "NVIDIA A10 datasheet; " + _GA102,
    ),
    Device(
        "NVIDIA GeForce RTX 4090", "cuda:89", 128, 2.52, (256, 128, 0), (128, 2), 24, 72, 1008, _ADA
    ),
    Device(
        "NVIDIA L4",
        "cuda:89",
        58,
        2.04,
        (512, 256, 0),
        (128, 2),
        24,
        48,
        300,
        "NVIDIA L4 datasheet; " + _ADA,
    ),
    Device(
        "NVIDIA H100 80GB HBM3",
        "cuda:90",
        132,
        1.83,
        (2048, 1024, 128),
        (128, 64),
        64,
        50,
        3352,
        _HOPPER,
    ),
    Device(
        "NVIDIA H100 PCIe",
        "cuda:90",
        114,
        1.62,
        (2048, 1024, 128),
        (128, 64),
        64,
        50,
        2039,
        _HOPPER,
    ),
    Device(
        "NVIDIA H200",
        "cuda:90",
        132,
        1.83,
        (2048, 1024, 128),
        (128, 64),
        64,
        50,
        4800,
        "NVIDIA H200 datasheet; " + _HOPPER,
    ),
    Device(
        "NVIDIA B200",
        "cuda:100",
        148,
        1.86,
        (4096, 2048, 64),
        (128, 64),
        96,
        126,
        7700,
        "NVIDIA HGX B200 datasheet (2.25 PFLOP/s dense fp16)",
    ),
    Device(
        "NVIDIA GeForce RTX 5090",
        "cuda:120",
        170,
        2.407,
        (256, 128, 0),
        (128, 2),
        24,
        96,
        1792,
        "NVIDIA RTX Blackwell GPU Architecture whitepaper v1.1, appendix A",
    ),
    Device(
        "AMD Instinct MI300X",
        "hip:gfx942",
        304,
        2.1,
        (1024, 512, 128),
        (128, 64),
        53.9,
        32,
        5300,
        "AMD Instinct MI300X data sheet; AMD CDNA 3 Architecture whitepaper",
    ),
    Device(
        "AMD Instinct MI250",
        "hip:gfx90a",
        104,
        1.7,
        (512, 0, 128),
        (128, 64),
        39.4,
        8,
        1638,
        _CDNA2,
    ),
    Device(
        "AMD Instinct MI250X",
        "hip:gfx90a",
        110,
        1.7,
        (512, 0, 128),
        (128, 64),
        37.2,
        8,
        1638,
        _CDNA2,
    ),
    Device(
        "AMD Instinct MI100",
        "hip:gfx908",
        120,
        1.502,
        (512, 0, 0),
        (128, 32),
        34.1,
        8,
        1229,
        "AMD Instinct MI100 data sheet; AMD CDNA Architecture whitepaper",
        bfloat16=0.5,
    ),
)
TARGETS: dict[str, Device] = {}
for _device in DEVICES:
    TARGETS.setdefault(_device.target, _device)


def _nearest(target: str, known) -> str:
    """`target`, when it is known; else the nearest older one of the vendor, else its oldest."""
    if target in known:
        return target
    vendor, _, arch = target.partition(":")
    found = sorted(
        (_age(name.partition(":")[2]), name) for name in known if name.startswith(vendor)
    )
    return max((item for item in found if item[0] <= _age(arch)), default=found[0])[1]


def _age(arch: str) -> int:
    """What orders the architectures of a vendor: the number in "90" or, hexadecimal, in "gfx90a"; a
    name without one counts as the newest."""
    try:
        # two or three digits of cuda keep their order
        return int(arch.removeprefix("gfx"), 16)
    except ValueError:
        return 2**32


@lru_cache(maxsize=256)
def of_target(target: str) -> Device:
    """The device that stands for a target; for an unknown target the figures of the nearest older
    one of the vendor."""
    device = TARGETS[_nearest(target, TARGETS)]
    return device if device.target == target else replace(device, target=target)


@lru_cache(maxsize=256)
def of_name(name: str, target: str) -> Device:
    """The device that a driver calls `name`; the one that stands for its target when there is no
    such entry."""

    def words(text):
        return set(re.sub(r"[^a-z0-9]+", " ", text.lower()).split())

    found = [d for d in DEVICES if d.target == target and words(d.name) <= words(name)]
    return found[0] if found else of_target(target)


def of_properties(properties: Any, target: str) -> Device:
    """The device that `torch.cuda.get_device_properties` describes: SMs, L2 and DRAM bandwidth
    (twice the memory's clock times the width of its bus) are its own, the other figures those of
    `of_name`. The slices of a GPU (MIG) share its memory as they share its L2."""
    device = of_name(properties.name, target)
    l2, khz, bits = (
        getattr(properties, name, 0) or 0
        for name in ("L2_cache_size", "memory_clock_rate", "memory_bus_width")
    )
    l2, dram = l2 / 2**20 or device.l2, 2 * khz * bits / 8e6 or device.dram
    if " MIG " in properties.name:
        dram *= min(1.0, l2 / device.l2)
    return replace(device, sms=properties.multi_processor_count, l2=l2, dram=dram)
