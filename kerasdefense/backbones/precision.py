"""Mixed precision: what the layers of a backbone compute in; their weights, its input and its logits stay float32."""

from __future__ import annotations

from typing import Any, Union

import keras

from kerasdefense.backbones import blocks

PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")


def with_precision(model: keras.Model, precision: str, *, but: Union[str, tuple[str, ...]] = "") -> keras.Model:
    """Return a copy of a model, weights included, whose layers compute in one of PRECISIONS.

    Args:
        model: backbone, or any functional model.
        precision: one of PRECISIONS.
        but: name of the layer that stays as it is, or names of several; empty = the one that gives a backbone's logits,
            or those that give a purifier's images.
    """
    kept = but or _last_layers(model)
    recast = type(model).from_config(in_precision(model.get_config(), precision, but=kept))
    recast.set_weights(model.get_weights())
    blocks.synchronize_alike(recast, model)
    return recast


def precision_of(model: keras.Model) -> str:
    """Return which of PRECISIONS a model computes in: a mixed one if any of its layers does."""
    layers = (each for each in model.submodules if isinstance(each, keras.layers.Layer))
    policies = {layer.dtype_policy.name for layer in layers}
    return next((each for each in PRECISIONS[1:] if each in policies), PRECISIONS[0])


def in_precision(config: Any, precision: str, *, but: Union[str, tuple[str, ...]] = "") -> Any:
    """Return a nest of Keras configurations with each of PRECISIONS in it replaced by `precision`.

    Inputs stay as they are, and so does the layer whose name is `but`, or is among them.
    """
    kept = (but,) if isinstance(but, str) else but
    if isinstance(config, (list, tuple)):
        return type(config)(in_precision(each, precision, but=but) for each in config)
    if not isinstance(config, dict) or config.get("class_name") == "InputLayer":
        return config
    if but and "class_name" in config and config.get("config", {}).get("name") in kept:
        return config
    return {
        key: _replaced(value, precision) if key == "dtype" else in_precision(value, precision, but=but)
        for key, value in config.items()
    }


def _last_layers(model: keras.Model) -> tuple[str, ...]:
    """Return the names of the layers that give the logits, or the images, in whatever model they are nested."""
    outputs = ("logits",) if "logits" in model.output else tuple(model.output)
    return tuple(_layer_of(model, output).name for output in outputs)


def _layer_of(model: keras.Model, output: str) -> keras.layers.Layer:
    layer = model.output[output]._keras_history.layer
    return _layer_of(layer, output) if isinstance(layer, keras.Model) else layer


def _replaced(dtype: Any, precision: str) -> Any:
    """Return the serialised policy `precision`, where `dtype` is one of PRECISIONS."""
    if (dtype["config"]["name"] if isinstance(dtype, dict) else dtype) not in PRECISIONS:
        return dtype
    return keras.saving.serialize_keras_object(keras.mixed_precision.Policy(precision))
