"""A straight line for each channel, where an activation function was."""

from torch import Tensor, nn


class ChannelAffine(nn.Module):
    """y = slope · x + intercept for each channel; both can be trained.

    Args:
        slope: (channels,).
        intercept: (channels,).
        dim: the dimension of the channels, of an input with a batch.
    """

    def __init__(self, slope: Tensor, intercept: Tensor, dim: int) -> None:
        super().__init__()
        self.slope = nn.Parameter(slope.clone())
        self.intercept = nn.Parameter(intercept.clone())
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """The lines, on an input of any number of dimensions."""
        shape = [1] * x.ndim
        shape[self.dim] = -1
        return x * self.slope.view(shape) + self.intercept.view(shape)

    def extra_repr(self) -> str:
        """For printing."""
        return f"{len(self.slope)}, dim={self.dim}"
