"""Rewrite an imported ONNX graph so that it can be traced, trained and edited.

ONNX computes shapes with tensors. Here the tensors that depend on nothing but shapes are turned into numbers: the network is
run at several sizes of its free dimensions, and each such number is written as a polynomial in those sizes, which must hold
at a further size too.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, fx, nn

from tinier.sources import onnx_operators as operators
from tinier.sources.onnx_layers import embeddings, linear_layers, node_name, parameters
from tinier.sources.onnx_names import rename, untie_vectors

Free = Mapping[tuple[str, int], str]  # (input, dimension) → symbol
Sizes = dict[str, int]  # symbol → size
Number = int | float | fx.Node

# Of onnx2fx's functions, by name: the arguments that are lists of numbers or numbers, not data.
NUMBERS: dict[str, tuple[int, ...]] = {
    "_reshape": (1,),
    "_expand": (1,),
    "_dynamic_slice": (1, 2, 3, 4),
    "_squeeze_dynamic": (1,),
    "_unsqueeze_dynamic": (1,),
    "_tile": (1,),
    "_pad_impl": (1, 3),
    "_split_with_sizes": (1,),
    "_constant_of_shape": (0,),
    "_range": (0, 1, 2),
    "_resize": (2, 3),
    "_upsample": (1,),
    "_cumsum": (1,),
    "_topk": (1,),
    "_trilu": (1,),
    "_one_hot": (1,),
    "_reduce_sum_square": (1,),
    **{
        f"_reduce_{kind}": (1,)
        for kind in ("sum", "mean", "max", "min", "prod", "l1", "l2", "log_sum", "log_sum_exp")
    },
}
SHAPES = ("_get_shape", "_get_size", "_size")
# A shape has few numbers; more than this is a mask or a table.
FEW = 64


def rewrite(
    imported: fx.GraphModule,
    inputs: Mapping[str, Tensor],
    free: Free,
    own: Mapping[str, str],
) -> fx.GraphModule:
    """A network that ``torch.export`` can trace, whose weights are parameters.

    Args:
        imported: what onnx2fx made; left as it is.
        inputs: example by input name.
        free: the dimensions of inputs whose size is to stay free, and their symbol; other dimensions of token ids are
            fixed.
        own: of each weight the name in the file.

    Returns:
        The same function of the same inputs. Weights have their names in the file or, where that could be a name that an
        exporter makes up, one after their layer.

    Raises:
        ValueError: a shape is no polynomial in the free sizes.
    """
    root = nn.Module()
    for name, tensor in imported.named_buffers():
        root.register_buffer(name, tensor.detach().clone())
    for name, child in imported.named_children():
        root.add_module(name, child)
    graph = fx.Graph()
    graph.output(graph.graph_copy(imported.graph, {}))
    module = fx.GraphModule(root, graph)
    _selections(module)
    _shapes_to_numbers(module, inputs, free)
    _plain_operators(module)
    _know_sizes(module, inputs, free)
    linear_layers(module)
    embeddings(module)
    graph.eliminate_dead_code()
    untie_vectors(module)
    parameters(module)
    used = {node.target for node in graph.find_nodes(op="get_attr")}
    for name in [name for name, _ in module.named_buffers() if name not in used]:
        delattr(module, name)
    rename(module, own)
    graph.lint()
    module.recompile()
    return module.eval()


def _selections(module: fx.GraphModule) -> None:
    """Selections by index that the importer's functions do not make, or make one at a time, which fixes their number.

    Gather of one constant index may count from the end.
    """
    coordinates = {
        "_gather_nd": operators.gather_nd,
        "_scatter_nd_none": operators.scatter_nd,
        "_scatter_nd_add": operators.scatter_nd_add,
    }
    for node in module.graph.nodes:
        node.target = coordinates.get(node_name(node), node.target)
        index = node.args[1] if node_name(node) == "_gather" else None
        if isinstance(index, fx.Node) and index.op == "get_attr":
            value = module.get_buffer(str(index.target))
            if value.ndim == 0:
                node.args = (node.args[0], node.args[2], int(value))
                node.target = torch.select


class _Recorder(fx.Interpreter):
    """Runs the graph and keeps the values of some nodes."""

    def __init__(self, module: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__(module)
        self.wanted = wanted
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            self.values[n] = value
        return value


def _shapes_to_numbers(module: fx.GraphModule, inputs: Mapping[str, Tensor], free: Free) -> None:
    graph = module.graph
    shape_nodes = _shape_nodes(module)
    symbols = sorted(set(free.values()))
    base = {symbol: inputs[key[0]].shape[key[1]] for key, symbol in free.items()}
    runs: list[tuple[Sizes, dict[fx.Node, Any]]] = []
    if not any(node_name(node) in SHAPES for node in shape_nodes):
        # Only constants: no need to run the network for them.
        runs.append((dict(base), _constants(module, shape_nodes)))
    for sizes in _probes(symbols, base) if not runs else ():
        recorder = _Recorder(module, shape_nodes)
        batch = resized(inputs, free, sizes)
        recorder.run(*(batch[str(n.target)] for n in graph.find_nodes(op="placeholder")))
        runs.append((sizes, recorder.values))
    numbers = _Numbers(module, free, runs)
    tables = {node for node in shape_nodes if not numbers.few(node)}
    for node in list(graph.nodes):
        if node in shape_nodes and node not in tables:
            continue  # goes, once nobody uses it
        places = NUMBERS.get(node_name(node), ())
        args = list(node.args)
        for index, argument in enumerate(args):
            known = isinstance(argument, fx.Node) and argument in shape_nodes
            if index in places and known and argument not in tables:
                args[index] = numbers.written(argument, node)
        node.args = tuple(args)
        kwargs = dict(node.kwargs)
        if node.target is torch.clamp:
            for key in ("min", "max"):
                bound = kwargs.get(key)
                if isinstance(bound, fx.Node) and bound.op == "get_attr":
                    value = module.get_buffer(str(bound.target))
                    kwargs[key] = value.item() if value.numel() == 1 else bound
        node.kwargs = kwargs
        for source in list(node.all_input_nodes):
            if source in shape_nodes and source not in tables and source.op != "get_attr":
                node.replace_input_with(source, numbers.tensor(source, node))
    graph.eliminate_dead_code()


def _shape_nodes(module: fx.GraphModule) -> set[fx.Node]:
    """The nodes that depend on shapes and on constants that are no weights, but not on data."""
    found: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = module.get_buffer(str(node.target))
            if not value.is_floating_point() or value.numel() <= 1 or _numbers_alone(node):
                found.add(node)
        elif node.op == "call_function" and node_name(node) in SHAPES:
            found.add(node)
        elif node.op == "call_function" and node.all_input_nodes:
            random = "Random" in str(node.meta.get("onnx_op_type")) or "rand" in node_name(node)
            if not random and all(source in found for source in node.all_input_nodes):
                found.add(node)
    return found


def _numbers_alone(node: fx.Node) -> bool:
    """Whether a tensor is read as numbers only, as the scales of Resize, which may be fractions."""
    return bool(node.users) and all(
        node in [user.args[i] for i in NUMBERS.get(node_name(user), ()) if i < len(user.args)]
        for user in node.users
    )


def _constants(module: fx.GraphModule, nodes: set[fx.Node]) -> dict[fx.Node, Any]:
    """The values of nodes that depend on constants alone."""
    values: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node not in nodes:
            continue
        if node.op == "get_attr":
            values[node] = module.get_buffer(str(node.target))
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    return values


def _probes(symbols: Sequence[str], base: Sizes) -> list[Sizes]:
    """Sizes that determine a polynomial of products of at most two symbols, and one more that tests it."""
    probes = [dict(base)]
    for count in (1, 2):
        for group in combinations(symbols, min(count, len(symbols))):
            probe = {name: size + (name in group) for name, size in base.items()}
            if probe not in probes:
                probes.append(probe)
    if symbols:
        probes.append({name: size + 3 for name, size in base.items()})
    return probes


def resized(inputs: Mapping[str, Tensor], free: Free, sizes: Sizes) -> dict[str, Tensor]:
    """The inputs with other sizes of their free dimensions, repeated or cut."""
    batch = {}
    for name, value in inputs.items():
        for dim in range(value.ndim):
            size = sizes.get(free.get((name, dim), ""))
            if size is not None:
                value = value.index_select(dim, torch.arange(size) % value.shape[dim])
        batch[name] = value
    return batch


class _Numbers:
    """Writes the values of shape nodes as numbers and sizes of the graph."""

    def __init__(
        self,
        module: fx.GraphModule,
        free: Free,
        runs: list[tuple[Sizes, dict[fx.Node, Any]]],
    ) -> None:
        self.module = module
        self.graph = module.graph
        self.runs = runs
        self.symbols = sorted(runs[0][0])
        self.terms = [
            *((),),
            *((symbol,) for symbol in self.symbols),
            *combinations(self.symbols, 2),
        ]
        placeholders = list(self.graph.find_nodes(op="placeholder"))
        self.holders = {str(node.target): node for node in placeholders}
        self.last = placeholders[-1]
        self.free = free
        self.made: dict[Any, fx.Node] = {}

    def few(self, node: fx.Node) -> bool:
        """Whether it is a tensor of few values, as many at every size."""
        values = [values[node] for _, values in self.runs]
        if not all(isinstance(value, Tensor) for value in values):
            return False
        return values[0].numel() <= FEW and len({tuple(v.shape) for v in values}) == 1

    def written(self, node: fx.Node, user: fx.Node) -> Number | list[Number]:
        """The value as a number or a list of numbers, where it is used."""
        value = self.runs[0][1][node]
        flat = [self._number(node, index, user) for index in range(value.numel())]
        return flat[0] if value.ndim == 0 else flat

    def tensor(self, node: fx.Node, user: fx.Node) -> fx.Node:
        """The value as a tensor: a constant if it is the same at every size."""
        values = [values[node] for _, values in self.runs]
        if all(torch.equal(value, values[0]) for value in values):
            name = f"constant_{node.name}"
            if not hasattr(self.module, name):
                self.module.register_buffer(name, values[0].clone())
            with self.graph.inserting_before(user):
                return self.graph.get_attr(name)
        flat = [self._number(node, index, user) for index in range(values[0].numel())]
        with self.graph.inserting_before(user):
            shape = list(values[0].shape)
            return self.graph.call_function(operators.tensor_of, (flat, shape, values[0].dtype))

    def _number(self, node: fx.Node, index: int, user: fx.Node) -> Number:
        values = [values[node].reshape(-1)[index].item() for _, values in self.runs]
        if all(value == values[0] for value in values):
            return values[0]  # type: ignore[no-any-return]
        rows = [[self._product(term, sizes) for term in self.terms] for sizes, _ in self.runs]
        target = torch.tensor(values, dtype=torch.float64)[:, None]
        matrix = torch.tensor(rows, dtype=torch.float64)
        solved = torch.linalg.lstsq(matrix[:-1], target[:-1], driver="gelsd").solution
        factors = [round(value) for value in solved.flatten().tolist()]
        exact = matrix @ torch.tensor(factors, dtype=torch.float64)[:, None]
        if not torch.equal(exact, target):
            raise ValueError(f"{node.name}: the shape {values} is no polynomial in the free sizes")
        return self._sum(factors, user)

    def _product(self, term: Sequence[str], sizes: Sizes) -> int:
        product = 1
        for symbol in term:
            product *= sizes[symbol]
        return product

    def _sum(self, factors: Sequence[int], user: fx.Node) -> Number:
        total: Number = factors[0]
        for factor, term in zip(factors[1:], self.terms[1:], strict=True):
            if not factor:
                continue
            part: Number = factor
            for symbol in term:
                size = self._size(symbol)
                part = size if part == 1 else self._call(operator.mul, (size, part), user)
            total = part if total == 0 else self._call(operator.add, (total, part), user)
        return total

    def _size(self, symbol: str) -> fx.Node:
        if symbol not in self.made:
            name, dim = next(key for key, value in self.free.items() if value == symbol)
            with self.graph.inserting_after(self.last):
                self.made[symbol] = self.graph.call_function(
                    torch.ops.aten.sym_size.int, (self.holders[name], dim)
                )
        return self.made[symbol]

    def _call(self, function: Callable[..., Any], args: tuple[Any, ...], user: fx.Node) -> fx.Node:
        with self.graph.inserting_before(user):
            return self.graph.call_function(function, args)


def _plain_operators(module: fx.GraphModule) -> None:
    """Put the plain operator in place of functions that look at values, which would fix free sizes."""
    plain: dict[str, Callable[..., Any]] = {
        "_reshape": operators.reshape,
        "_dynamic_slice": operators.cut,
        "_range": operators.count,
        "_pad_impl": operators.pad,
        "_global_avg_pool": operators.average_pool,
        "_global_max_pool": operators.max_pool,
        "_reduce_max": operators.maximum,
        "_reduce_min": operators.minimum,
    }
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        lists = [node.args[i] for i in NUMBERS.get(node_name(node), ()) if i < len(node.args)]
        if any(isinstance(value, fx.Node) and _is_tensor(value) for value in lists):
            continue  # sizes that come from data: leave it as it is
        function = plain.get(node_name(node))
        if node_name(node) == "_expand" and isinstance(node.args[1], list):
            node.args = (node.args[0], tuple(node.args[1]))
        if node_name(node) == "_tile" and isinstance(node.args[1], list):
            node.args = (node.args[0], tuple(node.args[1]))
        if function is not None:
            node.target = function


def _know_sizes(module: fx.GraphModule, inputs: Mapping[str, Tensor], free: Free) -> None:
    """Say which sizes of inputs are equal, and which ones are fixed.

    A trace would take every dimension of token ids that it can for free, and the batch of each input for one of its own.
    """
    first: dict[str, fx.Node] = {}
    holders = list(module.graph.find_nodes(op="placeholder"))
    anchor = holders[-1].next
    for holder in holders:
        value = inputs[str(holder.target)]
        users = list(holder.users)
        sizes: dict[int, Any] = {}
        with module.graph.inserting_before(anchor):
            for dim in range(value.ndim):
                symbol = free.get((str(holder.target), dim))
                if symbol in first:
                    sizes[dim] = first[symbol]
                elif symbol is not None:
                    args: tuple[Any, ...] = (holder, dim)
                    first[symbol] = module.graph.call_function(torch.ops.aten.sym_size.int, args)
                elif value.shape[dim] > 1 and not value.is_floating_point():
                    sizes[dim] = value.shape[dim]
            if not sizes:
                continue
            args = (holder, list(sizes), list(sizes.values()))
            known = module.graph.call_function(operators.of_sizes, args)
        for user in users:
            user.replace_input_with(holder, known)


def _is_tensor(node: fx.Node) -> bool:
    sizes = (operator.mul, operator.add, torch.ops.aten.sym_size.int)
    return node.target not in sizes
