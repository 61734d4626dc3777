"""Uniform widths: what is left is a standard checkpoint of its architecture, and widths that go together stay together."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tinier.edits.config import standard
from tinier.graph.groups import channel_groups
from tinier.graph.macs import COSTS, Cost
from tinier.network import Network
from tinier.verbs.pruning import prune

transformers = pytest.importorskip("transformers")

ENCODER: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
CAUSAL = ENCODER | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def ids() -> dict[str, Any]:
    return {"input_ids": torch.randint(5, 90, (2, 7))}


def images() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def pairs() -> dict[str, Any]:
    return ids() | {"decoder_input_ids": torch.randint(5, 90, (2, 6))}


ARCHITECTURES: dict[str, tuple[str, str, Callable[[], dict[str, Any]], dict[str, Any]]] = {
    "opt": ("OPTForCausalLM", "OPTConfig", ids, CAUSAL | {"ffn_dim": 64, "word_embed_proj_dim": 32}),
}  # fmt: skip


def build(name: str) -> tuple[Any, dict[str, Any]]:
    model, config, example, numbers = ARCHITECTURES[name]
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**numbers))
    return made.eval(), example()


def macs(network: Network) -> float:
    return Cost(COSTS["macs"](network.traced, channel_groups(network.traced))).at({})


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_left_is_a_standard_checkpoint(name: str) -> None:
    model, example = build(name)
    pruned = prune(model, example, keep=0.5, uniform=True)
    assert type(pruned.model) is type(model)
    assert macs(pruned.network) <= 0.5 * macs(pruned.original)
    assert standard(pruned.model, example)
    assert any("standard checkpoint" in note for note in pruned.notes)
