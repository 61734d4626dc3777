"""A traced graph in canonical form for quantization: batch norms folded, no operators that do nothing, nothing in place."""

import copy
from collections.abc import Container

import torch
from torch import Tensor, fx, nn

from tinier.errors import RefusedError

aten = torch.ops.aten

# Operators with a weight (outputs, …) as argument 1 and a bias as argument 2.
_WEIGHTED = {
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
    aten.linear.default,
}
_BATCH_NORM = aten.batch_norm.default
# In evaluation these return their first argument.
_NOTHING = {
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
}


def fold(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a traced graph with batch norms folded into the convolutions and linear layers before them.

        w' = w · γ / √(σ² + ε),   b' = (b − μ) · γ / √(σ² + ε) + β

    Also: operators that do nothing in evaluation are left out, in-place operators become ordinary ones, and means over the
    spatial dimensions keep them (a reshape drops them), which is the form that runtimes have an integer operator for.
    Node names are those of the traced graph, so equal graphs give equal names.

    Args:
        module: the traced graph (`Traced.module`); left as it is.

    Returns:
        A graph that computes the same, to rounding, with its own parameters.

    Cost:
        One copy of the parameters.
    """
    folded = copy.deepcopy(module)
    graph = folded.graph
    for node in list(graph.nodes):
        if node.op == "call_function":
            _in_place_to_ordinary(node)
    for node in list(graph.nodes):
        if node.target in _NOTHING:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    for node in list(graph.nodes):
        if node.target is _BATCH_NORM:
            _fold_batch_norm(folded, node)
        elif node.target is aten.mean.dim:
            _keep_dimensions(node)
    graph.eliminate_dead_code()
    return pruned(folded)


def pruned(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph with only the parameters and buffers that it reads."""
    root = nn.Module()
    for node in module.graph.find_nodes(op="get_attr"):
        if read(root, node.target) is None:
            write(root, node.target, read(module, node.target))
    return fx.GraphModule(root, module.graph).eval()


def read(root: nn.Module, name: str) -> Tensor | None:
    """The parameter or buffer at a dotted name; None where there is none."""
    value: object = root
    for part in name.split("."):
        value = getattr(value, part, None)
    return value if isinstance(value, Tensor) else None


def write(root: nn.Module, name: str, value: Tensor | None) -> None:
    """Put a parameter or buffer at a dotted name, in place of what is there; modules on the way are made."""
    *path, leaf = name.split(".")
    owner = root
    for part in path:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    owner._parameters.pop(leaf, None)
    owner._buffers.pop(leaf, None)
    if isinstance(value, nn.Parameter):
        owner.register_parameter(leaf, value)
    else:
        owner.register_buffer(leaf, value)


def parameter_of(node: object) -> str | None:
    """Name of the parameter or buffer that an argument reads directly."""
    return str(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else None


def _in_place_to_ordinary(node: fx.Node) -> None:
    """relu_(x) becomes relu(x), and who reads x afterwards reads the result."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return
    name = target._schema.name.removeprefix("aten::")
    if not (name.endswith("_") and target._schema.arguments[0].alias_info is not None):
        return
    packet = getattr(aten, name[:-1], None)
    ordinary = getattr(packet, target._overloadname, None)
    changed = node.args[0]
    if ordinary is None or not isinstance(changed, fx.Node):
        return
    base = changed
    while isinstance(base.args[0] if base.args else None, fx.Node) and _is_view(base):
        base = base.args[0]  # type: ignore[assignment]
        if len(base.users) > 1:
            raise RefusedError(
                f"{node.name} ({name}) changes a part of {base.name} in place, which is read later; "
                "write it as a new tensor"
            )
    node.target = ordinary
    order = {other: index for index, other in enumerate(node.graph.nodes)}
    changed.replace_all_uses_with(
        node, delete_user_cb=lambda user: user is not node and order[user] > order[node]
    )


def _is_view(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and any(
        result.alias_info is not None for result in target._schema.returns
    )


def _fold_batch_norm(module: fx.GraphModule, norm: fx.Node) -> None:
    before, *tensors = norm.args[:5]
    eps = norm.args[7]
    if norm.args[5]:
        return  # it normalises by the batch even now
    assert isinstance(eps, float)
    if not isinstance(before, fx.Node) or before.target not in _WEIGHTED or len(before.users) != 1:
        return
    names = [parameter_of(tensor) for tensor in (before.args[1], *tensors)]
    bias_node = before.args[2] if len(before.args) > 2 else None
    if (
        names[0] is None
        or names[3] is None
        or (bias_node is not None and not parameter_of(bias_node))
    ):
        return
    if len(norm.meta["val"].shape) > 2 and before.target is aten.linear.default:
        return  # the norm's channels are dimension 1, the layer's the last
    weight, gamma, beta, mean, variance = (
        None if name is None else read(module, name) for name in names
    )
    assert weight is not None and mean is not None and variance is not None
    bias = None if bias_node is None else read(module, str(parameter_of(bias_node)))
    factor = (variance.double() + eps).rsqrt()
    if gamma is not None:
        factor = factor * gamma.detach().double()
    shift = (0 if bias is None else bias.detach().double()) - mean.double()
    new_bias = shift * factor + (0 if beta is None else beta.detach().double())
    new_weight = weight.detach().double() * factor.reshape(-1, *[1] * (weight.ndim - 1))
    weight_name = _free(module, names[0], before)
    # A layer without bias gets one beside its weight.
    stem = names[0].rpartition(".")[0]
    wanted = parameter_of(bias_node) or (f"{stem}.bias" if stem else f"{names[0]}_bias")
    bias_name = _free(module, wanted, before)
    write(module, weight_name, nn.Parameter(new_weight.to(weight.dtype), weight.requires_grad))
    write(module, bias_name, nn.Parameter(new_bias.to(weight.dtype), weight.requires_grad))
    with module.graph.inserting_before(before):
        pair = [module.graph.get_attr(weight_name), module.graph.get_attr(bias_name)]
    for node in pair:
        node.meta["val"] = read(module, str(node.target))
    before.args = (before.args[0], *pair, *before.args[3:])
    norm.replace_all_uses_with(before)
    module.graph.erase_node(norm)


def _free(module: fx.GraphModule, name: str, reader: fx.Node) -> str:
    """The name itself where only ``reader`` reads it, else one that nothing has."""
    readers = {
        user
        for node in module.graph.find_nodes(op="get_attr")
        if node.target == name
        for user in node.users
    }
    value = read(module, name)
    holders = sum(one is value for _, one in module.named_parameters(remove_duplicate=False))
    if readers <= {reader} and holders <= 1:
        return name
    number = 2
    while read(module, f"{name}_{number}") is not None:
        number += 1
    return f"{name}_{number}"


def _keep_dimensions(node: fx.Node) -> None:
    """mean(x, spatial, keepdim=False) becomes flatten(mean(x, spatial, keepdim=True))."""
    source, dims = node.args[:2]
    keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    if not isinstance(source, fx.Node) or keep or not spatial(source, dims):
        return
    value = node.meta["val"]
    node.args = (source, dims, True)
    node.kwargs = {}
    with node.graph.inserting_after(node):
        flat = node.graph.call_function(aten.flatten.using_ints, (node, 1))
    flat.meta["val"] = value
    node.meta["val"] = value.reshape(*value.shape, *[1] * (source.meta["val"].ndim - 2))
    node.replace_all_uses_with(flat, delete_user_cb=lambda user: user is not flat)


def spatial(source: fx.Node, dims: object) -> bool:
    """Whether ``dims`` are all dimensions after the channels of an image or signal."""
    rank = source.meta["val"].ndim
    if rank < 4 or not isinstance(dims, list | tuple):
        return False
    return {int(dim) % rank for dim in dims} == set(range(2, rank))


def layer_before(norm: fx.Node, kept: Container[str]) -> fx.Node | None:
    """What makes the input of a norm that folding made part of it: what does nothing in evaluation, as dropout, may lie between.

    Args:
        norm: a node of the graph before folding.
        kept: names of the nodes of the folded graph.
    """
    source = norm.args[0]
    while isinstance(source, fx.Node) and source.name not in kept and source.args:
        source = source.args[0]
    return source if isinstance(source, fx.Node) and source.name in kept else None
