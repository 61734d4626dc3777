"""Distributions of weights and activations: a line a tensor in the terminal, a small histogram a tensor in HTML."""

import math
from collections.abc import Sequence

from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text

from tinier.report import words
from tinier.report.page import page
from tinier.report.words import escaped
from tinier.statistics.distributions import Described
from tinier.tensors.distribution import Distribution
from tinier.version import VERSION

_BLOCKS = " ▁▂▃▄▅▆▇█"
SPARKS = 32  # bars of a line
_WIDTH, _HEIGHT = 320, 92  # of a drawing, in its own units
_NAME = 28  # characters of a name, of which the end tells most
# Columns in their order, and in the order in which they are given room.
_COLUMNS = (
    *("shape", "min", "max", "mean", "std", "kurtosis", "> 6σ", "zeros", "entropy"),
    *("distribution, log", "dB 8", "dB 4", "bits"),
)
_FIRST = (
    *("bits", "dB 8", "dB 4", "distribution, log", "min", "max", "> 6σ", "zeros", "shape"),
    *("kurtosis", "std", "mean", "entropy"),
)
_LEGEND = (
    "dB: signal-to-noise ratio with 8 and with 4 bits; bits: the fewest that lose less than 1 % of the power (20 dB). "
    "Weights: one scale a channel, nothing clipped; activations: one range of least squared error."
)


def distribution_tables(described: Sequence[Described], width: int) -> list[Table]:
    """One line a tensor: a table of weights and one of activations, as far as there are any.

    Args:
        described: the tensors.
        width: characters of the terminal; columns that do not fit are left out, those of least use first.
    """
    if not described:
        return []
    lines = [({"name": _short(one.name)} | _cells(one)) for one in described]
    room = {name: max(len(name), *(len(line[name]) for line in lines)) for name in _COLUMNS}
    left = width - max(len(line["name"]) for line in lines)
    shown = set()
    for name in _FIRST:
        if room[name] + 2 <= left:
            left -= room[name] + 2
            shown.add(name)
    tables = []
    for kind in ("weight", "activation"):
        rows = [line for line, one in zip(lines, described, strict=True) if one.kind == kind]
        if not rows:
            continue
        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column(kind, no_wrap=True, min_width=max(len(line["name"]) for line in lines))
        columns = [name for name in _COLUMNS if name in shown]
        for name in columns:
            side: JustifyMethod = "left" if name in ("shape", "distribution, log") else "right"
            table.add_column(name, justify=side, no_wrap=True, min_width=room[name])
        for line in rows:
            table.add_row(Text(line["name"]), *(line[name] for name in columns))
        tables.append(table)
    return tables


def _short(name: str) -> str:
    name = words.clean(name)
    return name if len(name) <= _NAME else "…" + name[1 - _NAME :]


def legend() -> str:
    """What the columns of the tables mean, in a sentence."""
    return _LEGEND


def sparkline(bars: Sequence[float], count: int = SPARKS) -> str:
    """Bars as unicode blocks on a logarithmic scale; a part with any value at all is at least the lowest block.

    Args:
        bars: counts, a multiple of ``count`` of them.
        count: characters.
    """
    size = len(bars) // count
    sums = [sum(bars[i : i + size]) for i in range(0, size * count, size)]
    return "".join(_BLOCKS[math.ceil(height * 8)] for height in _heights(sums))


def distributions_html(name: str, described: Sequence[Described], examples: int) -> str:
    """The distributions as a whole HTML document.

    Args:
        name: of the network.
        described: the tensors.
        examples: how many the activations are of; 0 for none.

    Returns:
        About 2 kB for each tensor; without scripts, and nothing is loaded.
    """
    weights = [one for one in described if one.kind == "weight"]
    activations = [one for one in described if one.kind == "activation"]
    body = [
        _head(name, weights, activations, examples),
        _section("Weights", "One scale a channel, symmetric, nothing clipped.", weights),
        _section(
            "Activations",
            f"Over {examples:,} examples; one range a tensor, asymmetric, of least squared error.",
            activations,
        ),
    ]
    footer = (
        f"Made by tinier {escaped(VERSION)}. Bars have a logarithmic scale of counts. "
        "The ranges are those of one scale for the whole tensor."
    )
    title = f"Distributions of {words.clean(name)}"
    return page(title, body, footer, styles=("report.css", "distributions.css"))


def _cells(one: Described) -> dict[str, str]:
    shape = " × ".join(str(size) if size else "free" for size in one.shape)
    values = one.values
    if values is None:
        return dict.fromkeys(_COLUMNS, words.NOTHING) | {
            "shape": shape,
            "distribution, log": "NaN or infinity",
        }
    return {
        "shape": shape,
        "min": _number(values.low),
        "max": _number(values.high),
        "mean": _number(values.mean),
        "std": _number(values.deviation),
        "kurtosis": words.plain(values.kurtosis),
        "> 6σ": _share(values.outliers),
        "zeros": _share(values.zeros),
        "entropy": f"{values.entropy:.1f}",
        "distribution, log": sparkline(values.bars),
        "dB 8": _decibels(values, 8),
        "dB 4": _decibels(values, 4),
        "bits": _bits(values),
    }


def _head(
    name: str, weights: Sequence[Described], activations: Sequence[Described], examples: int
) -> str:
    wild = max(
        (one for one in (*weights, *activations) if one.values),
        key=lambda one: one.values.kurtosis if one.values else 0.0,
        default=None,
    )
    tail = ""
    if wild is not None and wild.values is not None:
        tail = (
            f" The heaviest tails are those of <b>{escaped(wild.name)}</b>, kurtosis {words.plain(wild.values.kurtosis)} "
            "(3 for a normal distribution)."
        )
    kinds = {"weights": weights, "activations": activations}
    few, all_ = (
        " and ".join(f"{_enough(rows, bits)} {kind}" for kind, rows in kinds.items() if rows)
        for bits in (4, 8)
    )
    lead = f"With 4 bits, {few} lose less than 1 % of their power; with 8 bits, {all_} do."
    over = f"{len(weights)} weights"
    over += f", {len(activations)} activations of {examples:,} examples" if activations else ""
    return (
        f'<header><p class="over">{escaped(over)}</p><h1>Distributions of {escaped(name)}</h1>'
        f'<p class="lead">{escaped(lead)}{tail}</p></header>'
    )


def _enough(described: Sequence[Described], bits: int) -> str:
    """How many of the tensors need no more bits: "3 of 9"."""
    known = [one.values for one in described if one.values is not None]
    enough = sum(values.bits is not None and values.bits <= bits for values in known)
    return f"{enough} of {len(described)}"


def _section(title: str, note: str, described: Sequence[Described]) -> str:
    if not described:
        return ""
    drawings = "".join(_figure(one) for one in described)
    return (
        f'<section><h2>{title}</h2><p class="quiet small">{escaped(note)}</p>{_key()}'
        f'<div class="plots">{drawings}</div></section>'
    )


def _key() -> str:
    lines = (
        ("minmax", "range of 8 bits by min–max"),
        ("mse", "by least squared error, shaded"),
        ("zero", "zero"),
    )
    items = "".join(
        f'<li><svg viewBox="0 0 22 14"><path class="{kind}" d="M1 7H21"/></svg>{said}</li>'
        for kind, said in lines
    )
    return f'<ul class="legend key">{items}</ul>'


def _figure(one: Described) -> str:
    cells, values = _cells(one), one.values
    many = values is None or values.bits is None
    head = (
        f'<h3>{_breakable(one.name)}</h3><p class="what">{escaped(one.what)} · {cells["shape"]}</p>'
    )
    if values is None:
        return f'<figure class="{one.kind} many">{head}<p class="bits"><b>NaN or infinity</b></p></figure>'
    said = "more than 8 bits" if values.bits is None else f"{values.bits} bits"
    facts = "".join(
        f"<dt>{name}</dt><dd>{cells[key]}{unit}</dd>".replace("exact dB", "exact")
        for name, key, unit in (
            ("8 bits", "dB 8", " dB"),
            ("4 bits", "dB 4", " dB"),
            ("mean", "mean", ""),
            ("std", "std", ""),
            ("kurtosis", "kurtosis", ""),
            ("beyond 6σ", "> 6σ", ""),
            ("zeros", "zeros", ""),
            ("entropy", "entropy", " bits"),
        )
    )
    return (
        f'<figure class="{one.kind}{" many" if many else ""}">{head}'
        f"{_drawing(values)}"
        f'<p class="bits"><b>{said}</b> for less than 1 % of noise</p><dl class="facts">{facts}</dl></figure>'
    )


def _breakable(name: str) -> str:
    """A name that is broken behind dots and underscores only, as long as its parts fit."""
    return escaped(name).replace(".", ".<wbr>").replace("_", "_<wbr>")


def _drawing(values: Distribution) -> str:
    ends = [values.low, values.high, *(end for pair in values.ranges.values() for end in pair)]
    low, high = min(ends), max(ends)
    span = (high - low) or max(abs(high), 1e-30)
    margin = span * 0.015
    low, span = low - margin, span + 2 * margin

    def x(value: float) -> float:
        return round((value - low) / span * _WIDTH, 2)

    steps = [f"M{x(values.low)} {_HEIGHT}"]
    part = (values.high - values.low) / len(values.bars)
    if not part:  # all values are one
        steps = [f"M{x(values.low) - 1} {_HEIGHT}V4h2V{_HEIGHT}Z"]
    else:
        for i, height in enumerate(_heights(values.bars)):
            top = round(_HEIGHT - height * (_HEIGHT - 6), 1)
            steps.append(f"V{top}H{x(values.low + (i + 1) * part)}")
        steps.append(f"V{_HEIGHT}Z")
    mse, minmax = values.ranges["mse"], values.ranges["minmax"]
    band = f'<rect class="band" x="{x(mse[0])}" y="0" width="{round(x(mse[1]) - x(mse[0]), 2)}" height="{_HEIGHT}"/>'
    lines = "".join(
        f'<path class="{kind}" d="M{x(end)} 0V{_HEIGHT}"/>'
        for kind, pair in (("mse", mse), ("minmax", minmax))
        for end in pair
    )
    label = f"Histogram from {_number(values.low)} to {_number(values.high)}"
    said = f"<span>{_number(low + margin)}</span><span>{_number(low + span - margin)}</span>"
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{label}">{band}'
        f'<path class="bars" d="{"".join(steps)}"/><path class="zero" d="M{x(0.0)} 0V{_HEIGHT}"/>{lines}</svg>'
        f'<div class="ends">{said}</div>'
    )


def _heights(counts: Sequence[float]) -> list[float]:
    """In [0, 1], on a logarithmic scale on which one value alone is seen."""
    most = math.log1p(max(counts))
    return [math.log1p(max(count, 0.0)) / most if most else 0.0 for count in counts]


def _number(value: float) -> str:
    """Three significant digits in few characters."""
    small = value and not 1e-3 <= abs(value) < 1e5
    said = f"{value:.2e}" if small else words.plain(value)
    return said.replace("-", "\u2212").replace("e+0", "e").replace("e\u22120", "e\u2212")


def _share(share: float) -> str:
    if share <= 0:
        return "0 %"
    return f"{100 * share:.1f} %" if share >= 0.0005 else "< 0.1 %"


def _decibels(values: Distribution, bits: int) -> str:
    ratio = values.decibels(bits)
    return "exact" if math.isinf(ratio) else f"{ratio:.1f}"


def _bits(values: Distribution) -> str:
    return "> 8" if values.bits is None else str(values.bits)
