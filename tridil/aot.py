"""Ahead-of-time evidence: compile the kernels of a pass for any target, without a GPU, and read what came out."""
from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from functools import lru_cache
from pathlib import Path

from .problem import Problem

_POINTERS = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32", "float64": "*fp64"}
_OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)", re.M)
# SASS opcodes: tensor core (mma.sync, wgmma, tcgen05), then global loads
_MMA = re.compile(r"HMMA|DMMA|HGMMA|UTCHMMA|UTC\w*MMA")
_LOADS = re.compile(r"LDGSTS|LDG|UTMALDG")


def compile_pass(problem: Problem, pass_: str, config: dict, target: str, precision: str = "tf32") -> list:
    """[(Launch, triton's CompiledKernel)] of one pass for `target`, like "cuda:90" or "hip:gfx942"; pointers are taken as 16-byte aligned.

    Raises ValueError when config does not fit, RuntimeError when Triton interprets kernels in this process.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from . import config as cfg
    from . import dispatch, launch
    if dispatch.interpreted():
        raise RuntimeError("kernels cannot be compiled in a process that interprets them: unset TRITON_INTERPRET")
    reason = cfg.fits(config, problem, pass_, target)
    if reason:
        raise ValueError(f"config {config} does not fit {pass_} of {problem.key()}: {reason}")
    backend, _, arch = target.partition(":")
    gpu = GPUTarget(backend, int(arch) if backend == "cuda" else arch, 32 if re.match(r"cuda|hip:gfx1[0-2]", target) else 64)
    n, c, h, w = {"fprop": problem.y_shape, "dgrad": problem.x_shape, "wgrad": problem.w_shape}[pass_]
    strides = (c * h * w, 1, w * c, c) if problem.layout == "nhwc" else (c * h * w, h * w, w, 1)
    precision = precision if problem.dtype == "float32" else "ieee"
    pointer, partial = _POINTERS[problem.dtype], "*fp64" if problem.dtype == "float64" else "*fp32"
    out = []
    for item in launch.plan(problem, pass_, config, strides, precision, has_bias=pass_ == "fprop"):
        fn, scalars, constants = item.fn, dict(item.scalars), dict(launch._constexprs(item.constexprs))
        signature, attrs = {}, {}
        for i, name in enumerate(fn.arg_names):
            if name in constants:
                signature[name] = "constexpr"
            elif name.endswith("_ptr"):
                split = name == "part_ptr" or name == "dw_ptr" and config.get("SPLIT_K", 1) > 1 and item.kernel == "wgrad"
                signature[name], attrs[(i,)] = partial if split else pointer, [["tt.divisibility", 16]]
            elif scalars[name] == 1:                           # as the JIT specialises its arguments
                signature[name], constants[name] = "constexpr", 1
            else:
                signature[name] = "i32" if -2**31 <= scalars[name] < 2**31 else "i64"
                if scalars[name] % 16 == 0:
                    attrs[(i,)] = [["tt.divisibility", 16]]
        constexprs = {(fn.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(fn, signature, constexprs=constexprs, attrs=attrs)
        out.append((item, triton.compile(source, target=gpu, options=dict(item.options))))
    return out


def resources(problem: Problem, pass_: str, config: dict | None = None, target: str = "cuda:90", precision: str = "tf32") -> list[dict]:
    """One row per compiled kernel of a pass: kernel, target, config, registers, spills (instructions), shared_bytes, mma, loads.

    registers are per thread; mma names the tensor-core opcode of the machine code ("none" when there is none), loads counts global loads by
    opcode and width in bits. On AMD, spills are counted by the compiler. Errors as in `compile_pass`.
    """
    from . import config as cfg
    config = config or cfg.default(problem, pass_, target, precision)
    rows = []
    for item, kernel in compile_pass(problem, pass_, config, target, precision):
        found = _read_cubin(kernel.asm["cubin"]) if target.startswith("cuda") else _read_amdgcn(kernel.asm["amdgcn"])
        rows.append(dict(kernel=item.kernel, target=target, config=config, **found, shared_bytes=kernel.metadata.shared))
    return rows


def _read_cubin(cubin: bytes) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage, sass = (subprocess.run([_tool("cuobjdump"), flag, path], capture_output=True, text=True, check=True).stdout
                       for flag in ("-res-usage", "-sass"))
    opcodes = _OPCODE.findall(sass)
    mma = Counter(op for op in opcodes if _MMA.match(op))
    loads = Counter(f"{_LOADS.match(op)[0]}{'' if 'UTMA' in op else '.' + _width(op)}" for op in opcodes if _LOADS.match(op))
    return dict(registers=int(re.search(r"REG:(\d+)", usage)[1]), spills=sum(op.startswith(("LDL", "STL")) for op in opcodes),
                mma=mma.most_common(1)[0][0] if mma else "none", loads=dict(sorted(loads.items())))


def _width(opcode: str) -> str:
    return next((w for w in ("128", "64") if f".{w}" in opcode), "16" if ".U16" in opcode or ".S16" in opcode else "8" if ".U8" in opcode else "32")


def _read_amdgcn(text: str) -> dict:
    mma = Counter(re.findall(r"\b(v_mfma_\w+)", text))
    number = {key: int(re.search(rf"\.{key}:\s*(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")}
    return dict(registers=number["vgpr_count"], spills=number["vgpr_spill_count"] + number["sgpr_spill_count"],
                mma=mma.most_common(1)[0][0] if mma else "none", loads=dict(Counter(re.findall(r"\b((?:global|buffer)_load_\w+)", text))))


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
    raise FileNotFoundError(f"{name} was found neither in $CUDA_HOME/bin nor in Triton's package ({options[-1]}): install the CUDA toolkit")
