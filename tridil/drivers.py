"""What can run where: the one place that knows Triton's drivers, and the targets that kernels are
compiled for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec

import torch

from . import devices
from .problem import DTYPE_BYTES, Problem

BACKENDS = ("auto", "triton", "aten")
ASSUMED = "cuda:90"  # the target of explain, sweep and aot where there is no driver
# all environment variables of the package; `clean` takes them away from whoever measures or tests
VARIABLES = {
    "TRIDIL_BACKEND": 'what backend="auto" means: auto, triton or aten',
    "TRIDIL_CACHE": "the folder of the user's measurements",
    "TRIDIL_EXPERIMENTAL": "1: kernels that no GPU has timed may run by prediction",
    "TRIDIL_TARGET": "the target that kernels and configs are for, like cuda:90",
    "TRIDIL_TUNE": "1: measure what was not measured when it is first used",
}
# PyTorch's memory formats by the names of layouts
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return find_spec("triton") is not None


def clean(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without the package's variables and without TRITON_INTERPRET."""
    return {
        name: value
        for name, value in environment.items()
        if name not in VARIABLES and name != "TRITON_INTERPRET"
    }


def interpreted() -> bool:
    """Whether Triton interprets kernels on CPU tensors (TRITON_INTERPRET=1 before the first import
    of tridil's kernels)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def _driver():
    """The active Triton driver, or the reason why there is none."""
    try:
        from triton.runtime import driver

        driver.active.get_current_target()  # the proxy creates the driver when first used
        return driver.active
    # Triton raises RuntimeError, drivers whatever their vendor's library raises
    except Exception:
        return "there is no GPU that Triton has a driver for"


def target() -> str:
    """Target the kernels are compiled for, like "cuda:90": TRIDIL_TARGET, else (interpreter)
    "cuda:80", else the active driver's, else the one that is `ASSUMED`.

    Raises ValueError when TRIDIL_TARGET is no target that Triton knows.
    """
    env = os.environ.get("TRIDIL_TARGET")
    if env:
        return check_target(env)
    if interpreted():
        return "cuda:80"
    return _driver_target()


def check_target(name: str) -> str:
    """`name`, when kernels can be compiled for it; else ValueError."""
    if name not in devices.KNOWN:
        raise ValueError(f"unknown target {name!r}: use one of {', '.join(devices.KNOWN)}")
    return name


def _driver_target() -> str:
    driver = _driver()
    if isinstance(driver, str):
        return ASSUMED
    t = driver.get_current_target()
    return f"{t.backend}:{t.arch}"


def is_assumed() -> bool:
    """Whether `target` is nobody's: no variable, no interpreter, no driver."""
    return not (os.environ.get("TRIDIL_TARGET") or interpreted() or not isinstance(_driver(), str))


def can_run(problem: Problem, device: torch.device) -> str | None:
    """None when the Triton kernels can run `problem` on tensors of `device` (a torch.device), else
    the reason."""
    return unfit(problem) or _serves(device.type)


def unfit(problem: Problem) -> str | None:
    """Why the kernels run `problem` nowhere. Under torch.compile sizes may be symbols: the
    operators ask for the geometry again."""
    return _unsupported(problem.dtype) or (
        None if torch.compiler.is_compiling() else problem.beyond_int32
    )


def _unsupported(dtype: str) -> str | None:
    return (
        None
        if dtype in DTYPE_BYTES
        else f"dtype {dtype} is not supported by the Triton kernels: use one of {', '.join(DTYPE_BYTES)}"
    )


def _serves(device_type: str) -> str | None:
    if not _has_triton():
        return "Triton is not installed: pip install triton"
    if interpreted():
        return (
            None
            if device_type == "cpu"
            else f"TRITON_INTERPRET=1 interprets kernels, for tests, on CPU tensors, got a tensor on {device_type!r}"
        )
    driver = _driver()
    if isinstance(driver, str):
        return (
            driver
            + " (TRITON_INTERPRET=1 interprets the kernels on CPU tensors: for tests of a few pixels, thousands of times slower than ATen)"
        )
    served = driver.get_active_torch_device().type
    return (
        None
        if served == device_type
        else f"the active Triton driver serves {served!r} tensors, got a tensor on {device_type!r}"
    )


# torch.compile asks it and does not trace a driver: torch.compiler.assume_constant_result without
# its import of the compiler
setattr(_serves, "_dynamo_marked_constant", True)  # noqa: B010


def choose(problem: Problem, device: torch.device, backend: str = "auto") -> str:
    """ "triton" or "aten". "auto" (TRIDIL_BACKEND overrides it) is ATen on CPU tensors and wherever
    Triton cannot run. On meta tensors ATen says the shapes, whatever is asked for.

    Raises ValueError for an unknown backend; when "triton" cannot run the problem, TypeError for
    its dtype, else NotImplementedError, with the reason.
    """
    if backend == "auto":
        backend = os.environ.get("TRIDIL_BACKEND", "auto")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "auto":
        return (
            "aten"
            if device.type == "cpu"
            or can_run(problem, device)
            or too_old(device.type, device.index)
            else "triton"
        )
    if backend == "triton":
        reason = unfit(problem) if device.type == "meta" else can_run(problem, device)
        if reason:
            error = TypeError if _unsupported(problem.dtype) else NotImplementedError
            raise error(f"backend='triton' cannot run this convolution: {reason}")
    return "aten" if device.type == "meta" else backend


def too_old(device_type: str, index: int | None) -> str | None:
    """Why "auto" leaves a GPU to ATen although the kernels run there; index is that of the tensors'
    device, which need not be the current one."""
    name = target()
    if (
        device_type == "cuda"
        and name.startswith("cuda")
        and not os.environ.get("TRIDIL_TARGET")
        and torch.cuda.is_available()
    ):
        name = "cuda:{}{}".format(*torch.cuda.get_device_capability(index))
    return (
        f"{name} has no tensor cores that the kernels use: sm_80 and later do"
        if name.startswith("cuda") and int(name[5:]) < 80
        else None
    )


setattr(too_old, "_dynamo_marked_constant", True)  # noqa: B010


def fp32_precision(target: str) -> str:
    """ "tf32" or "ieee", as torch.backends.cudnn.conv.fp32_precision (and the older allow_tf32) say;
    of AMD's GPUs only gfx942 has tf32."""
    allowed, cudnn = target.startswith("cuda") or target == "hip:gfx942", torch.backends.cudnn
    tf32 = cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "tf32" if allowed and tf32 else "ieee"
