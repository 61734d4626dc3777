"""How a result was made, as HTML: everything that is needed to repeat it."""

from collections.abc import Mapping
from typing import Any

from tinier.report import words
from tinier.report.words import escaped
from tinier.search.candidate import Result

# Facts in the order in which people ask for them. What is not named here comes after these under its own name.
MADE = {
    "model": "Model",
    "data": "Data",
    "metric": "Metric",
    "search_examples": "Examples to compare candidates",
    "certify_examples": "Examples for the certificate",
    "train_examples": "Examples for recovery",
    "batch": "Batch size of latency and memory",
    "threads": "Threads",
    "machine": "Machine",
    "runtimes": "Runtimes",
    "versions": "Versions",
    "seed": "Seed",
    "delta": "δ of the certificate",
    "budget": "Time budget",
    "seconds": "Time taken",
    "original_bytes": "Original's weights",
}
ELSEWHERE = ("points", "higher_is_better", "usage")  # facts that the page uses in other places


def made(result: Result) -> str:
    """The section with settings, machine, versions, seeds and hashes."""
    facts = {key: value for key, value in result.facts.items() if key not in ELSEWHERE}
    facts["budget"], facts["seconds"] = (_duration(facts.get(key)) for key in ("budget", "seconds"))
    if facts.get("original_bytes"):
        facts["original_bytes"] = words.size(facts["original_bytes"])
    items = [(label, facts.pop(key, None)) for key, label in MADE.items()]
    items.insert(1, ("Limits", ", ".join(words.limits(result.limits, result.facts))))
    items += [(key.replace("_", " ").capitalize(), value) for key, value in facts.items()]
    lines = "".join(
        f"<dt>{escaped(label)}</dt><dd>{_value(value)}</dd>"
        for label, value in items
        if value is not None and value != "" and value != {}
    )
    return f'<section id="made"><h2>How it was made</h2><dl>{lines}</dl></section>'


def _value(value: Any) -> str:
    """A fact as HTML; nested ones as "key value" lines."""
    if isinstance(value, Mapping):
        parts = (
            f"{escaped(key)} {_value(inner)}"
            for key, inner in value.items()
            if inner is not None and inner != {}
        )
        return "<br>".join(parts)
    if isinstance(value, list | tuple):
        return ", ".join(_value(item) for item in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return escaped(f"{value:.6g}")
    text = escaped(value)
    digest = len(text) == 64 and all(sign in "0123456789abcdef" for sign in text)
    return f"<code>{text}</code>" if digest else text


def _duration(seconds: Any) -> str | None:
    if not isinstance(seconds, int | float):
        return None
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
