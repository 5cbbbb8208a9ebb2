"""Networks of Transformers with batch norms, from small configurations, without any download."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from interop_check import Case
from torch import Tensor, nn

__all__ = ["CASES"]

CLASSES = 5


def images(size: int = 32) -> Callable[[int, int], dict[str, Tensor]]:
    return lambda seed, count: {
        "pixel_values": torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
    }


def build(config: str, network: str, **settings: Any) -> Callable[[], nn.Module]:
    """A network of these settings, whose names are those of Transformers."""

    def made() -> nn.Module:
        library = importlib.import_module("transformers")
        settings.setdefault("num_labels", CLASSES)
        given = {name: value() if callable(value) else value for name, value in settings.items()}
        model: nn.Module = getattr(library, network)(getattr(library, config)(**given))
        return model

    return made


def configuration(name: str, **settings: Any) -> Callable[[], Any]:
    return lambda: getattr(importlib.import_module("transformers"), name)(**settings)


def logits(output: Any) -> Tensor:
    result: Tensor = output.logits
    return result


def classifier(name: str, config: str, network: str, size: int = 32, **settings: Any) -> Case:
    return Case("transformers", name, build(config, network, **settings), images(size), read=logits)


def last_axis(place: str = "logits", **more: Any) -> dict[str, Any]:
    """Options and reading of a network with classes on the last axis."""
    return {
        "options": {"class_axis": -1, **({} if place == "logits" else {"logits": place}), **more},
        "read": lambda output: getattr(output, place).movedim(-1, 1),
    }


def audio(seed: int, count: int) -> dict[str, Tensor]:
    return {"input_values": torch.randn(count, 800, generator=torch.Generator().manual_seed(seed))}


def spectra(channels: int, length: int = 48) -> Callable[[int, int], dict[str, Tensor]]:
    return lambda seed, count: {
        "input_features": torch.randn(count, length, channels, generator=torch.Generator().manual_seed(seed))
    }


def series(seed: int, count: int) -> dict[str, Tensor]:
    return {"past_values": torch.randn(count, 32, 3, generator=torch.Generator().manual_seed(seed)).cumsum(1)}


RESNET: Mapping[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
DETECTOR: Mapping[str, Any] = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 6, "use_timm_backbone": False,
    "use_pretrained_backbone": False, "backbone": None,
}  # fmt: skip
BACKBONE = configuration("ResNetConfig", **RESNET, out_features=["stage2"])

CASES = [
    classifier("ResNet", "ResNetConfig", "ResNetForImageClassification", **RESNET),
    classifier("RegNet", "RegNetConfig", "RegNetForImageClassification", embedding_size=8, hidden_sizes=[8, 16],
               depths=[1, 1], groups_width=8),
    classifier("LeViT", "LevitConfig", "LevitForImageClassification", 64, image_size=64, hidden_sizes=[16, 24, 32],
               num_attention_heads=[1, 2, 2], depths=[1, 1, 1], key_dim=[8, 8, 8]),
    classifier("MobileNet V1", "MobileNetV1Config", "MobileNetV1ForImageClassification", depth_multiplier=0.25,
               image_size=32),
    classifier("MobileNet V2", "MobileNetV2Config", "MobileNetV2ForImageClassification", depth_multiplier=0.35,
               image_size=32),
    classifier("MobileViT", "MobileViTConfig", "MobileViTForImageClassification", 64, image_size=64,
               hidden_sizes=[16, 16, 16], neck_hidden_sizes=[8, 8, 8, 16, 16, 16, 16], num_attention_heads=2),
    classifier("MobileViT V2", "MobileViTV2Config", "MobileViTV2ForImageClassification", 64, image_size=64,
               width_multiplier=0.5),
    classifier("EfficientNet", "EfficientNetConfig", "EfficientNetForImageClassification", image_size=32,
               width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=320),
    classifier("SwiftFormer", "SwiftFormerConfig", "SwiftFormerForImageClassification", 64, image_size=64,
               depths=[1, 1, 1, 1], embed_dims=[8, 8, 16, 16]),
    classifier("CvT", "CvtConfig", "CvtForImageClassification", 32, patch_sizes=[7, 3, 3], embed_dim=[8, 16, 24],
               num_heads=[1, 2, 2], depth=[1, 2, 3]),
    classifier("HGNet V2", "HGNetV2Config", "HGNetV2ForImageClassification"),
    classifier("TextNet", "TextNetConfig", "TextNetForImageClassification", 64),
    Case("transformers", "PP-LCNet", build("PPLCNetConfig", "PPLCNetForImageClassification", scale=0.25), images(64),
         {"logits": "last_hidden_state"}, lambda output: output.last_hidden_state),
    classifier("SegFormer, segmentation", "SegformerConfig", "SegformerForSemanticSegmentation", 64,
               hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2],
               decoder_hidden_size=16),
    classifier("MobileViT, segmentation", "MobileViTConfig", "MobileViTForSemanticSegmentation", 64, image_size=64,
               hidden_sizes=[16, 16, 16], neck_hidden_sizes=[8, 8, 8, 16, 16, 16, 16], num_attention_heads=2,
               aspp_out_channels=16),
    classifier("MobileNet V2, segmentation", "MobileNetV2Config", "MobileNetV2ForSemanticSegmentation", 64,
               depth_multiplier=0.35, image_size=64),
    classifier("BEiT, segmentation", "BeitConfig", "BeitForSemanticSegmentation", 64, image_size=64, patch_size=16,
               hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16,
               out_indices=[1, 2, 3, 4], auxiliary_channels=8, pool_scales=[1, 2]),
    classifier("Data2Vec, segmentation", "Data2VecVisionConfig", "Data2VecVisionForSemanticSegmentation", 64,
               image_size=64, patch_size=16, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
               intermediate_size=16, out_indices=[0, 1, 2, 3], auxiliary_channels=8, pool_scales=[1, 2]),
    classifier("UPerNet, segmentation", "UperNetConfig", "UperNetForSemanticSegmentation", 64,
               backbone_config=configuration("ResNetConfig", embedding_size=8, hidden_sizes=[8, 8, 16, 16],
                                             depths=[1, 1, 1, 1], layer_type="basic",
                                             out_features=["stage1", "stage2", "stage3", "stage4"]),
               hidden_size=16, auxiliary_channels=8, auxiliary_in_channels=16, pool_scales=[1, 2],
               use_auxiliary_head=True),
    Case("transformers", "Wav2Vec2 Conformer, CTC",
         build("Wav2Vec2ConformerConfig", "Wav2Vec2ConformerForCTC", hidden_size=16, num_hidden_layers=1,
               num_attention_heads=2, intermediate_size=16, conv_dim=[8, 8], conv_kernel=[10, 3], conv_stride=[5, 2],
               num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, vocab_size=7, mask_time_prob=0.0,
               layerdrop=0.0, num_feat_extract_layers=2, conv_depthwise_kernel_size=7),
         audio, **last_axis()),
    Case("transformers", "Parakeet, CTC",
         build("ParakeetCTCConfig", "ParakeetForCTC", vocab_size=7, pad_token_id=6,
               encoder_config=configuration("ParakeetEncoderConfig", hidden_size=16, num_hidden_layers=1,
                                            num_attention_heads=2, intermediate_size=16, num_mel_bins=16,
                                            subsampling_conv_channels=8, layerdrop=0.0)),
         spectra(16), **last_axis()),
    Case("transformers", "LASR, CTC",
         build("LasrCTCConfig", "LasrForCTC", vocab_size=7, pad_token_id=6,
               encoder_config=configuration("LasrEncoderConfig", hidden_size=16, num_hidden_layers=1,
                                            num_attention_heads=2, intermediate_size=16, num_mel_bins=16,
                                            subsampling_conv_channels=8, layerdrop=0.0)),
         spectra(16), **last_axis()),
    Case("transformers", "PatchTST",
         build("PatchTSTConfig", "PatchTSTForClassification", num_input_channels=3, context_length=32, patch_length=8,
               patch_stride=8, d_model=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16, num_targets=CLASSES,
               use_cls_token=True, norm_type="batchnorm"),
         series, {"logits": "prediction_logits"}, lambda output: output.prediction_logits),
    Case("transformers", "PatchTSMixer",
         build("PatchTSMixerConfig", "PatchTSMixerForTimeSeriesClassification", num_input_channels=3,
               context_length=32, patch_length=8, patch_stride=8, d_model=16, num_layers=1, num_targets=CLASSES,
               norm_mlp="BatchNorm"),
         series, {"logits": "prediction_outputs"}, lambda output: output.prediction_outputs),
    Case("transformers", "PatchTST, forecast",
         build("PatchTSTConfig", "PatchTSTForPrediction", num_input_channels=3, context_length=32, patch_length=8,
               patch_stride=8, d_model=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16, prediction_length=4,
               norm_type="batchnorm", loss="mse"),
         series, {"task": "regression", "logits": "prediction_outputs"}, lambda output: output.prediction_outputs),
    Case("transformers", "RT-DETR, detection",
         build("RTDetrConfig", "RTDetrForObjectDetection",
               backbone_config=configuration("RTDetrResNetConfig", embedding_size=8, hidden_sizes=[8, 8, 16, 16],
                                             depths=[1, 1, 1, 1], layer_type="basic",
                                             out_features=["stage2", "stage3", "stage4"]),
               encoder_hidden_dim=16, encoder_in_channels=[8, 16, 16], encoder_ffn_dim=16, d_model=16, num_queries=6,
               decoder_in_channels=[16, 16, 16], decoder_ffn_dim=16, decoder_layers=1, decoder_attention_heads=2,
               encoder_attention_heads=2, num_denoising=0, freeze_backbone_batch_norms=False,
               anchor_image_size=None),
         images(64), options={"class_axis": -1, "task": "multilabel"},
         read=lambda output: output.logits.movedim(-1, 1)),
    Case("transformers", "DETR, detection", build("DetrConfig", "DetrForObjectDetection", **DETECTOR,
                                                  backbone_config=BACKBONE),
         images(), **last_axis(), refusal="no batch-norm layers"),
    Case("transformers", "Table Transformer, detection",
         build("TableTransformerConfig", "TableTransformerForObjectDetection", **DETECTOR, backbone_config=BACKBONE),
         images(), **last_axis(), refusal="no batch-norm layers"),
]  # fmt: skip
