"""Forecasting: the time-series transformers of ``transformers``."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from architectures.base import BATCH, Architecture, transformers_model

HISTORY, FUTURE, LAG = 16, 6, 3


def _row(
    name: str,
    model: str,
    config: str,
    example: Callable[[], Mapping[str, Tensor]],
    **values: Any,
) -> Architecture:
    return Architecture(
        name, "time series", transformers_model(model, config, **values), example, lengths={}
    )


def _series() -> dict[str, Tensor]:
    return {"past_values": torch.randn(BATCH, HISTORY, 3)}


def _forecast() -> dict[str, Tensor]:
    past = HISTORY + LAG
    return {
        "past_values": 5 + torch.randn(BATCH, past),
        "past_time_features": torch.randn(BATCH, past, 2),
        "past_observed_mask": torch.ones(BATCH, past),
        "future_values": 5 + torch.randn(BATCH, FUTURE),
        "future_time_features": torch.randn(BATCH, FUTURE, 2),
    }


PATCHES = {
    "num_input_channels": 3,
    "context_length": HISTORY,
    "patch_length": 4,
    "patch_stride": 4,
    "d_model": 32,
    "num_hidden_layers": 2,
    "prediction_length": FUTURE,
}
FORECAST = {
    "prediction_length": FUTURE,
    "context_length": HISTORY,
    "lags_sequence": [1, 2, LAG],
    "num_time_features": 2,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "use_cache": False,
}

ARCHITECTURES = (
    _row("PatchTST", "PatchTSTForPrediction", "PatchTSTConfig", _series, num_attention_heads=4, ffn_dim=64, **PATCHES),
    _row("PatchTSMixer", "PatchTSMixerForPrediction", "PatchTSMixerConfig", _series, **PATCHES),
    _row("Time Series Transformer", "TimeSeriesTransformerModel", "TimeSeriesTransformerConfig", _forecast, **FORECAST),
    _row("Informer", "InformerModel", "InformerConfig", _forecast, attention_type="full", distil=False, **FORECAST),
    _row("Informer (sparse attention)", "InformerModel", "InformerConfig", _forecast, **FORECAST),
    _row("Autoformer", "AutoformerModel", "AutoformerConfig", _forecast, label_length=4, moving_average=5, **FORECAST),
    _row(
        "TimesFM",
        "TimesFmModelForPrediction",
        "TimesFmConfig",
        lambda: {"past_values": torch.randn(BATCH, 32)},
        patch_length=4,
        context_length=32,
        horizon_length=8,
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=32,
        head_dim=8,
        num_attention_heads=4,
        use_positional_embedding=False,
    ),
)  # fmt: skip
