"""A quantized network as a page: its bits, its sizes, artifact against simulation, and which layer loses what."""

from collections.abc import Mapping, Sequence
from typing import Any

from tinier.report import words
from tinier.report.page import page
from tinier.report.words import escaped
from tinier.version import VERSION

SHOWN = 5  # names of operators of one kind that stayed float; quantization.json has all
MOST = 40  # layers with a row of their own
# Cause → how the page calls it, and its class, which has the colour.
CAUSES = {
    "weight rounding": ("weights, rounding", "cause-1"),
    "weight clipping": ("weights, clipping", "cause-2"),
    "activation rounding": ("inputs, rounding", "cause-3"),
    "activation clipping": ("inputs, clipping", "cause-4"),
}
# Columns of the table of artifacts against the simulation.
_STEPS, _RANGE = "Largest difference, steps", "Largest difference, of the range"
_SAME = "Same largest output"
_PARITY = ("Batch", _STEPS, _RANGE, _SAME)
_WIDTH, _HEIGHT = 1000, 14  # of a bar, in its own units

Facts = Mapping[str, Any]


def quantization_html(facts: Facts) -> str:
    """The record of a delivery as a whole HTML document.

    Args:
        facts: what ``Delivered.as_dict`` gives.

    Returns:
        About 10 kB and 1 kB for each layer; without scripts, and nothing is loaded.
    """
    body = [_head(facts), _losses(facts), _parity(facts), _bits(facts), _kept(facts)]
    footer = (
        f"Made by tinier {escaped(VERSION)}. Artifacts were run on this machine; losses are of the simulation that they "
        "were compared with. The same figures are in quantization.json."
    )
    title = f"{words.clean(facts['name'])}, quantized by tinier"
    return page(title, body, footer, styles=("report.css", "quantization.css"))


def _head(facts: Facts) -> str:
    artifacts = facts["artifacts"]
    over = f"{escaped(facts['name'])} · {escaped(', '.join(artifacts))}"
    first = next(iter(artifacts.values()), None)
    title = "Quantized"
    if first is not None:
        ratio = first["float_bytes"] / max(first["bytes"], 1)
        title = f"Quantized: {words.compared(ratio, 'smaller', 'larger')}"
    lead = f"{_counts(facts['weights'].values(), 'weights')}. {_rounded(facts)}."
    return (
        f'<header><p class="over">{over}</p><h1>{escaped(title)}</h1><p class="lead">{escaped(lead)}</p>'
        f'<ul class="cards">{"".join(_cards(facts))}</ul></header>'
    )


def _cards(facts: Facts) -> list[str]:
    cards = []
    for name, artifact in facts["artifacts"].items():
        how = f"{words.size(artifact['float_bytes'])} of float tensors before"
        if artifact.get("packed_bytes"):
            how += f"; {words.size(artifact['packed_bytes'])} as tinier pack stores it"
        cards.append(_card(words.size(artifact["bytes"]), f"artifact, {name}", how))
    found = facts["attribution"]
    if found is not None:
        how = f"squared error over the output's variance, {found['examples']:,} examples"
        cards.append(_card(words.plain(found["total"]), "total loss", how))
    worst = [
        row["relative"]
        for artifact in facts["artifacts"].values()
        for row in artifact["parity"]
        if not row["skipped"]
    ]
    if worst:
        how = "largest difference from the simulation, of the output's range"
        cards.append(_card(_percent(max(worst)), "artifact against simulation", how))
    share = facts["macs"]["integer"] / max(facts["macs"]["all"], 1)
    if facts["macs"]["all"]:
        how = (
            f"{facts['macs']['integer']:,} of {facts['macs']['all']:,} have integers on both sides"
        )
        cards.append(_card(_percent(share), "multiplications in integers", how))
    return cards


def _card(figure: str, of: str, how: str) -> str:
    number, _, unit = figure.partition(" ")
    unit = f' <span class="unit">{escaped(unit)}</span>' if unit else ""
    return (
        f'<li><span class="figure">{escaped(number)}{unit}</span><span class="of">{escaped(of)}</span>'
        f'<span class="how">{escaped(how)}</span></li>'
    )


# Losses ---------------------------------------------------------------------------------------------------------------


def _losses(facts: Facts) -> str:
    found = facts["attribution"]
    if found is None:
        return ""
    total, layers = found["total"], _summed(found["layers"])
    most = max((_length(row) for row in layers), default=0.0)
    used = [cause for cause in CAUSES if any(row[cause] for row in layers)]
    legend = "".join(
        f'<li><svg viewBox="0 0 14 14"><rect class="{CAUSES[cause][1]}" width="14" height="14" rx="3"/></svg>'
        f"{CAUSES[cause][0]}</li>"
        for cause in CAUSES
    )
    unused = [CAUSES[cause][0] for cause in CAUSES if cause not in used]
    none = f" Nothing is lost by {' and '.join(unused)}." if unused and used else ""
    return (
        f'<section><h2>Which layer loses what</h2><p class="lead losses">The quantized network loses <b>{words.plain(total)}</b>: '
        f"the mean squared change of its outputs over their variance, on {found['examples']:,} examples.</p>"
        '<p class="quiet small">Each bar is the float network with this cause in this layer alone, so bars need not add up to the '
        "total. The percentage is the share of the total that is given back when this layer alone computes in float; below zero, its "
        f"error makes up for another's.{none}</p>"
        f'<figure><ul class="legend">{legend}</ul><ol class="losses">{"".join(_bar(row, most, total) for row in layers)}</ol>'
        f"<figcaption>The longest bar is {words.plain(most)}.</figcaption></figure>"
        "</section>"
    )


def _summed(layers: Sequence[Facts]) -> list[Facts]:
    """Layers in their order, those beyond the 40th in one row."""
    if len(layers) <= MOST:
        return list(layers)
    rest = layers[MOST:]
    keys = (*CAUSES, "alone", "restored")
    sums = {key: sum(row[key] for row in rest) for key in keys}
    name = f"{len(rest)} more layers together"
    return [*layers[:MOST], {"layer": name, "operator": "sum", **sums}]


def _length(row: Facts) -> float:
    return float(sum(row[cause] for cause in CAUSES))


def _bar(row: Facts, most: float, total: float) -> str:
    parts, at = [], 0.0
    for cause, (name, kind) in CAUSES.items():
        width = row[cause] / most * _WIDTH if most else 0.0
        if width:
            parts.append(
                f'<rect class="{kind}" x="{at:.2f}" width="{width:.2f}" height="{_HEIGHT}">'
                f"<title>{name}: {words.plain(row[cause])}</title></rect>"
            )
        at += width
    said = ", ".join(f"{name} {words.plain(row[cause])}" for cause, (name, _) in CAUSES.items())
    share = row["restored"] / total if total else 0.0
    operator = "" if row["operator"] == row["layer"] else row["operator"]
    return (
        f'<li><span class="layer">{_breakable(row["layer"])} <small>{escaped(operator)}</small></span>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{said}">{"".join(parts)}</svg>'
        f'<span class="share">{_tenths(share)}</span></li>'
    )


# Tables ---------------------------------------------------------------------------------------------------------------


def _parity(facts: Facts) -> str:
    artifacts = facts["artifacts"].items()
    found = [(name, row) for name, artifact in artifacts for row in artifact["parity"]]
    if not found:
        return ""
    heads = [
        head
        for head in _PARITY
        if head != _STEPS or any(row["steps"] is not None for _, row in found)
    ]
    rows = [_parity_row(name, row, heads) for name, row in found]
    cells = "".join(f'<th scope="col">{head}</th>' for head in heads)
    steps = " Steps are those of the output's own quantization." if _STEPS in heads else ""
    return (
        '<section><h2>Artifact against simulation</h2><p class="quiet small">Runtimes round at other places than the simulation; what '
        f"differs by more than that explains is refused.{steps}</p>"
        f'<div class="box"><table><thead><tr><th class="text" scope="col">Runtime, output</th>{cells}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _parity_row(runtime: str, row: Facts, heads: Sequence[str]) -> str:
    output = f", {escaped(row['output'])}" if row["output"] else ""
    head = f'<tr><th scope="row">{escaped(runtime)}{output}</th>{_cell("Batch", str(row["batch"]))}'
    if row["skipped"]:
        return (
            f'{head}<td class="text" colspan="{len(heads) - 1}">{escaped(row["reason"])}</td></tr>'
        )
    steps, same = row["steps"], row["agreement"]
    said = {
        _STEPS: words.NOTHING if steps is None else words.plain(steps),
        _RANGE: _percent(row["relative"]),
        _SAME: words.NOTHING if same is None else _percent(same),
    }
    return f"{head}{''.join(_cell(name, said[name]) for name in heads if name in said)}</tr>"


def _cell(label: str, said: str) -> str:
    return f'<td class="number" data-label="{label}">{escaped(said)}</td>'


def _bits(facts: Facts) -> str:
    groups = [
        f"<details><summary>{escaped(_counts([bits] * len(names), what))}</summary><p>"
        f"{', '.join(_breakable(name) for name in names)}</p></details>"
        for what, of in (("weights", facts["weights"]), ("activations", facts["activation_bits"]))
        for bits, names in _by_bits(of).items()
    ]
    return f'<section><h2>Bits</h2><div class="bits">{"".join(groups)}</div></section>'


def _kept(facts: Facts) -> str:
    """The notes, and what stayed float by the reasons for it."""
    reasons: dict[str, dict[str, list[str]]] = {}
    for node, operator, reason in facts["float"]:
        short = operator.removeprefix("aten.").partition(".")[0]
        reasons.setdefault(reason, {}).setdefault(short, []).append(node)
    items = [f"<li>{escaped(note)}</li>" for note in facts["notes"]]
    items += [
        f"<li>Float: {escaped(reason)} – {'; '.join(_named(*one) for one in operators.items())}</li>"
        for reason, operators in reasons.items()
    ]
    if not items:
        return ""
    return f'<section><h2>Notes</h2><ul class="notes">{"".join(items)}</ul></section>'


def _named(operator: str, nodes: list[str]) -> str:
    """ "div 18 times: div, div_1, div_2 …"."""
    shown = ", ".join(_breakable(name) for name in nodes[:SHOWN])
    if len(nodes) == 1:
        return shown if nodes[0] == operator else f"{shown} ({escaped(operator)})"
    more = " …" if len(nodes) > SHOWN else ""
    return f"{escaped(operator)} {len(nodes)} times: {shown}{more}"


def _by_bits(of: Mapping[str, int]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name, bits in of.items():
        found.setdefault(bits, []).append(name)
    return dict(sorted(found.items()))


def _counts(all_bits: Any, what: str) -> str:
    """ "20 weights at 4 bits, 2 at 8 bits"."""
    counts: dict[int, int] = {}
    for bits in all_bits:
        counts[bits] = counts.get(bits, 0) + 1
    said = [f"{count} at {bits} bits" for bits, count in sorted(counts.items())]
    if not said:
        return f"No {what}"
    number, _, rest = said[0].partition(" ")
    return ", ".join(
        [f"{number} {what if number != '1' else what.removesuffix('s')} {rest}", *said[1:]]
    )


def _rounded(facts: Facts) -> str:
    if not facts["activation_bits"]:
        return "Activations stay float"
    dynamic = f", {facts['dynamic']} in the range of each run" if facts["dynamic"] else ""
    return _counts(facts["activation_bits"].values(), "activations") + dynamic


def _percent(share: float) -> str:
    """ "0.31 %", "−2.4 %"."""
    if share == 0:
        return "0 %"
    if abs(share) < 5e-5:
        return "< 0.01 %" if share > 0 else "> −0.01 %"
    digits = 1 if abs(share) >= 0.01 else 2
    said = f"{100 * share:.{digits}f}"
    said = said.rstrip("0").rstrip(".") if share == 1 else said
    return f"{said} %".replace("-", "−")


def _tenths(share: float) -> str:
    """ "22.2 %": as many decimals in every line, so that they stand below each other."""
    return f"{round(100 * share, 1) + 0.0:.1f} %".replace("-", "−")


def _breakable(name: str) -> str:
    """A name that is broken behind dots and underscores only, as long as its parts fit."""
    return escaped(name).replace(".", ".<wbr>").replace("_", "_<wbr>")
