import json
import shutil
from pathlib import Path

import pytest

import kerasdefense
from kerasdefense import InputError, evaluation, integrity, run

MODEL = Path(__file__).parents[1] / "saved_models/standard_resnet8_cifar10_mini"


@pytest.fixture
def published(tmp_path):
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def changed(path):
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("load", [evaluation.load_model, kerasdefense.load_model])
def test_changed_model_is_refused(published, load):
    load(published)
    changed(published / "model.keras")
    for path in (published, published / "model.keras"):
        with pytest.raises(InputError, match=r"model\.keras was changed: .* card\.json was written of") as raised:
            load(path)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("saved_model.pb", changed, "was changed"),
        ("assets/labels.txt", changed, "was changed"),
        ("variables/variables.index", Path.unlink, "is missing"),
        ("assets.extra/more", lambda path: path.write_text("more"), "is not in the card"),
    ],
)
def test_changed_version_is_refused(published, name, change, why):
    change(published / "1" / name)
    with pytest.raises(InputError, match=f"{name} {why}"):
        evaluation.load_model(published / "1")


def test_model_that_the_card_does_not_have_is_refused(published):
    card = json.loads((published / "card.json").read_text())
    del card["beside"]["model.keras"]
    (published / "card.json").write_text(json.dumps(card))
    with pytest.raises(InputError, match=r"model\.keras is not in the card"):
        evaluation.load_model(published)


@pytest.mark.parametrize("name", ["model.keras", "classifier.keras", "outcomes.npz", "1/variables/variables.index"])
def test_verify_tells_which_file_was_changed(published, name, capsys):
    changed(published / name)
    if name == "outcomes.npz":  # which is read as well
        shutil.copy(MODEL.parent / "pgd_at_cifar10_mini" / name, published / name)
    assert run.main(["--mode=verify", str(published)]) in (1, 3)
    out, err = capsys.readouterr()
    assert f"{name}: DIFFERS" in out or "outcomes" in err


def test_what_no_card_goes_with_is_not_looked_at(published):
    (published / "1/card.json").unlink()
    evaluation.load_model(published / "1")
    (published / "1/card.json").write_text('{"name": "of another kind"}')
    integrity.check(published / "1")
    (published / "1/card.json").write_text("{")
    with pytest.raises(InputError, match="holds no JSON"):
        integrity.check(published / "1")
