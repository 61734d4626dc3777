"""One row of ``pruning_quality.py`` by Torch-Pruning: run by ``run_peer`` in an environment that has it.

As in its own examples: ResNet-20 as ``benchmarks/main.py`` (pruned step by step until the MACs are reached, the classifier ignored,
importance measured again at every step), locally or globally; transformers as ``examples/transformers`` (heads and widths by one ratio,
head counts put right afterwards), the whole width or, with its option ``bottleneck``, only inside attention and feed-forward blocks.
Importance is ``GroupMagnitudeImportance(p=2)`` or ``GroupTaylorImportance()``, the latter with the gradients of the labelled calibration
examples.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
import torch_pruning as tp
from peers import answer, request
from pruning_quality_tasks import RECIPES, Data, Inputs, Task, accuracy, logits, macs, task, tune
from torch import nn

STEPS = 100  # of the pruning of ResNet-20
GRADIENT = 256  # examples of a gradient at each of them
TRIES = 8  # of the ratio of transformers
OVER = 1.02  # its widths move together, so that its costs are coarse: it may have up to 2 % more MACs than asked for


def gradients(model: nn.Module, data: Data) -> None:
    model.zero_grad()
    for batch in data.batches(64):
        loss = F.cross_entropy(logits(model, batch.inputs), batch.labels, reduction="sum")
        (loss / len(data)).backward()


def importance(kind: str) -> tp.importance.Importance:
    if kind == "l2":
        return tp.importance.GroupMagnitudeImportance(p=2)
    return tp.importance.GroupTaylorImportance()


def convolutional(task: Task, kind: str, way: str, most: float, data: Data) -> nn.Module:
    model = task.model()
    example = task.example["x"][:1]
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=importance(kind),
        global_pruning=way == "global",
        pruning_ratio=1.0,
        max_pruning_ratio=0.9 if way == "global" else 1.0,
        iterative_steps=STEPS,
        ignored_layers=[model.fc],
    )
    for _ in range(STEPS):
        if kind == "taylor":
            gradients(model, data.part(slice(0, GRADIENT)))
        pruner.step()
        if macs(model, task.example) <= most:
            break
    return model


def transformer(task: Task, kind: str, way: str, most: float, data: Data) -> nn.Module:
    """The largest transformer of at most that many MACs, the ratio found by bisection."""
    low, high, best = 0.0, 1.0, None
    for _ in range(TRIES):
        ratio = (low + high) / 2
        try:
            model = by_ratio(task, kind, way, ratio, data)
            small = macs(model, task.example) <= most
        except (RuntimeError, ZeroDivisionError):  # nothing of a layer is left
            model, small = None, True
        if small:
            high = ratio
            best = best if model is None else model
        else:
            low = ratio
    if best is None:
        raise ValueError("no ratio gives so few MACs")
    return best


def by_ratio(task: Task, kind: str, way: str, ratio: float, data: Data) -> nn.Module:
    model = task.model()
    if kind == "taylor":
        gradients(model, data)
    attention = [
        m for m in model.modules() if hasattr(m, "query") and isinstance(m.query, nn.Linear)
    ]
    heads = {
        layer: getattr(m, "num_heads", None) or m.num_attention_heads
        for m in attention
        for layer in (m.query, m.key, m.value)
    }
    ignored: list[nn.Module] = [model.head if task.name == "vit" else model.classifier]
    if way == "bottleneck":
        ignored += residual(model, task.name)
    inputs: Inputs = {name: value[:1] for name, value in task.example.items()}
    pruner = tp.pruner.BasePruner(
        model,
        inputs["x"] if task.name == "vit" else inputs,
        importance=importance(kind),
        global_pruning=False,
        pruning_ratio=ratio,
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=ratio,
        ignored_layers=ignored,
        output_transform=None if task.name == "vit" else lambda out: out.logits.sum(),
    )
    pruner.step()
    for m in attention:
        count = pruner.num_heads[m.query]
        if task.name == "vit":
            m.num_heads = count
        else:
            m.num_attention_heads = count
            m.attention_head_size = m.query.out_features // count
            m.all_head_size = m.query.out_features
    return model


def residual(model: nn.Module, name: str) -> list[nn.Module]:
    """The layers that write the residual stream."""
    if name == "vit":
        found: list[nn.Module] = [model.patches]
        for layer in model.layers:
            found += [layer.attention.out, layer.fc2]
        return found
    found = [m for m in model.bert.embeddings.modules() if isinstance(m, nn.Embedding)]
    for layer in model.bert.encoder.layer:
        found += [layer.attention.output.dense, layer.output.dense]
    return [*found, model.bert.pooler.dense]


def main() -> None:
    asked = request()
    torch.set_num_threads(asked["threads"])
    own = task(asked["task"], Path(asked["spam"]) if asked["spam"] else None)
    data = own.calibration(asked["seed"])
    whole = macs(own.model(), own.example)
    prune = convolutional if asked["task"] == "resnet20" else transformer
    model = prune(own, asked["kind"], asked["way"], OVER * asked["keep"] * whole, data)
    result = {
        "macs": macs(model, own.example) / whole,
        "one_shot": accuracy(model, own.test),
        "one_shot_valid": accuracy(model, own.valid),
    }
    model.zero_grad(set_to_none=True)
    tuned = tune(model, own.train, RECIPES[asked["task"]], asked["seed"])
    result |= {"tuned": accuracy(tuned, own.test), "tuned_valid": accuracy(tuned, own.valid)}
    answer(result)


if __name__ == "__main__":
    main()
