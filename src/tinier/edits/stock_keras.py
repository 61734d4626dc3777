"""The user's Keras model with smaller layers: one table says which config value follows from which variable's dimension."""

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

from torch import Tensor, fx

from tinier.edits.rewrite import Kept, Rewriter, kept_along
from tinier.errors import ModelError
from tinier.graph.axes import Axis, Product, size
from tinier.graph.groups import Channels
from tinier.graph.macs import module_path
from tinier.modules.keras import KerasModule
from tinier.modules.keras_parts import is_graph, operations
from tinier.modules.keras_rebuild import rebuilt

# Class → config key → (end of a variable's name, its dimension); "" is the only variable that the layer has.
Widths = Mapping[str, tuple[str, int]]
_DENSE: Widths = {"units": ("kernel", -1)}
_CONVOLUTION: Widths = {"filters": ("kernel", -1)}
_TRANSPOSED: Widths = {"filters": ("kernel", -2)}
_DEPTHWISE: Widths = {"depth_multiplier": ("kernel", -1)}
_SEPARABLE: Widths = {
    "filters": ("pointwise_kernel", -1),
    "depth_multiplier": ("depthwise_kernel", -1),
}
_RECURRENT: Widths = {"units": ("recurrent_kernel", 0)}
_CONVOLUTIONAL_RECURRENT: Widths = {"filters": ("recurrent_kernel", -2)}
WIDTHS: Mapping[str, Widths] = {
    "Dense": _DENSE,
    **dict.fromkeys(("Conv1D", "Conv2D", "Conv3D"), _CONVOLUTION),
    **dict.fromkeys(("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"), _TRANSPOSED),
    **dict.fromkeys(("DepthwiseConv1D", "DepthwiseConv2D"), _DEPTHWISE),
    **dict.fromkeys(("SeparableConv1D", "SeparableConv2D"), _SEPARABLE),
    **dict.fromkeys(("LSTM", "LSTMCell", "GRU", "GRUCell"), _RECURRENT),
    **dict.fromkeys(("SimpleRNN", "SimpleRNNCell"), _RECURRENT),
    **dict.fromkeys(("ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D"), _CONVOLUTIONAL_RECURRENT),
    "Embedding": {"input_dim": ("embeddings", 0), "output_dim": ("embeddings", 1)},
    "ReversibleEmbedding": {"input_dim": ("embeddings", 0), "output_dim": ("embeddings", 1)},
    "MultiHeadAttention": {
        "num_heads": ("query.kernel", 1),
        "key_dim": ("query.kernel", 2),
        "value_dim": ("value.kernel", 2),
    },
    "GroupedQueryAttention": {
        "num_query_heads": ("query.kernel", 1),
        "num_key_value_heads": ("key.kernel", 1),
        "head_dim": ("query.kernel", 2),
    },
    "LayerScale": {"projection_dim": ("", 0)},
}
# Class → variables of which one has the groups as the outer factor of its last dimension.
GROUPED = {
    **dict.fromkeys(("Conv1D", "Conv2D", "Conv3D"), ("kernel",)),
    "GroupNormalization": ("gamma", "beta"),
}
# Class → config key of the shape that its result gets, without the batch or with it.
SHAPED = {"Reshape": ("target_shape", "newshape")}
# Class → its own variable → (ends of the variable that it follows, its dimension, that of the other).
FOLLOWING = {"SpectralNormalization": {"vector_u": ((".kernel", ".embeddings"), 1, -1)}}
# The scale of attention follows from its head size; the query's weights take the difference.
SCALED = {"MultiHeadAttention": "key_dim", "GroupedQueryAttention": "head_dim"}


def keras_modules(module: KerasModule, channels: Channels, kept: Kept) -> Iterable[KerasModule]:
    """The Keras model built anew with smaller layers and the weights that stay.

    Args:
        module: the original; left as it is.
        channels: its axes.
        kept: atom → (kept,) int64 positions that stay.

    Raises:
        ModelError: a layer's config cannot say its new width, or Keras cannot build the model from it.
    """
    resized = _Resized(module, channels, kept)
    smaller = KerasModule(rebuilt(module.model, resized.configs()), module)
    smaller.assign(resized.values())
    yield smaller
    # Whoever asks for another one has found that this one is not right.
    raise ModelError(
        f"{module.model.name}: the Keras model with the new widths does not compute what the proven graph does; an operation "
        "has a size in it that its config does not say"
    )


class _Resized:
    """New shapes of everything in a Keras model that loses channels."""

    def __init__(self, module: KerasModule, channels: Channels, kept: Kept) -> None:
        self.module = module
        self.run = Rewriter(channels, kept)
        self.along = kept_along(channels, kept)
        self.axes = channels.parameters
        self.old = {name: tuple(v.shape) for name, v in module.variables.items()}
        self._follow()
        self.new = {
            name: tuple(
                len(self.along.get(name, {})[dim]) if dim in self.along.get(name, {}) else length
                for dim, length in enumerate(shape)
            )
            for name, shape in self.old.items()
        }
        self.results = _results(channels)

    def configs(self) -> dict[str, dict[str, Any]]:
        """Path → config key → new value."""
        found: dict[str, dict[str, Any]] = {}
        if not is_graph(self.module.model):  # a class of the user's, which builds its layers itself
            found[""] = self._foreign(self.module.model, "")
        for operation, path in operations(self.module.model):
            if path and (config := self._config(operation, path)):
                found[path] = config
        return found

    def values(self) -> dict[str, Tensor]:
        """Variable name → what is left of it."""
        result = {}
        for name, variable in self.module.variables.items():
            value = variable.value.detach()
            for dim, indices in self.along.get(name, {}).items():
                value = value.index_select(dim, indices)
            result[name] = value
        for operation, path in operations(self.module.model):
            for kind in kinds_of(operation):
                if kind in SCALED:
                    self._rescale(path, result)
        return result

    def _follow(self) -> None:
        """Variables that only training uses, and no graph shows, lose what theirs do."""
        for operation, path in operations(self.module.model):
            for kind in kinds_of(operation):
                for name, (ending, dim, along) in FOLLOWING.get(kind, {}).items():
                    for source, cut in list(self.along.items()):
                        last = len(self.old.get(source, ())) + along
                        if (
                            source.startswith(f"{path}.")
                            and source.endswith(ending)
                            and last in cut
                        ):
                            self.along[f"{path}.{name}"] = {dim: cut[last]}

    def _rescale(self, path: str, values: dict[str, Tensor]) -> None:
        kernel = self._variable(path, "query.kernel")
        before, after = self.old[kernel][2], self.new[kernel][2]
        if before != after:
            for name in (kernel, kernel.removesuffix("kernel") + "bias"):
                if name in values:
                    values[name] = values[name] * (after / before) ** 0.5

    def _config(self, operation: Any, path: str) -> dict[str, Any]:
        kinds = kinds_of(operation)
        known = [kind for kind in kinds if kind in WIDTHS or kind in GROUPED]
        if "InputLayer" in kinds:
            return self._input(operation, path)
        if any(kind in SHAPED for kind in kinds):
            return self._shape(operation, path)
        if not self._changed(path):
            return {}
        config: dict[str, Any] = {}
        for kind in known[:1]:
            for key, (ending, dim) in WIDTHS.get(kind, {}).items():
                name = self._variable(path, ending)
                if self.old[name][dim] != self.new[name][dim]:
                    config[key] = self.new[name][dim]
            config |= self._groups(operation, path, GROUPED.get(kind, ()))
        if "EinsumDense" in kinds:
            return self._einsum(operation, path)
        if any(kind in SCALED for kind in kinds) and "MultiHeadAttention" in kinds:
            config |= self._attention(operation, path)
        if (
            not known
            and not type(operation).__module__.startswith("keras.")
            and not is_graph(operation)
        ):
            return self._foreign(operation, path)
        return config

    def _changed(self, path: str) -> bool:
        return any(name.startswith(f"{path}.") for name in self.along)

    def _variable(self, path: str, ending: str) -> str:
        own = [name for name in self.old if name.startswith(f"{path}.")]
        found = [name for name in own if not ending or name.endswith(f".{ending}")]
        if len(found) != 1:
            raise ModelError(f"{path}: {len(found)} variables are called {ending}, one is needed")
        return found[0]

    def _groups(self, operation: Any, path: str, endings: tuple[str, ...]) -> dict[str, Any]:
        before = getattr(operation, "groups", 1)
        if before in (1, -1):
            return {}
        for ending in endings:
            name = f"{path}.{ending}"
            if name in self.axes:
                return {"groups": self._outer(path, self.axes[name][-1], before)}
        return {}

    def _outer(self, path: str, axis: Axis, before: int) -> int:
        """What is left of the outer factor of this size."""
        factors = list(axis.factors) if isinstance(axis, Product) else [axis]
        for count in range(len(factors) + 1):
            if prod(size(factor) for factor in factors[:count]) == before:
                return prod(self.run.size(factor) for factor in factors[:count])
        raise ModelError(f"{path}: {before} groups are no factor of its channels")

    def _input(self, operation: Any, path: str) -> dict[str, Any]:
        """The input layer of a nested model: what the outer model gives it."""
        node = self.results.get(path)
        if node is None or "." not in path:
            return {}
        axes = self.run.of(node)
        shape = list(operation.batch_shape)
        for dim, axis in enumerate(axes):
            if self.run.changed(axis) and shape[dim] is not None:
                shape[dim] = self.run.size(axis)
        return {"batch_shape": shape} if shape != list(operation.batch_shape) else {}

    def _shape(self, operation: Any, path: str) -> dict[str, Any]:
        node = self.results.get(path)
        if node is None:
            return {}
        axes = self.run.of(node)
        for key in SHAPED["Reshape"]:
            given = getattr(operation, key, None)
            if given is None:
                continue
            shape, ending = list(given), axes[len(axes) - len(given) :]
            for dim, axis in enumerate(ending):
                if self.run.changed(axis) and shape[dim] not in (None, -1):
                    shape[dim] = self.run.size(axis)
            return {key: shape} if shape != list(given) else {}
        return {}

    def _einsum(self, operation: Any, path: str) -> dict[str, Any]:
        """Each letter of the result that the kernel has gets the kernel's new size."""
        letters, result = operation.equation.replace("...", "").split("->")
        kernel = dict(zip(letters.split(",")[1], self.new[f"{path}.kernel"], strict=True))
        shape = list(operation.partial_output_shape)
        for dim, letter in enumerate(result[len(result) - len(shape) :]):
            if letter in kernel and shape[dim] is not None:
                shape[dim] = kernel[letter]
        return {"output_shape": shape}

    def _attention(self, operation: Any, path: str) -> dict[str, Any]:
        """The width of the result, where it is not that of the query any more."""
        name = self._variable(path, "attention_output.kernel")
        outputs, query = self.new[name][2:], self.new[self._variable(path, "query.kernel")][0]
        given = operation.get_config().get("output_shape")
        if given is not None or outputs != (query,):
            return {"output_shape": outputs}
        return {}

    def _foreign(self, operation: Any, path: str) -> dict[str, Any]:
        """Of a user's own layer: whole numbers in its config that are the old size of one variable's dimension."""
        try:
            config = operation.get_config()
        except (NotImplementedError, TypeError) as error:
            name = path or self.module.model.name
            raise ModelError(f"{name}: {type(operation).__name__} has no get_config") from error
        news: dict[int, set[int]] = {}
        for name in self.old:
            if not path or name.startswith(f"{path}."):
                for before, after in zip(self.old[name], self.new[name], strict=True):
                    news.setdefault(before, set()).add(after)
        found = {}
        for key, value in config.items():
            if type(value) is int and value in news and news[value] != {value}:
                if len(news[value]) > 1:
                    raise ModelError(
                        f"{path or self.module.model.name}: {key}={value} of {type(operation).__name__} is the size of several "
                        "dimensions, which have other sizes now"
                    )
                found[key] = min(news[value])
        return found


def kinds_of(operation: Any) -> list[str]:
    """Names of its classes that are Keras's own, its own first."""
    return [
        kind.__name__ for kind in type(operation).__mro__ if kind.__module__.startswith("keras.")
    ]


def _results(channels: Channels) -> dict[str, fx.Node]:
    """Path of each operation → the last node that it computes."""
    result = {}
    for node in channels.axes:
        if node.op == "call_function" and channels.axes[node]:
            result[module_path(node)] = node
    return result
