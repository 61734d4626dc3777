"""Quantities as people write them."""

import pytest

from tinier.errors import InputError
from tinier.units import parse_bytes, parse_drop, parse_milliseconds, parse_seconds


def test_values() -> None:
    assert parse_seconds("10m") == 600 and parse_seconds("90s") == 90 and parse_seconds(5) == 5
    assert parse_milliseconds("5ms") == pytest.approx(5) and parse_milliseconds(3) == pytest.approx(
        3
    )
    assert parse_bytes("4MB") == 4_000_000 and parse_bytes("1 KiB") == 1024 and parse_bytes(7) == 7
    assert parse_drop("1%") == 0.01 and parse_drop(0.02) == 0.02 and parse_drop("0") == 0


@pytest.mark.parametrize("text", ["", "ten", "-1s", "0", "5 parsecs", "nan", "inf"])
def test_wrong_ones_name_the_right_form(text: str) -> None:
    with pytest.raises(InputError, match="write a duration such as"):
        parse_seconds(text)
    with pytest.raises(InputError, match="write a size such as"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["-1%", "much", "nan%"])
def test_wrong_drops(text: str) -> None:
    with pytest.raises(InputError, match="1% or"):
        parse_drop(text)
