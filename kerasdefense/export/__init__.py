"""Export: a defense as a versioned SavedModel that needs no Python of ours, with its card and what serves it."""

from kerasdefense.export.bundle import model_card, model_name, write_bundle
from kerasdefense.export.card import card, check_card
from kerasdefense.export.publish import publish_figures, published
from kerasdefense.export.saved_model import save
from kerasdefense.export.signatures import SIGNATURES, serving_module

__all__ = [
    "SIGNATURES",
    "card",
    "check_card",
    "model_card",
    "model_name",
    "publish_figures",
    "published",
    "save",
    "serving_module",
    "write_bundle",
]
