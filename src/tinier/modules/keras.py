"""A Keras 3 model on the torch backend as an ``nn.Module`` that torch can trace, prune and train."""

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from inspect import Parameter, Signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tinier.errors import ModelError
from tinier.modules.keras_parts import (
    free_name,
    input_layers,
    input_names,
    is_graph,
    operations,
    own_variables,
    pack,
    variable_name,
)
from tinier.modules.keras_rebuild import rebuilt

# Tracing names what each Keras operation computes; Keras has one place for that, which two threads cannot share.
_naming = threading.Lock()


class KerasModule(nn.Module):
    """A Keras model whose inputs have names and whose variables are parameters and buffers of torch.

    Trainable variables are the parameters, other floating-point variables the buffers (batch-norm statistics); they share their memory with
    the model, so that training one trains the other. A variable of the layer ``block1_conv`` is called ``block1_conv.kernel``, in the
    nested model ``head`` it is ``head.block1_conv.kernel``. In training mode the model is called with ``training=True``.

    While torch traces the module, every operation belongs to the layer that computes it, as with modules of torch, and the
    tensors that a nested model gets pass through an operator of its input layer.

    Attributes:
        model: the Keras model, built.
        inputs: names of its inputs, in its order.
        variables: parameter or buffer name → variable.
        paths: id of each layer, operation or nested model → dotted path.

    Args:
        model: built, on the torch backend.
        like: the module that the model was built anew from; layers and variables get its names, whatever Keras calls them now.
    """

    model: Any
    paths: dict[int, str]

    def __init__(self, model: Any, like: "KerasModule | None" = None) -> None:
        super().__init__()
        # Past nn.Module, which would register the model's own layers a second time, with its names for their variables.
        object.__setattr__(self, "model", model)
        self.inputs = input_names(model)
        found = list(operations(model))
        if like is not None and len(like.paths) == len(found):
            renamed = zip(found, like.paths.values(), strict=True)
            found = [(operation, path) for (operation, _), path in renamed]
        self.paths = {id(operation): path for operation, path in found}
        self.variables: dict[str, Any] = {}
        seen: set[int] = set()
        for operation, path in found:
            scope = self._scope(path)
            for variable in own_variables(operation):
                if id(variable) not in seen and variable.value.is_floating_point():
                    seen.add(id(variable))
                    self._register(scope, path, variable_name(operation, variable), variable)
        # Its arguments have the names of the inputs: a function for each instance.
        run = self._run
        self.forward = partial(run)
        self.forward.__signature__ = Signature(  # type: ignore[attr-defined]
            [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in self.inputs]
        )
        self.train(False)

    def _run(self, *given: Tensor, **named: Tensor) -> Any:
        """What the model returns for its inputs, by position or by name."""
        values = [*given, *(named[name] for name in self.inputs[len(given) :])]
        call = pack(self.model, values)
        if torch.compiler.is_exporting() and is_graph(self.model):
            for value, declared in zip(values, self.model.inputs, strict=True):
                # What the input layer says is fixed is fixed in the graph.
                _ = [int(value.shape[d]) for d, size in enumerate(declared.shape) if d and size]
        with self._named(), self._as_variables():
            return call(self.model, self.training)

    def __deepcopy__(self, memo: dict[int, Any]) -> "KerasModule":
        copied = KerasModule(rebuilt(self.model), self)
        copied.assign({name: variable.value for name, variable in self.variables.items()})
        memo[id(self)] = copied
        return copied.train(self.training)

    def assign(self, values: Mapping[str, Tensor]) -> None:
        """Give every variable a new value of its own shape.

        Args:
            values: name → tensor, for all of ``variables``.

        Raises:
            ModelError: other names or shapes.
        """
        if set(values) != set(self.variables):
            other = sorted(set(values) ^ set(self.variables))
            raise ModelError(
                f"{self.model.name}: other variables than before: {', '.join(other[:3])}"
            )
        for name, variable in self.variables.items():
            if tuple(variable.shape) != tuple(values[name].shape):
                raise ModelError(
                    f"{self.model.name}: {name} has the shape {tuple(variable.shape)} where {tuple(values[name].shape)} is needed"
                )
            variable.assign(values[name])
        for operation, _ in operations(self.model):
            if hasattr(
                operation, "finalize_state"
            ):  # constants that a layer derives from its variables
                operation.finalize_state()

    def directions(self) -> dict[str, str]:
        """Path of each forward layer of ``Bidirectional`` → path of its backward layer: Keras takes both for equally wide."""
        kind = sys.modules["keras"].layers.Bidirectional
        found = [
            operation for operation, _ in operations(self.model) if isinstance(operation, kind)
        ]
        return {self.paths[id(o.forward_layer)]: self.paths[id(o.backward_layer)] for o in found}

    def _scope(self, path: str) -> "_Scope":
        scope: nn.Module = self
        for part in path.split(".") if path else ():
            if part not in scope._modules:
                scope._modules[part] = _Scope()
            scope = scope._modules[part]  # type: ignore[assignment]
        return scope  # type: ignore[return-value]

    def _register(self, scope: nn.Module, path: str, name: str, variable: Any) -> None:
        leaf = free_name(name, lambda name: hasattr(scope, name))
        if variable.trainable:
            scope._parameters[leaf] = variable.value
        else:
            scope._buffers[leaf] = variable.value.detach()
        self.variables[f"{path}.{leaf}" if path else leaf] = variable

    def _as_variables(self) -> Any:
        """Where torch puts other tensors in the place of the parameters, as tracing does, the model computes with those."""
        tensors: dict[str, Tensor] = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        other = [
            (variable, tensors[name])
            for name, variable in self.variables.items()
            if name in tensors
            and tensors[name] is not variable.value
            and (
                type(tensors[name]) not in (Tensor, nn.Parameter)
                or _elsewhere(tensors[name], variable.value)
            )
        ]
        if not other:
            return nullcontext()
        return sys.modules["keras"].StatelessScope(state_mapping=other)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """While the module is exported, each Keras operation runs as the submodule that has its path."""
        if not torch.compiler.is_exporting():
            yield
            return
        with _naming:
            kind = sys.modules["keras"].Operation
            plain = kind.__call__
            module = self

            def call(operation: Any, *args: Any, **kwargs: Any) -> Any:
                path = module.paths.get(id(operation))
                if not path:
                    return plain(operation, *args, **kwargs)
                if is_graph(operation):
                    args, kwargs = module._marked(operation, args, kwargs)
                if getattr(operation, "unroll", None) is not False:
                    return module._scope(path)(plain, operation, *args, **kwargs)
                # Keras's rolled loop over time takes the batch apart, which would fix its size; the unrolled one does not.
                operation.unroll = True
                try:
                    return module._scope(path)(plain, operation, *args, **kwargs)
                finally:
                    operation.unroll = False

            kind.__call__ = call
            try:
                with _NoCopies():
                    yield
            finally:
                kind.__call__ = plain

    def _marked(self, nested: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments of a nested model, each passed through an operator that belongs to its input layer."""
        tree = sys.modules["keras"].tree
        names = iter(input_layers(nested))

        def mark(value: Any) -> Any:
            name = next(names, None) if isinstance(value, Tensor) else None
            if name is None:
                return value
            return self._scope(f"{self.paths[id(nested)]}.{name}")(
                torch.ops.aten.alias.default, value
            )

        return tree.map_structure(mark, args), kwargs


class _Scope(nn.Module):
    """The place of a layer in a ``KerasModule``: holds its variables, and runs what is called in its name."""

    def forward(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)


class _NoCopies(TorchFunctionMode):
    """Leaves out conversions of a tensor to the dtype and device that it has, which Keras asks for before every operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.to and set(kwargs) <= {"dtype", "device"}:
            tensor, *wanted = args
            wanted += kwargs.values()
            if all(_has(tensor, item) for item in wanted):
                return tensor
        return func(*args, **kwargs)


def _has(tensor: Tensor, wanted: Any) -> bool:
    """Whether a tensor has this dtype, or is on this device."""
    if isinstance(wanted, torch.dtype):
        return tensor.dtype == wanted
    if isinstance(wanted, str | torch.device):
        return tensor.device.type == torch.device(wanted).type
    return wanted is None


def _elsewhere(tensor: Tensor, value: Tensor) -> bool:
    return tensor.device != value.device or tensor.data_ptr() != value.data_ptr()
