"""Ahead-of-time evidence: compile the kernels of a pass for any target, without a GPU, and read
what came out."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from threading import TIMEOUT_MAX
from typing import TYPE_CHECKING, Any

from . import config as cfg
from . import cost_model, devices, drivers, families, sass
from .branches import Branches
from .families import Config, Launch
from .families.base import triton_version
from .problem import DTYPE_BYTES, Problem

if TYPE_CHECKING:
    from triton.compiler import ASTSource, CompiledKernel

# overhead of CUTLASS 4.2's implicit GEMM convolution (BSD-3, compiled with nvcc; 3x3, fp16, C =
# 256), best of its tiles, counted the same way
CUTLASS = {
    ("fprop", "cuda:80"): 1.62,
    ("dgrad", "cuda:80"): 1.61,
    ("wgrad", "cuda:80"): 2.64,
    ("fprop", "cuda:90"): 0.45,
    ("dgrad", "cuda:90"): 0.45,
    ("fprop", "cuda:100"): 0.05,
    ("dgrad", "cuda:100"): 0.05,
    ("wgrad", "cuda:100"): 0.05,
}
LOOP = (
    "loop_instructions",
    "overhead",
    "loop_ldsm",
    "bound",
    "limiter",
    "l2_bytes_per_fma",
    "per_fma",
)
_TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}


def sources(
    problem: Problem | Branches,
    pass_: str,
    config: Config,
    target: str,
    precision: str = "tf32",
    epilogue: str = "",
) -> list[tuple[Launch, ASTSource]]:
    """[(Launch, triton's ASTSource)] of one pass, of all branches in one launch, specialised as the
    JIT specialises it; pointers are taken as 16-byte aligned.

    Raises ValueError when config does not fit, RuntimeError when Triton interprets kernels in this
    process.
    """
    from triton.compiler import ASTSource

    from . import launch  # imports Triton

    if drivers.interpreted():
        raise RuntimeError(
            "kernels cannot be compiled in a process that interprets them: unset TRITON_INTERPRET"
        )
    reason = cfg.fits(config, problem, pass_, target)
    if reason:
        raise ValueError(f"config {config} does not fit {pass_} of {problem.key()}: {reason}")
    precision = precision if problem.dtype == "float32" else "ieee"
    element, partial = _TYPES[problem.dtype], "fp64" if problem.dtype == "float64" else "fp32"
    out = []
    for item in launch.plan(problem, pass_, config, precision, epilogue):
        fn, scalars, constants = (
            launch.kernel_of(item),
            dict(item.scalars),
            dict(launch.constexprs(item.constexprs)),
        )
        tensors = {
            name: (partial if role == "partials" else element, box)
            for name, role, box in item.tensors
        }
        # written as the JIT writes them: Triton's cache is keyed by their text
        signature: dict[str, str] = {}
        attrs: dict[tuple, list] = {}
        for i, (name, parameter) in enumerate(zip(fn.arg_names, fn.params)):
            if name not in constants and name not in tensors and name not in scalars:
                constants[name] = None  # of fewer branches than there may be
            if name in constants:
                signature[name], attrs[(i,)] = "constexpr", []
            elif name in tensors:
                type_, box = tensors[name]
                if not box:
                    signature[name] = f"*{type_}"
                elif box.swizzle is None:
                    signature[name] = f"tensordesc<{type_}[{', '.join(map(str, box.block))}]>"
                else:
                    signature[name] = (
                        f"tensordesc<{type_}[{', '.join(map(str, box.block))}],{launch.shared_layout(box, int(type_[2:]))!r}>"
                    )
                if not box:
                    attrs[(i,)] = [["tt.divisibility", 16]]
            elif scalars[name] == 1 and not parameter.do_not_specialize:
                signature[name], constants[name], attrs[(i,)] = "constexpr", 1, []
            else:
                signature[name] = "i32" if -(2**31) <= scalars[name] < 2**31 else "i64"
                if not parameter.do_not_specialize:
                    divisible = (
                        scalars[name] % 16 == 0 and not parameter.do_not_specialize_on_alignment
                    )
                    attrs[(i,)] = [["tt.divisibility", 16]] if divisible else []
        constexprs = {(fn.arg_names.index(name),): value for name, value in constants.items()}
        if triton_version() < (3, 7):  # of its constexprs only strings have attributes, none
            attrs = {
                at: value for at, value in attrs.items() if isinstance(constexprs.get(at, ""), str)
            }
        out.append(
            (
                item,
                (gluon_source() if fn.is_gluon() else ASTSource)(
                    fn, signature, constexprs=constexprs, attrs=attrs
                ),
            )
        )
    return out


def gluon_source() -> type:
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def compile_source(
    source: ASTSource, options: Iterable[tuple[str, int]], target: str
) -> CompiledKernel:
    """triton's CompiledKernel of an ASTSource for `target`, like "cuda:90" or "hip:gfx942"; from
    Triton's cache when it was compiled before."""
    import triton
    from triton.backends.compiler import GPUTarget

    backend, _, arch = target.partition(":")
    gpu = GPUTarget(
        backend,
        int(arch) if backend == "cuda" else arch,
        32 if re.match(r"cuda|hip:gfx1[0-2]", target) else 64,
    )
    return triton.compile(source, target=gpu, options=dict(options))


def compile_pass(
    problem: Problem | Branches, pass_: str, config: Config, target: str, precision: str = "tf32"
) -> list[tuple[Launch, CompiledKernel]]:
    """[(Launch, triton's CompiledKernel)] of one pass, fprop with a bias. Errors as in `sources`."""
    found = sources(
        problem, pass_, config, target, precision, epilogue="bias" if pass_ == "fprop" else ""
    )
    return [(item, compile_source(source, item.options, target)) for item, source in found]


def resources(
    problem: Problem | Branches,
    pass_: str,
    config: Config | None = None,
    target: str = "cuda:90",
    precision: str = "tf32",
    save: str | Path | None = None,
    name: str = "",
) -> list[dict[str, Any]]:
    """One row per compiled kernel of a pass.

    kernel, target, config; registers per thread, spills (instructions; on AMD counted by the
    compiler), shared_bytes per program and ctas_per_sm; mma (the tensor-core opcode, or "none"),
    loads (global loads by opcode and width in bits). Of the main loop: loop_instructions, overhead,
    bound, limiter and l2_bytes_per_fma as `sass.measure` defines them, loop_ldsm (ldmatrix
    instructions), and CUTLASS's overhead beside it; None where there is no such loop, and on AMD.
    Of a direct kernel: per_fma, see `sass.per_fma`. save: a folder that keeps PTX and SASS as
    name-pass-kernel.*. Errors as in `compile_pass`.
    """
    config = config or _best(problem, pass_, target, precision)
    rows = []
    for i, (item, kernel) in enumerate(compile_pass(problem, pass_, config, target, precision)):
        if target.startswith("cuda"):
            tile = families.of(config.kernel).tile(config, pass_)
            found = _read_cubin(
                kernel, int(target[5:]), tile, config.num_warps, DTYPE_BYTES[problem.dtype]
            )
        else:
            found = _read_amdgcn(kernel.asm["amdgcn"])
        if save:
            stem = re.sub(r"[^\w.-]+", "_", f"{name}-{pass_}-{item.name}-{i}").strip("_")
            Path(save, f"{stem}.ptx" if "ptx" in kernel.asm else f"{stem}.amdgcn").write_text(
                kernel.asm["ptx" if "ptx" in kernel.asm else "amdgcn"]
            )
            if "sass" in found:
                Path(save, f"{stem}.sass").write_text(found["sass"])
        found.pop("sass", None)
        yardstick = (
            CUTLASS.get((pass_, target))
            if found["overhead"] is not None and problem.dtype == "float16"
            else None
        )
        rows.append(
            dict(
                kernel=item.name,
                target=target,
                config=cfg.to_json(config),
                **found,
                shared_bytes=kernel.metadata.shared,
                cutlass=yardstick,
            )
        )
    return rows


def report(
    jobs: Iterable[tuple[str, Problem | Branches, str]],
    target: str,
    save: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Rows of `resources` of the default kernels of (name, problem, pass) jobs, with layer, pass
    and MACs; many are compiled on all cores.

    A kernel that does not compile has a row with `failure`.
    """
    given = [(*job, target, save) for job in jobs]
    workers = _workers(given)
    if workers < 2 or len(given) < 9:  # a worker takes seconds to start
        return [row for job in given for row in _rows(job)]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return [row for rows in pool.map(_rows, given) for row in rows]


@contextmanager
def compiling(
    jobs: list[tuple[Problem, str, str, Config]], target: str
) -> Iterator[Callable[..., bool]]:
    """Fills Triton's cache with the kernels of (problem, pass, precision, config) jobs, without
    bias, in their order, in threads of this process.

    Gives `compiled(problem, pass_, precision, config, timeout=None)`: waits for a job for at most
    `timeout` seconds and says whether it is done, also of a job that it was not given. Threads work
    during such a wait only, and it ends when none does: whoever measures afterwards has the
    process, whose lock they share, for itself. What fails here fails again where it is launched. At
    the end of the context what was not begun is dropped.
    """
    # Triton and ptxas work outside of Python's lock, code generation within
    pool = ThreadPoolExecutor(_workers(jobs))
    state, is_open, is_over, running, left = (
        threading.Condition(),
        False,
        False,
        0,
        set(map(tuple, jobs)),
    )

    def work(job):
        nonlocal running
        with state:
            state.wait_for(lambda: is_open or is_over)
            if is_over:
                return
            running += 1
        try:
            _try_to_compile((*job, target))
        finally:
            with state:
                running -= 1
                left.discard(job)
                state.notify_all()

    for job in dict.fromkeys(map(tuple, jobs)):
        pool.submit(work, job)

    def compiled(problem, pass_, precision, config, timeout: float | None = None) -> bool:
        nonlocal is_open
        job = problem, pass_, precision, config
        if job not in left:
            return True
        end = time.monotonic() + min(
            TIMEOUT_MAX if timeout is None else max(timeout, 0), TIMEOUT_MAX
        )
        with state:
            is_open = True
            state.notify_all()
            state.wait_for(lambda: job not in left, end - time.monotonic())
            is_open = False
            state.wait_for(lambda: running == 0, end - time.monotonic())
        return job not in left

    try:
        yield compiled
    finally:
        with state:
            is_over = True
            state.notify_all()
        pool.shutdown(wait=False, cancel_futures=True)


def _try_to_compile(job) -> None:
    problem, pass_, precision, config, target = job
    with suppress(Exception):
        for item, source in sources(problem, pass_, config, target, precision):
            compile_source(source, item.options, target)


def _workers(jobs: list) -> int:
    return max(
        1,
        min(
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1,
            len(jobs),
        ),
    )


def _rows(job) -> list[dict]:
    name, problem, pass_, target, save = job
    head = {"layer": name, "pass": pass_}
    parts = problem.problems if isinstance(problem, Branches) else (problem,)
    tail = {
        name: sum(getattr(part, name) for part in parts) for name in ("dense_macs", "useful_macs")
    }
    try:
        precision = drivers.fp32_precision(target)
        config = _best(problem, pass_, target, precision)
        rows = resources(problem, pass_, config, target, precision, save, name)
        executed = sum(cfg.executed_macs(part, pass_, config) for part in parts)
    # ptxas and LLVM fail in many ways; the row says how
    except Exception as e:
        return [
            head
            | {
                "kernel": None,
                "target": target,
                "failure": f"{type(e).__name__}: {e}".replace("\n", " ")[:300],
            }
            | tail
        ]
    return [head | row | tail | {"executed_macs": executed} for row in rows]


def _best(problem: Problem | Branches, pass_: str, target: str, precision: str) -> Config:
    if isinstance(problem, Problem):
        return cost_model.best(problem, pass_, target, precision)
    found = cost_model.best_of_branches(problem, pass_, devices.of_target(target), precision)
    if not found:
        raise ValueError(f"no kernel joins the branches of {pass_} of {problem.key()} on {target}")
    return found[0]


def _read_cubin(kernel, arch: int, tile, warps: int, nbytes: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(kernel.asm["cubin"])
        usage, text = (
            subprocess.run(
                [_tool("cuobjdump"), flag, path], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    # warps of their own for loads and products included
    threads = re.search(r"\.reqntid (\d+)", kernel.asm["ptx"])
    row: dict[str, Any] = dict.fromkeys(LOOP) | sass.measure(text, arch, tile, warps, nbytes)
    row["registers"] = int(re.findall(r"REG:(\d+)", usage)[0])
    row["ctas_per_sm"] = sass.programs_per_sm(
        arch, row["registers"], int(threads[1]) if threads else 32 * warps, kernel.metadata.shared
    )
    return row | {"sass": text}


def _read_amdgcn(text: str) -> dict:
    mma = Counter(re.findall(r"\b(v_mfma_\w+)", text))
    number = {
        key: int(re.findall(rf"\.{key}:\s*(\d+)", text)[0])
        for key in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
    }
    return dict.fromkeys((*LOOP, "ctas_per_sm")) | dict(
        registers=number["vgpr_count"],
        spills=number["vgpr_spill_count"] + number["sgpr_spill_count"],
        mma=mma.most_common(1)[0][0] if mma else "none",
        loads=dict(Counter(re.findall(r"\b((?:global|buffer)_load_\w+)", text))),
    )


@lru_cache
def _tool(name: str) -> str:
    """A CUDA binary utility: from $CUDA_HOME, or the one that comes with Triton."""
    import triton

    home = os.environ.get("CUDA_HOME")
    options = [Path(home, "bin", name)] if home else []
    options.append(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)
    for path in options:
        if path.exists():
            return str(path)
    raise FileNotFoundError(
        f"{name} was found neither in $CUDA_HOME/bin nor in Triton's package ({options[-1]}): install the CUDA toolkit"
    )
