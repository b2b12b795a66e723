"""Several processes, as torchrun starts them, do what one does: training, evaluation, files, signals."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import safetensors.torch
import torch
from conftest import HERE, run_stage

import common
import stage0_broken as stage0
import stage1_pca_adapter as stage1
import stage2_encoder as stage2
import stage3_full as stage3

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ALONE = {"train_seconds", "eval_seconds", "commit"}  # of the metrics: what differs from run to run
# 7 micro-batches and 11 test rows: nothing is divided evenly by 2 or 3 processes
FLAGS = ("--smoke", "--steps", "3", "--batch-size", "7", "--micro-batch-size", "1", "--eval-examples", "11")
# all stages in one launch: most of a process's time goes into importing torch. The group is there when a stage starts
WORKER = """
import sys
sys.path[:0] = [{tests!r}, {here!r}]
import common
common.join_processes()
from test_processes import run_all
run_all(sys.argv[1], sys.argv[2])
"""


def run_all(llm: str, out: str) -> None:
    one = run_stage(stage1, "--model", llm, *FLAGS, "--code-dim", "8", "--out", f"{out}/1")
    assert one.code == 0, one.stderr
    more = ("--model", llm, "--stage1", f"{out}/1")
    for module, flags in (
        (stage0, ("--model", llm)),
        (stage2, (*more, "--llm-steps", "2")),
        (stage3, ("--stage2", f"{out}/2")),
        (stage3, ("--receiver", "direct", "--wire", f"{out}/3", "--model", llm)),
    ):
        name = "direct" if "direct" in flags else module.STAGE[-1]
        run = run_stage(module, *flags, *FLAGS, "--out", f"{out}/{name}")
        assert run.code == 0, run.stderr
        assert common.rank() == 0 or run.stdout == ""  # the others are silent


def launch(processes: int, *command, meet=("--standalone",)) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*TORCHRUN, *meet, "--nproc-per-node", processes, *command]
    return subprocess.Popen(list(map(str, command)), cwd=HERE, env=environment, stderr=subprocess.PIPE, text=True)


def launch_on_machines(machines: tuple[int, ...], *command) -> list[subprocess.Popen]:
    """So many processes on each machine; here all of them are this one, and each has a torchrun of its own."""
    if len(machines) == 1:
        return [launch(machines[0], *command)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    meet = ("--nnodes", len(machines), "--rdzv-backend", "c10d", "--rdzv-endpoint", place, "--local-addr", "127.0.0.1")
    return [launch(count, *command, meet=meet) for count in machines]


@pytest.fixture(scope="module")
def alone(random_llm, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    run_all(str(random_llm), str(out))
    return out


@pytest.mark.parametrize("machines", ((2,), (2, 1)))
def test_several_processes_end_where_one_does(machines, alone, random_llm, tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER.format(tests=str(HERE / "tests"), here=str(HERE)))
    runs = launch_on_machines(machines, worker, random_llm, tmp_path)
    with ThreadPoolExecutor() as pool:  # what each says is read, or it would wait
        try:
            said = list(pool.map(lambda run: run.communicate(timeout=600)[1], runs))
        finally:
            for run in runs:
                run.kill()
    assert [run.returncode for run in runs] == [0] * len(runs), said
    for stage in ("0", "1", "2", "3", "direct"):
        mine, theirs = (json.loads((out / stage / "config.json").read_text())["metrics"] for out in (tmp_path, alone))
        for key in theirs.keys() - ALONE:
            same = mine[key] == pytest.approx(theirs[key], rel=1e-4) if isinstance(theirs[key], float) else None
            assert same or mine[key] == theirs[key], (stage, key)
        mine, theirs = (safetensors.torch.load_file(out / stage / "wire.safetensors") for out in (tmp_path, alone))
        assert mine.keys() == theirs.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(mine[name], tensor, rtol=1e-3, atol=1e-4, msg=f"stage {stage}: {name}")
        rows = [(out / stage / "metrics.jsonl").read_text().splitlines() for out in (tmp_path, alone)]
        assert len(rows[0]) == len(rows[1])  # written once
        for row, expected in zip(*rows, strict=True):
            row, expected = json.loads(row), json.loads(expected)
            assert row.keys() == expected.keys()
            for key in (key for key in row if key.startswith("loss_") and row[key] is not None):
                assert row[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-6)
    assert not list(tmp_path.rglob("*.tmp"))


def test_every_item_is_some_process_s_and_only_one_s(monkeypatch):
    for processes in (1, 2, 3, 5):
        monkeypatch.setattr(common, "process_count", lambda n=processes: n)
        shares = []
        for number in range(processes):
            monkeypatch.setattr(common, "rank", lambda n=number: n)
            shares.append(common.own_share(range(7)))
        assert sorted(sum(shares, [])) == list(range(7))


def test_told_to_stop_all_stop_and_one_goes_on(random_llm, tmp_path):
    flags = ("--model", random_llm, "--batch-size", "4", "--micro-batch-size", "1", "--eval-examples", "4")
    flags += ("--code-dim", "8", "--steps", "2000", "--device", "cpu", "--out", tmp_path / "out")
    run = launch(2, "stage1_pca_adapter.py", *flags)
    metrics = tmp_path / "out" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    _, stderr = run.communicate(timeout=60)
    assert run.returncode != 0 and "--resume goes on from there" in stderr
    saved = common.read_checkpoint(tmp_path / "out" / "checkpoint.safetensors")
    assert 0 < saved["step"] < 2000
    saved["step"] = saved["arguments"]["steps"] - 1  # most of the rest is the same again
    common.save_checkpoint(tmp_path / "out" / "checkpoint.safetensors", saved)
    run = run_stage(stage1, *flags, "--resume")
    assert run.code == 0 and run.result["steps"] == 2000, run.stderr


def test_too_few_micro_batches_for_the_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(common, "join_processes", lambda: False)
    run = run_stage(stage1, "--batch-size", "2", "--out", tmp_path)
    assert run.code == 2 and "too few for 3 processes" in run.stderr and run.stderr.count("\n") == 1
    run = run_stage(stage1, "--batch-size", "8", "--micro-batch-size", "4", "--out", tmp_path)
    assert run.code == 2 and "too few for 3 processes" in run.stderr
