"""Stage 0 fails, and says why."""

import json

import pytest
import torch
from conftest import CPU, run_script, run_stage, succeed

import stage0_broken as stage0
from common import load_reader, sent_prompt, to_bytes
from plumbing.data import load_data
from plumbing.report import RESULT_KEYS


@pytest.mark.parametrize(
    "start,rows,examples", [(run_stage, 4, 4), pytest.param(run_script, 16, 40, marks=pytest.mark.slow)]
)
def test_a_smoke_run_prints_every_diagnosis(start, rows, examples, tmp_path):
    flags = ("--smoke", "--batch-size", rows, "--eval-examples", examples)
    run = start(stage0, *flags, "--out", tmp_path / "out")
    assert run.code == 0, run.stderr
    for cause in (
        "1 too many unknowns", "2 no supervision", "3 extreme compression", "4 distribution mismatch", "collapse",
    ):  # fmt: skip
        assert cause in run.stdout
    result = run.result
    assert list(result) == RESULT_KEYS and result["positions"] == 33 and result["wire_bytes"] == 16384
    controls = json.loads((tmp_path / "out" / "config.json").read_text())["controls"]
    assert all(value is not None for value in controls.values())
    steps = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    first = (steps[0]["gradient_encoder"] + steps[9]["gradient_encoder"]) / 2  # of every tenth step
    assert controls["first_gradient_encoder"] == pytest.approx(first, rel=1e-4)
    again = succeed(stage0, *flags, "--eval-only", tmp_path / "out", "--out", tmp_path / "again")
    assert again.result["f1"] == result["f1"] and again.result["nll_wire"] == result["nll_wire"]


def test_the_probe_reads_what_is_there(monkeypatch):
    """Latents that hold the tokens are read, random ones are not: the diagnosis is about the latents."""
    reader = load_reader("tiny", CPU, torch.float32)
    rows = load_data("tiny", reader, 400).test
    wire = stage0.Wire(reader, None, None)

    def holding(_, chosen):
        lists = [sent_prompt(reader, row).ids for row in chosen]
        ids = torch.tensor([[x[(2 * j + 1) * len(x) // 64] for j in range(32)] for x in lists])
        return reader.table[ids]

    monkeypatch.setattr(stage0, "latents_of", holding)
    probe, guess = stage0.probe_tokens(wire, rows[:300], rows[300:])
    assert probe > guess + 40
    monkeypatch.setattr(stage0, "latents_of", lambda _, chosen: torch.randn(len(chosen), 32, 256))
    probe, guess = stage0.probe_tokens(wire, rows[:300], rows[300:])
    assert probe < guess + 5


def test_padding_changes_no_latent():
    torch.manual_seed(0)
    encoder = stage0.Encoder().eval()
    short, long = "Pergalan sells olive oil.", "Pergalan sells olive oil to the whole town of Stelvidan, and wool."
    alone = encoder(to_bytes([short], CPU))[0]
    together = encoder(to_bytes([short, long], CPU))[0]
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", (1, 2))
def test_few_examples_are_enough_to_measure(rows, random_llm, tmp_path):
    flags = ("--model", random_llm, "--steps", "2", "--batch-size", "2", "--eval-examples", rows, "--smoke")
    succeed(stage0, *flags, "--out", tmp_path / "out")


def test_plain_text_is_refused(random_llm, tmp_path):
    (tmp_path / "some.txt").write_text("Once upon a time there was a town. " * 400)
    run = run_stage(stage0, "--model", random_llm, "--data", tmp_path / "some.txt", "--out", tmp_path / "out")
    assert run.code == 2 and "stage 0 learns from answers" in run.stderr
