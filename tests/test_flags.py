from __future__ import annotations

import dataclasses
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kerasdefense import config, flags
from kerasdefense.attacks import ATTACKS, OBJECTIVES
from kerasdefense.backbones import BACKBONES
from kerasdefense.defenses import DEFENSES
from kerasdefense.detectors import DETECTORS
from kerasdefense.evaluation import SUITES
from kerasdefense.types import UsageError

REGISTRIES = {
    "attack_name": ATTACKS,
    "attack_objective": OBJECTIVES,
    "backbone_name": BACKBONES,
    "defense_name": DEFENSES,
    "detector_name": DETECTORS,
    "evaluate_suite": SUITES,
    "export_detector": DETECTORS,
}
MAY_BE_EMPTY = ("attack_objective", "detector_name", "export_detector")
OWN = [field for field in dataclasses.fields(config.Run) if not dataclasses.is_dataclass(field.default)]
SECTIONS = [field for field in dataclasses.fields(config.Run) if dataclasses.is_dataclass(field.default)]
FIELDS = {field.name: field for field in OWN}
for _section in SECTIONS:
    FIELDS.update({f"{_section.name}_{field.name}": field for field in dataclasses.fields(_section.default)})


def value_of(run, name):
    if hasattr(run, name):
        return getattr(run, name)
    section, _, field = name.partition("_")
    return getattr(getattr(run, section), field)


def help_text():
    with pytest.raises(flags.HelpRequested) as caught:
        flags.parse(["--help"])
    return str(caught.value)


def other_value(name):
    """Return a legal value of a flag that is not its default, with how it is written."""
    field = FIELDS[name]
    default, choices = field.default, field.metadata["choices"] or tuple(REGISTRIES.get(name, ()))
    if choices:
        value = next(choice for choice in choices if choice != default)
    elif isinstance(default, bool):
        value = not default
    elif isinstance(default, (int, float)):
        highest = field.metadata["high"]
        value = default / 2 if highest is not None and default + 1 > highest else default + 1
    else:
        value = "other"
    return value, str(value).lower() if isinstance(value, bool) else str(value)


def test_defaults_are_those_of_the_dataclasses():
    assert flags.parse([]) == dataclasses.replace(config.Run(), run_dir=os.path.join("runs", "digits", "standard"))


def test_help_lists_each_field_once_with_default_help_and_choices():
    lines = help_text().splitlines()
    listed = [line.strip()[2:].partition("=")[0] for line in lines if line.startswith("  --")]
    assert sorted(listed) == sorted([*FIELDS, "flagfile", "verbosity"])
    for name, field in FIELDS.items():
        position = lines.index(f"  --{name}={field.default}")
        assert field.metadata["help"] in lines[position + 1]
        for choice in field.metadata["choices"] or REGISTRIES.get(name, ()):
            assert choice in lines[position + 1]


def test_every_field_has_a_line_of_help_and_a_legal_default():
    assert len(FIELDS) > 40
    for name, field in FIELDS.items():
        assert field.metadata["help"] and "\n" not in field.metadata["help"]
        choices = field.metadata["choices"] or REGISTRIES.get(name)
        assert not choices or field.default in choices or name in MAY_BE_EMPTY


@pytest.mark.parametrize("name", FIELDS)
def test_flag_sets_its_field_and_no_other(name):
    value, written = other_value(name)
    run = flags.parse([f"--{name}={written}"])
    for each in set(FIELDS) - {"run_dir"}:
        assert value_of(run, each) == (value if each == name else FIELDS[each].default)
    assert type(value_of(run, name)) is type(FIELDS[name].default)
    if name == "run_dir":
        assert run.run_dir == "other"


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.metadata["low"] is not None])
def test_flag_outside_its_range_is_refused(name):
    with pytest.raises(UsageError, match=f"--{name}="):
        flags.parse([f"--{name}={FIELDS[name].metadata['low'] - 1}"])
    if FIELDS[name].metadata["high"] is not None:
        with pytest.raises(UsageError, match=f"--{name}="):
            flags.parse([f"--{name}={FIELDS[name].metadata['high'] + 1}"])


def test_lines_give_an_equal_run_again():
    run = flags.parse([f"--{name}={other_value(name)[1]}" for name in FIELDS])
    assert all(value_of(run, name) != FIELDS[name].default for name in FIELDS)
    lines = flags.to_lines(run)
    assert len(lines) == len(FIELDS)
    assert flags.parse(lines) == run


@given(
    st.floats(0, 1),
    st.floats(1e-30, 1e30),
    st.integers(0, config.SEEDS),
    st.booleans(),
    st.text("ab09_/.=,:~-é", max_size=12),
)
def test_lines_give_equal_numbers_and_paths_again(epsilon, rate, seed, guard, path):
    run = flags.parse(["--run_dir=r"])
    run = dataclasses.replace(
        run,
        attack=dataclasses.replace(run.attack, epsilon=epsilon),
        train=dataclasses.replace(run.train, learning_rate=rate, seed=seed, guard=guard),
        data=dataclasses.replace(run.data, dir=path),
    )
    assert flags.parse(flags.to_lines(run)) == run


def test_run_directory_is_named_after_the_configuration(tmp_path):
    (tmp_path / "digits").mkdir()
    file = tmp_path / "digits" / "mine.cfg"
    file.write_text("--train_epochs=3\n")
    assert flags.parse([f"--flagfile={file}"]).run_dir == os.path.join("runs", "digits", "mine")
    assert flags.parse(["--flagfile", str(file)]).run_dir == os.path.join("runs", "digits", "mine")
    assert flags.parse([f"--flagfile={file}", "--run_dir=here"]).run_dir == "here"
    assert flags.parse(["--defense_name=pgd_at"]).run_dir == os.path.join("runs", "digits", "pgd_at")


@pytest.mark.parametrize(
    "written, value", [("8/255", 8 / 255), ("0.5", 0.5), ("1e-3", 0.001), ("1", 1.0), ("0", 0.0), (" 2/4 ", 0.5)]
)
def test_radius_is_read_as_a_decimal_or_a_fraction(written, value):
    assert flags.parse([f"--attack_epsilon={written}"]).attack.epsilon == value


@pytest.mark.parametrize(
    "written, value",
    [("--guard", None), ("--train_guard", True), ("--notrain_guard", False), ("--train_guard=0", False)],
)
def test_booleans_are_read_as_absl_does(written, value):
    if value is None:
        with pytest.raises(UsageError, match="unknown flag --guard"):
            flags.parse([written])
    else:
        assert flags.parse([written]).train.guard is value


# Flag files.


@pytest.fixture
def nested(tmp_path):
    """Return a flag file that includes ../common/base.cfg, which includes deeper/most.cfg."""
    for folder in ("configs", "common/deeper"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "common/deeper/most.cfg").write_text("--train_epochs=1\n--train_batch_size=11\n--train_seed=111\n")
    (tmp_path / "common/base.cfg").write_text(
        "# base\n--flagfile=deeper/most.cfg\n\n// other comment\n  --train_epochs=2  \n"
    )
    (tmp_path / "configs/mine.cfg").write_text("--flagfile=../common/base.cfg\n--train_batch_size=33\n")
    return tmp_path / "configs/mine.cfg"


@pytest.mark.parametrize("folder", [".", "configs", "common", "elsewhere"])
def test_nested_flag_files_resolve_against_the_including_file(nested, folder, monkeypatch):
    root = nested.parent.parent
    (root / folder).mkdir(exist_ok=True)
    monkeypatch.chdir(root / folder)
    for path in (nested, os.path.relpath(nested)):
        train = flags.parse([f"--flagfile={path}"]).train
        assert (train.epochs, train.batch_size, train.seed) == (2, 33, 111)


def test_later_flags_win_on_the_line_and_in_files(nested):
    assert flags.parse(["--train_seed=1", "--train_seed=2"]).train.seed == 2
    assert flags.parse([f"--flagfile={nested}", "--train_epochs=9"]).train.epochs == 9
    assert flags.parse(["--train_epochs=9", f"--flagfile={nested}"]).train.epochs == 2


@pytest.mark.parametrize("inner", ["a.cfg", "./b.cfg", "../{folder}/a.cfg"])
def test_flag_files_that_include_themselves_are_refused(inner, tmp_path):
    (tmp_path / "a.cfg").write_text(f"--flagfile={inner.format(folder=tmp_path.name)}\n")
    (tmp_path / "b.cfg").write_text("--flagfile=a.cfg\n")
    with pytest.raises(UsageError, match=r"a\.cfg includes itself"):
        flags.parse([f"--flagfile={tmp_path / 'a.cfg'}"])


def test_one_file_may_be_included_twice(nested):
    nested.write_text("--flagfile=../common/base.cfg\n--train_epochs=7\n--flagfile=../common/deeper/most.cfg\n")
    assert flags.parse([f"--flagfile={nested}"]).train.epochs == 1


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot read flag file .*mine.cfg: No such file or directory"),
        ("--flagfile=absent.cfg\n", "cannot read flag file .*absent.cfg: No such file or directory"),
        ("train_epochs=3\n", "flag file .*mine.cfg: 'train_epochs=3' is no flag; write --name=value"),
        ("--flagfile\nbase.cfg\n", "'base.cfg' is no flag"),
        ("--flagfile\n", "--flagfile needs the path of a file"),
        ("--train_epoch=3\n", "unknown flag --train_epoch; did you mean --train_epochs"),
        (b"\xff\xfe\x00", "cannot read flag file .*mine.cfg"),
    ],
)
def test_bad_flag_files_are_refused(content, message, tmp_path):
    file = tmp_path / "mine.cfg"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=message) as caught:
        flags.parse([f"--flagfile={file}"])
    assert "\n" not in str(caught.value)


# Bad values.


def test_unknown_flag_names_the_nearest_and_lists_its_section():
    with pytest.raises(UsageError, match="unknown flag --attack_epsilom; did you mean --attack_epsilon") as caught:
        flags.parse(["--attack_epsilom=1"])
    for field in dataclasses.fields(config.Attack):
        assert f"--attack_{field.name}" in str(caught.value)
    assert "--train_seed" not in str(caught.value)


def test_unknown_flag_of_no_section_lists_all():
    with pytest.raises(UsageError, match="unknown flag --zzz; valid: ") as caught:
        flags.parse(["--zzz=1"])
    for name in (*FIELDS, "flagfile", "verbosity", "help"):
        assert f"--{name}" in str(caught.value)


@pytest.mark.parametrize("name", REGISTRIES)
def test_unknown_key_of_a_registry_lists_its_keys(name):
    with pytest.raises(UsageError, match=r"unknown .* 'nonsense'; valid: ") as caught:
        flags.parse([f"--{name}=nonsense"])
    assert str(caught.value).endswith(", ".join(sorted(REGISTRIES[name])))


def test_flag_that_takes_several_names_checks_each():
    assert flags.parse(["--detector_name=knn,msp"]).detector.name == "knn,msp"
    assert flags.parse(["--detector_name=all"]).detector.name == "all"
    with pytest.raises(UsageError, match="unknown detector 'knm'; valid: "):
        flags.parse(["--detector_name=knn,knm"])


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.metadata["choices"]])
def test_bad_choice_lists_the_valid_ones(name):
    with pytest.raises(UsageError, match=f"--{name}=nonsense: value should be one of") as caught:
        flags.parse([f"--{name}=nonsense"])
    for choice in FIELDS[name].metadata["choices"]:
        assert choice in str(caught.value)


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--train_epochs=many", "--train_epochs=many"),
        ("--train_epochs=1.5", "--train_epochs=1.5"),
        ("--train_epochs=", "--train_epochs="),
        ("--attack_epsilon=8/0", "--attack_epsilon=8/0: .* is no finite number; write 0.1, 1e-3 or 8/255"),
        ("--attack_epsilon=small", "'small' is no finite number"),
        ("--train_learning_rate=nan", "'nan' is no finite number"),
        ("--train_learning_rate=inf", "'inf' is no finite number"),
        ("--train_learning_rate=1e400", "'1e400' is no finite number"),
        ("--progress=maybe", "--progress=maybe"),
        ("--data_name", "Missing value for flag --data_name"),
        ("digits", "unexpected argument 'digits'; flags are written --name=value"),
        ("--flagfile", "--flagfile needs the path of a file"),
    ],
)
def test_bad_values_are_refused_with_one_line(argument, message):
    with pytest.raises(UsageError, match=message) as caught:
        flags.parse([argument])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments, level",
    [
        ([], 0),
        (["--verbosity=1"], 1),
        (["-verbosity=2", "--zzz"], 2),
        (["--verbosity=1", "--verbosity=0"], 0),
        (["--verbosity=x"], 0),
    ],
)
def test_verbosity_is_known_whatever_else_is_wrong(arguments, level):
    assert flags.verbosity(arguments) == level


def test_plain_arguments_are_runs_to_compare():
    run = flags.parse(["--mode=compare", "runs/one", "saved_models/two"])
    assert run.runs == "runs/one,saved_models/two" and run.run_dir == "runs/compare"
    with pytest.raises(UsageError, match="unexpected argument 'runs/one'"):
        flags.parse(["--mode=train", "runs/one"])
