"""The page beside a quantized artifact: its figures are the record's, and names cannot break it."""

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import tinier
from tinier.cli.quantize import show
from tinier.report import words
from tinier.report.quantization import CAUSES, MOST, quantization_html
from tinier.verbs.delivery import PAGE, RECORD
from tinier.verbs.float_parts import integer_macs

IMAGES = torch.randn(24, 2, 8, 8, generator=torch.Generator().manual_seed(1))
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>'


class Page(HTMLParser):
    """Texts by class or tag, bars, and every tag with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        if data.strip() and self.tags:
            tag, attrs = self.tags[-1]
            self.texts.append((attrs.get("class", tag), data.strip()))

    def of(self, kind: str) -> list[str]:
        return [text for found, text in self.texts if found == kind]


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 16),
        nn.ReLU(),
        nn.Linear(16, 5),
    ).eval()


def facts(layers: list[dict[str, Any]], total: float = 1.0) -> dict[str, Any]:
    return {
        "name": "net",
        "artifacts": {},
        "weights": {"a.weight": 4},
        "activation_bits": {},
        "dynamic": 0,
        "macs": {"integer": 0, "all": 10},
        "float": [],
        "attribution": {"total": total, "examples": 8, "layers": layers},
        "notes": [],
    }


def layer(name: str, causes: tuple[float, ...], restored: float) -> dict[str, Any]:
    row = {"layer": name, "operator": "conv2d", "alone": sum(causes), "restored": restored}
    return row | dict(zip(CAUSES, causes, strict=True))


def bars(page: Page) -> list[list[tuple[str, float]]]:
    """For each bar its (class, width), of the whole width."""
    found: list[list[tuple[str, float]]] = []
    for tag, attrs in page.tags:
        if tag == "svg":
            found.append([])
        if tag == "rect" and "x" in attrs:
            found[-1].append((attrs["class"], float(attrs["width"]) / 1000))
    return [bar for bar in found if bar]


def test_the_figures_are_those_of_the_record(tmp_path: Path) -> None:
    smaller = tinier.quantize(cnn(), IMAGES[:2], IMAGES, bits=4, layers={"6": 8}, exclude=["4"])
    tinier.deliver(smaller, tmp_path / "out", data=IMAGES, attribution=True)
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    text = (tmp_path / "out" / PAGE).read_text(encoding="utf-8")
    assert text == quantization_html(record), "the page needs nothing but the record"
    page = Page(text)
    assert "1 weight at 4 bits, 1 at 8 bits" in page.of("lead")[0]
    artifact = record["artifacts"]["onnxruntime"]
    assert words.size((tmp_path / "out/model.onnx").stat().st_size) in " ".join(
        f"{number} {unit}"
        for number, unit in zip(page.of("figure")[:1], page.of("unit")[:1], strict=True)
    )
    before, packed = (words.size(artifact[key]) for key in ("float_bytes", "packed_bytes"))
    how = f"{before} of float tensors before; {packed} as tinier pack stores it"
    assert how in page.of("how")
    assert words.plain(record["attribution"]["total"]) in page.of("figure")
    said = [attrs["aria-label"] for tag, attrs in page.tags if "aria-label" in attrs]
    layers = record["attribution"]["layers"]
    assert len(said) == len(layers) > 2
    for label, row, share in zip(said, layers, page.of("share"), strict=True):
        figures = [float(number) for number in re.findall(r"[\d.]+", label)]
        assert figures == pytest.approx([row[cause] for cause in CAUSES], rel=5e-3, abs=1e-9)
        given_back = float(share.removesuffix(" %").replace("−", "-"))
        assert given_back == pytest.approx(
            100 * row["restored"] / record["attribution"]["total"], abs=0.051
        )
    batches = [row["batch"] for row in artifact["parity"]]
    assert [int(n) for n in page.of("number") if n.isdecimal()] == batches == [1, 16]
    notes = text[text.index("<h2>Notes") :]
    assert all(row[0] in notes.replace("<wbr>", "") for row in record["float"]) and record["float"]


def test_the_page_without_attribution_and_a_second_delivery(tmp_path: Path) -> None:
    smaller = tinier.quantize(cnn(), IMAGES[:2], activations=None, bits=4)
    for _ in range(2):  # the folder is ours: it may be written again
        tinier.deliver(smaller, tmp_path / "out")
    text = (tmp_path / "out" / PAGE).read_text(encoding="utf-8")
    assert "Which layer" not in text and "3 weights at 4 bits" in text
    assert "Activations stay float" in text and integer_macs(smaller)[0] == 0
    dynamic = tinier.quantize(cnn(), IMAGES[:2], activations="dynamic")
    tinier.deliver(dynamic, tmp_path / "out", data=IMAGES, attribution=True)
    text = (tmp_path / "out" / PAGE).read_text(encoding="utf-8")
    assert "2 activations at 8 bits, 2 in the range of each run" in text


def test_multiplications_in_integers_by_hand() -> None:
    convolution, hidden, last = 8 * 8 * 8 * 2 * 9, 8 * 16, 16 * 5
    whole = convolution + hidden + last
    every = tinier.quantize(cnn(), IMAGES[:2], IMAGES)
    assert integer_macs(every) == (whole, whole)
    part = tinier.quantize(cnn(), IMAGES[:2], IMAGES, exclude=["4"])
    assert integer_macs(part) == (convolution + last, whole)
    dynamic = tinier.quantize(cnn(), IMAGES[:2], activations="dynamic")
    assert integer_macs(dynamic) == (hidden + last, whole), "products alone"


def test_the_command_line_says_how_much_is_computed_in_integers(tmp_path: Path) -> None:
    part = tinier.quantize(cnn(), IMAGES[:2], IMAGES, exclude=["4"])
    done = tinier.deliver(part, tmp_path / "out", data=IMAGES)
    console = Console(file=io.StringIO(), width=200)
    show(part, done, console)
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue()
    # 9,216 of the convolution and 80 of the last layer; 128 of the hidden one are float.
    assert "MACs in integers: 98.6% (9,296 of 9,424)" in said


def test_bars_are_stacked_in_the_order_given_and_the_rest_is_one() -> None:
    rows = [layer("big", (4.0, 2.0, 1.0, 1.0), 0.5), layer("small", (0.0, 1.0, 0.0, 1.0), -0.25)]
    page = Page(quantization_html(facts(rows, 2.0)))
    kinds = [kind for _, kind in CAUSES.values()]
    first, second = bars(page)
    assert first == list(zip(kinds, (0.5, 0.25, 0.125, 0.125), strict=True))
    assert second == [(kinds[1], 0.125), (kinds[3], 0.125)]
    assert page.of("share") == ["25.0 %", "−12.5 %"]
    many = [layer(f"l{i}", (1.0, 0.0, 0.0, 0.0), 0.01) for i in range(MOST + 5)]
    page = Page(quantization_html(facts(many)))
    shares = page.of("share")
    assert len(shares) == MOST + 1 and shares[0] == "1.0 %" and shares[-1] == "5.0 %"
    assert "5 more layers together" in page.of("layer")
    assert bars(page)[-1] == [(kinds[0], 1.0)] and bars(page)[0] == [(kinds[0], 0.2)]
    nothing = quantization_html(facts([layer("a", (0.0, 0.0, 0.0, 0.0), 0.0)], 0.0))
    assert Page(nothing).of("share") == ["0.0 %"]


def test_names_cannot_break_the_page() -> None:
    found = facts([layer(HOSTILE, (1.0, 0.0, 0.0, 0.0), 1.0) | {"operator": HOSTILE}])
    found |= {"name": HOSTILE, "notes": [HOSTILE], "float": [[HOSTILE] * 3]}
    found |= {"weights": {HOSTILE: 4}, "activation_bits": {HOSTILE: 8}}
    row = {"batch": 1, "output": HOSTILE, "relative": 0.1, "steps": 1.0, "agreement": None}
    rows = [row | {"skipped": False}, row | {"skipped": True, "reason": HOSTILE}]
    found["artifacts"] = {HOSTILE: {"files": [], "bytes": 1, "float_bytes": 4, "parity": rows}}
    text = quantization_html(found)
    page = Page(text)
    assert not [tag for tag, _ in page.tags if tag in ("script", "img", "link", "iframe")]
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert text.count("&lt;script&gt;alert(1)") >= 12
    assert "default-src 'none'; script-src 'none'" in text
