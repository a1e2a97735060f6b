"""Lock files, wheel and import rules: what makes the project installable and keeps its parts apart."""

from __future__ import annotations

import ast
import configparser
import functools
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
FULL_LOCK = "requirements.lock"
CORE_LOCK = "requirements-core.lock"
LOCKED_EXTRAS = ("pipelines", "serving", "bench", "test")

# Module -> the only files and folders that may import it; import-linter sees neither submodules of
# other packages nor imports from outside the package.
IMPORTERS = {
    "absl.flags": ("kerasdefense/flags.py", "kerasdefense/run.py", "tests/"),
    "tensorflow_datasets": ("kerasdefense/data/", "tests/"),
    "tensorflow_addons": ("kerasdefense/training/", "kerasdefense/data/", "tests/"),
    "tfx": ("pipelines/", "tests/"),
    "pipelines": ("pipelines/", "tests/"),
    "kerasdefense.run": ("kerasdefense/run.py", "kerasdefense/demo.py", "tests/"),
    "tensorflow_serving": ("kerasdefense/serving/", "kerasdefense/export/warmup.py", "tests/"),
    **dict.fromkeys(("grpc", "requests", "urllib3"), ("kerasdefense/serving/", "tests/")),
    "torch": (),
}


def metadata():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def requirements(text):
    environment = {"python_version": "3.10", "python_full_version": "3.10.13"}
    found = [Requirement(line) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [one for one in found if one.marker is None or one.marker.evaluate(environment)]


def locked_versions(name):
    return dict(re.findall(r"^([a-z0-9-]+)(?:\[.*\])?==(\S+)", (ROOT / name).read_text(), re.MULTILINE))


@functools.cache
def imported_names(source):
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def importers_of(module):
    files = (
        file
        for folder in ("kerasdefense", "pipelines", "benchmarks", "tests")
        for file in (ROOT / folder).rglob("*.py")
    )
    return {
        file.relative_to(ROOT).as_posix()
        for file in files
        if any(f"{name}.".startswith(f"{module}.") for name in imported_names(file.read_text()))
    }


@pytest.mark.parametrize("name", [FULL_LOCK, CORE_LOCK])
def test_lock_pins_and_hashes_every_package_and_names_no_index(name):
    entries = (ROOT / name).read_text().replace("\\\n", " ").splitlines()
    pinned = re.compile(r"[a-z0-9-]+(\[[a-z,]+\])?==\S+(\s*;[^#]*?)?(\s+--hash=sha256:[0-9a-f]{64})+\s*")
    assert len(entries) > 50
    assert [entry for entry in entries if not pinned.fullmatch(entry)] == []


def test_core_lock_is_the_full_lock_without_tfx():
    core, full = locked_versions(CORE_LOCK), locked_versions(FULL_LOCK)
    assert core.items() < full.items()
    assert "tfx" in full
    assert not {"tfx", "apache-beam", "pytest"} & set(core)


@pytest.mark.parametrize(("name", "extras"), [(FULL_LOCK, LOCKED_EXTRAS), (CORE_LOCK, ())])
def test_lock_is_within_the_published_ranges(name, extras):
    options, versions = metadata(), locked_versions(name)
    texts = [
        options["options"]["install_requires"],
        *(options["options.extras_require"][extra] for extra in extras),
    ]
    wanted = [one for text in texts for one in requirements(text)]
    outside = {
        str(one): versions.get(one.name) for one in wanted if not one.specifier.contains(versions.get(one.name, "0"))
    }
    assert len(wanted) > 10
    assert outside == {}


def test_changelog_has_an_entry_for_the_version():
    assert f"## [{metadata()['metadata']['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def test_wheel_holds_every_file_of_the_package_and_nothing_else(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "kerasdefense", source / "kerasdefense", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)

    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = source / "kerasdefense"
    assert held == {file.relative_to(source).as_posix() for file in package.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    "source",
    ["import absl.flags", "from absl import app, flags", "def f():\n    from absl.flags import FLAGS"],
)
def test_imported_names_sees_every_form_of_import(source):
    assert any(name.startswith("absl.flags") for name in imported_names(source))


@pytest.mark.parametrize("module", IMPORTERS)
def test_import_stays_where_it_belongs(module):
    allowed = IMPORTERS[module]
    assert [file for file in sorted(importers_of(module)) if not file.startswith(allowed)] == []
