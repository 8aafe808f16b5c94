"""Implicit GEMM for sm_90, warp-specialised and persistent, in Gluon: one producer warp loads boxes
by descriptor (TMA) into a ring of STAGES buffers, two consumer warpgroups multiply them with wgmma,
and the next tile's boxes arrive while this tile's result is stored.

Operands as in kernels/tma.py, but w is always a descriptor over (K, R*S, C). The consumers share a
tile, each its half of the rows, or (PINGPONG) take turns: one multiplies while the other stores.
The tiles of a launch are a sequence. A program takes every num_programs-th one, those in the middle
of the map, where most taps are live, first; or (STREAM) all programs take equally many steps, a
contiguous part of the sequence of (tile, step): the one that begins a tile stores it, the others
write fp32 parts of it, which are added in a tree, always the same. Within a tile the taps are
innermost, so that a block of channels is read while it is in L2. The columns of a map beyond the
last whole box, its edge, may have boxes of another shape, whose tiles end the sequence.
"""

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .common import (
    RUNTIME,
    branches_metadata,
    field,
    from_middle,
    launch_metadata,
    live_outputs,
    live_taps,
)

if TYPE_CHECKING:
    import triton as gluon  # its `jit` has overloads, Gluon's has none
else:
    from triton.experimental import gluon

# names that moved: async_copy_* until 3.7, both in 3.8, async_load and async_store from 3.9 on;
# thread_barrier in 3.6
tma_load: Any = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store: Any = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
barrier: Any = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
# of 64 bits, which no memory holds by chance: flags begin as they are, and end as something else
WRITTEN = gl.constexpr(0x5DA1_93C7_0E6B_F284)
RUNTIME = RUNTIME + "C G R S FILTER_S step_s sy_k sw_c group_steps sum_w GROUP main_total edge_group_steps edge_sum_w split".split()


# ---- the sequence of steps
@triton.jit
def share_of_program():
    """Whose share of the steps this program takes, of STREAM: a program then waits for those that
    the GPU starts before it."""
    return tl.num_programs(0) - 1 - tl.program_id(0)


@triton.jit
def steps_of_share(total):
    """Steps of all shares but the last ones, which have what is left of `total`."""
    return tl.cdiv(total, tl.num_programs(0))


@triton.constexpr_function
def bits_of(side):
    """log2 of a power of two."""
    return side.bit_length() - 1


@triton.jit
def taps_before(block, size, offset, dilation, taps, out, bits):
    """Live taps of an axis' blocks of 2**bits outputs before `block`, summed."""
    total = 0
    for t in range(taps):
        first = tl.maximum(-offset - t * dilation, 0)
        last = tl.minimum(size - offset - t * dilation, out) - 1
        some = tl.minimum((tl.maximum(last, 0) >> bits) + 1, block) - (first >> bits)
        total += tl.where(first <= last, tl.maximum(some, 0), 0)
    return total


@triton.jit
def find_block(step, unit, blocks, size, offset, dilation, taps, out, bits):
    """(block, live taps before it) of an axis that holds a step, when each live tap is worth `unit`
    steps."""
    low = 0
    before = 0
    high = blocks
    while high - low > 1:
        middle = (low + high) // 2
        live = taps_before(middle, size, offset, dilation, taps, out, bits)
        is_below = live * unit <= step
        low = tl.where(is_below, middle, low)
        before = tl.where(is_below, live, before)
        high = tl.where(is_below, high, middle)
    return low, before


@triton.jit
def blocks_of(size, bits):
    """Of 2**bits."""
    return ((size - 1) >> bits) + 1


@triton.jit
def live_taps_of(block, size, offset, dilation, taps, out, bits):
    """`live_taps` of a block of 2**bits outputs."""
    first = block << bits
    last = tl.minimum(first + (1 << bits), out) - 1
    return live_taps(first, last, size, offset, 1, dilation, taps)


@triton.jit
def part_of_map(
    on_edge, geo, edge, BLOCK_IMG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
    EDGE_IMG: tl.constexpr, EDGE_P: tl.constexpr, EDGE_Q: tl.constexpr,
):
    """(`geo` of the edge, or of what is left of it, log2 of the sides of boxes, its first column)."""
    if EDGE_IMG:
        (
            N, H, W, P, Q, C, K, G, R, S, FILTER_S, off_h, off_w, dil_h, dil_w, tap_r, tap_s,
            step_r, step_s, group_steps, sum_w, GROUP
        ) = geo
        split, main_total, edge_group_steps, edge_sum_w = edge
        first = tl.where(on_edge, split, 0)
        part = (
            N, H, W, P, tl.where(on_edge, Q - split, split), C, K, G, R, S, FILTER_S, off_h,
            off_w + first, dil_h, dil_w, tap_r, tap_s, step_r, step_s,
            tl.where(on_edge, edge_group_steps, group_steps), tl.where(on_edge, edge_sum_w, sum_w),
            GROUP
        )
        return (
            part, tl.where(on_edge, bits_of(EDGE_IMG), bits_of(BLOCK_IMG)),
            tl.where(on_edge, bits_of(EDGE_P), bits_of(BLOCK_P)),
            tl.where(on_edge, bits_of(EDGE_Q), bits_of(BLOCK_Q)), first
        )
    else:
        return geo, bits_of(BLOCK_IMG), bits_of(BLOCK_P), bits_of(BLOCK_Q), 0


@triton.jit
def correlation_tile(
    tile, geo, img_bits, p_bits, q_bits, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STREAM: tl.constexpr,
):
    """(group, image, row, column, channel) where a tile of boxes with sides of 2**..._bits begins,
    its first live taps and their numbers (r, s), its steps.

    GROUP channel tiles are walked together, so that they share x in L2: rows, columns, images and
    groups, these channel tiles are the inner loops.
    """
    (
        N, H, W, P, Q, C, K, G, R, S, FILTER_S, off_h, off_w, dil_h, dil_w, tap_r, tap_s, step_r,
        step_s, group_steps, sum_w, GROUP
    ) = geo
    images = blocks_of(N, img_bits) * G
    tiles_p = blocks_of(P, p_bits)
    tiles_q = blocks_of(Q, q_bits)
    part = tile // (GROUP * images * tiles_p * tiles_q)
    t = tile % (GROUP * images * tiles_p * tiles_q)
    group = tl.minimum(tl.cdiv(K, BLOCK_N) - part * GROUP, GROUP)
    n0 = (part * GROUP + t % group) * BLOCK_N
    t = t // group
    g = t % G
    img = t // G % (images // G) << img_bits
    t = t // images
    q = t % tiles_q
    p = t // tiles_q
    if not STREAM:  # from the middle outwards
        p = from_middle(p, tiles_p)
        q = from_middle(q, tiles_q)
    r_lo, nr = live_taps_of(p, H, off_h, dil_h, R, P, p_bits)
    s_lo, ns = live_taps_of(q, W, off_w, dil_w, S, Q, q_bits)
    return (
        g, img, p << p_bits, q << q_bits, n0, r_lo, nr, s_lo, ns, nr * ns * tl.cdiv(C, BLOCK_K)
    )


@triton.jit
def edged_tile(
    tile, before, geo, edge, BLOCK_IMG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
    EDGE_IMG: tl.constexpr, EDGE_P: tl.constexpr, EDGE_Q: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STREAM: tl.constexpr,
):
    """`correlation_tile` of a tile; those from `before` on are the edge's."""
    on_edge = tile >= before
    part, img_bits, p_bits, q_bits, first = part_of_map(
        on_edge, geo, edge, BLOCK_IMG, BLOCK_P, BLOCK_Q, EDGE_IMG, EDGE_P, EDGE_Q
    )
    if EDGE_IMG:
        tile -= tl.where(on_edge, before, 0)
    g, img, p0, q0, n0, r_lo, nr, s_lo, ns, steps = correlation_tile(
        tile, part, img_bits, p_bits, q_bits, BLOCK_N, BLOCK_K, STREAM
    )
    return g, img, p0, q0 + first, n0, r_lo, nr, s_lo, ns, steps


@triton.jit
def correlation_start(
    step, geo, img_bits, p_bits, q_bits, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """(tile, step of the tile) of a step of the sequence; tiles as in `correlation_tile`."""
    (
        N, H, W, P, Q, C, K, G, R, S, FILTER_S, off_h, off_w, dil_h, dil_w, tap_r, tap_s, step_r,
        step_s, group_steps, sum_w, GROUP
    ) = geo
    blocks = tl.cdiv(C, BLOCK_K)
    images = blocks_of(N, img_bits) * G
    tiles_p = blocks_of(P, p_bits)
    tiles_q = blocks_of(Q, q_bits)
    part = step // group_steps
    step -= part * group_steps
    # tiles of the same pixels
    inner = images * tl.minimum(tl.cdiv(K, BLOCK_N) - part * GROUP, GROUP)
    unit = inner * blocks * sum_w
    p, before = find_block(step, unit, tiles_p, H, off_h, dil_h, R, P, p_bits)
    step -= before * unit
    _, nr = live_taps_of(p, H, off_h, dil_h, R, P, p_bits)
    unit = inner * blocks * nr
    q, before = find_block(step, unit, tiles_q, W, off_w, dil_w, S, Q, q_bits)
    step -= before * unit
    _, ns = live_taps_of(q, W, off_w, dil_w, S, Q, q_bits)
    steps = blocks * nr * ns
    return part * GROUP * images * tiles_p * tiles_q + (
        p * tiles_q + q
    ) * inner + step // steps, step % steps


@triton.jit
def correlation_share(
    geo, edge, total, BLOCK_IMG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
    EDGE_IMG: tl.constexpr, EDGE_P: tl.constexpr, EDGE_Q: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STREAM: tl.constexpr,
):
    """(first tile, where in it this program begins, its steps at most, tiles, those before the
    edge's); total: steps of all tiles."""
    (
        N, H, W, P, Q, C, K, G, R, S, FILTER_S, off_h, off_w, dil_h, dil_w, tap_r, tap_s, step_r,
        step_s, group_steps, sum_w, GROUP
    ) = geo
    split, main_total, edge_group_steps, edge_sum_w = edge
    columns = split if EDGE_IMG else Q
    others = tl.cdiv(K, BLOCK_N) * G
    before = tl.cdiv(N, BLOCK_IMG) * tl.cdiv(P, BLOCK_P) * tl.cdiv(columns, BLOCK_Q) * others
    tiles = before
    if EDGE_IMG:
        tiles += tl.cdiv(N, EDGE_IMG) * tl.cdiv(P, EDGE_P) * tl.cdiv(Q - split, EDGE_Q) * others
    if not STREAM:
        return tl.program_id(0), 0, 2147483647, tiles, before
    else:
        much = steps_of_share(total)
        first = tl.minimum(share_of_program() * much, total)
        on_edge = first >= main_total
        part, img_bits, p_bits, q_bits, _ = part_of_map(
            on_edge, geo, edge, BLOCK_IMG, BLOCK_P, BLOCK_Q, EDGE_IMG, EDGE_P, EDGE_Q
        )
        step = first - tl.where(on_edge, main_total, 0) if EDGE_IMG else first
        tile, begin = correlation_start(step, part, img_bits, p_bits, q_bits, BLOCK_N, BLOCK_K)
        if EDGE_IMG:
            tile += tl.where(on_edge, before, 0)
        return tile, begin, tl.minimum(total - first, much), tiles, before


# ---- the ring
@gluon.jit
def ring(a, b, M: gl.constexpr, N: gl.constexpr, PINGPONG: gl.constexpr, STAGES: gl.constexpr):
    """Shared memory of a program: STAGES boxes of both operands, buffers of the result, barriers
    (full and empty boxes, whose turn it is)."""
    ROWS: gl.constexpr = M if PINGPONG else M // 2
    BITS: gl.constexpr = a.dtype.primitive_bitwidth
    # columns that are stored at once: 128 bytes, the widest swizzle
    STORED: gl.constexpr = 1024 // BITS
    # two for each consumer, which the columns of a tile take in turn
    BUFFERS: gl.constexpr = 4 if ROWS == 64 and N > STORED else 2
    a_bufs = gl.allocate_shared_memory(a.dtype, [STAGES] + a.block_type.shape, a.layout)
    b_bufs = gl.allocate_shared_memory(b.dtype, [STAGES] + b.block_type.shape, b.layout)
    y_bufs = gl.allocate_shared_memory(
        a.dtype, [BUFFERS, ROWS, STORED], gl.NVMMASharedLayout(128, BITS, 2)
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    order = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1 if PINGPONG else 2)
    for i in gl.static_range(2):
        mbarrier.init(order.index(i), count=1)
    return a_bufs, b_bufs, y_bufs, full, empty, order


@gluon.jit
def advance(stage, phase, STAGES: gl.constexpr):
    stage += 1
    over = stage == STAGES
    return gl.where(over, 0, stage), gl.where(over, phase ^ 1, phase)


@gluon.jit
def skip(stage, phase, steps, STAGES: gl.constexpr):
    """`advance` by `steps`."""
    last = stage + steps
    return last % STAGES, phase ^ (last // STAGES & 1)


@gluon.jit
def multiply(
    acc, a_bufs, b_bufs, full, empty, steps, stage, phase, prev, ROW: gl.constexpr,
    A_T: gl.constexpr, B_T: gl.constexpr, STAGES: gl.constexpr,
):
    """acc plus the products of `steps` stages: one is in flight while the buffers of the one before
    go back to the producer. A_T, B_T: whether the rows of a buffer are the reduction's (else the
    tile's)."""
    ROWS: gl.constexpr = acc.shape[0]
    for i in range(steps):
        mbarrier.wait(full.index(stage), phase)
        if A_T:
            a = flat(a_bufs.index(stage)).slice(ROW, ROWS, 1).permute([1, 0])
        else:
            a = flat(a_bufs.index(stage)).slice(ROW, ROWS)
        b = flat(b_bufs.index(stage))
        if not B_T:
            b = b.permute([1, 0])
        acc = warpgroup_mma(a, b, acc, is_async=True)
        acc = warpgroup_mma_wait(1, [acc])
        mbarrier.arrive(empty.index(prev), count=1, pred=i > 0)
        # frontend: a variable that enters the loop as the same value as the one that is assigned to
        # it here is not carried (3.6 to 3.9)
        prev = stage
        stage, phase = advance(stage, phase, STAGES)
    acc = warpgroup_mma_wait(0, [acc])
    mbarrier.arrive(empty.index(prev), count=1, pred=steps > 0)
    return acc, stage, phase, prev


@gluon.jit
def multiply_in_turn(
    acc, a_bufs, b_bufs, full, empty, order, steps, stage, phase, prev, go, ROW: gl.constexpr,
    A_T: gl.constexpr, B_T: gl.constexpr, PINGPONG: gl.constexpr, STAGES: gl.constexpr,
    ME: gl.constexpr,
):
    """`multiply`, (PINGPONG) after the other consumer's loop: a wait for a parity cannot tell a
    tile's boxes from those two rounds before."""
    if PINGPONG:
        mbarrier.wait(order.index(ME), go)
        go ^= 1
    acc, stage, phase, prev = multiply(
        acc, a_bufs, b_bufs, full, empty, steps, stage, phase, prev, ROW, A_T, B_T, STAGES
    )
    if PINGPONG:
        mbarrier.arrive(order.index(1 - ME), count=1)
    return acc, stage, phase, prev, go


@gluon.jit
def flat(buf):
    """A buffer [..., columns] as [rows, columns]."""
    COLUMNS: gl.constexpr = buf.shape[len(buf.shape) - 1]
    return buf.reshape([buf.numel // COLUMNS, COLUMNS])


@gluon.jit
def halves(t):
    """[M, N] -> its left and right half, in registers."""
    return t.reshape([t.shape[0], 2, t.shape[1] // 2]).permute([0, 2, 1]).split()


@gluon.jit
def epilogue(t, bias_ptr, first, end, EPILOGUE: gl.constexpr):
    """t [rows, output channels from `first` on], finished, as in common.py; below `end` there are
    channels."""
    if EPILOGUE == "bias":
        # each loads one or two and gets the others from its neighbours
        k = first + gl.arange(0, t.shape[1], gl.BlockedLayout([1], [32], [4], [0]))
        bias = gl.load(bias_ptr + k, mask=k < end, other=0.0).to(gl.float32)
        t += gl.convert_layout(bias, gl.SliceLayout(0, t.type.layout))[None, :]
    return t


@gluon.jit
def part_of(part_ptr, share, t, column, size, step_m, step_n):
    """Where the rows of t and its columns, from `column` of the tile on, lie in a share's part of
    its first tile: one of `size` elements, through these strides; part_ptr points to t's first row
    in that of share 0."""
    m = gl.arange(0, t.shape[0], gl.SliceLayout(1, t.type.layout))
    n = gl.arange(0, t.shape[1], gl.SliceLayout(0, t.type.layout))
    return part_ptr + share * size + (m * step_m)[:, None] + ((column + n) * step_n)[None, :]


@gluon.jit
def flags_of(part_ptr, SIZE: gl.constexpr):
    """Where the flags lie, two for each share, behind the parts of SIZE elements."""
    end = part_ptr + gl.num_programs(0) * SIZE
    return end.to(gl.pointer_type(gl.int64), bitcast=True)


@gluon.jit
def announce_part(flag_ptr, share):
    """Says that these warps have written a share's part."""
    barrier()
    gl.atomic_xchg(flag_ptr + 2 * share, WRITTEN, sem="release")


@triton.jit
def parts_to_add(begin, left, much):
    """How many parts a share adds to what it multiplies of a tile, between the steps before `begin`
    and the last `left`: those of the shares 1, 2, 4, ... after it, as long as its own number in the
    tile is a multiple of twice that. So the sums of a tile are a tree."""
    number = tl.cdiv(begin, much)
    further = tl.cdiv(left, much)
    parts = 0
    while ((number >> parts) % 2 == 0) & (1 << parts <= further):
        parts += 1
    return parts


@gluon.jit
def wait_for_parts(flag_ptr, share, count):
    """Until the parts that a share adds are said to be written; takes the word back."""
    for i in range(count):
        while gl.atomic_xchg(flag_ptr + 2 * (share + (1 << i)), 0, sem="acquire") != WRITTEN:
            pass


@gluon.jit
def add_parts(t, part_ptr, share, count, column, size, step_m, step_n):
    """t, columns of a tile from `column` on, plus the parts that a share adds, in their order."""
    COLUMNS: gl.constexpr = t.shape[1]
    if COLUMNS * t.shape[0] > 32 * 128:
        layout: gl.constexpr = t.type.layout
        left, right = halves(t)
        left = add_parts(left, part_ptr, share, count, column, size, step_m, step_n)
        right = add_parts(
            right, part_ptr, share, count, column + COLUMNS // 2, size, step_m, step_n
        )
        t = gl.join(left, right).permute([0, 2, 1]).reshape([t.shape[0], COLUMNS])
        return gl.convert_layout(t, layout, assert_trivial=True)
    else:
        for i in range(count):
            part_ptrs = part_of(part_ptr, share + (1 << i), t, column, size, step_m, step_n)
            t += gl.load(part_ptrs, eviction_policy="evict_first")
        return t


@gluon.jit
def store_columns(
    y, y_edge, on_edge, bias_ptr, buf, t, i0, i1, i2, i3, sizes, strides, BOX_1: gl.constexpr,
    BOX_2: gl.constexpr, EDGE_1: gl.constexpr, EDGE_2: gl.constexpr, EPILOGUE: gl.constexpr,
    TMA_STORE: gl.constexpr, ROWS_FIRST: gl.constexpr, ALIGN_Y: gl.constexpr, SLOTS: gl.constexpr,
):
    """t [rows of a box with sides ..., BOX_1, BOX_2, columns] and the epilogue -> y at these
    coordinates, through a buffer, one of SLOTS that take turns: by descriptor, or through y's
    strides within `sizes`, where rows (ROWS_FIRST) or runs of ALIGN_Y columns are neighbours in
    memory. on_edge: whether the sides are EDGE_1, EDGE_2 and the descriptor y_edge."""
    COLUMNS: gl.constexpr = t.shape[1]
    n_0, n_1, n_2, n_3 = sizes
    s_0, s_1, s_2, s_3, y0 = strides
    t = epilogue(t, bias_ptr, i3, n_3, EPILOGUE)
    if TMA_STORE:
        tma.store_wait(SLOTS - 1)
    buf.store(t.to(y.dtype if TMA_STORE else y.dtype.element_ty))
    if TMA_STORE:
        fence_async_shared()
        if on_edge if EDGE_2 else False:
            tma_store(y_edge, [i0, i1, i2, i3], buf.reshape(y_edge.block_type.shape))
        else:
            tma_store(y, [i0, i1, i2, i3], buf.reshape(y.block_type.shape))
    else:
        ROWS: gl.constexpr = t.shape[0]
        LANES: gl.constexpr = 32 if ALIGN_Y <= 2 else COLUMNS // ALIGN_Y
        layout: gl.constexpr = (
            gl.BlockedLayout([1, 8], [32, 1], [ROWS // 32, 128 // ROWS], [0, 1])
            if ROWS_FIRST
            else gl.BlockedLayout([1, ALIGN_Y], [32 // LANES, LANES], [4, 1], [1, 0])
        )
        m = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        n = gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
        j0 = m // (BOX_1 * BOX_2)
        j1 = m // BOX_2 % BOX_1
        j2 = m % BOX_2
        if EDGE_2:
            j0 = gl.where(on_edge, m // (EDGE_1 * EDGE_2), j0)
            j1 = gl.where(on_edge, m // EDGE_2 % EDGE_1, j1)
            j2 = gl.where(on_edge, m % EDGE_2, j2)
        in_y = ((j0 < n_0 - i0) & (j1 < n_1 - i1) & (j2 < n_2 - i2))[:, None] & (
            n // ALIGN_Y < (n_3 - i3) // ALIGN_Y
        )[None, :]
        # the tile's coordinates stand inside the products: else these would not depend on the
        # tile, and be kept in registers
        rows = (i0 + j0) * s_0 + (i1 + j1) * s_1 + (i2 + j2) * s_2 + y0
        if ALIGN_Y > 1:  # columns are neighbours
            offset = (
                gl.multiple_of(rows, ALIGN_Y)[:, None]
                + (gl.multiple_of(i3, ALIGN_Y) + n)[None, :]
            )
        else:
            offset = rows[:, None] + ((i3 + n) * s_3)[None, :]
        gl.store(y + offset, buf.load(layout), mask=in_y)


@gluon.jit
def store_result(
    y, y_edge, on_edge, bias_ptr, bufs, t, i0, i1, i2, i3, sizes, strides, BOX_1: gl.constexpr,
    BOX_2: gl.constexpr, EDGE_1: gl.constexpr, EDGE_2: gl.constexpr, EPILOGUE: gl.constexpr,
    TMA_STORE: gl.constexpr, ROWS_FIRST: gl.constexpr, ALIGN_Y: gl.constexpr, FIRST: gl.constexpr,
    SLOTS: gl.constexpr, SLOT: gl.constexpr,
):
    """`store_columns` of t [rows, columns], 128 bytes of columns at a time, through SLOTS buffers
    from FIRST on."""
    COLUMNS: gl.constexpr = t.shape[1]
    STORED: gl.constexpr = bufs.shape[2]
    if COLUMNS > STORED:
        left, right = halves(t)
        store_result(
            y, y_edge, on_edge, bias_ptr, bufs, left, i0, i1, i2, i3, sizes, strides, BOX_1, BOX_2,
            EDGE_1, EDGE_2, EPILOGUE, TMA_STORE, ROWS_FIRST, ALIGN_Y, FIRST, SLOTS, SLOT
        )
        store_result(
            y, y_edge, on_edge, bias_ptr, bufs, right, i0, i1, i2, i3 + COLUMNS // 2, sizes, strides,
            BOX_1, BOX_2, EDGE_1, EDGE_2, EPILOGUE, TMA_STORE, ROWS_FIRST, ALIGN_Y, FIRST, SLOTS,
            SLOT + COLUMNS // (2 * STORED)
        )
    else:
        store_columns(
            y, y_edge, on_edge, bias_ptr, bufs.index(FIRST + SLOT % SLOTS), t, i0, i1, i2, i3, sizes,
            strides, BOX_1, BOX_2, EDGE_1, EDGE_2, EPILOGUE, TMA_STORE, ROWS_FIRST, ALIGN_Y, SLOTS
        )


@triton.jit
def share_of_pass(
    geo, edge, total, WGRAD: tl.constexpr, STREAM: tl.constexpr, BLOCK_IMG: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, EDGE_IMG: tl.constexpr, EDGE_P: tl.constexpr,
    EDGE_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """`correlation_share`, or `reduction_share`, which has no edge."""
    if WGRAD:
        tile, begin, left, tiles = reduction_share(
            geo, total, BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_M, BLOCK_N, STREAM
        )
        return tile, begin, left, tiles, tiles
    else:
        return correlation_share(
            geo, edge, total, BLOCK_IMG, BLOCK_P, BLOCK_Q, EDGE_IMG, EDGE_P, EDGE_Q, BLOCK_N,
            BLOCK_K, STREAM
        )


@triton.jit
def place_of_tile(
    tile, before, geo, edge, WGRAD: tl.constexpr, STREAM: tl.constexpr, BLOCK_IMG: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, EDGE_IMG: tl.constexpr, EDGE_P: tl.constexpr,
    EDGE_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """(coordinates of the result where a tile begins, its ends, steps of the tile): of dw (k, r, s,
    c), else (image, row, column, channel). The tiles from `before` on are the edge's."""
    if WGRAD:
        N, H, W, P, Q, C, K, G, R, S, off_h, off_w, dil_h, dil_w, sum_w = geo
        g, k0, n0, r, s, p_lo, q_lo, boxes_p, boxes_q, steps = reduction_tile(
            tile, geo, BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_M, BLOCK_N
        )
        return g * K + k0, r, s, n0, ((g + 1) * K, R, S, C), steps
    else:
        (
            N, H, W, P, Q, C, K, G, R, S, FILTER_S, off_h, off_w, dil_h, dil_w, tap_r, tap_s,
            step_r, step_s, group_steps, sum_w, GROUP
        ) = geo
        g, img, p0, q0, n0, r_lo, nr, s_lo, ns, steps = edged_tile(
            tile, before, geo, edge, BLOCK_IMG, BLOCK_P, BLOCK_Q, EDGE_IMG, EDGE_P, EDGE_Q, BLOCK_N,
            BLOCK_K, STREAM
        )
        return img, p0, q0, g * K + n0, (N, P, Q, (g + 1) * K), steps


@triton.jit
def first_row(
    i0, i1, i2, on_edge, row, BOX_1: tl.constexpr, BOX_2: tl.constexpr, EDGE_1: tl.constexpr,
    EDGE_2: tl.constexpr,
):
    """Coordinates of a row of a tile that begins at i0, i1, i2; sides as in `store_columns`."""
    if EDGE_2:
        i0 += tl.where(on_edge, row // (EDGE_1 * EDGE_2), row // (BOX_1 * BOX_2))
        i1 += tl.where(on_edge, row // EDGE_2 % EDGE_1, row // BOX_2 % BOX_1)
        i2 += tl.where(on_edge, row % EDGE_2, row % BOX_2)
    else:
        i0 += row // (BOX_1 * BOX_2)
        i1 += row // BOX_2 % BOX_1
        i2 += row % BOX_2
    return i0, i1, i2


@gluon.jit
def consume(
    y, y_edge, bias_ptr, part_ptr, strides, a_bufs, b_bufs, y_bufs, full, empty, order, geo, edge,
    total, WGRAD: gl.constexpr, TRANSPOSED: gl.constexpr, EPILOGUE: gl.constexpr,
    TMA_STORE: gl.constexpr, ROWS_FIRST: gl.constexpr, ALIGN_Y: gl.constexpr,
    PINGPONG: gl.constexpr, STREAM: gl.constexpr, BLOCK_IMG: gl.constexpr, BLOCK_P: gl.constexpr,
    BLOCK_Q: gl.constexpr, EDGE_IMG: gl.constexpr, EDGE_P: gl.constexpr, EDGE_Q: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    ME: gl.constexpr,
):
    """Consumer ME of any pass: multiplies its tiles, or its half of each, and stores them."""
    ROWS: gl.constexpr = BLOCK_M if PINGPONG else BLOCK_M // 2
    ROW: gl.constexpr = 0 if PINGPONG else ME * ROWS
    BOX_1: gl.constexpr = 1 if WGRAD else BLOCK_P  # dw's rows are channels
    BOX_2: gl.constexpr = 1 if WGRAD else BLOCK_Q
    SLOTS: gl.constexpr = y_bufs.shape[0] // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, 1], [16, BLOCK_N, 256 // a_bufs.dtype.primitive_bitwidth]
    )
    stage = 0
    phase = 0
    prev = STAGES - 1
    turn = 0
    go = 1 - ME
    tile, begin, left, tiles, before = share_of_pass(
        geo, edge, total, WGRAD, STREAM, BLOCK_IMG, BLOCK_P, BLOCK_Q, EDGE_IMG, EDGE_P, EDGE_Q,
        BLOCK_M, BLOCK_N, BLOCK_K
    )
    if STREAM:
        share = share_of_program()
        # each consumer has its rows of the parts and, for each share, a flag
        flag_ptr = flags_of(part_ptr, BLOCK_M * BLOCK_N) + (0 if PINGPONG else ME)
        part_ptr += ROW * BLOCK_N
        much = steps_of_share(total)
    while (tile < tiles) & (left > 0):
        i0, i1, i2, i3, sizes, steps = place_of_tile(
            tile, before, geo, edge, WGRAD, STREAM, BLOCK_IMG, BLOCK_P, BLOCK_Q, EDGE_IMG, EDGE_P,
            EDGE_Q, BLOCK_M, BLOCK_N, BLOCK_K
        )
        count = gl.minimum(steps - begin, left)
        mine = True
        if PINGPONG:
            mine = turn == ME
            turn ^= 1
        if mine:
            acc = gl.zeros((ROWS, BLOCK_N), gl.float32, layout)
            acc, stage, phase, prev, go = multiply_in_turn(
                acc, a_bufs, b_bufs, full, empty, order, count, stage, phase, prev, go, ROW, WGRAD,
                WGRAD or TRANSPOSED, PINGPONG, STAGES, ME
            )
            if STREAM:
                parts = parts_to_add(begin, steps - begin - count, much)
                wait_for_parts(flag_ptr, share, parts)
                acc = add_parts(acc, part_ptr, share, parts, 0, BLOCK_M * BLOCK_N, BLOCK_N, 1)
            if begin == 0:  # with STREAM a program stores the tiles that it begins
                i0, i1, i2 = first_row(
                    i0, i1, i2, tile >= before, ROW, BOX_1, BOX_2, EDGE_P, EDGE_Q
                )
                store_result(
                    y, y_edge, tile >= before, bias_ptr, y_bufs, acc, i0, i1, i2, i3, sizes,
                    strides, BOX_1, BOX_2, EDGE_P, EDGE_Q, EPILOGUE, TMA_STORE, ROWS_FIRST, ALIGN_Y,
                    SLOTS * ME, SLOTS, 0
                )
            elif STREAM:
                # to stay in L2 until it is added
                part_ptrs = part_of(part_ptr, share, acc, 0, BLOCK_M * BLOCK_N, BLOCK_N, 1)
                gl.store(part_ptrs, acc, eviction_policy="evict_last")
                announce_part(flag_ptr, share)
        else:  # the other consumer's stages
            stage, phase = skip(stage, phase, count, STAGES)
        if STREAM:
            left -= count
            begin = 0
            tile += 1
        else:
            tile += gl.num_programs(0)
    tma.store_wait(0)


# ---- fprop and dgrad
@gluon.jit
def produce(
    x, x_edge, w, a_bufs, b_bufs, full, empty, geo, edge, total, TRANSPOSED: gl.constexpr,
    STREAM: gl.constexpr, BLOCK_IMG: gl.constexpr, BLOCK_P: gl.constexpr, BLOCK_Q: gl.constexpr,
    EDGE_IMG: gl.constexpr, EDGE_P: gl.constexpr, EDGE_Q: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):
    stage = 0
    phase = 1
    tile, begin, left, tiles, before = correlation_share(
        geo, edge, total, BLOCK_IMG, BLOCK_P, BLOCK_Q, EDGE_IMG, EDGE_P, EDGE_Q, BLOCK_N, BLOCK_K,
        STREAM
    )
    while (tile < tiles) & (left > 0):
        place = edged_tile(
            tile, before, geo, edge, BLOCK_IMG, BLOCK_P, BLOCK_Q, EDGE_IMG, EDGE_P, EDGE_Q, BLOCK_N,
            BLOCK_K, STREAM
        )
        count, stage, phase = produce_tile(
            x, x_edge, w, a_bufs, b_bufs, full, empty, geo, place, tile >= before, begin, left, 0,
            stage, phase, TRANSPOSED, EDGE_IMG > 0, BLOCK_K, STAGES
        )
        if STREAM:
            left -= count
            begin = 0
            tile += 1
        else:
            tile += gl.num_programs(0)


@gluon.jit
def produce_tile(
    x, x_edge, w, a_bufs, b_bufs, full, empty, geo, place, on_edge, begin, left, c0, stage, phase,
    TRANSPOSED: gl.constexpr, EDGED: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):
    """Loads the boxes of a tile, `correlation_tile` of it being place, from its step `begin` on, at
    most `left` steps; channels of x are read from c0 on. Returns (steps, stage, phase)."""
    (
        N, H, W, P, Q, C, K, G, R, S, FILTER_S, off_h, off_w, dil_h, dil_w, tap_r, tap_s, step_r,
        step_s, group_steps, sum_w, GROUP
    ) = geo
    g, img, p0, q0, n0, r_lo, nr, s_lo, ns, steps = place
    count = gl.minimum(steps - begin, left)
    taps = gl.maximum(nr * ns, 1)
    r = begin % taps // gl.maximum(ns, 1)
    s = begin % taps % gl.maximum(ns, 1)
    h_lo = p0 + off_h + r_lo * dil_h
    v_lo = q0 + off_w + s_lo * dil_w
    h_hi = h_lo + nr * dil_h
    v_hi = v_lo + ns * dil_w
    h = h_lo + r * dil_h
    v = v_lo + s * dil_w
    c = begin // taps * BLOCK_K
    # w is read at row g*K + n0, this tap, column c; (TRANSPOSED) at row g*C + c, this tap, column
    # n0
    row_step = step_r * FILTER_S - ns * step_s
    rows_step = nr * step_r * FILTER_S
    tap = (tap_r + (r_lo + r) * step_r) * FILTER_S + tap_s + (s_lo + s) * step_s
    for _ in range(count):
        mbarrier.wait(empty.index(stage), phase)
        bar = full.index(stage)
        mbarrier.expect(bar, x.block_type.nbytes + w.block_type.nbytes)
        if on_edge if EDGED else False:
            a_buf = a_bufs.index(stage).reshape(x_edge.block_type.shape)
            tma_load(x_edge, [img, h, v, c0 + g * C + c], bar, a_buf)
        else:
            tma_load(x, [img, h, v, c0 + g * C + c], bar, a_bufs.index(stage))
        if TRANSPOSED:
            tma_load(w, [g * C + c, tap, n0], bar, b_bufs.index(stage))
        else:
            tma_load(w, [g * K + n0, tap, c], bar, b_bufs.index(stage))
        v += dil_w
        tap += step_s
        end = v == v_hi
        v = gl.where(end, v_lo, v)
        h = gl.where(end, h + dil_h, h)
        tap = gl.where(end, tap + row_step, tap)
        end = h == h_hi
        h = gl.where(end, h_lo, h)
        tap = gl.where(end, tap - rows_step, tap)
        c = gl.where(end, c + BLOCK_K, c)
        stage, phase = advance(stage, phase, STAGES)
    return count, stage, phase


@gluon.jit(do_not_specialize=RUNTIME, launch_metadata=launch_metadata)
def correlate_hopper(
    x, x_edge, w, bias_ptr, y, y_edge, part_ptr, N, H, W, P, Q, C, K, G, R, S, FILTER_S, off_h,
    off_w, dil_h, dil_w, tap_r, tap_s, step_r, step_s, group_steps, sum_w, main_total,
    edge_group_steps, edge_sum_w, total, GROUP, split, sy_n, sy_p, sy_q, sy_k, y0,
    TRANSPOSED: gl.constexpr, EPILOGUE: gl.constexpr, TMA_STORE: gl.constexpr,
    ROWS_FIRST: gl.constexpr, ALIGN_Y: gl.constexpr, PINGPONG: gl.constexpr, STREAM: gl.constexpr,
    BLOCK_IMG: gl.constexpr, BLOCK_P: gl.constexpr, BLOCK_Q: gl.constexpr, EDGE_IMG: gl.constexpr,
    EDGE_P: gl.constexpr, EDGE_Q: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Columns from `split` on, fewer than BLOCK_Q, are the edge (EDGE_IMG > 0), with boxes of its
    own; without an edge split is Q. For STREAM group_steps: steps of GROUP channel tiles; sum_w:
    live taps of all tiles of a row; total: steps of all tiles, main_total of those before the
    edge's."""
    a_bufs, b_bufs, y_bufs, full, empty, order = ring(
        x, w, BLOCK_IMG * BLOCK_P * BLOCK_Q, BLOCK_N, PINGPONG, STAGES
    )
    geo = (
        N, H, W, P, Q, C, K, G, R, S, FILTER_S, off_h, off_w, dil_h, dil_w, tap_r, tap_s, step_r,
        step_s, group_steps, sum_w, GROUP
    )
    edge = (split, main_total, edge_group_steps, edge_sum_w)
    strides = (sy_n, sy_p, sy_q, sy_k, y0)
    M: gl.constexpr = BLOCK_IMG * BLOCK_P * BLOCK_Q
    # constexprs that go through a tuple variable become tensors: the arguments are written out
    gl.warp_specialize(
        [
            (
                consume,
                (
                    y, y_edge, bias_ptr, part_ptr, strides, a_bufs, b_bufs, y_bufs, full, empty,
                    order, geo, edge, total, False, TRANSPOSED, EPILOGUE, TMA_STORE, ROWS_FIRST,
                    ALIGN_Y, PINGPONG, STREAM, BLOCK_IMG, BLOCK_P, BLOCK_Q, EDGE_IMG, EDGE_P, EDGE_Q,
                    M, BLOCK_N, BLOCK_K, STAGES, 0
                ),
            ),
            (
                consume,
                (
                    y, y_edge, bias_ptr, part_ptr, strides, a_bufs, b_bufs, y_bufs, full, empty,
                    order, geo, edge, total, False, TRANSPOSED, EPILOGUE, TMA_STORE, ROWS_FIRST,
                    ALIGN_Y, PINGPONG, STREAM, BLOCK_IMG, BLOCK_P, BLOCK_Q, EDGE_IMG, EDGE_P, EDGE_Q,
                    M, BLOCK_N, BLOCK_K, STAGES, 1
                ),
            ),
            (
                produce,
                (
                    x, x_edge, w, a_bufs, b_bufs, full, empty, geo, edge, total, TRANSPOSED, STREAM,
                    BLOCK_IMG, BLOCK_P, BLOCK_Q, EDGE_IMG, EDGE_P, EDGE_Q, BLOCK_N, BLOCK_K, STAGES
                ),
            ),
        ],
        [4, 1],
        [232, 40],
    )


# ---- wgrad
@triton.jit
def reduction_tile(
    tile, geo, BLOCK_IMG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """(group, row, column, tap (r, s), first live output (row, column), boxes of live outputs
    (rows, columns), steps) of a tile of dw; taps are the outer loops. A tap that reads padding only
    has one step, where x or dy is zero."""
    N, H, W, P, Q, C, K, G, R, S, off_h, off_w, dil_h, dil_w, sum_w = geo
    tiles_m = tl.cdiv(K, BLOCK_M)
    tiles_n = tl.cdiv(C, BLOCK_N)
    k0 = tile % tiles_m * BLOCK_M
    t = tile // tiles_m
    n0 = t % tiles_n * BLOCK_N
    t = t // tiles_n
    g = t % G
    t = t // G
    s = t % S
    r = t // S
    p_lo, boxes_p = live_boxes(r, H, off_h, dil_h, P, BLOCK_P)
    q_lo, boxes_q = live_boxes(s, W, off_w, dil_w, Q, BLOCK_Q)
    steps = steps_of_tap(boxes_p, boxes_q, N, BLOCK_IMG)
    return g, k0, n0, r, s, p_lo, q_lo, tl.maximum(boxes_p, 1), tl.maximum(boxes_q, 1), steps


@triton.jit
def steps_of_tap(boxes_p, boxes_q, N, BLOCK_IMG: tl.constexpr):
    return tl.maximum(tl.cdiv(N, BLOCK_IMG) * boxes_p * boxes_q, 1)


@triton.jit
def live_boxes(t, size, offset, dilation, out, BLOCK: tl.constexpr):
    """(first live output of tap t, boxes of live outputs)."""
    lo, hi = live_outputs(t, size, offset, 1, dilation, out)
    return lo, tl.cdiv(hi - lo, BLOCK)


@triton.jit
def find_tap(step, unit, further, least, size, offset, dilation, out, BLOCK: tl.constexpr):
    """(tap of an axis that holds a step, step of the tap, its boxes): a tap has `unit` steps for
    each box and `further` ones, or, without boxes, `least`."""
    tap = 0
    _, boxes = live_boxes(0, size, offset, dilation, out, BLOCK)
    steps = tl.where(boxes > 0, boxes * unit + further, least)
    while steps <= step:
        step -= steps
        tap += 1
        _, boxes = live_boxes(tap, size, offset, dilation, out, BLOCK)
        steps = tl.where(boxes > 0, boxes * unit + further, least)
    return tap, step, boxes


@triton.jit
def reduction_start(
    step, geo, BLOCK_IMG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """(tile, step of the tile) of a step of the sequence."""
    N, H, W, P, Q, C, K, G, R, S, off_h, off_w, dil_h, dil_w, sum_w = geo
    tiles = tl.cdiv(K, BLOCK_M) * tl.cdiv(C, BLOCK_N) * G  # of one tap
    unit = tiles * tl.cdiv(N, BLOCK_IMG)
    _, live = live_taps(0, Q - 1, W, off_w, 1, dil_w, S)
    r, step, boxes_p = find_tap(
        step, unit * sum_w, tiles * (S - live), tiles * S, H, off_h, dil_h, P, BLOCK_P
    )
    further = tl.where(boxes_p > 0, 0, tiles)
    s, step, boxes_q = find_tap(
        step, unit * boxes_p, further, tiles, W, off_w, dil_w, Q, BLOCK_Q
    )
    steps = steps_of_tap(boxes_p, boxes_q, N, BLOCK_IMG)
    return (r * S + s) * tiles + step // steps, step % steps


@triton.jit
def reduction_share(
    geo, total, BLOCK_IMG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STREAM: tl.constexpr,
):
    """(first tile, where in it this program begins, its steps at most, tiles); total: steps of all
    tiles."""
    N, H, W, P, Q, C, K, G, R, S, off_h, off_w, dil_h, dil_w, sum_w = geo
    tiles = tl.cdiv(K, BLOCK_M) * tl.cdiv(C, BLOCK_N) * G
    if not STREAM:
        return tl.program_id(0), 0, 2147483647, tiles * R * S
    else:
        much = steps_of_share(total)
        first = tl.minimum(share_of_program() * much, total)
        # a program without steps begins nowhere
        step = tl.minimum(first, total - 1)
        tile, begin = reduction_start(step, geo, BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_M, BLOCK_N)
        return tile, begin, tl.minimum(total - first, much), tiles * R * S


@triton.jit
def reduction_turn(begin, total):
    """The box that this program loads first of its first tile, at whose step `begin` it begins: the
    first share to begin in a tile loads box 0 first. Programs in different tiles so load the same
    boxes at the same time, as long as they are in L2."""
    much = steps_of_share(total)
    first = share_of_program() * much
    return first - tl.cdiv(first - begin, much) * much


@triton.jit
def first_box(box, begin, count, steps):
    """The box that `count` steps of a tile load first, when those of the tile before ended before
    `box`: whole tiles go on from there, round and round; the head of a tile leaves the boxes from 0
    on to the program that begins after it."""
    later = tl.where(count == steps, box % steps, steps - count)
    return tl.where((begin == 0) & (box > 0), later, box)


@gluon.jit
def produce_boxes(
    x, dy, a_bufs, b_bufs, full, empty, geo, total, STREAM: gl.constexpr, BLOCK_IMG: gl.constexpr,
    BLOCK_P: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    stage = 0
    phase = 1
    tile, begin, left, tiles = reduction_share(
        geo, total, BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_M, BLOCK_N, STREAM
    )
    box = 0
    if STREAM:
        box = reduction_turn(begin, total)
    while (tile < tiles) & (left > 0):
        count, stage, phase = produce_boxes_of(
            x, dy, a_bufs, b_bufs, full, empty, geo, tile, begin, left, box, 0, 0, stage, phase,
            STREAM, BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_M, BLOCK_N, STAGES
        )
        if STREAM:
            box = tl.where(begin > 0, count, box + count)
            left -= count
            begin = 0
            tile += 1
        else:
            tile += gl.num_programs(0)


@gluon.jit
def produce_boxes_of(
    x, dy, a_bufs, b_bufs, full, empty, geo, tile, begin, left, box, c0, y0, stage, phase,
    STREAM: gl.constexpr, BLOCK_IMG: gl.constexpr, BLOCK_P: gl.constexpr, BLOCK_Q: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):
    """Loads the boxes of a tile of dw for its steps from `begin` on, at most `left`, from
    `first_box` on. Channels of x are read from c0, of dy from y0 on. Returns (steps, stage, phase).
    """
    N, H, W, P, Q, C, K, G, R, S, off_h, off_w, dil_h, dil_w, sum_w = geo
    g, k0, n0, r, s, p_lo, q_lo, boxes_p, boxes_q, steps = reduction_tile(
        tile, geo, BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_M, BLOCK_N
    )
    count = gl.minimum(steps - begin, left)
    p_end = p_lo + boxes_p * BLOCK_P
    q_end = q_lo + boxes_q * BLOCK_Q
    if STREAM:
        box = first_box(box, begin, count, steps)
    q = q_lo + box % boxes_q * BLOCK_Q
    p = p_lo + box // boxes_q % boxes_p * BLOCK_P
    img = box // boxes_q // boxes_p * BLOCK_IMG
    h = r * dil_h + off_h
    v = s * dil_w + off_w
    for _ in range(count):
        mbarrier.wait(empty.index(stage), phase)
        bar = full.index(stage)
        mbarrier.expect(bar, x.block_type.nbytes + dy.block_type.nbytes)
        # where a box reaches over the tap's live rectangle, dy or x lies outside its tensor and is
        # zero
        tma_load(dy, [img, p, q, y0 + g * K + k0], bar, a_bufs.index(stage))
        tma_load(x, [img, p + h, q + v, c0 + g * C + n0], bar, b_bufs.index(stage))
        q += BLOCK_Q
        end = q == q_end
        q = gl.where(end, q_lo, q)
        p = gl.where(end, p + BLOCK_P, p)
        end = p == p_end
        p = gl.where(end, p_lo, p)
        img = gl.where(end, img + BLOCK_IMG, img)
        if STREAM:
            img = gl.where(img < N, img, 0)
        stage, phase = advance(stage, phase, STAGES)
    return count, stage, phase


@gluon.jit(do_not_specialize=RUNTIME, launch_metadata=launch_metadata)
def wgrad_hopper(
    x, dy, dw, part_ptr, N, H, W, P, Q, C, K, G, R, S, off_h, off_w, dil_h, dil_w, sum_w,
    total, sw_k, sw_c, sw_r, sw_s, TMA_STORE: gl.constexpr, PINGPONG: gl.constexpr,
    STREAM: gl.constexpr, BLOCK_IMG: gl.constexpr, BLOCK_P: gl.constexpr, BLOCK_Q: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):
    """For STREAM sum_w: boxes of a row of taps; total: steps of all tiles."""
    a_bufs, b_bufs, y_bufs, full, empty, order = ring(dy, x, BLOCK_M, BLOCK_N, PINGPONG, STAGES)
    geo = (N, H, W, P, Q, C, K, G, R, S, off_h, off_w, dil_h, dil_w, sum_w)
    strides = (sw_k, sw_r, sw_s, sw_c, 0)
    gl.warp_specialize(
        [
            (
                consume,
                (
                    dw, dw, part_ptr, part_ptr, strides, a_bufs, b_bufs, y_bufs, full, empty, order,
                    geo, 0, total, True, False, "", TMA_STORE, False, 1, PINGPONG, STREAM, BLOCK_IMG,
                    BLOCK_P, BLOCK_Q, 0, 0, 0, BLOCK_M, BLOCK_N, 0, STAGES, 0
                ),
            ),
            (
                consume,
                (
                    dw, dw, part_ptr, part_ptr, strides, a_bufs, b_bufs, y_bufs, full, empty, order,
                    geo, 0, total, True, False, "", TMA_STORE, False, 1, PINGPONG, STREAM, BLOCK_IMG,
                    BLOCK_P, BLOCK_Q, 0, 0, 0, BLOCK_M, BLOCK_N, 0, STAGES, 1
                ),
            ),
            (
                produce_boxes,
                (
                    x, dy, a_bufs, b_bufs, full, empty, geo, total, STREAM, BLOCK_IMG, BLOCK_P,
                    BLOCK_Q, BLOCK_M, BLOCK_N, STAGES
                ),
            ),
        ],
        [4, 1],
        [232, 40] if STREAM else [240, 24],
    )


# ---- several convolutions in one launch
@triton.jit
def branch_geo(
    N, H, W, P, Q, G, GROUP, C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    off_h: tl.constexpr, off_w: tl.constexpr, dil_h: tl.constexpr, dil_w: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """`geo` of a branch's correlation; dgrad (TRANSPOSED) walks the taps from the last to the
    first."""
    STEP: tl.constexpr = -1 if TRANSPOSED else 1
    TAP_R: tl.constexpr = R - 1 if TRANSPOSED else 0
    TAP_S: tl.constexpr = S - 1 if TRANSPOSED else 0
    return (
        N, H, W, P, Q, C, K, G, R, S, S, off_h, off_w, dil_h, dil_w, TAP_R, TAP_S, STEP, STEP, 0, 0,
        GROUP
    )


@triton.jit
def tiles_before(
    sizes, BRANCH: tl.constexpr, BRANCHES: tl.constexpr, SUM: tl.constexpr, WGRAD: tl.constexpr,
    BLOCK_IMG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Tiles of the branches before one, which are walked one branch after another; (SUM) of one
    branch, whose tiles all others share."""
    N, H, W, P, Q, G, GROUP = sizes
    total = 0
    for b in tl.static_range(1 if SUM else BRANCH):
        if WGRAD:
            total += (
                tl.cdiv(BRANCHES[10 * b + 1], BLOCK_M) * tl.cdiv(BRANCHES[10 * b], BLOCK_N)
                * BRANCHES[10 * b + 2] * BRANCHES[10 * b + 3] * G
            )
        else:
            total += (
                tl.cdiv(N, BLOCK_IMG) * G * tl.cdiv(P, BLOCK_P) * tl.cdiv(Q, BLOCK_Q)
                * tl.cdiv(BRANCHES[10 * b + 1], BLOCK_N)
            )
    return total


@triton.jit
def find_correlation(
    tile, sizes, BRANCHES: tl.constexpr, COUNT: tl.constexpr, SUM: tl.constexpr,
    TRANSPOSED: tl.constexpr, BLOCK_IMG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """(image, row, column, channel) of the result where a tile begins, the end of its channels, its
    steps."""
    N, H, W, P, Q, G, GROUP = sizes
    i0 = tile * 0
    i1 = i0
    i2 = i0
    i3 = i0
    end = i0
    steps = i0
    for b in tl.static_range(COUNT):
        geo = branch_geo(
            N, H, W, P, Q, G, GROUP, BRANCHES[10 * b], BRANCHES[10 * b + 1], BRANCHES[10 * b + 2],
            BRANCHES[10 * b + 3], BRANCHES[10 * b + 6], BRANCHES[10 * b + 7], BRANCHES[10 * b + 8],
            BRANCHES[10 * b + 9], TRANSPOSED
        )
        first = 0 if SUM else tiles_before(
            sizes, b, BRANCHES, False, False, BLOCK_IMG, BLOCK_P, BLOCK_Q, 0, BLOCK_N
        )
        last = tiles_before(
            sizes, b + 1, BRANCHES, SUM, False, BLOCK_IMG, BLOCK_P, BLOCK_Q, 0, BLOCK_N
        )
        g, img, p0, q0, n0, r_lo, nr, s_lo, ns, much = correlation_tile(
            tile - first, geo, bits_of(BLOCK_IMG), bits_of(BLOCK_P), bits_of(BLOCK_Q), BLOCK_N,
            BLOCK_K, False
        )
        mine = (tile >= first) & (tile < last)
        i0 = tl.where(mine, img, i0)
        i1 = tl.where(mine, p0, i1)
        i2 = tl.where(mine, q0, i2)
        i3 = tl.where(mine, BRANCHES[10 * b + 5] + g * BRANCHES[10 * b + 1] + n0, i3)
        end = tl.where(mine, BRANCHES[10 * b + 5] + (g + 1) * BRANCHES[10 * b + 1], end)
        steps += tl.where(mine, much, 0)
    return i0, i1, i2, i3, end, steps


@triton.jit
def next_tile(tile, step):
    """Programs take tiles to and fro, so that who has a long one of one round has a short one of
    the next. step: tiles to the next one, 2 * (programs - 1 - program) + 1 at first."""
    return tile + step, 2 * tl.num_programs(0) - step


@gluon.jit
def consume_branches(
    y, bias_ptr, strides, a_bufs, b_bufs, y_bufs, full, empty, order, sizes,
    BRANCHES: gl.constexpr, COUNT: gl.constexpr, SUM: gl.constexpr, TRANSPOSED: gl.constexpr,
    EPILOGUE: gl.constexpr, TMA_STORE: gl.constexpr, ROWS_FIRST: gl.constexpr,
    ALIGN_Y: gl.constexpr, PINGPONG: gl.constexpr, BLOCK_IMG: gl.constexpr, BLOCK_P: gl.constexpr,
    BLOCK_Q: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, ME: gl.constexpr,
):
    """`consume` of fprop and dgrad over the tiles of all branches."""
    N, H, W, P, Q, G, GROUP = sizes
    ROWS: gl.constexpr = BLOCK_M if PINGPONG else BLOCK_M // 2
    ROW: gl.constexpr = 0 if PINGPONG else ME * ROWS
    SLOTS: gl.constexpr = y_bufs.shape[0] // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, 1], [16, BLOCK_N, 256 // a_bufs.dtype.primitive_bitwidth]
    )
    stage = 0
    phase = 0
    prev = STAGES - 1
    turn = 0
    go = 1 - ME
    tiles = tiles_before(
        sizes, COUNT, BRANCHES, SUM, False, BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_M, BLOCK_N
    )
    tile = gl.program_id(0)
    step = 2 * (gl.num_programs(0) - 1 - tile) + 1
    while tile < tiles:
        i0, i1, i2, i3, end, steps = find_correlation(
            tile, sizes, BRANCHES, COUNT, SUM, TRANSPOSED, BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_N,
            BLOCK_K
        )
        mine = True
        if PINGPONG:
            mine = turn == ME
            turn ^= 1
        if mine:
            acc = gl.zeros((ROWS, BLOCK_N), gl.float32, layout)
            acc, stage, phase, prev, go = multiply_in_turn(
                acc, a_bufs, b_bufs, full, empty, order, steps, stage, phase, prev, go, ROW, False,
                TRANSPOSED, PINGPONG, STAGES, ME
            )
            store_result(
                y, y, False, bias_ptr, y_bufs, acc, i0 + ROW // (BLOCK_P * BLOCK_Q),
                i1 + ROW // BLOCK_Q % BLOCK_P, i2 + ROW % BLOCK_Q, i3, (N, P, Q, end), strides,
                BLOCK_P, BLOCK_Q, 0, 0, EPILOGUE, TMA_STORE, ROWS_FIRST, ALIGN_Y, SLOTS * ME, SLOTS,
                0
            )
        else:  # the other consumer's stages
            stage, phase = skip(stage, phase, steps, STAGES)
        tile, step = next_tile(tile, step)
    tma.store_wait(0)


@gluon.jit
def produce_branches(
    x, w_0, w_1, w_2, w_3, w_4, w_5, w_6, w_7, a_bufs, b_bufs, full, empty, sizes,
    BRANCHES: gl.constexpr, COUNT: gl.constexpr, SUM: gl.constexpr, TRANSPOSED: gl.constexpr,
    BLOCK_IMG: gl.constexpr, BLOCK_P: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):
    N, H, W, P, Q, G, GROUP = sizes
    filters = (w_0, w_1, w_2, w_3, w_4, w_5, w_6, w_7)
    stage = 0
    phase = 1
    tiles = tiles_before(
        sizes, COUNT, BRANCHES, SUM, False, BLOCK_IMG, BLOCK_P, BLOCK_Q, 0, BLOCK_N
    )
    tile = gl.program_id(0)
    step = 2 * (gl.num_programs(0) - 1 - tile) + 1
    while tile < tiles:
        for b in gl.static_range(COUNT):
            geo = branch_geo(
                N, H, W, P, Q, G, GROUP, BRANCHES[10 * b], BRANCHES[10 * b + 1],
                BRANCHES[10 * b + 2], BRANCHES[10 * b + 3], BRANCHES[10 * b + 6],
                BRANCHES[10 * b + 7], BRANCHES[10 * b + 8], BRANCHES[10 * b + 9], TRANSPOSED
            )
            first = 0 if SUM else tiles_before(
                sizes, b, BRANCHES, False, False, BLOCK_IMG, BLOCK_P, BLOCK_Q, 0, BLOCK_N
            )
            last = tiles_before(
                sizes, b + 1, BRANCHES, SUM, False, BLOCK_IMG, BLOCK_P, BLOCK_Q, 0, BLOCK_N
            )
            # of other branches no step
            much = gl.where((tile >= first) & (tile < last), 2147483647, 0)
            place = correlation_tile(
                tile - first, geo, bits_of(BLOCK_IMG), bits_of(BLOCK_P), bits_of(BLOCK_Q), BLOCK_N,
                BLOCK_K, False
            )
            _, stage, phase = produce_tile(
                x, x, filters[b], a_bufs, b_bufs, full, empty, geo, place, False, 0, much,
                BRANCHES[10 * b + 4], stage, phase, TRANSPOSED, False, BLOCK_K, STAGES
            )
        tile, step = next_tile(tile, step)


@gluon.jit(do_not_specialize=RUNTIME, launch_metadata=branches_metadata)
def correlate_hopper_branches(
    x, w_0, w_1, w_2, w_3, w_4, w_5, w_6, w_7, bias_ptr, y, N, H, W, P, Q, G, GROUP, sy_n, sy_p,
    sy_q, sy_k, BRANCHES: gl.constexpr, COUNT: gl.constexpr, SUM: gl.constexpr,
    TRANSPOSED: gl.constexpr, EPILOGUE: gl.constexpr, TMA_STORE: gl.constexpr,
    ROWS_FIRST: gl.constexpr, ALIGN_Y: gl.constexpr, PINGPONG: gl.constexpr,
    BLOCK_IMG: gl.constexpr, BLOCK_P: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):
    """`gather.correlate_branches` by persistent programs."""
    M: gl.constexpr = BLOCK_IMG * BLOCK_P * BLOCK_Q
    a_bufs, b_bufs, y_bufs, full, empty, order = ring(x, w_0, M, BLOCK_N, PINGPONG, STAGES)
    sizes = (N, H, W, P, Q, G, GROUP)
    strides = (sy_n, sy_p, sy_q, sy_k, 0)
    gl.warp_specialize(
        [
            (
                consume_branches,
                (
                    y, bias_ptr, strides, a_bufs, b_bufs, y_bufs, full, empty, order, sizes,
                    BRANCHES, COUNT, SUM, TRANSPOSED, EPILOGUE, TMA_STORE, ROWS_FIRST, ALIGN_Y,
                    PINGPONG, BLOCK_IMG, BLOCK_P, BLOCK_Q, M, BLOCK_N, BLOCK_K, STAGES, 0
                ),
            ),
            (
                consume_branches,
                (
                    y, bias_ptr, strides, a_bufs, b_bufs, y_bufs, full, empty, order, sizes,
                    BRANCHES, COUNT, SUM, TRANSPOSED, EPILOGUE, TMA_STORE, ROWS_FIRST, ALIGN_Y,
                    PINGPONG, BLOCK_IMG, BLOCK_P, BLOCK_Q, M, BLOCK_N, BLOCK_K, STAGES, 1
                ),
            ),
            (
                produce_branches,
                (
                    x, w_0, w_1, w_2, w_3, w_4, w_5, w_6, w_7, a_bufs, b_bufs, full, empty, sizes,
                    BRANCHES, COUNT, SUM, TRANSPOSED, BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_N, BLOCK_K,
                    STAGES
                ),
            ),
        ],
        [4, 1],
        [232, 40],
    )


@gluon.jit
def consume_filters(
    dw_0, dw_1, dw_2, dw_3, dw_4, dw_5, dw_6, dw_7, a_bufs, b_bufs, y_bufs, full, empty, order,
    sizes, BRANCHES: gl.constexpr, COUNT: gl.constexpr, SEQUENCE: gl.constexpr, TAPS: gl.constexpr,
    CHANNELS_LAST: gl.constexpr, TMA_STORE: gl.constexpr, PINGPONG: gl.constexpr,
    BLOCK_IMG: gl.constexpr, BLOCK_P: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, ME: gl.constexpr,
):
    """`consume` of wgrad over the tiles of all branches' filters."""
    N, H, W, P, Q, G, GROUP = sizes
    filters = (dw_0, dw_1, dw_2, dw_3, dw_4, dw_5, dw_6, dw_7)
    ROWS: gl.constexpr = BLOCK_M if PINGPONG else BLOCK_M // 2
    ROW: gl.constexpr = 0 if PINGPONG else ME * ROWS
    SLOTS: gl.constexpr = y_bufs.shape[0] // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, 1], [16, BLOCK_N, 256 // a_bufs.dtype.primitive_bitwidth]
    )
    stage = 0
    phase = 0
    prev = STAGES - 1
    turn = 0
    go = 1 - ME
    tiles = tiles_before(
        sizes, COUNT, BRANCHES, False, True, BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_M, BLOCK_N
    )
    tile = gl.program_id(0)
    step = 2 * (gl.num_programs(0) - 1 - tile) + 1
    while tile < tiles:
        branch, inner, geo, c0, y0 = find_filter(
            tile, sizes, BRANCHES, SEQUENCE, TAPS, BLOCK_M, BLOCK_N
        )
        g, k0, i3, i1, i2, p_lo, q_lo, boxes_p, boxes_q, steps = reduction_tile(
            inner, geo, BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_M, BLOCK_N
        )
        i0 = g * field(branch, BRANCHES, 1) + k0
        mine = True
        if PINGPONG:
            mine = turn == ME
            turn ^= 1
        if mine:
            acc = gl.zeros((ROWS, BLOCK_N), gl.float32, layout)
            acc, stage, phase, prev, go = multiply_in_turn(
                acc, a_bufs, b_bufs, full, empty, order, steps, stage, phase, prev, go, ROW, True,
                True, PINGPONG, STAGES, ME
            )
            for b in gl.static_range(COUNT):
                if branch == b:
                    store_filter(
                        filters[b], y_bufs, acc, i0 + ROW, i1, i2, i3, G, BRANCHES[10 * b],
                        BRANCHES[10 * b + 1], BRANCHES[10 * b + 2], BRANCHES[10 * b + 3],
                        CHANNELS_LAST, TMA_STORE, SLOTS * ME, SLOTS
                    )
        else:  # the other consumer's stages
            stage, phase = skip(stage, phase, steps, STAGES)
        tile, step = next_tile(tile, step)
    tma.store_wait(0)


@gluon.jit
def store_filter(
    dw, y_bufs, acc, i0, i1, i2, i3, G, C: gl.constexpr, K: gl.constexpr, R: gl.constexpr,
    S: gl.constexpr, CHANNELS_LAST: gl.constexpr, TMA_STORE: gl.constexpr, FIRST: gl.constexpr,
    SLOTS: gl.constexpr,
):
    """acc -> rows i0, tap (i1, i2), columns i3 of one branch's filter, KRSC or KCRS."""
    TAP: gl.constexpr = C if CHANNELS_LAST else 1
    CHANNEL: gl.constexpr = 1 if CHANNELS_LAST else R * S
    store_result(
        dw, dw, False, None, y_bufs, acc, i0, i1, i2, i3, ((i0 // K + 1) * K, R, S, C),
        (R * S * C, S * TAP, TAP, CHANNEL, 0), 1, 1, 0, 0, False, TMA_STORE, False, 1, FIRST, SLOTS, 0
    )


@triton.jit
def find_filter(
    tile, sizes, BRANCHES: tl.constexpr, SEQUENCE: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """(branch, tile of its filter, its `geo`, the first channels of x and dy that it reads) of a
    tile of all branches' filters. SEQUENCE: branch and tap of the walk, TAPS pairs, the longest
    first."""
    N, H, W, P, Q, G, GROUP = sizes
    branch = tile * 0
    tap = branch
    inner = branch  # of the tap's tiles
    first = branch
    for i in tl.static_range(TAPS):
        count = (
            tl.cdiv(BRANCHES[10 * SEQUENCE[2 * i] + 1], BLOCK_M)
            * tl.cdiv(BRANCHES[10 * SEQUENCE[2 * i]], BLOCK_N) * G
        )
        mine = (tile >= first) & (tile < first + count)
        branch = tl.where(mine, SEQUENCE[2 * i], branch)
        tap = tl.where(mine, SEQUENCE[2 * i + 1], tap)
        inner = tl.where(mine, tile - first, inner)
        first += count
    C = field(branch, BRANCHES, 0)
    K = field(branch, BRANCHES, 1)
    geo = (
        N, H, W, P, Q, C, K, G, field(branch, BRANCHES, 2), field(branch, BRANCHES, 3),
        field(branch, BRANCHES, 6), field(branch, BRANCHES, 7), field(branch, BRANCHES, 8),
        field(branch, BRANCHES, 9), 0, 0
    )
    inner += tap * (tl.cdiv(K, BLOCK_M) * tl.cdiv(C, BLOCK_N) * G)
    return branch, inner, geo, field(branch, BRANCHES, 4), field(branch, BRANCHES, 5)


@gluon.jit
def produce_filters(
    x, dy, a_bufs, b_bufs, full, empty, sizes, BRANCHES: gl.constexpr, COUNT: gl.constexpr,
    SEQUENCE: gl.constexpr, TAPS: gl.constexpr, BLOCK_IMG: gl.constexpr, BLOCK_P: gl.constexpr,
    BLOCK_Q: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):
    stage = 0
    phase = 1
    tiles = tiles_before(
        sizes, COUNT, BRANCHES, False, True, BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_M, BLOCK_N
    )
    tile = gl.program_id(0)
    step = 2 * (gl.num_programs(0) - 1 - tile) + 1
    while tile < tiles:
        branch, inner, geo, c0, y0 = find_filter(
            tile, sizes, BRANCHES, SEQUENCE, TAPS, BLOCK_M, BLOCK_N
        )
        _, stage, phase = produce_boxes_of(
            x, dy, a_bufs, b_bufs, full, empty, geo, inner, 0, 2147483647, 0, c0, y0, stage, phase,
            False, BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_M, BLOCK_N, STAGES
        )
        tile, step = next_tile(tile, step)


@gluon.jit(do_not_specialize=RUNTIME, launch_metadata=branches_metadata)
def wgrad_hopper_branches(
    x, dy, dw_0, dw_1, dw_2, dw_3, dw_4, dw_5, dw_6, dw_7, N, H, W, P, Q, G, BRANCHES: gl.constexpr,
    COUNT: gl.constexpr, SEQUENCE: gl.constexpr, TAPS: gl.constexpr, CHANNELS_LAST: gl.constexpr,
    TMA_STORE: gl.constexpr, PINGPONG: gl.constexpr, BLOCK_IMG: gl.constexpr,
    BLOCK_P: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """`gather.wgrad_branches` by persistent programs."""
    a_bufs, b_bufs, y_bufs, full, empty, order = ring(dy, x, BLOCK_M, BLOCK_N, PINGPONG, STAGES)
    sizes = (N, H, W, P, Q, G, 1)
    gl.warp_specialize(
        [
            (
                consume_filters,
                (
                    dw_0, dw_1, dw_2, dw_3, dw_4, dw_5, dw_6, dw_7, a_bufs, b_bufs, y_bufs, full,
                    empty, order, sizes, BRANCHES, COUNT, SEQUENCE, TAPS, CHANNELS_LAST, TMA_STORE,
                    PINGPONG, BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_M, BLOCK_N, STAGES, 0
                ),
            ),
            (
                consume_filters,
                (
                    dw_0, dw_1, dw_2, dw_3, dw_4, dw_5, dw_6, dw_7, a_bufs, b_bufs, y_bufs, full,
                    empty, order, sizes, BRANCHES, COUNT, SEQUENCE, TAPS, CHANNELS_LAST, TMA_STORE,
                    PINGPONG, BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_M, BLOCK_N, STAGES, 1
                ),
            ),
            (
                produce_filters,
                (
                    x, dy, a_bufs, b_bufs, full, empty, sizes, BRANCHES, COUNT, SEQUENCE, TAPS,
                    BLOCK_IMG, BLOCK_P, BLOCK_Q, BLOCK_M, BLOCK_N, STAGES
                ),
            ),
        ],
        [4, 1],
        [232, 40],
    )
