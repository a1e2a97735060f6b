"""Export: a defense as a versioned SavedModel that needs no Python of ours, with its card."""

from kerasdefense.export.card import card, check_card
from kerasdefense.export.publish import publish, publish_figures
from kerasdefense.export.saved_model import save
from kerasdefense.export.signatures import SIGNATURES, serving_module

__all__ = ["SIGNATURES", "card", "check_card", "publish", "publish_figures", "save", "serving_module"]
