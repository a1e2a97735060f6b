"""Losses: pure functions of tensors, one value per example."""

from kerasdefense.losses.classification import cross_entropy, kl_divergence, margin

__all__ = ["cross_entropy", "kl_divergence", "margin"]
