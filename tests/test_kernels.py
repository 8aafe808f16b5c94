"""The kernels against the float64 reference: in the interpreter on CPU, natively on a GPU, the same
tests."""

import itertools
import random
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from tridil import config, cost_model, drivers, launch, reference, testing
from tridil.families.tma import architecture
from tridil.problem import PASSES, problem_of


@pytest.fixture(autouse=True)
def poison():
    """torch.empty returns NaN, so a result that was not written shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def problem(x, w, **kw):
    args = dict(stride=1, padding=0, dilation=1, groups=1, dtype="float16", layout="nhwc") | kw
    return problem_of(
        x,
        w,
        None,
        args["stride"],
        args["padding"],
        args["dilation"],
        args["groups"],
        args["dtype"],
        args["layout"],
    )


def check(p, passes=PASSES, configs=None, device=None, seed=None, precision="ieee", tensors=None):
    """Runs the passes with the given (or default) configs; raises when one is off; returns the
    results."""
    device = device or kernel_device()
    x, w, bias, dy = tensors or testing.random_tensors(
        p, device, random.randrange(2**31) if seed is None else seed
    )
    out = []
    for pass_ in passes:
        args = {"fprop": (x, w, bias), "dgrad": (dy, w), "wgrad": (dy, x)}[pass_]
        expected = getattr(reference, pass_)(p, *args)
        for cfg in configs or [cost_model.best(p, pass_, drivers.target())]:
            got = getattr(launch, pass_)(p, *args, cfg, precision)
            assert got.dtype == x.dtype and got.shape == expected.shape
            error, budget = testing.check(got, expected, p, pass_, precision)
            assert error <= budget, (
                f"{pass_} of {p.key()} with {cfg}: error {error} exceeds the budget {budget}"
            )
            out.append(got)
    return out


def kernel_device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


GEOMETRIES = {
    "aspp": problem((2, 32, 9, 11), (24, 32, 3, 3), padding=2, dilation=2),
    "dilation beyond the map": problem((1, 16, 6, 7), (16, 16, 3, 3), padding=18, dilation=18),
    "padding beyond the extent": problem((1, 16, 5, 5), (16, 16, 3, 3), padding=9, dilation=2),
    "stride 2, dilation 2": problem(
        (2, 16, 9, 10), (32, 16, 3, 3), stride=2, padding=2, dilation=2
    ),
    "stride 2, dilation 3": problem(
        (1, 16, 13, 12), (16, 16, 3, 3), stride=2, padding=3, dilation=3
    ),
    "stride beyond the filter": problem(
        (1, 16, 11, 13), (16, 16, 2, 2), stride=(5, 4), padding=1, dilation=(2, 1)
    ),
    "stride 3x2, dilation 2x4": problem(
        (1, 32, 14, 15), (16, 32, 3, 3), stride=(3, 2), padding=(2, 5), dilation=(2, 4)
    ),
    "dilations differ": problem((1, 16, 12, 14), (16, 16, 3, 3), padding=(1, 4), dilation=(1, 4)),
    "3x1": problem((1, 16, 12, 6), (16, 16, 3, 1), padding=(3, 0), dilation=(3, 1)),
    "1x3": problem((1, 16, 6, 12), (16, 16, 1, 3), padding=(0, 3), dilation=(1, 3)),
    "1D, 41 taps": problem((1, 20, 1, 60), (17, 20, 1, 41), padding=(0, 40), dilation=(1, 2)),
    "49 taps": problem((1, 32, 7, 7), (16, 32, 7, 7), padding=9, dilation=3),
    "RGB": problem((2, 3, 13, 12), (16, 3, 3, 3), padding=2, dilation=2),
    "4 channels, 5x5": problem((1, 4, 13, 12), (20, 4, 5, 5), padding=4, dilation=2),
    "1 channel in, 1 out": problem((2, 1, 9, 9), (1, 1, 3, 3), padding=2, dilation=2),
    "ragged channels": problem((1, 25, 9, 9), (33, 25, 3, 3), padding=2, dilation=2),
    "channels off by one": problem((1, 65, 7, 7), (31, 65, 3, 3), padding=2, dilation=2),
    "groups": problem((1, 48, 8, 9), (32, 24, 3, 3), padding=2, dilation=2, groups=2),
    "narrow groups": problem((1, 12, 9, 9), (9, 4, 3, 3), padding=3, dilation=3, groups=3),
    "groups of 4, strided, NCHW": problem(
        (2, 20, 9, 8), (20, 4, 3, 3), stride=2, padding=2, dilation=2, groups=5, layout="nchw"
    ),
    "depthwise": problem((2, 6, 9, 9), (6, 1, 3, 3), padding=3, dilation=3, groups=6),
    "depthwise, dilation beyond the map": problem(
        (1, 3, 6, 7), (3, 1, 3, 3), padding=9, dilation=9, groups=3
    ),
    "depthwise, multiplier 2": problem(
        (1, 3, 9, 9), (6, 1, 5, 5), padding=4, dilation=2, groups=3, stride=2
    ),
    "even filter, same": problem((1, 16, 7, 8), (16, 16, 2, 4), padding="same", dilation=(3, 1)),
    "1x1, dilation 4": problem((2, 16, 5, 5), (16, 16, 1, 1), dilation=4),
    "one pixel": problem((2, 16, 1, 1), (16, 16, 3, 3), padding=4, dilation=4),
    "height 1": problem((1, 16, 1, 9), (16, 16, 3, 3), padding=2, dilation=2),
    "many images": problem((9, 16, 3, 3), (16, 16, 3, 3), padding=2, dilation=2),
    "NCHW": problem((2, 16, 9, 7), (24, 16, 3, 3), padding=2, dilation=2, layout="nchw"),
    "NCHW, strided": problem(
        (2, 16, 9, 7), (24, 16, 3, 3), stride=2, padding=2, dilation=2, layout="nchw"
    ),
}


DTYPES = (
    "aspp",
    "stride 2, dilation 3",
    "49 taps",
    "RGB",
    "ragged channels",
    "narrow groups",
    "depthwise",
    "NCHW",
)
MORE_FP32 = (
    "dilation beyond the map",
    "stride beyond the filter",
    "1D, 41 taps",
    "channels off by one",
    "groups",
    "groups of 4, strided, NCHW",
    "depthwise, multiplier 2",
    "NCHW, strided",
)


@pytest.mark.parametrize(
    "name, dtype",
    [
        *itertools.product(GEOMETRIES, ["float16"]),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                *itertools.product(DTYPES, ("bfloat16", "float32", "float64")),
                *itertools.product(MORE_FP32, ["float32"]),
            )
        ),
    ],
)
def test_geometry(name, dtype):
    check(replace(GEOMETRIES[name], dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize(
    "name",
    [
        "aspp",
        "ragged channels",
        "RGB",
        "groups",
        "narrow groups",
        "stride 2, dilation 3",
        "depthwise",
    ],
)
def test_every_candidate_gives_the_reference(name, pass_):
    p = GEOMETRIES[name]
    configs = config.candidates(p, pass_, drivers.target())
    assert configs
    # how each tile compiles is for compiled code
    if drivers.interpreted():
        configs = random.sample(configs, min(len(configs), 12))
    check(p, [pass_], configs)


def gathered(p, pass_):
    """Candidates of the pointer kernels."""
    return [cfg for cfg in config.candidates(p, pass_, drivers.target()) if cfg.kernel != "tma"]


@pytest.mark.slow
@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("kernel", ["gather", "gather_flat"])
def test_both_kernels_serve_every_channel_count(kernel, pass_):
    """The flat kernel is a choice, not a need."""
    for channels, name in itertools.product((1, 40), ("aspp", "stride 2, dilation 2")):
        p = replace(GEOMETRIES[name], c=channels, k=24)
        check(
            p,
            [pass_],
            [
                replace(cfg, kernel=kernel, SPLIT_K=cfg.SPLIT_K if pass_ == "wgrad" else 1)
                for cfg in gathered(p, pass_)[-1:]
            ],
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "box",
    [
        (1, 1, 64),
        (1, 64, 1),
        (64, 1, 1),
        (1, 8, 8),
        (2, 4, 8),
        (4, 4, 4),
        (16, 2, 2),
        (1, 5, 7),
        (3, 3, 3),
        (1, 1, 33),
    ],
)
@pytest.mark.parametrize("name", ["dilation beyond the map", "many images", "stride 2, dilation 2"])
def test_every_box(name, box):
    p = GEOMETRIES[name]
    sides = dict(zip(("BLOCK_IMG", "BLOCK_P", "BLOCK_Q"), box))
    for pass_ in PASSES:
        cfgs = [
            replace(c, **sides)
            for c in config.candidates(p, pass_, drivers.target())[:1] + gathered(p, pass_)[:1]
        ]
        check(
            p,
            [pass_],
            [cfg for cfg in cfgs if config.fits(cfg, p, pass_, drivers.target()) is None],
        )


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize(
    "name", ["aspp", "RGB", "ragged channels", "dilation beyond the map", "1D, 41 taps"]
)
def test_clamped_addresses_change_nothing(name, pass_):
    """pytorch#187222: a masked load must not need its address; with CLAMP no address leaves the
    tensor, without it the result is the same."""
    p = GEOMETRIES[name]
    cfg = gathered(p, pass_)[0]
    (clamped,) = check(p, [pass_], [replace(cfg, CLAMP=True)], seed=3)
    assert torch.isfinite(clamped).all()


@pytest.mark.unclamped
def test_boxes_wider_than_the_map_step_to_the_next_images():
    """The next box of a row would lie 2**31 elements and more ahead; there is none."""
    p = problem(
        (2, 5, 1, 1), (8, 5, 1, 3), stride=(1, 2**19), padding=(0, 2**19), dilation=(1, 2**18)
    )
    assert p.beyond_int32 is None and 1024 * p.stride[1] * p.c > 2**31
    for kernel in ("gather", "gather_flat"):
        wide = [
            replace(cfg, kernel=kernel, BLOCK_IMG=1, BLOCK_P=1, BLOCK_Q=1024)
            for cfg in gathered(p, "wgrad")
        ]
        cfgs = [c for c in wide if config.fits(c, p, "wgrad", drivers.target()) is None]
        check(p, ["wgrad"], cfgs[:1])


@pytest.mark.parametrize("pass_", PASSES)
def test_clamping_is_bit_identical(pass_):
    p = GEOMETRIES["aspp"]
    cfg = gathered(p, pass_)[0]
    a, b = check(p, [pass_], [replace(cfg, CLAMP=True), replace(cfg, CLAMP=False)])
    assert torch.equal(a, b)


@pytest.mark.parametrize("pass_", PASSES)
def test_eight_warps_in_a_flat_reduction_loop(pass_):
    """triton#1254, pytorch#173068."""
    p = problem((2, 48, 9, 9), (64, 48, 3, 3), padding=2, dilation=2)
    cfgs = [replace(c, num_warps=8) for c in config.candidates(p, pass_, drivers.target())[:2]]
    check(p, [pass_], cfgs)


def test_more_taps_than_one_reciprocal_divides():
    p = problem((1, 2, 1, 1080), (3, 2, 1, 1024), dilation=1)
    check(p, ["fprop"])
    check(replace(p, w=1000, padding=((0, 0), (50, 50))), ["fprop"])  # dead taps


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_long_reduction_in_one_accumulator(stages):
    """triton#10821: 45 to 90 chained dots per accumulator."""
    p = problem((1, 80, 4, 5), (32, 80, 3, 3), padding=2, dilation=2)
    for pass_ in PASSES:
        check(
            p,
            [pass_],
            [replace(config.candidates(p, pass_, drivers.target())[-1], num_stages=stages)],
        )


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize(
    "split", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 7))]
)
def test_split_k_sums_every_split(split, pass_):
    """Also more splits than there are reduction steps, over taps and channels, with and without
    bias, one residue class after another."""
    names = [
        "dilation beyond the map",
        "NCHW",
        "aspp",
        "groups",
        "49 taps",
        "stride 2, dilation 3",
        "stride beyond the filter",
    ]
    for name in names[:2] + ["RGB"] if pass_ == "wgrad" else names:
        p = replace(GEOMETRIES[name], c=80) if name == "aspp" else GEOMETRIES[name]
        cfgs = [
            replace(cfg, SPLIT_K=split)
            for cfg in config.candidates(p, pass_, drivers.target())[:1] + gathered(p, pass_)[:1]
        ]
        # many short steps, and a kernel that splits them
        if pass_ != "wgrad":
            cfgs = [
                replace(cfg, BLOCK_K=16, kernel=cfg.kernel.removesuffix("_flat")) for cfg in cfgs
            ]
        check(p, [pass_], cfgs)


@pytest.mark.slow
@pytest.mark.parametrize("pass_", PASSES)
def test_reruns_are_bit_identical(pass_):
    p = replace(GEOMETRIES["aspp"], k=32, dtype="float32")
    cfg = replace(cost_model.best(p, pass_, drivers.target()), SPLIT_K=5)
    first, again = check(p, [pass_], [cfg, replace(cfg)], seed=1)
    assert torch.equal(first, again)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_layouts_of_inputs_and_results(layout):
    """Channels_last weights in wgrad, expanded, sliced and transposed inputs; the result has the
    problem's format."""
    p = problem((2, 16, 5, 4), (24, 16, 3, 3), padding=2, dilation=2, layout=layout)
    x, w, bias, dy = testing.random_tensors(p, kernel_device(), 0)
    wide = torch.randn(4, 40, 5, 4, device=x.device).to(x.dtype)
    variants = {
        "sliced": wide[::2, 4:36:2],
        "channels_last slice": wide.contiguous(memory_format=torch.channels_last)[1:3, :16],
        "expanded": x[:1, :1].expand(2, 16, 5, 4),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
    }
    for name, xv in variants.items():
        wv = w.contiguous(memory_format=torch.channels_last) if "last" in name else w.flip(0)[::1]
        for got in check(
            p, tensors=(xv, wv, bias, dy.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))
        ):
            assert got.is_contiguous(memory_format=launch.FORMATS[layout])


def test_a_misaligned_base_pointer():
    p = problem((1, 16, 7, 7), (16, 16, 3, 3), padding=2, dilation=2)
    x, w, bias, dy = testing.random_tensors(p, kernel_device(), 0)

    def shifted(t):
        """The same values in channels_last memory that begins one element into its storage."""
        flat = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:]
        n, c, h, w_ = t.shape
        return flat.view(n, h, w_, c).permute(0, 3, 1, 2).copy_(t)

    check(p, tensors=(shifted(x), shifted(w), bias, shifted(dy)))


@pytest.mark.slow
@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("groups", [1, 256])
def test_more_than_2_31_elements(pass_, groups):
    """int64 addressing: x (or dx) has 2**31 + 2**20 elements, of which a stride touches few; the
    last pixels lie beyond 2**31."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # do not fill 4 GiB
    width = 2**23 + 2**12
    p = problem(
        (1, 256, 1, width),
        (16 if groups == 1 else 256, 256 // groups, 1, 2),
        stride=(1, width - 2),
        groups=groups,
    )
    small = replace(p, w=4, stride=(1, 2))
    assert p.c * p.w > 2**31 and (small.p, small.q) == (p.p, p.q) == (1, 2)
    xs, w, bias, dy = testing.random_tensors(small, kernel_device(), 0)
    cfg = cost_model.best(p, pass_, drivers.target())
    args = {"fprop": (xs, w, bias), "dgrad": (dy, w), "wgrad": (dy, xs)}[pass_]
    expected = getattr(reference, pass_)(small, *args)
    if pass_ == "dgrad":
        dx = launch.dgrad(p, *args, cfg)
        got = torch.cat((dx[..., :2], dx[..., -2:]), 3)
    else:
        x = torch.empty(1, 1, width, 256, dtype=torch.float16, device=xs.device).permute(0, 3, 1, 2)
        x[..., :2], x[..., -2:] = xs[..., :2], xs[..., 2:]
        got = getattr(launch, pass_)(p, *(x if a is xs else a for a in args), cfg)
    error, budget = testing.check(got, expected, small, pass_)
    assert error <= budget


@pytest.mark.parametrize("allow", [pytest.param(False, marks=pytest.mark.slow), True])
def test_tf32(allow):
    """tf32 keeps 10 mantissa bits; ieee keeps fp32's."""
    check(replace(GEOMETRIES["aspp"], dtype="float32"), precision="tf32" if allow else "ieee")


def test_nan_weight_on_a_dead_tap_is_not_read():
    """Documented difference to cuDNN: padding is never multiplied."""
    p = problem((1, 16, 5, 5), (16, 16, 3, 3), padding=12, dilation=12)
    x, w, bias, dy = testing.random_tensors(p, kernel_device(), 0)
    poisoned = w.clone()
    poisoned[:, :, 0] = poisoned[:, :, 2] = float("nan")
    cfg = cost_model.best(p, "fprop", drivers.target())
    got = launch.fprop(p, x, poisoned, bias, cfg)
    assert torch.equal(got, launch.fprop(p, x, w, bias, cfg)) and torch.isfinite(got).all()


@pytest.mark.parametrize("width", [1, 4, 16])
def test_nan_stays_in_its_group(width):
    p = problem((1, 4 * width, 3, 4), (4 * width, width, 3, 3), padding=2, dilation=2, groups=4)
    x, w, _, dy = testing.random_tensors(p, kernel_device(), 0)
    for pass_, (a, b) in {"fprop": (x, w), "dgrad": (dy, w), "wgrad": (dy, x)}.items():
        cfg, run = cost_model.best(p, pass_, drivers.target()), launch.prepare
        clean, a = run(p, pass_, cfg)(a, b), a.clone()
        a[:, width : 2 * width] = float("nan")
        got = run(p, pass_, cfg)(a, b)
        # the axis of the result that groups divide
        groups = 1 if pass_ != "wgrad" else 0
        for g, (part, expected) in enumerate(zip(got.chunk(4, groups), clean.chunk(4, groups))):
            assert part.isnan().all() if g == 1 else torch.equal(part, expected), (pass_, g)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_groups_that_are_multiplied_as_one(layout, dtype):
    """wgrad of groups of few channels, several to a tile: each filter is that of its own group, and
    a NaN stays in it."""
    each = random.choice([(16, 8), (8, 16), (16, 16), (32, 16), (8, 8)])
    groups, taps = random.choice([4, 8]), random.choice([1, 3])
    p = replace(
        problem(
            (2, each[0] * groups, 5, 6),
            (each[1] * groups, each[0], taps, 3),
            padding=2,
            dilation=2,
            groups=groups,
        ),
        dtype=dtype,
        layout=layout,
    )
    options = [
        cfg
        for cfg in config.candidates(p, "wgrad", drivers.target(), "tf32")
        if getattr(cfg, "BUNDLE", 1) > 1
    ]
    chosen = random.sample(options, min(2, len(options)))
    check(p, ["wgrad"], chosen, precision="ieee" if dtype == "float16" else "tf32")
    x, w, _, dy = testing.random_tensors(p, kernel_device())
    x[:, : each[0]] = float("nan")
    for cfg in chosen[:1]:
        dw = launch.wgrad(p, dy, x, cfg, "tf32")
        assert dw[: each[1]].isnan().all() and not dw[each[1] :].isnan().any()


def test_illegal_config_raises_before_any_launch():
    p = GEOMETRIES["aspp"]
    x, w, bias, dy = testing.random_tensors(p, kernel_device(), 0)
    good = gathered(p, "fprop")[0]
    for change in (
        {"BLOCK_N": 24},
        {"BLOCK_K": 8},
        {"num_stages": 0},
        {"BLOCK_N": 4096},
        {"kernel": "im2col"},
        {"CLAMP": "yes"},
        {"BLOCK_IMG": 0},
    ):
        with pytest.raises(ValueError, match="does not fit"):
            launch.fprop(p, x, w, bias, replace(good, **change))
    with pytest.raises(ValueError, match="exactly the entries"):
        launch.wgrad(p, dy, x, good)


def depthwise(n, c, h, w, taps, mult=1, **kw):
    return problem((n, c, h, w), (c * mult, 1, *taps), groups=c, **kw)


def laid_out(p, layout, dtype="float16"):
    """p in a layout; few channels in NCHW, where each is a tile of its own."""
    c = p.c if layout == "nhwc" else min(p.c, 3)
    return replace(p, layout=layout, dtype=dtype, c=c, groups=c, k=p.k // p.c * c)


DEPTHWISE = {
    "residues on both axes": depthwise(2, 16, 7, 11, (3, 3), padding=3, dilation=3),
    "VAN": depthwise(1, 8, 8, 10, (7, 7), padding=9, dilation=3),
    "map smaller than the filter": depthwise(3, 8, 4, 5, (7, 7), padding=9, dilation=3),
    "odd channels": depthwise(1, 19, 5, 8, (5, 5), padding=4, dilation=2),
    "channels of 8 bytes": depthwise(1, 36, 4, 9, (3, 3), padding=2, dilation=2),
    "stride 2": depthwise(2, 16, 15, 16, (3, 3), stride=2, padding=1),
    "stride 2, dilation 2": depthwise(2, 16, 15, 16, (3, 3), stride=2, padding=2, dilation=2),
    "stride 2, dilation 3": depthwise(2, 16, 15, 16, (3, 3), stride=2, padding=3, dilation=3),
    "stride 3x2, dilation 2x4": depthwise(
        1, 16, 14, 19, (3, 3), stride=(3, 2), padding=(2, 5), dilation=(2, 4)
    ),
    "stride beyond the filter": depthwise(
        1, 16, 11, 13, (2, 2), stride=(5, 4), padding=1, dilation=(2, 1)
    ),
    "dilation beyond the map": depthwise(1, 16, 3, 4, (3, 3), padding=18, dilation=18),
    "multiplier 2": depthwise(1, 5, 6, 7, (3, 3), 2, padding=2, dilation=2),
    "multiplier 3, stride 2": depthwise(2, 3, 7, 7, (3, 3), 3, stride=2, padding=3, dilation=3),
    "1D": depthwise(2, 8, 1, 200, (1, 3), padding=(0, 64), dilation=(1, 64)),
    "1D, causal": depthwise(1, 16, 1, 70, (1, 2), dilation=(1, 32)),
    "13 taps in a row": depthwise(1, 8, 2, 30, (1, 13), padding=(0, 12), dilation=(1, 2)),
    "vertical": depthwise(1, 16, 20, 3, (5, 1), padding=(4, 0), dilation=(2, 1)),
    "stride 2x3 that reaches no odd row": depthwise(
        2, 16, 14, 12, (3, 3), stride=(2, 3), padding=(2, 1), dilation=(2, 2)
    ),
    "stride 4, dilation 2": depthwise(1, 16, 15, 13, (3, 3), stride=4, padding=2, dilation=2),
    "stride 2 that reaches no even row": depthwise(
        1, 16, 9, 10, (2, 2), stride=2, padding=1, dilation=2
    ),
    "even filter, same": depthwise(1, 16, 7, 8, (2, 4), padding="same", dilation=(3, 1)),
    "one pixel": depthwise(4, 16, 1, 1, (3, 3), padding=4, dilation=4),
}


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
@pytest.mark.parametrize(
    "name, dtype",
    [
        *itertools.product(DEPTHWISE, ["float16"]),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in itertools.product(
                ["VAN", "odd channels", "stride 2, dilation 3", "multiplier 2"],
                ["bfloat16", "float32", "float64"],
            )
        ),
    ],
)
def test_depthwise(name, dtype, layout, monkeypatch):
    """The direct kernels alone; they read both layouts where they are."""
    launched, call = [], launch.Ready.__call__
    monkeypatch.setattr(
        launch.Ready,
        "__call__",
        lambda self, tensors: launched.append(self.launch.name) or call(self, tensors),
    )
    check(laid_out(DEPTHWISE[name], layout, dtype))
    assert set(launched) == {"correlate_depthwise", "wgrad_depthwise", "sum_partials"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"COLS": 1},
        {"COLS": 5},
        {"TAPS": 1},
        {"TAPS": 2},
        {"BLOCK_IMG": 1, "BLOCK_P": 3, "BLOCK_Q": 5},
        {"BLOCK_IMG": 2, "BLOCK_P": 1, "BLOCK_Q": 16},
        {"BLOCK_N": 8, "num_warps": 1},
        {"num_warps": 8},
    ],
)
@pytest.mark.parametrize(
    "name", ["residues on both axes", "stride 2, dilation 3", "dilation beyond the map"]
)
def test_every_depthwise_tile(name, change):
    p = DEPTHWISE[name]
    for pass_ in PASSES:
        cfg = replace(cost_model.best(p, pass_, drivers.target()), **change)
        assert config.fits(cfg, p, pass_, drivers.target()) is None
        check(p, [pass_], [cfg])


@pytest.mark.slow
@pytest.mark.parametrize("rows, split", [(1, 1), (2, 3), (3, 5), (3, 40)])
def test_depthwise_wgrad_sums_every_share(rows, split):
    """More shares than boxes, more rows than the filter has left."""
    for name in ("residues on both axes", "odd channels", "dilation beyond the map"):
        p = DEPTHWISE[name]
        check(
            p,
            ["wgrad"],
            [replace(cost_model.best(p, "wgrad", drivers.target()), ROWS=rows, SPLIT_K=split)],
        )


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
@pytest.mark.parametrize("pass_", PASSES)
def test_depthwise_reruns_are_bit_identical(pass_, layout):
    p = laid_out(DEPTHWISE["residues on both axes"], layout, "float32")
    cfg = cost_model.best(p, pass_, drivers.target())
    first, again = check(p, [pass_], [cfg, replace(cfg)], seed=1)
    assert torch.equal(first, again)


def test_depthwise_reads_both_layouts_in_place(monkeypatch):
    """No copy of a tensor that has the result's layout, channels_last or not; others are brought
    into it."""
    for layout, fmt in launch.FORMATS.items():
        p = laid_out(DEPTHWISE["residues on both axes"], layout)
        x, w, bias, dy = (
            t.contiguous(memory_format=fmt) if t.dim() == 4 else t
            for t in testing.random_tensors(p, kernel_device(), 0)
        )
        read, call = set(), launch.Ready.__call__
        with monkeypatch.context() as patch:
            patch.setattr(
                launch.Ready,
                "__call__",
                lambda self, ts: read.update(t.data_ptr() for t in ts.values()) or call(self, ts),
            )
            check(p, tensors=(x, w, bias, dy))
        assert {t.data_ptr() for t in (x, w, bias, dy)} <= read
        other = next(f for f in launch.FORMATS.values() if f is not fmt)
        for got in check(
            p, tensors=(x.contiguous(memory_format=other), w, bias, dy[:, :, :, :1].expand_as(dy))
        ):
            assert got.is_contiguous(memory_format=fmt)


def test_depthwise_of_a_misaligned_tensor():
    p = DEPTHWISE["residues on both axes"]
    x, w, bias, dy = testing.random_tensors(p, kernel_device(), 0)

    def shifted(t):
        flat = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:]
        n, c, h, w_ = t.shape
        return flat.view(n, h, w_, c).permute(0, 3, 1, 2).copy_(t)

    check(p, tensors=(shifted(x), w, bias, shifted(dy)))


@pytest.mark.slow
@pytest.mark.skipif(not drivers.interpreted(), reason="counts the interpreter's loads and stores")
@pytest.mark.parametrize(
    "name, layout",
    [
        ("odd channels", "nchw"),
        *(
            (name, "nhwc")
            for name in (
                "VAN",
                "stride 2, dilation 3",
                "stride 2, dilation 2",
                "dilation beyond the map",
                "multiplier 2",
                "13 taps in a row",
            )
        ),
    ],
)
def test_bytes_of_depthwise_layers(name, layout, monkeypatch):
    """config.moved_bytes, which the sweep reports, against the bytes that the kernels load and
    store."""
    from triton.runtime.interpreter import InterpreterBuilder

    p, count, load, store = (
        laid_out(DEPTHWISE[name], layout),
        0,
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )

    def loading(self, ptrs, mask, *args):
        nonlocal count
        count += mask.data.sum() * ptrs.get_element_ty().primitive_bitwidth // 8
        return load(self, ptrs, mask, *args)

    def storing(self, ptrs, value, mask, *args):
        nonlocal count
        count += mask.data.sum() * ptrs.get_element_ty().primitive_bitwidth // 8
        return store(self, ptrs, value, mask, *args)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", loading)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", storing)
    x, w, _, dy = testing.random_tensors(p, kernel_device(), 0)
    for pass_, args in (("fprop", (x, w, None)), ("dgrad", (dy, w)), ("wgrad", (dy, x))):
        cfg, count = cost_model.best(p, pass_, drivers.target()), 0
        getattr(launch, pass_)(p, *args, cfg)
        moved, requested = config.moved_bytes(p, pass_, cfg)
        assert count == requested and (moved == p.bytes) == (pass_ != "wgrad")


@pytest.mark.slow
@pytest.mark.skipif(not drivers.interpreted(), reason="counts the interpreter's products")
@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
@pytest.mark.parametrize(
    "name",
    [
        "VAN",
        "odd channels",
        "stride 3x2, dilation 2x4",
        "dilation beyond the map",
        "multiplier 2",
        "13 taps in a row",
    ],
)
def test_executed_macs_of_depthwise_layers(name, layout, monkeypatch):
    test_executed_macs_are_those_that_run(name, monkeypatch, laid_out(DEPTHWISE[name], layout))


TMA = [
    "aspp",
    "dilation beyond the map",
    "padding beyond the extent",
    "stride 2, dilation 2",
    "stride 2, dilation 3",
    "stride 2, odd padding",
    "dilations differ",
    "3x1",
    "1x3",
    "49 taps",
    "ragged channels of 8",
    "even filter, same",
    "1x1, dilation 4",
    "one pixel",
    "height 1",
    "many images",
    "NCHW",
    "NCHW, strided",
    "wide groups",
    "output channels that no descriptor stores",
]
GEOMETRIES |= {
    "ragged channels of 8": problem((1, 72, 9, 9), (40, 72, 3, 3), padding=2, dilation=2),
    "stride 2, odd padding": problem(
        (2, 16, 9, 10), (32, 16, 3, 3), stride=2, padding=(1, 3), dilation=2
    ),
    "wide groups": problem((1, 128, 8, 9), (192, 32, 3, 3), padding=2, dilation=2, groups=4),
    "output channels that no descriptor stores": problem(
        (2, 32, 8, 9), (21, 32, 3, 3), padding=6, dilation=6
    ),
}


@pytest.fixture
def hopper(monkeypatch):
    """Descriptors run in the interpreter, and on the GPUs that have them."""
    if drivers.interpreted():
        monkeypatch.setenv("TRIDIL_TARGET", "cuda:90")
    if architecture(drivers.target()) < 90:
        pytest.skip(f"{drivers.target()} has no tensor descriptors")
    launched = []
    call = launch.Ready.__call__
    monkeypatch.setattr(
        launch.Ready,
        "__call__",
        lambda self, tensors: launched.append(self.launch.name) or call(self, tensors),
    )
    return launched


def tma_config(pass_, **change):
    tile = {"BLOCK_M": 32} if pass_ == "wgrad" else {"BLOCK_K": 32, "WEIGHT_FIRST": True}
    return config.from_json(
        {
            "kernel": "tma",
            "BLOCK_IMG": 1,
            "BLOCK_P": 4,
            "BLOCK_Q": 8,
            "BLOCK_N": 64,
            **tile,
            "SPLIT_K": 1,
            "WARP_SPECIALIZE": False,
            "num_warps": 4,
            "num_stages": 2,
            "maxnreg": None,
            **change,
        },
        pass_,
    )


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("aspp", "float16"),
        ("dilation beyond the map", "float16"),
        # what is read of x and written of dx begins behind the tensor's first pixel
        ("stride 2, odd padding", "float16"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                *itertools.product(
                    sorted({*TMA} - {"aspp", "dilation beyond the map", "stride 2, odd padding"}),
                    ["float16"],
                ),
                *itertools.product(
                    ["aspp", "ragged channels of 8", "stride 2, dilation 3", "NCHW"],
                    ["bfloat16", "float32"],
                ),
            )
        ),
    ],
)
def test_descriptors(name, dtype, hopper):
    """Every geometry that a descriptor can describe, in both operand orders, with and without split
    reductions and folded images."""
    p = replace(GEOMETRIES[name], dtype=dtype)
    for pass_ in PASSES:
        orders = [{}] if pass_ == "wgrad" else [{"WEIGHT_FIRST": True}, {"WEIGHT_FIRST": False}]
        for change in [*orders, {"SPLIT_K": 3}, {"BLOCK_IMG": 2, "BLOCK_Q": 4, "num_stages": 3}]:
            cfg = tma_config(pass_, **change)
            if p.groups > 1:
                cfg = replace(cfg, **{"BLOCK_M" if pass_ == "wgrad" else "BLOCK_K": 16})
            if config.fits(cfg, p, pass_, drivers.target()) is None:
                hopper.clear()
                check(p, [pass_], [cfg], precision="tf32" if dtype == "float32" else "ieee")
                assert any(kernel.endswith("_tma") for kernel in hopper)
            # stride 3 dilation 2 in fprop and wgrad, 21 channels in the backward passes
            else:
                assert name in (
                    "stride 2, dilation 3",
                    "output channels that no descriptor stores",
                ), config.fits(cfg, p, pass_, drivers.target())


def test_the_overhang_of_ragged_channels_is_not_multiplied(hopper):
    """72 channels in blocks of 32: an Inf weight of the next tap must stay one Inf in its own
    output channel, not become NaN elsewhere."""
    p = GEOMETRIES["ragged channels of 8"]
    x, w, bias, dy = testing.random_tensors(p, kernel_device(), 0)
    # the pixel's own tap, first channel: behind the overhang of the tap before
    w[3, 0, 1, 1] = float("inf")
    y = launch.fprop(p, x, w, bias, tma_config("fprop"))
    assert (
        torch.equal(y[:, 3] == float("inf"), x[:, 0] > 0)
        and torch.isfinite(y[:, :3]).all()
        and torch.isfinite(y[:, 4:]).all()
    )
    assert hopper == ["correlate_tma"]


@pytest.mark.parametrize("offset", [1, 4])
def test_descriptors_of_a_misaligned_tensor(hopper, offset):
    """A base that is not a multiple of 16 bytes is copied, not refused."""
    p = problem((1, 32, 7, 7), (16, 32, 3, 3), padding=2, dilation=2)
    tensors = [
        t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
        for t in testing.random_tensors(p, kernel_device(), 0)
    ]

    def shifted(t):
        flat = torch.empty(t.numel() + offset, dtype=t.dtype, device=t.device)[offset:]
        n, c, h, w_ = t.shape
        return flat.view(n, h, w_, c).permute(0, 3, 1, 2).copy_(t)

    x, w, bias, dy = (shifted(t) if t.dim() == 4 else t for t in tensors)
    for pass_ in PASSES:
        check(p, [pass_], [tma_config(pass_)], tensors=(x, w, bias, dy))
    assert len(hopper) == 3


@pytest.mark.slow
@pytest.mark.skipif(not drivers.interpreted(), reason="counts the interpreter's matrix products")
@pytest.mark.parametrize("name", GEOMETRIES)
def test_executed_macs_are_those_that_run(name, monkeypatch, p=None):
    """config.executed_macs, which the sweep reports, against a count of the products that the
    kernels form."""
    from triton.runtime.interpreter import InterpreterBuilder

    p, count, create_dot, create_fmul = (
        p or GEOMETRIES[name],
        0,
        InterpreterBuilder.create_dot,
        InterpreterBuilder.create_fmul,
    )

    def counting(self, a, b, *args):
        nonlocal count
        count += a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return create_dot(self, a, b, *args)

    # the direct kernels multiply floats nowhere else
    def counting_elements(self, a, b):
        nonlocal count
        count += a.data.size
        return create_fmul(self, a, b)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counting)
    monkeypatch.setattr(InterpreterBuilder, "create_fmul", counting_elements)
    for pass_ in PASSES:
        cfg, count = cost_model.best(p, pass_, drivers.target()), 0
        check(p, [pass_], [cfg])
        assert count == config.executed_macs(p, pass_, cfg)


@pytest.mark.parametrize(
    ("channels", "groups", "out"), [(8, 1, 8), (8, 2, 4), (7, 7, 7), (7, 7, 14)]
)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_a_dgrad_that_no_tap_reaches_is_zero(channels, groups, out, layout):
    """Steps over the map so long that its pixels lie between the taps."""
    p = problem_of(
        (1, channels, 3, 8),
        (out, channels // groups, 1, 1),
        None,
        (5, 1),
        ((1, 0), (0, 0)),
        1,
        groups,
        "float16",
        layout,
    )
    assert not p.axes("dgrad")
    (dx,) = check(p, ["dgrad"])
    assert dx.shape == p.x_shape and not dx.any()
    check(p, ["fprop", "wgrad"])
