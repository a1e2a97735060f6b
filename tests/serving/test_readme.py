"""README's section on serving: its lines are run as they stand, but for the ports."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kerasdefense.serving.command import main

from .stub import serving

SECTION = re.search(r"\n## Serve\n(.*?)\n## ", (Path(__file__).parents[2] / "README.md").read_text(), re.DOTALL)[1]
QUERIES = SECTION[SECTION.index("### Query it") :]
BLOCKS = dict(re.findall(r"```(\w*)\n(.*?)```", QUERIES, re.DOTALL)[:2])
NAME = re.search(r"--export_dir=exports/(\w+)", SECTION)[1]


@pytest.fixture(scope="module")
def named(digits):
    """The digits' server, under the name that README exports to."""
    with serving(digits.folder, name=NAME) as found:
        yield found


@pytest.fixture
def at_ports(named, digits, tmp_path, monkeypatch):
    """Return what puts a server's real ports into a text of README's; its images are in the working directory."""
    for number, name in enumerate(("cat.png", "dog.jpg")):
        levels = np.rint(digits.image[number, ..., 0] * 255).astype(np.uint8)
        Image.fromarray(levels).save(tmp_path / name, "PNG")
    monkeypatch.chdir(tmp_path)
    ports = {"8500": named.grpc.rpartition(":")[2], "8501": named.rest.rpartition(":")[2]}
    return lambda text: re.sub(r"(?<=localhost:)850[01]", lambda found: ports[found[0]], text)


def test_addresses_name_the_model_that_is_exported():
    addresses = re.findall(r"\w+://localhost:\d+\S*?(?=[\s\";:,]|$)", SECTION)
    assert len(addresses) >= 5
    assert all(re.fullmatch(rf"\w+://localhost:850[01](/v1/models)?/{NAME}", each) for each in addresses), addresses


def test_line_of_the_shell_runs(at_ports, capsys):
    (line,) = [each for each in BLOCKS[""].splitlines() if "-m kerasdefense.serving" in each]
    assert main(shlex.split(at_ports(line).partition("-m kerasdefense.serving ")[2])) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [each.partition(":")[0] for each in lines] == ["cat.png", "dog.jpg"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_line_of_curl_runs(at_ports):
    line = BLOCKS[""][BLOCKS[""].index("curl ") :]
    done = subprocess.run(["bash", "-c", at_ports(line)], capture_output=True, text=True, check=True)
    (prediction,) = json.loads(done.stdout)["predictions"]
    assert prediction["valid"] is True and prediction["class_name"].startswith("digit ")


def test_lines_of_python_run(at_ports, capsys):
    exec(compile(at_ports(BLOCKS["python"]), "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 2
