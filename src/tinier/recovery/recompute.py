"""Gradient checkpointing: the activations of blocks are not kept for the backward pass but computed again, for memory."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from tinier.errors import InputError


def blocks(module: nn.Module) -> list[nn.Module]:
    """The outermost repeated parts that have parameters: children of lists and sequences of at least two."""
    found: list[nn.Module] = []
    waiting = [module]
    while waiting:
        part = waiting.pop(0)
        children = list(part.children())
        if isinstance(part, nn.ModuleList | nn.Sequential) and len(children) > 1:
            found += [one for one in children if any(True for _ in one.parameters())]
        else:
            waiting += children
    return found


@contextmanager
def recomputed(module: nn.Module) -> Iterator[None]:
    """Blocks of the module keep only their inputs for the backward pass.

    Raises:
        InputError: the module has no repeated blocks, as a traced graph has none.

    Cost:
        Memory of the activations of one block and of the inputs of all; a second forward pass of each.

    Source:
        Chen et al. 2016, "Training deep nets with sublinear memory cost".
    """
    found = blocks(module)
    if not found:
        raise InputError(
            "recompute: the network has no list or sequence of blocks whose activations could be computed again; leave it out"
        )
    with ExitStack() as stack:
        for block in found:
            # What the class defines, or what somebody put on the instance.
            own = vars(block).get("forward")
            forward = block.forward
            block.forward = partial(_again, forward, block)
            stack.callback(_put_back, block, own)
        yield


def _again(forward: Any, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_kept(block)

    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Batch norms see the batch a second time, and must not count it twice."""
    norms = [part for part in block.modules() if isinstance(part, _BatchNorm)]
    before = [(part, part.momentum, part.num_batches_tracked) for part in norms]
    for part in norms:
        part.momentum = 0.0
        if part.num_batches_tracked is not None:
            part.num_batches_tracked = part.num_batches_tracked.clone()
    try:
        yield
    finally:
        for part, momentum, tracked in before:
            part.momentum, part.num_batches_tracked = momentum, tracked


def _put_back(block: nn.Module, own: Any) -> None:
    if own is None:
        del block.forward
    else:
        block.forward = own
