"""What a model gains: `explain` of models, counts and problems, and its command line."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import tridil
from tridil import choice, verdict
from tridil.__main__ import main
from tridil.problem import PASSES, Problem

PERF = str(Path(__file__).resolve().parents[1] / "perf")


class Net(nn.Module):
    """A plain, a dilated, a depthwise dilated and a depthwise layer, and a buffer."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Conv2d(3, 64, 3, padding=1)
        self.dilated = nn.Conv2d(64, 64, 3, padding=12, dilation=12)
        self.depthwise = nn.Conv2d(64, 64, 5, padding=4, dilation=2, groups=64)
        self.near = nn.Conv2d(64, 64, 7, padding=3, groups=64)
        self.norm = nn.BatchNorm2d(64)

    def forward(self, x):
        return self.norm(self.near(self.depthwise(self.dilated(self.plain(x)))))


def test_a_model(capsys):
    model, x = Net(), torch.randn(2, 3, 48, 48)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = tridil.explain(model, x, target="cuda:90")
    text = capsys.readouterr().out
    counts = tridil.scan(model, x)
    assert len(counts) == 4 and len(found["rows"]) == 2 and found["target"] == "cuda:90"
    dense = {p: p.dense_macs for p in counts}
    for row in found["rows"]:
        assert row["share"] == pytest.approx(dense[row["problem"]] / sum(dense.values()))
        assert set(row["backends"]) == set(PASSES) and row["label"] == "predicted"
        assert row["gain"] == pytest.approx(row["aten_ms"] / row["auto_ms"]) and row["gain"] >= 1
    assert 1 <= found["step_gain"] <= found["gain"]
    assert "d12 float32 nchw" in text and "predicted (cuDNN estimated)" in text
    assert any("channels_last" in sentence for sentence in found["advice"])
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.plain.weight.device.type == "cpu"
    same = tridil.explain(counts, target="cuda:90")
    assert same["gain"] == found["gain"] and [r["problem"] for r in same["rows"]] == [
        r["problem"] for r in found["rows"]
    ]


def test_what_the_sums_are():
    """Each row from the choice of each pass; others run through ATen."""
    p = Problem(4, 512, 32, 32, 512, 3, 3, padding=((12, 12),) * 2, dilation=(12, 12))
    other = Problem(4, 64, 32, 32, 64, 3, 3, padding=((1, 1),) * 2)
    found = verdict.verdict_of({p: 3, other: 2}, target="cuda:80")
    (row,) = found["rows"]
    kernels = aten = auto = 0
    for pass_ in PASSES:
        c = choice.decide(p, pass_, "cuda:80")
        kernels, aten = kernels + c.prediction.seconds, aten + c.cudnn
        auto += c.prediction.seconds if c.backend == "triton" else c.cudnn
    assert (row["kernels_ms"], row["aten_ms"], row["auto_ms"]) == pytest.approx(
        (3e3 * kernels, 3e3 * aten, 3e3 * auto)
    )
    rest = 2e3 * sum(choice.decide(other, pass_, "cuda:80").cudnn for pass_ in PASSES)
    assert found["step_gain"] == pytest.approx((3e3 * aten + rest) / (3e3 * auto + rest))
    assert found["share"] == pytest.approx(
        3 * p.dense_macs / (3 * p.dense_macs + 2 * other.dense_macs)
    )


def test_advice():
    dilated = Problem(8, 64, 32, 32, 64, 3, 3, padding=((2, 2),) * 2, dilation=(2, 2))
    nothing = verdict.verdict_of({Problem(1, 8, 9, 9, 8, 3, 3): 1}, target="cuda:90")
    assert nothing["gain"] is None and "nothing to convert" in verdict.verdict_text(nothing)
    small = verdict.verdict_of({dilated: 1}, target="cuda:90")
    if not any("triton" in row["backends"].values() for row in small["rows"]):
        assert "nothing to gain" in verdict.verdict_text(small)
    near = Problem(32, 96, 56, 56, 96, 7, 7, padding=((3, 3),) * 2, groups=96, dtype="float32", layout="nchw")  # fmt: skip
    found = verdict.verdict_of({near: 2, dilated: 1}, target="cuda:80")
    assert found["undilated"] and "min_dilation=1" in verdict.verdict_text(found)


def test_measured_times_are_used(monkeypatch):
    p = Problem(4, 64, 32, 32, 64, 3, 3, padding=((12, 12),) * 2, dilation=(12, 12))
    decide = choice.decide

    def measured(*args, **kwargs):
        c = decide(*args, **kwargs)
        record = {"ms": 1.0, "aten_ms": 3.0, "date": "2026-01-01"}
        return choice.Choice(c.config, "cache", "triton", "measured", record, c.prediction, c.cudnn)

    monkeypatch.setattr(choice, "decide", measured)
    found = verdict.verdict_of({p: 2}, target="cuda:90")
    assert found["label"] == "measured" and found["gain"] == 3 and found["rows"][0]["aten_ms"] == 18
    assert not any("tune" in sentence for sentence in found["advice"])


def test_models_that_meta_tensors_do_not_run():
    """A model that looks at values is traced as it is."""

    class Looks(nn.Conv2d):
        def forward(self, x):
            return super().forward(x * float(x.abs().max()))

    model = Looks(4, 4, 3, padding=2, dilation=2)
    counts = verdict.counts_of(model, torch.randn(1, 4, 8, 8))
    assert [p.dilation for p in counts] == [(2, 2)]


def test_a_problem_and_what_is_none(capsys):
    p = Problem(1, 64, 32, 32, 64, 3, 3, padding=((2, 2),) * 2, dilation=(2, 2))
    rows = tridil.explain(p, target="cuda:80")
    assert [row["pass"] for row in rows] == list(
        PASSES
    ) and "target cuda:80" in capsys.readouterr().out
    with pytest.raises(TypeError, match="explain takes"):
        tridil.explain("model")
    with pytest.raises(TypeError, match="counts must map Problems"):
        tridil.explain({"a": 1})
    with pytest.raises(ValueError, match="unknown target"):
        tridil.explain(p, target="cuda:70")


def command(*args, **env):
    return subprocess.run(
        [sys.executable, "-m", "tridil", "explain", *args], capture_output=True, text=True, cwd=PERF
    )


@pytest.mark.parametrize(
    ("model", "size"),
    [
        ("DeepLabV3", "1,3,96,96"),
        pytest.param("DeepLabV3Plus", "8,3,512,512", marks=pytest.mark.slow),
        pytest.param("VAN", "128,3,224,224", marks=pytest.mark.slow),
        pytest.param("WaveNet", "8,1,10240", marks=pytest.mark.slow),
    ],
)
def test_command_line(model, size):
    done = command("--model", f"models:{model}", "--input", size, "--target", "cuda:80")
    assert done.returncode == 0, done.stderr
    assert "target cuda:80, forward and backward" in done.stdout
    assert "kinds of dilated layers" in done.stdout and "predicted" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "explain takes --shape for one layer, or --model"),
        (["--shape", "c=8 h=9 w=9 k=8", "--model", "models:VAN"], "explain takes --shape"),
        (["--model", "nosuch:fn", "--input", "1,3,9,9"], "No module named 'nosuch'"),
        (["--model", "models:Nothing", "--input", "1,3,9,9"], "a function that returns a module"),
        (["--model", "models:conv_bn", "--input", "1,3,9,9"], "TypeError"),
        (["--model", "models:DeepLabV3", "--input", "3,x"], "--input takes sizes"),
        (["--model", "models:DeepLabV3", "--input", "0,3,9,9"], "--input takes sizes"),
        (
            ["--model", "models:DeepLabV3", "--input", "1,5,64,64"],
            "does not run on --input 1,5,64,64",
        ),
        (["--model", "models:DeepLabV3"], "must return (module, inputs)"),
        (["--model", "math:floor", "--input", "1,3,9,9"], "TypeError"),
    ],
)
def test_bad_command_lines(arguments, message, capsys):
    status = main(["explain", *arguments, "--target", "cuda:80"])
    out, err = capsys.readouterr()
    assert status == 2 and message in err, err
    assert len(err.strip().splitlines()) == 1 and not out
