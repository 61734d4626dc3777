"""Names for the weights of an imported graph: as the file has them, and never one that an exporter makes up.

torch's exporter calls values ``val_13``, ``add_1`` or ``expand`` and refuses a weight of that name. The names of weights and
constants here all have a dot, which those never have.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from tinier.sources.onnx_layers import node_name

# Of layers, what their arguments are called.
ROLES = {
    "linear": ("", "weight", "bias"),
    "_conv": ("", "weight", "bias"),
    "_conv_transpose": ("", "weight", "bias"),
    "_gemm": ("", "weight", "bias"),
    "_layer_norm_single": ("", "weight", "bias"),
    "_batch_norm": ("", "weight", "bias", "running_mean", "running_var"),
}
PART = re.compile(r"[A-Za-z0-9_]+")


def untie_vectors(module: fx.GraphModule) -> None:
    """Give every layer a vector of its own.

    Exporters keep equal tensors once, and at the start of training all biases are equal; layers that only share zeros are
    not coupled. Matrices that several layers read stay one.
    """
    for node in list(module.graph.find_nodes(op="get_attr")):
        value = getattr(module, str(node.target))
        if not value.is_floating_point() or value.ndim != 1 or value.numel() <= 1:
            continue
        readers = [
            (other, user)
            for other in module.graph.find_nodes(op="get_attr")
            if other.target == node.target
            for user in other.users
        ]
        for count, (read, user) in enumerate(readers[1:], start=2):
            name = f"{node.target}_{count}"
            while hasattr(module, name):
                name += "_"
            module.register_buffer(name, value.clone())
            with module.graph.inserting_before(user):
                user.replace_input_with(read, module.graph.get_attr(name))


def rename(module: fx.GraphModule, own: Mapping[str, str]) -> None:
    """Call every weight and constant of the graph by its name in the file, if that has a dot, or else after its layer.

    Args:
        module: the graph module, whose tensors are all its own.
        own: of each tensor the name in the file.
    """
    tensors: dict[str, Tensor] = {
        **dict(module.named_parameters(recurse=False)),
        **dict(module.named_buffers(recurse=False)),
    }
    names: dict[str, str] = {}
    for name in tensors:
        plain = own.get(name, name)
        if _free(module, plain, names):
            names[name] = plain
    for name, better in _after_layers(module, names):
        if name not in names and _free(module, better, names):
            names[name] = better
    for name, tensor in tensors.items():
        if name not in names:
            folder = "weights" if isinstance(tensor, nn.Parameter) else "constants"
            better = f"{folder}.{name}"
            while not _free(module, better, names):
                better += "_"
            names[name] = better
    for name, tensor in tensors.items():
        delattr(module, name)
        *path, leaf = names[name].split(".")
        holder: nn.Module = module
        for part in path:
            if part not in holder._modules:
                holder.add_module(part, nn.Module())
            holder = holder.get_submodule(part)
        if isinstance(tensor, nn.Parameter):
            holder.register_parameter(leaf, tensor)
        else:
            holder.register_buffer(leaf, tensor)
    for node in module.graph.find_nodes(op="get_attr"):
        node.target = names.get(str(node.target), node.target)


def _after_layers(module: fx.GraphModule, names: Mapping[str, str]) -> list[tuple[str, str]]:
    """(tensor, name) of what layers read: with a named sibling or, if there is none, where the file has the operator."""
    found = []
    for node in module.graph.nodes:
        roles = ROLES.get(node_name(node), ())
        read = [
            (role, str(argument.target))
            for role, argument in zip(roles, node.args, strict=False)
            if role and isinstance(argument, fx.Node) and argument.op == "get_attr"
        ]
        stem = next(
            (
                names[target].removesuffix(f".{role}")
                for role, target in read
                if names.get(target, "").endswith(f".{role}")
            ),
            "",
        )
        if not stem:
            # "/encoder/layer.0/query/MatMul", as torch's older exporter writes it.
            path = str(node.meta.get("onnx_name", ""))
            stem = ".".join(path.strip("/").split("/")[:-1]) if path.startswith("/") else ""
        found += [(target, f"{stem}.{role}") for role, target in read if stem]
    return found


def _free(module: nn.Module, name: str, names: Mapping[str, str]) -> bool:
    """Whether a tensor may be called so: a path of identifiers that is nobody else's and no attribute of modules."""
    parts = name.split(".")
    if len(parts) < 2 or not all(PART.fullmatch(part) for part in parts):
        return False
    if any(hasattr(torch.fx.GraphModule, part) or hasattr(nn.Module(), part) for part in parts):
        return False
    if hasattr(module, parts[0]):
        return False
    taken = names.values()
    return not any(
        other == name or other.startswith(f"{name}.") or name.startswith(f"{other}.")
        for other in taken
    )
