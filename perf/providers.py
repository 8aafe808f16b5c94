"""What a sweep times, and the clock: each provider runs one pass of a convolution on the same
tensors.

Beside the names of PROVIDERS, "package.module:function" is a provider: any function with the
signature of F.conv2d, its backward through autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec

import torch
from results import output, triton_version

import tridil
from tridil import choice, clock, drivers
from tridil.aot import compiling
from tridil.problem import Problem


class Gpu:
    """The device and its clock: all that the sweep asks of hardware."""

    device = "cuda"

    def describe(self) -> tuple[str, str]:
        """(device name, driver version)."""
        return torch.cuda.get_device_name(), self._smi("driver_version") or "unknown"

    def spec(self, target: str):
        """`tridil.devices.Device`, as the driver describes it."""
        return choice.device_spec(target, torch.device(self.device))[0]

    def state(self) -> dict:
        """Clock of the SMs and temperature now; without what cannot be read."""
        values = dict(
            zip(("clock_mhz", "temperature_c"), self._smi("clocks.sm,temperature.gpu").split(", "))
        )
        return {name: float(value) for name, value in values.items() if value.strip().isdigit()}

    def _smi(self, fields: str) -> str:
        index = str(
            getattr(
                torch.cuda.get_device_properties(torch.cuda.current_device()),
                "uuid",
                torch.cuda.current_device(),
            )
        )
        return output(
            [
                "nvidia-smi",
                f"--query-gpu={fields}",
                "--format=csv,noheader,nounits",
                "-i",
                index if "-" not in index else f"GPU-{index}",
            ]
        )

    @property
    def l2_bytes(self) -> int:
        return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size

    # of the square matrices whose product and whose copy are the measured roofs
    roof_size = 8192

    def times(self, calls: list) -> dict:
        """ms, ms_q1, ms_q3: quartiles of the device's time of a call, by replays of a CUDA graph of
        all of them ("graph" in `clock`) where they can be captured, else ("events") those of
        eager_ms: the median by CUDA events around each call, host time included. Every call has its
        own tensors; they take turns."""
        _, eager_ms, _ = clock.eager(calls)
        (q1, ms, q3), how = clock.device(calls)
        return dict(ms=ms, ms_q1=q1, ms_q3=q3, eager_ms=eager_ms, clock=how)

    def compiling(self, jobs: list, target: str):
        """`tridil.aot.compiling`."""
        return compiling(jobs, target)

    def extra_bytes(self, fn) -> int:
        """Peak of allocated bytes during a call, without its result."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = fn()
        torch.cuda.synchronize()
        kept = result.numel() * result.element_size() if isinstance(result, torch.Tensor) else 0
        return torch.cuda.max_memory_allocated() - before - kept


@dataclass(frozen=True)
class Provider:
    """One thing to time. make(problem, pass_, a, b, config) gives a function that runs a pass on
    (x, w), (dy, w) or (dy, x) in `layout`; model makes a plain network run it (None: cannot);
    setting() is active around both."""

    make: Callable
    meaning: str
    version: Callable[[], str]
    model: Callable | None = None
    layout: str = "nhwc"
    missing: Callable[[], str | None] = lambda: None
    setting: Callable[[], AbstractContextManager] = nullcontext


def precision_of(problem: Problem) -> str:
    return drivers.fp32_precision(drivers.target()) if problem.dtype == "float32" else "ieee"


def _tridil(problem: Problem, pass_: str, a, b, config: dict):
    from tridil import launch

    return partial(launch.prepare(problem, pass_, config, precision_of(problem)), a, b)


def _aten(problem: Problem, pass_: str, a, b, config=None):
    """ATen's operators as autograd calls them, which choose cuDNN."""
    geometry = (
        problem.stride,
        [lo for lo, _ in problem.padding],
        problem.dilation,
        False,
        (0, 0),
        problem.groups,
    )
    if pass_ == "fprop":
        return lambda: torch.ops.aten.convolution(a, b, None, *geometry)
    mask = [pass_ == "dgrad", pass_ == "wgrad", False]
    memory_format = (
        torch.channels_last
        if a.is_contiguous(memory_format=torch.channels_last)
        else torch.contiguous_format
    )
    unread = torch.empty(
        problem.x_shape if pass_ == "dgrad" else problem.w_shape,
        dtype=a.dtype,
        device=a.device,
        memory_format=memory_format,
    )
    # only its shape and format matter
    x, w = (unread, b) if pass_ == "dgrad" else (b, unread)
    return lambda: torch.ops.aten.convolution_backward(a, x, w, None, *geometry, mask)[
        mask.index(True)
    ]


def _inductor(problem: Problem, pass_: str, a, b, config=None):
    """The same operators through torch.compile(mode="max-autotune-no-cudagraphs"); what Inductor
    has no template for it leaves to cuDNN."""
    compiled = _inductor_pass(problem, pass_)
    if pass_ == "fprop":
        return partial(compiled, a, b)
    unread = torch.empty(
        problem.x_shape if pass_ == "dgrad" else problem.w_shape,
        dtype=a.dtype,
        device=a.device,
        memory_format=torch.channels_last,
    )
    return partial(compiled, a, *((unread, b) if pass_ == "dgrad" else (b, unread)))


# the calls of a row share it
@lru_cache(maxsize=1)
def _inductor_pass(problem: Problem, pass_: str):
    geometry = (
        problem.stride,
        [lo for lo, _ in problem.padding],
        problem.dilation,
        False,
        (0, 0),
        problem.groups,
    )
    mask = [pass_ == "dgrad", pass_ == "wgrad", False]

    def fprop(x, w):
        return torch.ops.aten.convolution(x, w, None, *geometry)

    def backward(dy, x, w):
        return torch.ops.aten.convolution_backward(dy, x, w, None, *geometry, mask)[
            mask.index(True)
        ]

    # no recompilation limit over layers
    torch._dynamo.reset()
    return torch.compile(
        fprop if pass_ == "fprop" else backward, mode="max-autotune-no-cudagraphs", dynamic=False
    )


def _through_autograd(conv: Callable):
    """`make` of a function with the signature of F.conv2d."""

    def make(problem: Problem, pass_: str, a, b, config=None):
        padding = tuple(lo for lo, _ in problem.padding)
        if pass_ == "fprop":
            return lambda: conv(
                a, b, None, problem.stride, padding, problem.dilation, problem.groups
            )
        shape = problem.x_shape if pass_ == "dgrad" else problem.w_shape
        wanted = (
            torch.zeros(shape, dtype=a.dtype, device=a.device)
            .to(memory_format=torch.channels_last)
            .requires_grad_()
        )
        x, w = (wanted, b) if pass_ == "dgrad" else (b, wanted)
        y = conv(x, w, None, problem.stride, padding, problem.dilation, problem.groups)
        return lambda: torch.autograd.grad(y, wanted, a, retain_graph=True)[0]

    return make


def _peer(path: str, meaning: str) -> Provider:
    module, _, name = path.partition(":")
    top = module.partition(".")[0]

    def function():
        return getattr(import_module(module), name)

    def missing():
        if find_spec(top) is None:
            return f"{top} is not installed"
        try:
            function()
        # a peer may fail to import in any way
        except Exception as e:
            return f"{path} cannot be imported: {type(e).__name__}: {e}"
        return None

    def found_version():
        try:
            return version(packages_distributions().get(top, [top])[0])
        except PackageNotFoundError:
            return "unknown"

    return Provider(
        _through_autograd(lambda *arguments: function()(*arguments)),
        meaning,
        found_version,
        missing=missing,
    )


@contextmanager
def cudnn_search(deterministic: bool = False):
    """cuDNN's own search for its fastest algorithm, with or without those whose results vary."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = True, deterministic
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before


def _cudnn_version() -> str:
    return str(torch.backends.cudnn.version() or "none")


def _converted(model):
    tridil.convert(model)
    return model


def _compiled(model):
    return torch.compile(model, mode="max-autotune-no-cudagraphs")


def _as_it_is(model):
    return model


PROVIDERS = {
    "tridil": Provider(
        _tridil,
        "the kernels, channels_last; of models, what tridil.convert makes of them",
        lambda: tridil.__version__,
        _converted,
    ),
    "tridil_nchw": Provider(
        _tridil,
        "the kernels on contiguous tensors, copies included",
        lambda: tridil.__version__,
        _converted,
        "nchw",
    ),
    "cudnn": Provider(
        _aten,
        "what PyTorch runs for channels_last tensors, cudnn.benchmark on",
        _cudnn_version,
        _as_it_is,
        setting=cudnn_search,
    ),
    "cudnn_nchw": Provider(
        _aten,
        "the same for contiguous tensors",
        _cudnn_version,
        _as_it_is,
        "nchw",
        setting=cudnn_search,
    ),
    "cudnn_deterministic": Provider(
        _aten,
        "cudnn with cudnn.deterministic",
        _cudnn_version,
        _as_it_is,
        setting=lambda: cudnn_search(True),
    ),
    "inductor": Provider(
        _inductor, "torch.compile, max-autotune", triton_version, _compiled, setting=cudnn_search
    ),
    "flaggems": _peer("flag_gems:conv2d", "FlagGems' Triton kernels"),
}
DEFAULT = ("tridil", "cudnn", "cudnn_nchw")


def provider(name: str) -> Provider:
    """The provider of a name or of "package.module:function". Raises ValueError for another name."""
    if name in PROVIDERS:
        return PROVIDERS[name]
    if not name.replace(":", ".", 1).replace(".", "").isidentifier() or ":" not in name:
        raise ValueError(
            f"unknown provider {name!r}: use {', '.join(PROVIDERS)} or package.module:function"
        )
    return _peer(name, "a peer")


def reason_against(name: str, has_gpu: bool) -> str | None:
    """Why a provider cannot run here, or None."""
    missing = provider(name).missing
    return f"{name} needs a GPU" if not has_gpu and name != "tridil" else missing()
