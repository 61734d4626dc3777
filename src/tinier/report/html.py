"""A result as one HTML file that needs nothing but a browser: no network, no other files."""

import json
from collections.abc import Mapping
from html import escape
from typing import Any

from tinier.report import words
from tinier.report.chart import Drawing, chart, colours, interval
from tinier.report.made import made
from tinier.report.page import asset, page
from tinier.report.rows import Claim, claim, faster, in_torch, rows, smaller, summary
from tinier.report.terminal import ordered
from tinier.report.words import escaped
from tinier.search.candidate import Candidate, Result

Row = dict[str, Any]


def html(result: Result) -> str:
    """The report of a result.

    Every string of the result is escaped, and the page's own policy lets it load nothing and run no script but its own.

    Args:
        result: of a search; ``result.facts["usage"]`` has the lines that run the artifact.

    Returns:
        A whole HTML document, about 1 MB with the chart. Without altair it has everything but the chart.
    """
    drawing, note = _drawing(result)
    scripts = [drawing.script, asset("report.js")] if drawing else []
    title = f"{words.clean(result.facts.get('model') or 'Model')}, made smaller by tinier"
    body = [
        _head(result),
        _front(result, drawing, note),
        _table(result),
        _certificate(result),
        _usage(result),
        made(result),
    ]
    data = (
        f'<script id="specification" type="application/json">{_json(drawing)}</script>'
        if drawing
        else ""
    )
    footer = (
        f"Made by tinier {escape(str(_version(result)))}. Every figure was measured in this run, "
        "on this machine and the named runtime."
    )
    return page(
        title, body, footer, kind="met" if result.met else "missed", data=data, scripts=scripts
    )


# The answer -----------------------------------------------------------------------------------------------------------


def _head(result: Result) -> str:
    said = claim(result)
    model = escaped(result.facts.get("model") or "The model")
    if said is None:
        return f'<header><p class="over">{model}</p><h1>No answer</h1><p class="lead">{escaped(summary(result))}</p></header>'
    short = ", ".join(part for part in (said.gain, said.cost) if part) or "Nothing better was found"
    short = short[0].upper() + short[1:] if result.met else f"Nearest miss: {short}"
    asked = words.limits(result.limits, result.facts)
    over = f"{model} · asked for: {escaped(', '.join(asked))}" if asked else model
    if not result.met:
        over = f"{over} · not reached"
    return (
        f'<header><p class="over">{over}</p><h1>{_unbroken(short)}</h1>{_lead(said, result)}'
        f"{_cards(said, result)}</header>"
    )


def _unbroken(text: str) -> str:
    """A headline whose figures stay with their words."""
    return escaped(text).replace("× ", "×\u00a0").replace(" point", "\u00a0point")


def _lead(said: Claim, result: Result) -> str:
    what = said.what[0].upper() + said.what[1:]
    than = f", compared with {said.than}" if said.gain else ""
    proof = (
        f" The bound on the loss holds {said.proof}."
        if said.certified
        else f" The loss is {said.proof}."
    )
    lead = f"<b>{escaped(what)}</b>{escaped(than)}.{escaped(proof)}"
    if not result.met:
        lead = f"The limits are not kept: {escaped(result.reason)}. The nearest is shown. {lead}"
    return f'<p class="lead">{lead}</p>'


def _cards(said: Claim, result: Result) -> str:
    best = result.best
    if best is None:
        return ""
    than = in_torch(result)
    than = result.original if than is None or than is best else than
    cards = []
    if than is not None and than is not best:
        cards += _gains(best, than, result)
    proof = best.certificate
    if proof is not None:
        figure = "0" if proof.bound <= 0 else words.points(proof.bound, result.facts, up=True)
        seen = words.points(max(proof.loss, 0.0), result.facts)
        sure = words.percent(1 - proof.delta)
        cards.append(_card(f"≤ {figure}", "certified drop", f"{sure} confidence; {seen} measured"))
        cards.append(_card(f"{proof.examples:,}", "examples", "that nothing was tuned on"))
    elif best.loss is not None:
        cards.append(
            _card(words.points(best.loss, result.facts), "drop", "measured, not certified")
        )
    return f'<ul class="cards">{"".join(cards)}</ul>' if cards else ""


def _gains(best: Candidate, than: Candidate, result: Result) -> list[str]:
    cards = []
    speed, bytes_ = faster(best, than), smaller(best, than)
    if speed is not None and best.latency is not None and than.latency is not None:
        now, before = words.plain(best.latency.median), words.milliseconds(than.latency.median)
        how = f"{now} instead of {before}"
        other = faster(best, result.original)
        if other is not None and result.original is not than and best is not result.original:
            how += f"; {words.times(other)} against the original on {result.original.target}"  # type: ignore[union-attr]
        cards.append(_card(words.times(speed), "as fast" if speed < 1.05 else "faster", how))
    if bytes_ is not None:
        how = f"{words.size(best.size)} instead of {words.size(than.size)}"
        cards.append(_card(words.times(bytes_), "as small" if bytes_ < 1.05 else "smaller", how))
    return cards


def _card(figure: str, of: str, how: str) -> str:
    number, _, unit = figure.partition(" point")
    unit = f' <span class="unit">point{escaped(unit)}</span>' if _ else ""
    return (
        f'<li><span class="figure">{escaped(number)}{unit}</span><span class="of">{escaped(of)}</span>'
        f'<span class="how">{escaped(how)}</span></li>'
    )


# The front ------------------------------------------------------------------------------------------------------------


def _drawing(result: Result) -> tuple[Drawing | None, str]:
    """The chart, or why there is none."""
    try:
        drawing = chart(result)
    except ImportError:
        return (
            None,
            "The chart needs altair and vl-convert: <code>pip install 'tinier[report]'</code>",
        )
    return (
        drawing,
        "" if drawing else "No candidate has both quality and latency, so that there is no chart.",
    )


def _front(result: Result, drawing: Drawing | None, note: str) -> str:
    start = '<section id="front"><h2>Quality against latency</h2>'
    if drawing is None:
        return f'{start}<p class="quiet">{note}</p></section>'
    metric = escaped(result.facts.get("metric") or "quality")
    circle = (
        '<svg viewBox="0 0 14 14" aria-hidden="true"><circle cx="7" cy="7" r="{r}" {paint}/></svg>'
    )
    fill = 'fill="{}"'
    keys = [
        f"<li>{circle.format(r=6, paint=fill.format(tone))}{escaped(name)}</li>"
        for name, tone in drawing.runtimes.items()
    ]
    hollow = circle.format(r=5.5, paint='fill="none" stroke="var(--quiet)" stroke-width="1.5"')
    square = '<rect x="1.5" y="1.5" width="11" height="11" fill="var(--quiet)"/>'
    keys.append(f'<li><svg viewBox="0 0 14 14" aria-hidden="true">{square}</svg>original</li>')
    keys.append(f"<li>{hollow}dropped</li>")
    if result.met:
        ring = circle.format(r=6, paint='fill="none" stroke="var(--accent)" stroke-width="2.5"')
        keys.append(f"<li>{ring}taken</li>")
    keys.append("<li>area: size on disk</li>")
    better = "higher" if result.facts.get("higher_is_better", True) else "lower"
    caption = [
        f"Vertically {metric} on the examples that compare candidates ({better} is better); the line joins those that none beats in both."
    ]
    if drawing.outside:
        caption.append(f"▽ {drawing.outside} below the scale.")
    if drawing.missing:
        caption.append(f"{drawing.missing} more were dropped before their quality was measured.")
    return (
        f'{start}<figure><ul class="legend">{"".join(keys)}</ul>'
        f'<div id="chart" role="img" aria-label="{metric} against latency of every candidate; the table below has the figures"></div>'
        f"<figcaption>{' '.join(caption)}</figcaption></figure></section>"
    )


# The table ------------------------------------------------------------------------------------------------------------


def _table(result: Result) -> str:
    found = rows(result)
    if not found:
        return ""
    tones = colours(found)
    groups = (
        ("The original", [row for row in found if row["original"]]),
        ("Kept", [row for row in ordered(found) if row["status"] != "dropped"]),
        ("Dropped", [row for row in ordered(found) if row["status"] == "dropped"]),
    )
    metric = words.clean(result.facts.get("metric") or "quality")
    heads = [
        "Candidate",
        "Runtime",
        metric[:1].upper() + metric[1:],
        "Latency",
        "Size",
        "Peak memory",
        "Parity",
        "Why",
    ]
    classes = {
        "Candidate": ' class="text"',
        "Runtime": ' class="text"',
        "Parity": ' class="text"',
        "Why": ' class="text"',
    }
    head = "".join(f'<th scope="col"{classes.get(name, "")}>{escaped(name)}</th>' for name in heads)
    lines = []
    for name, members in groups:
        if members:
            lines.append(
                f'<tr class="group"><th colspan="{len(heads)}" scope="rowgroup">{name}</th></tr>'
            )
            lines += [_line(row, tones, heads, result) for row in members]
    return (
        '<section id="candidates"><h2>Everything that was tried</h2><div class="box"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></section>"
    )


def _line(row: Row, tones: Mapping[str, str], heads: list[str], result: Result) -> str:
    facts = result.facts
    dropped = row["status"] == "dropped" and not row["original"]
    kind = "taken" if row["taken"] else "dropped" if dropped else "kept"
    tone = tones[row["runtime"]].removeprefix("var(--").removesuffix(")")
    tag = ' <span class="tag">taken</span>' if row["taken"] else ""
    loss = "" if row["loss"] is None or row["original"] else _loss(row["loss"], facts)
    certified = row["certified_quality"]
    unseen = "" if certified is None else f"{words.quality(certified, facts)} unseen"
    latency = interval(row).partition(" (")
    spread = f"({latency[2]}" if latency[2] else ""
    p95 = row["latency_p95_ms"]
    cells = [
        _cell(
            heads[1],
            f'<span class="dot {tone}"></span>{escaped(row["runtime"])}',
            "text number",
            raw=True,
        ),
        _cell(heads[2], words.quality(row["quality"], facts), "number", loss, unseen),
        _cell(heads[3], latency[0], "number", spread, f"p95 {words.plain(p95)}" if p95 else ""),
        _cell(heads[4], words.size(row["size_bytes"]), "number", _ratio(row, "smaller")),
        _cell(heads[5], words.size(row["peak_memory_bytes"]), "number"),
        _cell(heads[6], *_parity(row)),
        _cell(heads[7], row["reason"] or words.NOTHING, "text why"),
    ]
    return f'<tr class="{escape(kind)}"><th scope="row">{escaped(row["name"])}{tag}</th>{"".join(cells)}</tr>'


def _parity(row: Row) -> tuple[str, str, str]:
    """The parity as a cell's text, kind and small print."""
    short, _, more = (row["parity"] or words.NOTHING).partition(", ")
    return short, "text parity", more


def _ratio(row: Row, kind: str) -> str:
    ratio = row[f"{kind}_than_torch"] or row[f"{kind}_than_original"]
    return f"{words.times(ratio)} {kind}" if ratio and ratio >= 1.05 else ""


def _loss(loss: float, facts: Mapping[str, Any]) -> str:
    if round(loss, 9) == 0:
        return "no loss"
    return f"{words.points(abs(loss), facts)} {'worse' if loss > 0 else 'better'}"


def _cell(label: str, value: str, kind: str, *small: str, raw: bool = False) -> str:
    notes = "".join(f"<small>{escaped(note)}</small>" for note in small if note)
    empty = " empty" if value == words.NOTHING else ""
    inner = value if raw else escaped(value)
    return (
        f'<td class="{kind}{empty}" data-label="{escape(label)}"><span>{inner}{notes}</span></td>'
    )


# Proof, use, and how it was made --------------------------------------------------------------------------------------


def _certificate(result: Result) -> str:
    best = result.best
    if best is None:
        return ""
    start = '<section id="certificate"><h2>The certificate</h2>'
    if best.certificate is None:
        reason = escaped(result.reason or "nothing was tested on unseen examples")
        return f'{start}<p class="quiet">There is none: {reason}.</p></section>'
    sentences = words.certificate(best.certificate, result.facts)
    return f'{start}<div class="proof">{"".join(f"<p>{escaped(one)}</p>" for one in sentences)}</div></section>'


def _usage(result: Result) -> str:
    usage = result.facts.get("usage")
    if not usage:
        return ""
    return f'<section id="usage"><h2>How to run it</h2><pre>{escape(str(usage))}</pre></section>'


# The page -------------------------------------------------------------------------------------------------------------


def _json(drawing: Drawing) -> str:
    return json.dumps(drawing.specification, allow_nan=False).replace("<", "\\u003c")


def _version(result: Result) -> str:
    versions = result.facts.get("versions")
    return versions.get("tinier", "") if isinstance(versions, Mapping) else ""
