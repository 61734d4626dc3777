"""What Keras models are made of: operations and their paths, variables, inputs. Keras itself is imported when needed."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from inspect import Parameter, signature
from typing import Any

from torch import nn

from tinier.errors import MissingError, ModelError

AUTOMATIC = re.compile(r"variable(_\d+)?")
SPECIAL_ARGUMENTS = ("training", "mask", "self")
RESERVED = frozenset(dir(nn.Module()))  # a submodule of such a name could not be reached


def keras_on_torch(purpose: str) -> Any:
    """The package ``keras``, running on torch; imported so if nothing has imported it yet.

    Args:
        purpose: what it is needed for, as the error says it.

    Raises:
        MissingError: Keras is not installed.
        ModelError: Keras runs on another backend in this process, which cannot be changed any more.
    """
    before = os.environ.get("KERAS_BACKEND")
    try:
        if "keras" not in sys.modules:
            os.environ["KERAS_BACKEND"] = "torch"
        import keras
    except ImportError as error:
        raise MissingError("keras", "keras", purpose) from error
    finally:
        if before is None:
            os.environ.pop("KERAS_BACKEND", None)
        else:
            os.environ["KERAS_BACKEND"] = before
    if not hasattr(keras, "backend") or int(keras.__version__.split(".")[0]) < 3:
        raise ModelError(
            f"Keras {keras.__version__} is installed, {purpose} needs Keras 3.9 or later"
        )
    if (backend := keras.backend.backend()) != "torch":
        raise ModelError(
            f"{purpose} needs Keras on the torch backend, in this process it runs on {backend}: set the environment variable "
            "KERAS_BACKEND=torch before the first import of keras, and load the model again (a .keras file suits any backend)"
        )
    return keras


def is_keras_model(model: Any) -> bool:
    """Whether it is a Keras model, of any backend; does not import Keras."""
    keras = sys.modules.get("keras")
    kind = getattr(keras, "Model", None)
    return isinstance(kind, type) and isinstance(model, kind)


def is_graph(operation: Any) -> bool:
    """Whether it is a functional or sequential model, whose layers its config lists."""
    keras = sys.modules["keras"]
    if isinstance(operation, keras.Sequential):
        return bool(operation.built)
    return isinstance(operation, keras.Model) and hasattr(operation, "operations")


def input_layers(model: Any) -> list[str]:
    """Names of the input layers of a functional or sequential model, in the order of its inputs."""
    return [tensor._keras_history.operation.name for tensor in model.inputs]


def input_names(model: Any) -> tuple[str, ...]:
    """Names of what a model takes: of its input layers, or of the arguments of its ``call``."""
    if is_graph(model):
        names: list[str] = []
        for name in input_layers(model):
            name = re.sub(r"\W", "_", name)
            names.append(free_name(name if name.isidentifier() else f"_{name}", names.__contains__))
        return tuple(names)
    arguments = signature(model.call).parameters.values()
    return tuple(
        item.name
        for item in arguments
        if item.name not in SPECIAL_ARGUMENTS
        and item.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
        and item.default is Parameter.empty
    )


def pack(model: Any, values: list[Any]) -> Callable[[Any, bool], Any]:
    """How a model is called with its inputs, given in its order."""
    if is_graph(model):
        structure = getattr(model, "_inputs_struct", None)
        single = structure is None or (len(values) == 1 and not isinstance(structure, dict))
        packed = (
            values[0] if single else sys.modules["keras"].tree.pack_sequence_as(structure, values)
        )
        return lambda called, training: called(packed, training=training)
    return lambda called, training: called(*values, training=training)


def operations(
    operation: Any, path: str = "", seen: set[int] | None = None
) -> Iterator[tuple[Any, str]]:
    """Every layer, operation and nested model in a model, with its dotted path; the model itself first, with an empty one."""
    seen = set() if seen is None else seen
    if id(operation) in seen:
        return
    seen.add(id(operation))
    yield operation, path
    taken: set[str] = set()
    for part in parts(operation):
        name = free_name(part.name.replace(".", "_"), lambda name: name in taken)
        if id(part) not in seen:
            taken.add(name)
            yield from operations(part, f"{path}.{name}" if path else name, seen)


def parts(operation: Any) -> list[Any]:
    """What a layer or model is directly made of: operations of a functional model, sublayers of others."""
    if is_graph(operation) and not isinstance(operation, sys.modules["keras"].Sequential):
        return list(operation.operations)
    flatten = getattr(operation, "_flatten_layers", None)
    return [] if flatten is None else list(flatten(include_self=False, recursive=False))


def unbuilt_layers(model: Any) -> list[str]:
    """Paths of layers that make their variables when they are first called, and were not."""
    plain = sys.modules["keras"].Layer.build
    return [
        path
        for part, path in operations(model)
        if path
        and not getattr(part, "built", True)
        and getattr(type(part), "build", plain) is not plain
    ]


def own_variables(operation: Any) -> list[Any]:
    """Variables of a layer that are not those of its sublayers."""
    inner = {
        id(variable) for part in parts(operation) for variable in getattr(part, "variables", ())
    }
    return [v for v in getattr(operation, "variables", ()) if id(v) not in inner]


def variable_name(operation: Any, variable: Any) -> str:
    """The variable's own name; of one that was given none, the layer's attribute that holds it."""
    if AUTOMATIC.fullmatch(variable.name):
        for name, value in vars(operation).items():
            if value is variable:
                return name.removeprefix("_")
    return str(variable.name)


def free_name(wanted: str, taken: Callable[[str], bool]) -> str:
    """The name, or with the first number behind it that makes it free."""
    name, number = wanted, 2
    while taken(name) or (isinstance(name, str) and name in RESERVED):
        name, number = f"{wanted}_{number}", number + 1
    return name
