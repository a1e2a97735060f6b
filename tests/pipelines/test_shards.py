"""Shards: written once under a key, refused for other settings, damaged ones told in one line."""

from __future__ import annotations

import numpy as np
import pytest

from kerasdefense.types import InputError
from pipelines.shards import Shards


def test_first_outcome_under_a_key_stays(tmp_path):
    shards = Shards(f"{tmp_path}/shards/")
    shards.open({"seed": 0})
    shards.write(3, {"clean": np.array([True, False])})
    shards.write(3, {"clean": np.array([False, False])})
    assert shards.has(3) and not shards.has(0)
    np.testing.assert_array_equal(shards.read(3)["clean"], [True, False])
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == ["block-00003.npz", "settings.json"]


def test_shards_of_other_settings_are_refused_unless_begun_anew(tmp_path):
    shards = Shards(str(tmp_path / "shards"))
    shards.open({"seed": 0, "chunk_size": 2})
    shards.write(0, {"clean": np.array([True])})
    shards.open({"seed": 0, "chunk_size": 2})
    assert shards.has(0)
    with pytest.raises(InputError, match=r"an evaluation of another chunk size; .*--evaluate_resume=never"):
        shards.open({"seed": 0, "chunk_size": 4})
    shards.open({"seed": 0, "chunk_size": 4}, anew=True)
    assert not shards.has(0)


def test_damaged_shard_is_one_line(tmp_path):
    shards = Shards(str(tmp_path))
    shards.open({})
    (tmp_path / "block-00000.npz").write_bytes(b"half")
    with pytest.raises(InputError, match=r"block-00000.npz cannot be read") as caught:
        shards.read(0)
    assert "\n" not in str(caught.value)
