"""What stands in the place of modules that cannot take smaller weights follows every argument, or refuses it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tinier
from tinier.errors import InputError
from tinier.graph.groups import channel_groups
from tinier.modules.attention import NarrowAttention
from tinier.modules.piece import Piece
from tinier.network import Network

WIDTH, HEADS, LENGTH = 24, 4, 5


class Fixed(nn.Module):
    """An attention whose sizes are written in its code, with arguments that most calls leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.5)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        mask: Tensor | None = None,
        factor: float = 1.0,
        training: bool = False,
        **extra: Any,
    ) -> Tensor:
        both = self.qkv(x + memory).view(*x.shape[:2], 3, 4, 6)
        q, k, v = both.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, mask)
        return self.drop(self.out(y.transpose(1, 2).flatten(2))) * factor


class Holder(nn.Module):
    """Calls it as its own caller does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = Fixed(), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Any = None) -> Tensor:
        result: Tensor = self.head(self.inner(x, x, mask, cache=cache))
        return result


@pytest.fixture(scope="module")
def piece() -> Any:
    torch.manual_seed(0)
    pruned = tinier.prune(Holder().eval(), torch.randn(2, LENGTH, WIDTH))
    assert isinstance(pruned.model.inner, Piece)
    return pruned


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"mask": torch.ones(LENGTH, LENGTH).tril().bool()}, "mask is a tensor"),
        ({"factor": 0.5}, "factor is 0.5; .* it was 1.0"),
        ({"cache": {}}, "cache is a dict"),
        ({"cache": object()}, "cache is a object"),
        ({"memory": torch.zeros(2, LENGTH, WIDTH)}, "memory is another tensor than x"),
        ({"other": True}, "other is True"),
    ],
)
def test_a_piece_refuses_what_its_example_did_not_have(
    piece: Any, change: dict[str, Any], named: str
) -> None:
    x = torch.randn(2, LENGTH, WIDTH)
    with pytest.raises(InputError, match=f"inner .Fixed.: its argument {named}"):
        piece.model.inner(**{"x": x, "memory": x} | change)


def test_a_piece_takes_the_same_call_in_other_words(piece: Any) -> None:
    x = torch.randn(3, LENGTH, WIDTH)
    wanted = piece.model.inner(x, x)
    for found in (
        piece.model.inner(memory=x, x=x),
        piece.model.inner(x, x, None, 1, cache=None),
        piece.model.inner(x, memory=x, training=True),
    ):
        assert torch.equal(found, wanted)
    assert any("refuses masks" in note for note in piece.notes)


def test_a_model_does_not_drop_a_mask_on_the_way_to_its_piece(piece: Any) -> None:
    x, mask = torch.randn(2, LENGTH, WIDTH), torch.ones(LENGTH, LENGTH).tril().bool()
    assert piece.model(x).shape == (2, LENGTH, 3)
    with pytest.raises(InputError, match="argument mask"):
        piece.model(x, mask)


def test_dropout_in_a_piece_is_on_in_training(piece: Any) -> None:
    x = torch.randn(2, LENGTH, WIDTH)
    piece.model.train()
    try:
        assert not torch.equal(piece.model(x), piece.model(x))
    finally:
        piece.model.eval()
    assert torch.equal(piece.model(x), piece.model(x))


MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"attn_mask": torch.ones(LENGTH, LENGTH).triu(1).bool()},
    "added": {"attn_mask": torch.linspace(-2, 2, LENGTH**2).view(LENGTH, LENGTH)},
    "padding": {"key_padding_mask": torch.arange(LENGTH)[None] > torch.tensor([[2], [4], [3]])},
    "both": {
        "attn_mask": torch.ones(LENGTH, LENGTH).triu(1).bool(),
        "key_padding_mask": torch.arange(LENGTH)[None] > torch.tensor([[2], [4], [3]]),
        "is_causal": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("kdim", [None, 16], ids=["packed", "apart"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("need_weights", [True, False])
def test_narrow_attention_is_torchs_own_without_the_heads_that_left(
    mask: str, need_weights: bool, kdim: int | None
) -> None:
    torch.manual_seed(1)
    whole = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, kdim=kdim, dropout=0.3).eval()
    nn.init.normal_(whole.in_proj_bias)
    size, left = WIDTH // HEADS, (0, 2)
    stay = torch.cat([torch.arange(h * size, (h + 1) * size) for h in left])
    gone = torch.tensor([i for i in range(WIDTH) if i not in stay])
    small = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, kdim=kdim, dropout=0.3).eval()
    with torch.no_grad():
        whole.out_proj.weight[:, gone] = 0
        small.load_state_dict(whole.state_dict())
        packed = torch.cat([stay + WIDTH * part for part in range(3)])
        for name in ("in_proj_weight", "in_proj_bias"):
            if (tensor := getattr(whole, name)) is not None:
                setattr(small, name, nn.Parameter(tensor[packed]))
        for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            if (tensor := getattr(whole, name)) is not None:
                setattr(small, name, nn.Parameter(tensor[stay]))
        small.out_proj.weight = nn.Parameter(whole.out_proj.weight[:, stay])
    narrow = NarrowAttention(small, len(left), size**-0.5).eval()
    q, k = torch.randn(3, LENGTH, WIDTH), torch.randn(3, LENGTH, kdim or WIDTH)
    v = torch.randn(3, LENGTH, WIDTH)
    options: dict[str, Any] = {"need_weights": need_weights, "average_attn_weights": False}
    options |= MASKS[mask]
    wanted, weights = whole(q, k, v, **options)
    found, given = narrow(q, k, v, **options)
    torch.testing.assert_close(found, wanted)
    if need_weights:
        torch.testing.assert_close(given, weights[:, left])
    narrow.train()
    assert not torch.equal(narrow(q, k, v, **options)[0], narrow(q, k, v, **options)[0])


def test_narrow_attention_without_a_batch_and_with_a_mask_for_each_head() -> None:
    torch.manual_seed(2)
    whole = nn.MultiheadAttention(WIDTH, HEADS).eval()
    narrow = NarrowAttention(whole, HEADS, (WIDTH // HEADS) ** -0.5).eval()
    x, mask = torch.randn(LENGTH, WIDTH), torch.randn(HEADS, LENGTH, LENGTH)
    for found, wanted in zip(
        narrow(x, x, x, attn_mask=mask), whole(x, x, x, attn_mask=mask), strict=True
    ):
        torch.testing.assert_close(found, wanted)
    y = torch.randn(LENGTH, 2, WIDTH)
    torch.testing.assert_close(narrow(y, y, y)[0], whole(y, y, y)[0])
    with pytest.raises(InputError, match="attn_mask"):
        narrow(y, y, y, attn_mask=mask)
    with pytest.raises(InputError, match="is_causal"):
        narrow(y, y, y, is_causal=True)


@pytest.mark.parametrize("nested", [False, True])
def test_torchs_encoder_follows_its_masks_after_a_cut(nested: bool) -> None:
    torch.manual_seed(3)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    x = torch.randn(2, LENGTH, 32)
    pruned = tinier.prune(encoder, x)
    assert any(isinstance(part, NarrowAttention) for part in pruned.model.modules())
    assert any("NarrowAttention" in note for note in pruned.notes)
    other = x.clone()
    other[0, 3:] = 9
    causal = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    padding = torch.tensor([[False] * 3 + [True] * 2, [False] * LENGTH])
    for options in ({"mask": causal}, {"src_key_padding_mask": padding}):
        with torch.no_grad():
            gap = pruned.model(x, **options) - pruned.model(other, **options)
        assert torch.equal(gap[0, :3], torch.zeros(3, 32))
        assert not torch.allclose(pruned.model(x, **options), pruned.model(x))
    again = tinier.prune(pruned, keep=0.5)
    assert any(isinstance(part, NarrowAttention) for part in again.model.modules())
    assert channel_groups(Network(again.model, {"src": x}).traced).groups


SIZES: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


def test_a_class_that_reads_its_config_gets_one_for_each_layer() -> None:
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    config = Phi3Config(intermediate_size=64, num_key_value_heads=2, **SIZES)
    model: Any = Phi3ForCausalLM(config).eval()
    ids = torch.randint(5, 90, (2, 7))
    pruned: Any = tinier.prune(model, {"input_ids": ids})
    assert type(pruned.model).__name__ == "Phi3ForCausalLM"
    assert not any(isinstance(part, Piece) for part in pruned.model.modules())
    heads = [layer.self_attn.config.num_attention_heads for layer in pruned.model.model.layers]
    widths = [layer.self_attn.o_proj.in_features for layer in pruned.model.model.layers]
    assert widths == [8 * count for count in heads] and min(heads) < 4
    assert config.num_attention_heads == 4
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(
        pruned.model.generate(ids, **options),
        pruned.model.generate(ids, use_cache=False, **options),
    )


def test_a_network_with_a_piece_keeps_no_cache() -> None:
    from transformers import FalconConfig, FalconForCausalLM

    torch.manual_seed(0)
    model: Any = FalconForCausalLM(FalconConfig(**SIZES)).eval()
    ids = torch.randint(5, 90, (2, 7))
    pruned: Any = tinier.prune(model, {"input_ids": ids})
    if not any(isinstance(part, Piece) for part in pruned.model.modules()):
        pytest.skip("the class is kept")
    assert model.config.use_cache and not pruned.model.config.use_cache
    found = pruned.model.generate(ids, max_new_tokens=3, do_sample=False)
    for step in (7, 8, 9):
        logits = pruned.model(found[:, :step]).logits[:, -1]
        assert torch.equal(found[:, step], logits.argmax(-1))
    with pytest.raises(InputError, match="use_cache=False"):
        pruned.model(ids, use_cache=True)


class Steps(nn.Module):
    """Adds positions of a length that steps of two give: every other length has them, and no graph can tell."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.tensor([index // 2 for index in range(x.shape[1])], dtype=x.dtype)
        q, k, v = self.qkv(x + places[:, None]).view(*x.shape[:2], 3, 4, 6).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_a_piece_says_which_sizes_it_needs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Steps(), nn.Linear(WIDTH, 3)).eval()
    assert model(torch.randn(2, LENGTH + 2, WIDTH)).shape == (2, LENGTH + 2, 3)
    pruned = tinier.prune(model, torch.randn(2, LENGTH, WIDTH)).model
    assert isinstance(pruned.get_submodule("1"), Piece)
    assert pruned(torch.randn(7, LENGTH, WIDTH)).shape == (7, LENGTH, 3)
    with pytest.raises(InputError, match=f"its argument x is 2 × 7 × .*, free × {LENGTH} × .* is"):
        pruned(torch.randn(2, LENGTH + 2, WIDTH))
