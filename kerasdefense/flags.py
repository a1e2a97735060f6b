"""Configuration as absl flags: one dataclass field = one flag = one default = one line of help.

Flags live in a `FlagValues` of their own, so that nothing is read or defined at import. `--flagfile=PATH` may stand in
a flag file too, and is resolved against the file that names it.
"""

from __future__ import annotations

import dataclasses
import difflib
import fractions
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags as absl_flags

from kerasdefense import config
from kerasdefense.attacks import ATTACKS, OBJECTIVES
from kerasdefense.backbones import BACKBONES
from kerasdefense.defenses import DEFENSES
from kerasdefense.detectors import DETECTORS
from kerasdefense.evaluation import SUITES
from kerasdefense.types import UsageError, look_up

CONFIG = "config.cfg"
"""The flag file in a run directory that reproduces the run."""

_REGISTRIES: dict[str, Any] = {
    "attack_name": ATTACKS,
    "attack_objective": OBJECTIVES,
    "backbone_name": BACKBONES,
    "defense_name": DEFENSES,
    "detector_name": DETECTORS,
    "evaluate_suite": SUITES,
    "export_detector": DETECTORS,
}
_OF_RUNS = ("compare", "trials", "verify")
"""Modes that take run directories as plain arguments."""
_LISTS = ("detector_name",)
"""Flags that take several names of their registry, comma-separated, or all."""


class _FractionParser(absl_flags.FloatParser):
    """Reads floats, also as fractions such as 8/255."""

    def convert(self, argument: Any) -> float:
        try:
            return float(fractions.Fraction(argument))
        except (ValueError, ZeroDivisionError, OverflowError) as error:
            raise ValueError(f"{argument!r} is no finite number; write 0.1, 1e-3 or 8/255") from error


def _leaves() -> list[tuple[str, str, dataclasses.Field]]:
    """Return (flag name, section, field) of every leaf field; the section of a field of Run itself is empty."""
    leaves = []
    for field in dataclasses.fields(config.Run):
        if dataclasses.is_dataclass(field.default):
            leaves += [(f"{field.name}_{leaf.name}", field.name, leaf) for leaf in dataclasses.fields(field.default)]
        else:
            leaves.append((field.name, "", field))
    return leaves


def names() -> set[str]:
    """Return the names of all flags."""
    return {name for name, _, _ in _leaves()} | {"flagfile", "verbosity", "help"}


def _define() -> absl_flags.FlagValues:
    values = absl_flags.FlagValues()
    for name, _, field in _leaves():
        help_line, choices = field.metadata["help"], field.metadata["choices"]
        bounds = {"lower_bound": field.metadata["low"], "upper_bound": field.metadata["high"]}
        if choices:
            absl_flags.DEFINE_enum(name, field.default, choices, help_line, flag_values=values)
        elif isinstance(field.default, bool):
            absl_flags.DEFINE_boolean(name, field.default, help_line, flag_values=values)
        elif isinstance(field.default, int):
            absl_flags.DEFINE_integer(name, field.default, help_line, flag_values=values, **bounds)
        elif isinstance(field.default, float):
            serializer = absl_flags.ArgumentSerializer()
            absl_flags.DEFINE(_FractionParser(**bounds), name, field.default, help_line, values, serializer)
        else:
            absl_flags.DEFINE_string(name, field.default, help_line, flag_values=values)
    absl_flags.DEFINE_integer("verbosity", 0, "1 = log what happens and show tracebacks", flag_values=values)
    absl_flags.DEFINE_boolean("help", False, "show this help", short_name="h", flag_values=values)
    return values


def expand_flagfiles(arguments: Sequence[str], base: Path, including: tuple[Path, ...] = ()) -> list[str]:
    """Return the arguments with each `--flagfile=PATH` replaced by what the file holds, nested files included.

    Args:
        arguments: command-line arguments, or the lines of a flag file.
        base: folder against which a relative PATH is resolved.
        including: flag files that are being read, to refuse one that includes itself.
    """
    expanded: list[str] = []
    waiting = False
    for argument in arguments:
        name, separator, value = argument.partition("=")
        if waiting:
            value, waiting = argument, False
        elif name not in ("--flagfile", "-flagfile"):
            expanded.append(argument)
            continue
        elif not separator:
            waiting = True
            continue
        expanded += _read_flagfile(base / Path(value.strip()).expanduser(), including)
    if waiting:
        raise UsageError("--flagfile needs the path of a file: --flagfile=PATH")
    return expanded


def _read_flagfile(path: Path, including: tuple[Path, ...]) -> list[str]:
    path = path.resolve()
    if path in including:
        raise UsageError(f"flag file {path} includes itself")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read flag file {path}: {getattr(error, 'strerror', None) or error}") from error
    kept = [line for line in lines if line and not line.startswith(("#", "//"))]
    for line in kept:
        if not line.startswith("-"):
            raise UsageError(f"flag file {path}: {line!r} is no flag; write --name=value, and # before a comment")
    return expand_flagfiles(kept, path.parent, (*including, path))


def config_name(arguments: Sequence[str]) -> str:
    """Return `<folder>/<stem>` of the last flag file on the command line (digits/pgd_at), or an empty string."""
    for position, argument in reversed(list(enumerate(arguments))):
        name, separator, value = argument.partition("=")
        if name in ("--flagfile", "-flagfile"):
            path = Path(value if separator else arguments[position + 1]).resolve()
            return f"{path.parent.name}/{path.stem}"
    return ""


class HelpRequested(Exception):  # noqa: N818 - nothing went wrong
    """Raised by `parse` for --help; its message is the help text."""


def verbosity(arguments: Sequence[str]) -> int:
    """Return the last `--verbosity=N` on the command line itself, or 0; never fails, so that errors can ask."""
    given = [each.partition("=")[2] for each in arguments if each.lstrip("-").startswith("verbosity=")]
    try:
        return int(given[-1]) if given else 0
    except ValueError:
        return 0


def parse(arguments: Sequence[str]) -> config.Run:
    """Return the run that command-line arguments describe.

    To evaluate or export what a run directory holds, the configuration that it was trained by comes first, and the
    command line overrides it.

    Raises:
        HelpRequested: --help was among them.
        UsageError: an unknown flag, an illegal value, or a name that is in no registry.
    """
    run = _parse(arguments)
    trained_by = Path(run.run_dir) / CONFIG
    if run.mode in ("evaluate", "export") and trained_by.is_file():
        run = _parse([f"--flagfile={trained_by}", *arguments, f"--run_dir={run.run_dir}"])
    return run


def _parse(arguments: Sequence[str]) -> config.Run:
    values = _define()
    try:
        rest = values(["run", *expand_flagfiles(arguments, Path.cwd())], known_only=False)[1:]
    except absl_flags.UnrecognizedFlagError as error:
        raise UsageError(_unknown_flag(error.flagname)) from error
    except absl_flags.Error as error:
        raise UsageError(" ".join(str(error).split())) from error
    if values["help"].value:
        raise HelpRequested(_help(values))
    if rest and values["mode"].value not in _OF_RUNS:
        raise UsageError(f"unexpected argument {rest[0]!r}; flags are written --name=value")
    if rest:
        values["runs"].value = ",".join(filter(None, [values["runs"].value, *rest]))
    for name, registry in _REGISTRIES.items():
        given = values[name].value
        if name in _LISTS:
            names = [] if given in ("", config.ALL) else given.split(",")
        else:
            names = [given] if given or values[name].default else []
        for each in names:
            look_up(registry, each, name.replace("_name", "").replace("_", " "))
    run = _to_run({name: values[name].value for name, _, _ in _leaves()})
    name = _default_name(run)
    run_dir = run.run_dir or Path("runs") / (config_name(arguments) or name)
    return dataclasses.replace(run, run_dir=str(Path(run_dir).expanduser()))


def _default_name(run: config.Run) -> str:
    """Return where under runs/ a run goes whose flags name no file and no directory."""
    if run.mode in _OF_RUNS:
        return run.mode
    if run.mode == "evaluate" and run.evaluate.endpoint:
        name = run.evaluate.endpoint.partition("://")[2].partition("/")[2].strip("/")
        return f"evaluated/{name or 'endpoint'}"
    if run.mode == "evaluate" and run.evaluate.model:
        path = Path(run.evaluate.model).expanduser().resolve()
        place = path.parent if path.suffix or path.name.isdecimal() else path
        return f"evaluated/{place.name}"
    return f"{run.data.name}/{run.defense.name}"


def _to_run(values: dict[str, Any]) -> config.Run:
    sections: dict[str, dict[str, Any]] = {}
    for name, section, field in _leaves():
        sections.setdefault(section, {})[field.name] = values[name]
    types = typing.get_type_hints(config.Run)
    return config.Run(**sections.pop(""), **{name: types[name](**fields) for name, fields in sections.items()})


def to_lines(run: config.Run) -> list[str]:
    """Return the run as the lines of a flag file, one flag per field, defaults included."""
    lines = []
    for name, section, field in _leaves():
        value = getattr(getattr(run, section) if section else run, field.name)
        lines.append(f"--{name}={str(value).lower() if isinstance(value, bool) else value}")
    return lines


def _unknown_flag(flag: str) -> str:
    known = [name for name, _, _ in _leaves()] + ["flagfile", "verbosity", "help"]
    close = difflib.get_close_matches(flag, known, n=1)
    section = flag.partition("_")[0]
    family = [name for name in known if name.startswith(f"{section}_")] or known
    hint = f"did you mean --{close[0]}? " if close else ""
    return f"unknown flag --{flag}; {hint}valid: {', '.join('--' + name for name in family)}"


def _help(values: absl_flags.FlagValues) -> str:
    lines = ["python -m kerasdefense.run --flagfile=configs/digits/pgd_at.cfg [--flag=value ...]", ""]
    lines.append("Train, evaluate, export, compare and verify defended classifiers.")
    section = None
    for name, of_section, field in _leaves():
        if of_section != section:
            section = of_section
            lines += ["", f"{section or 'run'}:"]
        choices = f" ({' | '.join(field.metadata['choices'])})" if field.metadata["choices"] else ""
        if name in _REGISTRIES:
            choices = f" ({' | '.join(sorted(_REGISTRIES[name]))})"
        lines.append(f"  --{name}={values[name].default}\n      {field.metadata['help']}{choices}")
    lines += [
        "",
        "also:",
        "  --flagfile=PATH\n      read flags from a file, one per line; may stand in the file too",
    ]
    lines.append(f"  --verbosity=0\n      {values['verbosity'].help}")
    return "\n".join(lines)
