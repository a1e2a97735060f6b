import json
import shutil
from pathlib import Path

import pytest

import kerasdefense
from kerasdefense import InputError, evaluation, export, integrity, run

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


def test_file_of_a_version_is_checked_against_the_digests_of_that_version(tmp_path):
    version = Path(shutil.copytree(MODEL.parent / "cafd_cifar10_mini/1", tmp_path / "1"))
    denoiser = version / "denoiser.keras"
    assert kerasdefense.load_model(denoiser).output_shape[1:] == (32, 32, 3)
    shutil.copy(denoiser, version / "another.keras")
    with pytest.raises(InputError, match=r"another\.keras is not in the card"):
        integrity.check(version / "another.keras")
    changed(denoiser)
    with pytest.raises(InputError, match=r"denoiser\.keras was changed"):
        kerasdefense.load_model(denoiser)


@pytest.fixture
def bundled(published):
    """Return the published folder with all that an export writes beside the versions."""
    export.write_bundle(published)
    return published


def verified(folder, capsys):
    """Return the code that --mode=verify ends in, and the lines that tell what is not as it should be."""
    capsys.readouterr()
    code = run.main(["--mode=verify", str(folder)])
    out, err = capsys.readouterr()
    return code, [line.strip() for line in out.splitlines() if "DIFFERS" in line], err


@pytest.mark.parametrize(
    "name",
    [
        "model.keras",
        "classifier.keras",
        "1/variables/variables.index",
        "docker-compose.yml",
        "models.config",
        "batching.config",
        "monitoring.config",
        "MODEL_CARD.md",
    ],
)
def test_verify_tells_which_file_was_changed(bundled, name, capsys):
    assert verified(bundled, capsys)[:2] == (0, [])
    changed(bundled / name)
    code, lines, _ = verified(bundled, capsys)
    assert code == 3 and [line.split(":")[0] for line in lines if "that was evaluated" not in line] == [name]
    assert any("that was evaluated" in line for line in lines) == (name == "model.keras")


def test_verify_refuses_outcomes_of_another_model(bundled, capsys):
    shutil.copy(MODEL.parent / "pgd_at_cifar10_mini/outcomes.npz", bundled / "outcomes.npz")
    code, _, err = verified(bundled, capsys)
    assert code == 1 and "outcomes" in err


def edited(path, edit):
    """Change what a card says."""
    card = json.loads(path.read_text())
    edit(card)
    path.write_text(json.dumps(card))


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("1/card.json", lambda card: card["figures"]["robust_accuracy"].update(value=0.9)),
        ("card.json", lambda card: card["data"]["labels"].reverse()),
    ],
)
def test_verify_compares_the_cards_of_folder_and_newest_version(bundled, name, edit, capsys):
    edited(bundled / name, edit)
    code, lines, _ = verified(bundled, capsys)
    assert code == 3 and "card.json: DIFFERS from that of version 1" in lines


BROKEN_CARDS = {
    "null_for_files": lambda card: json.dumps({**card, "files": None}),
    "list_for_beside": lambda card: json.dumps({**card, "beside": ["a"]}),
    "list": lambda card: "[]",
    "cut": lambda card: json.dumps(card)[:-9],
    "of_another_kind": lambda card: '{"name": "of another kind"}',
}


@pytest.mark.parametrize("name", BROKEN_CARDS)
def test_broken_card_is_refused_by_every_route_in_one_line(published, name, capsys):
    whole = json.loads((published / "card.json").read_text())
    (published / "card.json").write_text(BROKEN_CARDS[name](whole))
    (published / "1/card.json").write_text(BROKEN_CARDS[name](whole))
    for load, path in ((evaluation.load_model, published / "1"), (kerasdefense.load_model, published)):
        with pytest.raises(InputError, match=r"card\.json (holds no JSON|does not follow its schema)") as raised:
            load(path)
        assert "\n" not in str(raised.value)
    code, _, err = verified(published, capsys)
    assert code == 1 and err.count("\n") == 1 and "card.json" in err


def test_what_no_card_goes_with_is_not_looked_at(published):
    (published / "1/card.json").unlink()
    changed(published / "1/assets/labels.txt")
    evaluation.load_model(published / "1")
