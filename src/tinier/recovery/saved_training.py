"""The state of a training on disk, from which a killed run goes on bit for bit: safetensors and JSON, written whole or not at all."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tinier.errors import InputError, OutputError

TENSORS, NUMBERS = "training.safetensors", "training.json"
VERSION = 1


@dataclass
class State:
    """Where a training is.

    Attributes:
        asked: what the training was asked for, in names and plain values; one that was asked for something else does not go on.
        numbers: plain values: the step, the time taken, the history.
        tensors: name → tensor: weights, moments of the optimizer, averages, the teacher's answers.
    """

    asked: dict[str, Any]
    numbers: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)


def write(folder: Path, state: State) -> None:
    """Write the state; what was there stays until the new one is whole.

    Raises:
        OutputError: the folder cannot be made or written.

    Cost:
        As many bytes as the tensors have, twice for a moment.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fresh = folder / f".{TENSORS}"
        # Tied tensors and views are written each for itself.
        save_file(
            {
                name: value.detach().cpu().contiguous().clone()
                for name, value in state.tensors.items()
            },
            fresh,
            # The numbers belong to these tensors: one rename makes both valid.
            metadata={
                NUMBERS: json.dumps(
                    {"version": VERSION, "asked": state.asked, "numbers": state.numbers}
                )
            },
        )
        os.replace(fresh, folder / TENSORS)
    except OSError as error:
        raise OutputError(f"checkpoint={str(folder)!r}: cannot be written ({error})") from error


def read(folder: Path, asked: dict[str, Any]) -> State | None:
    """The state that was written; None where there is none yet.

    Args:
        folder: where ``write`` wrote.
        asked: what the training is asked for now.

    Raises:
        InputError: the file is damaged, or of a training that was asked for something else.
    """
    file = folder / TENSORS
    if not file.exists():
        return None
    try:
        tensors = load_file(file)
        found = json.loads(_metadata(file)[NUMBERS])
        earlier, numbers = found["asked"], found["numbers"]
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"checkpoint={str(folder)!r}: {file.name} is damaged or not of a training ({error}); "
            "remove it to begin anew"
        ) from error
    now = json.loads(json.dumps(asked))
    changed = [
        f"{name} was {earlier.get(name)!r} and is {now.get(name)!r}"
        for name in sorted({*earlier, *now})
        if earlier.get(name) != now.get(name)
    ]
    if changed:
        raise InputError(
            f"checkpoint={str(folder)!r} is of another training: {'; '.join(changed)}. "
            "Ask for the same again, or give another folder"
        )
    return State(asked, numbers, tensors)


def _metadata(file: Path) -> Mapping[str, str]:
    with safe_open(file, framework="pt") as opened:
        found: Mapping[str, str] = opened.metadata() or {}
        return found


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with a prefix before their names."""
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the tensors that have the prefix, without it."""
    start = f"{prefix}."
    return {
        name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)
    }


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The moments of an optimizer, by the number of the parameter and their name."""
    return {
        f"{number}.{name}": value
        for number, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give an optimizer of the same parameters its moments back."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
