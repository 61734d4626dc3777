"""Torch-Pruning on one network of ``pruning_engine.py``, in its own environment: dependency graph, scores and one step."""

import time

import torch
import torch_pruning
from peers import answer, request
from pruning_engine import real

RATIO = 0.3  # of the channels: about half of the MACs


def main() -> None:
    """Read the request, prune, answer."""
    torch.set_num_threads(1)
    name = request()["name"]
    module, example = real(name, 1)
    last = "query", "key", "value", "q_proj", "k_proj", "v_proj"
    heads = {part: 12 for path, part in module.named_modules() if path.endswith(last)}
    classifier = [part for path, part in module.named_modules() if path.startswith("classifier")]
    before, _ = torch_pruning.utils.count_ops_and_params(module, example)
    start = time.perf_counter()
    pruner = torch_pruning.pruner.BasePruner(
        module,
        example,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=RATIO,
        ignored_layers=classifier,
        num_heads=heads,
        prune_num_heads=bool(heads),
        prune_head_dims=not heads,
        head_pruning_ratio=RATIO,
        output_transform=lambda output: output.logits.sum(),
    )
    built = time.perf_counter()
    pruner.step()
    end = time.perf_counter()
    after, _ = torch_pruning.utils.count_ops_and_params(module, example)
    answer(
        {
            "seconds": end - start,
            "graph": built - start,
            "step": end - built,
            "macs_left": after / before,
        }
    )


if __name__ == "__main__":
    main()
