"""Backbones: functional classifiers from `image` to `feature_map`, `embedding` and `logits`.

Images are float32 [batch, height, width, channels] in [0, 1]; normalisation is a layer of the backbone.
`feature_map` is what enters global pooling, `embedding` what enters the last dense layer: the mean of the feature map,
or with the osdn_ architectures a dense layer on it.
"""

from __future__ import annotations

import functools
from typing import Any, Callable

import keras

from kerasdefense import config
from kerasdefense.backbones.blocks import ImageShape
from kerasdefense.backbones.critic import critic
from kerasdefense.backbones.decoder import decoder
from kerasdefense.backbones.denoising import denoising_places, denoising_resnet, plain_copy
from kerasdefense.backbones.head import last_kernel, maps_of, pools_by_mean
from kerasdefense.backbones.orthogonal import orthogonal_head, with_orthogonal_head
from kerasdefense.backbones.own import as_backbone, fitted, load, read
from kerasdefense.backbones.patch_critic import patch_critic
from kerasdefense.backbones.plain import small_cnn
from kerasdefense.backbones.precision import in_precision, precision_of, with_precision
from kerasdefense.backbones.purification import Purification, purified
from kerasdefense.backbones.purifiers import PURIFIERS, build_purifier, check_purifier, purifier_in
from kerasdefense.backbones.resnet import bottleneck_resnet, cifar_resnet, resnet18
from kerasdefense.backbones.unet import purifier, residual_unet
from kerasdefense.backbones.vgg import vgg19
from kerasdefense.backbones.wide import wide_resnet
from kerasdefense.types import UsageError, look_up

BACKBONES: dict[str, Callable[..., keras.Model]] = {
    "cafd_resnet50": functools.partial(bottleneck_resnet, blocks_per_stage=(3, 4, 6)),
    "dfa_wide_resnet": functools.partial(wide_resnet, late_stride=True),
    "osdn_resnet14": functools.partial(denoising_resnet, depth=14),
    "osdn_resnet18": denoising_resnet,
    "osdn_resnet8": functools.partial(denoising_resnet, depth=8),
    "resnet14": functools.partial(cifar_resnet, depth=14),
    "resnet18": resnet18,
    "resnet20": functools.partial(cifar_resnet, depth=20),
    "resnet50": functools.partial(bottleneck_resnet, blocks_per_stage=(3, 4, 6, 3)),
    "resnet8": functools.partial(cifar_resnet, depth=8),
    "small_cnn": small_cnn,
    "vgg19": vgg19,
    "wide_resnet": wide_resnet,
}


def build(backbone: config.Backbone, *, image_shape: ImageShape, classes: int) -> keras.Model:
    """Return the backbone that a configuration describes, or the user's own model in its file, with its head.

    Args:
        backbone: the configuration; with `path` set, name, width and depth are ignored, and a model with orthonormal
            axes keeps those it has learnt on.
        image_shape: height, width and channels of the data.
        classes: number of classes of the data, at least 2.
    """
    model = _with_dense_head(backbone, image_shape, classes)
    has_axes = orthogonal_head(model) is not None
    if has_axes and backbone.head != "orthogonal":
        raise UsageError(f"the classes of {backbone.path} are frozen axes: pass --backbone_head=orthogonal")
    return model if has_axes or backbone.head == "dense" else with_orthogonal_head(model)


def _with_dense_head(backbone: config.Backbone, image_shape: ImageShape, classes: int) -> keras.Model:
    given = [name for name in ("denoise", "places") if getattr(backbone, name) != getattr(config.Backbone(), name)]
    if given and (backbone.path or not backbone.name.startswith("osdn_")):
        raise UsageError(f"--backbone_{given[0]} needs --backbone_name=osdn_resnet18 or another with denoising blocks")
    if backbone.path:
        return load(backbone, image_shape=image_shape, classes=classes)
    if backbone.pooling_layer or backbone.logits_layer:
        raise UsageError("--backbone_pooling_layer and --backbone_logits_layer need --backbone_path, your own model")
    make = look_up(BACKBONES, backbone.name, "backbone")
    if backbone.name in ("wide_resnet", "dfa_wide_resnet"):
        return make(image_shape, classes, depth=backbone.depth, width=backbone.width)
    if backbone.name.startswith("osdn_"):
        return make(image_shape, classes, width=backbone.width, **_denoising(backbone))
    return make(image_shape, classes, width=backbone.width)


def _denoising(backbone: config.Backbone) -> dict[str, Any]:
    """Return the kind and the places of a configuration's denoising blocks."""
    if backbone.denoise == "none":
        if backbone.places:
            raise UsageError(f"--backbone_denoise=none leaves nothing to place at --backbone_places={backbone.places}")
        return {"places": ()}
    try:
        places = tuple(int(each) for each in backbone.places.split(",")) if backbone.places else None
    except ValueError as error:
        raise UsageError(f"--backbone_places={backbone.places!r} must be numbers such as 0,1,2") from error
    return {"denoise": backbone.denoise, "places": places}


__all__ = [
    "BACKBONES",
    "PURIFIERS",
    "Purification",
    "as_backbone",
    "bottleneck_resnet",
    "build",
    "build_purifier",
    "check_purifier",
    "cifar_resnet",
    "critic",
    "decoder",
    "denoising_places",
    "denoising_resnet",
    "fitted",
    "in_precision",
    "last_kernel",
    "maps_of",
    "orthogonal_head",
    "patch_critic",
    "plain_copy",
    "pools_by_mean",
    "precision_of",
    "purified",
    "purifier",
    "purifier_in",
    "read",
    "residual_unet",
    "resnet18",
    "small_cnn",
    "vgg19",
    "wide_resnet",
    "with_orthogonal_head",
    "with_precision",
]
