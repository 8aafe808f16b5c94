"""Direct kernels for one channel per group: no matrix product, fp32 FMA. NHWC and NCHW tensors are
read and written in place.

Dilation is only an address along a row, too: outputs that lie `grid` apart (dilation / gcd(stride,
dilation)) read the same columns, and on that grid the layer is a dense one. Each lane of a tile
owns COLS such outputs: it loads COLS + S - 1 columns of a source row for COLS * S products per
channel (stride 1), whatever the dilation is. A tile is a box of lanes [BLOCK_IMG, BLOCK_P, BLOCK_Q]
times BLOCK_N channels; the rows of a box lie on the grid of the rows, so that lanes share source
rows in L1. Rows of taps that read only padding are not walked, columns that do are not multiplied.
fprop and dgrad are one correlation, as in gather.py; wgrad is a reduction with a fixed order in two
passes.

MULT is the channel multiplier. TAPS filter columns are unrolled at a time, SHIFT columns lie
between neighbouring outputs of a lane. Strides of images, rows and pixels come in units of ALIGN
elements, so that the compiler sees 16-byte vectors in what it multiplies by ALIGN. Loads that are
masked off issue no address (no cp.async here), so none is clamped.
"""

import triton
import triton.language as tl

from .common import (
    address,
    below,
    box_pixels,
    branches_metadata,
    epilogue,
    launch_metadata,
    live_outputs,
    live_taps,
    load_bias,
)


@triton.jit
def grid_points(first, grid, BLOCK: tl.constexpr):
    """Output of anchor `first`: anchors count the residues of `grid` within each run of BLOCK *
    grid outputs."""
    return first // grid * (grid * BLOCK) + first % grid


@triton.jit
def anchors(size, grid, BLOCK: tl.constexpr):
    """How many anchors have an output below `size`."""
    return size // (grid * BLOCK) * grid + tl.minimum(size % (grid * BLOCK), grid)


@triton.jit
def lane_box(
    pid, P, Q, K, grid_h, grid_w, BLOCK_IMG: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, COLS: tl.constexpr,
):
    """(channel, anchor of the columns, row, image) where program pid's box of outputs begins."""
    tiles_n = tl.cdiv(K, BLOCK_N)
    tiles_q = tl.cdiv(anchors(Q, grid_w, COLS), BLOCK_Q)
    tiles_p = anchors(P, grid_h, BLOCK_P)
    n0 = pid % tiles_n * BLOCK_N
    t = pid // tiles_n
    a0 = t % tiles_q * BLOCK_Q
    t = t // tiles_q
    return n0, a0, grid_points(t % tiles_p, grid_h, BLOCK_P), t // tiles_p * BLOCK_IMG


@triton.jit
def tap_share(
    pid, N, H, P, Q, K, R, stride_h, off_h, dil_h, grid_w, splits, BLOCK_IMG: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, COLS: tl.constexpr,
    TAPS: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr,
):
    """Of wgrad's program pid: (first channel, row and column of its taps, split; first row of dy
    that they read, and the one after the last; its boxes of dy: how many, image, row and anchor of
    the first)."""
    tiles_n = tl.cdiv(K, BLOCK_N)
    n0 = pid % tiles_n * BLOCK_N
    t = pid // tiles_n
    s0 = t % CHUNKS * TAPS
    t = t // CHUNKS
    row_groups = tl.cdiv(R, ROWS)
    r0 = t % row_groups * ROWS
    split = t // row_groups
    # larger taps begin and end earlier
    p_lo, _ = live_outputs(tl.minimum(r0 + ROWS, R) - 1, H, off_h, stride_h, dil_h, P)
    _, p_hi = live_outputs(r0, H, off_h, stride_h, dil_h, P)
    boxes_q = tl.cdiv(anchors(Q, grid_w, COLS), BLOCK_Q)
    boxes_p = tl.cdiv(tl.maximum(p_hi - p_lo, 0), BLOCK_P)
    boxes = tl.cdiv(N, BLOCK_IMG) * boxes_p * boxes_q
    share = tl.cdiv(boxes, splits)
    box = tl.minimum(split * share, boxes)
    p0 = p_lo + box % tl.maximum(boxes_p, 1) * BLOCK_P
    t = box // tl.maximum(boxes_p, 1)
    img = t % tl.cdiv(N, BLOCK_IMG) * BLOCK_IMG
    a0 = t // tl.cdiv(N, BLOCK_IMG) * BLOCK_Q
    return n0, r0, s0, split, p_lo, p_hi, tl.minimum(share, boxes - box), img, p0, a0


@triton.jit
def live_columns(
    a0, grid, Q, W, off_w, stride_w, dil_w, BLOCK_Q: tl.constexpr, COLS: tl.constexpr,
    COUNT: tl.constexpr,
):
    """(first, count) of the COUNT columns that lie in the image for some lane of the box that
    begins at anchor a0."""
    last = tl.minimum(a0 + BLOCK_Q, anchors(Q, grid, COLS)) - 1
    return live_taps(
        grid_points(a0, grid, COLS), grid_points(last, grid, COLS), W, off_w, stride_w, dil_w, COUNT
    )


@triton.jit
def load_columns(
    x_ptr, x_lanes, row, channel0, x_w, v, dil_w, W, in_row, ALIGN: tl.constexpr,
    COUNT: tl.constexpr,
):
    """COUNT columns of a source row, dil_w apart: of each lane from x_ptr + row * ALIGN + channel0 +
    x_lanes on, zeros outside the image. v: where a lane's first one lies in the row."""
    x = ()
    for u in tl.static_range(COUNT):
        in_x = in_row & ((v + u * dil_w).to(tl.uint32) < W)[:, None]
        offset = (row + u * dil_w * x_w) * ALIGN + channel0
        x = x + (tl.load(x_ptr + offset + x_lanes, mask=in_x, other=0.0),)
    return x


@triton.jit
def column_products(
    acc, x, w, COLUMN: tl.constexpr, SHIFT: tl.constexpr, COLS: tl.constexpr, TAPS: tl.constexpr
):
    """acc[j] + x * w[tap] for the outputs j that read this column through one of the taps."""
    out = ()
    for j in tl.static_range(COLS):
        if COLUMN - j * SHIFT >= 0 and COLUMN - j * SHIFT < TAPS:
            out = out + (acc[j] + x * w[COLUMN - j * SHIFT],)
        else:
            out = out + (acc[j],)
    return out


@triton.jit
def store_output(
    y_ptr, value, y_lanes, y0, k0, p, q, column, in_y, in_k, sy_p, y_q, size_h, size_w, step_p,
    step_q, ALIGN: tl.constexpr, FILL_H: tl.constexpr, FILL_W: tl.constexpr,
):
    """An output (p, q) of each lane -> y, `column` columns from y0 on; and the zeros around it
    (FILL_H, FILL_W)."""
    in_y = in_y[:, None] & in_k
    value = value.to(y_ptr.dtype.element_ty)
    for dh in tl.static_range(FILL_H):
        for dw in tl.static_range(FILL_W):
            y = y_ptr + (y0 + (column + dw) * y_q + dh * sy_p) * ALIGN + k0
            if dh + dw == 0:
                tl.store(y + y_lanes, value, mask=in_y)
            else:
                in_fill = (p * step_p + dh < size_h) & (q * step_q + dw < size_w)
                tl.store(y + y_lanes, tl.zeros_like(value), mask=in_y & in_fill[:, None])


@triton.jit
def tap_products(
    acc, dy, x, BASE: tl.constexpr, COLUMN: tl.constexpr, SHIFT: tl.constexpr, COLS: tl.constexpr,
    TAPS: tl.constexpr,
):
    """acc[BASE + s] + dy[j] * x for the taps s through which outputs j read this column; the others
    as they are."""
    out = ()
    for a in tl.static_range(len(acc)):
        value = acc[a]
        for j in tl.static_range(COLS):
            if COLUMN - j * SHIFT == a - BASE and a >= BASE and a < BASE + TAPS:
                value += dy[j] * x
        out = out + (value,)
    return out


@triton.jit
def box_lanes(
    img, a0, p0, N, P, Q, grid_h, grid_w, BLOCK_IMG: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr, PIXELS: tl.constexpr, COLS: tl.constexpr,
):
    """Of the lanes of a box: (image and row in it, first output along the row, whether there is
    one)."""
    i, p, q = box_pixels(BLOCK_P, BLOCK_Q, PIXELS)
    q = grid_points(a0 + q, grid_w, COLS)
    p = p * grid_h
    return i, p, q, (i < tl.minimum(N - img, BLOCK_IMG)) & (p0 + p < P) & (q < Q)


@triton.jit
def accumulate(
    acc, x_ptr, w_ptr, n0, a0, p0, img, N, H, W, P, Q, K, R, stride_h, stride_w, off_h, off_w,
    dil_h, dil_w, grid_h, grid_w, tap_r, tap_s, step_r, sx_n, sx_h, sx_w, sx_k, S: tl.constexpr,
    SHIFT: tl.constexpr, STEP_S: tl.constexpr, FILTER_R: tl.constexpr, FILTER_S: tl.constexpr,
    MULT: tl.constexpr, TRANSPOSED: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
    INT64: tl.constexpr, BLOCK_IMG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr, PIXELS: tl.constexpr, COLS: tl.constexpr, TAPS: tl.constexpr,
):
    """acc, COLS tiles [lanes, BLOCK_N], plus the products of the box that begins at (n0, a0, p0,
    img)."""
    COUNT: tl.constexpr = (COLS - 1) * SHIFT + TAPS  # columns that a lane loads
    CHUNKS: tl.constexpr = (S + TAPS - 1) // TAPS
    REP: tl.constexpr = MULT if TRANSPOSED else 1
    # of scalar offsets
    x_h, x_w = sx_h.to(tl.int64), sx_w.to(tl.int64)
    i, p, q, in_lane = box_lanes(
        img, a0, p0, N, P, Q, grid_h, grid_w, BLOCK_IMG, BLOCK_P, BLOCK_Q, PIXELS, COLS
    )
    p_last = p0 + tl.minimum(BLOCK_P - 1, (P - 1 - p0) // grid_h) * grid_h
    r_lo, nr = live_taps(p0, p_last, H, off_h, stride_h, dil_h, R)
    n = tl.arange(0, BLOCK_N)
    in_k = below(n0 + n, K, ALIGN)[None, :]
    # lanes: offsets from the box's first pixel, whose own offset is a scalar
    h = (p0 + p) * stride_h + off_h
    v = q * stride_w + off_w
    if INT64:
        i, p, q, n = i.to(tl.int64), p.to(tl.int64), q.to(tl.int64), n.to(tl.int64)
    channel = n if MULT == 1 else (n0 + n) * MULT if TRANSPOSED else (n0 + n) // MULT
    x_lanes = (
        address((i * sx_n + p * stride_h * sx_h + q * stride_w * sx_w) * ALIGN, INT64)[:, None]
        + address(channel * sx_k, INT64)[None, :]
    )
    x0 = img.to(tl.int64) * sx_n + (p0 * stride_h + off_h) * x_h + off_w * x_w
    c0 = n0.to(tl.int64) * sx_k if MULT == 1 else n0.to(tl.int64) * 0
    # every lane loads the weights of its channels itself: a layout of their own would be exchanged
    # through shared memory
    filters: tl.constexpr = REP * FILTER_R * FILTER_S
    w_lanes = (
        tl.zeros((PIXELS,), tl.int64)[:, None]
        + (n.to(tl.int64) * filters)[None, :]
        + n0.to(tl.int64) * filters
    )
    for it in range(nr * REP * CHUNKS):
        r = r_lo + it // (REP * CHUNKS)
        m = it // CHUNKS % REP
        s0 = it % CHUNKS * TAPS
        # negative is huge
        in_x = (in_lane & ((h + r * dil_h).to(tl.uint32) < H))[:, None] & in_k
        xo = x0 + r * dil_h * x_h + s0 * dil_w * x_w
        co = c0 + m * sx_k if MULT > 1 else c0
        wo = (tap_r + r * step_r) * FILTER_S + tap_s + s0 * STEP_S + m * (FILTER_R * FILTER_S)
        x = load_columns(x_ptr, x_lanes, xo, co, x_w, v + s0 * dil_w, dil_w, W, in_x, ALIGN, COUNT)
        w = ()
        for s in tl.static_range(TAPS):
            # not in_k & ...: a scalar's mask is no mask to the interpreter of Triton 3.9
            some = K if S % TAPS == 0 else tl.where(s0 + s < S, K, 0)
            in_w = below(n0 + tl.arange(0, BLOCK_N), some, ALIGN)[None, :]
            w = w + (tl.load(w_ptr + wo + s * STEP_S + w_lanes, mask=in_w, other=0.0).to(ACC),)
        first, count = live_columns(
            a0, grid_w, Q, W, off_w + s0 * dil_w, stride_w, dil_w, BLOCK_Q, COLS, COUNT
        )
        for u in tl.static_range(COUNT):
            if (u >= first) & (u < first + count):
                acc = column_products(acc, x[u].to(ACC), w, u, SHIFT, COLS, TAPS)
    return acc


@triton.jit
def store(
    y_ptr, bias_ptr, acc, n0, a0, p0, img, N, P, Q, K, grid_h, grid_w, sy_n, sy_p, sy_q, sy_k, y0,
    size_h, size_w, step_p, step_q, EPILOGUE: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
    INT64: tl.constexpr, BLOCK_IMG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr, PIXELS: tl.constexpr, COLS: tl.constexpr, FILL_H: tl.constexpr,
    FILL_W: tl.constexpr,
):
    """acc and the epilogue -> y of the box that begins at (n0, a0, p0, img)."""
    i, p, q, in_lane = box_lanes(
        img, a0, p0, N, P, Q, grid_h, grid_w, BLOCK_IMG, BLOCK_P, BLOCK_Q, PIXELS, COLS
    )
    n = tl.arange(0, BLOCK_N)
    in_k = below(n0 + n, K, ALIGN)[None, :]
    if INT64:
        i, p, q, n = i.to(tl.int64), p.to(tl.int64), q.to(tl.int64), n.to(tl.int64)
    channels = tl.zeros((PIXELS,), tl.int32)[:, None] + tl.arange(0, BLOCK_N)[None, :]
    bias = load_bias(bias_ptr + n0, channels, in_k, ACC, EPILOGUE)
    y_lanes = ((i * sy_n + p * step_p * sy_p + q * step_q * sy_q) * ALIGN)[:, None] + (n * sy_k)[
        None, :
    ]
    y0 += img.to(tl.int64) * sy_n + p0.to(tl.int64) * step_p * sy_p
    k0 = n0.to(tl.int64) * sy_k
    for j in tl.static_range(COLS):
        store_output(
            y_ptr, epilogue(acc[j], bias, EPILOGUE), y_lanes, y0, k0, p0 + p, q + j * grid_w,
            j * grid_w * step_q, in_lane & (q + j * grid_w < Q), in_k, sy_p, sy_q.to(tl.int64),
            size_h, size_w, step_p, step_q, ALIGN, FILL_H, FILL_W
        )


@triton.jit(
    do_not_specialize=[
        "N", "H", "W", "P", "Q", "K", "R", "stride_h", "stride_w", "off_h", "off_w", "dil_h",
        "dil_w", "grid_h", "grid_w", "tap_r", "tap_s", "step_r", "sx_n", "sx_h", "sx_w", "sx_k",
        "sy_n", "sy_p", "sy_q", "sy_k", "y0", "size_h", "size_w", "step_p", "step_q"
    ],
    launch_metadata=launch_metadata,
)
def correlate_depthwise(
    x_ptr, w_ptr, bias_ptr, y_ptr, N, H, W, P, Q, K, R, stride_h, stride_w, off_h, off_w, dil_h,
    dil_w, grid_h, grid_w, tap_r, tap_s, step_r, sx_n, sx_h, sx_w, sx_k, sy_n, sy_p, sy_q, sy_k, y0,
    size_h, size_w, step_p, step_q, S: tl.constexpr, SHIFT: tl.constexpr, STEP_S: tl.constexpr,
    FILTER_R: tl.constexpr, FILTER_S: tl.constexpr, MULT: tl.constexpr, TRANSPOSED: tl.constexpr,
    EPILOGUE: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
    INT64: tl.constexpr, BLOCK_IMG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr, PIXELS: tl.constexpr, COLS: tl.constexpr, TAPS: tl.constexpr,
    FILL_H: tl.constexpr, FILL_W: tl.constexpr,
):
    """y (+ bias) over K channels. TRANSPOSED (dgrad): a channel of y sums MULT channels of x; else
    MULT channels of y read one of x.

    Output (p, q) is stored at row p * step_p and column q * step_q from y0 of a tensor of size_h x
    size_w. FILL_H, FILL_W: the steps, where the outputs in between are zeros and stored, too; else
    1.
    """
    n0, a0, p0, img = lane_box(
        tl.program_id(0), P, Q, K, grid_h, grid_w, BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_N, COLS
    )
    if CHANNELS_LAST:
        sx_k = 1
        sy_k = 1
    acc = ()
    for _ in tl.static_range(COLS):
        acc = acc + (tl.zeros((PIXELS, BLOCK_N), ACC),)
    acc = accumulate(
        acc, x_ptr, w_ptr, n0, a0, p0, img, N, H, W, P, Q, K, R, stride_h, stride_w, off_h, off_w,
        dil_h, dil_w, grid_h, grid_w, tap_r, tap_s, step_r, sx_n, sx_h, sx_w, sx_k, S, SHIFT,
        STEP_S, FILTER_R, FILTER_S, MULT, TRANSPOSED, ALIGN, ACC, INT64, BLOCK_IMG, BLOCK_P,
        BLOCK_Q, BLOCK_N, PIXELS, COLS, TAPS
    )
    store(
        y_ptr, bias_ptr, acc, n0, a0, p0, img, N, P, Q, K, grid_h, grid_w, sy_n, sy_p, sy_q, sy_k,
        y0, size_h, size_w, step_p, step_q, EPILOGUE, ALIGN, ACC, INT64, BLOCK_IMG, BLOCK_P, BLOCK_Q,
        BLOCK_N, PIXELS, COLS, FILL_H, FILL_W
    )


@triton.jit
def reduce(
    pid, x_ptr, dy_ptr, part_ptr, N, H, W, P, Q, K, R, stride_h, stride_w, off_h, off_w, dil_h,
    dil_w, grid_w, sx_n, sx_h, sx_w, sx_k, sy_n, sy_p, sy_q, sy_k, splits, S: tl.constexpr,
    SHIFT: tl.constexpr, MULT: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
    INT64: tl.constexpr, BLOCK_IMG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr, PIXELS: tl.constexpr, COLS: tl.constexpr, TAPS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """part (split, R, S, K): the sums of ROWS x TAPS taps over one of `splits` shares of the boxes
    of dy."""
    COUNT: tl.constexpr = (COLS - 1) * SHIFT + TAPS
    CHUNKS: tl.constexpr = (S + TAPS - 1) // TAPS
    n0, r0, s0, split, p_lo, p_hi, count, img, p0, a0 = tap_share(
        pid, N, H, P, Q, K, R, stride_h, off_h, dil_h, grid_w, splits, BLOCK_IMG,
        BLOCK_P, BLOCK_Q, BLOCK_N, COLS, TAPS, ROWS, CHUNKS
    )
    # of scalar offsets
    x_h, x_w, y_q = sx_h.to(tl.int64), sx_w.to(tl.int64), sy_q.to(tl.int64)
    i, bp, bq = box_pixels(BLOCK_P, BLOCK_Q, PIXELS)
    n = tl.arange(0, BLOCK_N)
    in_k = below(n0 + n, K, ALIGN)[None, :]
    if INT64:
        i, bp, bq, n = i.to(tl.int64), bp.to(tl.int64), bq.to(tl.int64), n.to(tl.int64)
    channel = n if MULT == 1 else (n0 + n) // MULT
    k0 = n0.to(tl.int64) * sy_k
    c0 = n0.to(tl.int64) * sx_k if MULT == 1 else k0 * 0
    acc = ()
    for _ in tl.static_range(ROWS * TAPS):
        acc = acc + (tl.zeros((PIXELS, BLOCK_N), ACC),)
    q = grid_points(a0 + bq, grid_w, COLS)
    for _ in range(count):
        in_lane = (i < tl.minimum(N - img, BLOCK_IMG)) & (bp < p_hi - p0) & (q < Q)
        h = (p0 + bp) * stride_h + off_h + r0 * dil_h
        v = q * stride_w + off_w + s0 * dil_w
        y_lanes = (
            address((i * sy_n + bp * sy_p + q * sy_q) * ALIGN, INT64)[:, None]
            + address(n * sy_k, INT64)[None, :]
        )
        x_pixel = (i * sx_n + bp * stride_h * sx_h + q * stride_w * sx_w) * ALIGN
        x_lanes = address(x_pixel, INT64)[:, None] + address(channel * sx_k, INT64)[None, :]
        yo = img.to(tl.int64) * sy_n + p0.to(tl.int64) * sy_p
        xo = (
            img.to(tl.int64) * sx_n
            + (p0 * stride_h + off_h + r0 * dil_h) * x_h
            + (off_w + s0 * dil_w) * x_w
        )
        dy = ()
        for j in tl.static_range(COLS):
            in_y = (in_lane & (q + j * grid_w < Q))[:, None] & in_k
            offset = (yo + j * grid_w * y_q) * ALIGN + k0
            dy = dy + (tl.load(dy_ptr + offset + y_lanes, mask=in_y, other=0.0).to(ACC),)
        first, count = live_columns(
            a0, grid_w, Q, W, off_w + s0 * dil_w, stride_w, dil_w, BLOCK_Q, COLS, COUNT
        )
        for row in tl.static_range(ROWS):
            p_first, p_last = live_outputs(r0 + row, H, off_h, stride_h, dil_h, P)
            if (r0 + row < R) & (p0 < p_last) & (p0 + BLOCK_P > p_first):
                in_row = (in_lane & ((h + row * dil_h).to(tl.uint32) < H))[:, None] & in_k
                x_row = xo + row * dil_h * x_h
                x = load_columns(x_ptr, x_lanes, x_row, c0, x_w, v, dil_w, W, in_row, ALIGN, COUNT)
                for u in tl.static_range(COUNT):
                    if (u >= first) & (u < first + count):
                        acc = tap_products(acc, dy, x[u].to(ACC), row * TAPS, u, SHIFT, COLS, TAPS)
        p0 += BLOCK_P
        if p0 >= p_hi:
            p0 = p_lo
            img += BLOCK_IMG
            if img >= N:
                img = img * 0
                a0 += BLOCK_Q
                q = grid_points(a0 + bq, grid_w, COLS)
    out = part_ptr + split.to(tl.int64) * (R * S * K) + n0 + n
    for row in tl.static_range(ROWS):
        for s in tl.static_range(TAPS):
            in_dw = n0 + n < tl.where((r0 + row < R) & (s0 + s < S), K, 0)
            tl.store(
                out + ((r0 + row) * S + s0 + s) * K, tl.sum(acc[row * TAPS + s], axis=0), mask=in_dw
            )


@triton.jit(
    do_not_specialize=[
        "N", "H", "W", "P", "Q", "K", "R", "stride_h", "stride_w", "off_h", "off_w", "dil_h",
        "dil_w", "grid_w", "sx_n", "sx_h", "sx_w", "sx_k", "sy_n", "sy_p", "sy_q", "sy_k", "splits"
    ],
    launch_metadata=launch_metadata,
)
def wgrad_depthwise(
    x_ptr, dy_ptr, part_ptr, N, H, W, P, Q, K, R, stride_h, stride_w, off_h, off_w, dil_h, dil_w,
    grid_w, sx_n, sx_h, sx_w, sx_k, sy_n, sy_p, sy_q, sy_k, splits, S: tl.constexpr,
    SHIFT: tl.constexpr, MULT: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    ACC: tl.constexpr, INT64: tl.constexpr, BLOCK_IMG: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, PIXELS: tl.constexpr, COLS: tl.constexpr,
    TAPS: tl.constexpr, ROWS: tl.constexpr,
):
    """The partial sums of dw."""
    if CHANNELS_LAST:
        sx_k = 1
        sy_k = 1
    reduce(
        tl.program_id(0), x_ptr, dy_ptr, part_ptr, N, H, W, P, Q, K, R, stride_h, stride_w, off_h,
        off_w, dil_h, dil_w, grid_w, sx_n, sx_h, sx_w, sx_k, sy_n, sy_p, sy_q, sy_k, splits, S, SHIFT,
        MULT, ALIGN, ACC, INT64, BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_N, PIXELS, COLS, TAPS, ROWS
    )


@triton.jit
def sum_taps(
    block, part_ptr, dw_ptr, K, total, splits, TAPS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_Z: tl.constexpr,
):
    """BLOCK elements of dw (K, TAPS) = the sum over splits of part (splits, TAPS, K), always in the
    same order, BLOCK_Z of them at a time."""
    j = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = tl.arange(0, BLOCK_Z)
    part = part_ptr + z.to(tl.int64)[:, None] * total + j[None, :]
    acc = tl.zeros((BLOCK_Z, BLOCK), part_ptr.dtype.element_ty)
    for z0 in range(0, splits, BLOCK_Z):
        acc += tl.load(part, mask=(z0 + z < splits)[:, None] & (j < total)[None, :], other=0.0)
        part += total.to(tl.int64) * BLOCK_Z
    tl.store(
        dw_ptr + j % K * TAPS + j // K,
        tl.sum(acc, axis=0).to(dw_ptr.dtype.element_ty),
        mask=j < total,
    )


@triton.jit(do_not_specialize=["K", "total", "splits"])
def sum_partials(
    part_ptr, dw_ptr, K, total, splits, TAPS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_Z: tl.constexpr,
):
    """dw (K, TAPS) of its partial sums."""
    sum_taps(tl.program_id(0), part_ptr, dw_ptr, K, total, splits, TAPS, BLOCK, BLOCK_Z)


# ---- several correlations in one launch
# A program finds its branch by comparisons; each has its own copy of the code, in which its taps are
# unrolled. BRANCHES, FILTERS: see gather.correlate_branches; GRIDS: of each branch grid_h, grid_w,
# SHIFT.
@triton.jit
def branch_products(
    acc, x_ptr, w_ptr, n0, a0, p0, img, N, H, W, P, Q, G, stride_h, stride_w, grid_h, grid_w, sx_n,
    sx_h, sx_w, sx_k, B: tl.constexpr, BRANCHES: tl.constexpr, FILTERS: tl.constexpr,
    SHIFT: tl.constexpr, TRANSPOSED: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
    INT64: tl.constexpr, BLOCK_IMG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr, PIXELS: tl.constexpr, COLS: tl.constexpr, TAPS: tl.constexpr,
):
    """`accumulate` of branch B."""
    C: tl.constexpr = BRANCHES[10 * B]
    K: tl.constexpr = BRANCHES[10 * B + 1]
    R: tl.constexpr = BRANCHES[10 * B + 2]
    S: tl.constexpr = BRANCHES[10 * B + 3]
    if R * S > 0:  # none of a residue class that the branch does not reach
        acc = accumulate(
            acc, x_ptr + BRANCHES[10 * B + 4] * sx_k, w_ptr, n0, a0, p0, img, N, H, W, P, Q, K * G,
            R, stride_h, stride_w, BRANCHES[10 * B + 6], BRANCHES[10 * B + 7], BRANCHES[10 * B + 8],
            BRANCHES[10 * B + 9], grid_h, grid_w, FILTERS[6 * B], FILTERS[6 * B + 1],
            FILTERS[6 * B + 2], sx_n, sx_h, sx_w, sx_k, S, SHIFT, FILTERS[6 * B + 3],
            FILTERS[6 * B + 4], FILTERS[6 * B + 5], C if TRANSPOSED else K, TRANSPOSED, ALIGN, ACC,
            INT64, BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_N, PIXELS, COLS, TAPS if TAPS < S else S
        )
    return acc


@triton.jit
def correlate_branch(
    pid, x_ptr, w_ptr, bias_ptr, y_ptr, N, H, W, P, Q, G, stride_h, stride_w, sx_n, sx_h, sx_w,
    sx_k, sy_n, sy_p, sy_q, sy_k, y0, B: tl.constexpr, BRANCHES: tl.constexpr,
    FILTERS: tl.constexpr, grid_h: tl.constexpr, grid_w: tl.constexpr, SHIFT: tl.constexpr,
    TRANSPOSED: tl.constexpr, EPILOGUE: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
    INT64: tl.constexpr, BLOCK_IMG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr, PIXELS: tl.constexpr, COLS: tl.constexpr, TAPS: tl.constexpr,
):
    """Box pid of branch B's own channels."""
    K = BRANCHES[10 * B + 1] * G
    n0, a0, p0, img = lane_box(
        pid, P, Q, K, grid_h, grid_w, BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_N, COLS
    )
    acc = ()
    for _ in tl.static_range(COLS):
        acc = acc + (tl.zeros((PIXELS, BLOCK_N), ACC),)
    acc = branch_products(
        acc, x_ptr, w_ptr, n0, a0, p0, img, N, H, W, P, Q, G, stride_h, stride_w, grid_h, grid_w,
        sx_n, sx_h, sx_w, sx_k, B, BRANCHES, FILTERS, SHIFT, TRANSPOSED, ALIGN, ACC, INT64,
        BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_N, PIXELS, COLS, TAPS
    )
    FIRST: tl.constexpr = BRANCHES[10 * B + 5]
    store(
        y_ptr + FIRST * sy_k, bias_ptr + FIRST, acc, n0, a0, p0, img, N, P, Q, K, grid_h, grid_w,
        sy_n, sy_p, sy_q, sy_k, y0, P, Q, 1, 1, EPILOGUE, ALIGN, ACC, INT64, BLOCK_IMG, BLOCK_P,
        BLOCK_Q, BLOCK_N, PIXELS, COLS, 1, 1
    )


@triton.jit(
    do_not_specialize=[
        "N", "H", "W", "P", "Q", "G", "stride_h", "stride_w", "sx_n", "sx_h", "sx_w", "sx_k",
        "sy_n", "sy_p", "sy_q", "sy_k", "y0"
    ],
    launch_metadata=branches_metadata,
)
def correlate_depthwise_branches(
    x_ptr, w_0, w_1, w_2, w_3, w_4, w_5, w_6, w_7, bias_ptr, y_ptr, N, H, W, P, Q, G, stride_h,
    stride_w, sx_n, sx_h, sx_w, sx_k, sy_n, sy_p, sy_q, sy_k, y0, BRANCHES: tl.constexpr,
    FILTERS: tl.constexpr, GRIDS: tl.constexpr, COUNT: tl.constexpr, SUM: tl.constexpr,
    TRANSPOSED: tl.constexpr, EPILOGUE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr, ACC: tl.constexpr, INT64: tl.constexpr, BLOCK_IMG: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, PIXELS: tl.constexpr,
    COLS: tl.constexpr, TAPS: tl.constexpr,
):
    """`correlate_depthwise` for COUNT branches with a filter each: side by side, or (SUM) added up in
    one accumulator, whose lanes lie on no grid: they own one output each (COLS = 1)."""
    filters = (w_0, w_1, w_2, w_3, w_4, w_5, w_6, w_7)
    pid = tl.program_id(0)
    if CHANNELS_LAST:
        sx_k = 1
        sy_k = 1
    if SUM:
        K = BRANCHES[1] * G
        n0, a0, p0, img = lane_box(
            pid, P, Q, K, 1, 1, BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_N, COLS
        )
        acc = (tl.zeros((PIXELS, BLOCK_N), ACC),)
        for b in tl.static_range(COUNT):
            acc = branch_products(
                acc, x_ptr, filters[b], n0, a0, p0, img, N, H, W, P, Q, G, stride_h, stride_w, 1, 1,
                sx_n, sx_h, sx_w, sx_k, b, BRANCHES, FILTERS, 1, TRANSPOSED, ALIGN, ACC, INT64,
                BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_N, PIXELS, COLS, TAPS
            )
        store(
            y_ptr, bias_ptr, acc, n0, a0, p0, img, N, P, Q, K, 1, 1, sy_n, sy_p, sy_q, sy_k, y0, P,
            Q, 1, 1, EPILOGUE, ALIGN, ACC, INT64, BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_N, PIXELS,
            COLS, 1, 1
        )
    else:
        first = pid * 0
        for b in tl.static_range(COUNT):
            count = (
                tl.cdiv(BRANCHES[10 * b + 1] * G, BLOCK_N) * tl.cdiv(N, BLOCK_IMG)
                * tl.cdiv(anchors(Q, GRIDS[3 * b + 1], COLS), BLOCK_Q)
                * anchors(P, GRIDS[3 * b], BLOCK_P)
            )
            if (pid >= first) & (pid < first + count):
                correlate_branch(
                    pid - first, x_ptr, filters[b], bias_ptr, y_ptr, N, H, W, P, Q, G, stride_h,
                    stride_w, sx_n, sx_h, sx_w, sx_k, sy_n, sy_p, sy_q, sy_k, y0, b, BRANCHES,
                    FILTERS, GRIDS[3 * b], GRIDS[3 * b + 1], GRIDS[3 * b + 2], TRANSPOSED, EPILOGUE,
                    ALIGN, ACC, INT64, BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_N, PIXELS, COLS, TAPS
                )
            first += count


@triton.jit
def branch_weights(G, B: tl.constexpr, BRANCHES: tl.constexpr):
    """Elements of the filter of branch B."""
    return BRANCHES[10 * B + 1] * BRANCHES[10 * B + 2] * BRANCHES[10 * B + 3] * G


@triton.jit
def reduce_branch(
    pid, x_ptr, dy_ptr, part_ptr, N, H, W, P, Q, G, stride_h, stride_w, sx_n, sx_h, sx_w, sx_k,
    sy_n, sy_p, sy_q, sy_k, splits, B: tl.constexpr, BRANCHES: tl.constexpr, grid_w: tl.constexpr,
    SHIFT: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr, INT64: tl.constexpr,
    BLOCK_IMG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
    PIXELS: tl.constexpr, COLS: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr,
):
    """`reduce` of branch B."""
    MULT: tl.constexpr = BRANCHES[10 * B + 1]
    S: tl.constexpr = BRANCHES[10 * B + 3]
    reduce(
        pid, x_ptr + BRANCHES[10 * B + 4] * sx_k, dy_ptr + BRANCHES[10 * B + 5] * sy_k, part_ptr, N,
        H, W, P, Q, MULT * G, BRANCHES[10 * B + 2], stride_h, stride_w, BRANCHES[10 * B + 6],
        BRANCHES[10 * B + 7], BRANCHES[10 * B + 8], BRANCHES[10 * B + 9], grid_w, sx_n, sx_h, sx_w,
        sx_k, sy_n, sy_p, sy_q, sy_k, splits, S, SHIFT, MULT, ALIGN, ACC, INT64, BLOCK_IMG, BLOCK_P,
        BLOCK_Q, BLOCK_N, PIXELS, COLS, TAPS if TAPS < S else S, ROWS
    )


@triton.jit(
    do_not_specialize=[
        "N", "H", "W", "P", "Q", "G", "stride_h", "stride_w", "sx_n", "sx_h", "sx_w", "sx_k",
        "sy_n", "sy_p", "sy_q", "sy_k", "splits"
    ],
    launch_metadata=branches_metadata,
)
def wgrad_depthwise_branches(
    x_ptr, dy_ptr, part_ptr, N, H, W, P, Q, G, stride_h, stride_w, sx_n, sx_h, sx_w, sx_k, sy_n,
    sy_p, sy_q, sy_k, splits, BRANCHES: tl.constexpr, GRIDS: tl.constexpr, COUNT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr, INT64: tl.constexpr,
    BLOCK_IMG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
    PIXELS: tl.constexpr, COLS: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr,
):
    """The partial sums of all dw, one after another."""
    pid = tl.program_id(0)
    if CHANNELS_LAST:
        sx_k = 1
        sy_k = 1
    first = pid * 0
    part = first.to(tl.int64)
    for b in tl.static_range(COUNT):
        count = (
            tl.cdiv(BRANCHES[10 * b + 1] * G, BLOCK_N) * tl.cdiv(BRANCHES[10 * b + 2], ROWS)
            * tl.cdiv(BRANCHES[10 * b + 3], tl.minimum(TAPS, BRANCHES[10 * b + 3])) * splits
        )
        if (pid >= first) & (pid < first + count):
            reduce_branch(
                pid - first, x_ptr, dy_ptr, part_ptr + part, N, H, W, P, Q, G, stride_h, stride_w,
                sx_n, sx_h, sx_w, sx_k, sy_n, sy_p, sy_q, sy_k, splits, b, BRANCHES,
                GRIDS[3 * b + 1], GRIDS[3 * b + 2], ALIGN, ACC, INT64, BLOCK_IMG, BLOCK_P, BLOCK_Q,
                BLOCK_N, PIXELS, COLS, TAPS, ROWS
            )
        first += count
        part += splits.to(tl.int64) * branch_weights(G, b, BRANCHES)


@triton.jit(do_not_specialize=["G", "splits"])
def sum_partials_branches(
    part_ptr, dw_0, dw_1, dw_2, dw_3, dw_4, dw_5, dw_6, dw_7, G, splits, BRANCHES: tl.constexpr,
    COUNT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_Z: tl.constexpr,
):
    """`sum_partials` of the filters of all branches."""
    filters = (dw_0, dw_1, dw_2, dw_3, dw_4, dw_5, dw_6, dw_7)
    pid = tl.program_id(0)
    first = pid * 0
    part = first.to(tl.int64)
    for b in tl.static_range(COUNT):
        total = branch_weights(G, b, BRANCHES)
        count = tl.cdiv(total, BLOCK)
        if (pid >= first) & (pid < first + count):
            sum_taps(
                pid - first, part_ptr + part, filters[b], BRANCHES[10 * b + 1] * G, total, splits,
                BRANCHES[10 * b + 2] * BRANCHES[10 * b + 3], BLOCK, BLOCK_Z
            )
        first += count
        part += splits.to(tl.int64) * total
