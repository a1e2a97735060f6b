"""What is trained in a benchmark: one defense, one backbone, images of one shape."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np

from kerasdefense import backbones, config, training
from kerasdefense.defenses import DEFENSES, ExampleBank
from kerasdefense.defenses.cafd import IMAGE_ADV

CLASSES = 10
EPSILON = 8 / 255


@dataclasses.dataclass(frozen=True)
class Case:
    """A defense whose attack takes so many steps in the L-inf ball, SGD with momentum, float32.

    Attributes:
        backbone: key of BACKBONES.
        width: channels of its first stage.
        image_shape: height, width, channels.
        batch_size: images per step.
        steps: gradient steps of the training attack; 0 where the defense has none.
        defense: key of DEFENSES.
        head: its last layer, "dense" or "orthogonal".
        w_kl: weight of learning with a peer; -1 = the method's own, 0 = no peer.
        share_forward: whether DFA passes every image once, not the images of each pair separately.
        dynamic: whether CAFD attacks at each step, not before training.
        denoiser_width: channels of the first stage of CAFD's denoiser or AToP's purifier, of their critics half as
            many.
        awp_gamma: adversarial weight perturbation; 0 = none.
        ema_decay: decay of an average of the weights; 0 = none.
    """

    backbone: str
    width: int
    image_shape: tuple[int, int, int]
    batch_size: int
    steps: int = 10
    defense: str = "pgd_at"
    head: str = "dense"
    w_kl: float = -1.0
    share_forward: bool = True
    dynamic: bool = False
    denoiser_width: int = 8
    awp_gamma: float = 0.0
    ema_decay: float = 0.0

    @property
    def run(self) -> config.Run:
        """The configuration of a run that takes these steps."""
        return config.Run(
            backbone=config.Backbone(name=self.backbone, width=self.width, head=self.head),
            attack=config.Attack(epsilon=EPSILON, steps=self.steps),
            defense=config.Defense(
                name=self.defense,
                w_kl=self.w_kl,
                share_forward=self.share_forward,
                dynamic=self.dynamic,
                awp_gamma=self.awp_gamma,
                **self._widths,
            ),
            train=config.Train(
                batch_size=self.batch_size, learning_rate=0.01, schedule="constant", ema_decay=self.ema_decay
            ),
        )

    @property
    def _widths(self) -> dict[str, int]:
        name = {"atop": "purifier_width", "cafd": "denoiser_width"}.get(self.defense)
        return {name: self.denoiser_width, "critic_width": max(1, self.denoiser_width // 2)} if name else {}

    @property
    def architecture(self) -> str:
        """Backbone and images, in words."""
        return f"{self.backbone}-{self.width} {'x'.join(map(str, self.image_shape))}"

    @property
    def model_name(self) -> str:
        """What is trained on what, in words."""
        return f"{self.architecture} batch {self.batch_size}"

    @property
    def defense_name(self) -> str:
        """By what it is trained, in words."""
        extras = (" + AWP" if self.awp_gamma else "") + (" + EMA" if self.ema_decay else "")
        passes = "" if self.share_forward else " in three passes"
        passes += ", dynamic" if self.dynamic else ""
        return f"{self.defense}{'' if self.w_kl else ' without peer'}{passes}{extras}"

    def batch(self) -> dict[str, np.ndarray]:
        """Return a batch of noise with labels; what is in the images does not change the time."""
        generator = np.random.default_rng(0)
        image = generator.random((self.batch_size, *self.image_shape), np.float32)
        attacked = {IMAGE_ADV: 1 - image} if DEFENSES[self.defense].crafts_before(self.run.defense) else {}
        return {
            **attacked,
            "image": image,
            "label": generator.integers(CLASSES, size=self.batch_size, dtype=np.int32),
            "index": np.arange(self.batch_size, dtype=np.int32),
        }

    def make_bank(self) -> ExampleBank:
        """Return images of noise by class, to draw from."""
        generator = np.random.default_rng(1)
        image = generator.integers(256, size=(20 * CLASSES, *self.image_shape), dtype=np.uint8)
        return ExampleBank(image, np.arange(len(image)) % CLASSES, classes=CLASSES)

    def make_backbone(self) -> keras.Model:
        """Return the backbone with fresh weights."""
        return backbones.build(self.run.backbone, image_shape=self.image_shape, classes=CLASSES)

    def make_classifier(self) -> keras.Model:
        """Return the backbone as the model from images to logits that other libraries take."""
        backbone = self.make_backbone()
        return keras.Model(backbone.input, backbone.output["logits"])

    def make_optimizer(self) -> keras.optimizers.Optimizer:
        """Return the optimizer of the run."""
        return training.make_optimizer(self.run.train, steps=1)
