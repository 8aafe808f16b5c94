"""One switch: without a Triton driver that serves tensors, kernels are interpreted on the CPU. Set
before anything imports a kernel."""

import os
import random
import sys
import tempfile
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import hypothesis
import pytest
import torch

# the first call of anything is slow
hypothesis.settings.register_profile("tridil", deadline=None)
hypothesis.settings.load_profile("tridil")


_root = Path(__file__).resolve().parents[1]
# scripts and the models that tests convert
sys.path.insert(0, str(_root / "perf"))
# child processes find the package in a checkout that is not installed
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_root), os.environ.get("PYTHONPATH")]))
_cache = tempfile.TemporaryDirectory(prefix="tridil-tests-", ignore_cleanup_errors=True)
# what a user measured must not choose the tests' configs
os.environ["TRIDIL_CACHE"] = _cache.name


def _driver_serves() -> bool:
    """Whether Triton is there (not imported where no driver can be) and has a driver: a GPU's, or
    one that a plugin made active."""
    if "triton" not in sys.modules and not torch.cuda.is_available():
        return False
    try:
        from triton.runtime import driver

        return driver.active.get_active_torch_device() is not None
    # no Triton, or whatever a driver raises where it finds no device
    except Exception:
        return False


if not _driver_serves():
    os.environ["TRITON_INTERPRET"] = "1"


BEGIN = time.monotonic()


def pytest_addoption(parser):
    parser.addoption(
        "--seconds", type=float, default=float("inf"), help="skip what has not begun by then"
    )
    parser.addoption("--all", action="store_true", help="run the slow tests, too")
    parser.addoption(
        "--part",
        type=float,
        default=1,
        metavar="SHARE",
        help="run a random share of the tests; --part-seed repeats one",
    )
    parser.addoption("--part-seed", type=int, default=random.randrange(2**31), metavar="N")


def pytest_configure(config):
    if os.environ.get("TRITON_INTERPRET") == "1":
        _quicken(config.getoption("--all"))


def _quicken(with_overflow: bool) -> None:
    """Spares Triton's interpreter (3.6 to 3.9) two thirds of its time: the look through its language at
    each call of a helper, for what the launch, or (of triton.language's own helpers) an earlier call
    that nobody takes back, has patched; and the assertion on each integer operation that it does not
    overflow, which small geometries cannot."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch = cache(lambda fn: interpreter._patch_lang(fn))

    def call(helper, *args, **kwargs):
        if helper.fn.__module__.startswith("triton."):
            patch(helper.fn)
        try:
            return helper.rewrite()(*args, **kwargs)
        except Exception as e:
            raise interpreter.InterpreterError(repr(e)) from e

    interpreter.InterpretedFunction.__call__ = call
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=with_overflow)


def pytest_report_header(config):
    share, number = config.getoption("--part"), config.getoption("--part-seed")
    return (
        f"a random {share:.0%} of the tests: --part {share:g} --part-seed {number}"
        if share < 1
        else None
    )


def pytest_collection_modifyitems(config, items):
    share, chance = config.getoption("--part"), random.Random(config.getoption("--part-seed"))
    # a test that is named is run
    with_slow = config.getoption("--all") or any("::" in name for name in config.args)
    chosen, left = [], []
    for item in items:
        (
            chosen
            if (with_slow or not item.get_closest_marker("slow")) and chance.random() < share
            else left
        ).append(item)
    if share < 1:  # so that none is always among the last, which time may leave out
        chance.shuffle(chosen)
    config.hook.pytest_deselected(items=left)
    items[:] = chosen


def pytest_runtest_setup(item):
    seconds = item.config.getoption("--seconds")
    if time.monotonic() - BEGIN > seconds:
        pytest.skip(f"more than {seconds:g} s have passed")


@pytest.fixture(autouse=True)
def no_tf32():
    """tf32 is PyTorch's default for convolutions: references and budgets here are of float32, tests
    of tf32 turn it on. The older switch also undoes what a test did to one of the newer ones, else
    torch.export refuses the mix."""
    torch.backends.cudnn.allow_tf32 = False


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """-n auto: a worker per core; on a GPU no more than its free memory has room for, at 2 GiB
    each."""
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return max(1, min(len(os.sched_getaffinity(0)), free // 2**31))
    return None


@pytest.fixture
def device():
    """Where the kernels run: the GPU if there is one."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


@pytest.fixture(params=["aten", "triton"])
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


@pytest.fixture
def seed():
    """A fresh seed, shown when the test fails."""
    value = random.randrange(2**31)
    print(f"seed {value}")
    torch.manual_seed(value)
    return value


@pytest.fixture
def poisoned():
    """torch.empty returns NaN, so a result that was not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
