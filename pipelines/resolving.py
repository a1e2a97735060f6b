"""Which model a candidate is held against."""

from __future__ import annotations

from typing import Optional

from ml_metadata import MetadataStore
from tfx import types
from tfx.dsl.components.common.resolver import ResolverStrategy
from tfx.dsl.input_resolution.strategies.latest_blessed_model_strategy import LatestBlessedModelStrategy

CANDIDATE = "candidate"


class LatestOtherBlessedModel(ResolverStrategy):
    """Resolve the latest blessed model that is not the candidate.

    A run with nothing changed then has the inputs of the one before, in which its model was blessed, and does nothing
    again. Inputs are a model and a blessing channel, and the candidate under the key `candidate`.
    """

    def resolve_artifacts(
        self, store: MetadataStore, input_dict: dict[str, list[types.Artifact]]
    ) -> Optional[dict[str, list[types.Artifact]]]:
        """Return the model and its blessing in the channels they came in, none where there is no such model."""
        candidates = input_dict[CANDIDATE]
        known = {each.id for each in candidates}
        others = {
            key: [each for each in artifacts if each.id not in known]
            for key, artifacts in input_dict.items()
            if key != CANDIDATE
        }
        found = LatestBlessedModelStrategy().resolve_artifacts(store, others)
        return None if found is None else {**found, CANDIDATE: candidates}
