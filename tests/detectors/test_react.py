from __future__ import annotations

import numpy as np
import pytest
import scipy.special

from kerasdefense.detectors import Energy, ReAct
from kerasdefense.types import UsageError


@pytest.mark.parametrize("percentile", [50.0, 90.0])
def test_react_matches_numpy(blobs, percentile):
    detector = ReAct(percentile).fit(blobs.activations, blobs.label, blobs.head)
    threshold = np.quantile(blobs.embedding.ravel(), percentile / 100)
    assert detector.recorded() == {"percentile": percentile, "threshold": pytest.approx(threshold, rel=1e-6)}
    logits = np.minimum(np.float64(blobs.embedding), threshold) @ np.float64(blobs.kernel) + blobs.bias
    score = detector.score(blobs.activations)
    np.testing.assert_allclose(score, -scipy.special.logsumexp(logits, axis=1), rtol=1e-4, atol=1e-4)
    assert np.abs(score - Energy().score(blobs.activations)).max() > 1


def test_react_clips_nothing_of_the_training_data_at_percentile_100(blobs):
    detector = ReAct(100).fit(blobs.activations, blobs.label, blobs.head)
    energy = Energy().score(blobs.activations)
    np.testing.assert_allclose(detector.score(blobs.activations), energy, rtol=1e-5, atol=1e-4)


def test_react_stand_in_is_the_energy_of_the_whole_embedding(blobs):
    detector = ReAct(50).fit(blobs.activations, blobs.label, blobs.head)
    energy = Energy().score(blobs.activations)
    np.testing.assert_allclose(detector.stand_ins()["unclipped"](blobs.activations), energy, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("percentile", [0, 100.5, -3])
def test_react_percentile_is_checked(percentile):
    with pytest.raises(UsageError, match=f"percentile of react must be above 0 and at most 100, not {percentile}"):
        ReAct(percentile)
