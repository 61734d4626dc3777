"""Weights of a folded network back in the network that it was folded of, so that its own class has them."""

import torch
from torch import Tensor, fx

from tinier.edits.assign import Fold
from tinier.edits.base import Plan
from tinier.edits.mask import unmask
from tinier.errors import RefusedError
from tinier.graph.fold import fold, layer_before, parameter_of, read
from tinier.graph.groups import named_tensors
from tinier.graph.rules import operator_name
from tinier.modules.masked import masks_of
from tinier.network import Network

_SMALLEST = 1e-6  # of γ / √(σ² + ε): below, the folded weight does not say what the layer's own was
_TOLERANCE = 1e-5  # of the largest value of a tensor


def unfolded(network: Network, folded: Network) -> Network:
    """A copy of a network with weights that, folded, are those of another.

        w = w' √(σ² + ε) / γ,    β = b' − (b − μ) γ / √(σ² + ε)

    Batch norms keep μ, σ² and γ, and layers before them their own bias b. Where γ is 0 it becomes √(σ² + ε). Weights that were held at zero
    are free.

    Args:
        network: as a user's class has it; left as it is.
        folded: ``Fold`` of it, with other values of the same parameters.

    Returns:
        The copy, which computes what ``folded`` does, to float rounding.

    Raises:
        RefusedError: ``folded`` has a parameter that the network has no place for, such as the bias of a layer without one, or one that
            two norms share.

    Cost:
        Two copies of the network, and a trace.
    """
    result = unmask(network) if masks_of(network.module) else network.copy()
    own = named_tensors(result.module)
    values = {name: p.detach() for name, p in folded.module.named_parameters()}
    module = result.traced.module
    nodes = {node.name: node for node in fold(module).graph.nodes}
    with torch.no_grad():
        for norm in module.graph.nodes:
            if operator_name(norm) == "batch_norm" and norm.name not in nodes:
                before = layer_before(norm, nodes)
                if before is None:
                    raise RefusedError(f"{network.name}: {norm.name} is folded into no layer")
                _unfold(norm, before, nodes[before.name], own, values)
        for name, value in values.items():
            if name not in own or own[name].shape != value.shape:
                raise RefusedError(f"{network.name} has no place for {name}")
            own[name].copy_(value)
    again = Plan((Fold(),)).apply(Network(result.module, result.example))
    for name, wanted in folded.module.named_parameters():
        found = read(again.module, name)
        limit = _TOLERANCE * float(wanted.detach().abs().max()) if wanted.numel() else 0.0
        if found is None or float((found - wanted).detach().abs().max()) > limit:
            raise RefusedError(f"{network.name}: {name} is read in more than one way")
    return result


def _unfold(
    norm: fx.Node,
    before: fx.Node,
    layer: fx.Node,
    own: dict[str, Tensor],
    values: dict[str, Tensor],
) -> None:
    """Put a layer, as it was before and is folded, and the norm behind it right; their values are taken out of ``values``."""
    eps = norm.args[7]
    assert isinstance(eps, float)
    gamma, beta, mean, variance = (own.get(parameter_of(tensor) or "") for tensor in norm.args[1:5])
    weight_name, bias_name = (parameter_of(layer.args[place]) for place in (1, 2))
    weight = own.get(parameter_of(before.args[1]) or "")
    bias = own.get(parameter_of(before.args[2]) or "") if len(before.args) > 2 else None
    if (
        weight is None
        or mean is None
        or variance is None
        or beta is None
        or weight_name != parameter_of(before.args[1])
        or weight_name not in values
        or bias_name not in values
    ):
        raise RefusedError(f"{norm.name}: the layer before it and the norm share parameters")
    factor = (variance.double() + eps).rsqrt()
    if gamma is not None:
        alive = (gamma.double() * factor).abs() > _SMALLEST
        gamma.copy_(torch.where(alive, gamma.double(), 1 / factor).to(gamma.dtype))
        factor = factor * gamma.double()
    shift = (0 if bias is None else bias.double()) - mean.double()
    whole = values.pop(str(weight_name)).double()
    weight.copy_(whole / factor.reshape(-1, *[1] * (whole.ndim - 1)))
    beta.copy_(values.pop(str(bias_name)).double() - shift * factor)
