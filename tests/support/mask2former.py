"""A Mask2Former small enough for a test."""

import torch
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

import fastgrpo  # noqa: F401  (prepares the imports below)
from fastgrpo.prompts.geneval import CLASSES


def tiny_model(**changes) -> Mask2FormerForUniversalSegmentation:
    swin = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=7,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    sizes = {
        "feature_size": 32,
        "mask_feature_size": 32,
        "hidden_dim": 32,
        "encoder_feedforward_dim": 32,
        "dim_feedforward": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "num_attention_heads": 2,
        "num_queries": 10,
        "num_labels": len(CLASSES),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=swin, **(sizes | changes))).eval()
        # A new model finds everything about equally likely, and its masks all or nothing.
        with torch.no_grad():
            model.class_predictor.weight.normal_(std=2.0)
    return model
