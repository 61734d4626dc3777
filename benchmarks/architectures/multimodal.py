"""Several modalities at once: contrastive, fused and generative models of ``transformers``."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from architectures.base import BATCH, Architecture, images, mask, tokens, transformers_model

SIZE, PATCH, LENGTH, VOCABULARY = 32, 8, 11, 96
PATCHES = (SIZE // PATCH) ** 2
WIDTH = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
VISION = {**WIDTH, "image_size": SIZE, "patch_size": PATCH}
TEXT = {
    **WIDTH,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = {**TEXT, "model_type": "llama", "num_key_value_heads": 2, "use_cache": False}
IMAGE_TOKEN = 90


def _both(*, masked: bool = True) -> Callable[[], dict[str, Tensor]]:
    def example() -> dict[str, Tensor]:
        made = {"input_ids": tokens(BATCH, LENGTH), "pixel_values": images(SIZE)}
        if masked:
            made["attention_mask"] = mask(BATCH, LENGTH)
        return made

    return example


def _with_image(count: int) -> Callable[[], dict[str, Tensor]]:
    def example() -> dict[str, Tensor]:
        ids = tokens(BATCH, count + 7, vocabulary=IMAGE_TOKEN)
        ids[:, 1 : 1 + count] = IMAGE_TOKEN
        return {"input_ids": ids, "pixel_values": images(SIZE)}

    return example


def _row(
    name: str,
    model: str,
    config: str,
    example: Callable[[], Mapping[str, Tensor]],
    lengths: Mapping[str, tuple[int, ...]] | None = None,
    **values: Any,
) -> Architecture:
    return Architecture(
        name, "multimodal", transformers_model(model, config, **values), example, lengths
    )


ARCHITECTURES = (
    _row("CLIP", "CLIPModel", "CLIPConfig", _both(), text_config=TEXT, vision_config=VISION, projection_dim=16),
    _row("CLIP vision", "CLIPVisionModelWithProjection", "CLIPVisionConfig", lambda: {"pixel_values": images(SIZE)},
        projection_dim=16, **VISION),
    _row("SigLIP", "SiglipModel", "SiglipConfig", _both(masked=False), text_config={**TEXT, "projection_size": 32},
        vision_config=VISION),
    _row("SigLIP 2", "SiglipModel", "SiglipConfig", _both(masked=False), text_config={**TEXT, "projection_size": 32},
        vision_config={**VISION, "vision_use_head": True}),
    _row("AltCLIP", "AltCLIPModel", "AltCLIPConfig", _both(), text_config={**TEXT, "project_dim": 16}, vision_config=VISION,
        projection_dim=16),
    _row("Chinese CLIP", "ChineseCLIPModel", "ChineseCLIPConfig", _both(), text_config=TEXT, vision_config=VISION,
        projection_dim=16),
    _row("OWL-ViT", "OwlViTModel", "OwlViTConfig", _both(), text_config=TEXT, vision_config=VISION, projection_dim=16),
    _row("GroupViT", "GroupViTModel", "GroupViTConfig", _both(), text_config=TEXT, vision_config={**WIDTH, "image_size": SIZE,
        "patch_size": PATCH, "depths": [1, 1, 1], "num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4, 4]},
        projection_dim=16, projection_intermediate_dim=32),
    _row("BLIP", "BlipForImageTextRetrieval", "BlipConfig", _both(), text_config={**TEXT, "encoder_hidden_size": 32},
        vision_config=VISION, projection_dim=16, image_text_hidden_size=16),
    _row("BLIP captioning", "BlipForConditionalGeneration", "BlipConfig", _both(), text_config={**TEXT,
        "encoder_hidden_size": 32, "use_cache": False}, vision_config=VISION, projection_dim=16),
    _row("BLIP-2 Q-Former", "Blip2QFormerModel", "Blip2QFormerConfig", lambda: {"query_embeds": torch.randn(BATCH, 5, 32),
        "encoder_hidden_states": torch.randn(BATCH, 9, 32)}, encoder_hidden_size=32, **TEXT),
    _row("FLAVA", "FlavaModel", "FlavaConfig", _both(), text_config=TEXT, image_config=VISION, multimodal_config=WIDTH,
        hidden_size=32, projection_dim=16, image_codebook_config={"hidden_size": 16}),
    _row("ViLT", "ViltModel", "ViltConfig", _both(), image_size=SIZE, patch_size=PATCH, max_image_length=-1, **TEXT),
    _row("BridgeTower", "BridgeTowerModel", "BridgeTowerConfig", _both(), text_config=TEXT, vision_config={"hidden_size": 64,
        "num_hidden_layers": 2, "patch_size": PATCH, "image_size": SIZE}, hidden_size=32, num_attention_heads=4,
        num_hidden_layers=2, intermediate_size=64),
    _row("VisualBERT", "VisualBertModel", "VisualBertConfig", lambda: {"input_ids": tokens(BATCH, LENGTH),
        "visual_embeds": torch.randn(BATCH, 4, 16), "attention_mask": mask(BATCH, LENGTH), "visual_attention_mask": mask(BATCH,
        4)}, visual_embedding_dim=16, **TEXT),
    _row("LXMERT", "LxmertModel", "LxmertConfig", lambda: {"input_ids": tokens(BATCH, LENGTH), "visual_feats": torch.randn(BATCH,
        4, 16), "visual_pos": torch.rand(BATCH, 4, 4)}, visual_feat_dim=16, visual_pos_dim=4, l_layers=1, x_layers=1, r_layers=1,
        **{k: v for k, v in TEXT.items() if k != "num_hidden_layers"}),
    _row("LayoutLMv3", "LayoutLMv3ForTokenClassification", "LayoutLMv3Config", lambda: {"input_ids": tokens(BATCH, LENGTH),
        "bbox": torch.randint(0, 100, (BATCH, LENGTH, 4)), "pixel_values": images(SIZE)}, coordinate_size=4, shape_size=8,
        max_2d_position_embeddings=128, rel_pos_bins=8, max_rel_pos=16, rel_2d_pos_bins=8, max_rel_2d_pos=16, input_size=SIZE,
        patch_size=PATCH, **TEXT),
    _row("LLaVA", "LlavaForConditionalGeneration", "LlavaConfig", _with_image(PATCHES), text_config=LLAMA,
        vision_config={**VISION, "model_type": "clip_vision_model"}, image_token_index=IMAGE_TOKEN, image_token_id=IMAGE_TOKEN,
        vision_feature_layer=-1),
    _row("PaliGemma", "PaliGemmaForConditionalGeneration", "PaliGemmaConfig", _with_image(PATCHES), text_config={**LLAMA,
        "model_type": "gemma", "head_dim": 8}, vision_config={**VISION, "model_type": "siglip_vision_model",
        "vision_use_head": False}, image_token_index=IMAGE_TOKEN, image_token_id=IMAGE_TOKEN, projection_dim=32),
    _row("GIT", "GitForCausalLM", "GitConfig", _both(), vision_config=VISION, use_cache=False, **TEXT),
    _row("Florence-2 vision (DaViT)", "Florence2VisionBackbone", "Florence2VisionConfig",
        lambda: {"hidden_states": images(SIZE)}, embed_dim=[16, 32], num_heads=[2, 4], num_groups=[2, 4], depths=[1, 1],
        patch_size=[7, 3], patch_stride=[4, 2], patch_padding=[3, 1], patch_prenorm=[False, True], window_size=4,
        projection_dim=32, max_position_embeddings=50, drop_path_rate=0.0),
    _row("TrOCR decoder", "TrOCRForCausalLM", "TrOCRConfig", lambda: {"input_ids": tokens(BATCH, LENGTH)}, vocab_size=VOCABULARY,
        d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64, max_position_embeddings=40, use_cache=False,
        pad_token_id=0),
    _row("Perceiver", "PerceiverModel", "PerceiverConfig", lambda: {"inputs": torch.randn(BATCH, 12, 16)}, num_latents=8,
        d_latents=32, d_model=16, num_blocks=1, num_self_attends_per_block=2, num_self_attention_heads=4,
        num_cross_attention_heads=4),
)  # fmt: skip
