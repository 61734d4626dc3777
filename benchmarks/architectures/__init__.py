"""The coverage table: every module of this folder but ``base`` adds its ``ARCHITECTURES``."""

import contextlib
import importlib
import pkgutil
from dataclasses import replace
from typing import Any

import torch

from architectures.base import Architecture


def _torchvision() -> Any:
    """Let torchvision be imported where its compiled operators are absent: no network of the table calls them."""
    with contextlib.suppress(ImportError):
        try:
            importlib.import_module("torchvision")
        except RuntimeError as error:
            if "torchvision::" not in str(error):
                raise
            library = torch.library.Library("torchvision", "FRAGMENT")
            for name in ("nms", "qnms"):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            importlib.import_module("torchvision")
            return library
    return None


_operators = _torchvision()  # they live as long as this object


def table() -> tuple[dict[str, Architecture], dict[str, str]]:
    """Name → architecture in the order of files and rows, and file → why it could not be imported."""
    found: dict[str, Architecture] = {}
    missing: dict[str, str] = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name == "base":
            continue
        try:
            rows = importlib.import_module(f"architectures.{module.name}").ARCHITECTURES
        except ImportError as error:
            missing[module.name] = str(error)
            continue
        for row in rows:
            if row.name in found:  # as of several libraries
                row = replace(row, name=f"{row.name} ({module.name})")
            found[row.name] = row
    return found, missing
