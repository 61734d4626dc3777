"""Edits change networks, plans are lists of edits: decisions as values that can be printed, saved and applied again."""

import dataclasses
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from tinier.network import Network


@dataclass(frozen=True)
class Edit(ABC):
    """One change of a network. Concrete edits are frozen dataclasses of numbers, strings and (nested) tuples of them."""

    kind: ClassVar[str]

    @classmethod
    @abstractmethod
    def apply_all(cls, edits: "list[Edit]", network: Network) -> Network:
        """A new network with consecutive edits of this kind applied together; ``network`` is left as it is."""

    @abstractmethod
    def row(self) -> tuple[str, str]:
        """What is changed, and to what: one line of the plan's table."""


@dataclass(frozen=True)
class Plan:
    """An ordered list of edits. Applying it needs no data and is deterministic; an empty plan is the identity."""

    edits: tuple[Edit, ...] = ()

    def apply(self, network: Network) -> Network:
        """A new network with every edit applied, in order.

        Raises:
            RefusedError: an edit does not fit the network.
        """
        # Edits leave their input alone, so that the network's trace can be used as it is.
        result = network if self.edits else network.copy()
        rest = list(self.edits)
        while rest:
            kind = type(rest[0])
            run = []
            while rest and type(rest[0]) is kind:
                run.append(rest.pop(0))
            result = kind.apply_all(run, result)
        return result

    def __add__(self, other: "Plan") -> "Plan":
        return Plan(self.edits + other.edits)

    def to_json(self) -> str:
        """The plan as JSON text; ``Plan.from_json`` gives an equal plan back."""
        rows = [{"kind": edit.kind, **dataclasses.asdict(edit)} for edit in self.edits]
        return json.dumps({"version": 1, "edits": rows}, indent=1)

    @staticmethod
    def from_json(text: str) -> "Plan":
        """The plan that ``to_json`` wrote. Unknown kinds and fields raise ValueError."""
        kinds = {cls.kind: cls for cls in _concrete(Edit)}  # type: ignore[type-abstract]
        edits = []
        for row in json.loads(text)["edits"]:
            kind = row.pop("kind")
            if kind not in kinds:
                raise ValueError(f"plan: unknown edit {kind!r}; known are {', '.join(kinds)}")
            edits.append(kinds[kind](**{key: _frozen(value) for key, value in row.items()}))
        return Plan(tuple(edits))

    def __str__(self) -> str:
        rows = [(edit.kind, *edit.row()) for edit in self.edits] or [("nothing", "", "")]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )


def _concrete(cls: type[Edit]) -> list[type[Edit]]:
    return [leaf for child in cls.__subclasses__() for leaf in (_concrete(child) or [child])]


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
