"""Implicit GEMM with pointer loads: fprop and dgrad are one correlation, wgrad reduces over pixels.
Every GPU, every geometry.

x, w, y are NHWC, KRSC, NPQK. A correlation is described by two `tridil.problem.Axis`; H, W / P, Q
are the sizes of its source / result, C and K its reduced and its output channels per group. dgrad
is the correlation of dy, one residue class of dx at a time, with w read in place (TRANSPOSED), so C
is then the layer's output channels. CW is the innermost size of w.
"""

import triton
import triton.language as tl

from .common import (
    RUNTIME,
    STEP_1,
    address,
    along,
    below,
    box_pixels,
    branches_metadata,
    dot,
    field,
    find_branch,
    find_filter,
    launch_metadata,
    live_taps,
    load_masked,
    output_tile,
    split_steps,
    store_tile,
    sum_block,
    tile_from_middle,
    wgrad_boxes,
)


@triton.jit
def source_pixels(
    i, p, q, H, W, channels, stride_h, stride_w, ALIGN: tl.constexpr, INT64: tl.constexpr
):
    """Offsets, from the first one's, of the pixels of the source that outputs (i, p, q) of a box
    read; in multiples of ALIGN."""
    if INT64:
        i, p, q = i.to(tl.int64), p.to(tl.int64), q.to(tl.int64)
    return tl.multiple_of(((i * H + p * stride_h) * W + q * stride_w) * channels, ALIGN)


@triton.jit
def taps_in_image(
    in_y, h, v, H, W, dil_h, dil_w, S, MOST_R: tl.constexpr, MOST_S: tl.constexpr
):
    """Of each pixel a bit per tap, at r * S + s: whether it reads the image. h, v: where its first
    tap reads; in_y: whether it is one of the result."""
    bits = tl.zeros(h.shape, tl.int32)
    for r in tl.static_range(MOST_R):
        in_h = in_y & (h + r * dil_h >= 0) & (h + r * dil_h < H)
        for s in tl.static_range(MOST_S):
            in_w = (v + s * dil_w >= 0) & (v + s * dil_w < W) & (s < S)
            bits |= (in_h & in_w).to(tl.int32) << (r * S + s)
    return bits


@triton.jit
def filter_rows(
    tap, g, n0, K, C, CW, FILTER_R, FILTER_S, TRANSPOSED: tl.constexpr, ALIGN: tl.constexpr,
    ALIGN_W: tl.constexpr, EVEN_N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """(offsets [BLOCK_K, BLOCK_N] of the weights of a step, offset of its first tap, what that gains
    from block to block of channels, which of the BLOCK_N output channels there are).

    Output channels beyond K are clamped where they are rows of w, masked where they are its
    innermost axis.
    """
    kk = tl.arange(0, BLOCK_K)
    n = tl.arange(0, BLOCK_N)
    if TRANSPOSED:
        rows = (kk * (FILTER_R * FILTER_S * CW))[:, None] + n[None, :]
        step = BLOCK_K * FILTER_R * FILTER_S * CW
        first = (g.to(tl.int64) * (C * FILTER_R * FILTER_S) + tap) * CW + n0
    else:
        if not EVEN_N:
            n = tl.minimum(n, K - 1 - n0)
        rows = tl.multiple_of(n * (FILTER_R * FILTER_S * CW), ALIGN)[None, :] + kk[:, None]
        step = BLOCK_K
        first = ((g * K + n0).to(tl.int64) * (FILTER_R * FILTER_S) + tap) * CW
    in_n = below(n0 + n, CW if TRANSPOSED else K, ALIGN_W if TRANSPOSED else 1)[None, :]
    return rows, first, step, in_n


@triton.jit
def accumulate(
    acc, x_ptr, w_ptr, zero, split, g, img, p0, q0, n0, N, H, W, P, Q, K, G, cg, x0, stride_h,
    stride_w, off_h, off_w, dil_h, dil_w, tap_r, tap_s, step_r, step_s, SPLIT_K, C, CW, R, S, FILTER_R,
    FILTER_S, MOST_R: tl.constexpr, MOST_S: tl.constexpr, TRANSPOSED: tl.constexpr,
    ALIGN: tl.constexpr, ALIGN_W: tl.constexpr, EVEN_C: tl.constexpr, EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr, INT64: tl.constexpr, CLAMP: tl.constexpr, BLOCK_IMG: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    IS_SPLIT: tl.constexpr, PIXELS: tl.constexpr,
):
    """acc [pixels, BLOCK_N] of the tile that begins at (g, img, p0, q0, n0), plus its products: one
    flat loop over (live tap, channel block), so that cp.async runs ahead across taps.

    A source pixel has cg channels, of which the correlation reads C * G from x0 on. R and S are
    MOST_R and MOST_S at most. zero: see `correlate_branches`.
    """
    BITS: tl.constexpr = MOST_R * MOST_S <= 31
    CB = (C + BLOCK_K - 1) // BLOCK_K
    r_lo, nr = live_taps(p0, tl.minimum(p0 + BLOCK_P, P) - 1, H, off_h, stride_h, dil_h, R)
    s_lo, ns = live_taps(q0, tl.minimum(q0 + BLOCK_Q, Q) - 1, W, off_w, stride_w, dil_w, S)
    steps, r, s, c = split_steps(split, nr, ns, CB, SPLIT_K, IS_SPLIT)
    # rows of the tile: offset of the pixel in its box, and which taps of it lie in the image
    i, p, q = box_pixels(BLOCK_P, BLOCK_Q, PIXELS, zero)
    in_y = (i < tl.minimum(N - img, BLOCK_IMG)) & (p0 + p < P) & (q0 + q < Q)
    h = (p0 + p) * stride_h + off_h
    v = (q0 + q) * stride_w + off_w
    if BITS:
        bits = taps_in_image(in_y, h, v, H, W, dil_h, dil_w, S, MOST_R, MOST_S)
        bits = (bits >> (r_lo * S + s_lo))[:, None]
    else:
        h = tl.where(in_y, h + r_lo * dil_h, -(1 << 30))
        v = v + s_lo * dil_w
    kk = tl.arange(0, BLOCK_K)
    x_rows = address(source_pixels(i, p, q, H, W, cg, stride_h, stride_w, ALIGN, INT64), INT64)[:, None]
    x_rows += address(kk, INT64)[None, :]
    pixel0 = (
        (img.to(tl.int64) * H + p0 * stride_h + off_h + (r_lo + r) * dil_h) * W
        + q0 * stride_w
        + off_w
        + (s_lo + s) * dil_w
    )
    xo = pixel0 * cg + x0 + g * C + c * BLOCK_K
    tap = (tap_r + (r_lo + r) * step_r) * FILTER_S + tap_s + (s_lo + s) * step_s
    w_rows, wo, w_step, in_n = filter_rows(
        tap, g, n0, K, C, CW, FILTER_R, FILTER_S, TRANSPOSED, ALIGN, ALIGN_W, EVEN_N, BLOCK_N,
        BLOCK_K
    )
    if IS_SPLIT:
        wo += c.to(tl.int64) * w_step
    # what the scalar offsets gain at the end of a tap, and of a row of taps
    x_tap = dil_w * cg - CB * BLOCK_K
    x_row = (dil_h * W - (ns - 1) * dil_w).to(tl.int64) * cg - CB * BLOCK_K
    w_tap = step_s * CW - CB * w_step
    w_row = (step_r * FILTER_S - (ns - 1) * step_s) * CW - CB * w_step
    bit = 1 << (r * S + s)
    dh = r * dil_h
    dv = s * dil_w
    c = c * BLOCK_K
    u = s + 1
    if CLAMP:
        wo = tl.where(steps > 0, wo, 0)
    for it in range(steps):
        if BITS:
            in_x = (bits & bit) != 0
        else:
            # negative is huge
            in_x = (((h + dh).to(tl.uint32) < H) & ((v + dv).to(tl.uint32) < W))[:, None]
        if not EVEN_C:
            in_x = in_x & (kk < C - c)[None, :]
        a = load_masked(x_ptr, xo, x_rows, in_x, 1, ALIGN, CLAMP)
        if EVEN_C and (EVEN_N or not TRANSPOSED):
            b = tl.load(w_ptr + wo + w_rows)
        else:
            b = load_masked(
                w_ptr, wo, w_rows, in_n & (kk < C - c)[:, None], 1 if TRANSPOSED else 0, ALIGN_W,
                CLAMP
            )
        acc = dot(a, b, acc, PRECISION)
        # the next block of channels, tap, row of taps
        c += BLOCK_K
        wrap = c == CB * BLOCK_K
        end = wrap & (u == ns)
        xo += BLOCK_K + tl.where(wrap, tl.where(end, x_row, x_tap), 0)
        wo_next = wo + w_step + tl.where(wrap, tl.where(end, w_row, w_tap), 0)
        # prefetches behind the last step stay inside w
        wo = tl.where(it + 1 < steps, wo_next, 0) if CLAMP else wo_next
        if BITS:
            bit = tl.where(wrap, bit << tl.where(end, S - ns + 1, 1), bit)
        else:
            dh += tl.where(end, dil_h, 0)
            dv = tl.where(end, 0, tl.where(wrap, dv + dil_w, dv))
        u = tl.where(end, 1, tl.where(wrap, u + 1, u))
        c = tl.where(wrap, 0, c)
    return acc


@triton.jit(
    do_not_specialize=RUNTIME,
    do_not_specialize_on_alignment=STEP_1,
    launch_metadata=launch_metadata,
)
def correlate(
    x_ptr, w_ptr, bias_ptr, y_ptr, N, H, W, P, Q, K, G, stride_h, stride_w, off_h, off_w, dil_h,
    dil_w, tap_r, tap_s, step_r, step_s, sy_split, sy_n, sy_p, sy_q, sy_k, y0, SPLIT_K,
    C: tl.constexpr, CW: tl.constexpr, R: tl.constexpr, S: tl.constexpr, FILTER_R: tl.constexpr,
    FILTER_S: tl.constexpr, TRANSPOSED: tl.constexpr, EPILOGUE: tl.constexpr, ALIGN: tl.constexpr,
    ALIGN_W: tl.constexpr, ALIGN_Y: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr, INT64: tl.constexpr, CLAMP: tl.constexpr, BLOCK_IMG: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    IS_SPLIT: tl.constexpr, PIXELS: tl.constexpr,
):
    """A tile of the result; split z of SPLIT_K writes its own partial sum."""
    split, g, img, p0, q0, n0 = output_tile(
        tl.program_id(0), N, P, Q, K, G, BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_N, IS_SPLIT
    )
    acc = accumulate(
        tl.zeros((PIXELS, BLOCK_N), ACC), x_ptr, w_ptr, 0, split, g, img, p0, q0, n0, N, H, W, P, Q,
        K, G, C * G, 0, stride_h, stride_w, off_h, off_w, dil_h, dil_w, tap_r, tap_s, step_r, step_s,
        SPLIT_K, C, CW, R, S, FILTER_R, FILTER_S, R, S, TRANSPOSED, ALIGN, ALIGN_W,
        C % BLOCK_K == 0, EVEN_N, PRECISION, INT64, CLAMP, BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_N,
        BLOCK_K, IS_SPLIT, PIXELS
    )
    if IS_SPLIT:
        y_ptr += tl.multiple_of(split.to(tl.int64) * sy_split, ALIGN_Y)
    store_tile(
        y_ptr, bias_ptr, acc, g, img, p0, q0, n0, N, P, Q, K, sy_n, sy_p, sy_q, sy_k, y0, BLOCK_IMG,
        BLOCK_P, BLOCK_Q, BLOCK_N, PIXELS, ALIGN_Y, EPILOGUE, INT64
    )


@triton.jit(
    do_not_specialize=RUNTIME,
    do_not_specialize_on_alignment=STEP_1,
    launch_metadata=launch_metadata,
)
def correlate_flat(
    x_ptr, w_ptr, bias_ptr, y_ptr, N, H, W, P, Q, K, G, stride_h, stride_w, off_h, off_w, dil_h,
    dil_w, tap_r, tap_s, step_r, step_s, sy_split, sy_n, sy_p, sy_q, sy_k, y0, SPLIT_K,
    C: tl.constexpr, CW: tl.constexpr, R: tl.constexpr, S: tl.constexpr, FILTER_R: tl.constexpr,
    FILTER_S: tl.constexpr, TRANSPOSED: tl.constexpr, EPILOGUE: tl.constexpr, ALIGN: tl.constexpr,
    ALIGN_W: tl.constexpr, ALIGN_Y: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    INT64: tl.constexpr, CLAMP: tl.constexpr, BLOCK_IMG: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, IS_SPLIT: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """The same for few channels: the reduction runs over the flattened (live tap, channel) index,
    in blocks of BLOCK_K."""
    # outside every image, twice that, too
    FAR: tl.constexpr = -(1 << 30)
    _, g, img, p0, q0, n0 = output_tile(
        tl.program_id(0), N, P, Q, K, G, BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_N, IS_SPLIT
    )
    r_lo, nr = live_taps(p0, tl.minimum(p0 + BLOCK_P, P) - 1, H, off_h, stride_h, dil_h, R)
    s_lo, ns = live_taps(q0, tl.minimum(q0 + BLOCK_Q, Q) - 1, W, off_w, stride_w, dil_w, S)
    total = nr * ns * C
    ns = tl.maximum(ns, 1)
    i, p, q = box_pixels(BLOCK_P, BLOCK_Q, PIXELS)
    in_y = (i < tl.minimum(N - img, BLOCK_IMG)) & (p0 + p < P) & (q0 + q < Q)
    h = tl.where(in_y, (p0 + p) * stride_h + off_h + r_lo * dil_h, FAR)
    v = (q0 + q) * stride_w + off_w + s_lo * dil_w
    cg = C * G
    if INT64:
        i, p, q = i.to(tl.int64), p.to(tl.int64), q.to(tl.int64)
    pixel = ((i * H + p * stride_h) * W + q * stride_w) * cg
    pixel0 = (
        (img.to(tl.int64) * H + p0 * stride_h + off_h + r_lo * dil_h) * W
        + q0 * stride_w
        + off_w
        + s_lo * dil_w
    )
    xo = pixel0 * cg + g * C
    n = n0 + tl.arange(0, BLOCK_N)
    per_row = ((1 << 20) + ns - 1) // ns
    acc = tl.zeros((PIXELS, BLOCK_N), ACC)
    for j0 in range(0, total, BLOCK_K):
        j = j0 + tl.arange(0, BLOCK_K)
        c = j % C
        # j // C // ns: as in box_pixels, for so few taps
        r = (j // C * per_row) >> 20 if R * S <= 1008 else j // C // ns
        s = j // C - r * ns
        dh = r * dil_h
        dv = s * dil_w
        hr = h[:, None] + tl.where(j < total, dh, FAR)[None, :]
        vs = v[:, None] + dv[None, :]
        # negative is huge
        in_x = (hr.to(tl.uint32) < H) & (vs.to(tl.uint32) < W)
        shift = dh * W + dv
        if INT64:
            shift = shift.to(tl.int64)
        x_offs = pixel[:, None] + (shift * cg + c)[None, :]
        a = load_masked(x_ptr, xo, x_offs, in_x, 1, ALIGN, CLAMP)
        tap = (tap_r + (r_lo + r) * step_r) * FILTER_S + tap_s + (s_lo + s) * step_s
        in_w = (j < total)[:, None] & (n < K)[None, :]
        if TRANSPOSED:
            w_offs = (((g * C + c) * (FILTER_R * FILTER_S) + tap) * CW)[:, None] + n[None, :]
        else:
            w_offs = (tap * CW + c)[:, None] + ((g * K + n) * (FILTER_R * FILTER_S * CW))[None, :]
        b = load_masked(w_ptr, 0, w_offs, in_w, 1, 1, CLAMP)
        acc = dot(a, b, acc, PRECISION)
    store_tile(
        y_ptr, bias_ptr, acc, g, img, p0, q0, n0, N, P, Q, K, sy_n, sy_p, sy_q, sy_k, y0, BLOCK_IMG,
        BLOCK_P, BLOCK_Q, BLOCK_N, PIXELS, ALIGN_Y, EPILOGUE, INT64
    )


@triton.jit
def box_walk(
    img, p, q, last_p, last_q, H, W, channels, first, stride_h, stride_w, wide: tl.constexpr,
    BLOCK_IMG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
):
    """(offset of the box at (img, p, q) of an image H x W, from `first` on, and what it gains at the
    next box, the next row of boxes, which has last_q columns, the next images, which have last_p
    rows), in units of which a pixel has `channels`: those show what is aligned."""
    offset = ((img.to(tl.int64) * H + p * stride_h) * W + q * stride_w) * channels + first
    box = tl.cast(BLOCK_Q * stride_w, wide) * channels
    row = (tl.cast(BLOCK_P * stride_h, wide) * W - last_q * stride_w) * channels
    image = (BLOCK_IMG * H - last_p * stride_h).to(wide) * W * channels
    return offset.to(wide), box, row, image


@triton.jit
def gained(offset, row, at_row, image, at_image):
    """offset, and what it gains at the end of a row of boxes and of the last one of an image."""
    offset = tl.where(row, offset + at_row, offset)
    return tl.where(image, offset + at_image, offset)


@triton.jit
def filter_tile(
    pid, K, G, C, R, S, cols, FLAT: tl.constexpr, ALIGN_C: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(split, group, first output channel, first column, columns, channel and tap (r, s) of each,
    first and last r and s) of wgrad's tile pid. Columns: see `reduce`."""
    tiles_m = tl.cdiv(K, BLOCK_M)
    tiles_n = tl.cdiv(cols, BLOCK_N)
    k0 = pid % tiles_m * BLOCK_M
    t = pid // tiles_m
    n0 = t % tiles_n * BLOCK_N
    t = t // tiles_n
    n = n0 + tl.arange(0, BLOCK_N)
    if FLAT:
        # aligned runs of ALIGN_C columns are channels of one tap
        c = tl.max_contiguous(tl.multiple_of(n % C, ALIGN_C), ALIGN_C)
        r = tl.max_constancy(n // C // S, ALIGN_C)
        s = tl.max_constancy(n // C % S, ALIGN_C)
        r_lo, r_hi = tl.min(r, axis=0), tl.max(tl.where(n < cols, r, 0), axis=0)
        s_lo, s_hi = (
            tl.min(tl.where(n < cols, s, S), axis=0),
            tl.max(tl.where(n < cols, s, 0), axis=0),
        )
    else:
        c = n
        r = t % (R * S) // S
        s = t % S
        r_lo, r_hi, s_lo, s_hi = r, r, s, s
        t = t // (R * S)
    return t // G, t % G, k0, n0, n, c, r, s, r_lo, r_hi, s_lo, s_hi


@triton.jit
def store_filters(
    dw_ptr, acc, k0, c, r, s, K, C, sw_k, sw_r, sw_s, sw_c, in_dw, BUNDLE: tl.constexpr,
    ALIGN_C: tl.constexpr, ALIGN_W: tl.constexpr, INT64: tl.constexpr, BLOCK_M: tl.constexpr,
    ROW: tl.constexpr,
):
    """acc -> dw[k, columns], columns of channels c and taps (r, s). ROW: the axis of k."""
    COL: tl.constexpr = 1 - ROW
    kk = tl.arange(0, BLOCK_M)
    rows = (kk.to(tl.int64) if INT64 else kk) * sw_k
    if BUNDLE > 1:
        group = (k0 + kk) // (K // BUNDLE)
        rows -= group * (C // BUNDLE * sw_c)
        in_dw = in_dw & (along(group, ROW) == along(c // (C // BUNDLE), COL))
    rows = tl.multiple_of(rows, ALIGN_C)
    columns = c * sw_c + tl.multiple_of(r * sw_r + s * sw_s, ALIGN_W)
    tl.store(
        dw_ptr + address(along(rows, ROW) + along(columns, COL), INT64),
        acc.to(dw_ptr.dtype.element_ty),
        mask=in_dw,
    )


@triton.jit
def reduce(
    pid, x_ptr, dy_ptr, dw_ptr, N, H, W, P, Q, K, G, cg, x0, kg, y0, stride_h, stride_w, off_h,
    off_w, dil_h, dil_w, sw_split, sw_k, sw_r, sw_s, sw_c, SPLIT_K, C, R, S, FLAT: tl.constexpr,
    ALIGN_C: tl.constexpr, ALIGN_K: tl.constexpr, ALIGN_W: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr, INT64: tl.constexpr, CLAMP: tl.constexpr, BLOCK_IMG: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BUNDLE: tl.constexpr, PIXELS: tl.constexpr,
):
    """Tile pid of dw[k, columns] over pixel boxes of the tap's live output rectangle.

    Columns are BLOCK_N channels of one tap, or (FLAT) BLOCK_N flattened (tap, channel) pairs, whose
    live rectangles are united. Pixels of x and dy have cg and kg channels, read from x0 and y0 on.
    Of BUNDLE groups that are multiplied as one the blocks on the diagonal are stored.
    """
    cols = R * S * C if FLAT else C
    # axes of the tile: fewer than 16 output channels are columns of the product, of which 8 are
    # enough
    ROW: tl.constexpr = 1 if BLOCK_M < 16 else 0
    COL: tl.constexpr = 1 - ROW
    split, g, k0, n0, n, c, r, s, r_lo, r_hi, s_lo, s_hi = filter_tile(
        pid, K, G, C, R, S, cols, FLAT, ALIGN_C, BLOCK_M, BLOCK_N
    )
    count, img, p, q, p_lo, p_hi, q_lo, q_hi = wgrad_boxes(
        split, r_lo, r_hi, s_lo, s_hi, N, H, W, P, Q, stride_h, stride_w, off_h, off_w, dil_h,
        dil_w, BLOCK_IMG, BLOCK_P, BLOCK_Q, SPLIT_K
    )
    i, bp, bq = box_pixels(BLOCK_P, BLOCK_Q, PIXELS)
    kk = tl.arange(0, BLOCK_M)
    in_k = along(below(k0 + kk, K, ALIGN_K), ROW)
    in_c = along(below(n, cols, ALIGN_C), COL)
    shift_h = r * dil_h + off_h
    shift_w = s * dil_w + off_w
    dy_pixel = source_pixels(i, bp, bq, P, Q, kg, 1, 1, ALIGN_K, INT64)
    dy_offs = along(address(kk, INT64), ROW) + along(address(dy_pixel, INT64), COL)
    x_pixel = source_pixels(i, bp, bq, H, W, cg, stride_h, stride_w, ALIGN_C, INT64)
    if FLAT:
        x_cols = tl.multiple_of((shift_h * W + shift_w).to(tl.int64) * cg, ALIGN_C) + c
        x_offs = along(x_pixel, ROW) + along(x_cols, COL)
        xt = x0 + g * C
    else:
        x_offs = along(address(x_pixel, INT64), ROW) + along(
            address(tl.arange(0, BLOCK_N), INT64), COL
        )
        xt = (shift_h * W + shift_w).to(tl.int64) * cg + x0 + g * C + n0
    # 32 bits where every box begins inside the image, whatever the steps between are
    wide: tl.constexpr = tl.int64 if INT64 or FLAT else tl.int32
    last_p = tl.cdiv(p_hi - p_lo, BLOCK_P) * BLOCK_P
    last_q = tl.cdiv(q_hi - q_lo, BLOCK_Q) * BLOCK_Q
    xo, x_next, x_row, x_img = box_walk(
        img, p, q, last_p, last_q, H, W, cg // ALIGN_C, xt // ALIGN_C, stride_h, stride_w, wide,
        BLOCK_IMG, BLOCK_P, BLOCK_Q
    )
    dyo, dy_next, dy_row, dy_img = box_walk(
        img, p, q, last_p, last_q, P, Q, kg // ALIGN_K, (y0 + g * K + k0) // ALIGN_K, 1, 1, wide,
        BLOCK_IMG, BLOCK_P, BLOCK_Q
    )
    acc = tl.zeros((BLOCK_N, BLOCK_M) if ROW else (BLOCK_M, BLOCK_N), ACC)
    for _ in range(count):
        live = (i < tl.minimum(N - img, BLOCK_IMG)) & (bp < p_hi - p) & (bq < q_hi - q)
        in_dy = in_k & along(live, COL)
        in_x = along(live, ROW) & in_c
        if FLAT:
            hr = along((p + bp) * stride_h, ROW) + along(shift_h, COL)
            vs = along((q + bq) * stride_w, ROW) + along(shift_w, COL)
            # negative is huge
            in_x = in_x & ((hr.to(tl.uint32) < H) & (vs.to(tl.uint32) < W))
        a = load_masked(dy_ptr, dyo.to(tl.int64) * ALIGN_K, dy_offs, in_dy, ROW, ALIGN_K, CLAMP)
        b = load_masked(x_ptr, xo.to(tl.int64) * ALIGN_C, x_offs, in_x, COL, ALIGN_C, CLAMP)
        acc = dot(b, a, acc, PRECISION) if ROW else dot(a, b, acc, PRECISION)
        # the next box, row of boxes, images
        row = q + BLOCK_Q >= q_hi
        q = tl.where(row, q_lo, q + BLOCK_Q)
        p = tl.where(row, p + BLOCK_P, p)
        image = p >= p_hi
        p = tl.where(image, p_lo, p)
        img = tl.where(image, img + BLOCK_IMG, img)
        xo = gained(xo + x_next, row, x_row, image, x_img)
        dyo = gained(dyo + dy_next, row, dy_row, image, dy_img)
    dw = dw_ptr + tl.multiple_of(
        split.to(tl.int64) * sw_split + (g * K + k0).to(tl.int64) * sw_k, ALIGN_C
    )
    store_filters(
        dw, acc, k0, c, r, s, K, C, sw_k, sw_r, sw_s, sw_c, in_k & in_c, BUNDLE, ALIGN_C, ALIGN_W,
        INT64, BLOCK_M, ROW
    )


@triton.jit(
    do_not_specialize=[*RUNTIME, "C"],
    do_not_specialize_on_alignment=STEP_1,
    launch_metadata=launch_metadata,
)
def wgrad(
    x_ptr, dy_ptr, dw_ptr, N, H, W, P, Q, K, G, stride_h, stride_w, off_h, off_w, dil_h, dil_w,
    sw_split, sw_k, sw_r, sw_s, sw_c, SPLIT_K, C, R: tl.constexpr, S: tl.constexpr,
    FLAT: tl.constexpr, ALIGN_C: tl.constexpr, ALIGN_K: tl.constexpr, ALIGN_W: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, INT64: tl.constexpr, CLAMP: tl.constexpr,
    BLOCK_IMG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BUNDLE: tl.constexpr, PIXELS: tl.constexpr,
):
    """A tile of dw; split z of SPLIT_K writes its own partial sum."""
    reduce(
        tl.program_id(0), x_ptr, dy_ptr, dw_ptr, N, H, W, P, Q, K, G, C * G, 0, K * G, 0, stride_h,
        stride_w, off_h, off_w, dil_h, dil_w, sw_split, sw_k, sw_r, sw_s, sw_c, SPLIT_K, C, R, S,
        FLAT, ALIGN_C, ALIGN_K, ALIGN_W, PRECISION, ACC, INT64, CLAMP, BLOCK_IMG, BLOCK_P, BLOCK_Q,
        BLOCK_M, BLOCK_N, BUNDLE, PIXELS
    )


# ---- several correlations in one launch
# The branch of a tile is found and described at run time: one copy of the loop, not COUNT of them,
# whose addresses would be live at once.
@triton.jit(
    do_not_specialize=RUNTIME,
    do_not_specialize_on_alignment=STEP_1,
    launch_metadata=branches_metadata,
)
def correlate_branches(
    x_ptr, w_0, w_1, w_2, w_3, w_4, w_5, w_6, w_7, bias_ptr, y_ptr, N, H, W, P, Q, G, stride_h,
    stride_w, sy_n, sy_p, sy_q, sy_k, y0, BRANCHES: tl.constexpr, FILTERS: tl.constexpr,
    COUNT: tl.constexpr, SUM: tl.constexpr, CHANNELS: tl.constexpr, MOST_R: tl.constexpr,
    MOST_S: tl.constexpr, TRANSPOSED: tl.constexpr, EPILOGUE: tl.constexpr, ALIGN: tl.constexpr,
    ALIGN_W: tl.constexpr, ALIGN_Y: tl.constexpr, EVEN_C: tl.constexpr, EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, INT64: tl.constexpr, CLAMP: tl.constexpr,
    BLOCK_IMG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PIXELS: tl.constexpr,
):
    """`correlate` for COUNT branches with a filter each: side by side, where every branch has tiles
    of its own, or (SUM) added up in one accumulator.

    BRANCHES: of each branch C, K, R, S, the first channels that it reads and writes, off_h, off_w,
    dil_h, dil_w; FILTERS: tap_r, tap_s, step_r, step_s, FILTER_R, FILTER_S; pixels of the source
    have CHANNELS.
    """
    filters = (w_0, w_1, w_2, w_3, w_4, w_5, w_6, w_7)
    pid = tl.program_id(0)
    branch = pid * 0
    if not SUM:
        branch, pid = find_branch(
            pid, N, P, Q, G, BRANCHES, COUNT, BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_N
        )
    K = field(branch, BRANCHES, 1)
    first = field(branch, BRANCHES, 5)
    g, img, p0, q0, n0 = tile_from_middle(
        pid, N, P, Q, K, G, BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_N
    )
    acc = tl.zeros((PIXELS, BLOCK_N), ACC)
    # (SUM) a zero that compilers do not know: what depends on it is computed anew for each branch,
    # not kept in registers
    zero = pid * 0
    for _ in range(COUNT if SUM else 1):
        C = field(branch, BRANCHES, 0)
        R = field(branch, BRANCHES, 2) + zero
        S = field(branch, BRANCHES, 3)
        filter_s = field(branch, FILTERS, 5, 6)
        if MOST_R * MOST_S == 1:  # ptxas spills where it sees that nothing is wider
            filter_s += tl.minimum(N, 0)
        acc = accumulate(
            acc, x_ptr, filter_of(branch, filters, 0 if SUM else N, COUNT), zero, 0, g, img, p0, q0,
            n0, N, H, W, P, Q, K, G, CHANNELS, field(branch, BRANCHES, 4), stride_h, stride_w,
            field(branch, BRANCHES, 6), field(branch, BRANCHES, 7), field(branch, BRANCHES, 8),
            field(branch, BRANCHES, 9), field(branch, FILTERS, 0, 6) + zero,
            field(branch, FILTERS, 1, 6), field(branch, FILTERS, 2, 6), field(branch, FILTERS, 3, 6),
            1, C, K if TRANSPOSED else C, R, S, field(branch, FILTERS, 4, 6) + zero, filter_s,
            MOST_R, MOST_S, TRANSPOSED, ALIGN, ALIGN_W, EVEN_C, EVEN_N, PRECISION, INT64, CLAMP,
            BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_N, BLOCK_K, False, PIXELS
        )
        branch += 1
        if SUM:
            zero = tl.minimum(N, zero)
    store_tile(
        y_ptr, bias_ptr + first, acc, g, img, p0, q0, n0, N, P, Q, K, sy_n, sy_p, sy_q, sy_k,
        y0 + first * sy_k, BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_N, PIXELS, ALIGN_Y, EPILOGUE, INT64
    )


@triton.jit
def filter_of(branch, filters, N, COUNT: tl.constexpr):
    """The filter of a branch. N: anything positive."""
    # never moved: between two arguments themselves LLVM chooses by their addresses
    chosen = filters[0] + tl.minimum(N, 0) * 16
    for b in tl.static_range(1, COUNT):
        chosen = tl.where(branch == b, filters[b], chosen)
    return chosen


@triton.jit(
    do_not_specialize=RUNTIME,
    do_not_specialize_on_alignment=STEP_1,
    launch_metadata=branches_metadata,
)
def wgrad_branches(
    x_ptr, dy_ptr, dw_0, dw_1, dw_2, dw_3, dw_4, dw_5, dw_6, dw_7, part_ptr, N, H, W, P, Q, G,
    stride_h, stride_w, SPLIT_K, BRANCHES: tl.constexpr, COUNT: tl.constexpr,
    CHANNELS: tl.constexpr, CHANNELS_Y: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    IS_SPLIT: tl.constexpr, FLAT: tl.constexpr, ALIGN_C: tl.constexpr, ALIGN_K: tl.constexpr,
    ALIGN_W: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, INT64: tl.constexpr,
    CLAMP: tl.constexpr, BLOCK_IMG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PIXELS: tl.constexpr,
):
    """`wgrad` of COUNT branches, the filter of each in a tensor of its own, or (IS_SPLIT) all
    filters' partial sums one after another, (SPLIT_K, K, R, S, C) each."""
    pid, branch, part = find_filter(
        tl.program_id(0), G, SPLIT_K, BRANCHES, COUNT, BLOCK_M, BLOCK_N, 1, FLAT
    )
    # run-time sizes, even of equal branches: ptxas spills where it sees that nothing is masked
    C = tl.minimum(field(branch, BRANCHES, 0) * SPLIT_K, field(branch, BRANCHES, 0))
    K = tl.minimum(field(branch, BRANCHES, 1) * SPLIT_K, field(branch, BRANCHES, 1))
    R = field(branch, BRANCHES, 2)
    S = field(branch, BRANCHES, 3)
    if IS_SPLIT:
        dw_ptr = part_ptr + part
    else:
        dw_ptr = filter_of(branch, (dw_0, dw_1, dw_2, dw_3, dw_4, dw_5, dw_6, dw_7), N, COUNT)
    KRSC: tl.constexpr = CHANNELS_LAST or IS_SPLIT  # else KCRS
    reduce(
        pid, x_ptr, dy_ptr, dw_ptr, N, H, W, P, Q, K, G, CHANNELS,
        field(branch, BRANCHES, 4), CHANNELS_Y, field(branch, BRANCHES, 5), stride_h, stride_w,
        field(branch, BRANCHES, 6), field(branch, BRANCHES, 7), field(branch, BRANCHES, 8),
        field(branch, BRANCHES, 9), (R * S * C).to(tl.int64) * K * G, R * S * C, S * C if KRSC else S,
        C if KRSC else 1, 1 if KRSC else R * S, SPLIT_K, C, R, S, FLAT, ALIGN_C, ALIGN_K, ALIGN_W,
        PRECISION, ACC, INT64, CLAMP, BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_M, BLOCK_N, 1, PIXELS
    )


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=STEP_1)
def sum_branches(
    part_ptr, dw_0, dw_1, dw_2, dw_3, dw_4, dw_5, dw_6, dw_7, G, SPLIT_K, BRANCHES: tl.constexpr,
    COUNT: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):
    """`common.sum_splits` of the filters of all branches."""
    pid, branch, part = find_filter(
        tl.program_id(0), G, SPLIT_K, BRANCHES, COUNT, 0, 0, BLOCK, False
    )
    C = field(branch, BRANCHES, 0)
    R = field(branch, BRANCHES, 2)
    S = field(branch, BRANCHES, 3)
    dw_ptr = filter_of(branch, (dw_0, dw_1, dw_2, dw_3, dw_4, dw_5, dw_6, dw_7), 0, COUNT)
    sum_block(
        part_ptr + part, None, dw_ptr, pid, R, S, C,
        (R * S * C).to(tl.int64) * field(branch, BRANCHES, 1) * G, R * S * C, S * C if CHANNELS_LAST else S,
        C if CHANNELS_LAST else 1, 1 if CHANNELS_LAST else R * S, 0, SPLIT_K, "", BLOCK
    )
