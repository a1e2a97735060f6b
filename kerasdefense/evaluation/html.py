"""The report for people: one HTML page that needs nothing but itself, made from results.json and a few images.

Every figure on the page stands in results.json; the page adds words, bars and pictures.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import jinja2

from kerasdefense.evaluation.examples import Examples, choose_examples, data_uri
from kerasdefense.evaluation.examples import pictures as pictures_of
from kerasdefense.evaluation.open_set.page import unknown_images
from kerasdefense.evaluation.report import left_by, radius, randomised_rows, suite_words
from kerasdefense.evaluation.suites import SUITES
from kerasdefense.files import write_text

_TEMPLATE = "report.html.j2"
_NORMS = {"linf": "L∞", "l2": "L₂"}
__all__ = ["Examples", "choose_examples", "write_report"]
_OPTIONAL: Mapping[str, Any] = {
    "rounded_accuracy": None,
    "attack_budget": None,
    "cascade": False,
    "complete": True,
    "curve": (),
    "sanity": (),
    "trusted": None,
    "randomised": None,
    "open_set": None,
    "internals": None,
    "nonadaptive": None,
    "oblivious": None,
    "flags": {},
    "indices_sha256": "",
    "adversarial_sha256": "",
    "suite": "",
    "note": "",
    "config": {},
    "versions": {},
    "seed": None,
    "model": None,
}


def write_report(
    path: Path,
    results: Mapping[str, Any],
    *,
    title: str,
    images: Optional[Examples],
    pictures: Optional[Mapping[str, Path]] = None,
) -> None:
    """Write the report of an evaluation, atomically.

    Args:
        path: the .html file.
        results: what results.json holds; blocks that are not there are left out.
        title: what was evaluated.
        images: examples to show, as `choose_examples` returns them; None = none.
        pictures: .png files: of open-set recognition, as "scores" and "roc", and of the model's inside, as "embedding";
            read only if results have that block.
    """
    known, pictures = {**_OPTIONAL, **results}, pictures or {}
    known["threat_model"] = threat = results.get("threat_model") or results["attacks"][0]["threat_model"]
    picture = pictures.get("embedding") if known["internals"] else None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=_percent, interval=_interval, number=_number, plain=_plain, ball=_ball)
    page = environment.get_template(_TEMPLATE).render(
        results=known,
        title=title,
        radius=lambda epsilon: _radius(threat["norm"], epsilon),
        suite_words=_suite_words(known),
        attacks=[{**attack, "left": left_by(attack, known)} for attack in known["attacks"]],
        banners=list(_banners(known)),
        curve=_curve(known["curve"], threat),
        seconds=sum(attack["seconds"] for attack in known["attacks"]),
        randomised=list(randomised_rows(known)),
        examples=[] if images is None else list(pictures_of(images, threat)),
        unknown=unknown_images(known["open_set"], pictures),
        embedding=picture and data_uri(picture.read_bytes()),
        sections=_sections(known["config"]),
    )
    write_text(path, page)


def _suite_words(results: Mapping[str, Any]) -> str:
    """Return what ran, in words."""
    suite = results["suite"]
    return suite_words(suite, is_random=bool(results["flags"].get("randomised"))) if suite in SUITES else ""


class _Banner(NamedTuple):
    kind: str
    heading: str
    words: str
    items: Sequence[Mapping[str, Any]] = ()


def _banners(results: Mapping[str, Any]) -> Iterator[_Banner]:
    """Yield what a reader must know before any figure."""
    ran = [item for item in results["sanity"] if item["status"] != "not_run"]
    if results["trusted"] is False:
        failed = [item for item in ran if item["gates"] and item["status"] == "fail"]
        words = "The evaluation failed checks of itself, so the robust accuracy may be far too high."
        yield _Banner("bad", "Not to be trusted", words, failed)
    if not results["complete"]:
        words = "The time was up before every attack had met every image. True robustness is at most what stands here."
        yield _Banner("warn", "Upper bound: stopped early", words)
    note = _rest_of_note(results)
    if note.startswith("Preliminary"):
        yield _Banner("warn", "Preliminary", note[len("Preliminary") :].lstrip(" ,.:"))
    elif note:
        yield _Banner("plain", "Note", note)
    if not any(item["gates"] for item in ran):
        words = "No check of the evaluation itself has run: nothing here says whether the attacks worked."
        yield _Banner("plain", "Not checked", words)
    elif results["trusted"]:
        yield _Banner("good", "No check failed", "The evaluation passed every gating check that it ran on itself.")


def _rest_of_note(results: Mapping[str, Any]) -> str:
    """Return the note without the sentences that the page says elsewhere, those on preliminary figures first."""
    said = ["Not to be trusted"] if results["trusted"] is False else []
    said += [] if results["complete"] else ["Upper bound"]
    said += [f"Suite {results['suite']}:"] if results["suite"] in SUITES else []
    rest = [each for each in re.split(r"(?<=\.)\s+", results["note"]) if each and not each.startswith(tuple(said))]
    return " ".join(sorted(rest, key=lambda sentence: not sentence.startswith("Preliminary")))


def _curve(points: Sequence[Mapping[str, Any]], threat: Mapping[str, Any]) -> Optional[dict[str, Any]]:
    """Return the security curve in percent of the plot's width and height, or None where there is nothing to draw."""
    epsilons = [point["epsilon"] for point in points]
    if len(set(epsilons)) < 2 or min(epsilons) < 0:
        return None
    first = min(epsilon for epsilon in epsilons if epsilon > 0)
    width = math.log2(1 + max(epsilons) / first)
    dots = []
    for point in sorted(points, key=lambda point: point["epsilon"]):
        low, high = point["ci95"]
        dots.append(
            {
                "left": round(100 * math.log2(1 + point["epsilon"] / first) / width, 2),
                "top": round(100 * (1 - point["value"]), 2),
                "low": round(100 * (1 - low), 2),
                "high": round(100 * (1 - high), 2),
                "marked": math.isclose(point["epsilon"], threat["epsilon"], rel_tol=1e-6),
                "tick": _tick(threat["norm"], point["epsilon"]),
                "point": point,
            }
        )
    return {"dots": dots, "labelled": _labelled(dots), "in_levels": threat["norm"] == "linf"}


def _tick(norm: str, epsilon: float) -> str:
    return f"{round(255 * epsilon, 2):g}" if norm == "linf" else f"{epsilon:.3g}"


def _labelled(dots: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the dots whose radii fit below the axis of a phone: the threat model's, both ends, others."""
    taken: list[Mapping[str, Any]] = []
    for dot in sorted(dots, key=lambda dot: (not dot["marked"], dot["left"] not in (0, 100), -dot["left"])):
        widths = ((len(dot["tick"]) + len(other["tick"])) * 1.25 + 1.5 for other in taken)
        if all(abs(dot["left"] - other["left"]) >= width for other, width in zip(taken, widths)):
            taken.append(dot)
    return taken


def _sections(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the configuration as sections of fields, the fields of the run itself first."""
    sections: dict[str, dict[str, Any]] = {"run": {}}
    for name, value in config.items():
        if isinstance(value, Mapping):
            sections[name] = dict(value)
        else:
            sections["run"][name] = value
    return {name: fields for name, fields in sections.items() if fields}


def _radius(norm: str, epsilon: float) -> str:
    return radius(epsilon) if norm == "linf" else f"{epsilon:.4g}"


def _ball(threat: Mapping[str, Any]) -> str:
    norm = _NORMS.get(threat["norm"], threat["norm"])
    return f"{norm} ball of radius {_radius(threat['norm'], threat['epsilon'])}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def _interval(ci95: Sequence[float]) -> str:
    low, high = ci95
    return f"{100 * low:.1f} to {100 * high:.1f}\N{NO-BREAK SPACE}%"


def _number(value: float) -> str:
    return f"{int(value):,}" if float(value).is_integer() else f"{value:.3g}"


def _plain(value: Any) -> str:
    """Return a setting in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(each)}" for name, each in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value)) or "none"
    if value is None or value == "":
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
