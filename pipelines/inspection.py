"""One pass of Beam over the examples of a split: labels are counted, and every image is decoded as training does."""

from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import apache_beam as beam
import tensorflow as tf

from kerasdefense.data.headers import read_header
from kerasdefense.data.records import ImageShape, decode, first_line
from kerasdefense.types import InputError

NAMED = 5
"""Examples that are named of each defect, those of the lowest numbers."""


@dataclasses.dataclass
class Inspected:
    """What was found of a split.

    Attributes:
        examples: how many it has.
        label: how often each label occurs, right or wrong.
        defects: by (feature, what is wrong), how many examples have it.
        named: by the same, at most `NAMED` of their numbers, ascending; -1 where an example has none.
    """

    examples: int = 0
    label: Counter = dataclasses.field(default_factory=Counter)
    defects: Counter = dataclasses.field(default_factory=Counter)
    named: dict[tuple[str, str], list[int]] = dataclasses.field(default_factory=dict)

    def add(self, other: Inspected) -> Inspected:
        """Add to this what was found of other examples, and return it."""
        self.examples += other.examples
        self.label.update(other.label)
        self.defects.update(other.defects)
        for defect, numbers in other.named.items():
            self.named[defect] = sorted([*self.named.get(defect, []), *numbers])[:NAMED]
        return self


class Inspect(beam.DoFn):
    """Look at each example for itself.

    Args:
        image_shape: (height, width, channels) that every image must have.
        labels: lowest and highest label.
    """

    def __init__(self, image_shape: ImageShape, labels: tuple[int, int]):
        self.image_shape = image_shape
        self.labels = labels

    def process(self, record: bytes) -> Iterator[Inspected]:
        """Yield what was found of one serialized tf.Example."""
        found = Inspected(examples=1)
        feature = tf.train.Example.FromString(record).features.feature
        number, defects = _one(feature, "index", "int64_list")
        label, of_label = _one(feature, "label", "int64_list")
        image, of_image = _one(feature, "image", "bytes_list")
        if not of_label:
            found.label[label] = 1
            low, high = self.labels
            if not low <= label <= high:
                allowed = f"{low}..{high}" if low < high else f"{low}"
                of_label = [("label", f"label {label} is outside {allowed}")]
        of_image = of_image or self._defects(image)
        yield _with(found, [*defects, *of_label, *of_image], -1 if number is None else number)

    def _defects(self, image: bytes) -> list[tuple[str, str]]:
        try:
            header = read_header(io.BytesIO(image), "image")
            decode(image, self.image_shape, resize=False)
        except InputError as error:
            reason = str(error).partition(": ")[2]
            return [("image", "not a readable image" if reason.startswith("not a readable") else reason)]
        except tf.errors.OpError as error:
            return [("image", f"cannot be decoded: {first_line(error)}")]
        height, width, channels = self.image_shape
        defects = []
        if (header.height, header.width) != (height, width):
            defects.append(("image", f"is {header.height}x{header.width} instead of {height}x{width} pixels"))
        if (3 if header.colour else 1) != channels:
            defects.append(("image", f"is {'in colour' if header.colour else 'grey'}, with {channels} channels wanted"))
        return defects


class Sum(beam.CombineFn):
    """Add up what `Inspect` found of examples."""

    def create_accumulator(self) -> Inspected:
        """Return the sum of nothing."""
        return Inspected()

    def add_input(self, accumulator: Inspected, found: Inspected) -> Inspected:
        """Add one example."""
        return accumulator.add(found)

    def merge_accumulators(self, accumulators: Iterable[Inspected]) -> Inspected:
        """Add up sums."""
        total = Inspected()
        for each in accumulators:
            total.add(each)
        return total

    def extract_output(self, accumulator: Inspected) -> Inspected:
        """Return the sum."""
        return accumulator


def inspect(pipeline: beam.Pipeline, split: str, files: str, target: str, look: Inspect) -> None:
    """Add to a pipeline the inspection of a split, which writes what it finds as JSON.

    Args:
        pipeline: runs when its `with` block ends.
        split: name of the split.
        files: pattern of its TFRecord files.
        target: file to write, which `read` reads.
        look: looks at each example.
    """
    _ = (
        pipeline
        | f"Read {split}" >> beam.io.ReadFromTFRecord(files)
        | f"Inspect {split}" >> beam.ParDo(look)
        | f"Sum {split}" >> beam.CombineGlobally(Sum())
        | f"ToJSON {split}" >> beam.Map(to_json)
        | f"Write {split}" >> beam.io.WriteToText(target, shard_name_template="")
    )


def to_json(found: Inspected) -> str:
    """Return JSON of what was found."""
    defects = [[*defect, count, found.named[defect]] for defect, count in sorted(found.defects.items())]
    return json.dumps({"examples": found.examples, "label": sorted(found.label.items()), "defects": defects})


def read(path: str) -> Inspected:
    """Return what `inspect` wrote to a file, which may be remote."""
    with tf.io.gfile.GFile(path) as file:
        content = json.loads(file.read())
    return Inspected(
        content["examples"],
        Counter(dict(content["label"])),
        Counter({(feature, what): count for feature, what, count, _ in content["defects"]}),
        {(feature, what): named for feature, what, _, named in content["defects"]},
    )


def _one(feature: Any, name: str, kind: str) -> tuple[Any, list[tuple[str, str]]]:
    """Return the one value of a feature, or None and what is wrong with it."""
    values: Sequence[Any] = getattr(feature[name], kind).value if name in feature else ()
    if len(values) == 1:
        return values[0], []
    other = feature[name].WhichOneof("kind") if name in feature else None
    if other not in (None, kind):
        return None, [(name, f"has a {other} instead of an {kind}")]
    return None, [(name, f"has {len(values)} values instead of one" if len(values) else "has no value")]


def _with(found: Inspected, defects: list[tuple[str, str]], number: int) -> Inspected:
    found.defects.update(defects)
    found.named.update({defect: [number] for defect in defects})
    return found
