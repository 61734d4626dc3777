"""Devices and processes of a training: each process computes the gradients of its share of a batch, and all take their mean."""

from collections.abc import Sequence

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, reduce
from torch import Tensor, nn

from tinier.errors import InputError


class Workers:
    """The processes that train together, as ``accelerate launch`` or ``torchrun`` started them: alone, one.

    The module is not wrapped: what it is called with, its mode and its names stay as they are.

    Args:
        device: a torch device; None for the one that accelerate finds where that is a GPU with CUDA, else the CPU.

    Attributes:
        device: where this process computes.
        count: how many processes there are.
        first: whether this is the one that writes files and speaks.
    """

    def __init__(self, device: str | torch.device | None = None) -> None:
        state = PartialState()
        try:
            found = state.device if state.device.type == "cuda" else torch.device("cpu")
            self.device = found if device is None else torch.device(device)
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(
                f"device={str(device)!r}: torch cannot use it here ({error}); "
                "leave it out, or name one such as 'cpu' or 'cuda:0'"
            ) from error
        self.count = state.num_processes
        self.index = state.process_index
        self.first = state.is_main_process

    def share(self, index: Tensor) -> Tensor:
        """This process's part of the examples of a step, (batch,) → about (batch / processes,)."""
        return index.tensor_split(self.count)[self.index]

    def mean(self, value: float) -> float:
        """The mean of a number over the processes."""
        if self.count == 1:
            return value
        # In double, so that the number is not rounded to 32 bits on its way.
        return float(reduce(torch.tensor(value, dtype=torch.float64, device=self.device), "mean"))

    def agree(self, value: float) -> float:
        """The first process's number: clocks differ."""
        return value if self.count == 1 else float(broadcast_object_list([value])[0])

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace the gradients by their means over the processes."""
        self._average([p.grad for p in parameters if p.grad is not None])

    def average_buffers(self, module: nn.Module) -> None:
        """Replace floating point buffers, such as the statistics of batch norms, by their means over the processes."""
        self._average([b for b in module.buffers() if b.is_floating_point()])

    def _average(self, tensors: list[Tensor]) -> None:
        if self.count == 1 or not tensors:
            return
        kinds = {tensor.dtype for tensor in tensors}
        for kind in sorted(kinds, key=str):
            same = [tensor for tensor in tensors if tensor.dtype == kind]
            flat = reduce(torch.cat([tensor.reshape(-1) for tensor in same]), "mean")
            for tensor, part in zip(
                same, flat.split([tensor.numel() for tensor in same]), strict=True
            ):
                tensor.copy_(part.reshape(tensor.shape))
