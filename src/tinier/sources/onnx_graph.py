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
import torch.nn.functional as F
from torch import Tensor, fx, nn

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
    **{
        f"_reduce_{kind}": (1,)
        for kind in [
            "sum",
            "mean",
            "max",
            "min",
            "prod",
            "l1",
            "l2",
            "log_sum",
            "log_sum_exp",
            "sum_square",
        ]
    },
}
SHAPES = ("_get_shape", "_get_size", "_size")
# A shape has few numbers; more than this is a mask or a table.
FEW = 64
# The least exponent, Resize's scales and the like are no weights, and statistics of a batch norm are no parameters.
NO_WEIGHTS = (
    "_resize",
    "_upsample",
    "clamp",
    "pow",
    "where",
    "eq",
    "maximum",
    "minimum",
    "_pad_impl",
)


def rewrite(imported: fx.GraphModule, inputs: Mapping[str, Tensor], free: Free) -> fx.GraphModule:
    """A network that ``torch.export`` can trace, whose weights are parameters.

    Args:
        imported: what onnx2fx made; left as it is.
        inputs: example by input name.
        free: the dimensions of inputs whose size is to stay free, and their symbol.

    Returns:
        The same function of the same inputs.

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
    _linear_layers(module)
    graph.eliminate_dead_code()
    _parameters(module)
    used = {node.target for node in graph.find_nodes(op="get_attr")}
    for name in [name for name, _ in module.named_buffers() if name not in used]:
        delattr(module, name)
    graph.lint()
    module.recompile()
    return module.eval()


def _selections(module: fx.GraphModule) -> None:
    """Gather of one constant index is a selection; it may count from the end, which the importer's function cannot."""
    for node in module.graph.nodes:
        index = node.args[1] if _name(node) == "_gather" else None
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
    if not any(_name(node) in SHAPES for node in shape_nodes):
        # Only constants: no need to run the network for them.
        runs.append((dict(base), _constants(module, shape_nodes)))
    for sizes in _probes(symbols, base) if not runs else ():
        recorder = _Recorder(module, shape_nodes)
        recorder.run(*_resized(module, inputs, free, sizes).values())
        runs.append((sizes, recorder.values))
    numbers = _Numbers(module, free, runs)
    tables = {node for node in shape_nodes if not numbers.few(node)}
    for node in list(graph.nodes):
        if node in shape_nodes and node not in tables:
            continue  # goes, once nobody uses it
        places = NUMBERS.get(_name(node), ())
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
            if not value.is_floating_point() or value.numel() <= 1:
                found.add(node)
        elif node.op == "call_function" and _name(node) in SHAPES:
            found.add(node)
        elif node.op == "call_function" and node.all_input_nodes:
            random = "Random" in str(node.meta.get("onnx_op_type")) or "rand" in _name(node)
            if not random and all(source in found for source in node.all_input_nodes):
                found.add(node)
    return found


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


def _resized(
    module: fx.GraphModule, inputs: Mapping[str, Tensor], free: Free, sizes: Sizes
) -> dict[str, Tensor]:
    resized = {}
    for node in module.graph.find_nodes(op="placeholder"):
        value = inputs[str(node.target)]
        for dim in range(value.ndim):
            symbol = free.get((str(node.target), dim))
            if symbol is not None:
                value = value.index_select(dim, torch.arange(sizes[symbol]) % value.shape[dim])
        resized[str(node.target)] = value
    return resized


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
            return self.graph.call_function(tensor_of, (flat, shape, values[0].dtype))

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
        "_reshape": reshape,
        "_dynamic_slice": cut,
        "_range": count,
        "_pad_impl": pad,
        "_global_avg_pool": average_pool,
        "_global_max_pool": max_pool,
        "_reduce_max": maximum,
        "_reduce_min": minimum,
    }
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        lists = [node.args[i] for i in NUMBERS.get(_name(node), ()) if i < len(node.args)]
        if any(isinstance(value, fx.Node) and _is_tensor(value) for value in lists):
            continue  # sizes that come from data: leave it as it is
        function = plain.get(_name(node))
        if _name(node) == "_expand" and isinstance(node.args[1], list):
            node.args = (node.args[0], tuple(node.args[1]))
        if _name(node) == "_tile" and isinstance(node.args[1], list):
            node.args = (node.args[0], tuple(node.args[1]))
        if function is not None:
            node.target = function


def _is_tensor(node: fx.Node) -> bool:
    sizes = (operator.mul, operator.add, torch.ops.aten.sym_size.int)
    return node.target not in sizes


def reshape(value: Tensor, shape: Sequence[int], allow_zero: int) -> Tensor:
    """ONNX Reshape: 0 keeps a size unless ``allow_zero``, −1 is what is left."""
    sizes = [
        value.shape[i] if isinstance(s, int) and s == 0 and not allow_zero else s
        for i, s in enumerate(shape)
    ]
    return value.reshape(sizes)


def cut(
    value: Tensor,
    starts: Sequence[int],
    ends: Sequence[int],
    axes: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
) -> Tensor:
    """ONNX Slice; negative steps are only those that reverse a whole axis, or have constant ends."""
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step > 0:
            value = torch.ops.aten.slice.Tensor(value, axis, start, end, step)
            continue
        size = value.shape[axis]
        kept = range(int(size))[slice(start, None if end < -size else end, step)]
        value = value.index_select(axis, torch.tensor(list(kept), dtype=torch.int64))
    return value


def count(start: float, limit: float, step: float) -> Tensor:
    """ONNX Range of numbers that are not data."""
    floats = any(isinstance(value, float) for value in (start, limit, step))
    return torch.arange(start, limit, step, dtype=torch.float32 if floats else torch.int64)


def pad(value: Tensor, pads: Sequence[int], mode: str, fill: float | Tensor) -> Tensor:
    """ONNX Pad: beginnings of all axes, then ends."""
    half = len(pads) // 2
    # torch: the last axis first, its beginning and end side by side; leading axes that are not padded are left out.
    flat = [side for axis in range(half - 1, -1, -1) for side in (pads[axis], pads[axis + half])]
    while len(flat) > 2 and all(isinstance(side, int) and side == 0 for side in flat[-2:]):
        flat = flat[:-2]
    if mode == "constant":
        return F.pad(value, flat, value=float(fill))
    return F.pad(value, flat, mode={"edge": "replicate", "wrap": "circular"}.get(mode, mode))


def average_pool(value: Tensor) -> Tensor:
    """ONNX GlobalAveragePool."""
    pools = {3: F.adaptive_avg_pool1d, 4: F.adaptive_avg_pool2d, 5: F.adaptive_avg_pool3d}
    return pools[value.ndim](value, 1)  # type: ignore[no-any-return]


def max_pool(value: Tensor) -> Tensor:
    """ONNX GlobalMaxPool."""
    return value.amax(dim=tuple(range(2, value.ndim)), keepdim=True)


def maximum(value: Tensor, axes: Sequence[int] | None, keep: bool, nothing: bool) -> Tensor:
    """ONNX ReduceMax; without axes over all of them, or none of them if ``nothing``."""
    if not axes:
        return value if nothing else value.amax(dim=tuple(range(value.ndim)), keepdim=keep)
    return value.amax(dim=tuple(axes), keepdim=keep)


def minimum(value: Tensor, axes: Sequence[int] | None, keep: bool, nothing: bool) -> Tensor:
    """ONNX ReduceMin; see ``maximum``."""
    return -maximum(-value, axes, keep, nothing)


def tensor_of(values: Sequence[float], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of numbers, some of which are sizes of the graph."""
    return torch.stack([torch.full((), value, dtype=dtype) for value in values]).reshape(shape)


def _linear_layers(module: fx.GraphModule) -> None:
    """Products with a constant matrix, and the constant vector that is added, as linear layers."""
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is torch.matmul:
            (x, matrix), bias, transposed = node.args[:2], None, False
        elif _name(node) == "_gemm":
            x, matrix, bias, alpha, beta, flip, transposed = node.args
            vector = _constant(module, bias)
            if flip or alpha != 1 or beta != 1 or (bias is not None and vector is None):
                continue
            if vector is not None and vector.ndim != 1:
                continue
        else:
            continue
        weight = _constant(module, matrix)
        if weight is None or weight.ndim != 2 or len(matrix.users) != 1:
            continue
        weight = weight if transposed else weight.t()
        last = node
        if bias is None and len(node.users) == 1:
            user = next(iter(node.users))
            other = [argument for argument in user.args if argument is not node]
            vector = _constant(module, other[0]) if len(other) == 1 else None
            adds = user.target in (torch.add, operator.add) and not user.kwargs
            if adds and vector is not None and vector.shape == weight.shape[:1]:
                last, bias = user, other[0]
        vector = _constant(module, bias)
        if vector is not None and vector.shape != weight.shape[:1]:
            continue
        setattr(module, str(matrix.target), weight.contiguous())
        with module.graph.inserting_before(last):
            if isinstance(bias, fx.Node):
                # The vector may be read after the product: read it again here.
                bias = module.graph.get_attr(str(bias.target))
            linear = module.graph.call_function(F.linear, (x, matrix, bias))
        linear.meta.update(node.meta)
        last.replace_all_uses_with(linear)
        module.graph.erase_node(last)
        if last is not node:
            module.graph.erase_node(node)


def _constant(module: fx.GraphModule, node: Any) -> Tensor | None:
    """The float constant that a node reads, or None."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value = module.get_buffer(str(node.target))
    return value if value.is_floating_point() else None


def _parameters(module: fx.GraphModule) -> None:
    """Make parameters of the weights: finite float tensors of more than one value that layers read."""
    weights: set[str] = set()
    others: set[str] = set()
    for node in module.graph.nodes:
        name = _name(node)
        for index, argument in enumerate(node.args):
            if not isinstance(argument, fx.Node) or argument.op != "get_attr":
                continue
            statistic = name == "_batch_norm" and index in (3, 4)
            layer = name in ("linear", "_conv", "_conv_transpose", "_gemm", "_batch_norm")
            value = getattr(module, str(argument.target))
            fits = value.is_floating_point() and bool(value.isfinite().all())
            if fits and not statistic and name not in NO_WEIGHTS and (layer or value.numel() > 1):
                weights.add(str(argument.target))
            else:
                others.add(str(argument.target))
        for argument in node.all_input_nodes:
            if argument.op == "get_attr" and argument not in node.args:
                others.add(str(argument.target))
    for name in sorted(weights - others):
        value = getattr(module, name)
        delattr(module, name)
        module.register_parameter(name, nn.Parameter(value.detach().clone()))


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""
