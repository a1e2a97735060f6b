"""python -m kerasdefense.serving: one line for each image, and exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kerasdefense.serving.command import main


@pytest.fixture
def files(digits, tmp_path):
    """Return the paths of a clear digit, a blank image, a text and no file."""
    clear, blank, text = (tmp_path / name for name in ("clear.png", "blank.png", "text.png"))
    Image.fromarray(np.rint(digits.image[0, ..., 0] * 255).astype(np.uint8)).save(clear)
    Image.fromarray(np.zeros([8, 8], np.uint8)).save(blank)
    text.write_text("no image")
    return [str(path) for path in (clear, blank, text, tmp_path / "missing.png")]


def test_every_image_has_its_line(files, server, digits, capsys):
    for address in (server.grpc, server.rest):
        assert main([*files, f"--address={address}", "--version=1"]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 4
        assert lines[0].startswith(f"{files[0]}: digit {digits.label[0]}, ") and lines[0].endswith(", accepted")
        assert " %, anomaly score -" in lines[0]
        assert lines[1].endswith(", not accepted")
        assert lines[2:] == [
            f"{files[2]}: no image, damaged or too large",
            f"{files[3]}: no such file or directory",
        ]
    assert main([*files[:2], f"--address={server.grpc}/classifier", "--version_label=stable"]) == 0


def test_json_lines_can_be_read(files, server, digits, capsys):
    assert main([*files, f"--address={server.grpc}", "--version=1", "--json"]) == 1
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["file"] for each in records] == files
    assert [each["valid"] for each in records] == [True, True, False, False]
    assert [each["accepted"] for each in records] == [True, False, False, False]
    assert records[0]["label"] == digits.label[0] and 0 < records[0]["probability"] <= 1
    assert records[3]["reason"] == "no such file or directory"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "required: image"),
        (["a.png", "--batch=3"], 2, "unrecognized arguments"),
        (["a.png", "--address=localhost"], 2, "an address is grpc://host:port"),
        (["a.png", "--version=1", "--version_label=stable"], 2, "not both"),
        (["{clear}", "--name=other"], 1, "the server has no other"),
        (["{clear}", "--version=9"], 1, "the server has no classifier, version 9"),
        (["{clear}", "--address=grpc://localhost:1", "--timeout=0.3"], 1, "not available"),
    ],
)
def test_errors_are_one_line(arguments, code, message, files, server, capsys):
    given = [each.format(clear=files[0]) for each in arguments]
    address = [] if any("--address" in each for each in given) else [f"--address={server.grpc}"]
    assert main([*given, *address]) == code
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""
    assert len(captured.err.splitlines()) == 1 or code == 2


@pytest.mark.slow
def test_module_runs_from_a_shell(files, server):
    command = [sys.executable, "-m", "kerasdefense.serving", files[0], f"--address={server.rest}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1
