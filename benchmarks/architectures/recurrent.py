"""Sequences, audio, points, graphs and tables: networks as published, narrow."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from architectures.base import BATCH, Architecture, images, tokens


class LSTMClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(60, 16)
        self.lstm = nn.LSTM(16, 24, num_layers=2, batch_first=True)
        self.head = nn.Linear(24, 5)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(words))[1][0][-1])


class Tagger(nn.Module):
    """A bidirectional LSTM that labels every word."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(60, 16)
        self.lstm = nn.LSTM(16, 16, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(32, 9)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(words))[0])


class Seq2Seq(nn.Module):
    """GRU encoder and decoder with Luong attention (teacher-forced)."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(60, 16), nn.Embedding(50, 16)
        self.encoder = nn.GRU(16, 24, batch_first=True)
        self.decoder = nn.GRU(16, 24, batch_first=True)
        self.align = nn.Linear(24, 24, bias=False)
        self.mix = nn.Linear(48, 24)
        self.head = nn.Linear(24, 50)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        states, last = self.encoder(self.source(source))
        queries = self.decoder(self.target(target), last)[0]
        weights = torch.softmax(self.align(queries) @ states.transpose(1, 2), -1)
        return self.head(torch.tanh(self.mix(torch.cat([weights @ states, queries], -1))))


class ConvLSTM(nn.Module):
    """Shi et al. 2015: gates by convolution; next-frame prediction."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 16
        self.gates = nn.Conv2d(3 + 16, 64, 3, 1, 1)
        self.head = nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, steps, _, height, width = x.shape
        hidden = x.new_zeros(batch, self.width, height, width)
        cell = x.new_zeros(batch, self.width, height, width)
        for step in range(steps):
            i, f, o, g = self.gates(torch.cat([x[:, step], hidden], 1)).chunk(4, 1)
            cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
            hidden = torch.sigmoid(o) * torch.tanh(cell)
        return self.head(hidden)


class CRNN(nn.Module):
    """Shi et al. 2017: convolutions, then bidirectional LSTMs along the width; for text recognition."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, 1, 1), nn.BatchNorm2d(32),
            nn.ReLU(), nn.MaxPool2d((2, 1)), nn.Conv2d(32, 32, (4, 3), 1, (0, 1)), nn.ReLU(),
        )  # fmt: skip
        self.lstm = nn.LSTM(32, 24, bidirectional=True, batch_first=True)
        self.head = nn.Linear(48, 20)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x).squeeze(2).transpose(1, 2)
        return torch.log_softmax(self.head(self.lstm(y)[0]), -1)


class AttentiveLSTM(nn.Module):
    """An LSTM whose states are pooled by learned weights."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(12, 24, batch_first=True, bidirectional=True)
        self.hidden, self.score = nn.Linear(48, 16), nn.Linear(16, 1, bias=False)
        self.head = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        states = self.lstm(x)[0]
        weights = torch.softmax(self.score(torch.tanh(self.hidden(states))), 1)
        return self.head((weights * states).sum(1))


class TCN(nn.Module):
    """Bai et al. 2018: dilated causal convolutions with weight norm and residuals."""

    def __init__(self) -> None:
        super().__init__()
        norm = parametrizations.weight_norm
        self.first = norm(nn.Conv1d(6, 24, 3, dilation=1))
        self.second = norm(nn.Conv1d(24, 24, 3, dilation=2))
        self.third = norm(nn.Conv1d(24, 24, 3, dilation=4))
        self.down = nn.Conv1d(6, 24, 1)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(F.relu(self.first(F.pad(x, (2, 0)))) + self.down(x))
        y = F.relu(F.relu(self.second(F.pad(y, (4, 0)))) + y)
        y = F.relu(F.relu(self.third(F.pad(y, (8, 0)))) + y)
        return self.head(y[:, :, -1])


class WaveNet(nn.Module):
    """van den Oord et al. 2016: gated dilated convolutions with skips."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Conv1d(1, 16, 1)
        self.gates = nn.ModuleList(nn.Conv1d(16, 48, 2, dilation=2**i) for i in range(3))
        self.skips = nn.ModuleList(nn.Conv1d(24, 32, 1) for _ in range(3))
        self.residuals = nn.ModuleList(nn.Conv1d(24, 16, 1) for _ in range(3))
        self.out1, self.out2 = nn.Conv1d(32, 32, 1), nn.Conv1d(32, 20, 1)

    def forward(self, x: Tensor) -> Tensor:
        y, total = self.into(x), torch.zeros(())
        for index, gate in enumerate(self.gates):
            filtered, gated = gate(F.pad(y, (2**index, 0))).chunk(2, 1)
            z = torch.tanh(filtered) * torch.sigmoid(gated)
            total = total + self.skips[index](z)
            y = y + self.residuals[index](z)
        return self.out2(F.relu(self.out1(F.relu(total))))


class DeepSpeech(nn.Module):
    """Amodei et al. 2016: convolutions over the spectrum, bidirectional GRUs, a linear layer over letters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(1, 8, (11, 5), (2, 2), (5, 2)), nn.BatchNorm2d(8), nn.Hardtanh(0, 20),
            nn.Conv2d(8, 8, (5, 5), (2, 1), (2, 2)), nn.BatchNorm2d(8), nn.Hardtanh(0, 20),
        )  # fmt: skip
        self.gru = nn.GRU(8 * 8, 24, num_layers=2, bidirectional=True, batch_first=True)
        self.norm = nn.BatchNorm1d(48)
        self.head = nn.Linear(48, 29)

    def forward(self, spectrum: Tensor) -> Tensor:
        y = self.conv(spectrum).flatten(1, 2).transpose(1, 2)
        y = self.gru(y)[0].transpose(1, 2)
        return torch.log_softmax(self.head(self.norm(y).transpose(1, 2)), -1)


class SpeechBlock(nn.Module):
    def __init__(self, width: int, hidden: int, dilation: int) -> None:
        super().__init__()
        self.into = nn.Conv1d(width, hidden, 1)
        self.act1, self.act2 = nn.PReLU(), nn.PReLU()
        self.norm1, self.norm2 = nn.GroupNorm(1, hidden), nn.GroupNorm(1, hidden)
        self.depthwise = nn.Conv1d(hidden, hidden, 3, 1, dilation, dilation, groups=hidden)
        self.out, self.skip = nn.Conv1d(hidden, width, 1), nn.Conv1d(hidden, width, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm1(self.act1(self.into(x)))
        y = self.norm2(self.act2(self.depthwise(y)))
        return x + self.out(y), self.skip(y)


class ConvTasNet(nn.Module):
    """Luo and Mesgarani 2019: learned basis, masks for two speakers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv1d(1, 32, 16, 8, bias=False)
        self.norm, self.narrow = nn.GroupNorm(1, 32), nn.Conv1d(32, 16, 1)
        self.blocks = nn.ModuleList(SpeechBlock(16, 32, 2**i) for i in range(3))
        self.act, self.masks = nn.PReLU(), nn.Conv1d(16, 64, 1)
        self.decoder = nn.ConvTranspose1d(32, 1, 16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        basis = F.relu(self.encoder(x))
        y, total = self.narrow(self.norm(basis)), torch.zeros(())
        for block in self.blocks:
            y, skip = block(y)
            total = total + skip
        masks = torch.sigmoid(self.masks(self.act(total))).view(x.shape[0], 2, 32, -1)
        sources = (masks * basis[:, None]).flatten(0, 1)
        return self.decoder(sources).view(x.shape[0], 2, -1)


class Demucs(nn.Module):
    """Défossez et al. 2019: a U-Net on waves with gated units and an LSTM in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(
            nn.Sequential(nn.Conv1d(a, b, 8, 4, 2), nn.ReLU(), nn.Conv1d(b, 2 * b, 1), nn.GLU(1))
            for a, b in ((1, 16), (16, 32))
        )
        self.lstm = nn.LSTM(32, 32, bidirectional=True)
        self.linear = nn.Linear(64, 32)
        self.decoder = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(a, 2 * a, 3, 1, 1), nn.GLU(1), nn.ConvTranspose1d(a, b, 8, 4, 2)
            )
            for a, b in ((32, 16), (16, 2))
        )

    def forward(self, x: Tensor) -> Tensor:
        seen = []
        for layer in self.encoder:
            x = layer(x)
            seen.append(x)
        x = self.linear(self.lstm(x.permute(2, 0, 1))[0]).permute(1, 2, 0)
        for index, layer in enumerate(self.decoder):
            x = layer(x + seen.pop())
            x = F.relu(x) if index == 0 else x
        return x


class HiFiGAN(nn.Module):
    """Kong et al. 2020: a vocoder of weight-normed transposed convolutions and fused receptive fields."""

    def __init__(self) -> None:
        super().__init__()
        norm = parametrizations.weight_norm
        self.into = norm(nn.Conv1d(20, 48, 7, 1, 3))
        self.ups = nn.ModuleList(
            [norm(nn.ConvTranspose1d(48, 24, 8, 4, 2)), norm(nn.ConvTranspose1d(24, 16, 4, 2, 1))]
        )
        self.fields = nn.ModuleList(
            nn.ModuleList(
                norm(nn.Conv1d(width, width, kernel, 1, kernel // 2)) for kernel in (3, 7)
            )
            for width in (24, 16)
        )
        self.out = norm(nn.Conv1d(16, 1, 7, 1, 3))

    def forward(self, spectrum: Tensor) -> Tensor:
        y = self.into(spectrum)
        for up, fields in zip(self.ups, self.fields, strict=True):
            y = up(F.leaky_relu(y, 0.1))
            y = sum(y + field(F.leaky_relu(y, 0.1)) for field in fields) / len(fields)
        return torch.tanh(self.out(F.leaky_relu(y)))


class Postnet(nn.Module):
    """Tacotron 2: five convolutions that correct a spectrum, and the prenet before them."""

    def __init__(self) -> None:
        super().__init__()
        self.prenet = nn.Sequential(
            nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 20)
        )
        widths = (20, 32, 32, 32, 32)
        self.convs = nn.ModuleList(
            nn.Sequential(nn.Conv1d(a, b, 5, 1, 2), nn.BatchNorm1d(b), nn.Tanh(), nn.Dropout(0.5))
            for a, b in pairwise(widths)
        )
        self.last = nn.Sequential(nn.Conv1d(32, 20, 5, 1, 2), nn.BatchNorm1d(20))

    def forward(self, spectrum: Tensor) -> Tensor:
        first = self.prenet(spectrum)
        y = first.transpose(1, 2)
        for conv in self.convs:
            y = conv(y)
        return first + self.last(y).transpose(1, 2)


class GatedPixels(nn.Module):
    """PixelCNN: masked convolutions, gated."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 32, 7, 1, 3)
        self.second = nn.Conv2d(16, 32, 3, 1, 1)
        self.head = nn.Conv2d(16, 16, 1)
        mask = torch.ones(7, 7)
        mask[3, 3:] = 0
        mask[4:] = 0
        self.register_buffer("mask1", mask[None, None])
        mask = torch.ones(3, 3)
        mask[1, 2:] = 0
        mask[2:] = 0
        self.register_buffer("mask2", mask[None, None])

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.first.weight * self.mask1, self.first.bias, padding=3)
        a, b = y.chunk(2, 1)
        y = torch.tanh(a) * torch.sigmoid(b)
        z = F.conv2d(y, self.second.weight * self.mask2, self.second.bias, padding=1)
        a, b = z.chunk(2, 1)
        return self.head(y + torch.tanh(a) * torch.sigmoid(b))


class PointNet(nn.Module):
    """Qi et al. 2017: shared layers on points, a maximum over them, and a learned transform of the coordinates."""

    def __init__(self) -> None:
        super().__init__()
        self.transform = nn.Sequential(
            nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 32, 1), nn.ReLU()
        )
        self.matrix = nn.Linear(32, 9)
        self.local = nn.Sequential(nn.Conv1d(3, 24, 1), nn.BatchNorm1d(24), nn.ReLU())
        self.wide = nn.Sequential(nn.Conv1d(24, 48, 1), nn.BatchNorm1d(48), nn.ReLU())
        self.head = nn.Sequential(nn.Conv1d(72, 32, 1), nn.ReLU(), nn.Conv1d(32, 6, 1))

    def forward(self, points: Tensor) -> Tensor:
        matrix = self.matrix(self.transform(points).max(2)[0]).view(-1, 3, 3) + torch.eye(3)
        local = self.local((points.transpose(1, 2) @ matrix).transpose(1, 2))
        whole = self.wide(local).max(2, keepdim=True)[0].expand(-1, -1, points.shape[2])
        return self.head(torch.cat([local, whole], 1))


class GraphNet(nn.Module):
    """A graph convolution and a graph attention layer on a dense adjacency matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 24)
        self.second = nn.Linear(24, 4 * 8, bias=False)
        self.left, self.right = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(4, 8))
        self.head = nn.Linear(32, 5)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        degree = edges.sum(-1, keepdim=True).clamp(min=1)
        y = F.relu((edges / degree) @ self.first(nodes))
        y = self.second(y).view(*y.shape[:2], 4, 8)
        left, right = (y * self.left).sum(-1), (y * self.right).sum(-1)
        scores = F.leaky_relu(left[:, :, None] + right[:, None], 0.2)
        weights = torch.softmax(scores.masked_fill(edges[..., None] == 0, -1e9), 2)
        y = torch.einsum("bijh,bjhd->bihd", weights, y).flatten(2)
        return self.head(F.elu(y).mean(1))


class Table(nn.Module):
    """An MLP with batch norms and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm1d(12), nn.Linear(12, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Dropout(0.2),
            nn.Linear(48, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class TabTransformer(nn.Module):
    """Huang et al. 2020: columns of categories attend to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(10, 16) for _ in range(4))
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Sequential(
            nn.Linear(69, 48), nn.SELU(), nn.Linear(48, 24), nn.SELU(), nn.Linear(24, 2)
        )

    def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
        columns = torch.stack(
            [table(categories[:, i]) for i, table in enumerate(self.embeddings)], 1
        )
        y = self.encoder(columns).flatten(1)
        return self.head(torch.cat([y, self.norm(numbers)], 1))


class WideDeep(nn.Module):
    """Cheng et al. 2016: a linear part and a deep part."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(12, 1)
        self.embedding = nn.EmbeddingBag(30, 16, mode="mean")
        self.deep = nn.Sequential(
            nn.Linear(28, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 1)
        )

    def forward(self, numbers: Tensor, bags: Tensor) -> Tensor:
        deep = self.deep(torch.cat([numbers, self.embedding(bags)], 1))
        return torch.sigmoid(self.wide(numbers) + deep)


class DLRM(nn.Module):
    """Naumov et al. 2019: embeddings and numbers meet pairwise in dot products."""

    def __init__(self) -> None:
        super().__init__()
        self.bottom = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.embeddings = nn.ModuleList(nn.Embedding(20, 16) for _ in range(3))
        self.top = nn.Sequential(
            nn.Linear(22, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1)
        )
        self.register_buffer("pairs", torch.tril_indices(4, 4, -1), persistent=False)

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        dense = self.bottom(numbers)
        rows = torch.stack(
            [dense, *(t(categories[:, i]) for i, t in enumerate(self.embeddings))], 1
        )
        products = rows @ rows.transpose(1, 2)
        return self.top(torch.cat([dense, products[:, self.pairs[0], self.pairs[1]]], 1))


class Factorization(nn.Module):
    """DeepFM: second-order interactions and a deep part on the same embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.linear = nn.Embedding(40, 1)
        self.deep = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 1))

    def forward(self, categories: Tensor) -> Tensor:
        rows = self.embedding(categories)
        pairs = 0.5 * (rows.sum(1).square() - rows.square().sum(1)).sum(1, keepdim=True)
        return self.linear(categories).sum(1) + pairs + self.deep(rows.flatten(1))


class NBeats(nn.Module):
    """Oreshkin et al. 2020: blocks that take what they explain off the series."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 20)
            )
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        forecast = torch.zeros(())
        for block in self.blocks:
            back, ahead = block(x).split([16, 4], -1)
            x, forecast = x - back, forecast + ahead
        return forecast


class Siamese(nn.Module):
    """One encoder used on two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 16, 12),
        )

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return F.cosine_similarity(self.encoder(left), self.encoder(right), dim=1)


class MobileSpeaker(nn.Module):
    """An x-vector network: time-delay layers, mean and deviation over time."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(20, 32, 5), nn.ReLU(), nn.BatchNorm1d(32), nn.Conv1d(32, 32, 3, dilation=2), nn.ReLU(), nn.BatchNorm1d(32),
            nn.Conv1d(32, 48, 1), nn.ReLU(),
        )  # fmt: skip
        self.embed = nn.Linear(96, 24)
        self.head = nn.Linear(24, 6)

    def forward(self, spectrum: Tensor) -> Tensor:
        y = self.layers(spectrum)
        y = torch.cat([y.mean(2), y.std(2)], 1)
        return self.head(F.relu(self.embed(y)))


def _row(name: str, family: str, build: type[nn.Module], **shapes: tuple[int, ...]) -> Architecture:
    return Architecture(
        name,
        family,
        build,
        lambda: {key: torch.randn(BATCH, *shape) for key, shape in shapes.items()},
    )


ARCHITECTURES = (
    Architecture(
        "LSTM classifier",
        "recurrent",
        LSTMClassifier,
        lambda: {"words": tokens(BATCH, 7, vocabulary=60)},
    ),
    Architecture(
        "bi-LSTM tagger", "recurrent", Tagger, lambda: {"words": tokens(BATCH, 7, vocabulary=60)}
    ),
    Architecture(
        "GRU seq2seq with attention",
        "recurrent",
        Seq2Seq,
        lambda: {
            "source": tokens(BATCH, 7, vocabulary=60),
            "target": tokens(BATCH, 5, vocabulary=50),
        },
    ),
    _row("ConvLSTM", "recurrent", ConvLSTM, x=(3, 3, 8, 8)),
    _row("CRNN", "recurrent", CRNN, x=(1, 16, 32)),
    _row("LSTM with attention", "recurrent", AttentiveLSTM, x=(7, 12)),
    _row("TCN", "recurrent", TCN, x=(6, 20)),
    _row("N-BEATS", "time series", NBeats, x=(16,)),
    _row("WaveNet", "audio", WaveNet, x=(1, 32)),
    _row("Deep Speech 2", "audio", DeepSpeech, spectrum=(1, 32, 24)),
    _row("Conv-TasNet", "audio", ConvTasNet, x=(1, 128)),
    _row("Demucs", "audio", Demucs, x=(1, 128)),
    _row("HiFi-GAN", "audio", HiFiGAN, spectrum=(20, 12)),
    _row("Tacotron postnet", "audio", Postnet, spectrum=(12, 20)),
    _row("x-vector", "audio", MobileSpeaker, spectrum=(20, 32)),
    _row("gated PixelCNN", "generative", GatedPixels, x=(1, 12, 12)),
    _row("PointNet", "points and graphs", PointNet, points=(3, 32)),
    Architecture(
        "GCN and GAT",
        "points and graphs",
        GraphNet,
        lambda: {
            "nodes": torch.randn(BATCH, 6, 8),
            "edges": (torch.rand(BATCH, 6, 6) > 0.5).float(),
        },
    ),
    _row("MLP with batch norm", "tabular", Table, x=(12,)),
    Architecture(
        "TabTransformer",
        "tabular",
        TabTransformer,
        lambda: {"categories": torch.randint(0, 10, (BATCH, 4)), "numbers": torch.randn(BATCH, 5)},
        lengths={},
    ),
    Architecture(
        "Wide & Deep",
        "tabular",
        WideDeep,
        lambda: {"numbers": torch.randn(BATCH, 12), "bags": torch.randint(0, 30, (BATCH, 4))},
        lengths={},
    ),
    Architecture(
        "DLRM",
        "tabular",
        DLRM,
        lambda: {"numbers": torch.randn(BATCH, 8), "categories": torch.randint(0, 20, (BATCH, 3))},
        lengths={},
    ),
    Architecture(
        "DeepFM",
        "tabular",
        Factorization,
        lambda: {"categories": torch.randint(0, 40, (BATCH, 4))},
        lengths={},
    ),
    Architecture("Siamese", "vision", Siamese, lambda: {"left": images(16), "right": images(16)}),
)
