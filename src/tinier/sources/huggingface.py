"""A Hugging Face directory: config.json and safetensors, no code of others."""

import json
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinier.errors import MissingError, ModelError
from tinier.graph.states import quiet
from tinier.network import Inputs, Network, name_inputs
from tinier.sources.base import Source, first_line, present

RECIPE = (
    "from transformers import AutoModel\n"
    "  model = AutoModel.from_pretrained(folder)  # the class of your task; in a place you trust\n"
    "  model.save_pretrained(folder, safe_serialization=True)"
)
# Words of an invented example: long enough for padding masks to be seen, short enough to be quick.
TOKENS = 16
WORDS_OUT = 12  # of a decoder: another length, for it is free by itself
OURS = ("model.pt2", "model.keras", "model.onnx")  # what a folder of tinier's has for runtimes


class HuggingFaceSource(Source):
    """A directory with config.json and ``*.safetensors``; the class is the one that config.json names, of transformers."""

    name = "huggingface"

    def accepts(self, model: Any) -> bool:
        return isinstance(model, str | Path) and Path(model).is_dir()

    def load(self, model: Any, example: Inputs | None) -> Network:
        folder = Path(model)
        present(folder)
        config = _config(folder)
        try:
            import transformers
        except ImportError as error:
            raise MissingError("transformers", "huggingface", f"reading {folder}") from error
        module = _module(folder, config, transformers)
        inputs = _example(folder, module) if example is None else name_inputs(module, example)
        for option in ("use_cache", "return_dict"):
            # What a generation loop keeps from step to step is no output of the network.
            if hasattr(module.config, option):
                setattr(module.config, option, option == "return_dict")
        network = Network(module, inputs, folder.resolve().name, folder)
        try:
            with quiet():
                network(inputs)
        except Exception as error:
            shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in inputs.items())
            raise ModelError(
                f"{folder}: {type(module).__name__} does not run on the example ({shapes}): {first_line(error)}; give "
                "example={'name': tensor}, or data that have its inputs by name (--data)"
            ) from error
        return network


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        made = next((name for name in OURS if (folder / name).is_file()), None)
        if made is not None:
            raise ModelError(
                f"{folder}: no config.json, for its class is not one of transformers; name the model in it: {folder / made}"
            )
        if (folder / "plan.json").is_file():
            raise ModelError(
                f"{folder}: tinier's weights without their class: tinier.load({str(folder)!r}, into=model) rebuilds the model"
            )
        raise ModelError(
            f"{folder}: no config.json; a Hugging Face directory (model.save_pretrained) or an .onnx file is "
            "needed"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file}: not a configuration of a model")
    if config.get("auto_map"):
        raise ModelError(
            f"{file}: auto_map asks to run code that came with the model, which is never done; build the "
            "module yourself in Python and give it with example inputs"
        )
    if config.get("quantization_config"):
        raise ModelError(f"{folder}: the model is already quantized; give the float model")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in folder.glob("*.bin")) + sorted(
            path.name for path in folder.glob("*.pt")
        )
        if pickles:
            raise ModelError(
                f"{folder}: {pickles[0]} is a pickle, which is never loaded; convert it once:\n  {RECIPE}"
            )
        raise ModelError(f"{folder}: no *.safetensors; save the weights with model.save_pretrained")
    for file in folder.glob("*.safetensors"):
        present(file)
    return config


def _module(folder: Path, config: dict[str, Any], transformers: Any) -> nn.Module:
    known = (config.get("architectures") or [None])[0]
    if known is None:
        kind = transformers.AutoModel
    else:
        kind = getattr(transformers, str(known), None)
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
            raise ModelError(
                f"{folder}: transformers {transformers.__version__} has no class {known}; update it, or build "
                "the module in Python and give it"
            )
    options = {"local_files_only": True, "use_safetensors": True, "dtype": torch.float32}
    if kind is transformers.AutoModel:
        options["trust_remote_code"] = False
    error: Exception | None = None
    for attention in ("sdpa", "eager"):
        try:
            with quiet():
                module, report = kind.from_pretrained(
                    str(folder), attn_implementation=attention, output_loading_info=True, **options
                )
            break
        except Exception as failed:
            # Classes without scaled_dot_product_attention say so in a ValueError; anything else fails twice.
            error = failed
    else:
        raise ModelError(
            f"{folder}: cannot be loaded: {str(error).strip().splitlines()[0]}"
        ) from error
    missing = sorted(report.get("missing_keys", ()))
    if missing:
        raise ModelError(
            f"{folder}: the weights lack {', '.join(missing[:3])}"
            f"{f' and {len(missing) - 3} more' if len(missing) > 3 else ''} of {type(module).__name__}; these "
            "would be random: save the trained model with model.save_pretrained"
        )
    module.eval()
    return module  # type: ignore[no-any-return]


def _example(folder: Path, module: Any) -> dict[str, Tensor]:
    config = module.config
    generator = torch.Generator().manual_seed(0)
    main = getattr(module, "main_input_name", "input_ids")
    if main == "pixel_values":
        size: Any = getattr(config, "image_size", None)
        file = folder / "preprocessor_config.json"
        if size is None and file.is_file():
            saved = json.loads(file.read_text(encoding="utf-8"))
            size = saved.get("crop_size") or saved.get("size")
        if isinstance(size, dict):
            size = size.get("height") or size.get("shortest_edge")
        height, width = (size, size) if isinstance(size, int) else tuple(size or (224, 224))
        channels = getattr(config, "num_channels", 3)
        return {main: torch.randn(2, channels, height, width, generator=generator)}
    if main == "input_features" and hasattr(config, "num_mel_bins"):
        # The encoder halves the frames once, and takes no fewer.
        frames = 2 * config.max_source_positions
        inputs = {main: torch.randn(2, config.num_mel_bins, frames, generator=generator)}
        return inputs | _decoded(module, generator)
    if main != "input_ids":
        raise ModelError(
            f"{folder}: inputs of {type(module).__name__} ({main}) cannot be invented; give "
            f"example={{'{main}': tensor}}, or data that have it (--data)"
        )
    limit = getattr(config, "max_position_embeddings", TOKENS) or TOKENS
    length = max(2, min(TOKENS, int(limit) - 2))
    inputs = {
        "input_ids": torch.randint(3, max(4, config.vocab_size), (2, length), generator=generator)
    }
    inputs["input_ids"].clamp_(max=config.vocab_size - 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    # The tokenizer says whether the model gets segments; without one, the model's number of segments does.
    if _segments(folder, config):
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    return inputs | _decoded(module, generator)


def _decoded(module: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """What a decoder has said so far, where the network has one; classifiers make it of the encoder's words themselves."""
    config, kind = module.config, type(module).__name__
    takes = "decoder_input_ids" in signature(module.forward).parameters
    if not takes or not config.is_encoder_decoder or kind.endswith(("Classification", "Answering")):
        return {}
    words = torch.randint(3, max(4, config.vocab_size), (2, WORDS_OUT), generator=generator)
    return {"decoder_input_ids": words.clamp_(max=config.vocab_size - 1)}


def _segments(folder: Path, config: Any) -> bool:
    file = folder / "tokenizer_config.json"
    if file.is_file():
        names = json.loads(file.read_text(encoding="utf-8")).get("model_input_names")
        if names:
            return "token_type_ids" in names
    return int(getattr(config, "type_vocab_size", 0) or 0) > 1
