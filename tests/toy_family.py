"""A kernel family that a test registers: 1x1 convolutions alone, as one product of matrices."""

from dataclasses import dataclass

import numpy as np
import triton
import triton.language as tl

from tridil.families import Config, Family, Launch, Prediction


@triton.jit
def matmul(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    M,
    K,
    C,
    EPILOGUE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y (M, K) = x (M, C) @ w (K, C).T + bias; TRANSPOSED: w is (C, K)."""
    m, k = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        x = tl.load(
            x_ptr + m[:, None] * C + c[None, :], mask=(m < M)[:, None] & (c < C)[None, :], other=0.0
        )
        w = tl.load(
            w_ptr + (c[:, None] * K + k[None, :] if TRANSPOSED else k[None, :] * C + c[:, None]),
            mask=(c < C)[:, None] & (k < K)[None, :],
            other=0.0,
        )
        acc = tl.dot(x, w, acc)
    if EPILOGUE == "bias":
        acc += tl.load(bias_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y_ptr + m[:, None] * K + k[None, :],
        acc.to(y_ptr.dtype.element_ty),
        mask=(m < M)[:, None] & (k < K)[None, :],
    )


@dataclass(frozen=True)
class Tile(Config):
    BLOCK_M: int
    BLOCK_K: int
    BLOCK_C: int


class Pointwise(Family):
    kernels = ("pointwise",)

    def config_class(self, pass_):
        return Tile

    def fits(self, config, problem, pass_, target):
        is_meant = (
            problem.r == problem.s == 1
            and problem.stride == (1, 1)
            and problem.padding == ((0, 0), (0, 0))
            and problem.groups == 1
        )
        if (
            pass_ == "wgrad"
            or not is_meant
            or problem.layout != "nhwc"
            or problem.dtype != "float16"
        ):
            return "pointwise is for fprop and dgrad of plain 1x1 layers, channels_last, in float16"
        return (
            None
            if config.BLOCK_K >= self.sides(problem, pass_)[1]
            else f"BLOCK_K={config.BLOCK_K} is less than the output channels"
        )

    def sides(self, p, pass_):
        """(M, output channels, reduced channels)"""
        return (p.n * p.h * p.w, p.k, p.c) if pass_ == "fprop" else (p.n * p.h * p.w, p.c, p.k)

    def options(self, problem, pass_, target, precision):
        config = Tile(
            kernel="pointwise",
            SPLIT_K=1,
            num_warps=4,
            num_stages=2,
            maxnreg=None,
            BLOCK_M=32,
            BLOCK_K=32,
            BLOCK_C=16,
        )
        return [config] if self.fits(config, problem, pass_, target) is None else []

    def seconds(self, problem, pass_, configs, device, precision):
        return np.full(len(configs), 1e-9)

    def predict(self, problem, pass_, config, device, precision):
        return Prediction(1e-9, "nothing", {"launches": 1e-9})

    def why(self, problem, pass_, config, device, precision):
        return "a toy that claims to be fast"

    def tile(self, config, pass_):
        return config.BLOCK_M, config.BLOCK_K, config.BLOCK_C

    def programs(self, problem, pass_, config, axes):
        return -(-self.sides(problem, pass_)[0] // config.BLOCK_M)

    def executed_macs(self, problem, pass_, config):
        m, k, c = self.sides(problem, pass_)
        return (
            -(-m // config.BLOCK_M)
            * config.BLOCK_M
            * config.BLOCK_K
            * -(-c // config.BLOCK_C)
            * config.BLOCK_C
        )

    def requested_bytes(self, problem, pass_, config):
        return problem.bytes

    def operand_format(self, problem, tensor):
        return "nhwc", 1

    def plan(self, problem, pass_, config, precision, epilogue):
        m, k, c = self.sides(problem, pass_)
        tensors = (
            ("x_ptr", "a", None),
            ("w_ptr", "b", None),
            ("bias_ptr", "bias", None),
            ("y_ptr", "out", None),
        )
        constexprs = dict(config.constexprs(), EPILOGUE=epilogue, TRANSPOSED=pass_ == "dgrad")
        return [
            Launch(
                "toy_family:matmul",
                (self.programs(problem, pass_, config, None), 1, 1),
                tensors,
                (("M", m), ("K", k), ("C", c)),
                tuple(constexprs.items()),
                tuple(config.options().items()),
            )
        ]
