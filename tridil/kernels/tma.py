"""Implicit GEMM with tensor descriptors (TMA), sm_90 and later: a tap is the coordinate of a box,
and what lies outside the image arrives as zeros.

x and dy are descriptors over NHWC with pixel boxes [BLOCK_IMG, BLOCK_P, BLOCK_Q, channels], y is
one over (splits, N, P, Q, K), w one over (K, R*S*C), or (K, R*S, C) where the channels are RAGGED:
the overhang of a channel block is zero in both operands, not the next tap. PLANES: x and y are
contiguous, descriptors over NCHW with boxes [1, channels, 1, BLOCK_Q], and pixels are the columns of
the product. Axes have stride 1
(`tridil.problem.Axis.subsampled` views strided ones as such). WEIGHT_FIRST makes the weight tile
the first operand of the product: on sm_90 it then stays in shared memory, since it is a 2D box.
WARP_SPECIALIZE (sm_100) gives loads and products warps of their own.
"""

import triton
import triton.language as tl

from .common import (
    RUNTIME,
    STEP_1,
    branches_metadata,
    dot,
    epilogue,
    field,
    find_branch,
    find_filter,
    launch_metadata,
    live_taps,
    load_bias,
    output_tile,
    split_steps,
    store_tile,
    tile_from_middle,
    wgrad_boxes,
)

# here coordinates, which need no alignment
RUNTIME = RUNTIME + "C G CW R S FILTER_S step_s".split()


@triton.jit
def accumulate(
    acc, x, w, split, g, img, p0, q0, n0, H, W, P, Q, C, K, CW, R, S, FILTER_S, off_h, off_w, dil_h,
    dil_w, tap_r, tap_s, step_r, step_s, x0, SPLIT_K, TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr, WEIGHT_FIRST: tl.constexpr, WARP_SPECIALIZE: tl.constexpr,
    IS_SPLIT: tl.constexpr, RAGGED: tl.constexpr, PLANES: tl.constexpr, BLOCK_IMG: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """`gather.accumulate` with coordinates in place of addresses: acc [pixels, BLOCK_N], or
    (WEIGHT_FIRST) [BLOCK_N, pixels], plus the products of its tile."""
    PIXELS: tl.constexpr = BLOCK_IMG * BLOCK_P * BLOCK_Q
    r_lo, nr = live_taps(p0, tl.minimum(p0 + BLOCK_P, P) - 1, H, off_h, 1, dil_h, R)
    s_lo, ns = live_taps(q0, tl.minimum(q0 + BLOCK_Q, Q) - 1, W, off_w, 1, dil_w, S)
    blocks = tl.cdiv(C, BLOCK_K)
    steps, r, s, c = split_steps(split, nr, ns, blocks, SPLIT_K, IS_SPLIT)
    # coordinates of the first box; v runs over the live taps of a row, c over the channels of group
    # g
    h = p0 + off_h + (r_lo + r) * dil_h
    v_lo = q0 + off_w + s_lo * dil_w
    v_hi = v_lo + ns * dil_w
    v = v_lo + s * dil_w
    c_lo = x0 + g * C
    c_hi = c_lo + blocks * BLOCK_K
    c = c_lo + c * BLOCK_K
    # w is read at row g*K + n0, column tap*CW + channel; (TRANSPOSED) at row c - x0, column tap*CW +
    # n0; (RAGGED) at g*K + n0, tap, channel
    tap_size = 1 if RAGGED else CW
    col = ((tap_r + (r_lo + r) * step_r) * FILTER_S + tap_s + (s_lo + s) * step_s) * tap_size
    tap_step = step_s * tap_size
    row_step = (step_r * FILTER_S - ns * step_s) * tap_size
    if TRANSPOSED:
        col += n0
    elif not RAGGED:
        col += c - c_lo
        tap_step -= (blocks - 1) * BLOCK_K
    for _ in tl.range(steps, warp_specialize=WARP_SPECIALIZE):
        if PLANES:
            a = x.load([img, c, h, v]).reshape(BLOCK_K, PIXELS).T
        else:
            a = x.load([img, h, v, c]).reshape(PIXELS, BLOCK_K)
        if TRANSPOSED:
            b = w.load([c - x0, col]).T
        elif RAGGED:
            b = w.load([g * K + n0, col, c - c_lo]).reshape(BLOCK_N, BLOCK_K)
        else:
            b = w.load([g * K + n0, col])
        acc = dot(b, a.T, acc, PRECISION) if WEIGHT_FIRST else dot(a, b.T, acc, PRECISION)
        c += BLOCK_K
        wrap = c == c_hi
        c = tl.where(wrap, c_lo, c)
        v = tl.where(wrap, v + dil_w, v)
        col += tl.where(wrap, tap_step, 0 if TRANSPOSED or RAGGED else BLOCK_K)
        end = v == v_hi
        v = tl.where(end, v_lo, v)
        h = tl.where(end, h + dil_h, h)
        col = tl.where(end, col + row_step, col)
    return acc


@triton.jit(
    do_not_specialize=RUNTIME,
    do_not_specialize_on_alignment=STEP_1,
    launch_metadata=launch_metadata,
)
def correlate_tma(
    x, w, bias_ptr, y, N, H, W, P, Q, C, K, G, CW, R, S, FILTER_S, off_h, off_w, dil_h, dil_w,
    tap_r, tap_s, step_r, step_s, sy_split, sy_n, sy_p, sy_q, sy_k, y0, SPLIT_K,
    TRANSPOSED: tl.constexpr, EPILOGUE: tl.constexpr, ALIGN_Y: tl.constexpr,
    TMA_STORE: tl.constexpr, INT64: tl.constexpr, PRECISION: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr, WARP_SPECIALIZE: tl.constexpr, IS_SPLIT: tl.constexpr,
    RAGGED: tl.constexpr, PLANES: tl.constexpr, BLOCK_IMG: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """A tile of the result; split z of SPLIT_K writes its own partial sum."""
    PIXELS: tl.constexpr = BLOCK_IMG * BLOCK_P * BLOCK_Q
    split, g, img, p0, q0, n0 = output_tile(
        tl.program_id(0), N, P, Q, K, G, BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_N, IS_SPLIT
    )
    acc = accumulate(
        tl.zeros((BLOCK_N, PIXELS) if WEIGHT_FIRST else (PIXELS, BLOCK_N), tl.float32), x, w, split,
        g, img, p0, q0, n0, H, W, P, Q, C, K, CW, R, S, FILTER_S, off_h, off_w, dil_h, dil_w, tap_r,
        tap_s, step_r, step_s, 0, SPLIT_K, TRANSPOSED, PRECISION, WEIGHT_FIRST, WARP_SPECIALIZE,
        IS_SPLIT, RAGGED, PLANES, BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_N, BLOCK_K
    )
    if PLANES and not IS_SPLIT:
        store_planes(
            y, bias_ptr + g * K, acc if WEIGHT_FIRST else acc.T, img, p0, q0, n0, g * K, K, EPILOGUE,
            BLOCK_Q, BLOCK_N
        )
    else:
        store(
            y, bias_ptr, acc, split, g, img, p0, q0, n0, N, P, Q, K, sy_split, sy_n, sy_p, sy_q,
            sy_k, y0, 0, EPILOGUE, ALIGN_Y, TMA_STORE, INT64, WEIGHT_FIRST, IS_SPLIT, BLOCK_IMG,
            BLOCK_P, BLOCK_Q, BLOCK_N
        )


@triton.jit
def store_planes(
    y, bias_ptr, acc, img, p0, q0, n0, first, K, EPILOGUE: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """acc [BLOCK_N, BLOCK_Q] and the epilogue -> row p0 of the planes of y from channel first + n0 on."""
    if EPILOGUE != "":
        n = n0 + tl.arange(0, BLOCK_N)
        acc = epilogue(
            acc, load_bias(bias_ptr, n, n < K, tl.float32, EPILOGUE)[:, None], EPILOGUE
        )
    y.store([img, first + n0, p0, q0], acc.to(y.dtype).reshape(1, BLOCK_N, 1, BLOCK_Q))


@triton.jit
def store(
    y, bias_ptr, acc, split, g, img, p0, q0, n0, N, P, Q, K, sy_split, sy_n, sy_p, sy_q, sy_k, y0,
    first, EPILOGUE: tl.constexpr, ALIGN_Y: tl.constexpr, TMA_STORE: tl.constexpr,
    INT64: tl.constexpr, WEIGHT_FIRST: tl.constexpr, IS_SPLIT: tl.constexpr, BLOCK_IMG: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """acc and the epilogue -> y, whose channels from `first` on are the result's, by descriptor or through
    its strides."""
    PIXELS: tl.constexpr = BLOCK_IMG * BLOCK_P * BLOCK_Q
    if WEIGHT_FIRST:
        acc = acc.T
    if TMA_STORE:
        if EPILOGUE != "":
            n = n0 + tl.arange(0, BLOCK_N)
            bias = load_bias(bias_ptr + first + g * K, n, n < K, tl.float32, EPILOGUE)
            acc = epilogue(acc, bias[None, :], EPILOGUE)
        y.store(
            [split, img, p0, q0, first + g * K + n0],
            acc.to(y.dtype).reshape(1, BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_N),
        )
    else:
        if IS_SPLIT:
            y += tl.multiple_of(split.to(tl.int64) * sy_split, ALIGN_Y)
        store_tile(
            y, bias_ptr + first, acc, g, img, p0, q0, n0, N, P, Q, K, sy_n, sy_p, sy_q, sy_k,
            y0 + first * sy_k, BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_N, PIXELS, ALIGN_Y, EPILOGUE,
            INT64
        )


@triton.jit(
    do_not_specialize=RUNTIME,
    do_not_specialize_on_alignment=STEP_1,
    launch_metadata=launch_metadata,
)
def wgrad_tma(
    x, dy, dw, N, H, W, P, Q, C, K, G, R, S, off_h, off_w, dil_h, dil_w, SPLIT_K,
    PRECISION: tl.constexpr, WARP_SPECIALIZE: tl.constexpr, PLANES: tl.constexpr,
    BLOCK_IMG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of dw; split z of SPLIT_K writes its own partial sum."""
    acc, split, k0, tap, c0 = reduce(
        tl.program_id(0), x, dy, N, H, W, P, Q, C, K, G, R, S, off_h, off_w, dil_h, dil_w, 0, 0,
        SPLIT_K, PRECISION, WARP_SPECIALIZE, PLANES, BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_M, BLOCK_N
    )
    dw.store([split, k0, tap, c0], acc.to(dw.dtype).reshape(1, BLOCK_M, 1, BLOCK_N))


@triton.jit
def reduce(
    pid, x, dy, N, H, W, P, Q, C, K, G, R, S, off_h, off_w, dil_h, dil_w, x0, y0, SPLIT_K,
    PRECISION: tl.constexpr, WARP_SPECIALIZE: tl.constexpr, PLANES: tl.constexpr,
    BLOCK_IMG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`gather.reduce` with coordinates: (tile pid, its split, output channel, tap, channel). Where a
    box reaches over the tap's live rectangle, dy or x lies outside its tensor and is zero. PLANES:
    of sequences, dy being a descriptor over (N*K, Q)."""
    PIXELS: tl.constexpr = BLOCK_IMG * BLOCK_P * BLOCK_Q
    tiles_m = tl.cdiv(K, BLOCK_M)
    tiles_n = tl.cdiv(C, BLOCK_N)
    k0 = pid % tiles_m * BLOCK_M
    t = pid // tiles_m
    n0 = t % tiles_n * BLOCK_N
    t = t // tiles_n
    s = t % S
    t = t // S
    r = t % R
    t = t // R
    g = t % G
    split = t // G
    count, img, p, q, p_lo, p_hi, q_lo, q_hi = wgrad_boxes(
        split, r, r, s, s, N, H, W, P, Q, 1, 1, off_h, off_w, dil_h, dil_w, BLOCK_IMG, BLOCK_P,
        BLOCK_Q, SPLIT_K
    )
    h = r * dil_h + off_h
    v = s * dil_w + off_w
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in tl.range(count, warp_specialize=WARP_SPECIALIZE):
        if PLANES:
            a = dy.load([(img * G + g) * K + k0, q])
            b = x.load([img, g * C + n0, p + h, q + v]).reshape(BLOCK_N, PIXELS)
            acc = dot(a, b.T, acc, PRECISION)
        else:
            a = dy.load([img, p, q, y0 + g * K + k0]).reshape(PIXELS, BLOCK_M)
            b = x.load([img, p + h, q + v, x0 + g * C + n0]).reshape(PIXELS, BLOCK_N)
            acc = dot(a.T, b, acc, PRECISION)
        q += BLOCK_Q
        wrap = q >= q_hi
        q = tl.where(wrap, q_lo, q)
        p = tl.where(wrap, p + BLOCK_P, p)
        wrap = p >= p_hi
        p = tl.where(wrap, p_lo, p)
        img = tl.where(wrap, img + BLOCK_IMG, img)
    return acc, split, g * K + k0, r * S + s, n0


# ---- several correlations in one launch
@triton.jit(
    do_not_specialize=RUNTIME,
    do_not_specialize_on_alignment=STEP_1,
    launch_metadata=branches_metadata,
)
def correlate_tma_branches(
    x, w_0, w_1, w_2, w_3, w_4, w_5, w_6, w_7, bias_ptr, y, N, H, W, P, Q, G, sy_n, sy_p, sy_q,
    sy_k, BRANCHES: tl.constexpr, COUNT: tl.constexpr, SUM: tl.constexpr, TRANSPOSED: tl.constexpr,
    EPILOGUE: tl.constexpr, ALIGN_Y: tl.constexpr, TMA_STORE: tl.constexpr, INT64: tl.constexpr,
    PRECISION: tl.constexpr, WEIGHT_FIRST: tl.constexpr, WARP_SPECIALIZE: tl.constexpr,
    RAGGED: tl.constexpr, BLOCK_IMG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """`gather.correlate_branches`, a loop per branch: a descriptor cannot be chosen at run time."""
    PIXELS: tl.constexpr = BLOCK_IMG * BLOCK_P * BLOCK_Q
    filters = (w_0, w_1, w_2, w_3, w_4, w_5, w_6, w_7)
    pid = tl.program_id(0)
    branch = pid * 0
    if not SUM:
        branch, pid = find_branch(
            pid, N, P, Q, G, BRANCHES, COUNT, BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_N
        )
    K = field(branch, BRANCHES, 1)
    g, img, p0, q0, n0 = tile_from_middle(
        pid, N, P, Q, K, G, BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_N
    )
    acc = tl.zeros((BLOCK_N, PIXELS) if WEIGHT_FIRST else (PIXELS, BLOCK_N), tl.float32)
    for b in tl.static_range(COUNT):
        if SUM:
            acc = accumulate_branch(
                acc, x, filters[b], g, img, p0, q0, n0, H, W, P, Q, BRANCHES, b, TRANSPOSED,
                PRECISION, WEIGHT_FIRST, WARP_SPECIALIZE, RAGGED, BLOCK_IMG, BLOCK_P, BLOCK_Q,
                BLOCK_N, BLOCK_K
            )
        else:
            if branch == b:
                acc = accumulate_branch(
                    acc, x, filters[b], g, img, p0, q0, n0, H, W, P, Q, BRANCHES, b, TRANSPOSED,
                    PRECISION, WEIGHT_FIRST, WARP_SPECIALIZE, RAGGED, BLOCK_IMG, BLOCK_P, BLOCK_Q,
                    BLOCK_N, BLOCK_K
                )
    store(
        y, bias_ptr, acc, 0, g, img, p0, q0, n0, N, P, Q, K, 0, sy_n, sy_p, sy_q, sy_k, 0,
        field(branch, BRANCHES, 5), EPILOGUE, ALIGN_Y, TMA_STORE, INT64, WEIGHT_FIRST, False,
        BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_N
    )


@triton.jit
def accumulate_branch(
    acc, x, w, g, img, p0, q0, n0, H, W, P, Q, BRANCHES: tl.constexpr, BRANCH: tl.constexpr,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, WEIGHT_FIRST: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr, RAGGED: tl.constexpr, BLOCK_IMG: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """`accumulate` of one branch; dgrad (TRANSPOSED) walks the taps from the last to the first."""
    C: tl.constexpr = BRANCHES[10 * BRANCH]
    K: tl.constexpr = BRANCHES[10 * BRANCH + 1]
    R: tl.constexpr = BRANCHES[10 * BRANCH + 2]
    S: tl.constexpr = BRANCHES[10 * BRANCH + 3]
    STEP: tl.constexpr = -1 if TRANSPOSED else 1
    return accumulate(
        acc, x, w, 0, g, img, p0, q0, n0, H, W, P, Q, C, K, K if TRANSPOSED else C, R, S, S,
        BRANCHES[10 * BRANCH + 6], BRANCHES[10 * BRANCH + 7], BRANCHES[10 * BRANCH + 8],
        BRANCHES[10 * BRANCH + 9], R - 1 if TRANSPOSED else 0, S - 1 if TRANSPOSED else 0, STEP,
        STEP, BRANCHES[10 * BRANCH + 4], 1, TRANSPOSED, PRECISION, WEIGHT_FIRST, WARP_SPECIALIZE,
        False, RAGGED, False, BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_N, BLOCK_K
    )


@triton.jit(
    do_not_specialize=RUNTIME,
    do_not_specialize_on_alignment=STEP_1,
    launch_metadata=branches_metadata,
)
def wgrad_tma_branches(
    x, dy, dw_0, dw_1, dw_2, dw_3, dw_4, dw_5, dw_6, dw_7, N, H, W, P, Q, G, SPLIT_K,
    BRANCHES: tl.constexpr, COUNT: tl.constexpr, PRECISION: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr, BLOCK_IMG: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """`wgrad_tma` of COUNT branches, the filter of each, or its partial sums, by a descriptor of its
    own."""
    filters = (dw_0, dw_1, dw_2, dw_3, dw_4, dw_5, dw_6, dw_7)
    pid, branch, _ = find_filter(
        tl.program_id(0), G, SPLIT_K, BRANCHES, COUNT, BLOCK_M, BLOCK_N, 1, False
    )
    acc, split, k0, tap, c0 = reduce(
        pid, x, dy, N, H, W, P, Q, field(branch, BRANCHES, 0), field(branch, BRANCHES, 1), G,
        field(branch, BRANCHES, 2), field(branch, BRANCHES, 3), field(branch, BRANCHES, 6),
        field(branch, BRANCHES, 7), field(branch, BRANCHES, 8), field(branch, BRANCHES, 9),
        field(branch, BRANCHES, 4), field(branch, BRANCHES, 5), SPLIT_K, PRECISION, WARP_SPECIALIZE,
        False, BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_M, BLOCK_N
    )
    part = acc.to(dw_0.dtype).reshape(1, BLOCK_M, 1, BLOCK_N)
    for b in tl.static_range(COUNT):
        if branch == b:
            filters[b].store([split, k0, tap, c0], part)
