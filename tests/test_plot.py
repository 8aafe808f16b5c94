"""perf/plot.py and perf/page.py on made-up rows: what is drawn, what is not, and the page in a
headless browser."""

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread
from matplotlib.text import Text

PERF = Path(__file__).resolve().parents[1] / "perf"
sys.path.insert(0, str(PERF))
import page  # noqa: E402
import plot  # noqa: E402
import results  # noqa: E402

MACHINE = "device Made Up <9000> | target cuda:90 | driver 1.2.3"
MEASURED = {"results.png", "speedup.png", "roofline.png", "dilation.png", "macs.png", "memory.png"}
UNMEASURED = {"results.png", "over_roof.png", "dilation.png", "macs.png"}


def made_up(folder: Path, measured: bool, machine_rows: bool = True) -> pd.DataFrame:
    """Random rows of 6 layers in 2 dtypes and all passes, of the machine and of a whole model,
    through a CSV: `folder`/results.csv."""
    random, rows = np.random.default_rng(), []
    sizes = [("classic", f"d{d}", "ASPP" if d > 9 else "dense", 64, d, 1) for d in (1, 8, 64)]
    sizes += [
        ("net <b>&\"'", "a_x", "dense", 48, 8, 1),
        ("net <b>&\"'", "b", "grouped", 128, 2, 2),
        ("net <b>&\"'", "c", "1D", 64, 64, 1),
    ]
    common = {
        "version": "1",
        "target": "cuda:90",
        "code": "abc",
        "layout": "nhwc",
        "error": 0.5,
        "budget": 1.0,
    }
    for dtype in ("float16", "float32"):
        for model, layer, kind, c, dilation, groups in sizes:
            useful = float(random.integers(10**6, 10**12))
            for pass_ in ("fprop", "dgrad", "wgrad"):
                for provider in ("tridil", "cudnn", "another") if measured else ("tridil",):
                    ms, extra = math.exp(random.uniform(-3, 6)), random.uniform(0, 300)
                    row = common | {
                        "model": model,
                        "layer": layer,
                        "kind": kind,
                        "pass": pass_,
                        "dtype": dtype,
                        "provider": provider,
                        "n": 2,
                        "c": c,
                        "groups": groups,
                        "dilation": dilation,
                        "problem": f"n2 c{c} dil{dilation}",
                        "dense_macs": 2 * useful,
                        "useful_macs": useful,
                        "compulsory_bytes": useful / random.uniform(1, 500),
                    }
                    if provider == "tridil":
                        row |= {
                            "config": "gather 1x8x8",
                            "executed_macs": useful * random.uniform(1, 1.5),
                            "predicted_ms": ms * random.uniform(1, 9),
                            "roof_ms": ms,
                        }
                    if measured:
                        row |= {
                            "ms": ms,
                            "ms_q1": ms * 0.9,
                            "ms_q3": ms * 1.1,
                            "tflops_useful": 2e-9 * useful / ms,
                            "gb_s": 1.0,
                            "extra_mib": extra,
                        }
                    rows.append(row)
        if measured and machine_rows:
            machine = common | {
                "model": "(machine)",
                "kind": "machine",
                "dtype": dtype,
                "provider": "torch",
                "problem": "2^30 bytes",
            }
            rows += [
                machine
                | {"layer": "copy", "pass": "copy", "ms": 1.0, "gb_s": random.uniform(1e3, 3e3)},
                machine
                | {
                    "layer": "n=k=m",
                    "pass": "matmul",
                    "ms": 1.0,
                    "tflops_dense": random.uniform(100, 900),
                },
            ]
    if measured:
        rows.append(
            common
            | {
                "model": "whole",
                "layer": "(model)",
                "kind": "model",
                "pass": "training",
                "dtype": "float16",
                "provider": "tridil",
                "problem": "2x3x64x64",
                "ms": 9.0,
                "extra_mib": 1e6,
            }
        )
    results.with_ratio(pd.DataFrame(rows, columns=list(results.COLUMNS))).to_csv(
        folder / "results.csv", index=False
    )
    return results.read(folder / "results.csv")


def texts(fig) -> list[str]:
    return [text.get_text() for text in fig.findobj(Text) if text.get_visible() and text.get_text()]


@pytest.mark.parametrize("measured, names", [(True, MEASURED), (False, UNMEASURED)])
def test_pictures(tmp_path, measured, names):
    frame = made_up(tmp_path, measured)
    for stale in MEASURED:
        (tmp_path / stale).write_text("of an earlier run")
    paths = plot.write(frame, tmp_path, MACHINE)
    assert {path.name for path in paths} == names == {path.name for path in tmp_path.glob("*.png")}
    for path in paths:
        image = imread(path)
        height, width, _ = image.shape
        assert (
            300 < height < 4000
            and 800 < width < 4000
            and len(np.unique(image[..., :3] @ [1, 256, 65536])) > 10
        ), path.name


@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize("name", sorted(MEASURED))
def test_axes_say_what_is_measured_and_what_is_predicted(tmp_path, measured, name):
    fig = plot.PICTURES[name](made_up(tmp_path, measured), MACHINE)
    if not measured and name not in UNMEASURED:
        assert fig is None
        return
    assert "Made\N{NO-BREAK SPACE}Up\N{NO-BREAK SPACE}<9000>" in fig.get_suptitle()
    labels = [ax.get_xlabel() + ax.get_ylabel() for ax in fig.axes if ax.get_visible()]
    assert len(labels) >= 1 and ("measured" in "".join(labels)) == (measured and name != "macs.png")
    assert (
        all("measured" in label or "predicted" in label for label in labels)
        or name == "speedup.png"
    )
    assert not any("(model)" in text or "(machine)" in text for text in texts(fig))
    if not measured:
        assert not any("measured" in text for text in texts(fig)) and any(
            "predicted" in text for text in texts(fig)
        )


def test_without_rows_of_layers_nothing_is_drawn(tmp_path):
    frame = made_up(tmp_path, True)
    assert plot.write(frame[frame["model"].isin(["(machine)", "whole"])], tmp_path, MACHINE) == []


def test_heat_map_cells_are_geometric_means(tmp_path):
    frame = made_up(tmp_path, True)
    ours = [
        row
        for row in frame.to_dict("records")
        if row["provider"] == "tridil" and row["layer"] != "(model)"
    ]

    def expected(rows):
        cells = {}
        for row in rows:
            # 128 channels in 2 groups
            key = row["dilation"], {48: 64, 64: 64, 128: 64}[row["c"]]
            cells.setdefault(key, []).append(row["ratio"])
        return {key: math.prod(ratios) ** (1 / len(ratios)) for key, ratios in cells.items()}

    found = plot.speedup_cells(frame.loc[(frame["provider"] == "tridil") & frame["c"].notna()])
    assert found.stack().to_dict() == pytest.approx(expected(ours))
    panels = {
        ax.get_title(): {t.get_text() for t in ax.texts}
        for ax in plot.speedup(frame, MACHINE).axes
        if ax.get_title()
    }
    assert len(panels) == 6
    for title, shown in panels.items():
        pass_, dtype, _ = title.split()
        cells = expected(row for row in ours if row["pass"] == pass_ and row["dtype"] == dtype)
        counts = {(1, 64): 1, (2, 64): 1, (8, 64): 2, (64, 64): 2}
        assert shown == {f"{value:.2f}\n({counts[key]})" for key, value in cells.items()}


def test_the_octaves():
    assert list(plot.octave(pd.Series([1, 2, 3, 4, 5, 64, 65, 2048]))) == [
        1,
        2,
        4,
        4,
        8,
        64,
        128,
        2048,
    ]


def test_roofline_is_that_of_the_machine(tmp_path):
    frame = made_up(tmp_path, True)
    copy, product = (
        frame[(frame["pass"] == name) & (frame["dtype"] == "float32")].iloc[0]
        for name in ("copy", "matmul")
    )
    assert (
        plot.roofs(frame, "float32") == (copy["gb_s"], product["tflops_dense"])
        and plot.roofs(frame, "float64") is None
    )
    ax = next(
        ax
        for ax in plot.roofline(frame, MACHINE).axes
        if ax.get_title().startswith("wgrad float32")
    )
    lines = {line.get_label(): line.get_xydata() for line in ax.lines}
    roof = lines[next(label for label in lines if label.startswith("measured roof"))]
    np.testing.assert_allclose(
        roof[:, 1],
        np.minimum(roof[:, 0] * copy["gb_s"] * 1e9, product["tflops_dense"] * 1e12) / 1e12,
    )
    rows = frame[
        (frame["pass"] == "wgrad") & (frame["dtype"] == "float32") & (frame["provider"] == "cudnn")
    ]
    bytes_ = frame.groupby(["layer", "pass", "dtype"])["compulsory_bytes"].max()
    intensity = [
        2 * row["useful_macs"] / bytes_[row["layer"], "wgrad", "float32"]
        for row in rows.to_dict("records")
    ]
    np.testing.assert_allclose(lines["cudnn"], np.stack([intensity, rows["tflops_useful"]], 1))
    # no roof is invented
    assert plot.roofline(made_up(tmp_path, True, machine_rows=False), MACHINE) is None


def test_labels_are_geometries(tmp_path):
    """A row says what is convolved before whose layer that is; without sizes it has its name."""
    frame = made_up(tmp_path, True)
    row = frame["layer"] == "d8"
    for name, size in dict(h=60, w=30, k=256, r=3, s=3, stride=2).items():
        frame.loc[row, name] = size
    frame.loc[row, "extra_mib"] += 300  # what needs most is drawn
    assert set(results.geometry(frame[row])) == {"n2 c64 60x30 k256 3x3 s2 d8"}
    assert set(results.geometry(frame[~row])) == {""}
    labels = [label.get_text() for label in plot.overview(frame, MACHINE).axes[0].get_yticklabels()]
    assert "n2 c64 60x30 k256 3x3 s2 d8 | classic" in labels and "d1 | classic" in labels
    bars = [label.get_text() for label in plot.memory(frame, MACHINE).axes[0].get_yticklabels()]
    assert any(text.startswith("n2 c64 60x30 k256 3x3 s2 d8 classic") for text in bars)


def test_a_provider_keeps_its_colour(tmp_path):
    frame = made_up(tmp_path, True)
    colours = {}
    for draw in (plot.overview, plot.roofline, plot.dilation):
        for line in draw(frame, MACHINE).axes[0].lines:
            colours.setdefault(line.get_label(), set()).add(line.get_color())
    assert (
        all(len(colours[name]) == 1 for name in ("tridil", "cudnn", "another"))
        and len(set.union(*colours.values())) >= 4
    )


def test_many_layers_are_drawn_by_model(tmp_path):
    frame = made_up(tmp_path, False)
    many = pd.concat(
        [frame.assign(layer=frame["layer"] + str(i)) for i in range(12)], ignore_index=True
    )
    names = [text.get_text() for text in plot.overview(many, MACHINE).axes[0].get_yticklabels()]
    assert names == ["classic", "net <b>&\"'"]


def test_command_line(tmp_path):
    made_up(tmp_path, False)
    command = [
        sys.executable,
        str(PERF / "plot.py"),
        str(tmp_path / "results.csv"),
        "--out",
        str(tmp_path / "pictures"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        {Path(line).name for line in done.stdout.split()}
        == UNMEASURED
        == {path.name for path in (tmp_path / "pictures").iterdir()}
    )
    (tmp_path / "other.csv").write_text("model,layer\n1,2\n")
    (tmp_path / "text.csv").write_text("a\n1,2,3\n\x00")
    for name in ("absent.csv", "other.csv", "text.csv", "."):
        with pytest.raises(SystemExit) as e:
            plot.main([str(tmp_path / name)])
        assert e.value.code == 2


def written(folder, measured=True):
    frame = made_up(folder, measured)
    return frame, page.write(
        frame, folder, MACHINE, ["a <note>"], plot.write(frame, folder, MACHINE)
    )


@pytest.mark.slow
@pytest.mark.parametrize("measured", [True, False])
def test_page_holds_everything_and_asks_for_nothing(tmp_path, measured):
    frame, path = written(tmp_path, measured)
    text = path.read_text(encoding="utf-8")
    assert path.name == "report.html" and text.count("<tr") == 1 + len(frame)
    assert text.count("data:image/png;base64,") == len(MEASURED if measured else UNMEASURED)
    assert (
        "Made Up &lt;9000&gt;" in text
        and "a &lt;note&gt;" in text
        and "net &lt;b&gt;&amp;&quot;&#x27; b" in text
        and "<b>" not in text
    )
    assert not re.search(
        r"""(src|href)\s*=\s*["'](?!data:)|https?://|@import|url\(""",
        re.sub(r"base64,[^\"]*", "", text),
    )
    head = re.search(r"<thead>(.*)</thead>", text, re.DOTALL)[1]
    assert re.findall(r"<button[^>]*>(.*?)</button>", head, re.DOTALL) == [
        "geometry",
        "layer",
        *results.table(frame),
        "problem",
    ]


@pytest.mark.slow
def test_page_in_a_browser(tmp_path, monkeypatch):
    webdriver = pytest.importorskip("selenium.webdriver")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    browser, driver_path = (
        next(filter(None, map(shutil.which, names)), None),
        shutil.which("chromedriver"),
    )
    if not (browser and driver_path):
        pytest.skip("no Chromium with a chromedriver here")
    # nothing is to be downloaded
    monkeypatch.setenv("SE_OFFLINE", "true")
    frame, path = written(tmp_path)
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(driver_path))
    try:
        driver.get(path.as_uri())
        assert driver.execute_script(
            "return [...document.images].every(image => image.complete && image.naturalWidth > 300)"
        )
        heads = driver.find_elements("css selector", "th")
        names = [head.text for head in heads]

        def column(name):
            script = "return [...document.querySelectorAll('tbody tr')].filter(r => !r.hidden).map(r => r.cells[arguments[0]].textContent)"
            return driver.execute_script(script, names.index(name))

        def click(name):
            heads[names.index(name)].find_element("tag name", "button").click()
            return heads[names.index(name)].get_attribute("aria-sort"), column(name)

        before = column("ms\nmeasured")
        assert len(before) == len(frame) and [float(ms) for ms in before] != sorted(
            map(float, before)
        )
        order, found = click("ms\nmeasured")
        # as numbers, not as text
        assert order == "ascending" and found == sorted(before, key=float) != sorted(before)
        order, found = click("ms\nmeasured")
        assert order == "descending" and found == sorted(before, key=float, reverse=True)
        cells = column("x cuDNN\nmeasured")
        numbers = sorted((cell for cell in cells if cell), key=float)
        order, found = click("x cuDNN\nmeasured")
        assert (
            order == "ascending"
            and found == numbers + [""] * (len(cells) - len(numbers))
            and "" in found
        )
        assert driver.execute_script("return document.querySelectorAll('[aria-sort]').length") == 1
        assert click("provider")[1] == sorted(frame["provider"])
        box = driver.find_element("css selector", "input")
        box.send_keys("CUDNN wgrad")
        assert (
            len(column("pass")) == 12
            and set(column("provider")) == {"cudnn"}
            and set(column("pass")) == {"wgrad"}
        )
        assert driver.find_element("css selector", "output").text == f"12 of {len(frame)} rows"
        assert (
            sum(row.is_displayed() for row in driver.find_elements("css selector", "tbody tr"))
            == 12
        )
        box.send_keys(" no such row")
        assert column("pass") == []
        box.clear()
        box.send_keys(" ")
        assert len(column("pass")) == len(frame)
        assert driver.get_log("browser") == []
    finally:
        driver.quit()
