"""Bits without gaps, entropy codes and the forms of an array: what is coded comes back, and what nobody coded is refused."""

import json
import random
import zlib
from typing import Any

import numpy as np
import pytest
import torch

from tinier.errors import InputError
from tinier.tensors import array_code, entropy_code, packing

SIZES = (0, 1, 2, 7, 8, 9, 63, 1000)


def some(count: int, below: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, below, count, dtype=np.uint8)


class TestBits:
    @pytest.mark.parametrize("bits", range(1, 9))
    def test_identity(self, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
        for chunk in (packing._CHUNK, 8, 64):
            monkeypatch.setattr(packing, "_CHUNK", chunk)
            for count in SIZES:
                x = torch.from_numpy(some(count, 1 << bits))
                data = packing.pack(x, bits)
                assert len(data) == packing.packed_size(count, bits) == -(-count * bits // 8)
                assert torch.equal(packing.unpack(data, bits, (count,)), x)
        cube = torch.from_numpy(some(60, 1 << bits)).reshape(3, 4, 5)
        assert torch.equal(packing.unpack(packing.pack(cube, bits), bits, (3, 4, 5)), cube)

    @pytest.mark.parametrize("bits", range(1, 9))
    def test_against_one_long_integer(self, bits: int) -> None:
        x = some(101, 1 << bits, seed=bits)
        long = sum(int(value) << (bits * place) for place, value in enumerate(x))
        wanted = long.to_bytes(packing.packed_size(101, bits), "little")
        assert packing.pack(torch.from_numpy(x), bits) == wanted

    def test_transposed(self) -> None:
        x = torch.from_numpy(some(12, 8)).reshape(3, 4).T
        assert torch.equal(packing.unpack(packing.pack(x, 3), 3, (4, 3)), x)

    def test_refusals(self) -> None:
        with pytest.raises(InputError, match="1 to 8"):
            packing.pack(torch.zeros(2, dtype=torch.uint8), 9)
        with pytest.raises(InputError, match="4 does not fit 2 bits"):
            packing.pack(torch.tensor([4], dtype=torch.uint8), 2)
        with pytest.raises(InputError, match="uint8 is needed"):
            packing.pack(torch.tensor([1]), 2)
        for data in (b"", b"ab"):
            with pytest.raises(InputError, match="take 1 bytes"):
                packing.unpack(data, 3, (2,))
        with pytest.raises(InputError, match="behind the last"):
            packing.unpack(b"\xff", 3, (2,))


class TestEntropyCode:
    @pytest.mark.parametrize("name", entropy_code.CODES)
    def test_identity(self, name: str) -> None:
        for data in (b"", b"a", bytes(100_000), some(5000, 16).tobytes(), some(999, 255).tobytes()):
            coded = entropy_code.code(data, name)
            assert entropy_code.decode(name, coded, len(data)) == data
            for wrong in (len(data) - 1, len(data) + 1, 0):
                if wrong >= 0 and wrong != len(data):
                    with pytest.raises(InputError, match="does not end after"):
                        entropy_code.decode(name, coded, wrong)

    def test_the_smallest_is_kept(self) -> None:
        skewed = np.minimum(np.random.default_rng(0).geometric(0.4, 9000), 15).astype(np.uint8)
        for data in (skewed.tobytes(), b"weights " * 3000, some(3000, 255).tobytes(), bytes(9000)):
            name, coded = entropy_code.encode(data)
            assert len(coded) == min(len(entropy_code.code(data, n)) for n in entropy_code.CODES)
            assert entropy_code.decode(name, coded, len(data)) == data

    def test_huffman_comes_near_the_entropy(self) -> None:
        x = np.minimum(np.random.default_rng(0).geometric(0.3, 40_000), 15).astype(np.uint8)
        p = np.unique(x, return_counts=True)[1] / len(x)
        assert entropy_code.entropy(x) == pytest.approx(-(p * np.log2(p)).sum())
        bits = 8 * len(entropy_code.encode(x.tobytes())[1]) / len(x)
        assert entropy_code.entropy(x) <= bits <= 1.03 * entropy_code.entropy(x)

    def test_entropy_of_one_value_and_of_equal_shares(self) -> None:
        assert entropy_code.entropy(np.zeros(5, np.uint8)) == 0
        assert entropy_code.entropy(np.arange(256, dtype=np.uint8)) == pytest.approx(8)

    def test_a_bomb_is_stopped(self) -> None:
        bomb = zlib.compressobj(9, zlib.DEFLATED, entropy_code.RAW)
        data = bomb.compress(bytes(50_000_000)) + bomb.flush()
        with pytest.raises(InputError, match="after 10 bytes"):
            entropy_code.decode("deflate", data, 10)
        with pytest.raises(InputError, match="after 10 bytes"):
            entropy_code.decode("lzma", entropy_code.code(bytes(5_000_000), "lzma"), 10)

    @pytest.mark.parametrize("name", entropy_code.CODES[1:])
    def test_damage(self, name: str) -> None:
        data = some(4000, 7).tobytes()
        coded = entropy_code.code(data, name)
        for wrong in (coded[:-3], coded + b"x", b"", b"\xff" * 50):
            with pytest.raises(InputError):
                entropy_code.decode(name, wrong, len(data))
        with pytest.raises(InputError, match="are known"):
            entropy_code.decode("pickle", coded, 1)


def floats(values: Any) -> tuple[np.ndarray, int, bool | None]:
    return np.asarray(values, np.float32).view(np.uint8), 4, None


def arrays() -> dict[str, tuple[np.ndarray, int, bool | None]]:
    """Form → an array that it is the smallest for: its bytes, width and sign."""
    rng = np.random.default_rng(0)
    normal = rng.normal(size=3000)
    shared = np.round(normal * 2) / 3
    few = np.where(rng.random(3000) < 0.9, 0, normal)
    return {
        "planes": floats(normal),
        "codebook": floats(shared),
        "integers": (rng.integers(-7, 8, 3000).astype(np.int8).view(np.uint8), 1, True),
        "sparse": floats(few),
    }


class TestArrayCode:
    @pytest.mark.parametrize("form", array_code.FORMS)
    def test_each_form_is_somewhere_the_smallest(self, form: str) -> None:
        raw, width, signed = arrays()[form]
        coded = array_code.encode(raw, width, signed)
        assert coded.row["form"] == form and len(coded.data) < len(raw)
        row = json.loads(json.dumps(coded.row))
        found = array_code.decode(row, coded.data, width, len(raw) // width)
        assert np.array_equal(found, raw)

    @pytest.mark.parametrize("width", [1, 2, 4, 8, 16])
    @pytest.mark.parametrize("signed", [True, False, None])
    def test_identity(self, width: int, signed: bool | None) -> None:
        rng = np.random.default_rng(width)
        for count in (0, 1, 5, 700):
            for below in (1, 2, 256):
                words = rng.integers(0, below, (count, width), dtype=np.uint8)
                words[rng.random(count) < 0.5] = 0
                for raw in (words, words[:, ::-1], words | 0x80):
                    flat = np.ascontiguousarray(raw).reshape(-1)
                    coded = array_code.encode(flat, width, signed)
                    found = array_code.decode(coded.row, coded.data, width, count)
                    assert np.array_equal(found, flat)

    def test_all_bit_patterns_come_back(self) -> None:
        words = np.array([0, 1 << 31, 0x7FC00000, 0x7FC00001, 0xFFFFFFFF, 1], np.uint32)
        for raw in (words, np.repeat(words, 99)):  # ±0, two NaN, a denormal
            coded = array_code.encode(raw.view(np.uint8), 4, None)
            assert np.array_equal(
                array_code.decode(coded.row, coded.data, 4, len(raw)), raw.view(np.uint8)
            )

    def test_integers_take_their_bits(self) -> None:
        for low, high, dtype in ((-7, 8, np.int8), (100, 103, np.int64), (-4, 0, np.int32)):
            x = np.random.default_rng(0).integers(low, high, 20_000).astype(dtype)
            coded = array_code.encode(x.view(np.uint8), x.itemsize, True)
            bits = (high - 1 - low).bit_length()
            assert coded.row["bits"] == bits and len(coded.data) <= packing.packed_size(
                len(x), bits
            )

    def test_zeros_of_floats_are_said_once(self) -> None:
        raw, width, _ = arrays()["sparse"]
        planes = sum(len(entropy_code.encode(raw[place::width].tobytes())[1]) for place in range(4))
        assert len(array_code.encode(raw, width, None).data) < 0.85 * planes

    @pytest.mark.parametrize("form", array_code.FORMS)
    def test_wrong_rows_are_refused(self, form: str) -> None:
        """Every value of the row replaced by every kind of nonsense: refused, or the same size comes back."""
        raw, width, signed = arrays()[form]
        coded = array_code.encode(raw, width, signed)
        count = len(raw) // width
        nonsense: tuple[Any, ...] = (
            None,
            -1,
            0,
            1,
            3,
            10**30,
            1.5,
            "x",
            [],
            {},
            True,
            "sparse",
            "codebook",
        )
        refused = 0
        for path in paths(coded.row):
            for value in nonsense:
                row = replaced(coded.row, path, value)
                try:
                    assert len(array_code.decode(row, coded.data, width, count)) == len(raw)
                except InputError:
                    refused += 1
        assert refused > 15
        for wrong in (coded.data[:-1], coded.data + b"x", b""):
            with pytest.raises(InputError):
                array_code.decode(coded.row, wrong, width, count)
        for other in (0, count // 2, count + 8, 10**6):
            with pytest.raises(InputError):
                array_code.decode(coded.row, coded.data, width, other)

    def test_sparse_in_sparse_is_refused(self) -> None:
        row: dict[str, Any] = {"form": "planes"}
        for _ in range(3000):
            row = {"form": "sparse", "value": 0, "others": 1, "rest": row}
        with pytest.raises(InputError, match="inside another"):
            array_code.decode({**row, "streams": [["stored", 1]]}, b"\x01", 4, 1)

    def test_flipped_bytes_are_refused_or_of_the_same_size(self) -> None:
        rng = random.Random(0)
        for raw, width, signed in arrays().values():
            coded = array_code.encode(raw, width, signed)
            for _ in range(60):
                data = bytearray(coded.data)
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
                try:
                    found = array_code.decode(coded.row, bytes(data), width, len(raw) // width)
                except InputError:
                    continue
                assert len(found) == len(raw)


def paths(row: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every value of a nested row lies."""
    inner = (
        row.items() if isinstance(row, dict) else enumerate(row) if isinstance(row, list) else ()
    )
    return [at, *(path for key, value in inner for path in paths(value, (*at, key)))]


def replaced(row: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of a nested row with one value replaced."""
    if not path:
        return value
    made = row.copy()
    made[path[0]] = replaced(row[path[0]], path[1:], value)
    return made
