import builtins

import numpy as np
import pytest
import tensorflow as tf

from kerasdefense import InputError, export
from kerasdefense.export import warmup
from kerasdefense.export.warmup import WARM_UP

prediction_log_pb2 = pytest.importorskip("tensorflow_serving.apis.prediction_log_pb2")


def requests(version):
    records = tf.data.TFRecordDataset(str(version / WARM_UP)).as_numpy_iterator()
    return [prediction_log_pb2.PredictionLog.FromString(record).predict_log.request for record in records]


def test_warm_up_asks_every_signature_for_one_image_and_for_several(version):
    signatures = tf.saved_model.load(str(version)).signatures
    found = requests(version)
    assert {request.model_spec.name for request in found} == {export.model_name(version.parent)}
    batches = {}
    for request in found:
        inputs = {key: tf.make_ndarray(value) for key, value in request.inputs.items()}
        answers = signatures[request.model_spec.signature_name](**{k: tf.constant(v) for k, v in inputs.items()})
        assert answers["valid"].numpy().all()
        batches.setdefault(request.model_spec.signature_name, []).append(len(answers["label"]))
    assert batches == {name: list(warmup.BATCHES) for name in export.SIGNATURES}


def test_warm_up_images_are_no_noise_and_differ(version):
    (image,) = (
        tf.make_ndarray(request.inputs["image"])
        for request in requests(version)
        if request.model_spec.signature_name == "serving_default"
        and request.inputs["image"].tensor_shape.dim[0].size > 1
    )
    assert image.dtype == np.float32 and 0 <= image.min() < image.max() <= 1
    assert len(np.unique(image.reshape(len(image), -1), axis=0)) == len(image)


def test_warm_up_of_random_models_covers_denoise_and_diagnose(noisy_versions):
    names = [{request.model_spec.signature_name for request in requests(version)} for version in noisy_versions]
    assert names == [set(export.SIGNATURES), {*export.SIGNATURES, "denoise", "diagnose"}]


def test_export_goes_without_the_extra_and_says_so(defense, card, labels, tmp_path, monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("tensorflow_serving"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    version = export.save(defense, tmp_path, labels=labels, version=0, card=card)
    monkeypatch.undo()
    assert not (version / "assets.extra").exists() and (version / "card.json").is_file()
    err = capsys.readouterr().err
    assert err.count("has no warm-up requests") == 1 and "extra serving" in err


def test_model_that_refuses_its_warm_up_is_not_kept(defense, card, labels, tmp_path, monkeypatch):
    monkeypatch.setattr(warmup, "_images", lambda batch, shape: np.full((batch, *shape), 300, np.int32))
    monkeypatch.setattr(warmup, "_file", lambda image, kind: b"no image")
    with pytest.raises(InputError, match="calls images of a warm-up request to examples invalid"):
        export.save(defense, tmp_path, labels=labels, version=0, card=card)
    assert not list(tmp_path.iterdir())
