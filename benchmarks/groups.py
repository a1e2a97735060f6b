"""What is measured: groups of cases, each with a table and limits of its own."""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, NamedTuple, Union

from benchmarks.agkd_floor import agkd_floor
from benchmarks.atop_floor import atop_floor
from benchmarks.attack_case import AttackCase
from benchmarks.attacks import EVALUATION, measure_attack, rows_of_attack
from benchmarks.cafd_floor import cafd_floor
from benchmarks.case import Case
from benchmarks.checkpoint import measure_checkpoint
from benchmarks.dfa_floor import dfa_floor
from benchmarks.osdn_floor import osdn_floor
from benchmarks.peers import peers
from benchmarks.serving import (
    BATCH_SIZE_COLUMNS,
    PATH,
    SIGNATURE_COLUMNS,
    ServingCase,
    measure_batch_sizes,
    measure_signatures,
    rows_of_batch_sizes,
    rows_of_signatures,
)
from benchmarks.tables import Column, Row
from benchmarks.training_step import Measurement, measure, mirrored, mirrored_and_none

EPOCH = 200
"""Steps from one checkpoint to the next."""
AWP, EMA = {"awp_gamma": 0.005}, {"ema_decay": 0.999}


class Group(NamedTuple):
    """Cases that are measured alike.

    Attributes:
        kind: "training", "attacks" or "serving".
        title: of the table; `{case}` is the model of the first case, `{steps}` the steps of its attack.
        columns: of the table, with their limits.
        cases: what is measured, Cases, AttackCases or ServingCases.
        quick_cases: what is measured to see that it works.
        measure: returns times and retraces of a case in so many rounds.
        name: returns the name of a case's rows.
        rows: returns the figures of a case.
        reference: the contender by whose times a busy machine is told.
    """

    kind: str
    title: str
    columns: tuple[Column, ...]
    cases: tuple[Any, ...]
    quick_cases: tuple[Any, ...]
    measure: Callable[[Any, int], Measurement]
    name: Callable[[Any], str]
    rows: Callable[[Any, Measurement], list[Row]]
    reference: str


def measure_with_peers(case: Case, rounds: int) -> Measurement:
    """Time the floor, ours under both strategies, and other libraries."""
    return measure(case, rounds, strategies=mirrored_and_none(), others=peers(case))


def measure_control(case: Case, rounds: int) -> Measurement:
    """Time the floor, and ours under the strategy that users train under."""
    return measure(case, rounds, strategies=mirrored())


def measure_osdn(case: Case, rounds: int) -> Measurement:
    """Time what `measure_control` does, against the floor of OSDN-CAML."""
    return measure(case, rounds, strategies=mirrored(), make_floor=osdn_floor)


def measure_dfa(case: Case, rounds: int) -> Measurement:
    """Time what `measure_control` does, against the floor of DFA."""
    return measure(case, rounds, strategies=mirrored(), make_floor=dfa_floor)


def measure_agkd(case: Case, rounds: int) -> Measurement:
    """Time what `measure_control` does, against the floor of AGKD-BML."""
    return measure(case, rounds, strategies=mirrored(), make_floor=agkd_floor)


def measure_cafd(case: Case, rounds: int) -> Measurement:
    """Time what `measure_control` does, against the floor of CAFD."""
    return measure(case, rounds, strategies=mirrored(), make_floor=cafd_floor)


def measure_atop(case: Case, rounds: int) -> Measurement:
    """Time what `measure_control` does, against the floor of AToP."""
    return measure(case, rounds, strategies=mirrored(), make_floor=atop_floor)


def rows_of_steps(case: Case, measurement: Measurement) -> list[Row]:
    """Return the figures of a case, one row per strategy, against the floor."""
    timing = measurement.timing
    return [
        {
            "steps": case.steps,
            "strategy": strategy,
            "floor_ms": timing.milliseconds("floor"),
            "ours_ms": timing.milliseconds(strategy),
            "over_floor": timing.ratio(strategy, "floor"),
            "over_floor_processor": timing.processor_ratio(strategy, "floor"),
            "images_per_second": 1000 * case.batch_size / timing.milliseconds(strategy),
            "retraces": retraces,
        }
        for strategy, retraces in measurement.retraces.items()
    ]


def rows_with_peers(case: Case, measurement: Measurement) -> list[Row]:
    """Return the figures of a case; `times_...` is how many times as long the others take."""
    rows = []
    for row in rows_of_steps(case, measurement):
        times = {name: measurement.timing.ratio(name, row["strategy"]) for name in measurement.timing.seconds}
        others = {
            "times_cleverhans": times["cleverhans"],
            "times_art": times.get("ART"),
            "times_art_whole_batches": times.get("ART, whole batches", times.get("ART")),
        }
        rows.append({**row, **others})
    return rows


def rows_of_checkpoint(case: Case, measurement: Measurement) -> list[Row]:
    """Return what a checkpoint takes, in itself and as a share of the steps from one to the next."""
    timing = measurement.timing
    return [
        {
            "strategy": strategy,
            "ours_ms": timing.milliseconds(strategy),
            "checkpoint_ms": timing.milliseconds("checkpoint"),
            "checkpoint_share": timing.ratio("checkpoint", strategy) / EPOCH,
            "retraces": retraces,
        }
        for strategy, retraces in measurement.retraces.items()
    ]


def model_name(case: Case) -> str:
    """Return the name of a case by its model."""
    return case.model_name


def defense_name(case: Case) -> str:
    """Return the name of a case by its defense."""
    return case.defense_name


def defense_and_attack_name(case: Case) -> str:
    """Return the name of a case by its defense and the attack that this crafts with."""
    return f"{case.defense_name}, PGD-{case.steps}"


def own_name(case: Union[AttackCase, ServingCase]) -> str:
    """Return the name that a case has: its attack, or its detector."""
    return case.name


FLOOR_MS, OURS_MS = Column("floor ms", "floor_ms", ".1f"), Column("ours ms", "ours_ms", ".1f")
PROCESSOR = Column("(CPU time)", "over_floor_processor", ".2f")
IMAGES = Column("images/s", "images_per_second", ".0f")
RETRACES = Column("retraces", "retraces", "d", at_most=0)


def against_floor(at_most: float) -> tuple[Column, ...]:
    """Return the columns of steps that may take so many times as long as their floor."""
    return (
        FLOOR_MS,
        OURS_MS,
        Column("ours/floor", "over_floor", ".2f", at_most=at_most),
        PROCESSOR,
        IMAGES,
        RETRACES,
    )


def times(library: str, at_least: float) -> tuple[Column, Column]:
    """Return the columns that say how many times as long another library takes."""
    key = f"times_{library.lower()}"
    return Column(f"x {library}", key, ".2f", at_least=at_least), Column("(CPU time)", f"{key}_processor", ".2f")


RESNET = Case("resnet8", width=16, image_shape=(32, 32, 3), batch_size=128)
SMALL_CNN = Case("small_cnn", width=16, image_shape=(28, 28, 1), batch_size=32)
TINY_CNN = Case("small_cnn", width=4, image_shape=(8, 8, 1), batch_size=4)
CONTROLS = (
    {"defense": "standard", "steps": 0},
    {"defense": "fgsm_rs", "steps": 1},
    {"defense": "pgd_at", "steps": 3},
    {"defense": "trades", "steps": 3},
    {"defense": "mart", "steps": 3},
    {"defense": "pgd_at", "steps": 3, **AWP},
    {"defense": "trades", "steps": 3, **AWP},
)
OSDN = dataclasses.replace(RESNET, backbone="osdn_resnet8", defense="osdn_caml")
AGKD = dataclasses.replace(RESNET, defense="agkd_bml")
ATOP = dataclasses.replace(RESNET, defense="atop", denoiser_width=20)
CAFD = dataclasses.replace(RESNET, defense="cafd", steps=0)
DFA = dataclasses.replace(RESNET, head="orthogonal", defense="dfa", steps=0)
SERVED = dataclasses.replace(RESNET, batch_size=32)
SERVING_CASES = (ServingCase(SERVED), ServingCase(SERVED, detector="mahalanobis"))
QUICK_SERVING_CASES = (ServingCase(TINY_CNN, detector="mahalanobis"),)

GROUPS = (
    Group(
        kind="training",
        title="A training step with PGD-{steps}",
        columns=(
            FLOOR_MS,
            OURS_MS,
            Column("ours/floor", "over_floor", ".2f", at_most=1.10),
            PROCESSOR,
            IMAGES,
            Column("x cleverhans", "times_cleverhans", ".2f", at_least=1.0),
            Column("x ART", "times_art", ".2f", at_least=2.0),
            Column("(whole batches)", "times_art_whole_batches", ".2f"),
            RETRACES,
        ),
        cases=tuple(
            dataclasses.replace(case, batch_size=batch_size) for case in (RESNET, SMALL_CNN) for batch_size in (32, 128)
        ),
        quick_cases=(dataclasses.replace(SMALL_CNN, steps=3),),
        measure=measure_with_peers,
        name=model_name,
        rows=rows_with_peers,
        reference="floor",
    ),
    Group(
        kind="training",
        title="A step of each control ({case})",
        columns=(Column("attack steps", "steps", "d"), *against_floor(at_most=1.15)),
        cases=tuple(dataclasses.replace(RESNET, **each) for each in CONTROLS),
        quick_cases=(dataclasses.replace(SMALL_CNN, width=4, defense="trades", steps=1, **AWP),),
        measure=measure_control,
        name=defense_name,
        rows=rows_of_steps,
        reference="floor",
    ),
    Group(
        kind="training",
        title="A step of OSDN-CAML ({case})",
        columns=against_floor(at_most=1.25),
        cases=(
            dataclasses.replace(OSDN, steps=1),
            dataclasses.replace(OSDN, steps=3),
            dataclasses.replace(OSDN, steps=1, w_kl=0.0),
        ),
        quick_cases=(dataclasses.replace(OSDN, width=4, image_shape=(8, 8, 1), batch_size=32, steps=1),),
        measure=measure_osdn,
        name=defense_and_attack_name,
        rows=rows_of_steps,
        reference="floor",
    ),
    Group(
        kind="training",
        title="A step of DFA ({case})",
        columns=(Column("attack steps", "steps", "d"), *against_floor(at_most=1.15)),
        cases=(
            DFA,
            dataclasses.replace(DFA, share_forward=False),
            dataclasses.replace(DFA, defense="dfa_at", steps=1),
        ),
        quick_cases=(dataclasses.replace(DFA, width=4, image_shape=(8, 8, 1), batch_size=32),),
        measure=measure_dfa,
        name=defense_name,
        rows=rows_of_steps,
        reference="floor",
    ),
    Group(
        kind="training",
        title="A step of AGKD-BML ({case})",
        columns=against_floor(at_most=1.25),
        cases=(dataclasses.replace(AGKD, steps=1), dataclasses.replace(AGKD, steps=3)),
        quick_cases=(dataclasses.replace(AGKD, width=4, image_shape=(8, 8, 1), batch_size=32, steps=1),),
        measure=measure_agkd,
        name=defense_and_attack_name,
        rows=rows_of_steps,
        reference="floor",
    ),
    Group(
        kind="training",
        title="A step of CAFD ({case})",
        columns=(Column("attack steps", "steps", "d"), *against_floor(at_most=1.25)),
        cases=(CAFD, dataclasses.replace(CAFD, dynamic=True, steps=3)),
        quick_cases=(
            dataclasses.replace(
                CAFD, width=4, image_shape=(8, 8, 1), batch_size=32, denoiser_width=2, dynamic=True, steps=1
            ),
        ),
        measure=measure_cafd,
        name=defense_name,
        rows=rows_of_steps,
        reference="floor",
    ),
    Group(
        kind="training",
        title="A step of AToP ({case})",
        columns=against_floor(at_most=1.25),
        cases=(dataclasses.replace(ATOP, steps=1), dataclasses.replace(ATOP, steps=3)),
        quick_cases=(
            dataclasses.replace(ATOP, width=4, image_shape=(8, 8, 1), batch_size=32, denoiser_width=2, steps=1),
        ),
        measure=measure_atop,
        name=defense_and_attack_name,
        rows=rows_of_steps,
        reference="floor",
    ),
    Group(
        kind="training",
        title=f"A checkpoint every {EPOCH} steps ({{case}})",
        columns=(
            OURS_MS,
            Column("checkpoint ms", "checkpoint_ms", ".1f"),
            Column("share of the steps", "checkpoint_share", ".2%", at_most=0.05),
            RETRACES,
        ),
        cases=(
            dataclasses.replace(RESNET, defense="standard", steps=0),
            dataclasses.replace(RESNET, defense="trades", steps=3, **AWP, **EMA),
        ),
        quick_cases=(dataclasses.replace(SMALL_CNN, width=4, steps=1, **AWP, **EMA),),
        measure=measure_checkpoint,
        name=defense_name,
        rows=rows_of_checkpoint,
        reference="checkpoint",
    ),
    Group(
        kind="attacks",
        title="PGD on images that do not fall ({case})",
        columns=(
            OURS_MS,
            IMAGES,
            Column("(one graph ms)", "one_graph_ms", ".1f"),
            *times("cleverhans", 1.0),
            *times("Foolbox", 1.5),
            *times("ART", 1.5),
        ),
        cases=(AttackCase(dataclasses.replace(RESNET, batch_size=64), "pgd", steps=20, rounds=5),),
        quick_cases=(AttackCase(TINY_CNN, "pgd", steps=10, rounds=2),),
        measure=measure_attack,
        name=own_name,
        rows=rows_of_attack,
        reference=EVALUATION,
    ),
    Group(
        kind="attacks",
        title="APGD on the cross-entropy, and Square, on images that do not fall ({case})",
        columns=(OURS_MS, IMAGES, *times("ART", 3.0)),
        cases=(
            AttackCase(dataclasses.replace(RESNET, batch_size=64), "apgd", steps=100, rounds=2),
            AttackCase(dataclasses.replace(RESNET, batch_size=32), "square", steps=1000, rounds=2),
        ),
        quick_cases=(AttackCase(TINY_CNN, "square", steps=200, rounds=2),),
        measure=measure_attack,
        name=own_name,
        rows=rows_of_attack,
        reference=EVALUATION,
    ),
    Group(
        kind="serving",
        title="Signatures of an exported model ({case})",
        columns=SIGNATURE_COLUMNS,
        cases=SERVING_CASES,
        quick_cases=QUICK_SERVING_CASES,
        measure=measure_signatures,
        name=own_name,
        rows=rows_of_signatures,
        reference=PATH,
    ),
    Group(
        kind="serving",
        title="serving_default by the size of batches ({case})",
        columns=BATCH_SIZE_COLUMNS,
        cases=SERVING_CASES,
        quick_cases=QUICK_SERVING_CASES,
        measure=measure_batch_sizes,
        name=own_name,
        rows=rows_of_batch_sizes,
        reference="batch 32",
    ),
)
