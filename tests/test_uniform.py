"""Uniform widths: what is left is a standard checkpoint of its architecture, and widths that go together stay together."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tinier.edits.config import standard
from tinier.errors import InputError, RefusedError
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


LLM = CAUSAL | {"intermediate_size": 64, "num_key_value_heads": 2}
PICTURES: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
TWO: dict[str, Any] = {
    "vocab_size": 100, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
# Class, config, example, numbers, and the share that is kept: more where what the network returns, or groups of one width, pin the widths.
ARCHITECTURES: dict[str, tuple[str, str, Callable[[], dict[str, Any]], dict[str, Any], float]] = {
    "opt": ("OPTForCausalLM", "OPTConfig", ids, CAUSAL | {"ffn_dim": 64, "word_embed_proj_dim": 32}, 0.5),
    "heads without a number": ("Phi3ForCausalLM", "Phi3Config", ids, LLM, 0.5),
    "experts as wide as the residual": (
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig", ids,
        LLM | {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}, 0.5,
    ),
    "experts": ("MixtralForCausalLM", "MixtralConfig", ids, LLM | {"num_local_experts": 4}, 0.5),
    "neurons left open": ("FalconForCausalLM", "FalconConfig", ids, CAUSAL, 0.5),
    "list of widths": (
        "ConvNextForImageClassification", "ConvNextConfig", images,
        {"image_size": 32, "hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2}, 0.5,
    ),
    "two numbers of one width": (
        "ResNetForImageClassification", "ResNetConfig", images,
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}, 0.5,
    ),
    "stages of their own": (
        "RegNetForImageClassification", "RegNetConfig", images,
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "groups_width": 8}, 0.7,
    ),
    "expanded": (
        "MambaForCausalLM", "MambaConfig", ids,
        {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, 0.5,
    ),
    "doubled by stage": (
        "SwinForImageClassification", "SwinConfig", images,
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}, 0.5,
    ),
    "ratio and unused token": ("Dinov2ForImageClassification", "Dinov2Config", images, PICTURES, 0.5),
    "projection between unequal widths": (
        "ElectraForSequenceClassification", "ElectraConfig", ids, ENCODER | {"embedding_size": 16, "intermediate_size": 64}, 0.5,
    ),
    "grouped positions": (
        "Wav2Vec2ForCTC", "Wav2Vec2Config", lambda: {"input_values": torch.randn(2, 400)},
        ENCODER | {
            "vocab_size": 30, "intermediate_size": 64, "conv_dim": [16, 16], "conv_kernel": [10, 3], "conv_stride": [5, 2],
            "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
        }, 0.5,
    ),
    "width that is returned": ("BartForConditionalGeneration", "BartConfig", pairs, TWO, 0.8),
    "width of one half that is returned": (
        "WhisperForConditionalGeneration", "WhisperConfig",
        lambda: {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": torch.randint(5, 90, (2, 6))},
        TWO | {"num_mel_bins": 8, "max_source_positions": 10}, 0.8,
    ),
}  # fmt: skip


def build(name: str) -> tuple[Any, dict[str, Any], float]:
    model, config, example, numbers, keep = ARCHITECTURES[name]
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**numbers))
    return made.eval(), example(), keep


def macs(network: Network) -> float:
    return Cost(COSTS["macs"](network.traced, channel_groups(network.traced))).at({})


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_left_is_a_standard_checkpoint(name: str) -> None:
    model, example, keep = build(name)
    pruned = prune(model, example, keep=keep, uniform=True)
    assert type(pruned.model) is type(model)
    assert macs(pruned.network) <= keep * macs(pruned.original)
    # As from_pretrained does: the class, what its config writes, and the weights.
    config: Any = pruned.model.config
    again = type(model)(type(config).from_dict(config.to_dict())).eval()
    again.load_state_dict(pruned.model.state_dict())
    with torch.no_grad():
        found, wanted = again(**example)[0], pruned.model(**example)[0]
    torch.testing.assert_close(found, wanted)
    assert any("standard checkpoint: from_pretrained" in note for note in pruned.notes)


@pytest.mark.parametrize("name", ["bert", "distilbert", "vit"])
def test_coarse_widths_come_near_what_was_asked_for(name: str) -> None:
    more: dict[str, Any] = {"intermediate_size": 64}
    if name == "vit":
        config: Any = transformers.ViTConfig(**PICTURES | more)
        model, example = transformers.ViTForImageClassification(config), images()
    elif name == "bert":
        model = transformers.BertForSequenceClassification(
            transformers.BertConfig(**ENCODER | more)
        )
        example = ids()
    else:
        config = transformers.DistilBertConfig(
            vocab_size=100, dim=32, hidden_dim=64, n_layers=2, n_heads=4
        )
        model, example = transformers.DistilBertForSequenceClassification(config), ids()
    pruned = prune(model.eval(), example, keep=0.5, uniform=True)
    assert 0.46 <= macs(pruned.network) / macs(pruned.original) <= 0.5
    assert standard(pruned.model, example)


def test_what_is_not_standard_says_what_the_config_cannot() -> None:
    config = transformers.MobileNetV2Config(depth_multiplier=0.35, image_size=32)
    model = transformers.MobileNetV2ForImageClassification(config).eval()
    pruned = prune(model, images(), keep=0.5, uniform=True)
    (note,) = [note for note in pruned.notes if "no standard checkpoint" in note]
    assert "convolution.weight is (" in note and "its config makes it (" in note
    loose = prune(model, images(), keep=0.5)
    assert not any("standard checkpoint" in note for note in loose.notes)


def test_a_refusal_says_that_uniform_widths_were_asked_for() -> None:
    config = transformers.BloomConfig(vocab_size=100, hidden_size=32, n_layer=2, n_head=4)
    model = transformers.BloomForCausalLM(config).eval()
    with pytest.raises(RefusedError, match=r"without uniform=True it is 3.0%"):
        prune(model, ids(), keep=0.5, uniform=True)
    assert macs(prune(model, ids(), keep=0.5).network)


class Layers(nn.Module):
    """Three blocks that are alike."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(8, 32)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(3)
        )
        self.out = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.into(x)
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


def inner(pruned: Any) -> list[int]:
    return [block[0].out_features for block in pruned.model.blocks]


def test_a_rate_of_one_layer_holds_for_all_that_are_alike() -> None:
    torch.manual_seed(0)
    model, x = Layers().eval(), torch.randn(4, 8)
    assert inner(prune(model, x, uniform=True, rates={"blocks.0.0": 0.5}, keep=0.9)) == [32] * 3
    assert inner(prune(model, x, uniform=True, rates={"blocks.*": 0.25}, keep=1.0)) == [16] * 3
    with pytest.raises(InputError, match=r"blocks.1.0 and blocks.0.0 change in step"):
        prune(model, x, uniform=True, rates={"blocks.0.0": 0.5, "blocks.1.0": 0.25})
    with pytest.raises(InputError, match=r"blocks.0.0 changes in step with what stays"):
        prune(model, x, uniform=True, rates={"blocks.0.0": 0.5}, exclude=["blocks.1"])


def test_a_layer_that_stays_keeps_all_that_are_alike() -> None:
    torch.manual_seed(0)
    model, x = Layers().eval(), torch.randn(4, 8)
    pruned = prune(model, x, uniform=True, exclude=["blocks.0.0"])
    assert inner(pruned) == [64] * 3
    assert macs(pruned.network) <= 0.5 * macs(pruned.original)
    config = transformers.BertConfig(**ENCODER | {"intermediate_size": 64})
    bert = transformers.BertForSequenceClassification(config).eval()
    kept: Any = prune(bert, ids(), uniform=True, exclude=["bert.encoder.layer.0.intermediate"])
    assert standard(kept.model, ids()) and kept.model.config.intermediate_size == 64


def test_the_users_random_numbers_are_left_where_they_were() -> None:
    model, example, keep = build("heads without a number")
    before = torch.get_rng_state()
    prune(model, example, keep=keep, uniform=True)
    assert torch.equal(before, torch.get_rng_state())
