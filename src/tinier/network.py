"""A network: a module, what goes into it, and the traced graph of what it computes."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tinier.errors import ModelError, RefusedError
from tinier.graph import trace as tracing
from tinier.graph.trace import Traced
from tinier.modules.masked import masks_of, release

# What networks take: by name, by position, or the only input.
Inputs = Mapping[str, Tensor] | Sequence[Tensor] | Tensor
Array = np.ndarray[Any, Any]
Example = Inputs | Mapping[str, Array] | Sequence[Array] | Array


@dataclass(frozen=True, eq=False)
class Network:
    """An ``nn.Module``, named example inputs and, made when first asked for, the traced graph.

    Attributes:
        module: runnable and trainable; tinier never changes it, edits make new networks.
        example: input name → tensor; dimension 0 of each is the batch, 2 or more where the model's batch size is free.
        name: what tables and files call it.
        folder: the Hugging Face directory it came from, whose tokenizer and config travel with its artifacts.
        notes: what the user should know of how it was read, a sentence each.
    """

    module: nn.Module
    example: Mapping[str, Tensor]
    name: str = "model"
    folder: Path | None = field(default=None)
    notes: tuple[str, ...] = ()

    @cached_property
    def traced(self) -> Traced:
        """The graph in evaluation mode; its parameters share the module's memory; made once."""
        return tracing.trace(self._plain(), self.example)

    def exported(self) -> "Network":
        """The same network, traced by ``torch.export``: slower, for where a recording has missed something."""
        result = replace(self)
        vars(result)["traced"] = tracing.by_export(self._plain(), self.example)
        return result

    def _plain(self) -> nn.Module:
        """The module; weights that are held at zero are plain zeros."""
        if not masks_of(self.module):
            return self.module
        module = copy.deepcopy(self.module)
        release(module)
        return module

    def __call__(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Outputs in evaluation mode, without gradients, flattened to a tuple of tensors."""
        with tracing.evaluating(self.module), torch.no_grad():
            return tracing.leaves(tracing.isolated(self.module, inputs))

    def batch(self, size: int) -> dict[str, Tensor]:
        """The example repeated or cut to a batch of ``size``."""
        return {
            name: tensor.repeat(-(-size // len(tensor)), *[1] * (tensor.ndim - 1))[:size]
            for name, tensor in self.example.items()
        }

    def noted(self, *notes: str) -> "Network":
        """The same network, of which there is more to say; its trace is kept."""
        if not notes:
            return self
        result = replace(self, notes=(*self.notes, *notes))
        if "traced" in vars(self):
            vars(result)["traced"] = self.traced
        return result

    def need_values(self, to: str) -> None:
        """Refuse a network on the meta device, which has shapes only.

        Args:
            to: what values are needed for, after "no values to".

        Raises:
            RefusedError: there is one parameter or buffer without values.
        """
        tensors = (*self.module.named_parameters(), *self.module.named_buffers())
        empty = next((name for name, tensor in tensors if tensor.is_meta), None)
        if empty is not None:
            raise RefusedError(
                f"{empty} is on the meta device and has no values to {to}; load the weights first"
            )

    def copy(self) -> "Network":
        """The same network with a module of its own."""
        return replace(self, module=copy.deepcopy(self.module))


def as_tensors(example: Example | None, kind: torch.dtype = torch.float32) -> Inputs | None:
    """An example with tensors in place of NumPy arrays.

    Args:
        example: of arrays, tensors or both.
        kind: the type of arrays of float64, which NumPy makes where nothing else is asked for.
    """

    def tensor(value: Any) -> Any:
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
            return value  # what is neither is refused with its name
        return torch.from_numpy(value.copy()).to(kind if value.dtype == np.float64 else None)

    if isinstance(example, Mapping):
        return {name: tensor(value) for name, value in example.items()}
    if example is None or isinstance(example, Tensor):
        return example
    return (tensor(example),) if isinstance(example, np.ndarray) else [*map(tensor, example)]


def name_inputs(module: nn.Module, example: Inputs) -> dict[str, Tensor]:
    """Example inputs by name: the names that the module's ``forward`` gives its positional arguments.

    Args:
        module: the network.
        example: a tensor, a tuple of positional inputs, or a dict of keyword inputs.

    Returns:
        input name → tensor.

    Raises:
        ModelError: more inputs than ``forward`` takes, or an unknown name.
    """
    parameters: dict[str, Any] = dict(signature(module.forward).parameters)
    positional = [
        name
        for name, parameter in parameters.items()
        if parameter.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    ]
    nameless = ""
    if any(p.kind is Parameter.VAR_POSITIONAL for p in parameters.values()):
        nameless = (
            f"{type(module).__name__}.forward takes *args, which have no names; name its inputs, as in "
            "forward(self, x, mask), or give a module around it that does"
        )
    if isinstance(example, Mapping):
        named = dict(example)
        takes_any = any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values())
        unknown = [name for name in named if name not in parameters and not takes_any]
        if unknown and nameless:
            raise ModelError(nameless)
        if unknown:
            raise ModelError(
                f"{type(module).__name__}.forward has no input {', '.join(unknown)}; "
                f"it takes {', '.join(positional)}"
            )
    else:
        values = [example] if isinstance(example, Tensor) else list(example)
        if len(values) > len(positional) and nameless:
            raise ModelError(nameless)
        if len(values) > len(positional):
            raise ModelError(
                f"the example has {len(values)} inputs, but {type(module).__name__}.forward takes "
                f"{len(positional)}: {', '.join(positional)}"
            )
        named = dict(zip(positional, values, strict=False))
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise ModelError(f"example input {name}: {type(value).__name__}, a tensor is needed")
    return named
