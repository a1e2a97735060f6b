"""Mixed precision: what the layers of a backbone compute in; their weights, its input and its logits stay float32."""

from __future__ import annotations

from typing import Any

import keras

PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")


def with_precision(backbone: keras.Model, precision: str) -> keras.Model:
    """Return a copy of the backbone, weights included, whose layers compute in one of PRECISIONS."""
    config = backbone.get_config()
    logits = backbone.output["logits"]._keras_history.layer.name
    for layer in config["layers"]:
        if layer["config"]["name"] != logits:
            layer.update(in_precision(layer, precision))
    recast = type(backbone).from_config(config)
    recast.set_weights(backbone.get_weights())
    return recast


def in_precision(config: Any, precision: str) -> Any:
    """Return a nest of Keras configurations with each of PRECISIONS in it, inputs aside, replaced by `precision`."""
    if isinstance(config, (list, tuple)):
        return type(config)(in_precision(each, precision) for each in config)
    if not isinstance(config, dict) or config.get("class_name") == "InputLayer":
        return config
    return {
        key: _replaced(value, precision) if key == "dtype" else in_precision(value, precision)
        for key, value in config.items()
    }


def _replaced(dtype: Any, precision: str) -> Any:
    """Return the serialised policy `precision`, where `dtype` is one of PRECISIONS."""
    if (dtype["config"]["name"] if isinstance(dtype, dict) else dtype) not in PRECISIONS:
        return dtype
    return keras.saving.serialize_keras_object(keras.mixed_precision.Policy(precision))
