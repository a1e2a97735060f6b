from __future__ import annotations

import numpy as np
import pytest

from kerasdefense import files
from kerasdefense.evaluation.outcomes import OutcomeWriter


def add(writer, first, count):
    random = np.random.default_rng(first)
    image = random.uniform(size=[count, 4, 4, 2]).astype(np.float32)
    clean = random.uniform(size=count) < 0.8
    survived = (random.uniform(size=[count, 2]) < 0.6) & clean[:, None]
    writer.add(np.arange(first, first + count), np.full(count, first), image, clean=clean, survived=survived)
    return image, clean, survived


def test_writer_gives_back_in_order_what_was_added(tmp_path):
    path = tmp_path / "folder" / "a.npz"
    with OutcomeWriter(["first", "second"], path) as writer:
        parts = [add(writer, 0, 3), add(writer, 3, 1), add(writer, 4, 5)]
        assert not path.exists()
    image, clean, survived = (np.concatenate(each) for each in zip(*parts))
    np.testing.assert_array_equal(writer.clean, clean)
    np.testing.assert_array_equal(writer.survived, survived)
    np.testing.assert_array_equal(writer.robust, clean & survived[:, 0] & survived[:, 1])
    assert writer.examples == 9
    with np.load(path, allow_pickle=False) as saved:
        assert set(saved) == {"index", "label", "clean", "survived", "attacks", "image_adv"}
        np.testing.assert_array_equal(saved["image_adv"], image)
        np.testing.assert_array_equal(saved["index"], np.arange(9))
        np.testing.assert_array_equal(saved["label"], [0, 0, 0, 3, 4, 4, 4, 4, 4])
        np.testing.assert_array_equal(saved["survived"], survived)
        assert saved["image_adv"].dtype == np.float32 and list(saved["attacks"]) == ["first", "second"]
    assert list(path.parent.iterdir()) == [path]


def test_writer_without_a_file_collects_all_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with OutcomeWriter(["first", "second"]) as writer:
        add(writer, 0, 4)
    assert writer.examples == 4 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_writer_leaves_nothing_behind_after_a_failure(error, tmp_path):
    with pytest.raises(error), OutcomeWriter(["first", "second"], tmp_path / "a.npz") as writer:
        add(writer, 0, 4)
        raise error
    assert not list(tmp_path.iterdir())


def test_writer_leaves_nothing_behind_when_the_disk_is_full(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", full)
    with (
        pytest.raises(OSError, match="No space left"),
        OutcomeWriter(["first", "second"], tmp_path / "a.npz") as writer,
    ):
        add(writer, 0, 4)
    assert not list(tmp_path.iterdir())


def test_writer_uses_the_atomic_replacement_of_files(tmp_path):
    with files.replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
        assert not (tmp_path / "a.txt").exists()
    assert (tmp_path / "a.txt").read_text() == "new"
