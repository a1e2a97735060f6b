"""Export: a defense as a versioned SavedModel that needs no Python of ours, with its card."""

from kerasdefense.export.card import card, check_card
from kerasdefense.export.publish import publish
from kerasdefense.export.saved_model import save
from kerasdefense.export.signatures import SIGNATURES, serving_module

__all__ = ["SIGNATURES", "card", "check_card", "publish", "save", "serving_module"]
