"""A torch module that the user's own function makes, named as ``module:function``: for the command line."""

from pathlib import Path
from typing import Any

from torch import nn

from tinier.data.python import FUNCTION, import_function
from tinier.errors import DataError, ModelError
from tinier.graph.trace import line_of
from tinier.network import Inputs, Network, as_tensors
from tinier.sources.base import Source, first_line
from tinier.sources.module import ModuleSource


class FunctionSource(Source):
    """``module:function``, where the function returns an ``nn.Module``, or a module and its example inputs."""

    name = "function"

    def accepts(self, model: Any) -> bool:
        return (
            isinstance(model, str) and bool(FUNCTION.fullmatch(model)) and not Path(model).exists()
        )

    def load(self, model: Any, example: Inputs | None) -> Network:
        try:
            made = import_function(model)()
        except DataError as error:
            raise ModelError(str(error)) from error
        except Exception as error:  # the user's own code
            where = line_of(error)
            raise ModelError(
                f"{model}() failed{f' at {where}' if where else ''}: {type(error).__name__}: {first_line(error)}"
            ) from error
        if isinstance(made, tuple) and len(made) == 2:
            made, own = made
            example = own if example is None else example
        if not isinstance(made, nn.Module):
            raise ModelError(
                f"{model} returned a {type(made).__name__}; return an nn.Module, or a module and its example inputs"
            )
        return ModuleSource().load(made, as_tensors(example))
