"""The report: it holds what the run found, stands alone, survives what is missing, and never trusts a name."""

import html.parser
import io
import json
import math
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import ImageFont
from rich.console import Console

from sgw_jax.evaluation.metrics import relative_gain
from sgw_jax.pictures import charts
from sgw_jax.report import page as report
from sgw_jax.report.interaction import IMAGES_WITH_MAPS
from sgw_jax.report.page import write_report
from sgw_jax.report.record import Results, ResultsError, read_results
from sgw_jax.report.tables import all_metrics, number, print_table

SLOTS = 4
NAMES = ["semseg", "depth", "mine"]
SECTIONS = {"results", "classes", "training", "examples", "interaction", "run"}
VOID = {"wbr", "meta", "link", "img", "col", "line", "circle", "polyline"}


def task(name, metric, unit, higher):
    return {
        "name": name,
        "metric": metric,
        "unit": unit,
        "higher_is_better": higher,
        "units": {metric: unit},
        "directions": {metric: higher},
    }


def make_record():
    """What results.json holds of a finished run of three tasks, one of them someone's own."""
    shares = np.full((SLOTS, 3), 1 / 3).tolist()
    ablated = {"semseg": {"miou": 30.0}, "depth": {"rmse": 0.84}, "mine": {"score": 0.5}}
    losses = dict.fromkeys(NAMES, 1.0)
    return {
        "name": "kem",
        "step": 1200,
        "checkpoint": "best",
        "protocol": "exact",
        "split": "test",
        "tasks": [
            task("semseg", "miou", "%", True),
            task("depth", "rmse", "m", False),
            task("mine", "score", "", True),
        ],
        "metrics": {"semseg": {"miou": 40.0, "pixel_accuracy": 81.25}, "depth": {"rmse": 0.42}, "mine": {"score": 0.5}},
        "losses": losses,
        "per_class": {"semseg": {"wall": 91.17, "chair": 12.0, "sofa": math.nan}},
        "references": {
            "constant": {
                "semseg": {"miou": 4.0, "pixel_accuracy": 20.0},
                "depth": {"rmse": 1.2},
                "mine": {"score": 0.0},
            },
            "linear": {"semseg": {"miou": 8.0, "pixel_accuracy": 30.0}, "depth": {"rmse": 0.8}, "mine": {"score": 0.6}},
        },
        "delta_m": {"constant": 512.5, "linear": 143.6},
        "diagnostics": {
            "tasks": NAMES,
            "images": 256,
            "slot_diversity": 0.913,
            "retrieve_entropy": 0.994,
            "write_entropy": 0.52,
            "selection_stability": 0.8,
            "update_ratio": 0.31,
            "readout_cosine": None,
            "selection_between_images": 0.4,
            "task_gates": dict(zip(NAMES, (-0.1754, 0.0, 0.2), strict=True)),
            "reads": shares,
            "writes": np.full((3, SLOTS), 1 / SLOTS).tolist(),
            "flow": [[0.7, 0.2, 0.1], [0.25, 0.5, 0.25], [0.1, 0.1, 0.8]],
            "pair_gates": [[0.31, -0.2, 0.0], [0.0, 0.12, 0.0], [0.05, 0.0, -0.4]],
            "ablations": {
                "zeroed": {"metrics": ablated, "losses": losses},
                "swapped": {"metrics": ablated, "losses": losses},
            },
        },
        "speed": {"images_per_second": 151.3, "seconds": 341.0},
        "parameters": {"total": 1_234_567, "backbone": 1_000_000, "interaction": 234_567},
        "environment": {"python": "3.12.1", "devices": "2 x cpu", "mesh": "data 2, fsdp 1"},
        "config": {"steps": 1200, "optimizer.name": "adamw"},
        "identity": {"steps": 1200, "data.train.version": "scenes 1"},
    }


def make_results(**changed):
    return Results.from_dict({**make_record(), **changed})


def make_history(steps=50):
    train = [
        {"step": s, "split": "train", "loss": 10 / s, "loss/depth": 1 / s, "grad_norm": 1.0, "learning_rate": 1e-3}
        for s in range(1, steps + 1)
    ]
    return [*train, {"step": steps, "split": "validation", "loss": 0.4, "loss/depth": 0.05, "depth/rmse": 0.5}]


def make_examples(count=2, size=(24, 32), slots=2):
    rng = np.random.default_rng(0)

    def pictures():
        return rng.integers(0, 256, (count, *size, 3), dtype=np.uint8)

    maps = {name: rng.uniform(size=(count, slots, 3, 4)) / (36 * slots) for name in NAMES}
    legends = {"semseg": [("wall", (255, 0, 128))], "depth": [("1 m", (0, 0, 0)), ("5 m", (9, 9, 9))], "mine": []}
    return {
        "image": pictures(),
        "tasks": {
            n: {"pictures": {"truth": pictures(), "prediction": pictures()}, "legend": legends[n]} for n in NAMES
        },
        "retrieve": {"slots": [3, 0], "maps": maps},
    }


class Page(html.parser.HTMLParser):
    """What a browser would see: sections, text, images, links; fails on tags that do not nest."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.sections, self.words, self.images, self.links, self.open = set(), [], [], [], []
        self.labels = set()
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.sections.add(attributes["id"])
        if tag == "img":
            self.images.append(attributes)
        self.labels |= {value for name, value in attrs if name == "data-label"}
        self.links += [value for name, value in attrs if name in ("href", "src", "action", "data", "poster", "srcset")]
        assert not any(name.startswith("on") for name in attributes)
        assert tag not in ("script", "iframe", "object", "embed")

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


def written(tmp_path, results=None, examples=None, history=()):
    path = tmp_path / "report.html"
    write_report(path, make_results() if results is None else results, examples, history)
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]  # no temporary file is left
    return path.read_text(encoding="utf-8")


def test_the_page_holds_every_part_of_the_run(tmp_path):
    page = Page(written(tmp_path, examples=make_examples(), history=make_history()))
    assert page.sections == SECTIONS
    shown = (
        ("headline", "40.00", "0.420", "+400.0 %", "+47.5 %", "-16.7 %", "+143.6 %", "256 images", "step 1,200"),
        ("all metrics", "pixel_accuracy", "81.25", "loss 1.000"),
        ("classes", "wall", "91.2"),
        ("diagnostics", "Slot diversity", "0.913", "0.994", "look closer", "read-out zeroed", "-25.0 %", "-100.0 %"),
        ("gates", "Gate of semseg", "-0.175", "0.000"),
        ("heat maps", "70", "33"),
        ("maps", "slot 3", "slot 0"),
        ("run", "1,234,567", "3.12.1", "optimizer.name", "adamw", "data.train.version", "151.3", "6 min"),
    )
    for part, *texts in shown:
        for text in texts:
            assert text in page.text, f"{part}: {text}"


def test_it_stands_alone(tmp_path):
    source = written(tmp_path, examples=make_examples(), history=make_history())
    page = Page(source)
    assert all(link.startswith(("#", "data:")) for link in page.links)
    style = re.search(r"<style>(.*?)</style>", source, re.DOTALL).group(1)
    assert "url(" not in style
    assert "@import" not in style


def test_every_picture_says_what_it_is(tmp_path):
    page = Page(written(tmp_path, examples=make_examples()))
    # 2 images, with truth and prediction of 3 tasks; and for both images 2 slots x 3 tasks and the image again
    assert len(page.images) == 2 * (1 + 2 * 3) + 2 * (1 + 2 * 3)
    alts = [image["alt"] for image in page.images]
    assert "depth of image 2, prediction" in alts
    assert "where slot 3 reads the tokens of mine in image 1" in alts


def test_what_a_run_does_not_have_is_left_out(tmp_path):
    assert Page(written(tmp_path, make_results(per_class={}, diagnostics=None, speed={}))).sections == {
        "results",
        "run",
    }
    without = make_results(diagnostics=None)
    assert Page(written(tmp_path, without, {**make_examples(), "retrieve": None})).sections == {
        "results", "classes", "examples", "run"
    }  # fmt: skip


def test_records_of_earlier_releases_tell_no_directions(tmp_path):
    record = make_record()
    for described in record["tasks"]:
        del described["directions"]
    results = Results.from_dict(record)
    assert all(described.directions == {} for described in results.tasks)
    rows = [row for table in all_metrics(results)["tables"] for row in table["rows"]]
    assert {row["arrow"] for row in rows} == {""}


def test_every_metric_shows_its_unit_and_which_way_is_better():
    """A metric whose direction is not known shows none."""
    tables = all_metrics(make_results())["tables"]
    shown = {
        (t["task"], row["name"]): (row["unit"], row["arrow"], row["direction"]) for t in tables for row in t["rows"]
    }
    assert shown == {
        ("semseg", "miou"): ("%", "↑", "higher is better"),
        ("semseg", "pixel_accuracy"): ("", "", ""),
        ("depth", "rmse"): ("m", "↓", "lower is better"),
        ("mine", "score"): ("", "↑", "higher is better"),
    }


@pytest.mark.parametrize("without", [{}, {"diagnostics": None}, {"speed": {}}], ids=str)
def test_the_record_comes_back_as_it_was_written(tmp_path, without):
    results = make_results(**without)
    text = json.dumps(results.to_dict(), allow_nan=False)
    record = {**make_record(), **without, "per_class": {"semseg": {"wall": 91.17, "chair": 12.0, "sofa": None}}}
    assert json.loads(text) == record
    (tmp_path / "results.json").write_text(text, encoding="utf-8")
    again = read_results(tmp_path / "results.json")
    assert again.to_dict() == record
    assert math.isnan(again.per_class["semseg"]["sofa"])


def test_a_record_of_before_there_were_gates_of_pairs():
    record = make_record()
    del record["diagnostics"]["pair_gates"]
    assert Results.from_dict(record).diagnostics.pair_gates == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda record: record.pop("metrics"), "missing: metrics"),
        (lambda record: record["diagnostics"].pop("flow"), "missing: diagnostics.flow"),
        (lambda record: record["tasks"][1].pop("units"), r"missing: tasks\.1\.units"),
        (lambda record: record.update(speed={"seconds": 1.0}), "missing: speed.images_per_second"),
        (lambda record: record.update(more=1), "unknown: more"),
        (lambda record: record.update(step=True), "step is True where int belongs"),
        (lambda record: record["metrics"]["depth"].update(rmse="0.4"), r"metrics\.depth\.rmse is '0.4' where float"),
        (lambda record: record.update(references=[]), r"references is \[\] where dict"),
    ],
)
def test_a_record_of_another_form_is_an_error_that_names_file_and_key(tmp_path, change, named):
    record = make_record()
    change(record)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ResultsError, match=rf"results\.json: {named}.* Remove the file"):
        read_results(path)
    for damage, found in ((b"{", "it is no JSON"), (b"\xff\xfe\0", "it is no JSON"), (b"[1]", "it holds a list")):
        path.write_bytes(damage)
        with pytest.raises(ResultsError, match=rf"results\.json is damaged: {found}.* Remove the file"):
            read_results(path)


def test_numbers_that_are_not_there_are_dashes(tmp_path):
    record = make_record()
    record["metrics"]["depth"]["rmse"] = math.nan
    record["references"]["linear"]["semseg"]["miou"] = None
    record["references"]["constant"]["depth"]["rmse"] = None
    record["delta_m"] = {"constant": None, "linear": math.nan}
    for name in ("slot_diversity", "update_ratio"):
        record["diagnostics"][name] = math.nan
    results = Results.from_dict(record)
    history = [*make_history(), {"step": 51, "split": "train", "loss": math.nan, "grad_norm": math.inf}]
    page = Page(written(tmp_path, results, make_examples(), history))
    assert page.sections == SECTIONS
    assert not re.search(r"\b(nan|None|inf)\b", page.text)
    assert report.MISSING in page.text
    print_table(Console(file=io.StringIO()), results)


def test_names_are_text_not_markup(tmp_path):
    evil = '<script>alert("x")</script>'
    record = make_record()
    record["name"] = record["environment"]["devices"] = record["config"]["steps"] = evil
    record["per_class"] = {evil: {evil: 1.0}}
    record["references"][evil], record["delta_m"][evil] = record["references"]["linear"], 1.0
    examples = make_examples()
    examples["tasks"][evil] = {**examples["tasks"]["mine"], "legend": [(evil, (0, 0, 0))]}
    source = written(tmp_path, Results.from_dict(record), examples)
    assert evil in Page(source).text
    assert "<script" not in source


def test_large_pictures_shrink_until_the_page_fits(tmp_path):
    """Noise, which no compression helps."""
    source = written(tmp_path, examples=make_examples(count=4, size=(200, 300)))
    assert len(source) < 4_000_000
    assert len(Page(source).images) == 4 * (1 + 2 * 3) + IMAGES_WITH_MAPS * (1 + 2 * 3)


def test_an_ordinary_run_with_long_history_is_small(tmp_path):
    assert len(written(tmp_path, history=make_history(20_000))) < 150_000


@pytest.mark.parametrize(
    "values", [[3.0], [2.0, 2.0], [0.0, 0.0], [-1.0, 5.0], [1e-9, 1e9], [1.0, 1e300], [5.0, 5.0 + 1e-9]], ids=str
)
def test_any_curve_has_its_points_inside_the_frame(values):
    history = [{"step": i + 1, "split": "train", "loss": value} for i, value in enumerate(values)]
    (chart,) = report.page_of(make_results(), None, history)["curves"]
    assert len(chart["train"]) == len(values)
    for x, y in chart["train"]:
        assert 0 <= x <= chart["width"]
        assert 0 <= y <= chart["height"]
    assert len(chart["x_ticks"]) <= 8
    assert len(chart["y_ticks"]) <= 24


@pytest.mark.parametrize("steps", [1, 3, 1000, 1024, 40_000, 80_000, 123_456, 1_000_000, 30_000_000])
@pytest.mark.parametrize("value", [-1.2345e-4, 1.25e-4, 0.0123, 7.0, 98765.0, 3e-12, 1e30])
def test_every_label_of_a_chart_lies_inside_its_drawing_and_beside_its_neighbours(steps, value):
    """By the widths of DejaVu Sans, wider than the fonts of the page, at the 10.5 pixels that it asks for."""
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 10.5)
    history = [{"step": s, "split": "train", "loss": value * (1 + s / steps)} for s in (1, steps)]
    (chart,) = report.page_of(make_results(), None, history)["curves"]
    for _, text in chart["y_ticks"]:
        assert font.getlength(text) <= chart["left"] - 6
    assert len({text for _, text, _ in chart["x_ticks"]}) == len(chart["x_ticks"]) >= 2
    end = 0.0
    for x, text, anchor in chart["x_ticks"]:
        width = font.getlength(text)
        start = x - width * {"start": 0, "middle": 0.5, "end": 1}[anchor]
        assert end <= start
        end = start + width
        assert end <= chart["width"]


def test_the_last_step_of_an_averaged_curve_has_its_tick():
    """The last interval's mean lies before the last step."""
    (chart,) = report.page_of(make_results(), None, make_history(1000)[:-1])["curves"][:1]
    assert chart["x_ticks"][-1] == (chart["width"] - chart["right"], "1,000", "end")


def test_on_a_phone_every_cell_of_a_wide_table_says_what_it_is(tmp_path):
    """There the columns' heads are gone: rows are blocks, and truth and prediction stand side by side."""
    page = Page(written(tmp_path, examples=make_examples()))
    assert {"network", "linear probe", "constant", "vs linear probe", "vs constant"} <= page.labels
    assert {label for name in NAMES for label in (f"{name}, truth", "prediction", name)} <= page.labels
    assert {"healthy", "read-out zeroed"} <= page.labels


def test_a_long_curve_is_averaged_and_a_short_one_is_not():
    history = [{"step": s, "split": "train", "loss": float(s % 2)} for s in range(1, 3201)]
    (chart,) = report.page_of(make_results(), None, history)["curves"]
    assert len(chart["train"]) == charts.CURVE_POINTS
    heights = {y for _, y in chart["train"]}
    assert len(heights) == 1  # every interval of 20 steps holds as many zeros as ones


def test_gains_have_the_sign_of_better():
    assert relative_gain(3.0, 2.0, True) == 50.0
    assert relative_gain(3.0, 2.0, False) == -50.0
    assert math.isnan(relative_gain(3.0, 0.0, True))
    assert math.isnan(relative_gain(math.nan, 2.0, True))
    assert math.isnan(relative_gain(1.0, math.nan, True))


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (41.234, "%", "41.23"),
        (0.4567, "m", "0.457"),
        (12.3456, "deg", "12.35"),
        (0.0, "%", "0.00"),
        (0.00004, "", "4.0e-05"),
        (math.nan, "%", report.MISSING),
        (-math.inf, "", report.MISSING),
    ],
)
def test_numbers_are_rounded_by_their_unit(value, unit, text):
    assert number(value, unit) == text


def test_the_terminal_shows_the_headline_in_80_columns():
    stream = io.StringIO()
    print_table(Console(file=stream, width=80), make_results())
    shown = stream.getvalue()
    for text in ("semseg", "miou % ↑", "rmse m ↓", "linear", "constant", "40.00", "+400.0 %", "mean gain", "+143.6 %"):
        assert text in shown
    assert shown.index("linear") < shown.index("constant")
    assert len([line for line in shown.splitlines() if line.strip()]) == 1 + 2 + 1 + 3 + 1  # nothing wraps


def test_a_name_in_brackets_is_printed_as_it_is():
    text = json.dumps(make_record()).replace('"mine"', '"[red]mine[/red]"')
    stream = io.StringIO()
    print_table(Console(file=stream, width=120), Results.from_dict({**json.loads(text), "name": "[red]mine[/red]"}))
    assert stream.getvalue().count("[red]mine[/red]") == 2
