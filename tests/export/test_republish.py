import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from kerasdefense import InputError, export, run

MODELS = Path(__file__).parents[2] / "saved_models"


def test_published_model_is_exported_anew_with_its_detector_and_figures(tmp_path, capsys):
    folder = Path(shutil.copytree(MODELS / "dfa_cifar10_mini", tmp_path / "dfa"))
    before = json.loads((folder / "card.json").read_text())
    assert run.main(["--mode=export", f"--export_published={folder}"]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "2")
    card = json.loads((folder / "card.json").read_text())
    changed = ("files", "beside")
    assert all(card[key] == before[key] for key in before if key not in changed)
    assert card["beside"]["model.keras"] == before["beside"]["model.keras"] == card["figures"]["model_digest"]
    assert 'key: "stable" value: 2' in (folder / "models.config").read_text()
    image = tf.random.stateless_uniform([20, 32, 32, 3], [1, 2])
    old, new = (tf.saved_model.load(str(folder / name)).signatures["serving_default"](image=image) for name in "12")
    np.testing.assert_allclose(new["anomaly_score"], old["anomaly_score"], atol=1e-5)
    np.testing.assert_array_equal(new["accepted"], old["accepted"])
    assert run.main(["--mode=verify", str(folder)]) == 0


def test_what_is_not_published_or_was_changed_is_not_exported_anew(tmp_path):
    with pytest.raises(InputError, match="is no published folder"):
        export.republish(tmp_path, tmp_path / "new")
    folder = Path(shutil.copytree(MODELS / "standard_resnet8_cifar10_mini", tmp_path / "model"))
    (folder / "1/assets/labels.txt").write_text("cat\n")
    with pytest.raises(InputError, match=r"assets/labels\.txt was changed"):
        export.republish(folder, tmp_path / "new")
    (folder / "model.keras").write_bytes((folder / "classifier.keras").read_bytes())
    with pytest.raises(InputError, match=r"model\.keras was changed"):
        export.republish(folder, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_exporting_anew_goes_with_its_mode_alone(capsys):
    assert run.main(["--mode=train", "--export_published=saved_models/standard_cifar10_mini"]) == 2
    assert "--export_published goes with --mode=export" in capsys.readouterr().err
