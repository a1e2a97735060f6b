"""Export: a defense as a versioned SavedModel that needs no Python of ours, with its card and what serves it."""

from kerasdefense.export.bundle import MODEL_CARD, model_card, write_bundle
from kerasdefense.export.card import card
from kerasdefense.export.keras_file import CLASSIFIER, classifier_file, load_model
from kerasdefense.export.publish import check_evaluated, publish_figures, published, with_figures
from kerasdefense.export.republish import republish
from kerasdefense.export.saved_model import OF_RUNS, model_name, save
from kerasdefense.export.signatures import SIGNATURES, serving_module
from kerasdefense.integrity import check_card

__all__ = [
    "CLASSIFIER",
    "MODEL_CARD",
    "OF_RUNS",
    "SIGNATURES",
    "card",
    "check_card",
    "check_evaluated",
    "classifier_file",
    "load_model",
    "model_card",
    "model_name",
    "publish_figures",
    "published",
    "republish",
    "save",
    "serving_module",
    "with_figures",
    "write_bundle",
]
