"""Stage 0 fails, and says why."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import HERE, run_stage

import common
import stage0_broken as stage0


def test_smoke_run_prints_every_diagnosis(tmp_path):
    done = subprocess.run(
        [sys.executable, "stage0_broken.py", "--smoke", "--out", tmp_path / "out"],
        cwd=HERE,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for cause in (
        "1 too many unknowns",
        "2 no supervision",
        "3 extreme compression",
        "4 distribution mismatch",
        "collapse",
    ):
        assert cause in done.stdout
    result = json.loads(done.stdout.strip().split("\n")[-1])
    assert list(result) == common.RESULT_KEYS and result["positions"] == 33 and result["wire_bytes"] == 16384
    controls = json.loads((tmp_path / "out" / "config.json").read_text())["controls"]
    assert all(value is not None for value in controls.values())
    again = run_stage(stage0, "--eval-only", tmp_path / "out", "--eval-examples", "40", "--out", tmp_path / "again")
    assert again.code == 0, again.stderr
    assert again.result["f1"] == result["f1"] and again.result["nll_wire"] == result["nll_wire"]


def test_the_probe_reads_what_is_there(monkeypatch):
    """Latents that hold the tokens are read, random ones are not: the diagnosis is about the latents."""
    reader = common.load_reader("tiny", torch.device("cpu"), torch.float32)
    rows = common.load_data("tiny", reader, 600).test
    wire = stage0.Wire(reader, None, None)

    def holding(_, chosen):
        lists = [common.sent_prompt(reader, row).ids for row in chosen]
        ids = torch.tensor([[x[(2 * j + 1) * len(x) // 64] for j in range(32)] for x in lists])
        return reader.table[ids]

    monkeypatch.setattr(stage0, "latents_of", holding)
    probe, guess = stage0.probe_tokens(wire, rows[:450], rows[450:])
    assert probe > guess + 40
    monkeypatch.setattr(stage0, "latents_of", lambda _, chosen: torch.randn(len(chosen), 32, 256))
    probe, guess = stage0.probe_tokens(wire, rows[:450], rows[450:])
    assert probe < guess + 5


def test_padding_changes_no_latent():
    torch.manual_seed(0)
    encoder = stage0.Encoder().eval()
    short, long = "Pergalan sells olive oil.", "Pergalan sells olive oil to the whole town of Stelvidan, and wool."
    alone = encoder(common.to_bytes([short], torch.device("cpu")))[0]
    together = encoder(common.to_bytes([short, long], torch.device("cpu")))[0]
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", (1, 2))
def test_few_examples_are_enough_to_measure(rows, tmp_path):
    flags = ("--steps", "2", "--batch-size", "2", "--eval-examples", rows, "--smoke", "--out", tmp_path / "out")
    run = run_stage(stage0, *flags)
    assert run.code == 0, run.stderr


def test_plain_text_is_refused(tmp_path):
    (tmp_path / "some.txt").write_text("Once upon a time there was a town. " * 400)
    run = run_stage(stage0, "--data", tmp_path / "some.txt", "--out", tmp_path / "out")
    assert run.code == 2 and "stage 0 learns from answers" in run.stderr


def test_micro_batches_change_nothing(tmp_path):
    losses = []
    for size in (4, 1):
        flags = ("--steps", "3", "--batch-size", "4", "--micro-batch-size", size, "--eval-examples", "4")
        assert run_stage(stage0, *flags, "--out", tmp_path / str(size)).code == 0
        rows = (tmp_path / str(size) / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(row)["loss_ce"] for row in rows])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
