"""Pushing: whole versions under rising numbers, once each, or nothing."""

from __future__ import annotations

import json

import pytest

from pipelines.components import pusher


@pytest.fixture
def described(monkeypatch):
    """Folders that what serves a model was written to."""
    folders = []
    monkeypatch.setattr(pusher.export, "write_bundle", folders.append)
    return folders


def model(folder, content):
    folder.mkdir()
    (folder / "saved_model.pb").write_text(content)
    (folder / "card.json").write_text(json.dumps({"files": {"saved_model.pb": content}}))
    return folder


def test_model_is_pushed_once_and_another_above_it(tmp_path, described, monkeypatch):
    monkeypatch.setattr(pusher.time, "time", lambda: 100.5)
    one, other = model(tmp_path / "one", "1"), model(tmp_path / "other", "2")
    names = [pusher.push(each, tmp_path / "pushed", str(tmp_path)).name for each in (one, one, other, one)]
    assert names == ["100", "100", "101", "102"]
    assert sorted(path.name for path in (tmp_path / "pushed").iterdir()) == ["100", "101", "102"]
    assert (tmp_path / "pushed/102/saved_model.pb").read_text() == "1" and len(described) == 4


def test_version_that_cannot_be_described_is_taken_back(tmp_path, monkeypatch):
    def fail(_):
        raise OSError("no space left")

    one = model(tmp_path / "one", "1")
    monkeypatch.setattr(pusher.export, "write_bundle", fail)
    with pytest.raises(OSError, match="no space left"):
        pusher.push(one, tmp_path / "pushed", str(tmp_path))
    assert list((tmp_path / "pushed").iterdir()) == []


def test_version_that_cannot_be_copied_leaves_nothing(tmp_path, described):
    with pytest.raises(FileNotFoundError):
        pusher.push(tmp_path / "nothing", tmp_path / "pushed", str(tmp_path))
    assert list((tmp_path / "pushed").iterdir()) == [] and not described


def test_classifier_of_a_version_takes_the_place_of_the_one_before(tmp_path, described):
    for name in ("one", "other"):
        (tmp_path / f"of_{name}").mkdir()
    (tmp_path / "of_one/classifier.keras").write_text("plain")
    pusher.push(model(tmp_path / "one", "1"), tmp_path / "pushed", f"{tmp_path}/of_one")
    assert (tmp_path / "pushed/classifier.keras").read_text() == "plain"
    pusher.push(model(tmp_path / "other", "2"), tmp_path / "pushed", f"{tmp_path}/of_other")
    assert not (tmp_path / "pushed/classifier.keras").exists()
