"""Inputs made from the network alone, for where there are no data: what its batch norms remember of those it was trained on."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from tinier.data.base import Arrays, Examples
from tinier.data.check import class_axis
from tinier.errors import InputError
from tinier.graph.rules import operator_name
from tinier.network import Network
from tinier.units import is_whole

LEAST_VARIANCE = 1e-5


def synthetic_inputs(
    network: Network,
    count: int = 256,
    *,
    batch: int = 64,
    steps: int = 200,
    lr: float = 0.1,
    classes: float = 0.1,
    seed: int = 0,
    progress: Callable[[float, float], None] | None = None,
) -> Examples:
    """Noise that is changed until each batch norm reads values of the mean and variance that it remembers.

        Σ_norms mean_channels [ (μ(x) − μ)² / σ² + (log σ²(x) − log σ²)² ] + classes · CE(y(x), random classes)

    Args:
        network: with batch norms that keep statistics; left as it is.
        count: how many inputs.
        batch: inputs that are changed together: their statistics are matched.
        steps: of Adam, for each batch.
        lr: its learning rate, falling to 0 as a cosine.
        classes: weight of the cross-entropy to classes drawn evenly, where the first output has an axis of classes: variety.
        seed: of the noise and the classes.
        progress: called with the part done, in [0, 1], and the loss.

    Returns:
        (count, …) inputs without labels.

    Raises:
        InputError: the network has no batch norms that keep statistics, or inputs that are no floats.

    Cost:
        ``steps`` runs forward and backward for each input.

    Source:
        Cai et al. 2020, "ZeroQ", equation 2; Yin et al. 2020, "Dreaming to distill via DeepInversion", equation 4 and the loss of classes.

    Differs:
        Variances are compared by their logarithms, so that channels of other scales weigh the same; no prior of images is used.
    """
    if not (is_whole(count) and count > 0):
        raise InputError(f"synthetic inputs: {count!r} were asked for; 1 or more are possible")
    floats = {name: value for name, value in network.example.items() if value.is_floating_point()}
    if len(floats) != len(network.example):
        other = next(name for name in network.example if name not in floats)
        raise InputError(
            f"without data: the input {other} of {network.name} is {network.example[other].dtype}, and only floats can be made up; "
            "give data"
        )
    module = network.traced.module
    norms = [node for node in module.graph.nodes if _remembers(node)]
    if not norms:
        raise InputError(
            f"without data: {network.name} has no batch norms whose statistics say what its inputs were like; give data"
        )
    size = batch if network.traced.batched else len(next(iter(floats.values())))
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-count // size)
    made: list[dict[str, Tensor]] = []
    for number in range(rounds):
        inputs = {
            name: torch.randn(size, *value.shape[1:], generator=generator).requires_grad_(True)
            for name, value in floats.items()
        }
        optimizer = torch.optim.Adam(inputs.values(), lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        labels: Tensor | None = None
        for step in range(steps):
            reader = _Reader(module)
            outputs = reader.run(*inputs.values())
            loss = torch.stack(reader.losses).sum()
            first = outputs[0] if isinstance(outputs, list | tuple) else outputs
            axis = class_axis(first.shape) if isinstance(first, Tensor) else None
            if classes and axis is not None:
                scores = first.movedim(axis, 1)
                if labels is None:
                    shape = (scores.shape[0], *scores.shape[2:])
                    labels = torch.randint(0, scores.shape[1], shape, generator=generator)
                loss = loss + classes * F.cross_entropy(scores, labels)
            gradients = torch.autograd.grad(loss, list(inputs.values()))
            for value, gradient in zip(inputs.values(), gradients, strict=True):
                value.grad = gradient
            optimizer.step()
            schedule.step()
            if progress is not None:
                progress((number + (step + 1) / steps) / rounds, loss.item())
        made.append({name: value.detach() for name, value in inputs.items()})
    whole = {name: torch.cat([part[name] for part in made])[:count] for name in floats}
    return Examples(Arrays(whole), origin=f"{count} synthetic inputs")


def _remembers(node: fx.Node) -> bool:
    return operator_name(node) == "batch_norm" and len(node.args) > 4 and node.args[3] is not None


class _Reader(fx.Interpreter):
    """Runs a graph and notes how far what its batch norms read is from what they remember."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.losses: list[Tensor] = []

    def run_node(self, n: fx.Node) -> Any:
        if _remembers(n):
            args, _ = self.fetch_args_kwargs_from_env(n)
            values, mean, variance = args[0], args[3], args[4].clamp_min(LEAST_VARIANCE)
            flat = values.movedim(1, 0).flatten(1)  # (channels, everything else)
            spread = flat.var(1, correction=0).clamp_min(LEAST_VARIANCE)
            means = (flat.mean(1) - mean).square() / variance
            self.losses.append((means + (spread.log() - variance.log()).square()).mean())
        return super().run_node(n)
