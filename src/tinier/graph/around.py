"""What surrounds runs without values: what the network is told of itself, and what it may not keep afterwards."""

import functools
import gc
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C import TensorBase
from torch.utils import _pytree as pytree

from tinier.graph.shapes import META


@contextmanager
def located(device: torch.device, inside: Callable[[], bool]) -> Iterator[None]:
    """Tensors without values say that they are where the network is: models ask, and take other ways on other devices.

    Args:
        device: where the network is.
        inside: whether an operator is at work, to which they are on the meta device.
    """
    real = TensorBase.device

    def where(tensor: Tensor) -> torch.device:
        found = real.__get__(tensor)
        return device if found == META and not inside() else found

    # Attributes of the subclass in Python hide those of the base class in C for as long as they are there.
    answers = {
        "device": where,
        "is_cpu": lambda tensor: where(tensor).type == "cpu",
        "is_cuda": lambda tensor: where(tensor).type == "cuda",
        "is_meta": lambda tensor: where(tensor) == META,
    }
    for name, answer in answers.items():
        setattr(Tensor, name, property(answer))
    try:
        yield
    finally:
        for name in answers:
            delattr(Tensor, name)


@contextmanager
def exporting() -> Iterator[None]:
    """What models ask to know whether they are traced, as torch.export answers it."""
    compiler: Any = sys.modules["torch.compiler"]
    before = compiler._is_compiling_flag, compiler._is_exporting_flag
    compiler._is_compiling_flag = compiler._is_exporting_flag = True
    try:
        yield
    finally:
        compiler._is_compiling_flag, compiler._is_exporting_flag = before


@contextmanager
def unsaid(unknown: Callable[[Tensor], bool]) -> Iterator[list[str]]:
    """Checks of values that a trace does not know pass, and texts have a mark in their place: both are for messages to the user.

    Args:
        unknown: whether the values of a tensor are not known.

    Yields:
        What was asked for so, filled inside: a network that asks may take another way where it is told.
    """
    asked: list[str] = []
    check, write = torch._check_tensor_all_with, Tensor.__format__

    def checked(error: type[Exception], condition: Any, message: Any = None) -> None:
        if isinstance(condition, Tensor) and unknown(condition):
            asked.append("check")
        else:
            check(error, condition, message)

    def written(tensor: Tensor, form: str) -> str:
        if not unknown(tensor):
            return write(tensor, form)
        asked.append("text")
        return f"<unknown value {len(asked)}>"  # never twice the same, should it be a key

    torch._check_tensor_all_with = checked  # type: ignore[assignment]
    Tensor.__format__ = written  # type: ignore[method-assign]
    try:
        yield asked
    finally:
        torch._check_tensor_all_with = check
        Tensor.__format__ = write  # type: ignore[method-assign]


@contextmanager
def opened() -> Iterator[None]:
    """Torch's own encoder layers as the operators that they are made of, and not as one that is for inference alone."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def without_values(tensor: Tensor) -> bool:
    """Whether a tensor is on the meta device, whatever it says itself."""
    is_meta: Any = TensorBase.is_meta  # the attribute itself, which answers for a tensor
    return bool(is_meta.__get__(tensor))


def forget(made: Sequence[weakref.ref[Tensor]], stays: Any) -> None:
    """Take tensors without values out of caches that are not the network's, such as functools.lru_cache and dicts of a file.

    Args:
        made: what runs have made.
        stays: what of it is still needed, in lists, tuples and dicts.
    """
    known = {id(leaf) for leaf in pytree.tree_leaves(stays)}
    if all((t := found()) is None or id(t) in known for found in made):
        return
    gc.collect()
    left = [t for found in made if (t := found()) is not None and id(t) not in known]
    own = {id(tensor) for tensor in left}
    holders: list[Any] = [h for h in gc.get_referrers(*left) if h is not left] if left else []
    for holder in holders:
        if type(holder) in (dict, OrderedDict):
            for key in [key for key, value in holder.items() if id(value) in own]:
                del holder[key]
    if holders:
        for wrapper in gc.get_objects():
            if type(wrapper) is functools._lru_cache_wrapper:
                wrapper.cache_clear()
