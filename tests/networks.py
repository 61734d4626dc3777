"""The conformance set: one tiny network of each family, seeded, in evaluation mode, with batch norms that have seen data.

Every method runs on every network of this table or refuses it with a reason.

    from networks import NETWORKS, build

    @pytest.mark.parametrize("name", NETWORKS)
    def test_…(name: str) -> None:
        network = build(name)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinier.network import Network

BATCH = 3


class Tiny(NamedTuple):
    """How to make a network, and what goes into it: the shape without the batch of each float input, or token ids."""

    module: Callable[[], nn.Module]
    inputs: dict[str, tuple[int, ...]]
    tokens: int = 0  # size of the vocabulary when the inputs are token ids


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(12, 24)
        self.fc2 = nn.Linear(24, 16)
        self.norm = nn.LayerNorm(16)
        self.fc3 = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.gelu(self.norm(self.fc2(F.relu(self.fc1(x))))))


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResidualCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(2)
        self.blocks = nn.Sequential(Residual(8, 8, 1), Residual(8, 16, 2), Residual(16, 16, 1))
        self.average = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(self.pool(F.relu(self.bn(self.conv(x)))))
        return self.fc(self.average(y).flatten(1))


class GroupedCNN(nn.Module):
    """Grouped and depthwise convolutions, channel shuffle (ShuffleNet) and squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.grouped = nn.Conv2d(8, 16, 3, 1, 1, groups=4, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, 2, 1, groups=16, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.squeeze = nn.Conv2d(16, 4, 1)
        self.excite = nn.Conv2d(4, 16, 1)
        self.pointwise = nn.Conv2d(16, 12, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.stem(x))
        y = F.hardswish(self.bn1(self.grouped(y)))
        batch, channels, height, width = y.shape
        y = y.view(batch, 4, channels // 4, height, width).transpose(1, 2).flatten(1, 2)
        y = F.relu6(self.bn2(self.depthwise(y)))
        y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        y = self.bn3(self.pointwise(y))
        return self.fc(y.flatten(1))


class DenseCNN(nn.Module):
    """Each layer sees all layers before it, joined by channel (DenseNet), and a transition that halves them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 1, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6 + 4 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(6 + 4 * i, 4, 3, 1, 1, bias=False) for i in range(3))
        self.transition = nn.Conv2d(18, 9, 1)
        self.fc = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        y = F.avg_pool2d(F.relu(self.transition(torch.cat(features, 1))), 2)
        return self.fc(y.mean((2, 3)))


class Attention(nn.Module):
    """Self-attention with one fused projection for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class StockAttention(nn.Module):
    """Self-attention by ``nn.MultiheadAttention``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int, attention: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """Vision transformer: patches of 4 × 4, a class token, learned positions."""

    def __init__(self, attention: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.positions = nn.Parameter(torch.randn(1, 5, 16) * 0.1)
        self.blocks = nn.Sequential(*(TransformerBlock(16, 4, attention) for _ in range(2)))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patches(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(y.shape[0], -1, -1), y], 1) + self.positions
        return self.head(self.norm(self.blocks(y))[:, 0])


class Recurrent(nn.Module):
    """Two recurrent layers and a classifier on the last step."""

    def __init__(self, layer: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.recurrent = layer(6, 10, num_layers=2, batch_first=True)
        self.fc = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.recurrent(x)[0][:, -1])


class UNet(nn.Module):
    """One level down and up, joined across; as many outputs as pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 6, 3, 1, 1), nn.BatchNorm2d(6), nn.ReLU())
        self.bottom = nn.Sequential(nn.Conv2d(6, 12, 3, 1, 1), nn.BatchNorm2d(12), nn.ReLU())
        self.up = nn.ConvTranspose2d(12, 6, 2, 2)
        self.join = nn.Sequential(nn.Conv2d(12, 6, 3, 1, 1), nn.BatchNorm2d(6), nn.ReLU())
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        y = self.up(self.bottom(F.max_pool2d(skip, 2)))
        return self.head(self.join(torch.cat([skip, y], 1)))


class Generator(nn.Module):
    """DCGAN's generator: noise to a picture by transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ConvTranspose2d(8, 12, 4, 1, 0, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.ConvTranspose2d(12, 6, 4, 2, 1, bias=False),
            nn.BatchNorm2d(6),
            nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(6, 3, 4, 2, 1),
            nn.Tanh(),
        )

    def forward(self, noise: Tensor) -> Tensor:
        return self.layers(noise[:, :, None, None])


class VAE(nn.Module):
    """A variational autoencoder; in evaluation mode the latent is its mean, so the output is deterministic."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(12, 16)
        self.mean = nn.Linear(16, 4)
        self.log_variance = nn.Linear(16, 4)
        self.decoder = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 12))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = F.relu(self.encoder(x))
        mean, log_variance = self.mean(y), self.log_variance(y)
        latent = mean
        if self.training:
            latent = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return torch.sigmoid(self.decoder(latent)), mean, log_variance


class Experts(nn.Module):
    """A mixture of experts with a dense gate: every expert runs, and the gate weighs them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 16)
        self.gate = nn.Linear(16, 3)
        self.up = nn.Parameter(torch.randn(3, 16, 24) * 0.2)  # (experts, width, hidden)
        self.down = nn.Parameter(torch.randn(3, 24, 16) * 0.2)  # (experts, hidden, width)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        weights = torch.softmax(self.gate(y), -1)  # (batch, experts)
        hidden = F.silu(torch.einsum("bw,ewh->ebh", y, self.up))
        out = torch.einsum("ebh,ehw->ebw", hidden, self.down)
        return self.head(y + (weights.T[:, :, None] * out).sum(0))


def encoder() -> nn.Module:
    """BERT with two layers, for classification."""
    from transformers import BertConfig, BertForSequenceClassification

    make: Any = BertConfig
    config = make(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=32,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def causal_lm() -> nn.Module:
    """Llama with two layers: four query heads share two key heads, rotary embeddings, a gated feed-forward."""
    from transformers import LlamaConfig, LlamaForCausalLM

    make: Any = LlamaConfig
    config = make(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


IMAGE: dict[str, tuple[int, ...]] = {"x": (3, 8, 8)}
NETWORKS: dict[str, Tiny] = {
    "mlp": Tiny(MLP, {"x": (12,)}),
    "residual_cnn": Tiny(ResidualCNN, IMAGE),
    "grouped_cnn": Tiny(GroupedCNN, IMAGE),
    "dense_cnn": Tiny(DenseCNN, IMAGE),
    "vit": Tiny(lambda: ViT(Attention), IMAGE),
    "vit_stock_attention": Tiny(lambda: ViT(StockAttention), IMAGE),
    "encoder": Tiny(encoder, {"input_ids": (7,), "attention_mask": (7,)}, tokens=50),
    "causal_lm": Tiny(causal_lm, {"input_ids": (7,)}, tokens=50),
    "lstm": Tiny(lambda: Recurrent(nn.LSTM), {"x": (7, 6)}),
    "gru": Tiny(lambda: Recurrent(nn.GRU), {"x": (7, 6)}),
    "unet": Tiny(UNet, IMAGE),
    "generator": Tiny(Generator, {"noise": (8,)}),
    "vae": Tiny(VAE, {"x": (12,)}),
    "experts": Tiny(Experts, {"x": (12,)}),
}


def inputs(name: str, batch: int = BATCH, seed: int = 1) -> dict[str, Tensor]:
    """Random inputs of a network of the table: normal floats, or token ids with a mask that hides the ends of some rows."""
    generator = torch.Generator().manual_seed(seed)
    tiny = NETWORKS[name]
    result = {}
    for key, shape in tiny.inputs.items():
        if key == "attention_mask":
            lengths = torch.randint(2, shape[0] + 1, (batch, 1), generator=generator)
            result[key] = (torch.arange(shape[0])[None] < lengths).long()
        elif tiny.tokens:
            result[key] = torch.randint(0, tiny.tokens, (batch, *shape), generator=generator)
        else:
            result[key] = torch.randn(batch, *shape, generator=generator)
    return result


def build(name: str, seed: int = 0) -> Network:
    """A network of the table, its weights drawn from ``seed``; torch's global random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = NETWORKS[name].module()
        randomize_norms(module)
    return Network(module.eval(), inputs(name), name)


def randomize_norms(module: nn.Module) -> None:
    """Give every norm statistics and scales that are not the identity, as after training."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                part.running_mean.normal_(0, 0.2)  # type: ignore[union-attr]
                part.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm):
                part.weight.uniform_(0.5, 1.5)
                part.bias.normal_(0, 0.2)
