"""Operators that tinier writes as ONNX by itself: the files compute what torch computes, on both runtimes."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import tinier
from tinier.measure.parity import parity
from tinier.network import Network
from tinier.targets.base import Session, targets_for
from tinier.targets.onnx_file import write_onnx


def sessions(network: Network, folder: Path) -> Iterator[Session]:
    """One ONNX file on both runtimes."""
    file = folder / "made.onnx"
    write_onnx(network, file)
    for target in targets_for(("onnxruntime", "openvino")):
        yield target.open(target.lower(network, folder, file).files[0], 1)


class Recurrent(nn.Module):
    """All outputs of a plain recurrent layer, and its last hidden states."""

    def __init__(
        self, kind: str, layers: int, both: bool, bias: bool, first: bool, hidden: int = 6
    ) -> None:
        super().__init__()
        self.rnn = nn.RNN(5, hidden, layers, kind, bias, first, bidirectional=both)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found, last = self.rnn(x)
        return found, last.transpose(0, 1)


@pytest.mark.parametrize(
    ("kind", "layers", "both", "bias"),
    [("tanh", 1, False, True), ("relu", 2, True, True), ("tanh", 2, True, False)],
)
def test_plain_recurrent_layers(
    kind: str, layers: int, both: bool, bias: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    module = Recurrent(kind, layers, both, bias, first=True).eval()
    network = Network(module, {"x": torch.randn(2, 7, 5)})
    for session in sessions(network, tmp_path):
        for batch in (1, 3):
            x = torch.randn(batch, 7, 5)
            with torch.no_grad():
                wanted = module(x)
            for one, found in zip(wanted, session.run({"x": x.numpy()}), strict=True):
                np.testing.assert_allclose(found, one.numpy(), atol=2e-6)


class Behind(nn.Module):
    """A product of what a recurrent layer reads from both sides; 48 inputs are blocks, for which ONNX Runtime has kernels."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.rnn = Recurrent("tanh", 1, True, True, batch_first, hidden=24)
        self.head = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.rnn(x)[0])
        return found


@pytest.mark.parametrize("first", [True, False])
def test_integers_of_recurrent_layers_are_computed_in_float(first: bool, tmp_path: Path) -> None:
    """Only the product behind the layer may have its inputs rounded by the runtime."""
    torch.manual_seed(0)
    found = tinier.quantize(Behind(first).eval(), torch.randn(2, 2, 5), activations=None)
    for session in sessions(found.network, tmp_path):
        compared = parity(found.network, session, [{"x": torch.randn(2, 2, 5)}])
        assert compared.passed, compared.reason
    model = onnx.load(tmp_path / "made.onnx")
    blocks = [n for n in model.graph.node if any(a.name == "block_size" for a in n.attribute)]
    assert [node.input[0] for node in blocks] == ["head.weight_by_inputs"]


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.wide = nn.Conv2d(4, 32, 1)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        wide = nn.functional.relu6(self.wide(nn.functional.relu6(self.deep(x))))
        found: Tensor = self.head(nn.functional.adaptive_avg_pool2d(wide, 1).flatten(1))
        return found


def test_pooling_where_channels_lie_last(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 4, 7, 7).to(memory_format=torch.channels_last)
    found = tinier.quantize(Pooled().eval(), {"x": x[:2]}, {"x": x}, corrections=())
    for session in sessions(found.network, tmp_path):
        compared = parity(found.network, session, [{"x": x[:1]}, {"x": x}])
        assert compared.passed, compared.reason
    operators = {node.op_type for node in onnx.load(tmp_path / "made.onnx").graph.node}
    assert "GlobalAveragePool" in operators and "Gather" not in operators
