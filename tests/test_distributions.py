"""What is told of the distributions of weights and activations, against the values themselves."""

import json
import math
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from typer.testing import CliRunner

import tinier
from networks import build, inputs
from tinier import cli
from tinier.errors import DataError, InputError, OutputError
from tinier.network import Network
from tinier.report.distributions import distribution_tables, sparkline
from tinier.statistics.distributions import describe_weights
from tinier.tensors.affine import Integers, asymmetric, fake_quantize, symmetric
from tinier.tensors.distribution import BARS, Distribution, distribution
from tinier.tensors.histogram import Histogram
from tinier.tensors.ranges import activation_range


def values(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def told(x: Tensor, symmetric: bool = False) -> Distribution:
    histogram = Histogram()
    histogram.add(x)
    return distribution(histogram, symmetric=symmetric)


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "relu": lambda x: x.relu(),
    "heavy": lambda x: x**3,
    "shifted": lambda x: x * 0.1 + 4,
    "sparse": lambda x: x * (x.abs() > 1.5),
    "binary": lambda x: (x > 0).float(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [1.0, 2.0**-60])
def test_moments_are_those_of_the_values(kind: str, factor: float) -> None:
    x = KINDS[kind](values(40_000)) * factor
    found, exact = told(x), x.double()
    width = float(x.abs().max()) / 1024  # at most that of a bin
    assert found.mean == pytest.approx(float(exact.mean()), abs=width / 4)
    assert found.deviation == pytest.approx(float(exact.std(correction=0)), rel=0.01)
    normal = (exact - exact.mean()) / exact.std(correction=0)
    assert found.kurtosis == pytest.approx(float(normal.pow(4).mean()), rel=0.02)
    assert found.outliers == pytest.approx(float((normal.abs() > 6).double().mean()), abs=2e-4)
    assert found.zeros == float((x == 0).double().mean())
    assert (found.low, found.high) == (float(x.min()), float(x.max()))


@pytest.mark.parametrize("kind", KINDS)
def test_bars_and_entropy_are_counts(kind: str) -> None:
    x = KINDS[kind](values(40_000))
    found = told(x)
    exact = torch.histogram(x, BARS, range=(found.low, found.high)).hist
    assert sum(found.bars) == pytest.approx(len(x))
    # A value may be counted in the bar beside its own, where a bin lies in both.
    ahead = torch.tensor(found.bars).cumsum(0) - exact.cumsum(0)
    assert float(ahead.abs().max()) <= (0.01 if kind != "binary" else 0.6) * len(x)
    low, high = found.ranges["minmax"]
    scale, zero_point = asymmetric(torch.tensor(low), torch.tensor(high), Integers.unsigned(8))
    p = torch.bincount((x / scale + zero_point).round().long()).double() / len(x)
    assert found.entropy == pytest.approx(
        float(-torch.special.xlogy(p, p).sum()) / math.log(2), abs=0.02
    )


@pytest.mark.parametrize("kind", ["normal", "relu", "heavy", "shifted"])
def test_noise_and_bits_are_those_of_quantizing(kind: str) -> None:
    x = KINDS[kind](values(40_000))
    histogram = Histogram()
    histogram.add(x)
    found = distribution(histogram)
    exact = {}
    for bits in range(2, 9):
        integers = Integers.unsigned(bits)
        low, high = activation_range(histogram, integers, "mse")
        scale, zero_point = asymmetric(torch.tensor(low), torch.tensor(high), integers)
        error = (fake_quantize(x, scale, zero_point, integers) - x).double().square().sum()
        exact[bits] = float(error / x.double().square().sum())
    for bits in (4, 8):
        assert found.noise[bits] == pytest.approx(exact[bits], rel=0.05)
        assert found.decibels(bits) == -10 * math.log10(found.noise[bits])
    assert found.bits == min(bits for bits, noise in exact.items() if noise < 0.01)


def test_a_uniform_distribution_has_what_the_formulas_say() -> None:
    found = told(torch.linspace(-1, 1, 200_001), symmetric=True)
    assert found.deviation == pytest.approx(1 / math.sqrt(3), rel=1e-3)
    assert found.kurtosis == pytest.approx(1.8, rel=1e-3)
    assert found.entropy == pytest.approx(
        math.log2(254), abs=0.02
    )  # its outer integers are half full
    # s²/12 of noise, s = 2 / 254, against a power of 1/3
    assert found.noise[8] == pytest.approx((2 / 254) ** 2 / 12 * 3, rel=0.01)


@pytest.mark.parametrize("constant", [0.0, 2.5, -1.0, -1e-30])
def test_constants_have_no_spread(constant: float) -> None:
    found = told(torch.full((50,), constant))
    assert (found.deviation, found.kurtosis, found.outliers, found.entropy) == (0, 0, 0, 0)
    assert found.mean == pytest.approx(constant, rel=1e-3)
    if abs(constant) == 1e-30:  # too small for any scale: all of it is lost
        assert found.noise == {8: 1, 4: 1} and found.bits is None
    else:
        assert found.bits == 2 and max(found.noise.values()) < 1e-12


def test_nothing_and_what_is_not_finite_have_no_distribution() -> None:
    with pytest.raises(DataError, match="of no values"):
        distribution(Histogram())
    with pytest.raises(DataError, match="NaN or infinity"):
        told(torch.tensor([1.0, math.inf]))


def test_weights_have_one_scale_a_channel() -> None:
    network = build("residual_cnn")
    described = {one.name: one for one in describe_weights(network)}
    assert all(one.values is not None and len(one.shape) > 1 for one in described.values())
    weight = dict(network.module.named_parameters())["fc.weight"].detach()
    values = described["fc.weight"].values
    assert values is not None
    for bits in (4, 8):
        integers = Integers.signed(bits)
        scale = symmetric(weight.abs().amax(1), integers)
        rounded = fake_quantize(weight, scale, torch.zeros(()), integers, 0)
        noise = (weight - rounded).square().sum() / weight.square().sum()
        assert values.noise[bits] == pytest.approx(float(noise), rel=1e-4)


@pytest.mark.parametrize("name", ["grouped_cnn", "encoder", "lstm", "unet"])
def test_every_network_can_be_looked_at(name: str, tmp_path: Path) -> None:
    found = tinier.inspect(build(name), data=inputs(name, 6), distributions=True)
    kinds = [one.kind for one in found.distributions]
    assert {"weight", "activation"} <= set(kinds)
    assert found.examples == 6
    json.dumps(found.as_dict(), allow_nan=False)
    found.write_distributions(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<figure") == len(found.distributions)
    for width in (80, 120, 200):
        console = Console(width=width, no_color=True)
        with console.capture() as captured:
            for table in distribution_tables(found.distributions, width):
                console.print(table)
        lines = captured.get().rstrip("\n").split("\n")
        assert len(lines) == len(found.distributions) + len(set(kinds))
        assert all(len(line) <= width for line in lines)
        assert lines[0].split()[-1] == "bits"


def test_what_is_infinite_is_said() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x).masked_fill(x > 0, float("-inf")).softmax(-1)

    network = Network(Masked(), {"x": torch.randn(2, 4)})
    found = tinier.inspect(network, data={"x": values(40).view(10, 4)}, distributions=True)
    assert [one.name for one in found.distributions if one.values is None] == ["masked_fill"]
    assert "NaN or infinity" in str(found)
    json.dumps(found.as_dict(), allow_nan=False)


def test_sparklines() -> None:
    assert sparkline([0, 0, 1, 0, 0, 0, 99, 1], 4) == " ▂ █"
    assert sparkline([0.0] * 32) == " " * 32
    assert sparkline([5.0] * 64) == "█" * 32


class Outside(HTMLParser):
    """Addresses that a page would load, and its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "onload")]
        self.found += [tag] * (tag in ("script", "link", "img", "iframe"))


def test_the_page_loads_nothing_and_escapes_names(tmp_path: Path) -> None:
    network = Network(build("mlp").module, build("mlp").example, "<script>alert(1)</script>")
    found = tinier.inspect(network, distributions=True)
    assert {one.kind for one in found.distributions} == {"weight"}
    found.write_distributions(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    outside = Outside()
    outside.feed(page)
    assert outside.found == []
    assert "fc1.<wbr>weight" in page and "alert(1)" in page
    assert "default-src 'none'; script-src 'none'" in page
    with pytest.raises(OutputError, match="name a file in a folder that exists"):
        found.write_distributions(tmp_path / "missing" / "page.html")
    with pytest.raises(InputError, match="distributions=True"):
        tinier.inspect(network).write_distributions(tmp_path / "page.html")


def test_command_line(files: Path, tmp_path: Path) -> None:
    run = CliRunner()
    page = tmp_path / "distributions.html"
    model, data = str(files / "model.onnx"), str(files / "valid.npz")
    asked = ["inspect", model, "--distributions", "--data", data]
    done = run.invoke(cli.app, [*asked, "-o", str(page)])
    assert done.exit_code == 0, done.output
    assert "fc1" in done.stdout and "dB 8" in done.stdout and "█" in done.stdout
    assert page.read_text(encoding="utf-8").count("<figure") > 3
    found = json.loads(run.invoke(cli.app, [*asked, "--json"]).stdout)
    assert found["examples"] == 512
    assert {one["kind"] for one in found["distributions"]} == {"weight", "activation"}
    first = found["distributions"][0]
    assert set(first["decibels"]) == {"4", "8"}
    assert sum(first["values"]["bars"]) == pytest.approx(first["values"]["count"])
    missing = run.invoke(cli.app, [*asked, "-o", str(tmp_path / "no" / "page.html")])
    assert missing.exit_code == 2
