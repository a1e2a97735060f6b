"""Attacking a served model from outside: the same outcomes as in process, within a budget, and said to be so."""

from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np
import pytest
import tensorflow as tf

from kerasdefense import assess, endpoint, evaluation, run
from kerasdefense.evaluation import ThreatModel
from kerasdefense.evaluation.robustness import Options
from kerasdefense.evaluation.suites import SUITES
from kerasdefense.serving import InvalidRequestError, NotFoundError, UnavailableError
from kerasdefense.types import InputError, UsageError

from .stub import serving

QUERIES, COUNT = 150, 8
THREAT_MODEL = ThreatModel("linf", 0.15)
TRANSFER = "transfer_mi_fgsm"
BLACKBOX = ["--mode=evaluate", "--evaluate_suite=blackbox", "--evaluate_examples=8", "--attack_epsilon=0.1"]
BLACKBOX += ["--evaluate_endpoint_queries=60", "--evaluate_sanity_examples=8", "--noprogress"]


class Attacked(NamedTuple):
    """What an evaluation found, by image and in all, and how many images an endpoint was sent meanwhile."""

    results: dict
    arrays: dict
    images: int = 0


@pytest.fixture(scope="module")
def folder(digits, tmp_path_factory):
    """Version 1 as the only one, and so the newest."""
    found = tmp_path_factory.mktemp("alone")
    (found / "1").symlink_to(digits.folder / "1")
    return found


@pytest.fixture(scope="module")
def alone(folder):
    with serving(folder) as server:
        yield server


def attacked(paths, digits, save, **more):
    """Attack the first images within QUERIES, each by every attack."""
    options = Options(examples=COUNT, chunk_size=8, seed=3)
    data = (digits.image[:COUNT], digits.label[:COUNT])
    settings = {"options": options, "queries": QUERIES, "sanity_examples": 8, "save": save, **more}
    plan = [each for each in SUITES["blackbox"].plan(*THREAT_MODEL, 10) if each.name == TRANSFER or not each.transfer]
    results = evaluation.evaluate(paths, data, THREAT_MODEL, plan, **settings)
    with np.load(save) as stored:
        return results, {name: stored[name] for name in stored.files}


def in_process(digits):
    return lambda image, seed: digits.module.serving_default(image)["logits"]


@pytest.fixture(scope="module")
def local(digits, tmp_path_factory):
    paths = {"exact": in_process(digits), "surrogate:copy": in_process(digits)}
    return Attacked(*attacked(paths, digits, tmp_path_factory.mktemp("local") / "found.npz"))


@pytest.fixture(scope="module")
def remote(digits, alone, tmp_path_factory):
    with endpoint.opened(alone.grpc) as model:
        paths = {**model.attack_paths, "surrogate:copy": in_process(digits)}
        found = attacked(paths, digits, tmp_path_factory.mktemp("remote") / "found.npz")
        return Attacked(*found, model.endpoint()["images"])


def assert_same_outcomes(found, expected):
    assert set(found.arrays) == set(expected.arrays)
    for name, each in expected.arrays.items():
        if name != "image_adv":
            np.testing.assert_array_equal(found.arrays[name], each)
    # Rounding may decide whether a square is kept.
    assert np.isclose(found.arrays["image_adv"], expected.arrays["image_adv"], atol=1e-5).mean() > 0.98


def own_accuracies(results):
    return {each["name"]: each["own_accuracy"]["value"] for each in results["attacks"]}


def test_outcomes_are_those_in_process(local, remote):
    assert_same_outcomes(remote, local)
    own, clean = own_accuracies(remote.results), remote.results["clean_accuracy"]["value"]
    assert own == own_accuracies(local.results)
    assert tuple(own) == ("noise", TRANSFER, "square", "hop_skip_jump")
    assert own["square"] < own["noise"] <= clean and own["hop_skip_jump"] < clean and own[TRANSFER] < clean


@pytest.mark.slow
def test_outcomes_are_those_in_process_over_rest(digits, local, alone, tmp_path):
    with endpoint.opened(alone.rest) as model:
        paths = {**model.attack_paths, "surrogate:copy": in_process(digits)}
        assert_same_outcomes(Attacked(*attacked(paths, digits, tmp_path / "found.npz")), local)


def test_each_attack_keeps_to_its_queries(remote):
    attacks = remote.results["attacks"]
    blind = [each for each in attacks if each["path"] == "exact"]
    most = sum(each["attacked"] for each in blind) * QUERIES
    scoring = (3 * len(attacks) + 3) * COUNT + 9 * COUNT + 8 + 8  # every find, and the first looks at clean images
    assert 0.2 * most < remote.images <= most + scoring
    settings = {each["name"]: each["settings"] for each in blind}
    assert settings["noise"]["draws"] == settings["square"]["queries"] + 1 == QUERIES
    assert settings["hop_skip_jump"]["queries"] == QUERIES
    assert remote.results["flags"]["queries"] == QUERIES
    assert remote.results["flags"]["skipped"] == ["spsa"]


def test_checks_that_need_gradients_are_said_not_to_have_run(remote):
    status = {each["id"]: (each["status"], each["detail"]) for each in remote.results["sanity"]}
    assert status["S11"] == ("pass", "")
    for name in ("S1", "S3", "S5", "S6", "S10"):
        assert status[name] == ("not_run", "the model gives no gradient")
    assert remote.results["curve"] == []


def test_command_line_attacks_an_endpoint_and_verifies_it_later(alone, tmp_path, capsys):
    address = f"--evaluate_endpoint={alone.grpc}/classifier"
    assert run.main([*BLACKBOX, address, f"--run_dir={tmp_path}", "--strict"]) == 3  # not checked enough to be trusted
    out = capsys.readouterr().out
    assert "sanity battery: 1 passed, 0 failed, not run: S1, S2," in out
    results = json.loads((tmp_path / assess.RESULTS).read_text())
    evaluation.check_results(results)
    assert results["endpoint"].pop("images") > 100
    assert results["endpoint"] == {"address": alone.grpc, "name": "classifier", "version": 1}
    assert results["model"]["name"] == "classifier" and "attack" not in results["config"]
    assert "only asked for answers, at most 60 by each attack" in results["note"]
    assert "only asked for answers" in (tmp_path / assess.REPORT).read_text()
    assert run.main(["--mode=verify", str(tmp_path)]) == 0
    assert "robust accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--evaluate_suite=autoattack"], 2, "an endpoint gives no gradient, which --evaluate_suite=autoattack needs"),
        (["--evaluate_internals=8"], 2, "--evaluate_internals needs the model itself"),
        (["--evaluate_model=model.keras"], 2, "--evaluate_model needs the model itself"),
        (["--evaluate_ood=cifar10"], 2, "--evaluate_ood needs the model itself"),
        (["--detector_name=max_logit"], 2, "--detector_name needs the model itself"),
        (["--mode=all"], 2, "--evaluate_endpoint goes with --mode=evaluate"),
        (["--evaluate_endpoint=localhost:8500"], 2, "an address is grpc://host:port"),
        (["--evaluate_endpoint_queries=3"], 2, "--evaluate_endpoint_queries"),
        (["--evaluate_endpoint={address}/other"], 1, "the server has no other"),
    ],
)
def test_what_does_not_go_with_an_endpoint_is_one_line(arguments, code, message, alone, tmp_path, capsys):
    given = [*BLACKBOX, f"--evaluate_endpoint={alone.grpc}", f"--run_dir={tmp_path}"]
    assert run.main([*given, *(each.format(address=alone.grpc) for each in arguments)]) == code
    line = capsys.readouterr().err.strip()
    assert message in line and len(line.splitlines()) == 1
    assert not (tmp_path / assess.RESULTS).exists()


def test_suite_that_needs_gradients_is_refused_for_a_model_without(digits):
    data = (digits.image[:4], digits.label[:4])
    with pytest.raises(UsageError, match="fgsm needs a gradient"):
        evaluation.evaluate({"exact": in_process(digits)}, data, ThreatModel("linf", 0.1), "quick", queries=20)


def test_endpoint_that_draws_at_random_is_refused(digits, tmp_path):
    random = np.random.default_rng(0)

    def exact(image, seed):
        def answers(image):
            return random.normal(size=[len(image), 10]).astype(np.float32)

        logits = tf.numpy_function(answers, [image], tf.float32)
        logits.set_shape([None, 10])
        return logits

    with pytest.raises(InputError, match="draws at random"):
        attacked({"exact": exact}, digits, tmp_path / "endpoint.npz")


def test_error_in_the_middle_of_an_attack_is_the_clients_own(digits, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint, "_RETRIES", 1)
    faults = {"fault": lambda number: "unavailable" if number > 40 else None}
    with serving(folder, **faults) as server, pytest.raises(UnavailableError, match="shutting down"):  # noqa: SIM117
        with endpoint.opened(server.grpc) as model:
            attacked(model.attack_paths, digits, tmp_path / "found.npz")
    assert server.engine.requests == 42


def test_endpoint_of_other_images_is_one_line(digits, alone, tmp_path):
    data = (np.zeros([2, 9, 9, 1], np.float32), np.zeros([2], np.int32))
    with pytest.raises(InvalidRequestError, match="refused the request"), endpoint.opened(alone.grpc) as model:
        evaluation.evaluate(model.attack_paths, data, ThreatModel("linf", 0.1), "blackbox", queries=20)
    with pytest.raises(NotFoundError), endpoint.opened(f"{alone.grpc}/other"):
        pass
