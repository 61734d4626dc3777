"""Vision of ``transformers``: classification, hybrid and hierarchical backbones, detection, segmentation and depth."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from architectures.base import BATCH, Architecture, images, transformers_model

VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}


def _pixels(size: int = 32) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": images(size)}


def _row(
    name: str,
    model: str,
    config: str,
    size: int = 32,
    *,
    family: str = "vision",
    example: Callable[[], Mapping[str, Tensor]] | None = None,
    **values: Any,
) -> Architecture:
    build = transformers_model(model, config, **values)
    return Architecture(name, family, build, example or _pixels(size))


def _dense(name: str, model: str, config: str, size: int = 32, **values: Any) -> Architecture:
    return _row(name, model, config, size, family="detection and segmentation", **values)


STAGES = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2}
SWIN = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "drop_path_rate": 0.0,
}
RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 16, 32],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage4"],
}
DETR = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_queries": 5,
}

CLASSIFIERS = (
    _row("ViT", "ViTForImageClassification", "ViTConfig", **VIT),
    _row("DeiT (distilled)", "DeiTForImageClassificationWithTeacher", "DeiTConfig", **VIT),
    _row("ViT-MSN", "ViTMSNForImageClassification", "ViTMSNConfig", **VIT),
    _row("DINOv2", "Dinov2ForImageClassification", "Dinov2Config", mlp_ratio=2, **{k: v for k,
        v in VIT.items() if k != "intermediate_size"}),
    _row("DINOv2 (SwiGLU, registers)", "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", mlp_ratio=2, use_swiglu_ffn=True,
        num_register_tokens=2, **{k: v for k, v in VIT.items() if k != "intermediate_size"}),
    _row("DINOv3", "DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=2, **VIT),
    _row("BEiT", "BeitForImageClassification", "BeitConfig", use_relative_position_bias=True, layer_scale_init_value=0.1, **VIT),
    _row("data2vec vision", "Data2VecVisionModel", "Data2VecVisionConfig", use_shared_relative_position_bias=True, **VIT),
    _row("Hiera", "HieraForImageClassification", "HieraConfig", embed_dim=16, image_size=[32, 32], patch_kernel=[7, 7],
        patch_stride=[4, 4], patch_padding=[3, 3], depths=[1, 1], num_heads=[2, 4], mlp_ratio=2.0, query_stride=[2, 2],
        num_query_pool=1, masked_unit_size=[4, 4], masked_unit_attention=[True, False]),
    _row("ViTDet", "VitDetModel", "VitDetConfig", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2,
        image_size=32, patch_size=8, window_block_indices=[0], window_size=2, use_relative_position_embeddings=True,
        pretrain_image_size=32),
    _row("Swin", "SwinForImageClassification", "SwinConfig", **SWIN),
    _row("Swin v2", "Swinv2ForImageClassification", "Swinv2Config", **SWIN),
    _row("FocalNet", "FocalNetForImageClassification", "FocalNetConfig", image_size=32, patch_size=4, embed_dim=16, depths=[1,
        1], focal_levels=[2, 2], focal_windows=[3, 3], hidden_sizes=[16, 32]),
    _row("ConvNeXt", "ConvNextForImageClassification", "ConvNextConfig", **STAGES),
    _row("ConvNeXt v2", "ConvNextV2ForImageClassification", "ConvNextV2Config", **STAGES),
    _row("LeViT", "LevitForImageClassification", "LevitConfig", 64, image_size=64, hidden_sizes=[32, 32, 64],
        num_attention_heads=[2, 4, 4], depths=[1, 1, 1], key_dim=[8, 8, 8], attention_ratio=[2, 2, 2], mlp_ratio=[2, 2, 2]),
    _row("MobileViT", "MobileViTForImageClassification", "MobileViTConfig", 64, image_size=64, hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32], num_attention_heads=4, expand_ratio=2.0),
    _row("MobileViT v2", "MobileViTV2ForImageClassification", "MobileViTV2Config", 64, image_size=64, width_multiplier=0.25,
        n_attn_blocks=[1, 1, 1], base_attn_unit_dims=[64, 64, 64]),
    _row("PVT", "PvtForImageClassification", "PvtConfig", 64, image_size=64, num_encoder_blocks=4, depths=[1, 1, 1, 1],
        sequence_reduction_ratios=[4, 2, 1, 1], hidden_sizes=[16, 16, 32, 32], num_attention_heads=[1, 2, 2, 4], mlp_ratios=[2,
        2, 2, 2]),
    _row("PVT v2", "PvtV2ForImageClassification", "PvtV2Config", 64, image_size=64, depths=[1, 1, 1, 1], sr_ratios=[4, 2, 1, 1],
        hidden_sizes=[16, 16, 32, 32], num_attention_heads=[1, 2, 2, 4], mlp_ratios=[2, 2, 2, 2]),
    _row("CvT", "CvtForImageClassification", "CvtConfig", 64, qkv_bias=[True] * 3, cls_token=[False, False, True], embed_dim=[16,
        32, 32], num_heads=[1, 2, 4], depth=[1, 2, 3], mlp_ratio=[2.0, 2.0, 2.0], drop_path_rate=[0.0, 0.0, 0.0]),
    _row("PoolFormer", "PoolFormerForImageClassification", "PoolFormerConfig", 64, depths=[1, 1, 1, 1], hidden_sizes=[16, 16, 32,
        32], mlp_ratio=2.0),
    _row("SwiftFormer", "SwiftFormerForImageClassification", "SwiftFormerConfig", 64, image_size=64, depths=[1, 1, 1, 1],
        embed_dims=[16, 16, 32, 32], mlp_ratio=2),
    _row("ResNet (transformers)", "ResNetForImageClassification", "ResNetConfig", embedding_size=8, hidden_sizes=[16, 32],
        depths=[2, 2], layer_type="bottleneck"),
    _row("RegNet", "RegNetForImageClassification", "RegNetConfig", embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2],
        groups_width=8),
    _row("BiT", "BitForImageClassification", "BitConfig", embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1], num_groups=4),
    _row("MobileNetV1 (transformers)", "MobileNetV1ForImageClassification", "MobileNetV1Config", 64, image_size=64,
        depth_multiplier=0.25),
    _row("MobileNetV2 (transformers)", "MobileNetV2ForImageClassification", "MobileNetV2Config", 64, image_size=64,
        depth_multiplier=0.35),
    _row("EfficientNet (transformers)", "EfficientNetForImageClassification", "EfficientNetConfig", 64, image_size=64,
        width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320, dropout_rate=0.0, drop_connect_rate=0.0),
    _row("HGNet v2", "HGNetV2ForImageClassification", "HGNetV2Config", 64, embedding_size=8, hidden_sizes=[16, 16, 32, 32],
        depths=[1, 1, 1, 1], stem_channels=[3, 8, 8], stage_in_channels=[8, 16, 16, 32], stage_mid_channels=[8, 8, 8, 16],
        stage_out_channels=[16, 16, 32, 32], stage_num_blocks=[1, 1, 1, 1], stage_numb_of_layers=[2, 2, 2, 2]),
    _row("TextNet", "TextNetForImageClassification", "TextNetConfig", 64, image_size=[64, 64], stem_out_channels=8,
        hidden_sizes=[8, 16, 16, 32, 32], conv_layer_kernel_sizes=[[[3, 3]], [[3, 3]], [[3, 1]], [[1, 3]]],
        conv_layer_strides=[[1], [2], [1], [2]]),
    _row("ViT-MAE encoder", "ViTMAEModel", "ViTMAEConfig", example=lambda: {"pixel_values": images(32),
        "noise": torch.rand(BATCH, 16)}, **VIT),
    _row("I-JEPA", "IJepaModel", "IJepaConfig", **VIT),
    _row("VideoMAE", "VideoMAEForVideoClassification", "VideoMAEConfig",
        example=lambda: {"pixel_values": images(32).unsqueeze(1).repeat(1, 4, 1, 1, 1)}, num_frames=4, tubelet_size=2, **VIT),
    _row("TimeSformer", "TimesformerForVideoClassification", "TimesformerConfig",
        example=lambda: {"pixel_values": images(32).unsqueeze(1).repeat(1, 4, 1, 1, 1)}, num_frames=4, **VIT),
)  # fmt: skip

DENSE = (
    _dense("SegFormer", "SegformerForSemanticSegmentation", "SegformerConfig", 64, num_encoder_blocks=4, depths=[1, 1, 1, 1],
        sr_ratios=[4, 2, 1, 1], hidden_sizes=[16, 16, 32, 32], num_attention_heads=[1, 2, 2, 4], mlp_ratios=[2, 2, 2, 2],
        decoder_hidden_size=32, drop_path_rate=0.0),
    _dense("DeepLabV3 (MobileViT)", "MobileViTForSemanticSegmentation", "MobileViTConfig", 64, image_size=64, hidden_sizes=[16,
        24, 32], neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32], num_attention_heads=4, expand_ratio=2.0, aspp_out_channels=32,
        atrous_rates=[1, 2, 3]),
    _dense("DeepLabV3+ (MobileNetV2)", "MobileNetV2ForSemanticSegmentation", "MobileNetV2Config", 64, image_size=64,
        depth_multiplier=0.35),
    _dense("BEiT for segmentation", "BeitForSemanticSegmentation", "BeitConfig", 64, out_indices=[1, 2, 3, 4],
        use_relative_position_bias=True, pool_scales=[1, 2], **{**VIT, "num_hidden_layers": 4, "image_size": 64, "patch_size": 16}),
    _dense("UPerNet (ConvNeXt)", "UperNetForSemanticSegmentation", "UperNetConfig", 64,
        backbone_config={"model_type": "convnext", "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1],
        "out_features": ["stage1", "stage2", "stage3", "stage4"]}, hidden_size=32, pool_scales=[1, 2], auxiliary_in_channels=16,
        auxiliary_channels=16),
    _dense("DPT", "DPTForDepthEstimation", "DPTConfig", 32, reassemble_factors=[4, 2, 1, 0.5], neck_hidden_sizes=[8, 16, 16, 16],
        fusion_hidden_size=16, backbone_out_indices=[0, 1, 2, 3], is_hybrid=False, **{**VIT, "num_hidden_layers": 4}),
    _dense("Depth Anything", "DepthAnythingForDepthEstimation", "DepthAnythingConfig", 56,
        backbone_config={"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
        "mlp_ratio": 2, "image_size": 56, "patch_size": 14, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False,
        "apply_layernorm": True}, patch_size=14, reassemble_hidden_size=32, neck_hidden_sizes=[8, 16, 16, 16],
        fusion_hidden_size=16, head_hidden_size=8),
    _dense("GLPN", "GLPNForDepthEstimation", "GLPNConfig", 64, num_encoder_blocks=4, depths=[1, 1, 1, 1], sr_ratios=[4, 2, 1, 1],
        hidden_sizes=[16, 16, 32, 32], num_attention_heads=[1, 2, 2, 4], mlp_ratios=[2, 2, 2, 2], decoder_hidden_size=16,
        drop_path_rate=0.0),
    _dense("DETR", "DetrForObjectDetection", "DetrConfig", 64, use_timm_backbone=False, use_pretrained_backbone=False,
        backbone=None, backbone_config=RESNET, **DETR),
    _dense("Conditional DETR", "ConditionalDetrForObjectDetection", "ConditionalDetrConfig", 64, use_timm_backbone=False,
        use_pretrained_backbone=False, backbone=None, backbone_config=RESNET, **DETR),
    _dense("Deformable DETR", "DeformableDetrForObjectDetection", "DeformableDetrConfig", 64, use_timm_backbone=False,
        use_pretrained_backbone=False, backbone=None, backbone_config={**RESNET, "out_features": ["stage2", "stage3", "stage4"]},
        num_feature_levels=3, **{**DETR, "decoder_layers": 2}),
    _dense("Table Transformer", "TableTransformerForObjectDetection", "TableTransformerConfig", 64, use_timm_backbone=False,
        use_pretrained_backbone=False, backbone=None, backbone_config=RESNET, **DETR),
    _dense("YOLOS", "YolosForObjectDetection", "YolosConfig", 32, num_detection_tokens=5, use_mid_position_embeddings=False,
        **{**VIT, "image_size": [32, 32]}),
    _dense("RT-DETR", "RTDetrForObjectDetection", "RTDetrConfig", 64, backbone_config={"model_type": "rt_detr_resnet",
        "embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "layer_type": "basic",
        "out_features": ["stage2", "stage3", "stage4"]}, encoder_hidden_dim=32, encoder_in_channels=[16, 16, 32], d_model=32,
        decoder_in_channels=[32, 32, 32], encoder_ffn_dim=64, decoder_ffn_dim=64, encoder_attention_heads=4,
        decoder_attention_heads=4, decoder_layers=1, num_queries=5, num_denoising=0),
    _dense("MaskFormer", "MaskFormerForInstanceSegmentation", "MaskFormerConfig", 64, fpn_feature_size=32, mask_feature_size=32,
        backbone_config={**SWIN, "model_type": "swin", "image_size": 64, "depths": [1, 1, 1, 1], "num_heads": [2, 2, 2, 4],
        "out_features": ["stage1", "stage2", "stage3", "stage4"]}, decoder_config={**DETR, "model_type": "detr"}),
    _dense("Mask2Former", "Mask2FormerForUniversalSegmentation", "Mask2FormerConfig", 64, feature_size=32, mask_feature_size=32,
        hidden_dim=32, encoder_feedforward_dim=32, dim_feedforward=32, encoder_layers=1, decoder_layers=2, num_attention_heads=4,
        num_queries=5, feature_strides=[4, 8, 16, 32], common_stride=4, train_num_points=10, backbone_config={**SWIN,
        "model_type": "swin", "image_size": 64, "depths": [1, 1, 1, 1], "num_heads": [2, 2, 2, 4], "out_features": ["stage1",
        "stage2", "stage3", "stage4"]}),
    _dense("SAM encoder", "SamVisionModel", "SamVisionConfig", 32, hidden_size=32, output_channels=16, num_hidden_layers=2,
        num_attention_heads=4, image_size=32, patch_size=8, mlp_dim=64, window_size=2, global_attn_indexes=[1], num_pos_feats=8,
        use_rel_pos=True),
    _dense("SAM", "SamModel", "SamConfig", 32, vision_config={"hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 32, "patch_size": 8, "mlp_dim": 64, "window_size": 2, "global_attn_indexes": [1],
        "num_pos_feats": 8}, prompt_encoder_config={"hidden_size": 16, "image_size": 32, "patch_size": 8,
        "mask_input_channels": 4}, mask_decoder_config={"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2,
        "num_hidden_layers": 2, "iou_head_hidden_dim": 16}),
    _dense("ViTMatte", "VitMatteForImageMatting", "VitMatteConfig", 32, backbone_config={"model_type": "vitdet",
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 16,
        "num_channels": 4, "mlp_ratio": 2, "out_features": ["stage2"]}, hidden_size=32, convstream_hidden_sizes=[8, 16, 16],
        fusion_hidden_sizes=[32, 16, 16, 8], example=lambda: {"pixel_values": images(32, 4)}),
    _dense("Swin2SR", "Swin2SRForImageSuperResolution", "Swin2SRConfig", 16, image_size=16, patch_size=1, embed_dim=16,
        depths=[2], num_heads=[2], window_size=4, mlp_ratio=2.0, upscale=2, upsampler="pixelshuffle", drop_path_rate=0.0),
    _dense("CLIPSeg vision", "CLIPSegVisionModel", "CLIPSegVisionConfig", **VIT),
)  # fmt: skip

ARCHITECTURES = (*CLASSIFIERS, *DENSE)
