from __future__ import annotations

import numpy as np
import pytest

from kerasdefense import files
from kerasdefense.evaluation.outcomes import collect, from_levels, to_levels, write_outcomes


def make_block(first, count):
    random = np.random.default_rng(first)
    clean = random.uniform(size=count) < 0.8
    return {
        "index": np.arange(first, first + count),
        "label": np.full(count, first),
        "clean": clean,
        "survived": (random.uniform(size=[count, 2]) < 0.6) & clean[:, None],
        "rounded": clean,
        "met": np.array([count, 1]),
        "unconfirmed": np.array([0, first]),
        "seconds": np.array([0.5, 0.25]),
        "image_adv": random.uniform(size=[count, 4, 4, 2]).astype(np.float32),
    }


BLOCKS = [make_block(0, 3), make_block(3, 1), make_block(4, 5)]


def write(path):
    write_outcomes(path, ["first", "second"], collect(BLOCKS), (block["image_adv"] for block in BLOCKS))


def test_outcomes_of_blocks_are_joined_in_order_and_counts_are_added():
    outcomes = collect(iter(BLOCKS))
    np.testing.assert_array_equal(outcomes.index, np.arange(9))
    survived = np.concatenate([block["survived"] for block in BLOCKS])
    np.testing.assert_array_equal(outcomes.robust, outcomes.clean & survived[:, 0] & survived[:, 1])
    assert outcomes.met.tolist() == [9, 3] and outcomes.unconfirmed.tolist() == [0, 7]
    assert outcomes.seconds.tolist() == [1.5, 0.75]


def test_written_file_gives_back_outcomes_and_images_in_two_precisions(tmp_path):
    path = tmp_path / "folder" / "a.npz"
    write(path)
    image = np.concatenate([block["image_adv"] for block in BLOCKS])
    with np.load(path, allow_pickle=False) as saved:
        kept = {"index", "label", "clean", "survived", "rounded", "attacks"}
        assert set(saved) == kept | {"image_adv", "image_adv_uint8"}
        np.testing.assert_array_equal(saved["image_adv"], image)
        np.testing.assert_array_equal(saved["image_adv_uint8"], np.rint(255 * image))
        assert saved["image_adv"].dtype == np.float32 and saved["image_adv_uint8"].dtype == np.uint8
        np.testing.assert_array_equal(saved["label"], [0, 0, 0, 3, 4, 4, 4, 4, 4])
        assert list(saved["attacks"]) == ["first", "second"]
    assert list(path.parent.iterdir()) == [path]


def test_levels_are_the_nearest_and_keep_what_is_one_already():
    image = np.float32([[0, 0.5 / 255, 0.51 / 255, 1.49 / 255, 1]])
    np.testing.assert_array_equal(to_levels(image), [[0, 0, 1, 1, 255]])
    every = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_levels(from_levels(every)), every)


def test_nothing_is_left_behind_when_the_disk_is_full(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "a.npz")
    assert not list(tmp_path.iterdir())


def test_writer_uses_the_atomic_replacement_of_files(tmp_path):
    with files.replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
        assert not (tmp_path / "a.txt").exists()
    assert (tmp_path / "a.txt").read_text() == "new"
