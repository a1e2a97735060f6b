"""Losses: pure functions of tensors, one value per example."""

from kerasdefense.losses.aggregation import aggregation, check_aggregation, mixed_cross_entropy
from kerasdefense.losses.attention import attention_distance, attention_map, check_attention
from kerasdefense.losses.class_activation import (
    check_weight_term,
    class_activation_features,
    class_activation_terms,
    features_of,
    released_maps,
    soft_weights,
    squared_distance,
    winning_weights,
)
from kerasdefense.losses.classification import (
    boosted_cross_entropy,
    cross_entropy,
    dlr,
    doubted_divergence,
    kl_divergence,
    margin,
    runner_up_penalty,
    smoothing_over_others,
    targeted_dlr,
)
from kerasdefense.losses.hinge import hinge_adversarial_loss, hinge_critic_loss
from kerasdefense.losses.metric import angular_distance, angular_triplet, mean_square
from kerasdefense.losses.open_set_defense import open_set_defense_terms, peer_terms
from kerasdefense.losses.reconstruction import reconstruction_error
from kerasdefense.losses.relativistic import adversarial_loss, critic_loss

__all__ = [
    "adversarial_loss",
    "aggregation",
    "angular_distance",
    "angular_triplet",
    "attention_distance",
    "attention_map",
    "boosted_cross_entropy",
    "check_aggregation",
    "check_attention",
    "check_weight_term",
    "class_activation_features",
    "class_activation_terms",
    "critic_loss",
    "cross_entropy",
    "dlr",
    "doubted_divergence",
    "features_of",
    "hinge_adversarial_loss",
    "hinge_critic_loss",
    "kl_divergence",
    "margin",
    "mean_square",
    "mixed_cross_entropy",
    "open_set_defense_terms",
    "peer_terms",
    "reconstruction_error",
    "released_maps",
    "runner_up_penalty",
    "smoothing_over_others",
    "soft_weights",
    "squared_distance",
    "targeted_dlr",
    "winning_weights",
]
