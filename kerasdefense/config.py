"""What a run is, as frozen plain data: one field = one flag = one default = one line of help.

A field `x` of section `Data` is the flag `--data_x`; the fields of `Run` itself have no prefix.
`flags.py` turns these classes into absl flags and back; nothing here knows about flags, models or files.
"""

from __future__ import annotations

import dataclasses
from typing import Any

SEEDS = 2**31 - 1
ALL = "all"
"""Every name of a registry, for a flag that takes several."""
OWN_IMAGES = ("folder", "examples")
"""Names of data whose folder is the user's own, not where TensorFlow Datasets keeps its sets."""


def _field(default: Any, help_line: str, choices: tuple[str, ...] = (), *, low: Any = None, high: Any = None) -> Any:
    """Return a field with its help, and its legal values: some choices, or a closed range."""
    metadata = {"help": help_line, "choices": choices, "low": low, "high": high}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Data:
    """Where the images come from and how training sees them."""

    name: str = _field("digits", "digits, folder, examples, or the name of a TFDS image-classification set")
    dir: str = _field(
        "",
        "folder of images (--data_name=folder) or of TFRecord files (--data_name=examples), else the TFDS data "
        "directory; empty = TFDS default",
    )
    validation_fraction: float = _field(0.1, "share of the training images held out for validation, in (0, 1)")
    image_size: int = _field(0, "side in pixels to which images are resized; 0 = keep their own size", low=0)
    augment: str = _field(
        "auto",
        "random crop and flip; auto = crop_flip, without flips for digits",
        ("auto", "none", "crop", "crop_flip"),
    )
    crop_padding: int = _field(0, "pixels of reflection around a crop; 0 = an eighth of the side", low=0)
    open_set_split: str = _field(
        "",
        "known classes: empty = all, 0..4 = a published CIFAR-10/SVHN split, K:SEED = K classes drawn by a seed",
    )
    shuffle_buffer: int = _field(10_000, "examples held to shuffle the training stream", low=1)
    cache: str = _field("memory", "where decoded training images are kept", ("memory", "disk", "none"))


@dataclasses.dataclass(frozen=True)
class Backbone:
    """The classifier that a defense trains."""

    name: str = _field("resnet8", "architecture, a key of BACKBONES; ignored with --backbone_path")
    width: int = _field(16, "channels of the first stage (wide_resnet, dfa_wide_resnet: the widening factor)", low=1)
    depth: int = _field(
        16,
        "layers of wide_resnet and dfa_wide_resnet (6n + 4); other architectures carry their depth in the name",
        low=1,
    )
    denoise: str = _field("cbam", "denoising blocks of the osdn_ architectures", ("cbam", "nonlocal", "none"))
    places: str = _field(
        "", "where they are, comma-separated: 0 = after the stem, 1, 2, ... = after that stage; empty = everywhere"
    )
    head: str = _field(
        "dense",
        "last layer: dense and trained, or frozen orthonormal axes whose absolute cosines are the logits (dfa)",
        ("dense", "orthogonal"),
    )
    path: str = _field("", "your own Keras classifier (.keras, .h5 or SavedModel folder) to fine-tune instead")
    pooling_layer: str = _field("", "name of its global pooling layer, where it cannot be found")
    logits_layer: str = _field("", "name of its last dense layer, where it cannot be found")


@dataclasses.dataclass(frozen=True)
class Attack:
    """The threat model, and the attack that adversarial training crafts with."""

    name: str = _field("pgd", "training attack, an objective attack of ATTACKS")
    norm: str = _field("linf", "norm of the perturbation", ("linf", "l2"))
    epsilon: float = _field(8 / 255, "radius of the ball, images in [0, 1]; fractions such as 8/255 are read", low=0)
    steps: int = _field(0, "gradient steps; 0 = the attack's own default (pgd 10, fgsm and fgsm_rs 1)", low=0)
    step_size: float = _field(0.0, "length of a step; 0 = the attack's own default (pgd 2.5 epsilon / steps)", low=0)
    random_start: bool = _field(True, "start from a random point of the ball (pgd)")
    objective: str = _field(
        "", "loss that the attack maximises, a key of OBJECTIVES; empty = the method's own (trades: kl_divergence)"
    )
    warmup_epochs: float = _field(0.0, "epochs on clean images before the attack starts", low=0)
    ramp_epochs: float = _field(0.0, "epochs over which epsilon then rises linearly to its value", low=0)


@dataclasses.dataclass(frozen=True)
class Defense:
    """The method."""

    name: str = _field("standard", "training method, a key of DEFENSES")
    preset: str = _field(
        "recommended",
        "recommended settings, released (the behaviour of the authors' release), or a variant of the method's own "
        "(agkd_bml_few: 2 steps, agkd_bml_7: 7)",
    )
    label_smoothing: float = _field(
        0.0,
        "label mass that is spread evenly, in [0, 1); 0 = the method's own (agkd_bml and its teacher 0.5 over the "
        "others, else none), -1 = none",
        low=-1,
        high=1,
    )
    smoothing_over: str = _field(
        "all", "classes that it is spread over: all, or the others than the label", ("all", "others")
    )
    beta: float = _field(0.0, "weight of the divergence; 0 = the method's own (trades 6, mart 5)", low=0)
    w_cls: float = _field(-1.0, "weight of the cross-entropies of classes; -1 = the method's own (osdn_caml 1)", low=-1)
    w_rot: float = _field(
        -1.0, "weight of telling rotations apart; -1 = the method's own (osdn_caml 1), 0 = none", low=-1
    )
    w_rec: float = _field(-1.0, "weight of the reconstruction error; -1 = the method's own (osdn_caml 1)", low=-1)
    w_kl: float = _field(
        -1.0,
        "weight of learning with a peer; -1 = the method's own (osdn_caml 2), 0 = no peer, as OSDN of 2020",
        low=-1,
    )
    clean_weight: float = _field(
        0.0, "weight of the cross-entropy of clean images, of which osdn_caml trains on none; 0 = none", low=0
    )
    bn_update_on_recompute: bool = _field(
        False, "the peer's targets (osdn_caml) come of a pass in training mode, as the authors' do"
    )
    mix_alpha: float = _field(
        -1.0, "alpha of the Beta distribution that mixes two images; -1 = the method's own (mixup and dfa 1)", low=-1
    )
    mix_per: str = _field("batch", "one mixing weight for each batch, or for each sample of it", ("batch", "sample"))
    noise_std: float = _field(
        -1.0, "noise on what embeddings of mixed images are drawn to; -1 = the method's own (dfa 0.05)", low=-1
    )
    agg_weight: float = _field(-1.0, "weight of the aggregation term; -1 = the method's own (dfa 1)", low=-1)
    agg_reduction: str = _field(
        "mean", "squared distance of embeddings: mean over their dimensions, or sum", ("mean", "sum")
    )
    agg_distance: str = _field("mse", "squared distance of embeddings, or one minus their cosine", ("mse", "cosine"))
    agg_stop: str = _field(
        "target",
        "what aggregation does not move: the mixture of embeddings (target), the mixed image's embedding, or none",
        ("target", "mixed", "none"),
    )
    share_forward: bool = _field(
        True, "embed every image once and look partners up (dfa), instead of passing each pair's images separately"
    )
    teacher: str = _field(
        "",
        "clean teacher of agkd_bml: a .keras or .h5 file, a SavedModel folder of Keras or a published folder; empty = "
        "train one first, in teacher/ of the run directory",
    )
    teacher_epochs: int = _field(0, "epochs of that training; 0 = as many as --train_epochs", low=0)
    init_from_teacher: bool = _field(True, "start from the teacher's weights, for which it must be built alike")
    w_kd: float = _field(-1.0, "weight of the teacher's attention; -1 = the method's own (agkd_bml 1)", low=-1)
    w_bml: float = _field(-1.0, "weight of the triplets; -1 = the method's own (agkd_bml 2)", low=-1)
    w_norm: float = _field(
        -1.0, "weight of squared embeddings beside them; -1 = the method's own (agkd_bml 0.001)", low=-1
    )
    triplet_margin: float = _field(
        -1.0, "by how much farther the negative should be; -1 = the method's own (agkd_bml 0.03)", low=-1
    )
    absolute_angle: bool = _field(True, "opposite embeddings count as equal in triplets")
    bidirectional: bool = _field(True, "attack the image of the most confusing class too, back towards the first one")
    ce_clean: float = _field(0.0, "weight of the cross-entropy of clean images (agkd_bml); 0 = none", low=0)
    ce_backward: float = _field(
        0.0, "weight of the cross-entropy of the images attacked backward (agkd_bml); 0 = none", low=0
    )
    mart_beta: float = _field(
        0.0, "weight of the divergence of MART's term beside agkd_bml, 6 in its release; 0 = no such term", low=0
    )
    attn_power: float = _field(1.0, "power of the features that an attention map sums, at least 1", low=1)
    attn_norm: str = _field("minmax", "how attention maps are made comparable", ("minmax", "l2"))
    attn_p: float = _field(1.0, "power of the distance of attention maps, at least 1", low=1)
    attn_layers: str = _field(
        "", "layers whose attention is compared, comma-separated, in both networks; empty = what enters global pooling"
    )
    bank_limit_mb: int = _field(
        2048, "megabytes that the training images by class (agkd_bml) may take in the memory of a process", low=1
    )
    bank_per_class: int = _field(
        0, "training images of each class to draw from, chosen by the seed; 0 = all; else at least 2", low=0
    )
    classifier: str = _field(
        "",
        "classifier that cafd or atop defends: a .keras or .h5 file, a SavedModel folder of Keras or a published "
        "folder; empty = train one first, as the backbone flags describe it, in classifier/ of the run directory",
    )
    classifier_epochs: int = _field(0, "epochs of that training; 0 = as many as --train_epochs", low=0)
    lam_f: float = _field(-1.0, "weight of the features; -1 = the method's own (cafd 1000)", low=-1)
    lam_w: float = _field(
        -1.0, "weight of the predicted class's weights beside them; -1 = the method's own (cafd 0.001)", low=-1
    )
    lam_a: float = _field(
        -1.0, "weight of the critic's judgement; -1 = the method's own (cafd 0.005), 0 = no critic", low=-1
    )
    lam_p: float = _field(0.0, "weight of the pixels of denoised images (cafd)", low=0)
    weight_term: str = _field(
        "soft",
        "weights of the predicted class: their mean under the softmax, those of the class of the highest logit, which "
        "have no gradient, or one term of features times weights",
        ("soft", "hard", "joint"),
    )
    temperature: float = _field(1.0, "of that softmax, above 0", low=0)
    feature_layer: str = _field(
        "",
        "layer of the classifier whose features cafd compares; empty = what enters global pooling, last_conv = the "
        "last convolution",
    )
    legacy_cam: bool = _field(False, "CAFA compares features of a whole batch together, as its authors' code does")
    legacy_stride: bool = _field(False, "the denoiser halves the side on its way up too, as its authors' code does")
    dynamic: bool = _field(False, "attack at each step, through the denoiser, not once before training (cafd)")
    clean_fraction: float = _field(0.0, "chance of an image to come unattacked (cafd), in [0, 1)", low=0, high=1)
    reset_each_epoch: bool = _field(False, "optimizers forget their moments at each epoch (cafd)")
    coupled_decay: float = _field(
        -1.0, "decay of kernels by their gradients; -1 = the method's own (cafd 0.0002), 0 = none", low=-1
    )
    denoiser_width: int = _field(64, "channels of the first stage of cafd's denoiser", low=1)
    critic_width: int = _field(32, "channels of the first stage of the critic (cafd, atop)", low=1)
    crafted: str = _field(
        "", "folder of the images that cafd attacks once before training; empty = crafted/ of the run directory"
    )
    crafted_examples: int = _field(
        0, "training images, chosen by the seed, that are attacked and trained on then; 0 = all", low=0
    )
    rt: int = _field(
        2,
        "random transform before atop's purifier: 1 = blocks left out, 2 = noise and blocks left out, 3 = noise and "
        "every block left out in turn, 0 = none",
        low=0,
        high=3,
    )
    sigma: float = _field(0.25, "standard deviation of its noise, images in [0, 1]", low=0)
    missing_rate: float = _field(0.25, "share of blocks that it leaves out, in [0, 1)", low=0, high=1)
    block_size: int = _field(
        0, "pixels along the side of a block, which must divide the image; 0 = an eighth of its side", low=0
    )
    masks: int = _field(4, "passes of the third transform, which share the blocks", low=2)
    mask_scope: str = _field(
        "image", "leave out other blocks of each image, or of each batch as atop's authors do", ("image", "batch")
    )
    purifier: str = _field(
        "",
        "purifier that atop tunes: a .keras file, run directory or published folder of atop, or a Keras model from "
        "[image, mask] to coarse and refined; empty = pre-train one first, in purifier/ of the run directory",
    )
    purifier_name: str = _field("gated_unet", "its architecture, a key of PURIFIERS")
    purifier_width: int = _field(0, "its width; 0 = the architecture's own", low=0)
    pretrain_epochs: int = _field(-1, "epochs of that training; -1 = as many as --train_epochs, 0 = none", low=-1)
    attack_through: str = _field(
        "pipeline",
        "what atop's training attacks: the classifier alone, the whole pipeline under one draw of noise, or "
        "(pipeline-eot) the mean over --defense_eot_draws",
        ("classifier", "pipeline", "pipeline-eot"),
    )
    eot_draws: int = _field(2, "draws of pipeline-eot", low=1)
    share_noise: bool = _field(True, "atop's update takes the noise that its attack saw, not another draw")
    lam_ce: float = _field(
        -1.0,
        "weight of the cross-entropy through the classifier; -1 = the method's own (atop 0.1), 0 = pre-train atop's "
        "purifier, and no more",
        low=-1,
    )
    lam_l1: float = _field(-1.0, "weight of the distance of pixels; -1 = the method's own (atop 2)", low=-1)
    lam_gan: float = _field(
        -1.0, "weight of the critic's judgement; -1 = the method's own (atop 0.01), 0 = no critic", low=-1
    )
    recon_input: str = _field("adv", "images that atop learns to restore: attacked or clean ones", ("adv", "clean"))
    recon_target: str = _field("clean", "what they should be restored to", ("clean", "adv"))
    votes: int = _field(1, "draws whose mean probabilities are atop's answer", low=1)
    validation_draws: int = _field(8, "draws over which atop's validation attack follows the mean", low=1)
    awp_gamma: float = _field(
        0.0, "adversarial weight perturbation relative to each kernel's norm, 0.005 for instance; 0 = none", low=0
    )


@dataclasses.dataclass(frozen=True)
class Train:
    """How it is optimised."""

    epochs: int = _field(10, "epochs, passes over the training images unless --train_steps_per_epoch cuts them", low=1)
    steps_per_epoch: int = _field(
        0, "steps after which to validate and write a checkpoint; 0 = a pass over the training images", low=0
    )
    batch_size: int = _field(128, "images per step, over all replicas", low=1)
    optimizer: str = _field("sgd", "optimizer", ("sgd", "adam"))
    learning_rate: float = _field(0.1, "learning rate, the highest one of a schedule", low=0)
    schedule: str = _field(
        "triangular",
        "learning rate over the run; triangular rises to its middle and falls to 0, cosine falls to 0 from the start",
        ("constant", "cosine", "step", "triangular"),
    )
    drops: str = _field("0.5,0.75", "shares of the run after which the schedule step lowers the rate")
    drop_factor: float = _field(0.1, "what the rate is multiplied by at each of --train_drops", low=0, high=1)
    ema_decay: float = _field(
        0.0, "decay per step of an average of the weights that is validated and exported; 0 = none", low=0, high=1
    )
    precision: str = _field(
        "float32",
        "what layers compute in while training; evaluation and export are float32",
        ("float32", "mixed_bfloat16", "mixed_float16"),
    )
    jit_compile: bool = _field(False, "compile the training step with XLA (slower on a CPU)")
    momentum: float = _field(0.9, "momentum of sgd", low=0, high=1)
    weight_decay: float = _field(5e-4, "decoupled decay of kernels, times the learning rate, per step", low=0)
    seed: int = _field(0, "seed of weights, order, augmentation and attacks", low=0, high=SEEDS)
    strategy: str = _field(
        "mirrored",
        "mirrored over all visible GPUs (or the CPU), multi_worker over the machines in TF_CONFIG, or none",
        ("mirrored", "multi_worker", "none"),
    )
    resume: str = _field(
        "auto",
        "auto goes on where the run directory stands, if its configuration is the same; always, whatever it is; "
        "never begins anew",
        ("auto", "always", "never"),
    )
    validate_every: int = _field(1, "epochs from one validation to the next", low=1)
    validation_steps: int = _field(
        10, "PGD steps of the validation attack (it selects the best epoch, but of standard)", low=1
    )
    guard: bool = _field(True, "stop on catastrophic overfitting and restore the best epoch")


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """How it is measured."""

    suite: str = _field("standard", "attacks to run, a key of SUITES")
    model: str = _field(
        "",
        "evaluate this model instead of the run's: a .keras or .h5 file, a SavedModel folder, or a published folder",
    )
    endpoint: str = _field(
        "",
        "attack the model that a server serves, from outside, instead: grpc://host:port or http://host:port, each "
        "perhaps with /model; with --evaluate_suite=blackbox",
    )
    endpoint_queries: int = _field(
        1000, "passes that each attack may spend on an image of an endpoint, its scoring aside", low=10
    )
    outputs: str = _field(
        "logits",
        "what --evaluate_model returns; probabilities are turned into logits, where its last layer allows exactly",
        ("logits", "probabilities"),
    )
    surrogates: str = _field(
        "", "other models, comma-separated, on which transfer attacks look (adaptive, blackbox, gap)"
    )
    preprocessor: str = _field(
        "",
        "something to put in front of the model: a Keras model (.keras) from images in [0, 1] to images of the same "
        "shape in [0, 1], or jpeg or total_variance of the adversarial-robustness-toolbox; empty = nothing",
    )
    examples: int = _field(1000, "test images, from the first on; 0 = all", low=0)
    norm: str = _field("", "norm of the evaluation attacks; empty = the one the model was made for", ("", "linf", "l2"))
    epsilon: float = _field(0.0, "radius of the evaluation attacks; 0 = the one the model was made for", low=0)
    chunk_size: int = _field(256, "images attacked at once; results do not depend on it beyond rounding", low=1)
    block: int = _field(
        0,
        "images that go through all attacks before the next ones come, and that a worker of a pipeline gets at once; "
        "results do not depend on it beyond rounding; 0 = as many as memory allows (pipelines: --evaluate_chunk_size)",
        low=0,
    )
    seed: int = _field(0, "seed of the evaluation attacks", low=0, high=SEEDS)
    alone: bool = _field(False, "run every attack on all images, also where the suite spares those that have fallen")
    minutes: float = _field(
        0.0,
        "stop after so many minutes of attacks and report an upper bound; the same command goes on; 0 = never",
        low=0,
    )
    resume: str = _field(
        "auto",
        "auto goes on with an evaluation that was stopped, if it is the same; never begins anew",
        ("auto", "never"),
    )
    sanity_examples: int = _field(
        128, "test images for the sanity battery and the security curve, from the first on; 0 = neither", low=0
    )
    long_examples: int = _field(
        128,
        "test images, from the first on, for the long attacks on models that draw at random, R3, R4 and R5 of their "
        "protocol, and for --evaluate_unseen; 0 = all",
        low=0,
    )
    open_set: bool = _field(
        False, "measure detectors on the unknown classes that --data_open_set_split leaves, also under attack"
    )
    ood: str = _field(
        "",
        "sets of other images to measure detectors on, comma-separated: TFDS names, folders of images, .npz files with "
        "an array images; near:SET and far:SET say which mean a set goes into",
    )
    score_examples: int = _field(
        300,
        "known and as many unknown test images (of held-out classes, else of the first set of --evaluate_ood) whose "
        "score is attacked, from the first on; 0 = none",
        low=0,
    )
    score_steps: int = _field(100, "steps of the attacks on the anomaly score", low=1)
    score_starts: int = _field(1, "starts of the attacks on the anomaly score", low=1)
    score_queries: int = _field(0, "queries of Square on the anomaly score as well; 0 = none", low=0)
    joint: bool = _field(
        True, "also look for known images that are mistaken and accepted: robust accuracy with a reject option"
    )
    internals: int = _field(
        0,
        "test images, from the first on, on which to measure what goes on inside the model under PGD-20: noise in its "
        "features, how flat its loss is, how compact its embedding, what its method claims; 0 = none",
        low=0,
    )
    nonadaptive: int = _field(
        0,
        "test images, from the first on, on which to measure the mean accuracy over FGSM, BIM, PGD-40, CW and DeepFool "
        "at common defaults, which know nothing of the defense and so are no measure of robustness; 0 = none",
        low=0,
    )
    oblivious: int = _field(
        0,
        "test images, from the first on, on which to measure attacks on the classifier alone, by one who does not know "
        "of what stands in front (a denoiser, --evaluate_preprocessor), and so no measure of robustness; 0 = none",
        low=0,
    )
    oblivious_attacks: str = _field(
        "",
        "which of them, comma-separated: pgd40, pgd40_targeted, cw_l2, ddn, st_adv, ti_dim, cafa, autoattack; empty = "
        "all",
    )
    unseen: bool = _field(False, "also measure on corrupted images and after StAdv, which are outside every ball")
    card: bool = _field(False, "write the figures to the card of the published folder that --evaluate_model names")


@dataclasses.dataclass(frozen=True)
class Detector:
    """Detectors of unknown images, and the reject option that they make."""

    name: str = _field(
        "",
        "detectors to fit, comma-separated keys of DETECTORS, or all; empty = none, or max_logit,mahalanobis,openmax "
        "where --evaluate_open_set or --evaluate_ood ask for some",
    )
    retention: float = _field(
        0.95, "share of validation images of known classes that the threshold accepts, in (0, 1)", low=0, high=1
    )
    fit_on: str = _field(
        "clean",
        "images that detectors are fitted on; adv: after PGD-10 in the ball that the model was made for",
        ("clean", "adv", "both"),
    )
    fit_examples: int = _field(
        50_000, "training images that detectors are fitted on, from the first on; 0 = all", low=0
    )


@dataclasses.dataclass(frozen=True)
class Export:
    """What is written for users of the model."""

    version: int = _field(0, "number of the SavedModel version folder; 0 = one above the highest there", low=0)
    detector: str = _field(
        "", "detector whose score and threshold the exported model holds; empty = the first of --detector_name"
    )
    optimizer: bool = _field(True, "keep the optimizer's slots in model.keras, to train on")
    dir: str = _field(
        "",
        "publish there, as saved_models/NAME: version, model, card, outcomes; empty = saved_model/ of the run",
    )
    published: str = _field(
        "",
        "export the model of this published folder anew, from what it holds: its model.keras, card and detector; into "
        "--export_dir, or empty = as its next version",
    )
    diagnostics: bool = _field(
        False,
        "also export the signatures denoise, the purified image (models that purify images), and diagnose, which takes "
        "seeds (models that draw at random); whoever calls them sees what the defense makes of an image, and chooses "
        "the noise",
    )


@dataclasses.dataclass(frozen=True)
class Gate:
    """What a model must show before a pipeline pushes it, beside a clean sanity battery and no loss that is sure."""

    clean_accuracy: float = _field(
        0.0, "least lower 95 % bound of clean accuracy, in (0, 1); 0 = not asked", low=0, high=1
    )
    robust_accuracy: float = _field(
        0.0, "least lower 95 % bound of robust accuracy, in (0, 1); a pipeline needs one", low=0, high=1
    )
    auroc: float = _field(
        0.0,
        "least lower 95 % bound of the exported detector's AUROC, in (0, 1), unknown images against clean known ones; "
        "0 = not asked",
        low=0,
        high=1,
    )
    label_shift: float = _field(
        0.1,
        "most that the shares of all classes together may differ between training and evaluation images: the total "
        "variation distance, half the sum of absolute differences",
        low=0,
        high=1,
    )


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: everything that `python -m kerasdefense.run` needs."""

    mode: str = _field("all", "what to do", ("all", "train", "evaluate", "export", "compare", "trials", "verify"))
    runs: str = _field(
        "", "run directories (and published models) to compare, sum up or verify, as plain arguments or comma-separated"
    )
    run_dir: str = _field("", "folder of the run; empty = runs/<folder>/<name> of the last flag file")
    dry_run: bool = _field(False, "print the resolved configuration and the parameter counts, and stop")
    strict: bool = _field(False, "exit with code 3 where the sanity battery or a verification fails")
    progress: bool = _field(True, "show progress bars")
    data: Data = Data()
    backbone: Backbone = Backbone()
    attack: Attack = Attack()
    defense: Defense = Defense()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    detector: Detector = Detector()
    export: Export = Export()
    gate: Gate = Gate()
