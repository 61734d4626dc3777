"""Detection, segmentation and dense prediction: backbone, neck and heads; what follows (boxes chosen by data) is not a network."""

import importlib
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.base import BATCH, Architecture, images

CLASSES = 5


def torchvision(name: str) -> Any:
    """A module of torchvision."""
    return importlib.import_module(f"torchvision.{name}")


def _models() -> Any:
    return torchvision("models")


def _features(returned: dict[str, str]) -> nn.Module:
    """A narrow ResNet up to some of its stages."""
    resnet = _models().resnet
    body = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])
    for name, width in (("layer3", 64), ("layer4", 64)):
        body.inplanes = 128 if name == "layer3" else 64
        setattr(body, name, body._make_layer(resnet.BasicBlock, width, 1, stride=2))
    return torchvision("models._utils").IntermediateLayerGetter(body, returned)


class Segmentation(nn.Module):
    """torchvision's segmentation networks return a dict."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)["out"]


def _deeplab() -> nn.Module:
    segmentation = torchvision("models.segmentation")
    head = segmentation.deeplabv3.DeepLabHead(64, CLASSES, (2, 4))
    return Segmentation(segmentation.deeplabv3.DeepLabV3(_features({"layer4": "out"}), head))


def _fcn() -> nn.Module:
    segmentation = torchvision("models.segmentation")
    return Segmentation(
        segmentation.fcn.FCN(_features({"layer4": "out"}), segmentation.fcn.FCNHead(64, CLASSES))
    )


def _lraspp() -> nn.Module:
    segmentation = torchvision("models.segmentation")
    return Segmentation(
        segmentation.lraspp.LRASPP(
            _features({"layer2": "low", "layer4": "high"}), 128, 64, CLASSES, 32
        )
    )


class Double(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(True),
        )  # fmt: skip


class UNet(nn.Module):
    """Ronneberger et al. 2015; odd sizes are padded to meet."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([Double(3, 16), Double(16, 32), Double(32, 64)])
        self.up = nn.ModuleList(
            [nn.ConvTranspose2d(64, 32, 2, 2), nn.ConvTranspose2d(32, 16, 2, 2)]
        )
        self.join = nn.ModuleList([Double(64, 32), Double(32, 16)])
        self.head = nn.Conv2d(16, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        seen = []
        for index, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if index else x)
            seen.append(x)
        for up, join, skip in zip(self.up, self.join, reversed(seen[:-1]), strict=True):
            x = up(x)
            high, wide = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]
            x = F.pad(x, [wide // 2, wide - wide // 2, high // 2, high - high // 2])
            x = join(torch.cat([skip, x], 1))
        return self.head(x)


class AttentionUNet(nn.Module):
    """Oktay et al. 2018: skips are gated by what comes from below."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Double(3, 16), Double(16, 32)
        self.up = nn.Conv2d(32, 16, 3, 1, 1)
        self.skip, self.gate, self.score = (
            nn.Conv2d(16, 8, 1),
            nn.Conv2d(16, 8, 1),
            nn.Conv2d(8, 1, 1),
        )
        self.join, self.head = Double(32, 16), nn.Conv2d(16, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.one(x)
        y = self.up(
            F.interpolate(self.two(F.max_pool2d(skip, 2)), scale_factor=2.0, mode="bilinear")
        )
        weights = torch.sigmoid(self.score(F.relu(self.skip(skip) + self.gate(y))))
        return self.head(self.join(torch.cat([skip * weights, y], 1)))


class Detector(nn.Module):
    """A backbone, a feature pyramid and one head on all its levels."""

    def __init__(self, head: nn.Module, last: nn.Module | None = None) -> None:
        super().__init__()
        self.body = _features({"layer2": "0", "layer3": "1", "layer4": "2"})
        self.neck = torchvision("ops").FeaturePyramidNetwork([128, 64, 64], 32, last)
        self.head = head

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.head(list(self.neck(self.body(x)).values()))


def _retinanet() -> nn.Module:
    return Detector(torchvision("models.detection.retinanet").RetinaNetHead(32, 3, CLASSES))


def _fcos() -> nn.Module:
    return Detector(torchvision("models.detection.fcos").FCOSHead(32, 1, CLASSES, 2))


class RegionHeads(nn.Module):
    """Faster R-CNN's proposal head on every level, and its box head on one pooled map."""

    def __init__(self) -> None:
        super().__init__()
        self.proposals = torchvision("models.detection.rpn").RPNHead(32, 3)
        faster = torchvision("models.detection.faster_rcnn")
        self.box, self.predict = (
            faster.TwoMLPHead(32 * 16, 48),
            faster.FastRCNNPredictor(48, CLASSES),
        )

    def forward(self, levels: list[Tensor]) -> dict[str, Tensor]:
        scores, boxes = self.proposals(levels)
        classes, corners = self.predict(self.box(F.adaptive_avg_pool2d(levels[0], 4)))
        return {"scores": scores[0], "boxes": boxes[0], "classes": classes, "corners": corners}


def _faster_rcnn() -> nn.Module:
    return Detector(RegionHeads())


class SSDLite(nn.Module):
    """A MobileNetV2 backbone, extra levels and torchvision's SSDlite head."""

    def __init__(self) -> None:
        super().__init__()
        mobile = _models().mobilenetv2
        self.first = mobile.MobileNetV2(width_mult=0.35).features[:14]
        self.extra = nn.ModuleList(
            [mobile.InvertedResidual(32, 48, 2, 4), mobile.InvertedResidual(48, 48, 2, 4)]
        )
        lite = torchvision("models.detection.ssdlite")
        self.head = lite.SSDLiteHead([32, 48, 48], [3, 3, 3], CLASSES, nn.BatchNorm2d)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        levels = [self.first(x)]
        for block in self.extra:
            levels.append(block(levels[-1]))
        return self.head(levels)


class SSD(nn.Module):
    """Liu et al. 2016 on VGG: the first level is normalised by its L2 norm over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)
        )  # fmt: skip
        self.scale = nn.Parameter(torch.full((32,), 20.0))
        self.second = nn.Sequential(
            nn.Conv2d(32, 48, 3, 2, 1), nn.ReLU(), nn.Conv2d(48, 32, 1), nn.ReLU()
        )
        self.classes = nn.ModuleList(nn.Conv2d(32, 3 * CLASSES, 3, 1, 1) for _ in range(2))
        self.boxes = nn.ModuleList(nn.Conv2d(32, 12, 3, 1, 1) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.first(x)
        levels = [self.scale.view(1, -1, 1, 1) * F.normalize(first), self.second(first)]
        classes = [
            head(y).permute(0, 2, 3, 1).flatten(1)
            for head, y in zip(self.classes, levels, strict=True)
        ]
        boxes = [
            head(y).permute(0, 2, 3, 1).flatten(1)
            for head, y in zip(self.boxes, levels, strict=True)
        ]
        return torch.cat(classes, 1).view(x.shape[0], -1, CLASSES), torch.cat(boxes, 1).view(
            x.shape[0], -1, 4
        )


class ConvNorm(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, bias=False),
            nn.BatchNorm2d(outputs),
            nn.SiLU(True),
        )


class C2f(nn.Module):
    """YOLOv8's cross-stage block: two halves, each bottleneck adds a part, all are joined."""

    def __init__(self, inputs: int, outputs: int, blocks: int, shortcut: bool) -> None:
        super().__init__()
        self.half, self.shortcut = outputs // 2, shortcut
        self.into = ConvNorm(inputs, outputs)
        self.out = ConvNorm((2 + blocks) * self.half, outputs)
        self.blocks = nn.ModuleList(
            nn.Sequential(ConvNorm(self.half, self.half, 3), ConvNorm(self.half, self.half, 3))
            for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.into(x).split((self.half, self.half), 1))
        for block in self.blocks:
            y = block(parts[-1])
            parts.append(parts[-1] + y if self.shortcut else y)
        return self.out(torch.cat(parts, 1))


class C3(nn.Module):
    """YOLOv5's cross-stage block."""

    def __init__(self, inputs: int, outputs: int, blocks: int) -> None:
        super().__init__()
        half = outputs // 2
        self.left, self.right, self.out = (
            ConvNorm(inputs, half),
            ConvNorm(inputs, half),
            ConvNorm(outputs, outputs),
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(ConvNorm(half, half), ConvNorm(half, half, 3)) for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.left(x)
        for block in self.blocks:
            y = y + block(y)
        return self.out(torch.cat([y, self.right(x)], 1))


class SPPF(nn.Module):
    """Three pools one after another, joined."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.into, self.out = ConvNorm(width, width // 2), ConvNorm(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.into(x)]
        for _ in range(3):
            parts.append(F.max_pool2d(parts[-1], 5, 1, 2))
        return self.out(torch.cat(parts, 1))


class YOLO(nn.Module):
    """CSP backbone, path aggregation, decoupled heads; boxes as expectations over bins (YOLOv8)."""

    BINS = 8

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(ConvNorm(3, 8, 3, 2), ConvNorm(8, 16, 3, 2), C2f(16, 16, 1, True))
        self.middle = nn.Sequential(ConvNorm(16, 32, 3, 2), C2f(32, 32, 2, True))
        self.deep = nn.Sequential(ConvNorm(32, 64, 3, 2), C2f(64, 64, 1, True), SPPF(64))
        self.up = C2f(96, 32, 1, False)
        self.down, self.join = ConvNorm(32, 32, 3, 2), C2f(96, 64, 1, False)
        self.boxes = nn.ModuleList(
            nn.Sequential(ConvNorm(width, 16, 3), nn.Conv2d(16, 4 * self.BINS, 1))
            for width in (32, 64)
        )
        self.classes = nn.ModuleList(
            nn.Sequential(ConvNorm(width, 16, 3), nn.Conv2d(16, CLASSES, 1)) for width in (32, 64)
        )
        self.register_buffer(
            "bins", torch.arange(self.BINS, dtype=torch.float32).view(1, self.BINS, 1, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        middle = self.middle(self.stem(x))
        deep = self.deep(middle)
        fine = self.up(torch.cat([F.interpolate(deep, scale_factor=2.0), middle], 1))
        coarse = self.join(torch.cat([self.down(fine), deep], 1))
        levels = [
            torch.cat([box(y), cls(y)], 1).flatten(2)
            for box, cls, y in zip(self.boxes, self.classes, (fine, coarse), strict=True)
        ]
        boxes, classes = torch.cat(levels, 2).split((4 * self.BINS, CLASSES), 1)
        boxes = boxes.view(x.shape[0], 4, self.BINS, -1).transpose(1, 2).softmax(1)
        return torch.cat([(boxes * self.bins).sum(1), classes.sigmoid()], 1)


class YOLOv5(nn.Module):
    """C3 blocks, and heads with anchors as an extra dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(ConvNorm(3, 16, 6, 2), ConvNorm(16, 32, 3, 2), C3(32, 32, 2))
        self.deep = nn.Sequential(ConvNorm(32, 64, 3, 2), C3(64, 64, 1), SPPF(64))
        self.narrow, self.up = ConvNorm(64, 32), C3(64, 32, 1)
        self.heads = nn.ModuleList(
            [nn.Conv2d(32, 3 * (CLASSES + 5), 1), nn.Conv2d(64, 3 * (CLASSES + 5), 1)]
        )

    def forward(self, x: Tensor) -> Tensor:
        fine = self.stem(x)
        deep = self.deep(fine)
        fine = self.up(torch.cat([F.interpolate(self.narrow(deep), scale_factor=2.0), fine], 1))
        result = []
        for head, y in zip(self.heads, (fine, deep), strict=True):
            batch, _, height, width = y.shape
            z = head(y).view(batch, 3, CLASSES + 5, height, width).permute(0, 1, 3, 4, 2)
            result.append(z.sigmoid().reshape(batch, -1, CLASSES + 5))
        return torch.cat(result, 1)


class CenterNet(nn.Module):
    """Zhou et al. 2019: three heads on one map, peaks by a maximum pool."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            ConvNorm(3, 16, 3, 2), ConvNorm(16, 32, 3, 2), ConvNorm(32, 48, 3, 2)
        )
        self.up = nn.Sequential(nn.ConvTranspose2d(48, 32, 4, 2, 1), nn.BatchNorm2d(32), nn.ReLU())
        self.heads = nn.ModuleDict(
            OrderedDict(
                (
                    name,
                    nn.Sequential(nn.Conv2d(32, 24, 3, 1, 1), nn.ReLU(), nn.Conv2d(24, width, 1)),
                )
                for name, width in (("heat", CLASSES), ("size", 2), ("offset", 2))
            )
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.up(self.body(x))
        result = {name: head(y) for name, head in self.heads.items()}
        heat = result["heat"].sigmoid()
        return {**result, "heat": heat * (F.max_pool2d(heat, 3, 1, 1) == heat)}


class PSPNet(nn.Module):
    """Zhao et al. 2017: means over grids of several sizes, enlarged and joined."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(ConvNorm(3, 16, 3, 2), ConvNorm(16, 48, 3, 2))
        self.levels = nn.ModuleList(ConvNorm(48, 12) for _ in range(3))
        self.head = nn.Sequential(ConvNorm(84, 32, 3), nn.Dropout2d(0.1), nn.Conv2d(32, CLASSES, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        parts = [y]
        for size, level in zip((1, 2, 4), self.levels, strict=True):
            parts.append(
                F.interpolate(
                    level(F.adaptive_avg_pool2d(y, size)),
                    y.shape[2:],
                    mode="bilinear",
                    align_corners=False,
                )
            )
        return F.interpolate(self.head(torch.cat(parts, 1)), x.shape[2:], mode="bilinear")


class DETR(nn.Module):
    """Carion et al. 2020 in its shortest form: convolutions, torch's transformer, learned queries."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(ConvNorm(3, 16, 3, 2), ConvNorm(16, 32, 3, 2))
        self.project = nn.Conv2d(32, 24, 1)
        self.transformer = nn.Transformer(24, 4, 1, 1, 48, batch_first=True)
        self.queries, self.places = (
            nn.Parameter(torch.rand(6, 24)),
            nn.Parameter(torch.rand(64, 24)),
        )
        self.classes, self.boxes = nn.Linear(24, CLASSES), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.project(self.body(x)).flatten(2).transpose(1, 2) + self.places
        states = self.transformer(y, self.queries[None].expand(x.shape[0], -1, -1))
        return self.classes(states), self.boxes(states).sigmoid()


class Pose(nn.Module):
    """A stacked hourglass of two, with intermediate predictions fed back."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 24, 3, 2)
        self.down = nn.ModuleList([ConvNorm(24, 24, 3), ConvNorm(24, 24, 3)])
        self.skip = nn.ModuleList([ConvNorm(24, 24, 3), ConvNorm(24, 24, 3)])
        self.heads = nn.ModuleList([nn.Conv2d(24, 7, 1), nn.Conv2d(24, 7, 1)])
        self.back = nn.Conv2d(7, 24, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y, result = self.stem(x), []
        for down, skip, head in zip(self.down, self.skip, self.heads, strict=True):
            z = skip(y) + F.interpolate(down(F.max_pool2d(y, 2)), scale_factor=2.0)
            result.append(head(z))
            y = y + z + self.back(result[-1])
        return tuple(result)


def _raft() -> nn.Module:
    """Two images, one encoder, all pairs of their positions (the tensor part of optical flow)."""

    class Correlation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(
                ConvNorm(3, 24, 3, 2), ConvNorm(24, 32, 3, 2), nn.Conv2d(32, 32, 1)
            )
            self.head = nn.Conv2d(64, 2, 1)

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            a, b = self.encoder(first), self.encoder(second)
            pairs = torch.einsum("bchw,bcn->bnhw", a, b.flatten(2)) / 32**0.5
            return self.head(pairs)

    return Correlation()


def _row(name: str, build: Any, size: int = 64) -> Architecture:
    return Architecture(name, "detection and segmentation", build, lambda: {"x": images(size)})


ARCHITECTURES = (
    _row("DeepLabV3", _deeplab),
    _row("FCN", _fcn),
    _row("LR-ASPP", _lraspp),
    _row("U-Net", UNet, 32),
    _row("attention U-Net", AttentionUNet, 32),
    _row("PSPNet", PSPNet, 32),
    _row("RetinaNet", _retinanet),
    _row("FCOS", _fcos),
    _row("Faster R-CNN heads", _faster_rcnn),
    _row("SSDlite", SSDLite, 96),
    _row("SSD", SSD, 32),
    _row("YOLOv8-like", YOLO),
    _row("YOLOv5-like", YOLOv5),
    _row("CenterNet", CenterNet),
    _row("DETR (torch)", DETR, 32),
    _row("hourglass", Pose, 32),
    Architecture(
        "optical flow",
        "detection and segmentation",
        _raft,
        lambda: {"first": torch.randn(BATCH, 3, 32, 32), "second": torch.randn(BATCH, 3, 32, 32)},
    ),
)
