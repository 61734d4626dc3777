"""A torch module with example inputs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tinier.errors import ModelError
from tinier.graph.trace import check
from tinier.network import Inputs, Network, name_inputs
from tinier.sources.base import Source, first_line


class ModuleSource(Source):
    """An ``nn.Module``; the example is a tensor, a tuple of positional or a dict of keyword inputs."""

    name = "module"

    def accepts(self, model: Any) -> bool:
        return isinstance(model, nn.Module)

    def load(self, model: Any, example: Inputs | None) -> Network:
        model = unwrapped(model)
        kind = type(model).__name__
        if example is None:
            raise ModelError(
                f"{kind}: example inputs are needed to see what it computes; give example=(tensor, …) or "
                "example={'name': tensor}, a batch of 2 or more as the model gets it"
            )
        check(model)
        inputs = name_inputs(model, example)
        if not inputs:
            raise ModelError(f"{kind}: the example has no inputs")
        for name, value in inputs.items():
            if not value.ndim:
                raise ModelError(
                    f"{kind}: example input {name} is a single number; dimension 0 is the batch"
                )
            if not value.numel():
                raise ModelError(
                    f"{kind}: example input {name} is empty, {tuple(value.shape)}; give a batch of 2 or more, as the model gets it"
                )
        tensors = (*model.parameters(), *model.buffers())
        devices = {value.device for value in tensors}
        if len(devices) > 1:
            where = ", ".join(sorted(map(str, devices)))
            raise ModelError(
                f"{kind}: its parameters are on {where}; put all of them on one device"
            )
        device = devices.pop() if devices else torch.device("cpu")
        inputs = {name: value.detach().to(device) for name, value in inputs.items()}
        if device.type == "meta":
            return Network(model, inputs, kind)  # there is nothing to run
        return free_batch(model, inputs, kind)


def unwrapped(module: nn.Module) -> nn.Module:
    """The network inside of what ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel`` give."""
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif "_orig_mod" in module._modules:
            module = module.get_submodule("_orig_mod")
        else:
            return module


def free_batch(module: nn.Module, inputs: Mapping[str, Tensor], name: str) -> Network:
    """A network whose batch size is free if the module allows it; an example of one is repeated for that.

    Raises:
        ModelError: the module does not run on the example, or cannot be traced.
    """
    network = Network(module, dict(inputs), name)
    try:
        single = network(inputs)
    except Exception as error:
        shapes = ", ".join(
            f"{key} {tuple(value.shape)} {value.dtype}" for key, value in inputs.items()
        )
        raise ModelError(
            f"{name} does not run on the example ({shapes}): {first_line(error)}"
        ) from error
    if not single:
        raise ModelError(f"{name} returns no tensor")
    if any(len(value) != 1 for value in inputs.values()):
        return network if network.traced.batched else network.noted(_fixed(inputs))
    double = _doubled(network, single)
    if double is not None:
        return double
    return network if network.traced.batched else network.noted(_fixed(inputs))


def _fixed(inputs: Mapping[str, Tensor]) -> str:
    size = len(next(iter(inputs.values())))
    return f"its batch size is fixed at {size}: the model computes with it as a number"


def _doubled(network: Network, single: tuple[Tensor, ...]) -> Network | None:
    """The network with its example of one repeated, or None where that is no batch of two."""
    double = Network(network.module, network.batch(2), network.name)
    try:
        repeated = double(double.example)
        same = all(_repeats(one, two) for one, two in zip(single, repeated, strict=True))
        return double if same and double.traced.batched else None
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
        # Whatever stops a batch of two, the batch of one is what the user gave.
        return None


def _repeats(one: Tensor, two: Tensor) -> bool:
    if not one.ndim or two.shape[0] != 2 * one.shape[0]:
        return False
    return torch.allclose(torch.cat([one, one]), two, rtol=1e-3, atol=1e-4, equal_nan=True)
