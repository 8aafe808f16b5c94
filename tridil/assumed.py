"""Everything that the cost model assumes about machines, one table. Only the figures of ATen were
fitted to measurements of time."""

from __future__ import annotations

# warp instructions of one step that are not products: (fixed, per 16-byte copy of a thread); least
# squares over the machine code of all tiles (sm_80, sm_90, sm_100; 3x3, 256 channels), within 30%
LOOP: dict[tuple[str, str], tuple[float, float]] = {
    ("gather", "fprop"): (50, 8),
    ("gather", "dgrad"): (50, 9),
    ("gather", "wgrad"): (68, 11.5),
    ("tma", "fprop"): (90, 0),
    ("tma", "dgrad"): (90, 0),
    ("tma", "wgrad"): (100, 0),
}
SPECIALIZED = 45  # the same for one warp of a warp-specialised loop
SCATTERED = 12  # instructions for an operand element that is addressed and loaded alone
# the same for a run of channels of one tap, at most 16 bytes, where the reduction is flattened
# (counted: 10 to 20)
FLAT = 14
# share of its busiest unit's peak that a loop reaches with enough programs on the SM
ATTAINED = 0.85
# share of that which one program of four warps reaches; grows with the root of its warps
ALONE = 0.6
ALONE_SPECIALIZED = 0.9
PROGRAM = 2000  # clocks of a program before its first product and after its last
DRAM, L2 = 0.85, 0.7  # share of peak bandwidth that is reached
LAUNCH = 2.5e-6  # seconds from one kernel of a pass to the next, and of the first one
# ATen (cudnn.py). Each figure makes the fastest row of its fit come out at about its time, then the
# sum is divided by FAVOUR. Rows are published (KernelBench's problems on H100 SXM: fp32 with tf32,
# NCHW) or measured (cuDNN 9.19 on our H200: fp16); perf/published.py names and judges them
FAVOUR = 1.15
# share of peak on dense MACs (measured: 3x3, 512 channels, d=4; published: 55, 67, 69)
CUDNN = {"fprop": 0.75, "dgrad": 0.75, "wgrad": 0.65}
# times that at dilation 12 and more (measured: 2048 to 256 channels, d=12); others: no row
CUDNN_FAR = {"cuda:90": 0.67}
# share of peak of a strided dgrad, on all taps of every pixel of dx (published: 81)
CUDNN_STRIDED = 0.2
# share of peak of groups whose channels are no power of two (measured: 24 and 24 channels a group)
CUDNN_UNEVEN = {"nhwc": 0.035, "nchw": 0.06}
# times that wgrad takes in one dimension of what it would in two (measured: 5 layers, 1.7 to 11
# times their fprop)
CUDNN_1D_WGRAD = 1.6
# compulsory bytes at peak bandwidth, times this (published: 55, 67, 69; nhwc: 1 / DRAM)
CUDNN_TRAFFIC: dict[str, float] = {"nhwc": 1.2, "nchw": 2}
# the same of at most 32 channels that are no multiple of 16 bytes (measured: 12, 25)
CUDNN_NARROW = {"fprop": 13, "dgrad": 13, "wgrad": 18}
# of a depthwise layer: (for a pixel of y or, in dgrad, dx; for each of its taps) (measured: 3x3,
# 2048 channels, d=24; 7x7, 320 channels, d=3)
DEPTHWISE_INSTRUCTIONS: dict[tuple[str, str], tuple[float, float]] = {
    ("nchw", "fprop"): (155, 13.5),
    ("nchw", "dgrad"): (500, 3),
    ("nchw", "wgrad"): (0, 46),
    ("nhwc", "fprop"): (400, 56),
    ("nhwc", "dgrad"): (70, 25),
    ("nhwc", "wgrad"): (410, 51),
}
# for a pixel, channels_last, where the taps reach over 5 pixels at most (measured: 3x3, 1632
# channels, d=2)
DEPTHWISE_NEAR = {"fprop": 95, "dgrad": 75, "wgrad": 80}
# how much faster than the estimate of cuDNN the prediction must be before "auto" relies on it
MARGIN = 1.1

# family hopper (measured on an H200, fp16: 700 ns a step of 128x256x64 at the power limit, 6 us
# beside the steps; with these figures 35 of 43 times of the quick suite come out within 15%:
# the times of the fit, without two that a fault of the clock had spoiled; with STREAM a second launch
# then added the parts)
# warp instructions of a step that are not products, all consumers and the producer together (static
# counts: 330 to 430)
HOPPER_STEP = 360
# clocks that storing a tile keeps the tensor cores from working, cooperative and ping-pong
# (assumed)
HOPPER_TILE = (1500, 300)
# family blackwell (assumed): warp instructions of a step, of both warps that feed the tensor cores;
# clocks that storing a tile keeps these from working, without and with sums of the next tile
BLACKWELL_STEP = 120
BLACKWELL_TILE = (3000, 300)

# times that steps of the gather kernels take of what the counts say where a channel block is
# shorter than 64 bytes (measured on an H200, fp16: geometric means of 29 passes, 1.2 to 2.6)
GATHER_FEW = {"fprop": 1.6, "dgrad": 1.6, "wgrad": 2.0}

# registers of a thread beside the accumulator: addresses, masks and the copies in flight (static
# counts: 70 to 110)
GEMM_REGISTERS = 90

# direct kernels: instructions of a lane's element (to load and convert a column, a weight), of a
# column's address and masks, of an iteration, of a program; of wgrad, to add up a sum over the
# lanes of a warp and to store it. Static counts (fp16, 3x3 to 7x7, sm_80 and sm_90)
(
    DIRECT_COLUMN,
    DIRECT_ADDRESS,
    DIRECT_WEIGHT,
    DIRECT_ITERATION,
    DIRECT_WGRAD_ITERATION,
    DIRECT_PROGRAM,
) = 1, 6, 2.7, 40, 160, 250
DIRECT_COLUMN_MASK, DIRECT_SUM, DIRECT_SUM_STORE = 6, 12, 20
# registers of a thread beside sums, weights and columns (static counts: 35 to 60)
DIRECT_REGISTERS = 50
DIRECT_L2 = 0.5  # share of L2's peak bandwidth that they reach
DIRECT_LEAST = 1500  # clocks of a launch, at least
# times that a wgrad takes whose programs keep several rows of taps, of what the counts say
# (measured on an H200, fp16, over that of one row: 11 configs of four layers, 1.1 to 1.8)
DIRECT_ROWS = 1.35
BUSY_WARPS = 12  # warps of an SM that keep memory busy
ISSUED = 0.8  # share of its issue slots that a scheduler fills
OVERLAP = 0.2  # share of the shorter of waves and memory that the longer does not hide
# seconds that measuring one pass may take when a convolution is used for the first time
FIRST_USE = 2.0
