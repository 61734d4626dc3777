"""States that networks are run and traced in, and left as they were: evaluation, repeated random numbers, silence."""

import contextlib
import logging
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def repeatable(seed: int = 0) -> Iterator[None]:
    """Inside, random operators of a network draw the same values each time; the user's generator is left where it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, each submodule's own mode again afterwards.

    What a generation loop of transformers keeps from step to step is no output of the network: ``use_cache`` is off inside. Numbers that
    a ``forward`` counts up are afterwards what they were. What torch.compile made of its parts is not used.
    """
    plain_values = [
        (part, {k: v for k, v in vars(part).items() if type(v) in (int, float, str, bool)})
        for part in module.modules()
    ]
    modes = {name: part.training for name, part in module.named_modules()}
    configs = {
        id(c): c for part in module.modules() if (c := getattr(part, "config", None)) is not None
    }
    caching = [
        c
        for c in configs.values()
        if getattr(c, "use_cache", None) is True and hasattr(c, "to_dict")
    ]
    module.eval()
    compiled = "torch._dynamo" in sys.modules  # else nothing is, and the import takes a second
    try:
        for config in caching:
            config.use_cache = False
        with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
            yield
    finally:
        for config in caching:
            config.use_cache = True
        for part, values in plain_values:
            vars(part).update(values)
        for name, part in module.named_modules():
            part.training = modes[name]


@contextlib.contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """What modules keep of the runs inside, in attributes and in dicts and lists of theirs, is forgotten afterwards.

    Tensors of a run without values must not stay: the network's next run, or a copy of it, would find them.
    """
    attributes = [(vars(part), dict(vars(part))) for part in module.modules()]
    held: list[tuple[Any, Any]] = [
        (value, value.copy())
        for now, _ in attributes
        for value in now.values()
        if type(value) in (dict, list, OrderedDict)
    ]
    try:
        yield
    finally:
        # Whole: transformers notes in an attribute that it has put hooks into a dict, and one is nothing without the other.
        for now, old in attributes:
            now.clear()
            now.update(old)
        for value, old in held:
            value.clear()
            value.extend(old) if isinstance(value, list) else value.update(old)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what torch says to its own developers while it traces and exports; what stops it comes as an exception, too."""
    # Those of its parts take the level of "torch", but where they have been given their own.
    names = ("torch", "torch.export", "torch.onnx", "torch.fx", "onnxscript")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def forgotten(module: nn.Module) -> nn.Module:
    """The module without what it keeps of its weights from run to run: the tensors in dicts of its that are called caches.

    LeViT keeps its biases so; of other weights they would be wrong.
    """
    for part in module.modules():
        for name, value in vars(part).items():
            if (
                type(value) is dict
                and "cache" in name
                and any(isinstance(t, Tensor) for t in value.values())
            ):
                value.clear()
    return module
