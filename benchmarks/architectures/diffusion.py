"""Diffusion networks and their autoencoders: the code of ``diffusers`` with few blocks and narrow layers."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from architectures.base import BATCH, Architecture, images


def _diffusers() -> Any:
    return importlib.import_module("diffusers")


class Sample(nn.Module):
    """A network of diffusers as a function of tensors that returns its sample."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.network(sample, timestep, return_dict=False)[0]


class Conditioned(nn.Module):
    """A denoiser that attends to the states of a text encoder."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, sample: Tensor, timestep: Tensor, states: Tensor) -> Tensor:
        return self.network(
            sample, timestep=timestep, encoder_hidden_states=states, return_dict=False
        )[0]


class Labelled(nn.Module):
    """DiT: conditioned on a class."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, sample: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        return self.network(sample, timestep, class_labels=labels, return_dict=False)[0]


class PixArt(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, sample: Tensor, timestep: Tensor, states: Tensor) -> Tensor:
        return self.network(
            sample,
            encoder_hidden_states=states,
            timestep=timestep,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]


class Pooled(nn.Module):
    """Stable Diffusion 3: text states, and one pooled vector of them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, sample: Tensor, timestep: Tensor, states: Tensor, pooled: Tensor) -> Tensor:
        return self.network(sample, states, pooled, timestep, return_dict=False)[0]


class Flux(nn.Module):
    """Packed latents, text states and their positions."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        grid = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1)
        self.register_buffer("places", torch.cat([torch.zeros(16, 1), grid.reshape(16, 2)], 1))
        self.register_buffer("text", torch.zeros(5, 3))

    def forward(self, sample: Tensor, timestep: Tensor, states: Tensor, pooled: Tensor) -> Tensor:
        return self.network(
            sample,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            timestep=timestep,
            img_ids=self.places,
            txt_ids=self.text,
            return_dict=False,
        )[0]


class Control(nn.Module):
    """ControlNet: what it adds to each level of a denoiser."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, sample: Tensor, timestep: Tensor, states: Tensor, control: Tensor
    ) -> tuple[Tensor, ...]:
        down, middle = self.network(sample, timestep, states, control, return_dict=False)
        return (*down, middle)


class Autoencoder(nn.Module):
    """Images to latents and back; the mean of the posterior where there is one."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, sample: Tensor) -> Tensor:
        return self.network(sample, return_dict=False)[0]


class Decoder(nn.Module):
    """Latents to images."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, latents: Tensor) -> Tensor:
        return self.network.decode(latents, return_dict=False)[0]


class Prior(nn.Module):
    """The prior of DALL-E 2: image embeddings from text."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor, states: Tensor) -> Tensor:
        return self.network(sample, timestep, text, states, return_dict=False)[0]


def _unet(**options: Any) -> nn.Module:
    return Sample(
        _diffusers().UNet2DModel(
            sample_size=16,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=8,
            **{
                "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
                **options,
            },
        )
    )


def _conditioned(name: str, **options: Any) -> nn.Module:
    return getattr(_diffusers(), name)(
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        cross_attention_dim=24,
        norm_num_groups=4,
        attention_head_dim=4,
        **options,
    )


def _unet_1d() -> nn.Module:
    return Sample(
        _diffusers().UNet1DModel(
            sample_size=32,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32, 32),
            extra_in_channels=32,
            down_block_types=("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"),
            up_block_types=("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"),
        )
    )


def _unet_3d() -> nn.Module:
    return Conditioned(
        _diffusers().UNet3DConditionModel(
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
            cross_attention_dim=24,
            norm_num_groups=4,
            attention_head_dim=4,
        )
    )


def _dit() -> nn.Module:
    return Labelled(
        _diffusers().DiTTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=10,
            norm_num_groups=4,
        )
    )


def _pixart() -> nn.Module:
    return PixArt(
        _diffusers().PixArtTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=32,
            caption_channels=24,
            sample_size=8,
            use_additional_conditions=False,
        )
    )


def _sd3() -> nn.Module:
    return Pooled(
        _diffusers().SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=24,
            caption_projection_dim=32,
            pooled_projection_dim=24,
            out_channels=4,
        )
    )


def _flux() -> nn.Module:
    return Flux(
        _diffusers().FluxTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=24,
            pooled_projection_dim=24,
            axes_dims_rope=(4, 4, 8),
        )
    )


def _sana() -> nn.Module:
    return Conditioned(
        _diffusers().SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=4,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=4,
            cross_attention_head_dim=8,
            cross_attention_dim=32,
            caption_channels=24,
            sample_size=8,
            patch_size=1,
        )
    )


def _auraflow() -> nn.Module:
    return Conditioned(
        _diffusers().AuraFlowTransformer2DModel(
            sample_size=8,
            in_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=24,
            caption_projection_dim=32,
            out_channels=4,
            pos_embed_max_size=64,
        )
    )


def _uvit() -> nn.Module:
    return Sample(
        _diffusers().UNet2DModel(
            sample_size=16,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D"),
            up_block_types=("ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
            time_embedding_type="fourier",
            resnet_time_scale_shift="scale_shift",
        )
    )


def _coder(name: str, **options: Any) -> nn.Module:
    return getattr(_diffusers(), name)(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        **options,
    )


def _consistency_decoder() -> nn.Module:
    """The U-Net of the consistency decoder: noise and enlarged latents to an image."""
    return Sample(
        _diffusers().UNet2DModel(
            sample_size=16,
            in_channels=7,
            out_channels=6,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("ResnetDownsampleBlock2D",) * 2,
            up_block_types=("ResnetUpsampleBlock2D",) * 2,
            add_attention=False,
            num_train_timesteps=1024,
            resnet_time_scale_shift="scale_shift",
            time_embedding_type="learned",
        )
    )


def _prior() -> nn.Module:
    return Prior(
        _diffusers().PriorTransformer(
            num_attention_heads=4,
            attention_head_dim=8,
            num_layers=2,
            embedding_dim=24,
            num_embeddings=5,
            additional_embeddings=4,
        )
    )


def _steps() -> Tensor:
    return torch.tensor([7, 3][:BATCH])


def _sample(channels: int = 3, size: int = 16) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"sample": images(size, channels), "timestep": _steps()}


def _texts(
    channels: int = 4, size: int = 8, **shapes: tuple[int, ...]
) -> Callable[[], dict[str, Tensor]]:
    return lambda: {
        "sample": images(size, channels),
        "timestep": _steps(),
        "states": torch.randn(BATCH, 5, 24),
        **{name: torch.randn(BATCH, *shape) for name, shape in shapes.items()},
    }


def _row(
    name: str,
    build: Callable[[], nn.Module],
    example: Callable[[], dict[str, Tensor]],
    note: str = "",
) -> Architecture:
    return Architecture(name, "diffusion", build, example, note=note)


ARCHITECTURES = (
    _row("UNet2D", _unet, _sample()),
    _row("UNet2D (scale and shift)", _uvit, _sample()),
    _row(
        "UNet2DCondition",
        lambda: Conditioned(
            _conditioned("UNet2DConditionModel", up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
        ),
        _texts(),
    ),
    _row("UNet1D", _unet_1d, lambda: {"sample": torch.randn(BATCH, 4, 32), "timestep": _steps()}),
    _row(
        "UNet3D (video)",
        _unet_3d,
        lambda: {**_texts()(), "sample": torch.randn(BATCH, 4, 2, 8, 8)},
    ),
    _row(
        "ControlNet",
        lambda: Control(
            _conditioned("ControlNetModel", conditioning_embedding_out_channels=(4, 8))
        ),
        _texts(control=(3, 16, 16)),
    ),
    _row(
        "DiT",
        _dit,
        lambda: {"sample": images(8, 4), "timestep": _steps(), "labels": torch.tensor([4, 2])},
    ),
    _row("PixArt", _pixart, _texts()),
    _row("Stable Diffusion 3", _sd3, _texts(pooled=(24,))),
    _row(
        "Flux",
        _flux,
        lambda: {
            "sample": torch.randn(BATCH, 16, 4),
            "timestep": torch.rand(BATCH),
            "states": torch.randn(BATCH, 5, 24),
            "pooled": torch.randn(BATCH, 24),
        },
    ),
    _row("Sana", _sana, _texts()),
    _row("AuraFlow", _auraflow, lambda: {**_texts()(), "timestep": torch.rand(BATCH)}),
    _row(
        "PriorTransformer",
        _prior,
        lambda: {
            "sample": torch.randn(BATCH, 24),
            "timestep": _steps(),
            "text": torch.randn(BATCH, 24),
            "states": torch.randn(BATCH, 5, 24),
        },
    ),
    _row(
        "AutoencoderKL",
        lambda: Autoencoder(_coder("AutoencoderKL")),
        lambda: {"sample": images(16)},
    ),
    _row(
        "AutoencoderKL decoder",
        lambda: Decoder(_coder("AutoencoderKL")),
        lambda: {"latents": images(8, 4)},
    ),
    _row(
        "VQModel",
        lambda: Autoencoder(_coder("VQModel", latent_channels=4, num_vq_embeddings=32)),
        lambda: {"sample": images(16)},
    ),
    _row(
        "AutoencoderTiny",
        lambda: Autoencoder(
            _diffusers().AutoencoderTiny(
                encoder_block_out_channels=(16, 16),
                decoder_block_out_channels=(16, 16),
                num_encoder_blocks=(1, 1),
                num_decoder_blocks=(1, 1),
            )
        ),
        lambda: {"sample": images(16)},
    ),
    _row(
        "AutoencoderDC",
        lambda: Autoencoder(
            _diffusers().AutoencoderDC(
                latent_channels=4,
                attention_head_dim=8,
                encoder_block_types=("ResBlock", "EfficientViTBlock"),
                decoder_block_types=("ResBlock", "EfficientViTBlock"),
                encoder_block_out_channels=(16, 32),
                decoder_block_out_channels=(16, 32),
                encoder_layers_per_block=(1, 1),
                decoder_layers_per_block=(1, 1),
                encoder_qkv_multiscales=((), (5,)),
                decoder_qkv_multiscales=((), (5,)),
                decoder_norm_types=("rms_norm", "rms_norm"),
            )
        ),
        lambda: {"sample": images(16)},
    ),
    _row("Consistency decoder", _consistency_decoder, _sample(7)),
)
