"""Which backend runs, and what is said when one cannot."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tridil import __main__, drivers, verdict
from tridil.problem import PASSES, Problem

P = Problem(1, 16, 9, 9, 16, 3, 3, padding=((2, 2), (2, 2)), dilation=(2, 2))
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in drivers.VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_variables_are_in_the_table():
    """What the package reads, and what the notes for contributors say of it."""
    root = Path(drivers.__file__).parents[1]
    read = {
        name
        for path in (root / "tridil").rglob("*.py")
        for name in re.findall(r"TRIDIL_[A-Z]+", path.read_text(encoding="utf-8"))
    }
    assert read == drivers.VARIABLES.keys()
    told = (root / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` | {text} |" in told for name, text in drivers.VARIABLES.items())
    assert drivers.clean({"TRIDIL_TUNE": "1", "TRITON_INTERPRET": "1", "HOME": "h"}) == {
        "HOME": "h"
    }


class Driver:
    def __init__(self, device="cuda", backend="cuda", arch=90):
        self.device, self.target = (
            torch.device(device),
            type("Target", (), dict(backend=backend, arch=arch)),
        )

    def get_active_torch_device(self):
        return self.device

    def get_current_target(self):
        return self.target


@pytest.fixture
def driver(monkeypatch):
    """Sets the active Triton driver, or the reason why there is none."""
    monkeypatch.setattr(drivers, "_has_triton", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    # of the machine's own GPU nothing is asked
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def use(value):
        monkeypatch.setattr(drivers, "_driver", lambda: value)

    return use


def test_auto(driver):
    driver(Driver("cuda"))
    assert drivers.choose(P, GPU) == "triton" and drivers.choose(P, CPU) == "aten"
    assert drivers.target() == "cuda:90"
    driver(Driver("cuda", "hip", "gfx942"))
    assert drivers.target() == "hip:gfx942"
    driver(Driver("cuda", arch=75))
    assert drivers.choose(P, GPU) == "aten" and drivers.choose(P, GPU, "triton") == "triton"
    assert "tensor cores" in verdict.rows_of(P, GPU)[0]["why"]
    # an emulating driver: asked for, not chosen
    driver(Driver("cpu"))
    assert drivers.choose(P, CPU) == "aten" and drivers.choose(P, CPU, "triton") == "triton"
    assert drivers.choose(P, GPU) == "aten"
    driver("no driver: libcuda was not found")
    assert drivers.choose(P, GPU) == "aten"


def test_interpreter_serves_cpu_tensors(driver, monkeypatch):
    driver("no driver")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert drivers.can_run(P, CPU) is None and "TRITON_INTERPRET" in drivers.can_run(P, GPU)
    assert drivers.choose(P, CPU) == "aten" and drivers.choose(P, CPU, "triton") == "triton"


@pytest.mark.parametrize(
    "state, device, reason",
    [
        (Driver("cuda"), CPU, "serves 'cuda' tensors, got a tensor on 'cpu'"),
        ("no driver: x", GPU, "no driver: x"),
    ],
)
def test_explicit_triton_never_falls_back(driver, state, device, reason):
    driver(state)
    with pytest.raises(NotImplementedError, match=reason):
        drivers.choose(P, device, "triton")


@pytest.mark.parametrize("dtype", ["int64", "complex64", "float8_e4m3fn", "bool"])
def test_dtypes(driver, dtype):
    import dataclasses

    driver(Driver("cuda"))
    odd = dataclasses.replace(P, dtype=dtype)
    assert drivers.choose(odd, GPU) == "aten"
    with pytest.raises(TypeError, match=f"dtype {dtype} is not supported"):
        drivers.choose(odd, GPU, "triton")


def test_without_triton(monkeypatch):
    monkeypatch.setattr(drivers, "_has_triton", lambda: False)
    assert drivers.choose(P, GPU) == "aten"
    with pytest.raises(NotImplementedError, match="pip install triton"):
        drivers.choose(P, GPU, "triton")


def test_variables(driver, monkeypatch):
    driver(Driver("cuda"))
    monkeypatch.setenv("TRIDIL_BACKEND", "aten")
    assert drivers.choose(P, GPU) == "aten" and drivers.choose(P, GPU, "triton") == "triton"
    monkeypatch.setenv("TRIDIL_BACKEND", "cudnn")
    with pytest.raises(ValueError, match="cudnn"):
        drivers.choose(P, GPU)
    monkeypatch.setenv("TRIDIL_TARGET", "cuda:80")
    assert drivers.target() == "cuda:80"
    monkeypatch.setenv("TRIDIL_TARGET", "sm_90")
    with pytest.raises(ValueError, match="sm_90"):
        drivers.target()
    with pytest.raises(ValueError, match="inductor"):
        drivers.choose(P, GPU, "inductor")


def test_explain(driver, monkeypatch):
    driver(Driver("cuda"))
    aspp = Problem(4, 2048, 60, 60, 256, 3, 3, padding=((36, 36), (36, 36)), dilation=(36, 36))
    rows = verdict.rows_of(aspp, GPU)
    assert [r["pass"] for r in rows] == list(PASSES) and {r["backend"] for r in rows} == {"triton"}
    assert all(r["executed_macs"] >= r["useful_macs"] > 0 for r in rows)
    assert {r["why"] for r in verdict.rows_of(P, CPU)} == {
        "the active Triton driver serves 'cuda' tensors, got a tensor on 'cpu'"
    }
    assert {r["why"] for r in verdict.rows_of(P, GPU, "aten")} == {"asked for"}
    monkeypatch.setenv("TRIDIL_BACKEND", "aten")
    assert {r["why"] for r in verdict.rows_of(P, GPU)} == {"TRIDIL_BACKEND=aten"}


@pytest.mark.parametrize(
    "change",
    [
        dict(n=0),
        dict(c=0),
        dict(h=0, padding=((4, 4), (2, 2))),
        dict(n=0, c=4, k=4, groups=4),
        dict(n=0, stride=(2, 3)),
        dict(n=0, c=3, dtype="float32", layout="nchw"),
        dict(n=0, h=1, r=1),
    ],
    ids=str,
)
@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "cuda:100", "hip:gfx942"])
def test_explain_of_nothing_to_multiply(target, change):
    """Empty batches, channels and maps: no work, which ATen's empty result takes."""
    from dataclasses import replace

    from tridil import config

    empty = replace(P, **change)
    rows = verdict.rows_of(empty, CPU, "auto", target)
    assert {(r["backend"], r["useful_macs"]) for r in rows} == {("aten", 0)}
    assert all(
        f"nothing to multiply: n={empty.n}, c={empty.c}, " in r["why"] for r in rows
    ) and "nothing to multiply" in verdict.text_of(empty, CPU, "auto", target, rows)
    for pass_ in PASSES:
        for option in config.candidates(empty, pass_, target):
            assert min(config.moved_bytes(empty, pass_, option)) >= 0


def test_explain_of_geometry_beyond_32_bits(driver):
    from dataclasses import replace

    driver(Driver("cuda"))
    far = replace(P, padding=((2**30, 2**30), (2**30, 2**30)), dilation=(2**30, 2**30))
    assert drivers.choose(far, GPU) == "aten" and "32 bits" in drivers.can_run(far, GPU)
    for rows in (verdict.rows_of(far, GPU), verdict.rows_of(far, GPU, target="cuda:90")):
        assert {r["backend"] for r in rows} == {"aten"} and all(
            r["why"] == far.beyond_int32 for r in rows
        )
    with pytest.raises(
        NotImplementedError, match="cannot run this convolution: .*reaches [0-9]+ .*dil1073741824"
    ):
        drivers.choose(far, GPU, "triton")


@pytest.mark.parametrize("dtype, error", [("float16", None), ("int64", TypeError)])
def test_meta_tensors_ask_for_shapes(driver, dtype, error):
    from dataclasses import replace

    driver("no driver")
    for backend in ("auto", "aten", "triton"):
        if error and backend == "triton":
            with pytest.raises(error):
                drivers.choose(replace(P, dtype=dtype), torch.device("meta"), backend)
        else:
            assert drivers.choose(replace(P, dtype=dtype), torch.device("meta"), backend) == "aten"


def run(*args):
    return subprocess.run([sys.executable, "-m", "tridil", *args], capture_output=True, text=True)


@pytest.mark.slow
def test_command_line():
    out = run("info")
    assert out.returncode == 0 and "torch" in out.stdout and "auto runs aten" in out.stdout
    out = run(
        "explain",
        "--shape",
        "n=4 c=256 h=64 w=64 k=256 r=3 d=12",
        "--target",
        "cuda:90",
        "--device",
        "cpu",
    )
    assert out.returncode == 0 and out.stdout.count("dense 9.664 GMACs") == 3
    # hopper, where this process can compile it
    assert len(re.findall(r"kernel (tma|hopper) \(.*cuda:90", out.stdout)) == 3
    out = run(
        "explain",
        "--shape",
        "n=0 c=16 h=9 w=9 k=16 r=3 d=2",
        "--target",
        "cuda:90",
        "--device",
        "cpu",
    )
    assert (
        out.returncode == 0
        and out.stdout.count("nothing to multiply: n=0") == 1
        and out.stdout.count("dense 0 MACs") == 3
    )
    for bad in (
        "n=4 c=256 h=60 w=60",
        "c=256 h=60 w=60 k=256 z=3",
        "c=a h=60 w=60 k=256",
        "c=6 h=9 w=9 k=6 g=4",
    ):
        out = run("explain", "--shape", bad)
        assert out.returncode == 2 and "error" in out.stderr and "Traceback" not in out.stderr


SHAPE = "n=1 c=16 h=9 w=9 k=16 r=3 d=2"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["explain", "--shape", SHAPE, "--device", "foo"], "--device foo: "),
        (["explain", "--shape", SHAPE, "--device", "cuda:99"], "--device cuda:99: there are"),
        (["explain", "--shape", SHAPE, "--device", ""], "--device : "),
        (["explain", "--shape", SHAPE, "--target", "cuda:70"], "unknown target 'cuda:70'"),
        (["explain", "--shape", SHAPE, "--target", "cuda:999"], "unknown target 'cuda:999'"),
        (["explain", "--shape", SHAPE, "--target", "hip:gfx9999"], "unknown target 'hip:gfx9999'"),
        (["explain", "--shape", SHAPE, "--target", "sm_90"], "use one of cuda:80"),
        (["explain", "--shape", "n=1 c=3"], "lacks ['h', 'k', 'w']"),
        (["explain", "--shape", SHAPE + " z=3"], "unknown names ['z']"),
        (["explain", "--shape", "c=a h=60 w=60 k=256"], "cannot read 'c=a'"),
        (["explain", "--shape", SHAPE + " g=5"], "must be a multiple of g"),
        (["explain", "--shape", SHAPE + " stride=0"], "stride"),
        (["explain", "--shape", SHAPE + " d=0"], "dilation"),
        (["explain", "--shape", SHAPE + " d=1,2,3"], "dilation"),
        (["explain", "--shape", "n=1 c=16 h=3 w=3 k=16 r=3 d=9 pad=0"], "pad more or dilate"),
        (["explain", "--shape", ""], "lacks"),
        (["tune", "--model", "nosuch.module:fn"], "No module named 'nosuch'"),
        (["tune", "--model", "json"], "takes package.module:factory"),
        (["tune", "--model", "json:nothing"], "takes package.module:factory"),
        (["tune", "--model", ":f"], "takes package.module:factory"),
        (["tune", "--model", "json:dumps"], "TypeError"),
        (["tune", "--model", "os:getcwd"], "must return (module, inputs)"),
        (["tune", "--suite", "nosuch"], "unknown suite 'nosuch'"),
        (["tune", "--passes", "fprop,foo"], "['foo'] are not of fprop, dgrad, wgrad"),
        (["tune", "--top", "0", "--shape", SHAPE], "top"),
        (["cache", "export", "."], ". is a folder"),
        (["cache", "export", "/nosuch/x.json"], "/nosuch is no folder"),
        (["cache", "export"], "export takes one file"),
        (["cache", "export", "a", "b"], "export takes one file"),
        (["cache", "merge"], "merge takes the files to merge"),
        (["cache", "merge", "nosuch.json"], "there is no file nosuch.json"),
        (["cache", "merge", "."], "directory"),
        (["cache", "--target", "cuda:7"], "unknown target"),
        (["aot", "--json", "/nosuch/x.json"], "/nosuch is no folder"),
        (["aot", "--json", "."], ". is a folder"),
        (["aot", "--save", "/proc/nosuch"], "/proc/nosuch"),
        (["aot", "--passes", "foo"], "['foo'] are not of"),
        (["aot", "--suite", "nosuch"], "batch1, branches"),
        # an option that another makes void
        (["aot", "--suite", "aspp", "--shape", SHAPE], "--shape makes --suite void"),
        (["tune", "--suite", "aspp", "--shape", SHAPE], "--shape makes --suite void"),
        (
            ["tune", "--model", "a:b", "--shape", SHAPE, "--dtype", "float32"],
            "--shape, --dtype void",
        ),
        (["explain", "--model", "a:b", "--backend", "aten"], "--model makes --backend void"),
        (["explain", "--model", "a:b", "--layout", "nchw"], "without --input makes --layout void"),
        (["explain", "--shape", SHAPE, "--input", "1,3,9,9"], "--shape makes --input void"),
        (["cache", "show", "a"], "show takes no file"),
        (["cache", "merge", "a.json", "--target", "cuda:80"], "leave --target out"),
        (["aot", "--shape", ""], "lacks"),
        (["tune", "--shape", ""], "lacks"),
        (["tune", "--model", ""], "takes package.module:factory"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys, monkeypatch, tmp_path):
    """Before anything is compiled or measured, and nothing is written."""
    pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(__main__, "report", lambda *args: pytest.fail("compiled"))
    assert __main__.main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"tridil {arguments[0]}: error: ") and err.count("\n") == 1, err
    assert message in err and not out and not list(tmp_path.iterdir())


def test_whoever_reads_the_output_may_have_enough():
    command = [sys.executable, "-m", "tridil", "explain", "--shape", SHAPE, "--target", "cuda:90"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 141


def test_words(monkeypatch):
    """Units that people read, one reason once, the library's own name, an assumed target said."""
    assert [verdict.macs_text(n) for n in (0, 12, 34_000, 5_600_000, 67_950_000_000)] == [
        "0 MACs",
        "12 MACs",
        "34 kMACs",
        "5.6 MMACs",
        "67.95 GMACs",
    ]
    # the reason where Triton could run: a GPU's driver has another
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    text = verdict.text_of(P, CPU)
    assert text.count("CPU tensors run through ATen") == 1 and "cuDNN" in text
    amd = verdict.text_of(replace(P, dtype="float64"), CPU, target="hip:gfx908")
    assert "ATen stays unless the kernels are 1.1 times as fast" in amd and "cuDNN" not in amd
    assert "limited by tensor cores" not in amd
    assert "assumed" not in text
    monkeypatch.setattr(drivers, "is_assumed", lambda: True)
    assert "(assumed: there is no GPU here)" in verdict.text_of(P, CPU)


def test_tables_beyond_memory_are_one_line(capsys, monkeypatch):
    """As of a map of 10^12 pixels."""

    def text_of(*args):
        raise MemoryError("Unable to allocate 93.1 GiB")

    monkeypatch.setattr(__main__.verdict, "text_of", text_of)
    assert __main__.main(["explain", "--shape", SHAPE]) == 2
    assert capsys.readouterr().err == "tridil explain: error: Unable to allocate 93.1 GiB\n"
