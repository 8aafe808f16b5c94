"""Heads of real networks with their branches in one launch: equal to the originals."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import tridil
from tridil import aspp, drivers


@pytest.fixture(scope="module", autouse=True)
def torchvision():
    """torchvision also where its compiled part does not go with this torch: heads need nothing of
    it, but the import asks for two operators."""
    library = None
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    yield library


def separable_head():
    """A head of smp's, without its encoder of 512 channels."""
    decoder = pytest.importorskip("segmentation_models_pytorch.decoders.deeplabv3.decoder")
    return nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), decoder.ASPP(8, 8, (2, 4, 9), True, 0.0))


def torchvision_head():
    deeplabv3 = pytest.importorskip("torchvision.models.segmentation.deeplabv3")
    head = deeplabv3.ASPP(8, (2, 4, 9), 8)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), head, nn.Conv2d(8, 5, 1))


def smp(name, **rest):
    models = pytest.importorskip("segmentation_models_pytorch")
    return getattr(models, name)(
        "resnet18", encoder_weights=None, classes=5, decoder_channels=8, **rest
    )


MODELS = {
    "torchvision head": torchvision_head,
    "separable head": separable_head,
    "smp DeepLabV3": lambda: smp("DeepLabV3", decoder_atrous_rates=(2, 4, 9)),
    "smp DeepLabV3+": lambda: smp("DeepLabV3Plus", decoder_aspp_separable=False),
    "smp DeepLabV3+, separable": lambda: smp(
        "DeepLabV3Plus", decoder_atrous_rates=(2, 4, 9), encoder_depth=3
    ),
}


def build(name, device, dtype=torch.float64):
    torch.manual_seed(0)
    model = MODELS[name]()
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # drawn anew at each call
            module.p = 0.0
    if "separable" in name:  # all channels of a pixel in one program: the interpreter takes long
        model = model.to(memory_format=torch.channels_last)
    return model.to(device, dtype)


@pytest.mark.parametrize(
    "name",
    # encoders end in 512 channels, which the interpreter takes its time for
    [
        "torchvision head",
        *(pytest.param(name, marks=pytest.mark.slow) for name in list(MODELS)[1:]),
    ],
)
def test_five_steps_are_those_of_the_original(name, backend, device):
    """Outputs, gradients, running averages and parameters, through five steps of SGD."""
    if "smp" in name and "separable" in name and backend == "triton" and drivers.interpreted():
        pytest.skip("takes ten minutes interpreted: the head alone stands for it")
    plain = build(name, device)
    joined = copy.deepcopy(plain)
    # nothing else: encoders are large
    report = tridil.convert(joined, branches=True, backend=backend, min_dilation=99)
    how = (
        "3 of 5 branches in 2 launches" if "separable" in name else "4 of 5 branches in one launch"
    )
    assert len(report.joined) == 1 and how in str(report)
    assert plain.state_dict().keys() == joined.state_dict().keys()
    # of heads alone, small: the interpreter runs them
    shape = (2, 3, 8, 8) if "head" in name else (2, 3, 32, 32)
    x = torch.randn(shape, device=device, dtype=torch.float64)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (plain, joined)]
    for _ in range(5):
        outputs = []
        for model, optimizer in zip((plain, joined), optimizers):
            optimizer.zero_grad()
            y = model(x)
            y.square().mean().backward()
            optimizer.step()
            outputs.append(y.detach())
        torch.testing.assert_close(*outputs)
        grads = [[p.grad for p in model.parameters()] for model in (plain, joined)]
        torch.testing.assert_close(*grads)
    torch.testing.assert_close(dict(plain.state_dict()), dict(joined.state_dict()))
    names = tridil.revert(joined)
    assert set(report.joined) <= set(names)
    assert [type(m) for m in joined.modules()] == [type(m) for m in plain.modules()]
    plain.eval(), joined.eval()
    torch.testing.assert_close(joined(x), plain(x))


@pytest.mark.parametrize("name, filters", [("torchvision head", [4]), ("separable head", [3, 3])])
def test_one_call_runs_the_branches(name, filters, device, monkeypatch):
    """What the head calls is one multi_rate_conv2d with all four filters; of a separable one, one
    with its three depthwise filters and one with the 1x1 filters that follow."""
    model, calls = build(name, device), []
    tridil.convert(model, branches=True)
    run = aspp.multi_rate_conv2d
    monkeypatch.setattr(
        aspp, "multi_rate_conv2d", lambda x, w, *a, **k: calls.append(len(w)) or run(x, w, *a, **k)
    )
    model.eval()(torch.randn(1, 3, 16, 16, device=device, dtype=torch.float64))
    assert calls == filters


@pytest.mark.parametrize(
    "name", ["torchvision head", pytest.param("separable head", marks=pytest.mark.slow)]
)
def test_compiled_autocast_and_copies(name, device, backend):
    model = build(name, device, torch.float32).eval()
    x = torch.randn(1, 3, 16, 16, device=device)
    expected = model(x)
    tridil.convert(model, branches=True, backend=backend)
    for same in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert aspp.is_joined(same[1])
        torch.testing.assert_close(same(x), expected, rtol=1e-4, atol=1e-4)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    torch.testing.assert_close(again(x), expected, rtol=1e-4, atol=1e-4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)
    with torch.autocast(device.type, torch.bfloat16):
        y = model(x)
    torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.1)
    plain = build(name, device, torch.float32)
    model.load_state_dict(plain.state_dict())
    plain.load_state_dict(model.state_dict())


@pytest.mark.parametrize("name", ["torchvision head", "separable head"])
def test_what_was_added_to_branches_since_is_run(name, device, backend):
    model = build(name, device).eval()
    tridil.convert(model, branches=True, backend=backend)
    x = torch.randn(1, 3, 8, 8, device=device, dtype=torch.float64)
    before, calls = model(x), []
    branch = model[1].convs[1]
    modules = [m for m in branch.modules() if isinstance(m, (nn.Sequential, nn.Conv2d))]
    for module in modules:
        handle = module.register_forward_hook(lambda *_: calls.append(1))
        torch.testing.assert_close(model(x), before)
        handle.remove()
    assert calls == [1] * len(modules)
    for conv in modules:
        if isinstance(conv, nn.Conv2d):
            prune.l1_unstructured(conv, "weight", 0.5)
            pruned = model(x)
            conv.weight_orig.data.mul_(0.5)
            assert not torch.equal(model(x), pruned)


def test_what_stays_apart(device):
    model = build("smp DeepLabV3", device)
    report = tridil.convert(model)
    assert not report.joined and not any(map(aspp.is_joined, model.modules()))
    hooked = build("torchvision head", device)
    for branch in hooked[1].convs[1:4]:
        branch[0].register_forward_hook(lambda *_: None)
    assert "or have hooks" in str(tridil.convert(hooked, branches=True))
    twice = build("torchvision head", device)
    first, second = (tridil.convert(twice, branches=True, backend=b) for b in ("auto", "aten"))
    assert first.joined == second.joined and twice[1].backend == "aten"


def in_place(head):
    for branch in head.convs[:4]:
        branch[-2], branch[-1] = nn.Identity(), nn.ReLU(inplace=True)


def another_size(head):
    conv = head.convs[1][0]
    conv.padding, conv.dilation = (0, 0), (1, 1)
    head.convs[1].append(nn.Upsample((4, 4)))


def fewer_channels(head):
    head.convs[1][0].weight = nn.Parameter(head.convs[1][0].weight[:2].clone())
    head.convs[1][1] = nn.BatchNorm2d(2)
    head.project[0] = nn.Conv2d(5 * 8 - 6, 8, 1)


def own_call(head):
    class Twice(nn.Sequential):
        def __call__(self, x):
            return 2 * super().__call__(x)

    head.convs[1].__class__ = Twice


@pytest.mark.parametrize("change", [in_place, another_size, fewer_channels, own_call])
def test_heads_that_users_changed(change, device, backend):
    model = build("torchvision head", device)
    change(model[1])
    model = model.to(device, torch.float64).train()
    x = torch.randn(2, 3, 16, 16, device=device, dtype=torch.float64)
    joined = copy.deepcopy(model)
    tridil.convert(joined, branches=True, backend=backend)
    outputs = [m(x) for m in (model, joined)]
    grads = [
        torch.autograd.grad(y.square().mean(), list(m.parameters()))
        for y, m in zip(outputs, (model, joined))
    ]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", ["torchvision head", "separable head"])
def test_hooks_of_all_modules_and_tracers(name, device):
    plain = build(name, device).eval()
    joined = copy.deepcopy(plain)
    tridil.convert(joined, branches=True)
    x = torch.randn(1, 3, 8, 8, device=device, dtype=torch.float64)
    torch.testing.assert_close(torch.fx.symbolic_trace(joined)(x), plain(x))
    layer = nn.modules.module
    with layer.register_module_forward_hook(
        lambda module, args, y: 2 * y if isinstance(module, nn.Conv2d) else None
    ):
        torch.testing.assert_close(joined(x), plain(x))


def test_heads_whose_class_a_wrapper_derived(device, monkeypatch):
    """As FSDP's fully_shard does."""
    run = aspp.multi_rate_conv2d
    model = build("torchvision head", device)

    def wrap(head):
        head.__class__ = type("Wrapped", (type(head),), {})

    plain = copy.deepcopy(model)
    wrap(plain[1])
    report = tridil.convert(plain, branches=True)
    assert not report.joined and "Wrapped is derived from the head" in str(report)
    tridil.convert(model, branches=True)
    wrap(model[1])
    with pytest.raises(ValueError, match="head 1 is a Wrapped: revert before"):
        tridil.revert(model)
    calls = []
    monkeypatch.setattr(aspp, "multi_rate_conv2d", lambda *a, **k: calls.append(1) or run(*a, **k))
    model.eval()(torch.randn(1, 3, 8, 8, device=device, dtype=torch.float64))
    assert aspp.is_joined(model[1]) and calls == [1]
