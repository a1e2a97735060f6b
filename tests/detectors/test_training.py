from __future__ import annotations

import numpy as np
import pytest

from kerasdefense.detectors.training import Head, check_training
from kerasdefense.types import InputError

EMBEDDING = np.ones([4, 3], np.float32)
HEAD = Head(np.ones([3, 5], np.float16))


def check(activations, label, head=HEAD, needs=("embedding",), needs_head=False):
    return check_training(activations, np.asarray(label), head, needs=needs, needs_head=needs_head)


def test_training_is_float64_and_empty_where_it_is_not_needed():
    training = check({"embedding": EMBEDDING, "logits": np.zeros([4, 5])}, [0, 1, 2, 4], needs_head=True)
    assert training.embedding.dtype == training.kernel.dtype == training.bias.dtype == np.float64
    np.testing.assert_array_equal(training.embedding, EMBEDDING)
    np.testing.assert_array_equal(training.bias, np.zeros(5))
    assert training.logits.shape == (4, 0)
    assert check({"embedding": EMBEDDING}, [0, 1, 2, 4]).kernel.size == 0


@pytest.mark.parametrize(
    "activations, head, classes",
    [
        ({"logits": np.zeros([4, 7])}, HEAD, 7),
        ({}, HEAD, 5),
        ({}, None, 4),
    ],
)
def test_classes_are_counted_by_logits_then_head_then_label(activations, head, classes):
    activations = {"embedding": EMBEDDING, **activations}
    assert check(activations, [0, 3, 3, 1], head).classes == classes
    with pytest.raises(InputError, match=f"labels 0 to {classes - 1}, not -1"):
        check(activations, [0, 3, -1, 1], head)
    if classes != 4:
        with pytest.raises(InputError, match=f"labels 0 to {classes - 1}, not {classes}"):
            check(activations, [0, 3, classes, 1], head)


def test_head_must_go_with_the_logits_too():
    activations = {"embedding": EMBEDDING, "logits": np.zeros([4, 6])}
    with pytest.raises(InputError, match=r"the kernel of the head must be \[3, 6\], not \[3, 5\]"):
        check(activations, [0, 1, 2, 4], needs=("logits", "embedding"), needs_head=True)
