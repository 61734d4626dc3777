"""A network from a .pt2 archive of torch.export: no class is needed, and nothing in the file is run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from tinier.errors import ModelError
from tinier.graph.archive import read
from tinier.graph.states import quiet
from tinier.graph.trace import plain
from tinier.network import Inputs, Network
from tinier.sources.base import Source, present

UNKNOWN_IDS = (
    "its example inputs are zeros, for an archive keeps none: give example= with real token ids"
)


class ArchiveSource(Source):
    """A ``.pt2`` file as ``torch.export.save`` writes it; what is trained on is its graph, an ``fx.GraphModule``."""

    name = "pt2"

    def accepts(self, model: Any) -> bool:
        return isinstance(model, str | Path) and Path(model).suffix.lower() == ".pt2"

    def load(self, model: Any, example: Inputs | None) -> Network:
        path = Path(model)
        present(path)
        exported = read(path)
        positional, named = exported.example_inputs or ((), {})
        names = [node.name for node in exported.graph.find_nodes(op="placeholder")]
        names = [name for name in names if name in exported.graph_signature.user_inputs]
        known = [*[f"input_{index}" for index in range(len(positional))], *named]
        if len(known) != len(names):
            raise ModelError(
                f"{path}: its inputs are not plain tensors; export it with tensors only"
            )
        with quiet():
            module = plain(exported.module(check_guards=False), tuple(known))
        _unpacked(module, exported.call_spec.out_spec)
        zeros = dict(zip(known, (*positional, *named.values()), strict=True))
        inputs = _inputs(path, zeros, example)
        network = Network(module, inputs, path.stem)
        ids = any(not value.is_floating_point() for value in inputs.values())
        return network.noted(UNKNOWN_IDS) if ids and example is None else network


def _unpacked(module: fx.GraphModule, spec: Any) -> None:
    """Return what the archive says: a tensor, a tuple, or a dict by output name."""
    (output,) = module.graph.find_nodes(op="output")
    values: Any = output.args[0]
    if spec.type is dict:
        output.args = (dict(zip(spec.context, values, strict=True)),)
    elif len(values) == 1:
        output.args = (values[0],)
    module.recompile()


def _inputs(path: Path, zeros: dict[str, Tensor], example: Inputs | None) -> dict[str, Tensor]:
    if example is None:
        return {name: torch.zeros_like(value) for name, value in zeros.items()}
    if isinstance(example, Tensor):
        example = (example,)
    given = (
        dict(example) if isinstance(example, Mapping) else dict(zip(zeros, example, strict=False))
    )
    if set(given) != set(zeros):
        raise ModelError(
            f"{path}: the example has {', '.join(given)}; the network takes {', '.join(zeros)}"
        )
    return {name: given[name] for name in zeros}
