"""How well a straight line replaces an activation function, on data."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tinier.errors import DataError
from tinier.graph.activations import Activation, Line, Watched, activations
from tinier.network import Network
from tinier.statistics.finite import NotFinite, culprit


@dataclass(frozen=True)
class Fit:
    """The least-squares line of an activation, for each channel.

    Attributes:
        line: slope and intercept, (channels,) float64.
        error: Σ (y − line(x))² / Σ (y − mean y)² over all channels, in [0, 1]; 0 where it is straight on the data.
    """

    line: Line
    error: float


def fit_lines(network: Network, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Fit]:
    """Fit a line to every activation function of a network.

    With sums over examples and positions of each channel, slope = (n Σxy − Σx Σy) / (n Σx² − (Σx)²), intercept = (Σy − slope Σx) / n.

    Args:
        network: left as it is.
        batches: input name → tensor.

    Returns:
        Name of the activation → fit, in the order of the graph.

    Raises:
        DataError: no examples; NaN or infinity, with the operator.

    Cost:
        One run of the network; five numbers for each channel.
    """
    found = activations(network.traced)
    recorder = _Recorder(network.traced.module, found)
    seen = False
    for inputs in batches:
        seen = True
        ordered = [inputs[name] for name in network.traced.inputs]
        try:
            with torch.no_grad():
                recorder.run(*ordered)
        except NotFinite as where:
            raise DataError(culprit(network.traced.module, ordered, str(where))) from None
    if not seen:
        raise DataError(f"{network.name}: no examples to fit lines to; one or more are needed")
    return {one.name: recorder.fit(one) for one in found}


class _Recorder(Watched):
    """Runs the graph and adds up what the lines need."""

    def __init__(self, module: fx.GraphModule, found: tuple[Activation, ...]) -> None:
        super().__init__(module, found)
        # (6, channels): n, Σx, Σy, Σx², Σxy, Σy²
        self.sums = {one.name: torch.zeros(6, one.channels, dtype=torch.float64) for one in found}

    def run_node(self, node: fx.Node) -> Any:
        one = self.found.get(node)
        if one is None:
            return super().run_node(node)
        x = _columns(
            self.given[one.source], one.dim
        ).clone()  # an operator in place would change it
        value = super().run_node(node)
        y = _columns(value, one.dim)
        count = torch.full((one.channels,), float(x.shape[1]), dtype=torch.float64)
        self.sums[one.name] += torch.stack(
            [count, x.sum(1), y.sum(1), (x * x).sum(1), (x * y).sum(1), (y * y).sum(1)]
        ).cpu()
        if not bool(self.sums[one.name].isfinite().all()):
            raise NotFinite(one.name)
        return value

    def fit(self, one: Activation) -> Fit:
        """The line through what was seen."""
        n, x, y, xx, xy, yy = self.sums[one.name]
        spread = xx - x * x / n
        flat = spread <= 1e-12 * xx.clamp(min=1e-30)
        slope = torch.where(flat, 0.0, (xy - x * y / n) / spread.clamp(min=1e-30))
        intercept = (y - slope * x) / n
        variance = (yy - y * y / n).clamp(min=0)
        left = (variance - slope * (xy - x * y / n)).clamp(min=0)
        total = float(variance.sum())
        return Fit(Line(slope, intercept), float(left.sum()) / total if total else 0.0)


def _columns(x: Tensor, dim: int) -> Tensor:
    """(channels, everything else) float64."""
    return x.double().movedim(dim, 0).flatten(1)
