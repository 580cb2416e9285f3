"""Sweeps in processes of their own that are killed and resumed, or are several: the table is the uninterrupted one."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sweep_runs
import sweeping
from jaxlrp import evaluate
from sweep_runs import same

compiled_once = sweep_runs.compiled_once  # the fixture, for the tests that ask for it too


def started(folder, compiled, **options):
    command = [
        sys.executable,
        sweeping.__file__,
        json.dumps({"folder": str(folder), "compiled": str(compiled)} | options),
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(sweeping.__file__).parent.parent), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and out.endswith("done\n"), err
    return err


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, compiled_once):
    folder = tmp_path_factory.mktemp("uninterrupted")
    ended(started(folder, compiled_once))
    sweep = evaluate.read_sweep(folder)
    assert sweep.table.num_rows == (17 * 4 + 2) * 3 * 2 and [i for i, _ in sweep.failures] == [3, 5, 10, 12, 17, 19]
    return sweep


def killed_while_it_works(folder, compiled, chance):
    """SIGKILL from outside, when some more parts are written and a little later: anywhere in the next."""
    process = started(folder, compiled, group=1, sleep=0.02)
    goal = len(list(folder.glob("part-*.parquet"))) + chance.randrange(4)
    while process.poll() is None and len(list(folder.glob("part-*.parquet"))) < goal:
        time.sleep(0.005)
    time.sleep(chance.random() * 0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode


def killed_while_it_writes(folder, compiled, chance):
    """SIGKILL by its own hand, right before or after a file is brought to the disk or renamed."""
    process = started(folder, compiled, group=1, kill=chance.randrange(20))
    process.communicate(timeout=120)
    return process.returncode


@pytest.mark.parametrize("kills", [2, pytest.param(14, marks=pytest.mark.slow)])
def test_killed_and_resumed(tmp_path, compiled_once, uninterrupted, kills):
    chance, done, again = random.Random(kills), 0, 0
    while done < kills:
        folder = tmp_path / str(again)
        kill = (killed_while_it_works, killed_while_it_writes)[done % 2]
        if kill(folder, compiled_once, chance) != -signal.SIGKILL:  # it was faster
            same_as(uninterrupted, folder)
            again += 1
            continue
        done += 1
        if (folder / "manifest.json").exists():  # what is there is right, after each kill
            kept = evaluate.read_sweep(folder)
            batches = set(kept.table["batch"].to_pylist())
            assert kept.table.to_pylist() == [r for r in uninterrupted.table.to_pylist() if r["batch"] in batches]
            assert set(kept.failures) <= set(uninterrupted.failures)
    ended(started(folder, compiled_once))
    same_as(uninterrupted, folder)


def same_as(uninterrupted, folder):
    sweep = evaluate.read_sweep(folder)
    assert sweep.table.equals(uninterrupted.table) and sweep.failures == uninterrupted.failures
    left = {p.name for p in folder.iterdir() if not p.name.startswith("part-") or p.suffix != ".parquet"}
    assert left == {"manifest.json"}


@pytest.mark.slow
def test_eight_devices_and_two_processes(tmp_path, compiled_once, uninterrupted):
    """8 devices; 2 processes of 2 devices; and one process that goes on where two were stopped."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ended(started(tmp_path / "eight", compiled_once, devices=8))
    two = [started(tmp_path / "two", compiled_once, devices=2, process=p, port=port) for p in (0, 1)]
    for process in two:
        ended(process)
    for name in ("eight", "two"):
        sweep = evaluate.read_sweep(tmp_path / name)
        same(sweep.table, uninterrupted.table)
        assert sweep.failures == uninterrupted.failures
    parts = sorted((tmp_path / "two").glob("part-1-*.parquet"))
    assert len(parts) == 6
    for part in parts[::2]:
        part.unlink()
    ended(started(tmp_path / "two", compiled_once))
    same(evaluate.read_sweep(tmp_path / "two").table, uninterrupted.table)
