"""The front: quality against latency, size as area, runtime as colour."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tinier.report import words
from tinier.report.rows import rows
from tinier.search.candidate import Result

HEIGHT = 380  # pixels
LARGEST = 900.0  # square pixels of the largest file's circle
# As in report.css; Vega measures texts with it.
FONT = (
    "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'Helvetica Neue', Arial, sans-serif"
)
COLOURS = 5  # --runtime-1 … in report.css
LADDERS = ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0))
TICKS = 4  # at least so many on the axis of latency
FAR = 1.6  # the scale ends so many times the greatest loss of interest below the original

Row = dict[str, Any]


@dataclass(frozen=True)
class Drawing:
    """A chart as a Vega-Lite specification, and what the page says beside it.

    Attributes:
        specification: JSON-able.
        script: JavaScript that has everything to draw it.
        runtimes: runtime → its colour as CSS, of those that are drawn.
        missing: how many candidates are not drawn, because quality or latency was not measured.
        outside: how many are drawn at the lower edge, because their quality is below the scale.
    """

    specification: dict[str, Any]
    script: str
    runtimes: dict[str, str]
    missing: int
    outside: int


def chart(result: Result) -> Drawing | None:
    """The chart of a result; None where no candidate has both quality and latency.

    Raises:
        ImportError: altair or vl-convert is not installed.

    Cost:
        About two seconds, most of it for the script, once a process.
    """
    import altair

    script = _script()
    found = rows(result)
    points = _points(found, result)
    if not points:
        return None
    window = _window(points, result)
    up = _up(result)
    for point in points:
        edge = window[0]
        point["outside"] = up * point["quality"] < up * edge
        point["y"] = edge if point["outside"] else point["quality"]
        radius = math.sqrt(point["area"] / math.pi) + 13
        point["label_y"] = point["y"] + radius * (window[1] - window[0]) / (HEIGHT - 40)
    tones = colours(found)
    drawn = {
        name: tone for name, tone in tones.items() if any(p["runtime"] == name for p in points)
    }
    return Drawing(
        specification=_specification(altair, points, drawn, window, result),
        script=script,
        runtimes=drawn,
        missing=len(found) - len(points),
        outside=sum(point["outside"] for point in points),
    )


def colours(found: Sequence[Row]) -> dict[str, str]:
    """Runtime → CSS colour, the same wherever runtimes are drawn."""
    names = sorted({row["runtime"] for row in found})
    return {name: f"var(--runtime-{index % COLOURS + 1})" for index, name in enumerate(names)}


def interval(row: Row) -> str:
    """A latency with its 95 % interval: "0.412 ms (0.405–0.421)"."""
    if row["latency_ms"] is None:
        return words.NOTHING
    said = words.milliseconds(row["latency_ms"])
    if row["latency_low_ms"] is None or row["latency_high_ms"] is None:
        return said
    return f"{said} ({words.plain(row['latency_low_ms'])}–{words.plain(row['latency_high_ms'])})"


@functools.cache
def _script() -> str:
    import vl_convert

    return str(vl_convert.javascript_bundle())  # type: ignore[call-arg]  # the stub asks for too much


def _up(result: Result) -> int:
    """1 where a higher value of the metric is better, else −1."""
    return 1 if result.facts.get("higher_is_better", True) else -1


def _points(found: Sequence[Row], result: Result) -> list[Row]:
    """What is drawn of each candidate; texts are ready for the tooltip."""
    facts = result.facts
    largest = max((row["size_bytes"] or 0 for row in found), default=0) or 1
    # The float network is one network on every runtime: where one of them was judged, its quality is that of all.
    known = [row["quality"] for row in found if row["original"] and row["quality"] is not None]
    points: list[Row] = []
    for row in found:
        quality, note = row["quality"], ""
        if quality is None and row["original"] and known:
            quality, note = known[0], " (on another runtime)"
        if quality is None or not row["latency_ms"]:
            continue
        kind = (
            "original" if row["original"] else "dropped" if row["status"] == "dropped" else "kept"
        )
        name = "original" if row["original"] else row["name"]
        points.append(
            {
                "kind": "taken" if row["taken"] else kind,
                "name": name,
                "runtime": row["runtime"],
                "latency": row["latency_ms"],
                "quality": quality,
                "bytes": row["size_bytes"] or 0,
                "area": LARGEST * (row["size_bytes"] or 0) / largest + 14,
                "said_quality": words.quality(quality, facts) + note,
                "said_loss": words.points(row["loss"], facts),
                "said_latency": interval(row),
                "said_size": words.size(row["size_bytes"]),
                "why": row["reason"],
            }
        )
    # The front itself is of three axes (size too); drawn in two, its line would run back and forth.
    best = float("-inf")
    for point in sorted(points, key=lambda p: (p["latency"], -_up(result) * p["quality"])):
        point["edge"] = point["kind"] != "dropped" and _up(result) * point["quality"] > best
        best = max(best, _up(result) * point["quality"]) if point["edge"] else best
    return points


def _window(points: Sequence[Row], result: Result) -> tuple[float, float]:
    """The worst and the best quality on the scale: around what matters, so that one ruined candidate does not flatten the rest."""
    up = _up(result)
    qualities = [up * point["quality"] for point in points]
    top = max(qualities)
    kept = [up * p["quality"] for p in points if p["kind"] != "dropped"]
    lost = max([top - min(kept or qualities), result.limits.max_drop or 0.0])
    bottom = max(min([*qualities, top - lost]), top - max(FAR * lost, 0.002 * abs(top)))
    span = (top - bottom) or abs(top) * 0.02 or 1.0
    return up * (bottom - 0.08 * span), up * (top + 0.16 * span)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers on a logarithmic axis, at least four where it is long enough."""
    values: list[float] = []
    for ladder in LADDERS:
        start, end = math.floor(math.log10(low)), math.ceil(math.log10(high))
        values = [step * 10.0**power for power in range(start, end + 1) for step in ladder]
        values = [round(value, 12) for value in values if low <= value <= high]
        if len(values) >= TICKS:
            return values
    if len(values) < 2:
        values = [float(f"{low + (high - low) * part / 4:.3g}") for part in (1, 2, 3)]
    return values


def _specification(
    altair: Any,
    points: Sequence[Row],
    runtimes: dict[str, str],
    window: tuple[float, float],
    result: Result,
) -> dict[str, Any]:
    facts, limits = result.facts, result.limits
    metric = words.clean(facts.get("metric") or "quality")
    latencies = [point["latency"] for point in points]
    if limits.max_latency:
        latencies.append(min(limits.max_latency, 3 * max(latencies)))
    pad = max(1.25, (max(latencies) / min(latencies)) ** 0.09)
    low, high = min(latencies) / pad, max(latencies) * pad
    x = altair.X(
        "latency:Q",
        scale=altair.Scale(type="log", domain=[low, high], nice=False),
        axis=altair.Axis(
            title="latency, ms (log scale)", values=_ticks(low, high), format="~g", grid=False
        ),
    )
    share = bool(facts.get("points"))
    span = abs(window[1] - window[0])
    digits = 2 if span < 0.004 else 1 if span < 0.05 else 0
    labels = (
        {"labelExpr": f"datum.value > 1 ? '' : format(100 * datum.value, '.{digits}f') + ' %'"}
        if share
        else {}
    )
    y = altair.Y(
        "y:Q",
        scale=altair.Scale(domain=list(window), nice=False, zero=False),
        axis=altair.Axis(title=None, tickCount=6, domain=False, ticks=False, **labels),
    )
    colour = altair.Color(
        "runtime:N",
        scale=altair.Scale(domain=list(runtimes), range=list(runtimes.values())),
        legend=None,
    )
    tips = [
        altair.Tooltip(f"{field}:N", title=title)
        for field, title in (
            ("name", "candidate"),
            ("runtime", "runtime"),
            ("said_quality", metric),
            ("said_loss", "loss"),
            ("said_latency", "latency"),
            ("said_size", "size"),
            ("why", "why"),
        )
    ]
    area = altair.Size("area:Q", scale=None, legend=None)
    base = altair.Chart(altair.Data(values=list(points)))
    drop = result.limits.max_drop
    originals = [p["quality"] for p in points if p["kind"] == "original"]
    layers = []
    if drop is not None and originals:
        edge = originals[0] - _up(result) * drop
        layers.append(
            _rule(altair, "y", edge, f"limit: {words.points(drop, facts)} worse", y, window)
        )
    if limits.max_latency and low < limits.max_latency < high:
        layers.append(_rule(altair, "x", limits.max_latency, "limit", x, (low, high)))
    filled = base.transform_filter(
        "datum.kind != 'dropped' && datum.kind != 'original' && !datum.outside"
    )
    original = base.transform_filter("datum.kind == 'original'")
    hollow = base.transform_filter("datum.kind == 'dropped' && !datum.outside")
    below = base.transform_filter("datum.outside")
    taken = base.transform_filter("datum.kind == 'taken'")
    layers += [
        base.transform_filter("datum.edge && !datum.outside")
        .mark_line(color="var(--faint)", strokeWidth=1.5)
        .encode(x=x, y=y, order="latency:Q"),
        hollow.mark_point(filled=False, strokeWidth=1.5, fill="transparent", opacity=0.75).encode(
            x=x, y=y, size=area, color=colour, tooltip=tips
        ),
        filled.mark_point(filled=True, opacity=0.82).encode(
            x=x, y=y, size=area, color=colour, tooltip=tips
        ),
        original.mark_square(filled=True, opacity=0.82).encode(
            x=x, y=y, size=area, color=colour, tooltip=tips
        ),
        below.mark_point(
            shape="triangle-down", filled=False, strokeWidth=1.5, fill="transparent", size=70
        ).encode(x=x, y=y, color=colour, tooltip=tips),
        taken.mark_point(filled=False, stroke="var(--accent)", strokeWidth=2.5, opacity=1)
        .encode(x=x, y=y, size=altair.Size("ring:Q", scale=None, legend=None), tooltip=tips)
        .transform_calculate(ring="pow(sqrt(datum.area) + 9, 2)"),
        taken.mark_text(
            color="var(--accent)", fontSize=13, fontWeight="bold", baseline="middle"
        ).encode(x=x, y=altair.Y("label_y:Q"), text="kind:N"),
    ]
    drawing = (
        altair.layer(*layers)
        .properties(width="container", height=HEIGHT, background="transparent")
        .configure(font=FONT, autosize=altair.AutoSizeParams(type="fit-x", contains="padding"))
        .configure_view(stroke=None)
        .configure_axis(
            labelColor="var(--quiet)",
            titleColor="var(--quiet)",
            gridColor="var(--line)",
            domainColor="var(--faint)",
            tickColor="var(--faint)",
            labelFontSize=12,
            titleFontSize=12,
            titleFontWeight="normal",
            titlePadding=10,
            labelPadding=6,
        )
    )
    specification: dict[str, Any] = drawing.to_dict()
    # The address of the schema is for editors; a page without network has no use for it.
    specification.pop("$schema", None)
    return specification


def _rule(
    altair: Any, axis: str, value: float, label: str, channel: Any, window: tuple[float, float]
) -> Any:
    """A dashed line at a limit, with its label; nothing where it lies outside the scale."""
    field = "latency" if axis == "x" else "y"
    inside = min(window) <= value <= max(window)
    base = altair.Chart(altair.Data(values=[{field: value, "text": label}] if inside else []))
    rule = base.mark_rule(color="var(--faint)", strokeDash=[5, 4]).encode(**{axis: channel})
    at = {"x": altair.value(6)} if axis == "y" else {"y": altair.value(8)}
    text = base.mark_text(
        align="left",
        dy=-8 if axis == "y" else 0,
        dx=0 if axis == "y" else 6,
        fontSize=11,
        color="var(--quiet)",
    ).encode(text="text:N", **{axis: channel}, **at)
    return altair.layer(rule, text)
