"""A torch module that the user's own function makes, named as ``module:function``: for the command line."""

from pathlib import Path
from typing import Any

from torch import nn

from tinier.data.python import FUNCTION, call_function
from tinier.errors import DataError, ModelError
from tinier.network import Inputs, Network, as_tensors
from tinier.sources.base import Source
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
            made = call_function(model)
        except DataError as error:
            raise ModelError(str(error)) from error
        if isinstance(made, tuple) and len(made) == 2:
            made, own = made
            example = own if example is None else example
        if not isinstance(made, nn.Module):
            raise ModelError(
                f"{model} returned a {type(made).__name__}; return an nn.Module, or a module and its example inputs"
            )
        return ModuleSource().load(made, as_tensors(example))
