"""What is kept of a pass over data."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tinier.statistics.histograms import Histograms
from tinier.statistics.lines import Fit
from tinier.statistics.sensitivity import Sensitivity
from tinier.tensors.histogram import Histogram

# What ``observe`` can collect, and what for.
NEEDS = {
    "activations": "moments of what operators read",
    "entropy": "histograms of what operators read, a mean for each example",
    "gram": "Gram matrices of the inputs of linear layers and convolutions",
    "gradients": "the gradient of the mean loss for every parameter",
    "gates": "for each example, the derivative of its loss by a factor on each channel",
    "squares": "the mean square of each example's gradient for every parameter",
    "sensitivity": "inputs of linear layers and convolutions, weighted by how much each row of the result matters",
}
# What ``collect`` can collect beside the histograms.
COLLECTS = {
    "channels": "the smallest and the largest value of each channel of the activations",
    "columns": "moments of what each column of the weights of linear, convolutional and recurrent layers is multiplied with",
    "importance": "for the bins of the histograms, how much the outputs change with their values",
}


@dataclass(frozen=True)
class Use:
    """One place where an operator reads a channel group and sums over it.

    Attributes:
        node: the operator, by its name in the graph.
        read: key of what it reads in ``Statistics.moments`` and ``histograms``: several operators may read the same.
        index: (length,) int64: for each position along the axis, its channel; −1 for those of other groups.
        layer: whether the operator is a linear layer or convolution whose weight is a parameter.
    """

    node: str
    read: str
    index: Tensor
    layer: bool


@dataclass
class Moments:
    """Sums over all values that an operator read, for each position of the axis that it sums over.

    Attributes:
        count: number of values at each position.
        total: (length,) float64, Σ a.
        absolute: (length,) float64, Σ |a|.
        squares: (length,) float64, Σ a².
        zeros: (length,) float64, how many are exactly 0.
    """

    count: int
    total: Tensor
    absolute: Tensor
    squares: Tensor
    zeros: Tensor

    @classmethod
    def empty(cls, length: int) -> "Moments":
        """Of nothing yet."""
        return cls(0, *(torch.zeros(length, dtype=torch.float64) for _ in range(4)))

    def add(self, x: Tensor) -> None:
        """Count values; ``x`` is (rows, length)."""
        x = x.double().cpu()
        self.count += len(x)
        self.total += x.sum(0)
        self.absolute += x.abs().sum(0)
        self.squares += x.square().sum(0)
        self.zeros += (x == 0).sum(0)


@dataclass
class Ends:
    """The smallest and the largest value at each position of an axis.

    Attributes:
        low: (length,) float32; +inf before the first value.
        high: (length,) float32; −inf before the first value.
    """

    low: Tensor
    high: Tensor

    @classmethod
    def empty(cls, length: int) -> "Ends":
        """Of nothing yet."""
        return cls(torch.full((length,), torch.inf), torch.full((length,), -torch.inf))

    def add(self, x: Tensor, axis: int) -> None:
        """Count values; ``x`` has the positions along ``axis``."""
        rows = x.movedim(axis, 0).flatten(1).float().cpu()
        if rows.numel():
            self.low = torch.minimum(self.low, rows.amin(1))
            self.high = torch.maximum(self.high, rows.amax(1))


@dataclass
class Gram:
    """Second moments of the rows that a linear layer or convolution multiplies with its weight matrix.

    Attributes:
        rows: number of rows: examples × positions.
        total: (g, n) float64, Σ x; g groups of a convolution, n inputs × kernel positions.
        products: (g, n, n) float64, Σ x xᵀ.
    """

    rows: int
    total: Tensor
    products: Tensor

    @classmethod
    def empty(cls, groups: int, columns: int) -> "Gram":
        """Of nothing yet."""
        wide = torch.zeros(groups, columns, dtype=torch.float64)
        return cls(0, wide, wide.new_zeros(groups, columns, columns))

    def add(self, x: Tensor) -> None:
        """Count rows; ``x`` is (g, rows, n). Products of one call are formed in float32 at least, and added up in float64."""
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        self.rows += x.shape[1]
        self.total += x.sum(1).double().cpu()
        self.products += (x.mT @ x).double().cpu()


@dataclass
class Gates:
    """Sums over examples of z = ∂L/∂m, the derivative of an example's loss by a factor m = 1 on each channel of a group.

    z = Σ a · ∂L/∂a over all positions and all places where operators read the channel.

    Attributes:
        total: (size,) float64, Σ z.
        absolute: (size,) float64, Σ |z|.
        squares: (size,) float64, Σ z².
    """

    total: Tensor
    absolute: Tensor
    squares: Tensor

    @classmethod
    def empty(cls, size: int) -> "Gates":
        """Of nothing yet."""
        return cls(*(torch.zeros(size, dtype=torch.float64) for _ in range(3)))

    def add(self, z: Tensor) -> None:
        """Count examples; ``z`` is (examples, size) float64."""
        self.total += z.sum(0)
        self.absolute += z.abs().sum(0)
        self.squares += z.square().sum(0)


@dataclass(frozen=True)
class Statistics:
    """What a pass over data found; each part is empty unless it was asked for.

    Attributes:
        activations: graph node → histogram of its values, of the network with its batch norms folded, in the order of the graph
            (``collect``, for quantization).
        examples: how many examples they are of.
        channels: graph node of ``activations`` → dimension, 1 or −1, where its size is fixed → ends of each channel (``collect``).
        columns: graph node of a linear layer or convolution → moments of each column of its weight matrix, (g · n,) (``collect``); of a
            recurrent layer for each weight apart, as `tinier.statistics.recurrent.column` names it.
        needs: what was asked of ``observe``, keys of ``NEEDS``.
        uses: channel group → the places where operators read it.
        moments: read → moments.
        histograms: read → histograms of the means over each example.
        grams: graph node → Gram matrix of its input; operators that read the same share one.
        gates: channel group → sums over examples of the derivative by a factor on each channel.
        gradients: parameter → gradient of the mean loss, of its shape, float64.
        squares: parameter → mean over examples of the squared gradient of each example's loss, of its shape, float64.
        sensitivities: graph node → weighted moments of the input of a linear layer or convolution.
        labels: "given" or "sampled" where a loss was differentiated, else "".
        samples: a few batches of inputs as they are, for methods that try what a change does.
        lines: activation function → the straight line that replaces it best (``fit_lines``).
    """

    activations: Mapping[str, Histogram]
    examples: int
    needs: frozenset[str] = frozenset()
    uses: Mapping[str, tuple[Use, ...]] = field(default_factory=dict)
    moments: Mapping[str, Moments] = field(default_factory=dict)
    histograms: Mapping[str, Histograms] = field(default_factory=dict)
    grams: Mapping[str, Gram] = field(default_factory=dict)
    gates: Mapping[str, Gates] = field(default_factory=dict)
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    squares: Mapping[str, Tensor] = field(default_factory=dict)
    labels: str = ""
    samples: tuple[Mapping[str, Tensor], ...] = ()
    lines: Mapping[str, Fit] = field(default_factory=dict)
    sensitivities: Mapping[str, Sensitivity] = field(default_factory=dict)
    channels: Mapping[str, Mapping[int, Ends]] = field(default_factory=dict)
    columns: Mapping[str, Moments] = field(default_factory=dict)
