import copy
import json
import os
from pathlib import Path

import pytest
from google.protobuf import text_format

from kerasdefense import InputError, export
from kerasdefense.export.bundle import MAX_BATCH
from kerasdefense.integrity import CONFIGS

model_server_config_pb2 = pytest.importorskip("tensorflow_serving.config.model_server_config_pb2")
MODELS = Path(__file__).parents[2] / "saved_models"
SERVED = {"models.config", "batching.config", "monitoring.config", "docker-compose.yml", "card.json", "MODEL_CARD.md"}


def card_of(name, **figures):
    """Return the card of a published model, some of its figures replaced."""
    card = json.loads((MODELS / name / "1/card.json").read_text())
    return {**card, "figures": {**copy.deepcopy(card["figures"]), **figures}}


@pytest.fixture
def folder(tmp_path):
    """Return a model's folder with what stands for two versions."""
    folder = tmp_path / "my model"
    for number in ("2", "10"):
        (folder / number).mkdir(parents=True)
        card = {**card_of("pgd_at_cifar10_mini"), "seed": int(number)}
        (folder / number / "card.json").write_text(json.dumps(card))
    return folder


def served(folder):
    text = (folder / "models.config").read_text()
    (model,) = text_format.Parse(text, model_server_config_pb2.ModelServerConfig()).model_config_list.config
    return model


def test_server_configuration_names_the_newest_version_stable(folder):
    export.write_bundle(folder)
    model = served(folder)
    assert (model.name, model.base_path, model.model_platform) == ("my_model", "/models/my_model", "tensorflow")
    assert dict(model.version_labels) == {"stable": 10, "previous": 2}
    assert model.model_version_policy.latest.num_versions == len(model.version_labels)
    os.rename(folder / "2", folder / "old")
    export.write_bundle(folder)
    assert dict(served(folder).version_labels) == {"stable": 10}


def test_bundle_is_what_the_stock_image_is_started_with(folder):
    export.write_bundle(folder)
    assert {path.name for path in folder.iterdir() if path.is_file()} == SERVED
    compose = (folder / "docker-compose.yml").read_text()
    for name in ("models.config", "batching.config", "monitoring.config"):
        assert f"=/models/my_model/{name}\n" in compose
    assert ".:/models/my_model:ro" in compose and "tensorflow/serving:2.15.1" in compose
    assert '"8500:8500"' in compose and '"8501:8501"' in compose
    assert f"max_batch_size {{ value: {MAX_BATCH} }}" in (folder / "batching.config").read_text()


def test_card_of_the_folder_is_the_newest_with_digests_of_files_beside(folder):
    (folder / "model.keras").write_bytes(b"model")
    export.write_bundle(folder)
    card = json.loads((folder / "card.json").read_text())
    export.check_card(card)
    assert card["seed"] == 10 and list(card.pop("beside")) == sorted(["model.keras", *CONFIGS])
    assert card == json.loads((folder / "10/card.json").read_text())


def test_folder_without_a_version_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no version to serve"):
        export.write_bundle(tmp_path)
    assert not os.listdir(tmp_path)


def test_model_is_called_as_its_folder_or_its_run(tmp_path):
    assert export.model_name(tmp_path / "models/cifar10.v1") == "cifar10.v1"
    assert export.model_name(tmp_path / "runs/digits/pgd_at/saved_model") == "pgd_at"


@pytest.mark.parametrize("name", sorted(path.name for path in MODELS.iterdir() if path.is_dir()))
def test_model_card_of_every_published_model_tells_its_figures(name):
    card = card_of(name)
    text = export.model_card(card, version="3")
    for words, key in (("Clean accuracy", "clean_accuracy"), ("Robust accuracy", "robust_accuracy")):
        figure = card["figures"][key]
        low, high = (100 * bound for bound in figure["ci95"])
        interval = f"(n = {figure['n']}, 95 % interval {low:.2f} to {high:.2f} %)"
        assert f"| {words} | {100 * figure['value']:.2f} % {interval} |" in text
    assert all(line in text for line in [card["figures"]["note"], card["defense"]["deviations"], *card["about"]])
    assert ("is not to be trusted" in text) == (card["figures"].get("trusted") is False)
    assert f"| 3/saved_model.pb | `{card['files']['saved_model.pb']}` |" in text
    assert "None" not in text and "Undefined" not in text and "\n\n\n" not in text


def test_model_card_says_what_was_not_measured():
    card = card_of("pgd_at_cifar10_mini")
    unmeasured = export.model_card({**card, "figures": None}, version="1")
    assert "Nothing was measured: accuracy" in unmeasured and "| Clean accuracy" not in unmeasured
    assert "images of classes that it was not trained on is not known" in export.model_card(card, version="1")
    bound = export.model_card(card_of("pgd_at_cifar10_mini", complete=False, sanity={}), version="1")
    assert "Robust accuracy, an upper bound: the evaluation was stopped |" in bound
    assert "The sanity battery was not run" in bound


def test_model_card_names_sanity_items_that_failed_or_were_not_run():
    flags = {"S2": "fail", "S13": "fail", "S1": "pass", "S9": "not_run"}
    text = export.model_card(card_of("pgd_at_cifar10_mini", sanity=flags, trusted=False), version="1")
    assert "1 of 4 items pass. Failed: S2, S13. Not run: S9." in text and "**The result is not to be trusted" in text


def test_model_card_tells_detector_threshold_and_unknown_images():
    text = export.model_card(card_of("dfa_cifar10_mini"), version="1")
    assert "detector `subspace` is above 0.747" in text and "95.00 % of 2000 clean validation images" in text
    assert "| subspace | cifar100 | 10000 | 74.18 % | 73.50 to 74.86 % | 95.65 % | 85.26 % |" in text
    assert "| subspace, known and unknown attacked | tinyimagenet_resize | 100 | 0.00 % |" in text


def test_model_card_tells_attacks_that_met_nothing():
    text = export.model_card(card_of("dfa_cifar10_mini"), version="1")
    assert "| apgd_ce_x10 | exact | none: nothing was left | | |" in text
    assert "| apgd_ce | exact | 815 | 0.00 % | 0.00 to 0.38 % |" in text
