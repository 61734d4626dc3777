"""One row of the coverage table by Torch-Pruning, unaided: run by ``run_peer`` in an environment that has it.

``MagnitudePruner`` with L2 group importance, uniform ratios (``global_pruning=False``), ``round_to`` unset, no per-model hints: no
head counts, no ignored layers but the last ``nn.Linear`` or convolution whose width is that of an output, as its examples ignore the
classifier. The ratio is searched by bisection (0.3 first, then 0.5 …, six models at most) for half the MACs, counted by
``torch.utils.flop_counter``. "Runs" is a forward pass of the example and of another batch size with the original's output shapes.
"""

from collections.abc import Mapping

import torch
import torch_pruning
from architectures import table
from architectures.base import make
from coverage_row import MORE, resized
from peers import answer, request
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from tinier.sources.load import load

TRIES = 6
NEAR = 0.02  # of half the MACs


def outputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(model(**inputs)) if isinstance(leaf, Tensor)]


def count(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        outputs(model, inputs)
    return int(counter.get_total_flops())


def last_layer(model: nn.Module, widths: set[int]) -> list[nn.Module]:
    for layer in reversed(list(model.modules())):
        if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd):
            return [layer] if layer.weight.shape[0] in widths else []
    return []


def main() -> None:
    torch.set_num_threads(1)
    architecture = table()[0][request()["name"]]
    tried: list[dict[str, float]] = []
    low, high, ratio = 0.0, 1.0, 0.3
    best: dict[str, float] | None = None
    for _ in range(TRIES):
        network = load(*make(architecture))
        model, inputs = network.module, dict(network.example)
        model.eval()
        wanted = [tuple(out.shape) for out in outputs(model, inputs)]
        before = count(model, inputs)
        size = sum(p.numel() for p in model.parameters())
        pruner = torch_pruning.pruner.MagnitudePruner(
            model,
            inputs,
            importance=torch_pruning.importance.MagnitudeImportance(p=2),
            pruning_ratio=ratio,
            global_pruning=False,
            ignored_layers=last_layer(model, {dim for shape in wanted for dim in shape[1:]}),
        )
        pruner.step()
        found = [tuple(out.shape) for out in outputs(model, inputs)]
        outputs(model, resized(inputs, MORE, {}))
        left = count(model, inputs) / before
        parameters = sum(p.numel() for p in model.parameters()) / size
        tried.append({"ratio": ratio, "macs_left": left, "parameters_left": parameters})
        if found != wanted:
            answer({"error": f"outputs {found} instead of {wanted}", "tried": tried})
            return
        if parameters < 1 and (best is None or abs(left - 0.5) < abs(best["macs_left"] - 0.5)):
            best = tried[-1]
        if best is not None:
            answer({"runs": True, **best, "tried": tried})
        if parameters == 1:
            answer({"error": "nothing was cut", "tried": tried})
            return
        if abs(left - 0.5) <= NEAR:
            return
        low, high = (ratio, high) if left > 0.5 else (low, ratio)
        ratio = 0.5 if len(tried) == 1 and left > 0.5 else (low + high) / 2


if __name__ == "__main__":
    main()
