"""Implicit GEMM for sm_100, warp-specialised and persistent, in Gluon: one warp loads boxes by
descriptor (TMA) into a ring of STAGES buffers, one issues the products (tcgen05), whose sums stay
in tensor memory, and four warps store a tile while the next one is multiplied.

Operands, the sequence of tiles and its shares (STREAM) are those of kernels/hopper.py. A tile has
128 rows, or 256, of which both halves are multiplied with the same buffer of the other operand.
"""

from typing import TYPE_CHECKING

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import blackwell
from triton.experimental.gluon.language.nvidia.blackwell import (
    TensorMemoryLayout,
    allocate_tensor_memory,
    mbarrier,
    tcgen05_commit,
    tcgen05_mma,
    tma,
)

from .common import launch_metadata
from .hopper import (
    RUNTIME,
    add_parts,
    advance,
    announce_part,
    first_row,
    flags_of,
    flat,
    part_of,
    parts_to_add,
    place_of_tile,
    produce,
    produce_boxes,
    share_of_pass,
    share_of_program,
    steps_of_share,
    store_columns,
    wait_for_parts,
)

if TYPE_CHECKING:
    import triton as gluon  # its `jit` has overloads, Gluon's has none
else:
    from triton.experimental import gluon


if hasattr(blackwell, "get_tmem_reg_layout"):  # until 3.7

    @gluon.jit
    def load_sums(sums):
        """Sums [128, columns] in tensor memory, a row for each thread of four warps."""
        layout: gl.constexpr = blackwell.get_tmem_reg_layout(
            gl.float32, sums.shape, sums.layout, 4
        )
        return sums.load(layout)

else:

    @gluon.jit
    def load_sums(sums):
        """The same with a layout that Triton chooses, which is that."""
        return sums.load()


@gluon.jit
def ring(a, b, M: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr):
    """Memory of a program: STAGES boxes of both operands and buffers of the result in shared
    memory, sums in tensor memory, of two tiles where they fit, barriers (full and empty boxes, sums
    that are ready and that are read)."""
    HALVES: gl.constexpr = M // 128
    TILES: gl.constexpr = 1 if HALVES * N > 256 else 2
    BITS: gl.constexpr = a.dtype.primitive_bitwidth
    # columns that are stored at once: 128 bytes, the widest swizzle
    STORED: gl.constexpr = 1024 // BITS
    # which the columns of a tile take in turn
    SLOTS: gl.constexpr = 2 if HALVES * N > STORED else 1
    a_bufs = gl.allocate_shared_memory(a.dtype, [STAGES] + a.block_type.shape, a.layout)
    b_bufs = gl.allocate_shared_memory(b.dtype, [STAGES] + b.block_type.shape, b.layout)
    y_bufs = gl.allocate_shared_memory(
        a.dtype, [SLOTS, 128, STORED], gl.NVMMASharedLayout(128, BITS, 2)
    )
    sums = allocate_tensor_memory(
        gl.float32, [TILES * HALVES, 128, N], TensorMemoryLayout([128, N], col_stride=1)
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [TILES, 1], mbarrier.MBarrierLayout())
    read = gl.allocate_shared_memory(gl.int64, [TILES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=HALVES)
    for i in gl.static_range(TILES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(read.index(i), count=1)
    return a_bufs, b_bufs, y_bufs, sums, full, empty, ready, read


@gluon.jit
def multiply(
    a_bufs, b_bufs, sums, full, empty, ready, read, geo, edge, total, WGRAD: gl.constexpr,
    TRANSPOSED: gl.constexpr, STREAM: gl.constexpr, BLOCK_IMG: gl.constexpr, BLOCK_P: gl.constexpr,
    BLOCK_Q: gl.constexpr, EDGE_IMG: gl.constexpr, EDGE_P: gl.constexpr, EDGE_Q: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Issues the products of all tiles of a program. Each gives its buffers back to the producer
    when it is done, the last one of a tile the sums to `finish`."""
    HALVES: gl.constexpr = BLOCK_M // 128
    TILES: gl.constexpr = sums.shape[0] // HALVES
    stage = 0
    phase = 0
    at = 0
    free = 1
    tile, begin, left, tiles, before = share_of_pass(
        geo, edge, total, WGRAD, STREAM, BLOCK_IMG, BLOCK_P, BLOCK_Q, EDGE_IMG, EDGE_P, EDGE_Q,
        BLOCK_M, BLOCK_N, BLOCK_K
    )
    while (tile < tiles) & (left > 0):
        i0, i1, i2, i3, sizes, steps = place_of_tile(
            tile, before, geo, edge, WGRAD, STREAM, BLOCK_IMG, BLOCK_P, BLOCK_Q, EDGE_IMG, EDGE_P,
            EDGE_Q, BLOCK_M, BLOCK_N, BLOCK_K
        )
        count = gl.minimum(steps - begin, left)
        mbarrier.wait(read.index(at), free)
        for i in range(count):
            mbarrier.wait(full.index(stage), phase)
            b = flat(b_bufs.index(stage))
            if not (WGRAD or TRANSPOSED):
                b = b.permute([1, 0])
            for half in gl.static_range(HALVES):
                if WGRAD:
                    a = flat(a_bufs.index(stage)).slice(128 * half, 128, 1).permute([1, 0])
                else:
                    a = flat(a_bufs.index(stage)).slice(128 * half, 128)
                tcgen05_mma(
                    a, b, sums.index(at * HALVES + half), use_acc=i > 0,
                    mbarriers=[empty.index(stage)]
                )
            stage, phase = advance(stage, phase, STAGES)
        tcgen05_commit(ready.index(at))
        at, free = advance(at, free, TILES)
        if STREAM:
            left -= count
            begin = 0
            tile += 1
        else:
            tile += gl.num_programs(0)


@gluon.jit
def finish(
    y, y_edge, bias_ptr, part_ptr, strides, y_bufs, sums, ready, read, geo, edge, total,
    WGRAD: gl.constexpr, EPILOGUE: gl.constexpr, TMA_STORE: gl.constexpr, ROWS_FIRST: gl.constexpr,
    ALIGN_Y: gl.constexpr, STREAM: gl.constexpr, BLOCK_IMG: gl.constexpr, BLOCK_P: gl.constexpr,
    BLOCK_Q: gl.constexpr, EDGE_IMG: gl.constexpr, EDGE_P: gl.constexpr, EDGE_Q: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
):
    """Stores all tiles of a program, 128 bytes of columns at a time."""
    HALVES: gl.constexpr = BLOCK_M // 128
    TILES: gl.constexpr = sums.shape[0] // HALVES
    STORED: gl.constexpr = y_bufs.shape[2]
    SLOTS: gl.constexpr = y_bufs.shape[0]
    BOX_1: gl.constexpr = 1 if WGRAD else BLOCK_P  # dw's rows are channels
    BOX_2: gl.constexpr = 1 if WGRAD else BLOCK_Q
    at = 0
    done = 0
    tile, begin, left, tiles, before = share_of_pass(
        geo, edge, total, WGRAD, STREAM, BLOCK_IMG, BLOCK_P, BLOCK_Q, EDGE_IMG, EDGE_P, EDGE_Q,
        BLOCK_M, BLOCK_N, BLOCK_K
    )
    if STREAM:
        share = share_of_program()
        flag_ptr = flags_of(part_ptr, BLOCK_M * BLOCK_N)
        much = steps_of_share(total)
    while (tile < tiles) & (left > 0):
        i0, i1, i2, i3, sizes, steps = place_of_tile(
            tile, before, geo, edge, WGRAD, STREAM, BLOCK_IMG, BLOCK_P, BLOCK_Q, EDGE_IMG, EDGE_P,
            EDGE_Q, BLOCK_M, BLOCK_N, BLOCK_K
        )
        count = gl.minimum(steps - begin, left)
        if STREAM:
            parts = parts_to_add(begin, steps - begin - count, much)
            wait_for_parts(flag_ptr, share, parts)
        mbarrier.wait(ready.index(at), done)
        for half in range(HALVES):
            row = 128 * half
            for i in gl.static_range(BLOCK_N // STORED):
                t = load_sums(sums.index(at * HALVES + half).slice(i * STORED, STORED))
                if i == BLOCK_N // STORED - 1:
                    mbarrier.arrive(read.index(at), count=1, pred=half == HALVES - 1)
                if STREAM:
                    t = add_parts(
                        t, part_ptr + row, share, parts, i * STORED, BLOCK_M * BLOCK_N, 1, BLOCK_M
                    )
                else:  # of a tile without live taps nothing was multiplied
                    t = gl.where(count > 0, t, 0.0)
                if begin == 0:  # with STREAM a program stores the tiles that it begins
                    j0, j1, j2 = first_row(
                        i0, i1, i2, tile >= before, row, BOX_1, BOX_2, EDGE_P, EDGE_Q
                    )
                    store_columns(
                        y, y_edge, tile >= before, bias_ptr,
                        y_bufs.index((half * (BLOCK_N // STORED) + i) % SLOTS), t, j0, j1, j2,
                        i3 + i * STORED, sizes, strides, BOX_1, BOX_2, EDGE_P, EDGE_Q, EPILOGUE,
                        TMA_STORE, ROWS_FIRST, ALIGN_Y, SLOTS
                    )
                elif STREAM:
                    part_ptrs = part_of(
                        part_ptr + row, share, t, i * STORED, BLOCK_M * BLOCK_N, 1, BLOCK_M
                    )
                    gl.store(part_ptrs, t, eviction_policy="evict_last")
        if STREAM:
            if begin > 0:
                announce_part(flag_ptr, share)
            left -= count
            begin = 0
            tile += 1
        else:
            tile += gl.num_programs(0)
        at, done = advance(at, done, TILES)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=RUNTIME, launch_metadata=launch_metadata)
def correlate_blackwell(
    x, x_edge, w, bias_ptr, y, y_edge, part_ptr, N, H, W, P, Q, C, K, G, R, S, FILTER_S, off_h,
    off_w, dil_h, dil_w, tap_r, tap_s, step_r, step_s, group_steps, sum_w, main_total,
    edge_group_steps, edge_sum_w, total, GROUP, split, sy_n, sy_p, sy_q, sy_k, y0,
    TRANSPOSED: gl.constexpr, EPILOGUE: gl.constexpr, TMA_STORE: gl.constexpr,
    ROWS_FIRST: gl.constexpr, ALIGN_Y: gl.constexpr, STREAM: gl.constexpr, BLOCK_IMG: gl.constexpr,
    BLOCK_P: gl.constexpr, BLOCK_Q: gl.constexpr, EDGE_IMG: gl.constexpr, EDGE_P: gl.constexpr,
    EDGE_Q: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):
    """Arguments as of `correlate_hopper`."""
    M: gl.constexpr = BLOCK_IMG * BLOCK_P * BLOCK_Q
    a_bufs, b_bufs, y_bufs, sums, full, empty, ready, read = ring(x, w, M, BLOCK_N, STAGES)
    geo = (
        N, H, W, P, Q, C, K, G, R, S, FILTER_S, off_h, off_w, dil_h, dil_w, tap_r, tap_s, step_r,
        step_s, group_steps, sum_w, GROUP
    )
    edge = (split, main_total, edge_group_steps, edge_sum_w)
    strides = (sy_n, sy_p, sy_q, sy_k, y0)
    gl.warp_specialize(
        [
            (
                finish,
                (
                    y, y_edge, bias_ptr, part_ptr, strides, y_bufs, sums, ready, read, geo, edge,
                    total, False, EPILOGUE, TMA_STORE, ROWS_FIRST, ALIGN_Y, STREAM, BLOCK_IMG,
                    BLOCK_P, BLOCK_Q, EDGE_IMG, EDGE_P, EDGE_Q, M, BLOCK_N, BLOCK_K
                ),
            ),
            (
                multiply,
                (
                    a_bufs, b_bufs, sums, full, empty, ready, read, geo, edge, total, False,
                    TRANSPOSED, STREAM, BLOCK_IMG, BLOCK_P, BLOCK_Q, EDGE_IMG, EDGE_P, EDGE_Q, M,
                    BLOCK_N, BLOCK_K, STAGES
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
        [1, 1],
        [128, 128],
    )


@gluon.jit(do_not_specialize=RUNTIME, launch_metadata=launch_metadata)
def wgrad_blackwell(
    x, dy, dw, part_ptr, N, H, W, P, Q, C, K, G, R, S, off_h, off_w, dil_h, dil_w, sum_w,
    total, sw_k, sw_c, sw_r, sw_s, TMA_STORE: gl.constexpr, STREAM: gl.constexpr,
    BLOCK_IMG: gl.constexpr, BLOCK_P: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):
    """Arguments as of `wgrad_hopper`."""
    a_bufs, b_bufs, y_bufs, sums, full, empty, ready, read = ring(dy, x, BLOCK_M, BLOCK_N, STAGES)
    geo = (N, H, W, P, Q, C, K, G, R, S, off_h, off_w, dil_h, dil_w, sum_w)
    strides = (sw_k, sw_r, sw_s, sw_c, 0)
    gl.warp_specialize(
        [
            (
                finish,
                (
                    dw, dw, part_ptr, part_ptr, strides, y_bufs, sums, ready, read, geo, 0, total,
                    True, "", TMA_STORE, False, 1, STREAM, BLOCK_IMG, BLOCK_P, BLOCK_Q, 0, 0, 0,
                    BLOCK_M, BLOCK_N, 0
                ),
            ),
            (
                multiply,
                (
                    a_bufs, b_bufs, sums, full, empty, ready, read, geo, 0, total, True, False,
                    STREAM, BLOCK_IMG, BLOCK_P, BLOCK_Q, 0, 0, 0, BLOCK_M, BLOCK_N, 0, STAGES
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
        [1, 1],
        [128, 128],
    )
