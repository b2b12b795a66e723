"""Stage 1 as its users run it: results, bad input, and what must never be fudged."""

import json
import math
import shutil
import statistics
from pathlib import Path
from unittest.mock import Mock

import pytest
import safetensors.torch
import torch
from conftest import CPU, HERE, QUICK, SHARED, Run, need, run_script, run_stage, save_random_llm, succeed

import plumbing.report
import stage1_pca_adapter as stage1
from common import Prompt, fit_pca, load_reader, token_counts
from plumbing.data import load_data
from plumbing.report import RESULT_KEYS
from plumbing.wires import save_wire

RUN_FILES = {"wire.safetensors", "config.json", "metrics.jsonl", "samples.md", "report.png", "checkpoint.safetensors"}

# --- the promise


@pytest.mark.parametrize("model", ["tiny", pytest.param("tiny-qwen", marks=pytest.mark.slow)])
def test_smoke_run_ends_with_a_table_and_the_contract_json(model, tmp_path):
    run = run_script(stage1, "--smoke", "--model", model, "--out", tmp_path / "out")
    assert run.code == 0, run.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == RUN_FILES
    result = run.result
    assert list(result) == RESULT_KEYS
    assert result["text_f1"] >= 60 and result["f1"] >= 10  # 40 rows; after 12 steps, not far from the PCA inverse
    assert result["no_context_f1"] < 25 and result["shuffled_f1"] < 25
    assert result["truncated_f1"] == result["text_f1"]  # stage 1 has as many positions as the text
    # count + L codes of d/8 float16 numbers, and nothing else
    width = {"tiny": 24, "tiny-qwen": 20}[model]
    assert result["wire_bytes"] == pytest.approx(4 + result["positions"] * width * 2)
    assert result["wire_bytes"] > result["text_bytes"] and "LARGER than the text" in run.stdout
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["controls"]["identity_same_answers"] == 40
    assert config["controls"]["pca_inverse"] < result["f1"]
    samples = (tmp_path / "out" / "samples.md").read_text()
    assert samples.count("\n|") >= 20


def test_the_picture_has_every_control(random_llm, tmp_path, monkeypatch):
    picture = Mock()
    monkeypatch.setattr(plumbing.report, "draw_report", picture)
    succeed(stage1, *QUICK, "--model", random_llm, "--code-dim", "8", "--out", tmp_path)
    _, history, _, bars, _, _ = picture.call_args.args
    names = {"PCA inverse": "pca_inverse", "identity": "identity"}
    assert list(bars) == ["text", "wire", *names, "no context", "shuffled"] and len(history) == 4
    controls = json.loads((tmp_path / "config.json").read_text())["controls"]
    assert all(bars[name] == pytest.approx(controls[key], rel=1e-5) for name, key in names.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stage1", "stage1-qwen"])
def test_shipped_wire_reproduces_its_row(name, tmp_path):
    wire = HERE / "tiny" / "wires" / name
    shipped = json.loads((wire / "config.json").read_text())
    run = succeed(stage1, "--eval-only", wire, "--out", tmp_path / "out")
    assert run.result["model"] == shipped["model"] and run.result["steps"] == shipped["metrics"]["steps"]
    for key in (
        "text_f1", "text_em", "f1", "em", "retention", "no_context_f1", "shuffled_f1", "nll_wire", "wire_bytes",
    ):  # fmt: skip
        assert run.result[key] == pytest.approx(shipped["metrics"][key], rel=1e-4), key
    assert run.result["examples"] == 1000 and run.result["text_f1"] >= 85 and run.result["retention"] >= 97
    saved, again = (safetensors.torch.load_file(path / "wire.safetensors") for path in (wire, tmp_path / "out"))
    assert saved.keys() == again.keys() and all(torch.equal(saved[name], again[name]) for name in saved)


# --- the message


@pytest.fixture(scope="module")
def parts():
    reader = load_reader("tiny", CPU, torch.float32)
    data = load_data("tiny", reader, 8)
    counts = token_counts(reader, data, 0)
    return reader, data, counts


@pytest.mark.parametrize("exact", [False, True])
def test_the_receiver_uses_the_message_and_nothing_else(parts, exact):
    reader, _, counts = parts
    pca = fit_pca(reader.table, counts).first(24)
    wire = stage1.Wire(reader, pca, torch.tensor(0.05), exact)
    wire.adapter = stage1.Adapter("linear", pca, reader, wire.codes, counts)
    ids = [5, 300, 7, 7, 1000]
    message = wire.send(Prompt("", ids, False))
    assert len(message) == 4 + (5 * (24 + 1) * 4 if exact else 5 * 24 * 2)
    received = wire.receive(message)
    target = reader.table[ids].square().mean(1).sqrt() if exact else torch.full((5,), 0.05)
    torch.testing.assert_close(received.square().mean(1).sqrt(), target, rtol=2e-3, atol=0)
    torch.testing.assert_close(received, wire.adapter(wire.codes[ids], wire.target_rms(torch.tensor(ids))))
    wire.codes, wire.rms = wire.codes * 0, wire.rms * 0  # a receiver that peeks at the sender's tables would change
    torch.testing.assert_close(wire.receive(message), received)


def test_the_identity_wire_rebuilds_the_embeddings(parts):
    reader, _, counts = parts
    full = fit_pca(reader.table, counts)
    wire = stage1.Wire(reader, full, torch.tensor(1.0), exact=True)
    wire.adapter = stage1.Adapter("linear", full, reader, wire.codes, counts)
    ids = list(range(0, 4096, 3))
    rebuilt = wire.receive(wire.send(Prompt("", ids, False)))
    torch.testing.assert_close(rebuilt, reader.table[ids], atol=1e-6, rtol=1e-4)


def test_the_identity_control_of_a_run_is_such_a_wire(random_llm, tmp_path, monkeypatch):
    scored, score_wire = [], stage1.score_wire
    monkeypatch.setattr(stage1, "score_wire", lambda wire, *args: scored.append(wire) or score_wire(wire, *args))
    succeed(stage1, *QUICK, "--model", random_llm, "--code-dim", "8", "--out", tmp_path)
    assert [wire.width for wire in scored] == [8, 32]  # the PCA inverse and the identity wire
    assert [wire.adapter.kind for wire in scored] == ["linear", "linear"]
    ids = list(range(0, 4096, 3))
    rebuilt = scored[-1].receive(scored[-1].send(Prompt("", ids, False)))
    torch.testing.assert_close(rebuilt, scored[-1].reader.table[ids], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("k", (24, 10))
def test_a_first_look_in_bfloat16_loses_no_token(parts, k, monkeypatch):
    monkeypatch.setattr(stage1, "SMALL", 0)
    reader, _, counts = parts
    pca = fit_pca(reader.table, counts).first(k)
    wire = stage1.Wire(reader, pca, torch.tensor(0.05))
    adapter = stage1.Adapter("codebook", pca, reader, wire.codes, counts)
    torch.manual_seed(0)
    z = wire.codes[counts.topk(40).indices] / adapter.code_scale
    for noise in (0.0, 0.5, 2.0):
        near = z + noise * torch.randn_like(z)
        adapter.table = reader.table
        wanted = adapter.blended(near)
        adapter.table = reader.table.to(torch.bfloat16)
        assert len(wanted) < len(reader.table) and torch.equal(adapter.blended(near), wanted)


@pytest.mark.parametrize("k", (24, 10))
@pytest.mark.parametrize("noise", (0.0, 0.5))
def test_the_tokens_of_a_large_vocabulary_that_matter_are_all_that_matters(parts, k, noise, monkeypatch):
    """Above SMALL tokens a codebook blends those with a weight: the same embeddings, the same gradients."""
    reader, _, counts = parts
    pca = fit_pca(reader.table, counts).first(k)
    wire = stage1.Wire(reader, pca, torch.tensor(0.05))
    adapter = stage1.Adapter("codebook", pca, reader, wire.codes, counts)
    torch.manual_seed(0)
    codes = wire.codes[counts.topk(40).indices]
    codes = codes + noise * adapter.code_scale * torch.randn_like(codes)
    direction = torch.randn(40, 192)
    outputs, gradients, tokens = [], [], []
    for small in (len(reader.table), 0):
        monkeypatch.setattr(stage1, "SMALL", small)
        tokens.append(len(adapter.keys[adapter.blended(codes / adapter.code_scale)]))
        outputs.append(adapter(codes, torch.tensor(0.05)))
        adapter.zero_grad()
        (outputs[-1] * direction).sum().backward()
        gradients.append([p.grad.clone() for p in adapter.parameters()])
    assert tokens[0] == 4096 and 40 <= tokens[1] < 4096
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-6)
    assert adapter(codes * math.nan, torch.tensor(0.05)).isnan().all()  # not the embeddings of nothing
    for whole, chosen in zip(*gradients, strict=True):
        assert whole.abs().max() > 0
        torch.testing.assert_close(chosen, whole, rtol=0, atol=1e-4 * whole.abs().max().item())


@pytest.mark.parametrize("kind", ["linear", "mlp", "codebook"])
def test_every_adapter_starts_at_the_pca_and_every_parameter_learns(parts, kind):
    reader, _, counts = parts
    pca = fit_pca(reader.table, counts).first(24)
    wire = stage1.Wire(reader, pca, torch.tensor(0.05))
    inverse = stage1.Adapter("linear", pca, reader, wire.codes, counts)
    adapter = stage1.Adapter(kind, pca, reader, wire.codes, counts)
    ids = counts.topk(50).indices
    out = adapter(wire.codes[ids], torch.tensor(0.05))
    expected = wire.codes[ids] @ pca.components.T + pca.mean
    if kind == "codebook":
        cosine = torch.nn.functional.cosine_similarity(out, reader.table[ids])
        assert (cosine > torch.nn.functional.cosine_similarity(expected, reader.table[ids])).all()
        assert cosine.mean() > 0.97
    else:
        torch.testing.assert_close(out, 0.05 * expected / expected.square().mean(1, keepdim=True).sqrt())
        torch.testing.assert_close(out, inverse(wire.codes[ids], torch.tensor(0.05)))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    (adapter(wire.codes[ids], torch.tensor(0.05)) * torch.randn(50, 192)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())


# --- real weights, and questions they cannot answer


def test_real_pretrained_weights_on_text(tmp_path):
    model = need(SHARED / "models" / "stories260k")
    text = need(SHARED / "data" / "text" / "tinystories_sample.txt").read_text()[:30_000]
    (tmp_path / "stories.txt").write_text(text)
    flags = ("--model", model, "--data", tmp_path / "stories.txt", "--code-dim", "8", "--steps", "300")
    result = succeed(stage1, *flags, "--out", tmp_path / "out").result
    assert result["f1"] is None and result["retention"] is None
    assert 1.5 < result["nll_text"] < 2.5 and result["nll_text"] < result["nll_wire"] < 4
    assert result["positions"] == result["text_positions"] > 100
    lines = (tmp_path / "out" / "samples.md").read_text(encoding="utf-8").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines[4:]]
    assert lines[2] == "| a window begins | NLL from text | NLL through the wire |" and 0 < len(rows) <= 20
    assert all(window.replace(" ", "") in "".join(text.split()) for window, _, _ in rows)
    from_text, through = ([float(row[at]) for row in rows] for at in (1, 2))
    for nlls, key in ((from_text, "nll_text"), (through, "nll_wire")):  # the last window has few tokens
        assert statistics.median(nlls) == pytest.approx(result[key], abs=0.05)
    assert sum(from_text) < sum(through)


def test_a_model_that_cannot_answer_is_said_to(tmp_path):
    model, squad = need(SHARED / "models" / "stories260k"), need(SHARED / "data" / "squad" / "dev-v1.1.json")
    articles = json.loads(squad.read_text(encoding="utf-8"))["data"][:3]
    (tmp_path / "squad.json").write_text(json.dumps({"data": articles}))
    flags = ("--model", model, "--data", tmp_path / "squad.json", "--steps", "1", "--batch-size", "2")
    flags += ("--eval-examples", "4")
    run = succeed(stage1, *flags, "--out", tmp_path / "out")
    assert run.result["text_f1"] < 10 and "does not answer these questions from the text either" in run.stdout
    assert "exceed 480 tokens" in run.stdout


# --- bad input: one line, exit code 2, nothing written


def assert_refused(run: Run, expected: str, out: Path) -> None:
    assert run.code == 2, (run.code, run.stdout, run.stderr)
    lines = run.stderr.strip().split("\n")
    assert len(lines) == 1 and lines[0].startswith("error: ") and expected in lines[0], run.stderr
    assert not out.exists()


REFUSED = [
    (("--model", "lama"), "aliases are tiny"),
    (("--model", "./nowhere"), "no such alias, hub id or directory"),
    (("--data", "nothing.json"), "no such file"),
    (("--code-dim", "193"), "above the embedding width"),
    (("--code-dim", "0"), "at least 1"),
    (("--code-dim", "x"), "--code-dim"),
    (("--batch-size", "8", "--micro-batch-size", "3"), "multiple"),
    (("--steps", "-1"), "--steps"),
    (("--lr", "nan"), "--lr"),
    (("--lr", "1e38"), "diverges"),
    (("--seed", "1.5"), "--seed"),
    (("--adapter", "pca"), "--adapter"),
    (("--ste", "3"), "--ste"),
    (("--frobnicate",), "--frobnicate"),
    (("--resume",), "--resume"),
    (("--resume", "--eval-only", "x"), "--resume"),
    (("--eval-only", "tests"), "not a trained wire"),
    (("--eval-only", "tiny/wires/stage1", "--model", "tiny-qwen"), "--model tiny"),
    (("--eval-only", "tiny/wires/stage1", "--code-dim", "12"), "--code-dim 24"),
    (("--eval-only", "tiny/wires/stage1", "--adapter", "linear"), "--adapter mlp"),
]


@pytest.mark.parametrize("flags,expected", REFUSED, ids=[" ".join(flags) for flags, _ in REFUSED])
def test_bad_input_is_one_line_and_exit_code_2(flags, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(HERE)
    assert_refused(run_stage(stage1, *flags, "--out", tmp_path / "out"), expected, tmp_path / "out")


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_an_absent_device_is_refused(device, tmp_path):
    if {"cuda": torch.cuda, "mps": torch.backends.mps}[device].is_available():
        pytest.skip(f"this machine has {device}")
    run = run_stage(stage1, "--device", device, "--out", tmp_path / "out")
    assert_refused(run, f"--device {device}", tmp_path / "out")


def test_bad_model_directories(tmp_path, random_llm):
    def copy_without(name: str, *dropped: str) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        for path in random_llm.iterdir():
            if not any(path.match(pattern) for pattern in dropped):
                (directory / path.name).write_bytes(path.read_bytes())
        return directory

    out = tmp_path / "out"
    cases = {
        copy_without("noweights", "*.safetensors"): "no weights",
        copy_without("notokenizer", "tokenizer.json"): "no tokenizer",
        copy_without("noconfig", "config.json"): "no config.json",
    }
    pickled = copy_without("pickled", "*.safetensors")
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    cases[pickled] = "pickled weights"
    partial = copy_without("partial")
    tensors = safetensors.torch.load_file(partial / "model.safetensors")
    gone = next(name for name in tensors if "q_proj" in name)
    safetensors.torch.save_file({n: t for n, t in tensors.items() if n != gone}, partial / "model.safetensors")
    cases[partial] = f"lack {gone}"
    broken = copy_without("broken")
    (broken / "model.safetensors").write_bytes(b"garbage")
    cases[broken] = "does not load"
    remote = copy_without("remote")
    config = json.loads((remote / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "x.C", "AutoModelForCausalLM": "x.M"}}
    (remote / "config.json").write_text(json.dumps(config))
    (remote / "x.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    cases[remote] = "does not load"
    for directory, expected in cases.items():
        assert_refused(run_stage(stage1, "--model", directory, "--out", out), expected, out)
    assert not (tmp_path / "ran").exists()  # code that comes with a model is never run


def test_hub_failures_name_the_remedy(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    def fail_with(error):
        def snapshot_download(*_, **__):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return run_stage(stage1, "--model", "llama-3.1-8b", "--out", tmp_path / "out")

    response = Mock(headers={}, status_code=403)
    gated = fail_with(errors.GatedRepoError("gated", response=response))
    assert_refused(gated, "https://huggingface.co/meta-llama/Llama-3.1-8B-Instruct is gated", tmp_path / "out")
    assert "HF_TOKEN" in gated.stderr and "local directory" in gated.stderr
    missing = fail_with(errors.RepositoryNotFoundError("missing", response=response))
    assert_refused(missing, "does not exist or is private", tmp_path / "out")
    assert_refused(fail_with(errors.LocalEntryNotFoundError("offline")), "cannot reach", tmp_path / "out")
    assert_refused(fail_with(ConnectionError("no route")), "cannot reach", tmp_path / "out")


def test_a_wire_of_another_llm_is_refused(random_llm, ladder, tmp_path):
    shutil.copytree(ladder / "stage1", tmp_path / "wire")
    config = json.loads((tmp_path / "wire" / "config.json").read_text())
    config["model"] = str(save_random_llm(tmp_path / "b", _other_config(random_llm), random_llm))
    save_wire(tmp_path / "wire", safetensors.torch.load_file(tmp_path / "wire" / "wire.safetensors"), config)
    run = run_stage(stage1, "--eval-only", tmp_path / "wire", "--out", tmp_path / "out")
    assert_refused(run, "trained for another LLM", tmp_path / "out")


def _other_config(directory: Path):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory)
    config.initializer_range = 0.05
    return config


def test_an_out_below_a_file_is_refused(random_llm, tmp_path):
    (tmp_path / "file").write_text("kept")
    run = run_stage(stage1, *QUICK, "--model", random_llm, "--out", tmp_path / "file" / "below")
    assert run.code == 2 and run.stderr.count("\n") == 1 and "--out" in run.stderr
    assert (tmp_path / "file").read_text() == "kept"


def test_out_of_memory_suggests_smaller_micro_batches(random_llm, tmp_path, monkeypatch):
    def answer_logits(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(stage1, "answer_logits", answer_logits)
    run = run_stage(stage1, *QUICK, "--llm-steps", "1", "--model", random_llm, "--out", tmp_path / "out")
    assert run.code == 2 and "--micro-batch-size" in run.stderr and run.stderr.count("\n") == 1
