"""Generative adversarial networks and variational autoencoders: as published, narrow."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from architectures.base import BATCH, Architecture, images, tokens


class DCGAN(nn.Module):
    """Radford et al. 2016: noise to a picture by transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, stride in ((16, 48, 1), (48, 32, 2), (32, 16, 2)):
            layers += [
                nn.ConvTranspose2d(before, after, 4, stride, stride - 1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(True),
            ]
        self.layers = nn.Sequential(*layers, nn.ConvTranspose2d(16, 3, 4, 2, 1), nn.Tanh())

    def forward(self, noise: Tensor) -> Tensor:
        return self.layers(noise)


class Discriminator(nn.Module):
    """A spectrally normalised PatchGAN discriminator."""

    def __init__(self) -> None:
        super().__init__()
        norm = parametrizations.spectral_norm
        self.layers = nn.Sequential(
            norm(nn.Conv2d(3, 16, 4, 2, 1)),
            nn.LeakyReLU(0.2, True),
            norm(nn.Conv2d(16, 32, 4, 2, 1)),
            nn.LeakyReLU(0.2, True),
            norm(nn.Conv2d(32, 64, 4, 1, 1)),
            nn.LeakyReLU(0.2, True),
            norm(nn.Conv2d(64, 1, 4, 1, 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Modulated(nn.Module):
    """StyleGAN2's convolution: the weight is scaled by the style for each example, then demodulated."""

    def __init__(self, inputs: int, outputs: int, style: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, outputs, inputs, 3, 3))
        self.style = nn.Linear(style, inputs)
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.noise = nn.Parameter(torch.zeros(1))
        self.scale = (inputs * 9) ** -0.5

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        batch, inputs, height, width = x.shape
        factor = 1 + self.style(style).view(batch, 1, inputs, 1, 1)
        weight = self.scale * self.weight * factor
        weight = weight * torch.rsqrt(weight.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        outputs = weight.shape[1]
        weight = weight.view(batch * outputs, inputs, 3, 3)
        x = x.reshape(1, batch * inputs, height, width)
        y = F.conv2d(x, weight, padding=1, groups=batch).view(batch, outputs, height, width)
        return F.leaky_relu(y + self.bias.view(1, -1, 1, 1), 0.2)


class StyleGAN(nn.Module):
    """Karras et al. 2020: a mapping network, a constant and modulated convolutions; each level adds to the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.mapping = nn.Sequential(
            nn.Linear(16, 32), nn.LeakyReLU(0.2), nn.Linear(32, 32), nn.LeakyReLU(0.2)
        )
        self.constant = nn.Parameter(torch.randn(1, 32, 4, 4))
        self.first = Modulated(32, 32, 32)
        self.second = Modulated(32, 16, 32)
        self.third = Modulated(16, 16, 32)
        self.pictures = nn.ModuleList([nn.Conv2d(32, 3, 1), nn.Conv2d(16, 3, 1)])

    def forward(self, noise: Tensor) -> Tensor:
        noise = noise * torch.rsqrt(noise.square().mean(1, keepdim=True) + 1e-8)
        style = self.mapping(noise)
        y = self.first(self.constant.repeat(noise.shape[0], 1, 1, 1), style)
        picture = F.interpolate(self.pictures[0](y), scale_factor=2.0, mode="bilinear")
        y = self.second(F.interpolate(y, scale_factor=2.0, mode="bilinear"), style)
        return picture + self.pictures[1](self.third(y, style))


class AdaIN(nn.Module):
    """StyleGAN 1: adaptive instance normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.constant = nn.Parameter(torch.randn(1, 32, 4, 4))
        self.convs = nn.ModuleList([nn.Conv2d(32, 32, 3, 1, 1), nn.Conv2d(32, 16, 3, 1, 1)])
        self.styles = nn.ModuleList([nn.Linear(16, 64), nn.Linear(16, 32)])
        self.picture = nn.Conv2d(16, 3, 1)

    def forward(self, noise: Tensor) -> Tensor:
        y = self.constant.expand(noise.shape[0], -1, -1, -1)
        for conv, style in zip(self.convs, self.styles, strict=True):
            y = F.instance_norm(F.leaky_relu(conv(F.interpolate(y, scale_factor=2.0)), 0.2))
            scale, shift = style(noise)[:, :, None, None].chunk(2, 1)
            y = (1 + scale) * y + shift
        return self.picture(y)


class SRGAN(nn.Module):
    """Ledig et al. 2017: residual blocks with PReLU, and pixel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(3, 16, 9, 1, 4), nn.PReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(16, 16, 3, 1, 1),
                nn.BatchNorm2d(16),
                nn.PReLU(16),
                nn.Conv2d(16, 16, 3, 1, 1),
                nn.BatchNorm2d(16),
            )
            for _ in range(2)
        )
        self.up = nn.Sequential(nn.Conv2d(16, 64, 3, 1, 1), nn.PixelShuffle(2), nn.PReLU())
        self.tail = nn.Conv2d(16, 3, 9, 1, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = first = self.head(x)
        for block in self.blocks:
            y = y + block(y)
        return self.tail(self.up(y + first))


class Dense(nn.Module):
    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(width + i * growth, growth if i < 4 else width, 3, 1, 1) for i in range(5)
        )

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for conv in self.convs[:-1]:
            seen.append(F.leaky_relu(conv(torch.cat(seen, 1)), 0.2))
        return x + 0.2 * self.convs[-1](torch.cat(seen, 1))


class ESRGAN(nn.Module):
    """Wang et al. 2018: residual-in-residual dense blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 16, 3, 1, 1)
        self.blocks = nn.Sequential(Dense(16, 8), Dense(16, 8))
        self.trunk = nn.Conv2d(16, 16, 3, 1, 1)
        self.up = nn.Conv2d(16, 16, 3, 1, 1)
        self.tail = nn.Conv2d(16, 3, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(x)
        y = y + self.trunk(self.blocks(y))
        y = F.leaky_relu(self.up(F.interpolate(y, scale_factor=2.0, mode="nearest")), 0.2)
        return self.tail(y)


class Pix2Pix(nn.Module):
    """Isola et al. 2017: a U-Net of strided and transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            [nn.Conv2d(3, 16, 4, 2, 1), nn.Conv2d(16, 32, 4, 2, 1), nn.Conv2d(32, 48, 4, 2, 1)]
        )
        self.up = nn.ModuleList(
            [
                nn.ConvTranspose2d(48, 32, 4, 2, 1),
                nn.ConvTranspose2d(64, 16, 4, 2, 1),
                nn.ConvTranspose2d(32, 3, 4, 2, 1),
            ]
        )
        self.norms = nn.ModuleList([nn.BatchNorm2d(32), nn.BatchNorm2d(16)])

    def forward(self, x: Tensor) -> Tensor:
        seen = []
        for conv in self.down:
            x = F.leaky_relu(conv(x), 0.2)
            seen.append(x)
        y = self.norms[0](self.up[0](x))
        y = self.norms[1](self.up[1](torch.cat([F.relu(y), seen[1]], 1)))
        return torch.tanh(self.up[2](torch.cat([F.relu(y), seen[0]], 1)))


class CycleGAN(nn.Module):
    """Zhu et al. 2017: reflection padding, instance norms, residual blocks."""

    def __init__(self) -> None:
        super().__init__()

        def block() -> nn.Sequential:
            return nn.Sequential(
                nn.ReflectionPad2d(1), nn.Conv2d(32, 32, 3), nn.InstanceNorm2d(32), nn.ReLU(True),
                nn.ReflectionPad2d(1), nn.Conv2d(32, 32, 3), nn.InstanceNorm2d(32),
            )  # fmt: skip

        self.encode = nn.Sequential(
            nn.ReflectionPad2d(3), nn.Conv2d(3, 16, 7), nn.InstanceNorm2d(16), nn.ReLU(True),
            nn.Conv2d(16, 32, 3, 2, 1), nn.InstanceNorm2d(32), nn.ReLU(True),
        )  # fmt: skip
        self.blocks = nn.ModuleList([block(), block()])
        self.decode = nn.Sequential(
            nn.ConvTranspose2d(32, 16, 3, 2, 1, output_padding=1), nn.InstanceNorm2d(16, affine=True), nn.ReLU(True),
            nn.ReflectionPad2d(3), nn.Conv2d(16, 3, 7), nn.Tanh(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y = self.encode(x)
        for block in self.blocks:
            y = y + block(y)
        return self.decode(y)


class ConditionalNorm(nn.Module):
    """A batch norm whose scale and shift come from the class."""

    def __init__(self, width: int, condition: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width, affine=False)
        self.scale = nn.Linear(condition, width, bias=False)
        self.shift = nn.Linear(condition, width, bias=False)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.scale(condition), self.shift(condition)
        return self.norm(x) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]


class BigGAN(nn.Module):
    """Brock et al. 2019: conditional batch norms, non-local attention, spectral norm."""

    def __init__(self) -> None:
        super().__init__()
        norm = parametrizations.spectral_norm
        self.classes = nn.Embedding(5, 16)
        self.first = norm(nn.Linear(16, 32 * 16))
        self.norms = nn.ModuleList([ConditionalNorm(32, 32), ConditionalNorm(24, 32)])
        self.convs = nn.ModuleList(
            [norm(nn.Conv2d(32, 24, 3, 1, 1)), norm(nn.Conv2d(24, 24, 3, 1, 1))]
        )
        self.shortcut = norm(nn.Conv2d(32, 24, 1))
        self.query, self.key = (
            norm(nn.Conv2d(24, 8, 1, bias=False)),
            norm(nn.Conv2d(24, 8, 1, bias=False)),
        )
        self.value, self.mix = (
            norm(nn.Conv2d(24, 12, 1, bias=False)),
            norm(nn.Conv2d(12, 24, 1, bias=False)),
        )
        self.gamma = nn.Parameter(torch.ones(()))
        self.last, self.picture = nn.BatchNorm2d(24), nn.Conv2d(24, 3, 3, 1, 1)

    def forward(self, noise: Tensor, label: Tensor) -> Tensor:
        condition = torch.cat([noise, self.classes(label)], 1)
        x = self.first(noise).view(-1, 32, 4, 4)
        y = F.interpolate(F.relu(self.norms[0](x, condition)), scale_factor=2.0)
        y = self.convs[1](F.relu(self.norms[1](self.convs[0](y), condition)))
        y = y + self.shortcut(F.interpolate(x, scale_factor=2.0))
        query, key, value = (
            self.query(y),
            F.max_pool2d(self.key(y), 2),
            F.max_pool2d(self.value(y), 2),
        )
        weights = torch.softmax(query.flatten(2).transpose(1, 2) @ key.flatten(2), -1)
        mixed = (value.flatten(2) @ weights.transpose(1, 2)).view(y.shape[0], 12, *y.shape[2:])
        y = y + self.gamma * self.mix(mixed)
        return torch.tanh(self.picture(F.relu(self.last(y))))


class WGAN(nn.Module):
    """A critic with layer norms over channels and places, as for a gradient penalty."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 4, 2, 1), nn.LayerNorm([16, 8, 8]), nn.LeakyReLU(0.2),
            nn.Conv2d(16, 32, 4, 2, 1), nn.GroupNorm(1, 32), nn.LeakyReLU(0.2),
            nn.Conv2d(32, 48, 3, 1, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(48 * 16, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class ConvVAE(nn.Module):
    """In evaluation the latent is its mean."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.LeakyReLU(),
            nn.Conv2d(16, 32, 4, 2, 1), nn.BatchNorm2d(32), nn.LeakyReLU(), nn.Flatten(),
        )  # fmt: skip
        self.mean, self.log_variance = nn.Linear(32 * 16, 8), nn.Linear(32 * 16, 8)
        self.into = nn.Linear(8, 32 * 16)
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(32, 16, 3, 2, 1, output_padding=1), nn.BatchNorm2d(16), nn.LeakyReLU(),
            nn.ConvTranspose2d(16, 16, 3, 2, 1, output_padding=1), nn.LeakyReLU(), nn.Conv2d(16, 3, 3, 1, 1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.encoder(x)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        latent = mean
        if self.training:
            latent = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return self.decoder(self.into(latent).view(-1, 32, 4, 4)), mean, log_variance


class GRUVAE(nn.Module):
    """Bowman et al. 2016: a recurrent encoder and decoder of words."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.encoder = nn.GRU(16, 24, batch_first=True)
        self.mean, self.log_variance = nn.Linear(24, 8), nn.Linear(24, 8)
        self.start = nn.Linear(8, 24)
        self.decoder = nn.GRU(16, 24, batch_first=True)
        self.head = nn.Linear(24, 40)

    def forward(self, words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        embedded = self.embedding(words)
        last = self.encoder(embedded)[1][0]
        mean, log_variance = self.mean(last), self.log_variance(last)
        latent = mean
        if self.training:
            latent = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        states = self.decoder(embedded, torch.tanh(self.start(latent))[None])[0]
        return self.head(states), mean, log_variance


class VQVAE(nn.Module):
    """van den Oord et al. 2017: each latent becomes the nearest row of a codebook, the gradient passes."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 16, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, 1, 1),
            nn.ReLU(),
            nn.Conv2d(32, 8, 1),
        )
        self.codebook = nn.Embedding(24, 8)
        self.decoder = nn.Sequential(
            nn.Conv2d(8, 32, 3, 1, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(32, 16, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(16, 3, 3, 1, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        latent = self.encoder(x).permute(0, 2, 3, 1)
        flat = latent.reshape(-1, 8)
        codes = self.codebook.weight
        distance = flat.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * flat @ codes.t()
        chosen = self.codebook(distance.argmin(1)).view(latent.shape)
        chosen = latent + (chosen - latent).detach()
        return self.decoder(chosen.permute(0, 3, 1, 2))


class BetaVAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 32), nn.ReLU())
        self.both = nn.Linear(32, 12)
        self.decoder = nn.Sequential(
            nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 40), nn.ReLU(), nn.Linear(40, 48)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.both(self.encoder(x)).chunk(2, -1)
        latent = mean
        if self.training:
            latent = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return self.decoder(latent), mean, log_variance


class Coupling(nn.Module):
    """RealNVP: half of the channels decide how the other half is scaled and shifted."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(width // 2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, 1)
        scale, shift = self.net(first).chunk(2, 1)
        return torch.cat([second * torch.tanh(scale).exp() + shift, first], 1)


class Flow(nn.Module):
    """Dinh et al. 2017: a normalising flow of three coupling layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Coupling(12), Coupling(12), Coupling(12))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def _gan(name: str, build: type[nn.Module], **shapes: tuple[int, ...]) -> Architecture:
    return Architecture(
        name,
        "GAN",
        build,
        lambda: {key: torch.randn(BATCH, *shape) for key, shape in shapes.items()},
    )


def _vae(name: str, build: type[nn.Module], **shapes: tuple[int, ...]) -> Architecture:
    return Architecture(
        name,
        "VAE",
        build,
        lambda: {key: torch.rand(BATCH, *shape) for key, shape in shapes.items()},
    )


ARCHITECTURES = (
    _gan("DCGAN generator", DCGAN, noise=(16, 1, 1)),
    _gan("PatchGAN discriminator (spectral norm)", Discriminator, x=(3, 32, 32)),
    _gan("StyleGAN2", StyleGAN, noise=(16,)),
    _gan("StyleGAN (AdaIN)", AdaIN, noise=(16,)),
    _gan("SRGAN", SRGAN, x=(3, 12, 12)),
    _gan("ESRGAN", ESRGAN, x=(3, 12, 12)),
    _gan("pix2pix", Pix2Pix, x=(3, 32, 32)),
    _gan("CycleGAN", CycleGAN, x=(3, 16, 16)),
    Architecture(
        "BigGAN",
        "GAN",
        BigGAN,
        lambda: {"noise": torch.randn(BATCH, 16), "label": torch.tensor([4, 2])},
    ),
    _gan("WGAN-GP critic", WGAN, x=(3, 16, 16)),
    _vae("convolutional VAE", ConvVAE, x=(3, 16, 16)),
    Architecture("GRU-VAE", "VAE", GRUVAE, lambda: {"words": tokens(BATCH, 7, vocabulary=40)}),
    Architecture("VQ-VAE", "VAE", VQVAE, lambda: {"x": images(16)}),
    _vae("beta-VAE", BetaVAE, x=(48,)),
    _vae("RealNVP", Flow, x=(12,)),
)
