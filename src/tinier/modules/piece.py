"""A piece: one module's part of the traced graph in the module's place, for classes whose ``forward`` cannot take smaller weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

PLAIN = (int, float, bool, str, tuple, type(None))


class Form:
    """How leaves are put together; shared by copies, as it never changes."""

    def __init__(self, spec: pytree.TreeSpec) -> None:
        self.spec = spec

    def __deepcopy__(self, memo: dict[int, Any]) -> "Form":
        return self


class Piece(nn.Module):
    """Computes what a module did, by its traced graph; parameters and attributes have the names they had.

    Args:
        source: the module whose place it takes, with the parameters that the graph reads.
        graph: its placeholders are tensors, its output is a tuple; ``get_attr`` targets are names in ``source``.
        constants: name → tensor that the graph reads and ``source`` does not have.
        inputs: for each placeholder, which leaf of (args, kwargs) it is.
        outputs: leaves of the result: (True, position in the graph's output) or (False, a value).
        spec: how the leaves are put together.
    """

    def __init__(
        self,
        source: nn.Module,
        graph: fx.Graph,
        constants: Mapping[str, Tensor],
        inputs: Sequence[int],
        outputs: Sequence[tuple[bool, Any]],
        spec: pytree.TreeSpec,
    ) -> None:
        super().__init__()
        self.replaced: str = type(source).__name__
        for name, value in vars(source).items():
            if isinstance(value, PLAIN):
                setattr(self, name, value)
        if isinstance(source, nn.MultiheadAttention):
            # Torch's encoder layers would read its weights past it.
            self._qkv_same_embed_dim = False
        read = {str(node.target) for node in graph.find_nodes(op="get_attr")}
        held = (*source.named_parameters(), *source.named_buffers())
        for name, tensor in (*held, *constants.items()):
            if name in read:
                self._hold(name, tensor, name in source.state_dict())
        self._piece, self._form = graph, Form(spec)
        self._inputs, self._outputs = tuple(inputs), tuple(outputs)
        self.training = source.training

    def _hold(self, name: str, tensor: Tensor, persistent: bool) -> None:
        *path, leaf = name.split(".")
        owner: nn.Module = self
        for step in path:
            if step not in owner._modules:
                owner.add_module(step, nn.Module())
            owner = owner.get_submodule(step)
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(leaf, tensor)
        else:
            owner.register_buffer(leaf, tensor, persistent=persistent)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the replaced module returns for these arguments, in evaluation mode."""
        leaves = pytree.tree_leaves((args, kwargs))
        tensors = [leaves[index] for index in self._inputs]
        found = fx.Interpreter(self, graph=self._piece).run(*tensors)
        values = [found[value] if computed else value for computed, value in self._outputs]
        return pytree.tree_unflatten(values, self._form.spec)

    def extra_repr(self) -> str:
        """The class that it stands for."""
        return f"the traced graph of {self.replaced}"


def replaced(module: nn.Module) -> tuple[str, ...]:
    """A sentence on the pieces in a module, or nothing where it has none."""
    found = [(path, layer) for path, layer in module.named_modules() if isinstance(layer, Piece)]
    if not found:
        return ()
    path, layer = found[0]
    what = f"{path} ({layer.replaced})" + (f" and {len(found) - 1} more" if len(found) > 1 else "")
    return (
        f"the class is kept, but for {what}: its forward cannot take the smaller weights; its traced graph stands there, in "
        "evaluation mode",
    )
