"""Image classifiers: torchvision's and timm's own code with few blocks and narrow layers, and two that neither has."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from architectures.base import Architecture, images

CLASSES = 7


def _models() -> Any:
    return importlib.import_module("torchvision.models")


def _timm(name: str) -> Any:
    return importlib.import_module(f"timm.models.{name}")


def _named(name: str, **options: Any) -> nn.Module:
    return importlib.import_module("timm").create_model(name, num_classes=CLASSES, **options)


def _resnet(block: str, layers: list[int], **options: Any) -> nn.Module:
    resnet = _models().resnet
    return resnet.ResNet(getattr(resnet, block), layers, num_classes=CLASSES, **options)


def _vgg() -> nn.Module:
    vgg = _models().vgg
    layers = [16, "M", 32, "M", 32, 32, "M", 64, "M", 64, "M"]
    model = vgg.VGG(vgg.make_layers(layers, batch_norm=True), num_classes=CLASSES)
    model.classifier = nn.Sequential(
        nn.Linear(64 * 49, 128), nn.ReLU(), nn.Dropout(), nn.Linear(128, CLASSES)
    )
    return model


def _densenet() -> nn.Module:
    return _models().DenseNet(8, (2, 3, 2), 16, bn_size=2, num_classes=CLASSES)


def _swin(block: str, **options: Any) -> nn.Module:
    swin = _models().swin_transformer
    return swin.SwinTransformer(
        [4, 4],
        24,
        [2, 2],
        [3, 6],
        [4, 4],
        num_classes=CLASSES,
        block=getattr(swin, block),
        **options,
    )


def _swin_v2() -> nn.Module:
    merging = _models().swin_transformer.PatchMergingV2
    return _swin("SwinTransformerBlockV2", downsample_layer=merging)


def _convnext() -> nn.Module:
    convnext = _models().convnext
    setting = convnext.CNBlockConfig
    blocks = [setting(24, 48, 2), setting(48, 96, 2), setting(96, None, 1)]
    return convnext.ConvNeXt(blocks, num_classes=CLASSES)


def _maxvit() -> nn.Module:
    return _models().maxvit.MaxVit(
        input_size=(64, 64),
        stem_channels=16,
        partition_size=4,
        block_channels=[16, 32],
        block_layers=[1, 1],
        head_dim=8,
        stochastic_depth_prob=0.0,
        num_classes=CLASSES,
    )


def _vit() -> nn.Module:
    return _models().VisionTransformer(64, 16, 2, 4, 48, 96, num_classes=CLASSES)


def _regnet() -> nn.Module:
    regnet = _models().regnet
    parameters = regnet.BlockParams.from_init_params(
        5, 24, 24.48, 2.54, group_width=8, se_ratio=0.25
    )
    return regnet.RegNet(parameters, num_classes=CLASSES)


def _metaformer(mixer: str) -> nn.Module:
    metaformer = _timm("metaformer")
    return metaformer.MetaFormer(
        depths=(1, 1, 1, 1),
        dims=(16, 32, 64, 64),
        token_mixers=getattr(metaformer, mixer),
        num_classes=CLASSES,
    )


def _fastvit() -> nn.Module:
    fastvit = _timm("fastvit")
    return fastvit.FastVit(
        layers=(1, 1, 1, 1),
        embed_dims=(16, 32, 64, 128),
        mlp_ratios=(3, 3, 3, 3),
        token_mixers=("repmixer", "repmixer", "repmixer", "attention"),
        num_classes=CLASSES,
    )


def _mixer(block: str, layer: str, **options: Any) -> nn.Module:
    mixer, layers = _timm("mlp_mixer"), importlib.import_module("timm.layers")
    return mixer.MlpMixer(
        img_size=64,
        patch_size=16,
        num_blocks=2,
        embed_dim=48,
        block_layer=getattr(mixer, block),
        mlp_layer=getattr(layers, layer),
        num_classes=CLASSES,
        **options,
    )


class _Gated(nn.Module):
    """HorNet's recursive gated convolution of order 3: g = p₀ ⊙ d₀, then twice g = W g ⊙ dᵢ."""

    def __init__(self, width: int, order: int = 3) -> None:
        super().__init__()
        self.widths = [width // 2**i for i in reversed(range(order))]
        self.into = nn.Conv2d(width, 2 * width, 1)
        self.depthwise = nn.Conv2d(
            sum(self.widths), sum(self.widths), 7, 1, 3, groups=sum(self.widths)
        )
        self.raise_ = nn.ModuleList(
            nn.Conv2d(a, b, 1) for a, b in zip(self.widths, self.widths[1:], strict=False)
        )
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, rest = torch.split(self.into(x), (self.widths[0], sum(self.widths)), 1)
        parts = torch.split(self.depthwise(rest), self.widths, 1)
        y = first * parts[0]
        for layer, part in zip(self.raise_, parts[1:], strict=True):
            y = layer(y) * part
        return self.out(y)


class _LargeKernel(nn.Module):
    """The visual attention network's attention: x ⊙ W(dilated(depthwise(x)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.into = nn.Conv2d(width, width, 1)
        self.near = nn.Conv2d(width, width, 5, 1, 2, groups=width)
        self.far = nn.Conv2d(width, width, 7, 1, 9, groups=width, dilation=3)
        self.mix = nn.Conv2d(width, width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.nn.functional.gelu(self.into(x))
        return self.out(y * self.mix(self.far(self.near(y))))


class _Stage(nn.Module):
    def __init__(self, width: int, mixer: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.mixer = mixer(width)
        self.scale = nn.Parameter(torch.full((width, 1, 1), 0.5))
        self.fc1, self.fc2 = nn.Conv2d(width, 4 * width, 1), nn.Conv2d(4 * width, width, 1)
        self.depthwise = nn.Conv2d(4 * width, 4 * width, 3, 1, 1, groups=4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale * self.mixer(self.norm1(x))
        y = self.depthwise(self.fc1(self.norm2(x)))
        return x + self.fc2(torch.nn.functional.gelu(y))


class _Pyramid(nn.Module):
    """Two stages of blocks with a mixer, as HorNet and the visual attention network have them."""

    def __init__(self, mixer: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.first = _Stage(16, mixer)
        self.down = nn.Conv2d(16, 32, 2, 2)
        self.second = _Stage(32, mixer)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.down(self.first(self.stem(x))))
        return self.head(self.norm(y.mean((2, 3))))


def _row(name: str, build: Callable[[], nn.Module], size: int = 64, note: str = "") -> Architecture:
    return Architecture(
        name, "vision", build, lambda: {_INPUT.get(name, "x"): images(size)}, note=note
    )


_INPUT = {"DenseNet": "x"}
_SMALL: dict[str, Any] = {"depths": (1, 1, 1, 1), "num_classes": CLASSES}

ARCHITECTURES = (
    _row("AlexNet", lambda: _models().AlexNet(CLASSES), note="no smaller config"),
    _row("ResNet-18", lambda: _resnet("BasicBlock", [2, 2, 2, 2])),
    _row("ResNet-50", lambda: _resnet("Bottleneck", [1, 2, 1, 1])),
    _row(
        "ResNeXt",
        lambda: _resnet("Bottleneck", [1, 1, 1, 1], groups=8, width_per_group=4),
    ),
    _row("WideResNet", lambda: _resnet("Bottleneck", [1, 1, 1, 1], width_per_group=96)),
    _row("VGG-BN", _vgg, 32),
    _row("DenseNet", _densenet),
    _row("GoogLeNet", lambda: _models().GoogLeNet(CLASSES, aux_logits=False, init_weights=False)),
    _row(
        "InceptionV3",
        lambda: _models().Inception3(CLASSES, aux_logits=False, init_weights=False),
        79,
        "no smaller config",
    ),
    _row("SqueezeNet", lambda: _models().SqueezeNet("1_1", CLASSES)),
    _row(
        "ShuffleNetV2",
        lambda: _models().ShuffleNetV2([2, 2, 2], [24, 48, 64, 96, 128], num_classes=CLASSES),
    ),
    _row("MobileNetV2", lambda: _models().MobileNetV2(CLASSES, width_mult=0.5)),
    _row(
        "MobileNetV3",
        lambda: _models().mobilenet_v3_small(num_classes=CLASSES, width_mult=0.75),
    ),
    _row("MNASNet", lambda: _models().MNASNet(0.5, CLASSES)),
    _row("EfficientNet", lambda: _models().efficientnet_b0(num_classes=CLASSES)),
    _row("EfficientNetV2", lambda: _named("tf_efficientnetv2_b0")),
    _row("RegNet", _regnet),
    _row("ConvNeXt", _convnext),
    _row("Swin", lambda: _swin("SwinTransformerBlock")),
    _row("SwinV2", _swin_v2),
    _row("ViT", _vit),
    _row("MaxViT", _maxvit),
    _row(
        "LeViT",
        lambda: _named(
            "levit_128s",
            img_size=64,
            embed_dim=(32, 48, 64),
            key_dim=8,
            num_heads=(2, 3, 4),
            depth=(1, 1, 1),
        ),
    ),
    _row("MobileViT", lambda: _named("mobilevit_xxs")),
    _row("CoAtNet", lambda: _named("coatnet_pico_rw_224", img_size=64), note="no smaller config"),
    _row("PoolFormer", lambda: _metaformer("Pooling")),
    _row("CAFormer", lambda: _metaformer("SepConv")),
    _row("GhostNet", lambda: _named("ghostnet_050")),
    _row("RepVGG", lambda: _named("repvgg_a0"), 32, "no smaller config"),
    _row("HRNet", lambda: _named("hrnet_w18_small"), note="no smaller config"),
    _row("Res2Net", lambda: _named("res2net50_14w_8s", layers=(1, 1, 1, 1))),
    _row("SENet", lambda: _named("seresnet18"), 32),
    _row("SKNet", lambda: _named("skresnet18"), 32),
    _row("ECA-ResNet", lambda: _named("ecaresnet50t", layers=(1, 1, 1, 1))),
    _row("ResNeSt", lambda: _named("resnest14d"), note="no smaller config"),
    _row("NFNet", lambda: _named("test_nfnet")),
    _row("CSPNet", lambda: _named("cs3darknet_focus_s"), note="no smaller config"),
    _row("DLA", lambda: _named("dla46_c")),
    _row("MLP-Mixer", lambda: _mixer("MixerBlock", "Mlp")),
    _row(
        "ResMLP",
        lambda: _mixer("ResBlock", "Mlp", mlp_ratio=4, norm_layer=_timm("mlp_mixer").Affine),
    ),
    _row("gMLP", lambda: _mixer("SpatialGatingBlock", "GatedMlp", mlp_ratio=4)),
    _row(
        "CaiT",
        lambda: _timm("cait").Cait(
            img_size=64, embed_dim=48, depth=2, num_heads=4, depth_token_only=1, num_classes=CLASSES
        ),
    ),
    _row(
        "XCiT",
        lambda: _timm("xcit").Xcit(
            img_size=64, embed_dim=48, depth=2, num_heads=4, cls_attn_layers=1, num_classes=CLASSES
        ),
    ),
    _row(
        "PiT",
        lambda: _timm("pit").PoolingVisionTransformer(
            img_size=64, base_dims=(16, 16), depth=(1, 1), heads=(2, 4), num_classes=CLASSES
        ),
    ),
    _row(
        "EfficientFormer",
        lambda: _timm("efficientformer").EfficientFormer(
            depths=(1, 1, 1, 2),
            embed_dims=(16, 32, 48, 64),
            num_vit=1,
            img_size=224,
            num_classes=CLASSES,
        ),
        224,
        "its attention has the bias of a 7 × 7 grid",
    ),
    _row("FastViT", _fastvit),
    _row("HorNet", lambda: _Pyramid(_Gated)),
    _row("VAN", lambda: _Pyramid(_LargeKernel)),
    _row("VoVNet", lambda: _named("ese_vovnet19b_slim_dw"), note="no smaller config"),
    _row(
        "InceptionNeXt",
        lambda: _timm("inception_next").MetaNeXt(dims=(16, 32, 48, 64), **_SMALL),
    ),
    _row(
        "TinyViT",
        lambda: _timm("tiny_vit").TinyVit(
            embed_dims=(16, 32, 48, 64), num_heads=(1, 2, 3, 4), window_sizes=(4, 4, 4, 2), **_SMALL
        ),
    ),
    _row(
        "RDNet",
        lambda: _timm("rdnet").RDNet(
            num_init_features=32,
            growth_rates=(16, 24, 32),
            num_blocks_list=(2, 2, 2),
            is_downsample_block=(None, True, True),
            block_type=("Block", "BlockESE", "BlockESE"),
            num_classes=CLASSES,
        ),
    ),
    _row(
        "BEiT",
        lambda: _timm("beit").Beit(
            img_size=64,
            embed_dim=48,
            depth=2,
            num_heads=4,
            use_rel_pos_bias=True,
            init_values=0.1,
            num_classes=CLASSES,
        ),
    ),
    _row(
        "EVA",
        lambda: _timm("eva").Eva(
            img_size=64,
            embed_dim=48,
            depth=2,
            num_heads=4,
            use_rot_pos_emb=True,
            swiglu_mlp=True,
            num_classes=CLASSES,
        ),
    ),
    _row(
        "DeiT",
        lambda: _named("deit_tiny_distilled_patch16_224", img_size=64, depth=2, embed_dim=48),
    ),
    _row(
        "Twins",
        lambda: _named(
            "twins_svt_small", img_size=64, embed_dims=[16, 32, 48, 64], depths=[1, 1, 2, 1]
        ),
    ),
    _row("PVTv2", lambda: _named("pvt_v2_b0", depths=(1, 1, 1, 1))),
    _row("CrossViT", lambda: _named("crossvit_tiny_240"), 240),
    _row("CoaT", lambda: _named("coat_lite_mini", img_size=64, serial_depths=[1, 1, 1, 1])),
    _row("ConViT", lambda: _named("convit_tiny", img_size=64, depth=2, local_up_to_layer=1)),
    _row(
        "DaViT",
        lambda: _timm("davit").DaVit(embed_dims=(16, 32, 48, 64), num_heads=(1, 2, 3, 4), **_SMALL),
        224,
    ),
    _row("EdgeNeXt", lambda: _named("edgenext_xx_small", depths=(1, 1, 2, 1))),
    _row("FocalNet", lambda: _timm("focalnet").FocalNet(embed_dim=16, **_SMALL)),
    _row("MViTv2", lambda: _named("mvitv2_tiny", img_size=64), note="no smaller config"),
    _row(
        "NesT",
        lambda: _timm("nest").Nest(
            img_size=64,
            num_classes=CLASSES,
            embed_dims=(16, 32, 64),
            num_heads=(1, 2, 4),
            depths=(1, 1, 1),
        ),
    ),
    _row("TNT", lambda: _named("tnt_s_legacy_patch16_224", img_size=64, depth=2)),
    _row(
        "VOLO",
        lambda: _timm("volo").VOLO(
            [1, 1, 1, 1],
            img_size=64,
            num_classes=CLASSES,
            embed_dims=[16, 32, 32, 32],
            num_heads=[2, 4, 4, 4],
        ),
    ),
    _row(
        "Sequencer",
        lambda: _timm("sequencer").Sequencer2d(
            img_size=64,
            layers=(1, 1),
            patch_sizes=(7, 2),
            embed_dims=(16, 24),
            hidden_sizes=(8, 12),
            mlp_ratios=(3.0, 3.0),
            num_classes=CLASSES,
        ),
    ),
    _row("Visformer", lambda: _named("visformer_tiny", img_size=64)),
    _row("RepViT", lambda: _named("repvit_m0_9", depth=(1, 1, 1, 1), embed_dim=(16, 32, 48, 64))),
    _row("EfficientViT", lambda: _named("efficientvit_b0")),
    _row("StarNet", lambda: _named("starnet_s1", depths=[1, 1, 1, 1])),
    _row("MambaOut", lambda: _timm("mambaout").MambaOut(dims=(16, 32, 48, 64), **_SMALL)),
    _row("SwiftFormer", lambda: _named("swiftformer_xs", layers=[1, 1, 1, 1])),
    _row(
        "Hiera",
        lambda: _named(
            "hiera_tiny_224", img_size=64, embed_dim=24, num_heads=1, stages=(1, 1, 1, 1)
        ),
    ),
    _row("HGNet", lambda: _named("hgnetv2_b0"), note="no smaller config"),
    _row("Xception", lambda: _named("xception41"), note="no smaller config"),
    _row("ReXNet", lambda: _named("rexnet_100"), note="no smaller config"),
    _row("ConvMixer", lambda: _named("convmixer_768_32"), 32, "no smaller config"),
)
