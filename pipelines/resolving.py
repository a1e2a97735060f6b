"""Which model a candidate is held against."""

from __future__ import annotations

from typing import Optional

from ml_metadata import MetadataStore
from tfx import types
from tfx.components.evaluator import constants
from tfx.dsl.components.common.resolver import ResolverStrategy

CANDIDATE = "candidate"
_MODELS, _BLESSINGS = "model", "model_blessing"


class LatestOtherBlessedModel(ResolverStrategy):
    """Resolve the model that was blessed last and is not the candidate.

    A run with nothing changed then has the inputs of the one before, in which its model was blessed, and does nothing
    again. What counts of a model is the newest blessing that says of it yes or no. Inputs are the channels `model`,
    `model_blessing` and `candidate`.
    """

    def resolve_artifacts(
        self, store: MetadataStore, input_dict: dict[str, list[types.Artifact]]
    ) -> Optional[dict[str, list[types.Artifact]]]:
        """Return the model and its blessing in the channels they came in, none where there is no such model."""
        passed = {each.id for each in input_dict[CANDIDATE]}
        models = {each.id: each for each in input_dict[_MODELS] if each.id not in passed}
        newest: dict[int, types.Artifact] = {}
        for blessing in sorted(input_dict[_BLESSINGS], key=lambda each: each.id):
            newest[blessing.get_int_custom_property(constants.ARTIFACT_PROPERTY_CURRENT_MODEL_ID_KEY)] = blessing
        found = [
            (blessing.id, models[number], blessing)
            for number, blessing in newest.items()
            if number in models
            and blessing.get_int_custom_property(constants.ARTIFACT_PROPERTY_BLESSED_KEY) == constants.BLESSED_VALUE
        ]
        _, model, blessing = max(found, default=(0, None, None), key=lambda each: each[0])
        chosen = {_MODELS: [model], _BLESSINGS: [blessing]} if model is not None else {_MODELS: [], _BLESSINGS: []}
        return {**chosen, CANDIDATE: input_dict[CANDIDATE]}
