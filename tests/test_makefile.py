"""The bootstrap of the Makefile and `.ci/run`, against stand-ins for uv and Python: nothing is downloaded."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAKE = shutil.which("make")
UV = """#!/bin/sh
test "$1" = --version && exit 0
echo "$@" >> calls
test "$1" = venv && mkdir -p .venv/bin && cp "$OLDPWD"/bin/anything .venv/bin/python
exit 0
"""

pytestmark = pytest.mark.skipif(MAKE is None, reason="make is not installed")


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of what the bootstrap reads, with a uv on PATH that writes its arguments to `calls`."""
    for name in ("Makefile", "requirements.lock", "requirements-core.lock"):
        shutil.copy(ROOT / name, tmp_path)
    programs = tmp_path / "bin"
    script(programs / "anything", "#!/bin/sh\nexit 0\n")
    script(programs / "uv", UV.replace('"$OLDPWD"/bin', str(programs)))
    for tool in ("cp", "rm", "mkdir", "touch"):
        (programs / tool).symlink_to(shutil.which(tool))
    monkeypatch.setenv("PATH", str(programs))
    for name in ("MAKEFLAGS", "MAKELEVEL"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def make(project, *goals):
    return subprocess.run([MAKE, *goals], cwd=project, capture_output=True, text=True, check=False)


def synced(project):
    """Lock files installed so far, in order."""
    calls = project / "calls"
    lines = calls.read_text().splitlines() if calls.exists() else []
    return [line.split()[-1] for line in lines if line.startswith("pip sync")]


def test_demo_installs_the_core_once(project):
    first, second = make(project, "demo"), make(project, "demo")
    assert (first.returncode, second.returncode) == (0, 0)
    assert "0.7 GB" in first.stdout
    assert "GB" not in second.stdout
    assert synced(project) == ["requirements-core.lock"]


def test_test_after_demo_installs_everything(project):
    make(project, "demo")
    assert make(project, "test").returncode == 0
    assert synced(project) == ["requirements-core.lock", "requirements.lock"]


def test_demo_after_setup_keeps_the_full_environment(project):
    make(project, "setup")
    assert make(project, "demo").returncode == 0
    assert synced(project) == ["requirements.lock"]


def test_changed_lock_is_installed_again(project):
    make(project, "setup")
    os.utime(project / ".venv/.full", (0, 0))
    make(project, "demo")
    assert synced(project) == ["requirements.lock"] * 2


def test_failed_installation_is_not_taken_for_done(project):
    script(project / "bin/uv", (project / "bin/uv").read_text().replace("exit 0\n", 'test "$2" != sync\n'))
    result = make(project, "demo")
    assert result.returncode != 0
    assert "see above" in result.stderr
    assert not (project / ".venv/.core").exists()


def test_uv_that_does_not_run_is_replaced_by_our_own(project):
    uv = project / "bin/uv"
    uv.rename(project / "bin/working_uv")
    script(uv, "#!/bin/sh\nexit 127\n")
    pip = f"#!/bin/sh\ncp {project}/bin/working_uv .uv/bin/uv\n"
    script(project / "bin/pip_of_uv", pip)
    script(
        project / "bin/python3.10",
        f"#!/bin/sh\nmkdir -p .uv/bin && cp {project}/bin/pip_of_uv .uv/bin/python\n",
    )
    result = make(project, "demo")
    assert (result.returncode, result.stderr) == (0, "")
    assert synced(project) == ["requirements-core.lock"]


def test_machine_without_python_is_told_what_to_install(project):
    (project / "bin/uv").unlink()
    result = make(project, "demo")
    assert result.returncode != 0
    assert "install uv, or Python 3.10" in result.stderr.splitlines()[0]


@pytest.mark.parametrize("code", [0, 2])
def test_ci_run_calls_check_and_test_and_returns_their_code(tmp_path, monkeypatch, code):
    script(tmp_path / "make", f'#!/bin/sh\necho "$PWD: $@"\nexit {code}\n')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    result = subprocess.run([ROOT / ".ci/run"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == code
    assert result.stdout.startswith(f"{ROOT}: ")
    assert result.stdout.split()[-3:] == ["check", "test", "test-pipeline"]


@pytest.mark.parametrize(
    ("goal", "command"),
    [
        ("check", "-m benchmarks.accelerator"),
        ("check", "ruff format --check"),
        ("check", "mypy"),
        ("gpu-check", "-m benchmarks.accelerator"),
        ("test-pipeline", "-m pipeline"),
        ("test", "--cov"),
    ],
)
def test_each_verb_runs_its_own_command(project, goal, command):
    told = make(project, "-n", goal)
    assert told.stderr == "" and (command in told.stdout) == ((goal, command) != ("check", "-m benchmarks.accelerator"))
