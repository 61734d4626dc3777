"""The user's Keras model with other layers: lines for activation functions, one layer for two, nothing for a block."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from tinier.edits.stock_keras import kinds_of
from tinier.errors import ModelError
from tinier.graph.activations import Activation, Line
from tinier.graph.macs import module_path
from tinier.graph.neighbours import Neighbours
from tinier.modules.keras import KerasModule
from tinier.modules.keras_parts import operations
from tinier.modules.keras_rebuild import rebuilt

# Layers that take a line into their own kernel and bias → the kernel's dimension of outputs.
OUTPUTS = {
    "Dense": -1,
    **dict.fromkeys(("Conv1D", "Conv2D", "Conv3D"), -1),
    **dict.fromkeys(("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"), -2),
}


def with_lines(module: KerasModule, found: Iterable[tuple[Activation, Line]]) -> KerasModule | None:
    """The model with lines in place of some activation functions; None where a layer cannot hold one.

    An ``activation=`` of a layer becomes linear, and its line goes into kernel and bias; an activation layer becomes ``Rescaling``.

    Args:
        module: left as it is.
        found: activations and their lines.
    """
    layers = {module.paths[id(operation)]: operation for operation, _ in operations(module.model)}
    values = {name: variable.value.detach() for name, variable in module.variables.items()}
    configs: dict[str, dict[str, Any]] = {}
    instead: dict[str, tuple[str, dict[str, Any]]] = {}
    for one, line in found:
        path = module_path(one.node)
        layer, kernel = layers.get(path), f"{path}.kernel"
        outputs = next((OUTPUTS[kind] for kind in kinds_of(layer) if kind in OUTPUTS), None)
        if outputs is not None and kernel in values:
            slope, intercept = line.slope.to(values[kernel]), line.intercept.to(values[kernel])
            if values[kernel].shape[outputs] != len(slope):
                return None
            shape = [1] * values[kernel].ndim
            shape[outputs] = -1
            values[kernel] = values[kernel] * slope.view(shape)
            bias = values.get(f"{path}.bias")
            values[f"{path}.bias"] = intercept if bias is None else bias * slope + intercept
            configs[path] = {"activation": "linear", "use_bias": True}
        elif layer is not None and not layer.variables and one.dim == one.node.meta["val"].ndim - 1:
            ends = {"scale": line.slope.tolist(), "offset": line.intercept.tolist()}
            instead[path] = ("Rescaling", ends)
        else:
            return None
    return _made(module, configs, instead, values)


def merged_dense(
    module: KerasModule, pair: Neighbours, weight: Tensor, bias: Tensor
) -> KerasModule | None:
    """The model with one ``Dense`` layer for two, the second one an ``Identity``; None where they are others.

    Args:
        module: left as it is.
        pair: the layers.
        weight: (in, out) of the one.
        bias: (out,) of it, without that of the second layer, which the graph adds by itself.
    """
    layers = {module.paths[id(operation)]: operation for operation, _ in operations(module.model)}
    first, second = module_path(pair.first.node), module_path(pair.second.node)
    between = {module_path(node) for node in pair.between} - {first}
    if any("Dense" not in kinds_of(layers.get(path)) for path in (first, second)):
        return None
    if any(path not in layers or layers[path].variables for path in between):
        return None
    values = {name: variable.value.detach() for name, variable in module.variables.items()}
    own = [name for name in values if name.startswith(f"{second}.")]
    last = values.get(f"{second}.bias")
    for name in own:
        del values[name]
    values[f"{first}.kernel"] = weight.detach()
    values[f"{first}.bias"] = bias.detach() if last is None else bias.detach() + last
    activation = layers[second].get_config()["activation"]
    configs = {first: {"units": weight.shape[1], "use_bias": True, "activation": activation}}
    instead = {path: ("Identity", dict[str, Any]()) for path in (*between, second)}
    return _made(module, configs, instead, values)


def without_blocks(module: KerasModule, paths: Iterable[str]) -> KerasModule | None:
    """The model with an ``Identity`` in place of some layers or nested models; None where Keras cannot build it.

    Args:
        module: left as it is.
        paths: of the layers.
    """
    values = {
        name: variable.value.detach()
        for name, variable in module.variables.items()
        if not any(name.startswith(f"{path}.") for path in paths)
    }
    return _made(module, {}, {path: ("Identity", {}) for path in paths}, values)


def _made(
    module: KerasModule,
    configs: dict[str, dict[str, Any]],
    instead: dict[str, tuple[str, dict[str, Any]]],
    values: dict[str, Tensor],
) -> KerasModule | None:
    try:
        result = KerasModule(rebuilt(module.model, configs, instead), module)
        result.assign(values)
    except ModelError:  # the traced graph stands in
        return None
    return result.train(module.training)
