"""What stands where a block was dropped."""

from typing import Any

from torch import nn


class Skip(nn.Module):
    """Gives back its first argument, as the block that it replaces would if its branches were zero.

    Args:
        wrapped: whether the block gave a tuple.
    """

    def __init__(self, wrapped: bool = False) -> None:
        super().__init__()
        self.wrapped = wrapped

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """``x``, in a tuple if ``wrapped``."""
        return (x,) if self.wrapped else x

    def extra_repr(self) -> str:
        """For printing."""
        return "wrapped=True" if self.wrapped else ""
