"""Pieces that the convolution kernels share: pixel boxes, live taps, addresses, epilogue."""
import triton
import triton.language as tl


@triton.jit
def cdiv_pos(a, b):
    """ceil(max(a, 0) / b): the numerator stays non-negative, since compiled `//` truncates toward zero."""
    return (tl.maximum(a, 0) + b - 1) // b


@triton.jit
def live_taps(first, last, size, offset, stride, dilation, taps):
    """(first, count) of the taps that touch an axis of `size` for some output first..last (inclusive)."""
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
def box_pixels(BLOCK_IMG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr):
    """(image, row, column) inside a pixel box of the BLOCK_IMG*BLOCK_P*BLOCK_Q rows of a tile: shifts, since sides are powers of two."""
    m = tl.arange(0, BLOCK_IMG * BLOCK_P * BLOCK_Q)
    return m // (BLOCK_P * BLOCK_Q), m // BLOCK_Q % BLOCK_P, m % BLOCK_Q


@triton.jit
def output_tile(N, P, Q, K, G, BLOCK_IMG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr):
    """(group, image, row, column, channel) where this program's output tile begins; channel tiles are neighbours, so they share x in L2."""
    pid = tl.program_id(0)
    tiles_n = tl.cdiv(K, BLOCK_N)
    tiles_q = tl.cdiv(Q, BLOCK_Q)
    tiles_p = tl.cdiv(P, BLOCK_P)
    n0 = pid % tiles_n * BLOCK_N
    t = pid // tiles_n
    q0 = t % tiles_q * BLOCK_Q
    t = t // tiles_q
    p0 = t % tiles_p * BLOCK_P
    t = t // tiles_p
    return t % G, t // G * BLOCK_IMG, p0, q0, n0


@triton.jit
def address(x, INT64: tl.constexpr):
    """Row offsets as unsigned 32-bit (scalar base + offset addressing), or 64-bit for tensors of 2**31 elements and more."""
    return x.to(tl.int64) if INT64 else x.to(tl.uint32)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b; "upcast" is for Triton's interpreter, which multiplies bfloat16 as if it were integer."""
    if PRECISION == "upcast":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def load_masked(ptr, base, offsets, mask, AXIS: tl.constexpr, ALIGN: tl.constexpr, CLAMP: tl.constexpr):
    """ptr[base + offsets], zero where masked; CLAMP also gives masked lanes an address inside the tensor (pytorch#187222).

    Runs of ALIGN elements along AXIS are aligned and share their mask: said here, since a clamped offset no longer shows it.
    """
    if CLAMP:
        offsets = tl.where(mask, offsets + base, 0)
        offsets = tl.max_contiguous(tl.multiple_of(offsets, [1, ALIGN] if AXIS else [ALIGN, 1]), [1, ALIGN] if AXIS else [ALIGN, 1])
        return tl.load(ptr + offsets, mask=mask, other=0.0)
    else:
        return tl.load(ptr + base + offsets, mask=mask, other=0.0)


@triton.jit
def below(x, limit, ALIGN: tl.constexpr):
    """x < limit, where limit is a multiple of ALIGN: in a form that shows that aligned runs of ALIGN elements share the answer."""
    return x // ALIGN < limit // ALIGN


@triton.jit
def store_tile(y_ptr, bias_ptr, acc, g, img, p0, q0, n0, N, P, Q, K, sy_n, sy_p, sy_q, sy_k, y0,
               BLOCK_IMG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
               ALIGN_Y: tl.constexpr, HAS_BIAS: tl.constexpr, INT64: tl.constexpr):
    """acc [pixels, BLOCK_N] (+ bias) -> y + y0, through y's own strides: NHWC, all but sy_k multiples of ALIGN_Y, or NCHW with ALIGN_Y = 1."""
    n = tl.arange(0, BLOCK_N)
    in_k = below(n0 + n, K, ALIGN_Y)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + g * K + n0 + n, mask=in_k, other=0.0).to(acc.dtype)[None, :]
    i, p, q = box_pixels(BLOCK_IMG, BLOCK_P, BLOCK_Q)
    in_y = (img + i < N) & (p0 + p < P) & (q0 + q < Q)
    base = y0 + img.to(tl.int64) * sy_n + p0.to(tl.int64) * sy_p + q0.to(tl.int64) * sy_q + (g * K + n0).to(tl.int64) * sy_k
    if INT64:
        i, p, q, n = i.to(tl.int64), p.to(tl.int64), q.to(tl.int64), n.to(tl.int64)
    offset = tl.multiple_of(i * sy_n + p * sy_p + q * sy_q, ALIGN_Y)[:, None] + (n * sy_k)[None, :]
    tl.store(y_ptr + tl.multiple_of(base, ALIGN_Y) + offset, acc.to(y_ptr.dtype.element_ty), mask=in_y[:, None] & in_k[None, :])
