"""Losses: pure functions of tensors, one value per example."""

from kerasdefense.losses.classification import boosted_cross_entropy, cross_entropy, kl_divergence, margin

__all__ = ["boosted_cross_entropy", "cross_entropy", "kl_divergence", "margin"]
