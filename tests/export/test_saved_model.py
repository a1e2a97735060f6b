import errno
import functools
import hashlib
import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from kerasdefense import CAFD, OSDNCAML, InputError, Standard, UsageError, export
from kerasdefense.training import mirrored

PYTHON_OPS = {"PyFunc", "PyFuncStateless", "EagerPyFunc", "NumpyFunction"}


def graph_ops(version):
    """Return the names of all ops in a SavedModel, its function library included, without those of functions."""
    saved = saved_model_pb2.SavedModel.FromString((version / "saved_model.pb").read_bytes())
    graph = saved.meta_graphs[0].graph_def
    functions = {function.signature.name for function in graph.library.function}
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    return {node.op for node in nodes} - functions


def everything_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_version_holds_model_labels_and_card(version, labels):
    assert everything_in(version) == [
        "assets",
        "assets.extra",
        "assets.extra/tf_serving_warmup_requests",
        "assets/labels.txt",
        "card.json",
        "fingerprint.pb",
        "saved_model.pb",
        "variables",
        "variables/variables.data-00000-of-00001",
        "variables/variables.index",
    ]
    assert [path.name for path in version.parent.iterdir()] == ["1"]
    assert (version / "assets/labels.txt").read_text(encoding="utf-8").splitlines() == list(labels)
    saved = saved_model_pb2.SavedModel.FromString((version / "saved_model.pb").read_bytes())
    assert [asset.filename for asset in saved.meta_graphs[0].asset_file_def] == ["labels.txt"]


def test_card_lists_the_digest_of_every_other_file(version):
    card = json.loads((version / "card.json").read_text(encoding="utf-8"))
    export.check_card(card)
    files = {path for path in version.rglob("*") if path.is_file() and path.name != "card.json"}
    assert {version / name for name in card["files"]} == files and len(files) == 6
    for name, digest in card["files"].items():
        assert hashlib.sha256((version / name).read_bytes()).hexdigest() == digest
    assert str(version.parent) not in (version / "card.json").read_text(encoding="utf-8")


def test_only_what_inference_needs_is_saved(version, defense):
    loaded = tf.saved_model.load(str(version))
    assert len(loaded.weights) == len(defense.backbone.variables)
    assert not [name for name, _ in tf.train.list_variables(str(version / "variables/variables")) if "optim" in name]


def test_decoder_rotation_head_and_peer_stay_at_home(make, labels, card, tmp_path):
    defense = make(OSDNCAML)
    version = export.save(defense, tmp_path, labels=labels, version=0, card=card)
    stored = sorted(shape for name, shape in tf.train.list_variables(str(version / "variables/variables")) if shape)
    assert stored == sorted(variable.shape.as_list() for variable in defense.backbone.variables)
    assert len(defense.variables) > 2 * len(defense.backbone.variables)


def test_graph_has_core_ops_only(version):
    ops = graph_ops(version)
    assert {"Conv2D", "DecodeImage", "ParseExampleV2"} <= ops
    assert not ops & PYTHON_OPS
    assert ops <= set(dir(tf.raw_ops))  # ops of other packages, such as Addons>..., are not there


@pytest.mark.parametrize("name", ["knn", "odin"])
def test_version_with_a_reject_option_has_core_ops_only_and_says_so_on_its_card(
    name, defense, card, labels, reject_option, tmp_path
):
    option = reject_option(name)
    described = {**card, "rejection": option.described()}
    version = export.save(defense, tmp_path, labels=labels, version=0, card=described, reject=option)
    ops = graph_ops(version)
    assert not ops & PYTHON_OPS and ops <= set(dir(tf.raw_ops))
    loaded = tf.saved_model.load(str(version))
    assert len(loaded.weights) == len(defense.backbone.variables) + len(option.detector.state())
    image = tf.random.stateless_uniform([5, 8, 8, 3], [1, 2])
    outputs = loaded.signatures["serving_default"](image=image)
    expected = option.detector.score_image(defense.activations, image)
    np.testing.assert_allclose(outputs["anomaly_score"], expected, rtol=1e-4, atol=1e-5)
    written = json.loads((version / "card.json").read_text(encoding="utf-8"))
    export.check_card(written)
    assert written["rejection"]["threshold"] == option.threshold and written["rejection"]["detector"] == name


def test_graph_ops_sees_python_functions(tmp_path):
    module = tf.Module()
    module.call = tf.function(
        lambda image: tf.py_function(lambda each: each, [image], tf.float32),
        input_signature=[tf.TensorSpec([None], tf.float32)],
    )
    tf.saved_model.save(module, str(tmp_path / "1"))
    assert graph_ops(tmp_path / "1") & PYTHON_OPS


def test_loads_where_our_package_is_unknown(version, pixels, defense, encode, tmp_path):
    image = pixels[:1] / np.float32(255)
    np.save(tmp_path / "image.npy", image)
    (tmp_path / "image.png").write_bytes(encode(pixels[0]))
    script = """
import sys, json, numpy as np, tensorflow as tf
signatures = tf.saved_model.load(sys.argv[1]).signatures
file = open("image.png", "rb").read()
feature = {"image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[file]))}
example = tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()
found = [
    signatures["serving_default"](image=tf.constant(np.load("image.npy"))),
    signatures["image_bytes"](image_bytes=tf.constant([file])),
    signatures["examples"](examples=tf.constant([example])),
]
assert not [name for name in sys.modules if name.startswith(("kerasdefense", "tensorflow_addons"))]
print(json.dumps([outputs["logits"].numpy().tolist() for outputs in found]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(version)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for logits in json.loads(done.stdout.splitlines()[-1]):
        np.testing.assert_allclose(logits, defense(image), atol=1e-5)


def fill(path):
    """Write something in place of a model."""
    os.makedirs(path)
    with open(os.path.join(path, "saved_model.pb"), "wb") as file:
        file.write(b"half a model")


class TestWithoutTensorFlow:
    """What happens around the writing of the model, which is left out."""

    @pytest.fixture(autouse=True)
    def _fill_instead(self, monkeypatch):
        monkeypatch.setattr("kerasdefense.export.saved_model._compare", lambda defense, reject, path: None)
        monkeypatch.setattr("kerasdefense.export.saved_model.write_warm_up", lambda version, name: None)
        monkeypatch.setattr(tf.saved_model, "save", lambda module, path, signatures: fill(path))

    def test_numbers_go_up_from_the_highest(self, defense, labels, card, tmp_path):
        for name in ("latest", "2.old", ".writing-9"):  # no versions
            (tmp_path / name).mkdir()
        written = [
            export.save(defense, tmp_path, labels=labels, version=version, card=card) for version in (0, 0, 7, 0, 3, 0)
        ]
        assert [path.name for path in written] == ["1", "2", "7", "8", "3", "9"]

    def test_taken_number_is_refused_and_kept(self, defense, labels, card, tmp_path):
        export.save(defense, tmp_path, labels=labels, version=4, card=card)
        before = (tmp_path / "4" / "card.json").stat()
        with pytest.raises(UsageError, match=r"version 4 is in .* already; the next free one is 5"):
            export.save(defense, tmp_path, labels=labels, version=4, card=card)
        assert (tmp_path / "4" / "card.json").stat() == before and os.listdir(tmp_path) == ["4"]

    def test_negative_number_is_refused(self, defense, labels, card, tmp_path):
        with pytest.raises(UsageError, match="from 1 on"):
            export.save(defense, tmp_path, labels=labels, version=-1, card=card)
        assert not os.listdir(tmp_path)

    def test_broken_card_leaves_nothing(self, defense, labels, card, tmp_path):
        with pytest.raises(InputError, match=r"card\.json does not follow its schema: \$\.seed"):
            export.save(defense, tmp_path, labels=labels, version=0, card={**card, "seed": "none"})
        assert not os.listdir(tmp_path)

    def test_reader_never_sees_half_a_version(self, defense, labels, card, tmp_path, monkeypatch):
        seen = []
        monkeypatch.setattr(
            "kerasdefense.export.saved_model.check_card", lambda card: seen.extend(os.listdir(tmp_path))
        )
        export.save(defense, tmp_path, labels=labels, version=0, card=card)
        assert len(seen) == 1 and not seen[0].isdecimal()
        assert os.listdir(tmp_path) == ["1"]

    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC),
            (tf.errors.ResourceExhaustedError(None, None, "a/b.tmp; No space left on device"), errno.ENOSPC),
            (tf.errors.UnknownError(None, None, "{{node SaveV2}} a/b.tmp; File too large [Op:SaveV2]"), errno.EIO),
        ],
    )
    def test_failed_write_leaves_nothing_and_says_why(self, defense, labels, card, tmp_path, monkeypatch, error, code):
        def save(module, path, signatures):
            fill(path)
            raise error

        monkeypatch.setattr(tf.saved_model, "save", save)
        with pytest.raises(OSError, match=r"(No space left on device|File too large)$") as raised:
            export.save(defense, tmp_path, labels=labels, version=0, card=card)
        assert raised.value.errno == code and not set("\n{[") & set(raised.value.strerror)
        assert not os.listdir(tmp_path)


class Shifted(Standard):
    """Gives other logits in a graph than outside of one."""

    def call(self, image, training=False, seed=None):
        return super().call(image, training=training) + (0.0 if tf.executing_eagerly() else 1e-3)


class RandomShifted(Shifted):
    is_randomized = True


def test_model_unlike_the_defense_is_not_kept(make, labels, card, tmp_path):
    with pytest.raises(InputError, match=r"differs from the model by 1\.0e-03"):
        export.save(make(Shifted), tmp_path, labels=labels, version=0, card=card)
    assert not os.listdir(tmp_path)


def test_random_model_unlike_the_defense_at_the_same_draw_is_not_kept(make, labels, card, tmp_path):
    with pytest.raises(InputError, match=r"differs from the model by 1\.0e-03 in logits"):
        export.save(make(RandomShifted), tmp_path, labels=labels, version=0, card=card)
    assert not os.listdir(tmp_path)


def test_random_model_is_served_with_fresh_noise_and_without_seeds(noisy, noisy_versions, pixels):
    loaded = tf.saved_model.load(str(noisy_versions[0]))
    assert set(loaded.signatures) == set(export.SIGNATURES)
    assert not hasattr(loaded, "diagnose") and not hasattr(loaded, "denoise")
    diagnosed = tf.saved_model.load(str(noisy_versions[1]))
    assert set(diagnosed.signatures) == {*export.SIGNATURES, "denoise", "diagnose"}
    image = tf.constant(np.repeat(pixels[:1] / np.float32(255), 3, axis=0))  # each image has noise of its own
    for name, output in {"serving_default": "logits", "denoise": "image_denoised"}.items():
        first, second = (diagnosed.signatures[name](image=image)[output].numpy().reshape(3, -1) for _ in range(2))
        assert len(np.unique(np.concatenate([first, second]), axis=0)) == 6
        assert diagnosed.signatures[name](image=image[:0])[output].shape[0] == 0
    assert graph_ops(noisy_versions[0]) & {"NonDeterministicInts"} and not graph_ops(noisy_versions[0]) & PYTHON_OPS


def test_diagnostics_answer_for_a_seed_as_the_model_does(noisy, noisy_versions, pixels):
    diagnose = tf.saved_model.load(str(noisy_versions[1])).signatures["diagnose"]
    assert diagnose.structured_input_signature[1]["seed"] == tf.TensorSpec([None, 2], tf.int32, "seed")
    image, seed = tf.constant(pixels / np.float32(255)), tf.reshape(tf.range(12), [6, 2])
    found = diagnose(image=image, seed=seed)
    assert set(found) == {"logits", "probabilities", "image_denoised"}
    np.testing.assert_allclose(found["logits"], noisy(image, seed=seed), atol=1e-5)
    np.testing.assert_allclose(found["probabilities"], tf.nn.softmax(noisy(image, seed=seed)), atol=1e-5)
    np.testing.assert_allclose(found["image_denoised"], noisy.front(image, seed=seed), atol=1e-5)
    one = diagnose(image=image[4:5], seed=seed[4:5])  # whatever batch an image is in
    np.testing.assert_allclose(one["logits"], found["logits"][4:5], atol=1e-5)
    empty = diagnose(image=image[:0], seed=seed[:0])
    assert empty["logits"].shape == (0, 3) and empty["image_denoised"].shape == (0, 8, 8, 3)


def test_denoiser_that_draws_at_random_is_exported_alone(noisy, noisy_versions, pixels):
    alone = keras.models.load_model(noisy_versions[0] / "denoiser.keras")
    image, seed = tf.constant(pixels / np.float32(255)), tf.reshape(tf.range(12), [6, 2])
    np.testing.assert_allclose(alone(image, seed=seed), noisy.front(image, seed=seed), atol=1e-6)
    assert alone.is_randomized and np.abs(alone(image) - alone(image)).max() > 1e-3


def test_frozen_noise_and_other_weights_are_not_kept(make, noisy, labels, card, tmp_path, monkeypatch):
    class Frozen(type(noisy)):
        def call(self, image, training=False, seed=None):
            frozen = seed is None and not tf.executing_eagerly()
            return super().call(image, seed=tf.zeros([tf.shape(image)[0], 2], tf.int32) if frozen else seed)

    with pytest.raises(InputError, match="gives the same logits twice, with its noise frozen"):
        export.save(make(Frozen), tmp_path, labels=labels, version=0, card=card)
    monkeypatch.setattr("kerasdefense.export.saved_model._contents", lambda variables: {id(variables)})
    with pytest.raises(InputError, match="has other weights than the model"):
        export.save(noisy, tmp_path, labels=labels, version=0, card=card)
    assert not os.listdir(tmp_path)


def test_diagnostics_of_a_model_that_neither_draws_nor_purifies_are_refused(defense, labels, card, tmp_path):
    with pytest.raises(UsageError, match="--export_diagnostics is for models that draw at random or purify"):
        export.save(defense, tmp_path, labels=labels, version=0, card=card, diagnostics=True)
    assert not os.listdir(tmp_path)


def test_model_without_finite_logits_is_not_kept(make, labels, card, tmp_path):
    defense = make()
    defense.trainable_variables[-1].assign([0, np.nan, 0])
    with pytest.raises(InputError, match="NaN or infinite"):
        export.save(defense, tmp_path, labels=labels, version=0, card=card)
    assert not os.listdir(tmp_path)


def test_replicated_defense_is_saved_like_any_other(make, labels, card, tmp_path):
    devices = [device.name for device in tf.config.list_logical_devices("CPU")]
    with mirrored(tuple(devices)).scope():
        defense = make()
    version = export.save(defense, tmp_path, labels=labels, version=0, card=card)
    image = np.random.default_rng(6).random((3, 8, 8, 3), np.float32)
    found = tf.saved_model.load(str(version)).signatures["serving_default"](image=tf.constant(image))
    np.testing.assert_allclose(found["logits"], defense(image), atol=1e-5)


def test_denoiser_is_exported_alone_and_as_a_signature_where_asked_for(make, labels, card, pixels, tmp_path):
    defense = make(functools.partial(CAFD, denoiser_width=2, critic_width=2))
    kernel = defense.denoiser.get_layer("residual").kernel
    kernel.assign(tf.random.stateless_normal(kernel.shape, [0, 0]))  # it begins as zero
    bare = export.save(defense, tmp_path, labels=labels, version=1, card=card)
    assert set(tf.saved_model.load(str(bare)).signatures) == set(export.SIGNATURES)
    version = export.save(defense, tmp_path, labels=labels, version=2, card=card, diagnostics=True)
    image = tf.constant(pixels / np.float32(255))
    alone = keras.models.load_model(version / "denoiser.keras")
    signatures = tf.saved_model.load(str(version)).signatures
    assert set(signatures) == {*export.SIGNATURES, "denoise"}
    signature = signatures["denoise"]
    for denoised in (alone(image), signature(image=image)["image_denoised"]):
        np.testing.assert_allclose(denoised, defense.denoised(image), atol=1e-5)
    assert np.abs(alone(image) - image).max() > 1e-3
    assert signature(image=image[:0])["image_denoised"].shape == (0, *image.shape[1:])
