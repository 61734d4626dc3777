"""Look at values inside a module while it runs."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from tinier.errors import InputError


@contextmanager
def capturing(module: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Within it, each run of the module puts the outputs of some of its parts into a dict.

    Args:
        module: left as it is: hooks go when the block ends, however it ends.
        names: submodules, of which the first tensor that they return is taken; of a graph also nodes.

    Returns:
        name → tensor, with its gradient function, of the latest run; of a part that runs several times, of its last time.

    Raises:
        InputError: the module has no such part.

    Cost:
        For nodes of a graph, that it is interpreted; else nothing.
    """
    found: dict[str, Tensor] = {}
    parts = dict(module.named_modules())
    nodes = {n.name for n in module.graph.nodes} if isinstance(module, fx.GraphModule) else set()
    for name in names:
        if name not in parts and name not in nodes:
            near = [other for other in (*parts, *sorted(nodes)) if name.rpartition(".")[2] in other]
            raise InputError(
                f"{type(module).__name__} has no part {name!r}; there are {', '.join(near[:5]) or 'others'}"
            )
    with ExitStack() as stack:
        for name in names:
            if name in parts:
                hook = parts[name].register_forward_hook(partial(_keep, found, name))
                stack.callback(hook.remove)
        wanted = [name for name in names if name not in parts]
        if wanted and isinstance(module, fx.GraphModule):
            own = vars(module).get("forward")
            module.forward = partial(_interpreted, module, frozenset(wanted), found)
            stack.callback(_put_back, module, own)
        yield found


def _keep(found: dict[str, Tensor], name: str, _: nn.Module, __: Any, result: Any) -> None:
    tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    if tensors:
        found[name] = tensors[0]


def _interpreted(
    module: fx.GraphModule,
    names: frozenset[str],
    found: dict[str, Tensor],
    *args: Any,
    **kwargs: Any,
) -> Any:
    places = [str(node.target) for node in module.graph.find_nodes(op="placeholder")]
    inputs = [*args, *(kwargs[name] for name in places[len(args) :])]
    return _Reader(module, names, found).run(*inputs)


class _Reader(fx.Interpreter):
    def __init__(
        self, module: fx.GraphModule, names: frozenset[str], found: dict[str, Tensor]
    ) -> None:
        super().__init__(module)
        self.names, self.found = names, found

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self.names and isinstance(result, Tensor):
            self.found[n.name] = result
        return result


def _put_back(module: nn.Module, own: Any) -> None:
    if own is None:
        del module.forward
    else:
        module.forward = own
