"""The report, from a result made by hand: rows, the sentence, the terminal, the page."""

import base64
import builtins
import hashlib
import io
import json
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tinier.measure.latency import Latency
from tinier.measure.memory import Memory
from tinier.measure.parity import Parity, ParityRow
from tinier.measure.quality import Quality
from tinier.report import terminal, words
from tinier.report.chart import _ticks, chart
from tinier.report.html import html
from tinier.report.rows import rows, summary
from tinier.report.terminal import Bars, show
from tinier.search.candidate import Candidate, Limits, Result, Variant
from tinier.search.certificate import Certificate
from tinier.targets.base import Artifact

CHROMIUM = "/usr/bin/chromium"
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"


def latency(ms: float) -> Latency:
    return Latency(ms, ms * 0.97, ms * 1.04, ms * 1.4, 900, 2, (ms,) * 5)


def candidate(
    target: str, ms: float, size: int, quality: float | None = None, **other: Any
) -> Candidate:
    variant = other.pop("variant", Variant())
    made = Candidate(variant, target, **other)
    made.artifact = Artifact(target, (Path("model.onnx"),), size)
    made.latency = latency(ms)
    if quality is not None:
        made.quality = Quality(quality, None, None)
        made.loss = 0.9312 - quality
    return made


def result(**facts: Any) -> Result:
    """Like the demo's: a float network on three runtimes, one candidate taken, some kept, some dropped."""
    half, quarter = Variant(0.5, "minmax"), Variant(0.25, "mse")
    best = candidate("onnxruntime", 0.42, 139_000, 0.9286, variant=half, recovered=True)
    best.status, best.reason = "taken", "the fastest of those certified inside the limits"
    best.memory = Memory(61_000_000, 52_000_000)
    best.parity = Parity((ParityRow(1, "logits", 0.01, 0.0021), ParityRow(16, "logits")), True, "")
    best.certified = Quality(0.9279, None, None)
    best.certificate = Certificate(0.01, True, 0.00564, 0.05, 7000, 0.0026, 41, 23, None)
    torch = candidate("torch", 3.49, 1_098_000, original=True)
    fastest = candidate("openvino", 0.88, 1_102_000, 0.9312, original=True)
    slower = candidate("onnxruntime", 1.21, 1_095_000, original=True)
    for one in (torch, fastest, slower):
        one.memory = Memory(210_000_000, 190_000_000)
    for one, ratio in ((torch, "4.0"), (slower, "1.4")):
        one.drop(f"the same network is {ratio}× as fast on openvino")
    bad = candidate("onnxruntime", 0.24, 74_000, 0.7411, variant=quarter)
    bad.drop("19.01 points worse on the first 500 examples")
    int8 = candidate("onnxruntime", 0.71, 283_000, 0.9309, variant=Variant(ranges="minmax"))
    mse = candidate("onnxruntime", 0.71, 283_000, 0.9311, variant=Variant(ranges="mse"))
    small = candidate("openvino", 0.31, 78_000, 0.9168, variant=quarter, recovered=True)
    small.reason = "a loss of at most 1 point cannot be certified: measured 1.44 points on 7,000 unseen examples"
    slow = candidate("torch", 2.9, 700_000, variant=Variant(0.75))
    slow.drop("neither faster nor smaller than the original on openvino (2.9 against 0.88 ms)")
    refused = Candidate(half, "torch")
    refused.drop("torch takes float networks only")
    table = [torch, fastest, slower, best, int8, mse, small, bad, slow, refused]
    everything = {
        "model": "resnet20",
        "metric": "accuracy",
        "higher_is_better": True,
        "points": True,
        "data": "fashion-mnist-test.npz",
        "search_examples": 3000,
        "certify_examples": 7000,
        "train_examples": 6000,
        "batch": 1,
        "threads": 2,
        "seed": 0,
        "delta": 0.05,
        "seconds": 171.3,
        "budget": 180.0,
        "machine": "Some CPU, 2 cores, avx2",
        "runtimes": {"onnxruntime": "1.23.2", "openvino": "2025.3", "torch": "2.13.0"},
        "versions": {"tinier": "0.1.0", "python": "3.11.2"},
        "original_bytes": 1_081_000,
        "files": {"model.onnx": "ab" * 32},
        "usage": "import numpy as np, onnxruntime\n"
        'session = onnxruntime.InferenceSession("model.onnx")\n'
        'print(session.run(None, {"x": np.ones((1, 1, 28, 28), dtype="float32")}))',
    }
    return Result(table, best, True, best.reason, Limits(0.01), everything | facts)


def empty(reason: str = "nothing was measured before the run ended") -> Result:
    return Result([], None, False, reason, Limits(), {})


# Rows and the sentence


def test_rows_are_json_and_have_the_figures() -> None:
    made = result()
    found = json.loads(json.dumps(rows(made), allow_nan=False))
    assert len(found) == len(made.table)
    row = found[3]
    assert row["taken"] and row["front"] and row["name"].endswith("recovered")
    assert row["latency_ms"] == 0.42 and row["latency_p95_ms"] == pytest.approx(0.588)
    assert row["size_bytes"] == 139_000 and row["peak_memory_bytes"] == 61_000_000
    assert row["faster_than_torch"] == pytest.approx(3.49 / 0.42)
    assert row["smaller_than_torch"] == pytest.approx(1098 / 139)
    # The fastest runtime of the float network here is openvino.
    assert row["faster_than_original"] == pytest.approx(0.88 / 0.42)
    assert row["parity"] == "agrees, within 0.21 % of the range"
    assert row["certificate"]["harmful"] == 41 and row["certified_quality"] == 0.9279
    refused = found[-1]
    assert refused["latency_ms"] is None and refused["reason"] == "torch takes float networks only"


def test_the_sentence() -> None:
    assert summary(result()) == (
        "pruned, 50 % fewer MACs, int8 (min-max ranges), recovered, on onnxruntime: 8.3× faster and 7.9× smaller "
        "than the float model in torch, at most 0.57 points worse with 95 % confidence (7,000 examples)."
    )


def test_the_sentence_without_torch_certificate_or_answer() -> None:
    made = result(points=False, metric="perplexity", higher_is_better=False)
    made.table = [c for c in made.table if c.target != "torch"]
    assert made.best is not None
    made.best.certificate = None
    assert summary(made).endswith(
        "2.1× faster and 7.9× smaller than the original on openvino, 0.0026 worse as measured on 3,000 examples, not certified."
    )
    made.met, made.reason = False, "0.42 ms, 0.3 ms allowed"
    assert summary(made).startswith(
        "The limits are not kept: 0.42 ms, 0.3 ms allowed. The nearest: "
    )
    assert "nothing was measured" in summary(empty())


@pytest.mark.parametrize(
    ("loss", "said"),
    [(0.00564, "0.57 points"), (0.0100, "1 point"), (0.01000001, "1.01 points"), (0.0, "0 points")],
)
def test_a_bound_is_rounded_towards_more_loss(loss: float, said: str) -> None:
    assert words.points(loss, {"points": True}, up=True) == said


def test_a_bound_in_plain_numbers_is_rounded_up_too() -> None:
    assert words.points(0.0012341, {}, up=True) == "0.00124"
    assert words.points(-0.0012341, {}, up=True) == "-0.00123"
    assert words.points(0.5, {}, up=True) == "0.5"


def test_ticks_are_round_and_inside() -> None:
    assert _ticks(0.19, 4) == [0.2, 0.5, 1, 2]
    assert _ticks(0.5, 5000) == [1, 10, 100, 1000]
    assert all(1.1 <= tick <= 1.4 for tick in _ticks(1.1, 1.4)) and len(_ticks(1.1, 1.4)) == 3


def test_words() -> None:
    assert words.plain(0.4123) == "0.412" and words.plain(1234.5) == "1,234"
    assert [words.size(n) for n in (17, 1_098_000, 999_600, None)] == [
        "17 B", "1.10 MB", "1.00 MB", "–",
    ]  # fmt: skip
    assert words.compared(0.5, "faster", "slower") == "2.0× slower"
    assert words.compared(1.01, "faster", "slower") == "no faster"
    assert words.clean("a\x1b[31m\nb") == "a [31m b"


# The terminal


def printed(made: Result, width: int, **how: Any) -> str:
    console = Console(file=io.StringIO(), width=width, **how)
    show(made, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [60, 80, 120, 160])
def test_the_table_fits_and_has_everything(width: int) -> None:
    text = printed(result(), width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "\x1b" not in text
    joined = " ".join(text.split())
    for part in ("0.420", "139 kB", "92.86 %", "onnxruntime", "95 % confidence", "▸"):
        assert part in joined
    # Reasons are in a column or in a list, whole words either way.
    assert all(word in joined for word in ("float", "networks", "cannot", "certified"))


def test_colours_only_in_a_terminal() -> None:
    assert "\x1b[" in printed(result(), 120, force_terminal=True, color_system="standard")
    assert "\x1b" not in printed(result(model="\x1b[31mred"), 120)


def test_the_terminal_without_an_answer() -> None:
    assert "No answer" in printed(empty(), 80)


def test_names_are_no_markup() -> None:
    made = result()
    made.table[-1].drop("[bold]refused[/nothing]")
    assert "[bold]refused[/nothing]" in " ".join(printed(made, 200).split())


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_progress_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(terminal.time, "monotonic", clock)
    console = Console(file=io.StringIO(), width=40)
    bars = Bars(console)
    with bars.task("short", 3) as step:
        step.add()
    with bars.task("long", 3) as step:
        with bars.task("inside [it]"):
            clock.now += 2.5
        clock.now += 5
        step(3)
    bars.say("said " * 20)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines == ["inside [it]: 2 s", "long: 8 s", ("said " * 20)]


def test_progress_in_a_terminal() -> None:
    clock = Clock()
    console = Console(
        file=io.StringIO(), width=100, force_terminal=True, color_system=None, get_time=clock
    )
    bars = Bars(console)
    task = bars.start("training", 100)
    drawing = bars._drawing
    assert drawing is not None

    def drawn() -> str:
        assert drawing is not None
        with console.capture() as capture:
            console.print(drawing.make_tasks_table(drawing.tasks))
        return capture.get()

    bars.advance(task, 1)
    assert "training" not in drawn()
    for second in (1, 2, 3, 4):
        clock.now = second
        bars.advance(task, 10 * second)
    assert re.search(r"training .* 40 % 0:00:04 0:0[67] left", drawn())
    bars.stop(task)
    assert bars._drawing is None
    bars.stop(task)  # a second end is no error
    with bars:
        bars.start("cut short", None)
    assert bars._drawing is None


# The page


class Page(HTMLParser):
    """Every tag, every attribute, and the text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text.append(data)


@pytest.fixture(scope="module")
def page() -> str:
    return html(result())


def test_the_page_refers_to_nothing(page: str) -> None:
    for tag, attributes in Page(page).tags:
        assert tag not in ("link", "img", "iframe", "base", "object", "embed"), tag
        assert not {"src", "href", "action", "onerror", "onclick", "style"} & set(attributes), tag
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    assert style is not None and not re.search(r"@import|url\(", style[1])
    assert "default-src 'none'" in page


def test_the_policy_names_every_script(page: str) -> None:
    parsed = Page(page)
    policy = next(a["content"] or "" for t, a in parsed.tags if "http-equiv" in a)
    kinds = [a.get("type") for t, a in parsed.tags if t == "script"]
    assert "unsafe-eval" not in policy and kinds.count(None) == 2
    for script, kind in zip(parsed.scripts, kinds, strict=True):
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert (f"'sha256-{digest}'" in policy) == (kind is None)


def test_the_page_has_everything(page: str) -> None:
    text = " ".join(" ".join(Page(page).text).split())
    for row in rows(result()):
        for key in ("name", "runtime", "reason"):
            assert row[key] in text, row[key]
    for part in (
        "8.3× faster and 7.9× smaller, at most 0.57 points worse",
        "41 are answered worse",
        "23 are better",
        "δ = 0.05",
        "session.run(None",
        "Some CPU, 2 cores, avx2",
        "ab" * 32,
        "2 min 51 s",
        "at most 1 point worse",
    ):
        assert part in text, part


def test_strings_are_escaped() -> None:
    made = result(model=EVIL, metric=EVIL, data=EVIL, machine=EVIL, usage=EVIL, more={EVIL: [EVIL]})
    made.reason = EVIL
    for one in made.table:
        one.target, one.reason = EVIL + one.target, EVIL
    parsed = Page(html(made))
    assert [tag for tag, _ in parsed.tags].count("script") == 3
    assert not any(tag == "img" for tag, _ in parsed.tags)
    assert EVIL in "".join(parsed.text)


def test_odd_results_have_a_page_too() -> None:
    for made in (empty(EVIL), result()):
        made.met = False
        made.facts = {}
        for one in made.table:
            one.certificate = None
        assert "http-equiv" in html(made) and "<script>alert" not in html(made)
    lower = result(higher_is_better=False, points=False, metric="loss")
    assert "lower is better" in html(lower)
    same = result()
    same.best = same.table[1]
    assert "the original, on openvino" in summary(same) and html(same)


def test_without_altair_all_but_the_chart(monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = builtins.__import__

    def missing(name: str, *rest: Any, **others: Any) -> Any:
        if name == "altair":
            raise ImportError(name)
        return genuine(name, *rest, **others)

    monkeypatch.setattr(builtins, "__import__", missing)
    text = html(result())
    assert "pip install 'tinier[report]'" in text and "<script" not in text
    assert "script-src 'none'" in text and "Everything that was tried" in text


def browse(page: Path, folder: Path) -> tuple[str, str]:
    """The page as headless Chromium has it after eight seconds of its own time, and what its console said."""
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            "--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}",
            "--enable-logging=stderr", "--v=0", "--virtual-time-budget=8000", "--dump-dom", page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )  # fmt: skip
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


in_browser = pytest.mark.skipif(
    not Path(CHROMIUM).exists(), reason=f"{CHROMIUM} is not installed: apt-get install chromium"
)


@in_browser
@pytest.mark.parametrize("evil", [False, True])
def test_a_browser_draws_it_without_errors(page: str, evil: bool, tmp_path: Path) -> None:
    if evil:
        made = result(model=EVIL, metric=EVIL)
        for one in made.table:
            one.target, one.reason = EVIL + one.target, EVIL
        page = html(made)
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    document, console = browse(tmp_path / "report.html", tmp_path)
    assert not console
    assert 'data-drawn="yes"' in document
    drawn = document.partition('id="chart"')[2].partition("</figure>")[0]
    # Every candidate with quality and latency, and the label.
    assert drawn.count('aria-roledescription="') >= 8
    assert "taken" in drawn


@in_browser
def test_a_phone_needs_no_sideways_scrolling(tmp_path: Path) -> None:
    made = result(model="m" * 90, data="/very/long/" + "x" * 200)
    (tmp_path / "report.html").write_text(html(made), encoding="utf-8")
    (tmp_path / "phone.html").write_text(
        '<iframe src="report.html" width="375" height="800"></iframe><script>setTimeout(() => {'
        "const page = document.querySelector('iframe').contentDocument.documentElement;"
        "document.title = page.scrollWidth + ' of ' + page.clientWidth;}, 4000)</script>"
    )
    document, _ = browse(tmp_path / "phone.html", tmp_path)
    found = re.search(r"<title>(\d+) of (\d+)</title>", document)
    assert found is not None and 300 < int(found[1]) <= int(found[2]) <= 375


def test_the_drawn_line_never_goes_back() -> None:
    drawing = chart(result())
    assert drawing is not None
    drawn = [p for p in _data(drawing.specification) if p["kind"] != "dropped"]
    line = sorted((p for p in drawn if p["edge"]), key=lambda p: p["latency"])
    assert len(line) > 1
    assert [p["quality"] for p in line] == sorted(p["quality"] for p in line)
    for point in drawn:
        beaten = any(
            p["latency"] <= point["latency"] and p["quality"] >= point["quality"]
            for p in drawn
            if p is not point
        )
        assert point["edge"] != beaten, point["name"]


def _data(specification: dict[str, Any]) -> list[dict[str, Any]]:
    layer = next(one for one in specification["layer"] if "datum.edge" in str(one.get("transform")))
    return list((layer.get("data") or specification["data"])["values"])
