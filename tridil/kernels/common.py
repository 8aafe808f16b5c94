"""Pieces that the convolution kernels share: pixel boxes, live taps, addresses, epilogue."""

from typing import Any

import triton
import triton.language as tl

# scalars that need no specialisation, since what the loops need to know of them is said by
# constexprs (ALIGN*): one compiled kernel serves every size, dilation, padding and split
RUNTIME = (
    "N H W P Q K off_h off_w dil_h dil_w tap_r tap_s step_r SPLIT_K total "
    "sy_split sy_n sy_p sy_q y0 sw_split sw_k sw_r sw_s"
).split()
# those for which only 1 is a case of its own: contiguous results; no multiplication in wgrad's loop
STEP_1 = "G stride_h stride_w step_s sy_k sw_c".split()


def launch_metadata(grid: object, kernel: object, args: dict[str, Any]) -> dict[str, Any]:
    """What Triton's launch hooks (Proton) show of a launch: the convolution in its name, dense
    FLOPs by the width of the type, compulsory bytes."""
    x = args.get("x_ptr", args.get("x"))
    nbytes = getattr(x, "base", x).element_size()
    n, h, w, p, q, k, r, s = (args[name] for name in ("N", "H", "W", "P", "Q", "K", "R", "S"))
    depthwise = "MULT" in args
    c, g = (1, k) if depthwise else (args["C"], args["G"])
    k = 1 if depthwise else k
    pass_ = "wgrad" if "TRANSPOSED" not in args else "dgrad" if args["TRANSPOSED"] else "fprop"
    macs = (
        n
        * (h * w if pass_ == "dgrad" else p * q)
        * k
        * c
        * g
        * r
        * s
        * (args["MULT"] if depthwise and pass_ == "dgrad" else 1)
    )
    name = f"{pass_} n{n} c{c * g} {h}x{w} k{k * g} {r}x{s} dil{args['dil_h']}x{args['dil_w']}" + (
        f" g{g}" if g > 1 else ""
    )
    return {
        "name": name,
        f"flops{8 * nbytes}": 2 * macs,
        "bytes": nbytes * (n * g * (h * w * c + p * q * k) + k * c * g * r * s),
    }


def branches_metadata(grid: object, kernel: object, args: dict[str, Any]) -> dict[str, Any]:
    """The same of a launch of several convolutions."""
    x = args.get("x_ptr", args.get("x"))
    nbytes = getattr(x, "base", x).element_size()
    n, p, q, g = (args[name] for name in ("N", "P", "Q", "G"))
    pass_ = "wgrad" if "TRANSPOSED" not in args else "dgrad" if args["TRANSPOSED"] else "fprop"
    flat, count = args["BRANCHES"], args["COUNT"]
    branches = [flat[10 * b : 10 * b + 10] for b in range(count)]
    weights = sum(g * c * k * r * s for c, k, r, s, *_ in branches)
    dilations = ",".join(f"{branch[8]}x{branch[9]}" for branch in branches)
    return {
        "name": f"{pass_} {count} branches n{n} {args['H']}x{args['W']} dil{dilations}",
        f"flops{8 * nbytes}": 2 * n * p * q * weights,
        "bytes": nbytes * weights,
    }


@triton.jit
def field(branch, BRANCHES: tl.constexpr, FIELD: tl.constexpr, FIELDS: tl.constexpr = 10):
    """An entry of BRANCHES, which has ten per branch, or of FILTERS, which has six."""
    value = branch * 0 + BRANCHES[FIELD]
    for b in tl.static_range(1, len(BRANCHES) // FIELDS):
        value = tl.where(branch == b, BRANCHES[FIELDS * b + FIELD], value)
    return value


@triton.jit
def find_branch(
    pid, N, P, Q, G, BRANCHES: tl.constexpr, COUNT: tl.constexpr, BLOCK_IMG: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """(branch, tile of its result) of program pid, where every branch has tiles of its own."""
    branch = pid * 0
    first = branch
    before = branch
    for b in tl.static_range(1, COUNT):
        before += (
            tl.cdiv(N, BLOCK_IMG) * tl.cdiv(P, BLOCK_P) * tl.cdiv(Q, BLOCK_Q) * G
            * tl.cdiv(BRANCHES[10 * b - 9], BLOCK_N)
        )
        branch = tl.where(pid >= before, b, branch)
        first = tl.where(pid >= before, before, first)
    return branch, pid - first


@triton.jit
def find_filter(
    pid, G, SPLIT_K, BRANCHES: tl.constexpr, COUNT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK: tl.constexpr, FLAT: tl.constexpr,
):
    """Program pid's (number within its branch, branch, first partial sum of the branch): a branch
    has one per tile of each split of its filters, or (BLOCK_N = 0) per BLOCK elements of them."""
    branch = pid * 0
    first = branch
    before = branch
    part = branch.to(tl.int64)
    parts = part
    for b in tl.static_range(1, COUNT):
        taps = BRANCHES[10 * b - 8] * BRANCHES[10 * b - 7]
        size = BRANCHES[10 * b - 10] * BRANCHES[10 * b - 9] * taps * G
        if BLOCK_N == 0:
            before += tl.cdiv(size, BLOCK)
        else:
            columns = (
                tl.cdiv(taps * BRANCHES[10 * b - 10], BLOCK_N)
                if FLAT
                else taps * tl.cdiv(BRANCHES[10 * b - 10], BLOCK_N)
            )
            before += SPLIT_K * G * tl.cdiv(BRANCHES[10 * b - 9], BLOCK_M) * columns
        parts += SPLIT_K.to(tl.int64) * size
        branch = tl.where(pid >= before, b, branch)
        first = tl.where(pid >= before, before, first)
        part = tl.where(pid >= before, parts, part)
    return pid - first, branch, part


@triton.jit
def cdiv_pos(a, b):
    """ceil(max(a, 0) / b): the numerator stays non-negative, since compiled `//` truncates toward
    zero."""
    return (tl.maximum(a, 0) + b - 1) // b


@triton.jit
def live_taps(first, last, size, offset, stride, dilation, taps):
    """(first, count) of the taps that touch an axis of `size` for some output first..last
    (inclusive)."""
    lo = cdiv_pos(-offset - last * stride, dilation)
    hi = tl.minimum(cdiv_pos(size - offset - first * stride, dilation), taps)
    return tl.minimum(lo, taps), tl.maximum(hi - lo, 0)


@triton.jit
def live_outputs(t, size, offset, stride, dilation, out):
    """Half-open range of outputs for which tap t touches an axis of `size`; empty is (lo, lo)."""
    lo = tl.minimum(cdiv_pos(-offset - t * dilation, stride), out)
    hi = tl.minimum(cdiv_pos(size - offset - t * dilation, stride), out)
    return lo, tl.maximum(hi, lo)


@triton.jit
def box_pixels(BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, PIXELS: tl.constexpr, zero=0):
    """(image, row, column) inside a pixel box of each of the PIXELS rows of a tile, from row `zero`
    on; rows beyond the box have images beyond it."""
    m = tl.arange(0, PIXELS) + zero
    # m // d as (m * ceil(2**20 / d)) >> 20, exact for m, d <= 1024: shifts where d is a power of
    # two
    row = (m * ((1048576 + BLOCK_Q - 1) // BLOCK_Q)) >> 20
    i = (m * ((1048576 + BLOCK_P * BLOCK_Q - 1) // (BLOCK_P * BLOCK_Q))) >> 20
    return i, row - i * BLOCK_P, m - row * BLOCK_Q


@triton.jit
def output_tile(
    pid, N, P, Q, K, G, BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_N: tl.constexpr, IS_SPLIT: tl.constexpr
):
    """(split, group, image, row, column, channel) where output tile pid begins; channel tiles are
    neighbours, so they share x in L2."""
    tiles_n = tl.cdiv(K, BLOCK_N)
    tiles_q = tl.cdiv(Q, BLOCK_Q)
    tiles_p = tl.cdiv(P, BLOCK_P)
    n0 = pid % tiles_n * BLOCK_N
    t = pid // tiles_n
    q0 = t % tiles_q * BLOCK_Q
    t = t // tiles_q
    p0 = t % tiles_p * BLOCK_P
    t = t // tiles_p
    g = t % G
    t = t // G
    if not IS_SPLIT:
        return 0, g, t * BLOCK_IMG, p0, q0, n0
    else:
        tiles_img = tl.cdiv(N, BLOCK_IMG)
        return t // tiles_img, g, t % tiles_img * BLOCK_IMG, p0, q0, n0


@triton.jit
def from_middle(i, count):
    """The i-th of `count` blocks from the middle outwards: most taps are live there."""
    return (count - 1) // 2 + tl.where(i % 2 == 1, i // 2 + 1, -(i // 2))


@triton.jit
def tile_from_middle(pid, N, P, Q, K, G, BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_N: tl.constexpr):
    """`output_tile`, the middle of the map first, where most taps are live."""
    _, g, img, p0, q0, n0 = output_tile(
        pid, N, P, Q, K, G, BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_N, False
    )
    p0 = from_middle(p0 // BLOCK_P, tl.cdiv(P, BLOCK_P)) * BLOCK_P
    q0 = from_middle(q0 // BLOCK_Q, tl.cdiv(Q, BLOCK_Q)) * BLOCK_Q
    return g, img, p0, q0, n0


@triton.jit
def split_steps(split, nr, ns, blocks, SPLIT_K, IS_SPLIT: tl.constexpr):
    """(count, r, s, c): how many of the nr*ns*blocks (live tap, channel block) steps split z of
    SPLIT_K walks, and its first one."""
    steps = nr * ns * blocks
    if not IS_SPLIT:
        return steps, 0, 0, 0
    else:
        per_split = tl.cdiv(steps, SPLIT_K)
        first = tl.minimum(split * per_split, steps)
        tap = first // blocks
        return (
            tl.minimum(per_split, steps - first), tap // tl.maximum(ns, 1), tap % tl.maximum(ns, 1),
            first % blocks
        )


@triton.jit
def wgrad_boxes(
    split, r_lo, r_hi, s_lo, s_hi, N, H, W, P, Q, stride_h, stride_w, off_h, off_w, dil_h, dil_w,
    BLOCK_IMG, BLOCK_P, BLOCK_Q, SPLIT_K,
):
    """(count, image, row, column, rectangle): the boxes of split z in the live output rectangle of
    taps r_lo..r_hi x s_lo..s_hi (inclusive)."""
    # larger taps begin earlier and end earlier
    p_lo, _ = live_outputs(r_hi, H, off_h, stride_h, dil_h, P)
    _, p_hi = live_outputs(r_lo, H, off_h, stride_h, dil_h, P)
    q_lo, _ = live_outputs(s_hi, W, off_w, stride_w, dil_w, Q)
    _, q_hi = live_outputs(s_lo, W, off_w, stride_w, dil_w, Q)
    boxes_p = tl.cdiv(tl.maximum(p_hi - p_lo, 0), BLOCK_P)
    boxes_q = tl.cdiv(tl.maximum(q_hi - q_lo, 0), BLOCK_Q)
    boxes = tl.cdiv(N, BLOCK_IMG) * boxes_p * boxes_q
    per_split = tl.cdiv(boxes, SPLIT_K)
    first = tl.minimum(split * per_split, boxes)
    count = tl.minimum(per_split, boxes - first)
    q = q_lo + first % tl.maximum(boxes_q, 1) * BLOCK_Q
    t = first // tl.maximum(boxes_q, 1)
    p = p_lo + t % tl.maximum(boxes_p, 1) * BLOCK_P
    return count, t // tl.maximum(boxes_p, 1) * BLOCK_IMG, p, q, p_lo, p_hi, q_lo, q_hi


@triton.jit
def address(x, INT64: tl.constexpr):
    """Row offsets as unsigned 32-bit (scalar base + offset addressing), or 64-bit for tensors of
    2**31 elements and more."""
    return x.to(tl.int64) if INT64 else x.to(tl.uint32)


@triton.jit
def along(x, AXIS: tl.constexpr):
    """x as a tile that varies along one axis."""
    return x[None, :] if AXIS else x[:, None]


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b; "upcast" is for Triton's interpreter, which multiplies bfloat16 as if it were
    integer."""
    if PRECISION == "upcast":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def load_masked(
    ptr, base, offsets, mask, AXIS: tl.constexpr, ALIGN: tl.constexpr, CLAMP: tl.constexpr
):
    """ptr[base + offsets], zero where masked; CLAMP also gives masked lanes an address inside the
    tensor (pytorch#187222).

    Runs of ALIGN elements along AXIS are aligned and share their mask: said here, since a clamped
    offset no longer shows it.
    """
    if CLAMP:
        offsets = tl.where(mask, offsets + base, 0)
        offsets = tl.max_contiguous(
            tl.multiple_of(offsets, [1, ALIGN] if AXIS else [ALIGN, 1]),
            [1, ALIGN] if AXIS else [ALIGN, 1],
        )
        return tl.load(ptr + offsets, mask=mask, other=0.0)
    else:
        return tl.load(ptr + base + offsets, mask=mask, other=0.0)


@triton.jit
def below(x, limit, ALIGN: tl.constexpr):
    """x < limit, where limit is a multiple of ALIGN: in a form that shows that aligned runs of
    ALIGN elements share the answer."""
    return x // ALIGN < limit // ALIGN


# ---- epilogue: what happens to results in registers, by its name EPILOGUE: "" or "bias". Kernels in
# Gluon have their own (kernels/hopper.py)
@triton.jit
def load_bias(bias_ptr, k, in_k, dtype: tl.constexpr, EPILOGUE: tl.constexpr):
    """Of output channels k what the epilogue needs. What k has in common belongs to bias_ptr: a scalar
    takes no registers of tiles."""
    if EPILOGUE == "bias":
        return tl.load(bias_ptr + k, mask=in_k, other=0.0).to(dtype)
    else:
        return 0.0


@triton.jit
def epilogue(acc, bias, EPILOGUE: tl.constexpr):
    """acc, finished."""
    if EPILOGUE == "bias":
        acc += bias
    return acc


@triton.jit
def store_tile(
    y_ptr, bias_ptr, acc, g, img, p0, q0, n0, N, P, Q, K, sy_n, sy_p, sy_q, sy_k, y0,
    BLOCK_IMG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
    PIXELS: tl.constexpr, ALIGN_Y: tl.constexpr, EPILOGUE: tl.constexpr, INT64: tl.constexpr,
):
    """acc [pixels, BLOCK_N] and the epilogue -> y + y0, through y's own strides: NHWC, all but sy_k
    multiples of ALIGN_Y, or NCHW with ALIGN_Y = 1."""
    n = tl.arange(0, BLOCK_N)
    in_k = below(n0 + n, K, ALIGN_Y)
    if EPILOGUE != "":
        bias = load_bias(bias_ptr + g * K + n0, n, in_k, acc.dtype, EPILOGUE)
        acc = epilogue(acc, bias[None, :], EPILOGUE)
    i, p, q = box_pixels(BLOCK_P, BLOCK_Q, PIXELS)
    in_y = (i < tl.minimum(N - img, BLOCK_IMG)) & (p0 + p < P) & (q0 + q < Q)
    base = (
        y0
        + img.to(tl.int64) * sy_n
        + p0.to(tl.int64) * sy_p
        + q0.to(tl.int64) * sy_q
        + (g * K + n0).to(tl.int64) * sy_k
    )
    if INT64:
        i, p, q, n = i.to(tl.int64), p.to(tl.int64), q.to(tl.int64), n.to(tl.int64)
    offset = tl.multiple_of(i * sy_n + p * sy_p + q * sy_q, ALIGN_Y)[:, None] + (n * sy_k)[None, :]
    tl.store(
        y_ptr + tl.multiple_of(base, ALIGN_Y) + offset,
        acc.to(y_ptr.dtype.element_ty),
        mask=in_y[:, None] & in_k[None, :],
    )


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=STEP_1)
def sum_splits(
    part_ptr, bias_ptr, y_ptr, P, Q, K, total, sy_n, sy_p, sy_q, sy_k, y0, SPLIT_K,
    EPILOGUE: tl.constexpr, BLOCK: tl.constexpr,
):
    """y = sum of SPLIT_K partial results (N, P, Q, K), always in the same order, + bias. dw: its K,
    R, S, C are N, P, Q, K here."""
    sum_block(
        part_ptr, bias_ptr, y_ptr, tl.program_id(0), P, Q, K, total, sy_n, sy_p, sy_q, sy_k, y0,
        SPLIT_K, EPILOGUE, BLOCK
    )


@triton.jit
def sum_block(
    part_ptr, bias_ptr, y_ptr, block, P, Q, K, total, sy_n, sy_p, sy_q, sy_k, y0, SPLIT_K,
    EPILOGUE: tl.constexpr, BLOCK: tl.constexpr,
):
    """BLOCK elements of the sum."""
    j = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_y = j < total
    acc = tl.load(part_ptr + j, mask=in_y, other=0.0)
    part = j
    # loads that do not wait for each other
    for _ in tl.range(1, SPLIT_K, loop_unroll_factor=4):
        part += total
        acc += tl.load(part_ptr + part, mask=in_y, other=0.0)
    k = j % K
    q = j // K % Q
    p = j // K // Q % P
    n = j // K // Q // P
    acc = epilogue(acc, load_bias(bias_ptr, k, in_y, acc.dtype, EPILOGUE), EPILOGUE)
    tl.store(
        y_ptr + y0 + n * sy_n + p * sy_p + q * sy_q + k * sy_k,
        acc.to(y_ptr.dtype.element_ty),
        mask=in_y,
    )
