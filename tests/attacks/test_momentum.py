from __future__ import annotations

import numpy as np
import pytest
import scipy.signal
import scipy.stats
import tensorflow as tf
from cleverhans.tf2.attacks.momentum_iterative_method import momentum_iterative_method

from kerasdefense.attacks import BIM, MIFGSM, OBJECTIVES, PGD, TIDIM, misclassified, norms, seeds
from kerasdefense.attacks.momentum import gaussian_kernel, shrink, smoothed
from kerasdefense.types import UsageError

EPSILON = {"linf": 0.2, "l2": 0.8}
EVERY_NORM = pytest.mark.parametrize("norm", norms.NORMS)


class Linear:
    """A linear classifier of gray 4x4 images, some images and their labels."""

    def __init__(self, classes=3, batch=6):
        random = np.random.default_rng(0)
        self.weights = random.normal(size=[16, classes]).astype(np.float32)
        self.image = random.uniform(size=[batch, 4, 4, 1]).astype(np.float32)
        self.label = random.integers(0, classes, batch).astype(np.int32)
        self.seed = seeds.per_example(0, 0, tf.range(batch)).numpy()

    def logits_fn(self, image):
        return tf.reshape(image, [-1, 16]) @ self.weights

    def run(self, attack, rows=slice(None)):
        loss_fn = OBJECTIVES["cross_entropy"](self.logits_fn)
        return attack(loss_fn, self.image[rows], {"label": self.label[rows]}, self.seed[rows])


def gradient_of(linear, image):
    """Return the cross-entropy's gradient by hand, float64 [batch, 16]."""
    logits = image @ linear.weights
    probability = np.exp(logits - logits.max(axis=1, keepdims=True))
    probability /= probability.sum(axis=1, keepdims=True)
    return (probability - np.eye(linear.weights.shape[1])[linear.label]) @ linear.weights.T


def transcribed(linear, *, norm, epsilon, steps, decay):
    """Return MI-FGSM's last iterate, written down from the paper, float64 [batch, 16]."""
    image = np.float64(linear.image.reshape([-1, 16]))
    image_adv, momentum = image.copy(), np.zeros_like(image)
    for _ in range(steps):
        gradient = gradient_of(linear, image_adv)
        momentum = decay * momentum + gradient / np.abs(gradient).sum(axis=1, keepdims=True)
        if norm == "linf":
            image_adv = image_adv + epsilon / steps * np.sign(momentum)
            image_adv = np.clip(np.clip(image_adv, 0, 1), image - epsilon, image + epsilon)
        else:
            unit = momentum / np.linalg.norm(momentum, axis=1, keepdims=True)
            delta = np.clip(image_adv + epsilon / steps * unit, 0, 1) - image
            length = np.linalg.norm(delta, axis=1, keepdims=True)
            image_adv = image + delta * np.minimum(1, epsilon / length)
    return image_adv


@EVERY_NORM
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_mi_fgsm_equals_its_transcription(norm, decay):
    linear, settings = Linear(), {"norm": norm, "epsilon": EPSILON[norm], "steps": 5, "decay": decay}
    found = linear.run(MIFGSM(**settings, keep="last")).image
    np.testing.assert_allclose(np.reshape(found, [-1, 16]), transcribed(linear, **settings), rtol=0, atol=1e-5)


def test_mi_fgsm_equals_cleverhans(trained):
    image, label, epsilon, steps = trained.image[:16], trained.label[:16], 0.1, 5
    reference = momentum_iterative_method(
        trained.logits_fn, image, epsilon, epsilon / steps, steps, np.inf, clip_min=0.0, clip_max=1.0, y=label
    )
    loss_fn = OBJECTIVES["cross_entropy"](trained.logits_fn)
    seed = seeds.per_example(0, 0, tf.range(16))
    found = MIFGSM("linf", epsilon, steps=steps, keep="last")(loss_fn, image, {"label": label}, seed).image
    differs = np.abs(found - reference) > 1e-5
    assert differs.mean() < 0.01  # where gradients cancel, their sign is rounding


@EVERY_NORM
def test_bim_is_pgd_without_a_random_start_in_steps_that_add_up_to_the_radius(norm):
    epsilon = EPSILON[norm]
    linear, bim = Linear(), BIM(norm, epsilon, steps=4)
    assert bim.length == epsilon / 4 and BIM(step_size=0.3).length == 0.3
    pgd = PGD(norm, epsilon, steps=4, step_size=epsilon / 4, random_start=False)
    np.testing.assert_array_equal(linear.run(bim).image, linear.run(pgd).image)
    np.testing.assert_allclose(
        linear.run(MIFGSM(norm, epsilon, steps=4, decay=0.0)).image, linear.run(bim).image, atol=1e-6
    )


@EVERY_NORM
def test_ti_dim_without_smoothing_and_diversity_is_mi_fgsm(norm):
    linear, settings = Linear(), {"norm": norm, "epsilon": EPSILON[norm], "steps": 4}
    for plain in (TIDIM(**settings, kernel=1, probability=0.0), TIDIM(**settings, kernel=1, smallest=1.0)):
        np.testing.assert_allclose(linear.run(plain).image, linear.run(MIFGSM(**settings)).image, rtol=0, atol=1e-6)


@pytest.mark.parametrize("probability, seeds_matter", [(0.0, False), (1.0, True)])
def test_ti_dim_draws_only_for_diversity(probability, seeds_matter):
    linear, attack = Linear(), TIDIM("l2", 0.8, steps=3, probability=probability, smallest=0.5)
    first = linear.run(attack).image
    np.testing.assert_array_equal(first, linear.run(attack).image)
    linear.seed = linear.seed + 1
    assert np.array_equal(first, linear.run(attack).image) is not seeds_matter


@pytest.mark.parametrize("rows", [[5, 3, 0, 1, 2, 4], [2], [4, 4]])
def test_ti_dim_does_not_depend_on_the_place_in_the_batch(rows):
    linear, attack = Linear(), TIDIM("l2", 0.8, steps=3, smallest=0.5)
    whole, part = linear.run(attack), linear.run(attack, rows)
    for of_whole, of_part in zip(whole, part):
        np.testing.assert_allclose(of_part, of_whole.numpy()[rows], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [MIFGSM, TIDIM])
def test_compiled_steps_give_what_a_call_gives(kind):
    linear, attack = Linear(), kind("l2", 0.8, steps=3)
    context, loss_fn = {"label": linear.label}, OBJECTIVES["cross_entropy"](linear.logits_fn)
    success_fn = misclassified(linear.logits_fn)
    step = tf.function(lambda state: attack.step(loss_fn, state, linear.image, context, success_fn))
    state = attack.start(tf.constant(linear.image), tf.constant(linear.seed))
    for _ in range(attack.passes):
        state = step(state)
    called = attack(loss_fn, linear.image, context, linear.seed, success_fn)
    for stepped, whole in zip(state.best, called):
        np.testing.assert_allclose(np.float32(stepped), np.float32(whole), rtol=1e-4, atol=1e-5)
    assert called.success.numpy().any()


@pytest.mark.parametrize("side", [1, 3, 5, 15])
def test_kernel_is_the_papers_gaussian_and_sums_to_one(side):
    kernel = gaussian_kernel(side)
    assert kernel.shape == (side, side) and kernel.dtype == np.float32
    np.testing.assert_allclose(kernel.sum(), 1, rtol=1e-6)
    line = scipy.stats.norm.pdf(np.linspace(-3, 3, side)) if side > 1 else np.ones(1)
    np.testing.assert_allclose(kernel, np.outer(line, line) / line.sum() ** 2, rtol=1e-5)


def test_smoothing_is_a_convolution_of_each_channel():
    gradient = np.random.default_rng(0).normal(size=[2, 6, 7, 3]).astype(np.float32)
    found = smoothed(tf.constant(gradient), 5)
    for example, channel in np.ndindex(2, 3):
        expected = scipy.signal.convolve2d(gradient[example, :, :, channel], gaussian_kernel(5), mode="same")
        np.testing.assert_allclose(found[example, :, :, channel], expected, rtol=1e-4, atol=1e-6)


def test_shrinking_resizes_and_pads_each_image_by_its_draws():
    random = np.random.default_rng(0)
    image = random.uniform(size=[40, 8, 6, 2]).astype(np.float32)
    draws = random.uniform(size=[40, 3]).astype(np.float32)
    draws[0], draws[1] = 0, [np.nextafter(np.float32(1), np.float32(0))] * 3
    shrunken = shrink(tf.constant(image), tf.constant(draws), smallest=0.5).numpy()
    np.testing.assert_allclose(shrunken[1], image[1], atol=1e-6)
    sizes = set()
    for one, found, (size, top, left) in zip(image, shrunken, draws):
        height, width = 4 + int(size * 5), 3 + int(size * 4)
        top, left = int(top * (8 - height + 1)), int(left * (6 - width + 1))
        expected = np.zeros_like(one)
        resized = tf.image.crop_and_resize(one[None], [[0.0, 0, 1, 1]], [0], [height, width])
        expected[top : top + height, left : left + width] = resized[0]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
        sizes.add((height, width))
    assert {height for height, _ in sizes} == {4, 5, 6, 7, 8}


def test_shrinking_passes_gradients_on_and_keeps_a_single_row():
    image = tf.random.stateless_uniform([2, 1, 8, 1], [0, 0])
    draws = tf.constant([[0.1, 0.5, 0.5], [0.9, 0.0, 0.9]])
    with tf.GradientTape() as tape:
        tape.watch(image)
        total = tf.reduce_sum(shrink(image, draws, smallest=0.5))
    gradient = tape.gradient(total, image).numpy()
    assert np.isfinite(gradient).all() and (gradient >= 0).all() and (gradient.sum(axis=(1, 2, 3)) > 3).all()


@pytest.mark.parametrize("kind", [MIFGSM, TIDIM])
def test_constant_model_gives_no_nan(kind):
    linear = Linear()
    linear.weights = np.zeros_like(linear.weights)
    result = linear.run(kind("l2", 0.5, steps=2))
    np.testing.assert_array_equal(result.image, linear.image)


@pytest.mark.parametrize(
    "kind, settings, message",
    [
        (BIM, {"steps": 0}, "steps and restarts must be at least 1, not 0 and 1"),
        (MIFGSM, {"decay": -0.1}, "decay must be a finite number of at least 0, not -0.1"),
        (MIFGSM, {"decay": float("nan")}, "decay must be a finite number of at least 0"),
        (TIDIM, {"probability": 1.5}, r"probability must be in \[0, 1\] and smallest in \(0, 1\], not 1.5 and 0.9"),
        (TIDIM, {"smallest": 0.0}, r"smallest in \(0, 1\], not 0.7 and 0.0"),
        (TIDIM, {"kernel": 4}, "kernel must be an odd number of at least 1, not 4"),
        (TIDIM, {"restarts": 2}, "several restarts need a random start"),
    ],
)
def test_momentum_attacks_refuse_illegal_settings(kind, settings, message):
    with pytest.raises(UsageError, match=message):
        kind(**settings)
