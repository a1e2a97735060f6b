"""The command line: a whole run, its parts, and one clear line for whatever is wrong."""

import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from kerasdefense import boundary, evaluation, flags, run, training
from kerasdefense.files import replacing

ROOT = Path(__file__).parents[1]
TINY = [
    "--backbone_name=small_cnn",
    "--backbone_width=4",
    "--attack_epsilon=0.1",
    "--attack_steps=1",
    "--defense_name=pgd_at",
    "--train_epochs=1",
    "--train_validation_steps=1",
    "--train_strategy=none",
    "--evaluate_suite=quick",
    "--evaluate_examples=32",
    "--evaluate_sanity_examples=0",
    "--noprogress",
]


def tiny(run_dir, *more):
    return [*TINY, f"--run_dir={run_dir}", *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "tiny"
    assert run.main(tiny(run_dir)) == 0
    return run_dir


def test_run_writes_its_directory(finished):
    for name in (
        flags.CONFIG,
        training.MODEL,
        training.HISTORY,
        run.RESULTS,
        run.ADVERSARIAL,
        "saved_model/1/card.json",
    ):
        assert (finished / name).is_file(), name
    for name in ("checkpoints", "tensorboard"):
        assert any((finished / name).iterdir()), name
    assert not list(finished.rglob(".writing-*"))


def test_results_hold_what_was_measured(finished):
    results = json.loads((finished / run.RESULTS).read_text())
    evaluation.check_results(results)
    assert results["robust_accuracy"]["n"] == results["clean_accuracy"]["n"] == 32
    assert results["robust_accuracy"]["value"] == results["attacks"][-1]["cascaded_accuracy"]
    assert [each["name"] for each in results["attacks"]] == ["fgsm", "pgd20"]
    assert results["config"]["attack"]["epsilon"] == 0.1


def test_printed_lines_load_the_result(finished, capsys):
    assert run.main(tiny(finished, "--mode=export", "--export_version=7")) == 0
    keras_line, saved_model_line, _ = capsys.readouterr().out.splitlines()
    names = {}
    exec(keras_line.removeprefix("Keras").strip(), names)
    exec(saved_model_line.removeprefix("SavedModel").strip(), names)
    image = np.random.default_rng(0).uniform(size=(3, 8, 8, 1)).astype(np.float32)
    served = names["serve"](image=tf.constant(image))
    np.testing.assert_allclose(served["logits"], names["model"](image), atol=1e-5)


def test_written_config_reproduces_run(finished, tmp_path):
    assert run.main([f"--flagfile={finished / flags.CONFIG}", f"--run_dir={tmp_path}", "--mode=train"]) == 0
    models = [keras.models.load_model(folder / training.MODEL) for folder in (finished, tmp_path)]
    for one, two in zip(*(model.get_weights() for model in models)):
        np.testing.assert_array_equal(one, two)


def test_model_without_optimizer_answers_alike(tmp_path):
    assert run.main(tiny(tmp_path, "--mode=train", "--noexport_optimizer")) == 0
    assert run.main(tiny(tmp_path / "with", "--mode=train")) == 0
    models = [keras.models.load_model(folder / training.MODEL) for folder in (tmp_path, tmp_path / "with")]
    assert models[0].optimizer is None and models[1].optimizer is not None
    assert (tmp_path / training.MODEL).stat().st_size < (tmp_path / "with" / training.MODEL).stat().st_size
    for one, two in zip(*(model.backbone.get_weights() for model in models)):
        np.testing.assert_array_equal(one, two)


def test_training_again_removes_old_figures(tmp_path):
    assert run.main(tiny(tmp_path)) == 0
    assert (tmp_path / run.RESULTS).is_file()
    assert run.main(tiny(tmp_path, "--mode=train")) == 0  # trained already: nothing is lost
    assert (tmp_path / run.RESULTS).is_file()
    assert run.main(tiny(tmp_path, "--mode=train", "--train_resume=never")) == 0
    assert not (tmp_path / run.RESULTS).exists() and not (tmp_path / run.ADVERSARIAL).exists()


def test_modes_do_one_part_each(finished, tmp_path, capsys):
    before = (finished / training.MODEL).read_bytes()
    assert run.main(tiny(finished, "--mode=evaluate", "--evaluate_examples=16")) == 0
    assert (finished / training.MODEL).read_bytes() == before
    assert json.loads((finished / run.RESULTS).read_text())["clean_accuracy"]["n"] == 16
    assert "robust: worst of all" in capsys.readouterr().out
    assert run.main(tiny(tmp_path / "none", "--mode=evaluate")) == 2
    assert "train first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--train_epoch=3"], 2, "did you mean --train_epochs?"),
        (
            ["--defense_name=magic"],
            2,
            "unknown defense 'magic'; valid: agkd_bml, atop, cafd, dfa, dfa_at, fgsm_rs, mart, mixup, osdn_caml, "
            "pgd_at, standard, trades",
        ),
        (["--defense_name=nope", "--export_diagnostics"], 2, "unknown defense 'nope'; valid:"),
        (["--defense_name=standard", "--export_diagnostics"], 2, "or purify images; standard does not"),
        (["--defense_name=atop", "--evaluate_internals=4"], 2, "--evaluate_internals needs a model that draws nothing"),
        (["--defense_name=atop", "--evaluate_oblivious=4"], 2, "draws nothing at random, but atop does"),
        (["--defense_name=atop", "--detector_name=max_logit"], 2, "--detector_name, --evaluate_open_set or"),
        (["--backbone_name=vgg"], 2, "unknown backbone 'vgg'; valid:"),
        (["--defense_name=fgsm_rs", "--attack_steps=7"], 2, "fgsm_rs takes one step"),
        (["--defense_name=pgd_at", "--attack_name=cleverhans_pgd"], 2, "cannot craft training images"),
        (["--defense_name=standard", "--defense_preset=released"], 2, "is no preset of standard; it has: recommended"),
        (["--defense_name=dfa"], 2, "absolute cosines are the logits; pass --backbone_head=orthogonal"),
        (
            ["--backbone_name=small_cnn", "--backbone_width=2", "--backbone_head=orthogonal"],
            2,
            "an axis for each of 10 classes, but the embedding has only 8 dimensions; use a wider backbone",
        ),
        (["--defense_name=mixup", "--defense_mix_alpha=0"], 2, "mix_alpha"),
        (["--defense_name=mixup", "--defense_noise_std=0"], 2, "it is one of: dfa, dfa_at"),
        (["--defense_agg_stop=both"], 2, "--defense_agg_stop=both"),
        (["--attack_epsilon=-1"], 2, "--attack_epsilon=-1"),
        (["--train_epochs=0"], 2, "--train_epochs=0"),
        (["--train_momentum=2"], 2, "--train_momentum=2"),
        (["--evaluate_chunk_size=0"], 2, "--evaluate_chunk_size=0"),
        (["--train_seed=3000000000"], 2, "--train_seed=3000000000"),
        (["--attack_name=fgsm_rs", "--noattack_random_start"], 2, "defined by its random start"),
        (["--attack_objective=kl_divergence", "--noattack_random_start"], 2, "its gradient is zero"),
        (["--backbone_logits_layer=logits"], 2, "need --backbone_path"),
        (["--backbone_path=nowhere.keras"], 1, "no such file"),
        (["--verbosity=--1"], 2, "--verbosity=--1"),
        (["--data_name=folder"], 2, "--data_dir"),
        (["--data_name=folder", "--data_dir=nowhere"], 1, "nowhere"),
        (["--train_batch_size=100000"], 2, "training images"),
        (["--flagfile=missing.cfg"], 2, "cannot read flag file"),
        (["--mode=fly"], 2, "fly"),
        (["stray"], 2, "unexpected argument 'stray'"),
    ],
)
def test_wrong_usage_is_one_line(arguments, code, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run.main(["--noprogress", "--train_strategy=none", *arguments]) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error, error
    assert not list(tmp_path.rglob("model.keras"))


def test_verbosity_shows_the_traceback(capsys):
    assert run.main(["--verbosity=1", "--defense_name=magic"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_check_in_a_training_step_is_told_in_one_line(capsys):
    @tf.function
    def step(image):
        tf.debugging.Assert(tf.reduce_all(image > 0), ["the embedding of a training image is zero"])
        return image

    assert boundary.guarded(lambda: step(tf.zeros([2]))) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "the embedding of a training image is zero" in error


def test_model_of_other_data_is_refused(finished, tmp_path, capsys):
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for number in range(10):
            grey = np.full((8, 8, 1), 20 * number, np.uint8)
            (tmp_path / label / f"{number}.png").write_bytes(tf.io.encode_png(grey).numpy())
    arguments = ["--mode=evaluate", "--data_name=folder", f"--data_dir={tmp_path}"]
    assert run.main(tiny(finished, *arguments)) == 1
    assert "of 10 classes, but" in capsys.readouterr().err


def test_export_describes_the_model_that_is_there(finished, tmp_path, capsys):
    assert run.main([f"--run_dir={finished}", "--mode=export", "--export_version=9", "--noprogress"]) == 0
    card = json.loads((finished / "saved_model/9/card.json").read_text())
    assert (card["defense"]["name"], card["threat_model"]["epsilon"]) == ("pgd_at", 0.1)
    assert run.main(tiny(finished, "--mode=export", "--defense_name=standard")) == 1
    assert "holds a PGDAT" in capsys.readouterr().err
    assert run.main(tiny(finished, "--mode=evaluate", "--attack_epsilon=0.2")) == 1
    assert "--evaluate_epsilon" in capsys.readouterr().err


def test_own_model_of_any_size_goes_all_the_way(tmp_path):
    image = keras.Input([None, None, 1])
    pooled = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3, activation="relu")(image))
    keras.Model(image, keras.layers.Dense(10, activation="softmax")(pooled)).save(tmp_path / "my.keras")
    assert run.main(tiny(tmp_path / "run", f"--backbone_path={tmp_path / 'my.keras'}")) == 0
    assert (tmp_path / "run/saved_model/1/card.json").is_file()


def test_damaged_model_is_refused(tmp_path, capsys):
    (tmp_path / training.MODEL).write_bytes(b"no model")
    assert run.main(tiny(tmp_path, "--mode=export")) == 1
    assert "is not a model that Keras can load" in capsys.readouterr().err


def test_full_disk_leaves_old_model_whole(finished, monkeypatch, capsys):
    before = (finished / training.MODEL).read_bytes()

    def fill(self, path, *args, **kwargs):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(keras.Model, "save", fill)
    assert run.main(tiny(finished, "--mode=train", "--train_resume=never")) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert (finished / training.MODEL).read_bytes() == before
    assert not list(finished.rglob(".writing-*"))


def test_replacing_keeps_nothing_of_a_failure(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), replacing(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "kerasdefense.run", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_command_line_help():
    done = command("--help")
    assert done.returncode == 0 and "--defense_name=standard" in done.stdout and not done.stderr


def test_command_line_error():
    done = command("--train_epoch=1")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: unknown flag --train_epoch")


def test_published_model_is_complete_and_compared(finished, tmp_path, capsys):
    published = tmp_path / "saved_models" / "tiny"
    assert run.main(tiny(finished, "--mode=evaluate")) == 0
    assert run.main(tiny(finished, "--mode=export", f"--export_dir={published}")) == 0
    files = {"1", "card.json", "MODEL_CARD.md", "model.keras", "classifier.keras", "outcomes.npz"}
    served_by = {"models.config", "batching.config", "monitoring.config", "docker-compose.yml"}
    assert {path.name for path in published.iterdir()} == files | served_by
    assert keras.models.load_model(published / "model.keras").optimizer is None
    assert "image_adv" not in np.load(published / "outcomes.npz").files
    assert run.main(["--mode=verify", str(published)]) == 0
    folder = tmp_path / "comparison"
    assert run.main(["--mode=compare", str(finished), str(published), f"--run_dir={folder}"]) == 0
    assert "Δ worst" in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {"comparison.csv", "comparison.md"}
    assert run.main(["--mode=compare", str(finished)]) == 2
    assert "--mode=compare RUN RUN" in capsys.readouterr().err


def test_model_that_was_not_evaluated_is_not_published(tmp_path, capsys):
    assert run.main(tiny(tmp_path / "run", "--mode=train")) == 0
    assert run.main(tiny(tmp_path / "run", "--mode=export", f"--export_dir={tmp_path / 'published'}")) == 1
    assert "results.json; evaluate it first with --mode=evaluate" in capsys.readouterr().err
    assert not (tmp_path / "published").exists()


def test_configuration_that_was_not_written_before_a_kill_is_written(tmp_path):
    assert run.main(tiny(tmp_path, "--mode=train")) == 0
    written = (tmp_path / flags.CONFIG).read_text()
    (tmp_path / flags.CONFIG).unlink()
    (tmp_path / training.HISTORY).unlink()  # which is written last
    assert run.main(tiny(tmp_path, "--mode=train")) == 0
    assert (tmp_path / flags.CONFIG).read_text() == written


def test_card_names_no_folder_of_this_machine(finished, tmp_path):
    assert run.main(tiny(finished, "--mode=evaluate")) == 0
    published = tmp_path / "published"
    assert run.main(tiny(finished, "--mode=export", f"--export_dir={published}", f"--data_dir={tmp_path}")) == 0
    for card in published.rglob("card.json"):
        assert not re.search(r'"/\w', card.read_text())


def test_model_of_several_workers_is_evaluated_on_one(finished, monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    assert run.main(tiny(finished, "--mode=evaluate", "--train_strategy=multi_worker")) == 0
