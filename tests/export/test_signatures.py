import io

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from scipy.special import softmax
from tensorflow.core.protobuf import config_pb2

from kerasdefense import InputError, export
from kerasdefense.attacks import PGD
from kerasdefense.data import records
from kerasdefense.defenses import Standard
from kerasdefense.detectors import DETECTORS

OUTPUTS = {
    "logits": tf.float32,
    "probabilities": tf.float32,
    "label": tf.int64,
    "class_name": tf.string,
    "anomaly_score": tf.float32,
    "accepted": tf.bool,
    "valid": tf.bool,
}
UNNAMED = {name: dtype for name, dtype in OUTPUTS.items() if name != "class_name"}
"""Those of `examples`: TFX's BulkInferrer cannot log class names."""


def example(file, **features):
    feature = {"image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[file])), **features}
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()


def test_signatures_take_and_give_what_they_say(signatures):
    takes = {
        "serving_default": tf.TensorSpec([None, 8, 8, 3], tf.float32, "image"),
        "image_bytes": tf.TensorSpec([None], tf.string, "image_bytes"),
        "examples": tf.TensorSpec([None], tf.string, "examples"),
    }
    assert set(signatures) == set(takes) == set(export.SIGNATURES)
    for name, spec in takes.items():
        assert signatures[name].structured_input_signature == ((), {spec.name: spec})
        outputs = signatures[name].structured_outputs
        named = UNNAMED if name == "examples" else OUTPUTS
        assert {key: output.dtype for key, output in outputs.items()} == named
        assert outputs["logits"].shape.as_list() == outputs["probabilities"].shape.as_list() == [None, 3]


def test_signatures_agree_with_the_defense_on_exact_images(signatures, defense, pixels, labels, encode):
    files = [encode(image) for image in pixels]
    label = tf.train.Feature(int64_list=tf.train.Int64List(value=[1]))
    found = (
        signatures["serving_default"](image=tf.constant(pixels / np.float32(255))),
        signatures["image_bytes"](image_bytes=tf.constant(files)),
        signatures["examples"](examples=tf.constant([example(file, label=label) for file in files])),
    )
    logits = defense(pixels / np.float32(255)).numpy()
    assert np.ptp(logits, axis=0).min() > 1e-2  # the images are told apart
    for outputs in found:
        np.testing.assert_allclose(outputs["logits"], logits, atol=1e-5)
        np.testing.assert_allclose(outputs["probabilities"], softmax(logits, axis=1), atol=1e-5)
        np.testing.assert_array_equal(outputs["label"], logits.argmax(axis=1))
        names = [name.decode() for name in outputs["class_name"].numpy()] if "class_name" in outputs else None
        assert names is None or names == [labels[index] for index in logits.argmax(axis=1)]
        np.testing.assert_allclose(outputs["anomaly_score"], 1 - softmax(logits, axis=1).max(axis=1), atol=1e-5)
        assert outputs["valid"].numpy().all() and outputs["accepted"].numpy().all()


@pytest.mark.parametrize("name", sorted(DETECTORS))
def test_reject_option_adds_the_score_and_the_verdict_of_python(name, defense, reject_option, labels, encode):
    option = reject_option(name)
    random = np.random.default_rng(8)
    pixels = random.integers(0, 256, (20, 8, 8, 3), np.uint8)
    pixels[10:] = pixels[10:, :1, :1]  # of one colour each
    image = tf.constant(pixels / np.float32(255))
    module = export.serving_module(defense, labels, option)
    outputs = module.serving_default(image)
    assert set(outputs) == set(OUTPUTS) and outputs["valid"].numpy().all()
    expected = option.detector.score_image(defense.activations, image).numpy()
    np.testing.assert_allclose(outputs["anomaly_score"], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(outputs["accepted"], outputs["anomaly_score"].numpy() <= option.threshold)
    assert 0 < outputs["accepted"].numpy().mean() < 1
    np.testing.assert_allclose(outputs["logits"], defense(image), atol=1e-5)
    of_files = module.image_bytes(tf.constant([encode(each) for each in pixels]))
    np.testing.assert_allclose(of_files["anomaly_score"], expected, rtol=1e-4, atol=1e-5)
    empty = module.serving_default(image[:0])
    assert empty["anomaly_score"].shape == empty["accepted"].shape == [0]


@pytest.mark.parametrize(
    ("signature", "key", "dtype", "shape"),
    [
        ("serving_default", "image", tf.float32, [0, 8, 8, 3]),
        ("image_bytes", "image_bytes", tf.string, [0]),
        ("examples", "examples", tf.string, [0]),
    ],
)
def test_empty_batch_gives_empty_outputs(signatures, signature, key, dtype, shape):
    outputs = signatures[signature](**{key: tf.zeros(shape, dtype) if dtype != tf.string else tf.fill(shape, "")})
    wide = {"logits": [0, 3], "probabilities": [0, 3]}
    named = UNNAMED if signature == "examples" else OUTPUTS
    assert {name: output.shape.as_list() for name, output in outputs.items()} == {
        name: wide.get(name, [0]) for name in named
    }


def test_batch_may_mix_formats_and_sizes(signatures, pixels, encode):
    large = np.kron(pixels[1], np.ones((4, 4, 1), np.uint8))
    files = [encode(pixels[0]), encode(large, "JPEG"), encode(pixels[2])]
    together = signatures["image_bytes"](image_bytes=tf.constant(files))["logits"]
    alone = [signatures["image_bytes"](image_bytes=tf.constant([file]))["logits"][0] for file in files]
    np.testing.assert_allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("image_shape", [(8, 8, 3), (8, 8, 1)], ids=["colour_model", "grey_model"])
@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("PNG", "RGB"), ("PNG", "L"), ("PNG", "RGBA"), ("PNG", "LA"), ("PNG", "P"),
        ("JPEG", "RGB"), ("JPEG", "L"),
    ],
)  # fmt: skip
def test_decoded_pixels_are_those_pillow_sees(read, encode, pixels, image_shape, kind, mode):
    smooth = np.asarray(Image.fromarray(pixels[0][:3, :3]).resize((8, 8)))
    file = encode(smooth, kind, mode)
    expected = Image.open(io.BytesIO(file)).convert("RGB").convert("L" if image_shape[2] == 1 else "RGB")
    expected = np.asarray(expected, np.float32).reshape(image_shape)
    levels = 3 if kind == "JPEG" else 1 if image_shape[2] == 1 else 0
    np.testing.assert_allclose(read([file], image_shape)[0] * 255, expected, atol=levels + 1e-3)


def test_grey_file_keeps_its_levels(read, encode):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    seen = read([encode(levels)], (16, 16, 1))[0, :, :, 0]
    np.testing.assert_allclose(seen, levels / 255, atol=1e-6)
    colour = read([encode(levels)], (16, 16, 3))[0]
    np.testing.assert_allclose(colour, np.repeat(levels[:, :, None] / 255, 3, axis=2), atol=1e-6)


@pytest.mark.parametrize("size", [(20, 31), (5, 4), (8, 16)])
def test_resize_is_that_of_pillow_and_of_training(read, encode, size):
    image = np.random.default_rng(4).integers(0, 256, (*size, 3), np.uint8)
    seen = read([encode(image)], (8, 8, 3))[0]
    pillow = Image.fromarray(image).resize((8, 8), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(seen * 255, np.asarray(pillow, np.float32), atol=1 + 1e-3)
    training = records.decode(tf.constant(encode(image)), (8, 8, 3), resize=True)
    np.testing.assert_allclose(seen, training.numpy() / 255, atol=1e-6)


@pytest.fixture(scope="module")
def fed(noisy_versions):
    """Return a function that feeds a session, as TF Serving does, the inputs of a signature, for all its outputs."""
    with tf.compat.v1.Session(graph=tf.Graph()) as session:
        definition = tf.compat.v1.saved_model.load(session, ["serve"], str(noisy_versions[1])).signature_def

        def fed(signature, **inputs):
            names = definition[signature]
            options = config_pb2.CallableOptions(
                feed=[names.inputs[key].name for key in inputs], fetch=[each.name for each in names.outputs.values()]
            )
            call = session._make_callable_from_options(options)  # run() would look at the shapes before the graph
            return dict(zip(names.outputs, call(*inputs.values())))

        yield fed


def inputs_of(signature, image):
    return {"image": image, **({"seed": np.zeros([2, 2], np.int32)} if signature == "diagnose" else {})}


@pytest.mark.parametrize("signature", ["serving_default", "denoise", "diagnose"])
@pytest.mark.parametrize(
    "shape",
    [(2, 9, 8, 3), (2, 16, 16, 3), (2, 8, 8, 1), (2, 0, 8, 3), (2, 3, 8, 8), (8, 8, 3), (2, 192), (1, 2, 8, 8, 3)],
)
def test_session_refuses_images_of_another_shape(fed, signature, shape):
    assert fed(signature, **inputs_of(signature, np.full([2, 8, 8, 3], 0.5, np.float32)))
    with pytest.raises(tf.errors.InvalidArgumentError, match="is not compatible with expected shape"):
        fed(signature, **inputs_of(signature, np.full(shape, 0.5, np.float32)))


@pytest.mark.parametrize("shape", [(2, 1), (2, 3), (4,)])
def test_session_refuses_seeds_of_another_shape(fed, shape):
    image = np.full([2, 8, 8, 3], 0.5, np.float32)
    with pytest.raises(tf.errors.InvalidArgumentError, match="is not compatible with expected shape"):
        fed("diagnose", image=image, seed=np.zeros(shape, np.int32))


@pytest.mark.parametrize("signature", ["image_bytes", "examples"])
def test_session_refuses_files_of_another_rank(fed, signature):
    assert not fed(signature, **{signature: np.array([b"no image"], object)})["valid"].any()
    for files in (b"no image", [[b"no image"]]):
        with pytest.raises(tf.errors.InvalidArgumentError, match="is not compatible with expected shape"):
            fed(signature, **{signature: np.array(files, object)})


def test_labels_must_match_the_classes(defense):
    with pytest.raises(InputError, match="3 classes cannot be exported with 2 labels"):
        export.serving_module(defense, ["cat", "dog"])


@pytest.mark.parametrize(("image_shape", "why"), [((None, None, 3), "fixed size"), ((8, 8, 2), "2 channels")])
def test_input_that_no_file_feeds_is_refused(image_shape, why):
    image = keras.Input(image_shape)
    embedding = keras.layers.GlobalAveragePooling2D()(image)
    logits = keras.layers.Dense(2)(embedding)
    backbone = keras.Model(image, {"feature_map": image, "embedding": embedding, "logits": logits})
    with pytest.raises(InputError, match=why):
        export.serving_module(Standard(backbone, attack=PGD()), ["cat", "dog"])
