"""Stage 3 as its users run it: the message format, its coder, and two receivers of one message."""

import hashlib
import json
import math
import random
import shutil
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import HERE, run_stage

import common
import stage1_pca_adapter as stage1
import stage2_encoder as stage2
import stage3_full as stage3

SHIPPED = HERE / stage3.SHIPPED
QUICK = ("--steps", "4", "--batch-size", "4", "--eval-examples", "8")
PASSAGE = "Pergalan is a firm. It sells olive oil to the town of Stelvidan."
ODD_TEXTS = (
    PASSAGE, "Hello Émile 😀 naïve  x\n12345 cafe\u0301", "ALL CAPS and lower", "👍🏽🇫🇷❤️ ok", "\t\n  \n",
    "中文字 한국어",
    "", "a", " ", "\x00\x7f", "x" * 300, "a </s> b <s> <unk>", "▁", "\ufeff" * 40, PASSAGE * 60,
)  # fmt: skip


@pytest.fixture(scope="module")
def codec():
    tensors, config = common.load_wire(str(SHIPPED), "stage3", ("without",), stage3.NEEDED)
    return stage3.Codec(tensors, config["without"], torch.device("cpu"))


# --- the coder and the predictor


def test_the_coder_gives_back_what_it_was_given_at_the_price_of_its_information():
    rng = np.random.default_rng(0)
    frequencies = rng.integers(1, 1000, (2000, 50))
    frequencies[::7, 3] = 10**6  # near certainty, and near impossibility
    ends = frequencies.cumsum(1)
    chosen = [int(rng.choice(50, p=row / row.sum())) for row in frequencies]
    intervals = [(int(row[i - 1]) if i else 0, int(row[i]), int(row[-1])) for row, i in zip(ends, chosen, strict=True)]
    data = stage3.to_bits(intervals)
    bits = stage3.FromBits(data)
    assert [bits.next(row) for row in ends] == chosen
    information = sum(np.log2(total / (end - start)) for start, end, total in intervals)
    assert information / 8 <= len(data) + 1 and len(data) <= information / 8 * 1.001 + 1


def test_the_predictor_in_use_is_the_trained_one_and_is_exact():
    torch.manual_seed(0)
    trained = stage3.Predictor(300)
    with torch.no_grad():
        for layer in (trained.hidden, trained.out):
            layer.weight.mul_(3)
    lists = [[random.Random(i).randrange(300) for _ in range(40)] * 2 for i in range(4)]
    contexts, copies, seen = (
        np.concatenate(part) for part in zip(*(stage3.features(x, 300, None) for x in lists), strict=True)
    )
    tensors = stage3.IntegerPredictor.tensors(trained)
    whole = stage3.IntegerPredictor(tensors, None)
    frequencies = whole.frequencies(contexts, copies, seen)
    assert frequencies.min() >= 1 and frequencies.sum(1).max() <= whole.TOTAL
    with torch.no_grad():
        logits = trained(*(torch.from_numpy(part) for part in (contexts, copies, seen)))
    shares = torch.from_numpy(frequencies / frequencies.sum(1, keepdims=True))
    torch.testing.assert_close(shares, logits.softmax(1).double(), atol=0.02, rtol=0.1)
    # row by row, in any order, and in Python's own integers: not a bit differs
    one_by_one = [whole.frequencies(contexts[i : i + 1], copies[i : i + 1], seen[i : i + 1])[0] for i in range(8)]
    assert np.array_equal(np.stack(one_by_one), frequencies[:8])
    row = [int(v) for i in [*contexts[5], *copies[5]] for v in tensors["embedding.weight"][i].tolist()]
    for name in ("hidden", "out"):
        weight, bias = tensors[f"{name}.weight"].tolist(), tensors[f"{name}.bias"].tolist()
        row = [
            (sum(w * x for w, x in zip(ws, row, strict=True)) + b * 4096) // 4096
            for ws, b in zip(weight, bias, strict=True)
        ]
        row = [min(max(value, 0), 1 << 22) for value in row] if name == "hidden" else row
    logits = row[:300] + [0]
    for order, index in enumerate(copies[5].tolist()):
        logits[index] += row[300 + order]
    logits = [value + row[-1] * int(was) for value, was in zip(logits[:300], seen[5].tolist(), strict=True)]
    table = tensors["exponential"].tolist()
    weights = [table[min((max(logits) - value) >> 6, 1023)] for value in logits]
    assert frequencies[5].tolist() == [1 + w * (whole.TOTAL - 300) // sum(weights) for w in weights]


def test_sender_and_receiver_see_the_same_history():
    ids = [5, 6, 7, 5, 6, 7, 5, 6, 8, 5, 6]
    contexts, copies, seen = stage3.features(ids, 10, None)
    assert copies[5].tolist() == [10, 7, 7] and copies[8].tolist() == [7, 7, 7] and copies[0].tolist() == [10] * 3
    assert contexts[2].tolist() == [10] * 6 + [5, 6] and seen[3].nonzero()[0].tolist() == [5, 6, 7]


# --- the message


@pytest.mark.parametrize("text", ODD_TEXTS)
@pytest.mark.parametrize("carries", stage3.CARRIES)
def test_any_text_arrives_bit_for_bit(codec, text, carries):
    message = codec.send(text, carries)
    codec.known.clear()
    assert codec.text(message) == (text, carries)
    assert len(message) <= len(zlib.compress(text.encode(), 9)) + 9


def test_a_message_is_much_shorter_than_its_text(codec):
    rows = common.load_data("tiny", common.load_reader("tiny", torch.device("cpu"), torch.float32), 50).test
    texts = [common.PROMPT.format(context=row["context"], question=row["question"]) for row in rows]
    assert sum(len(codec.send(text, "prompt")) for text in texts) < sum(len(text.encode()) for text in texts) / 4


def test_texts_that_cannot_be_sent_are_refused(codec):
    for text, words in (("half \ud800", "surrogate"), ("x" * 65537, "longer than the 65536 bytes")):
        with pytest.raises(common.UserError, match=words):
            codec.send(text, "prompt")


def test_the_format_is_the_documented_one(codec):
    message = codec.send(PASSAGE, "context")
    assert message[:2] == b"LW" and message[2] == 1 | 128 and message[3:5] == codec.fingerprint
    assert message[5] == len(codec.latents([PASSAGE])[0]) < 128
    assert struct.unpack("<I", message[-4:])[0] == zlib.crc32(message[:-4])


def test_messages_of_another_machine_are_read(codec):
    """Made once with the shipped wire: whatever reads them predicts bit for bit what the sender predicted."""
    for message, text in (
        ("4c57811c001b4c2d4d0fa6fc05d73122db35af316f9293ce1e82e69883807f90259c", PASSAGE),
        ("4c57811c000a00902c9fc66dc0bc52fc58", "Émile 😀"),
    ):
        assert codec.text(bytes.fromhex(message)) == (text, "context")


def test_damaged_and_foreign_messages_are_refused_by_name(codec):
    message = codec.send(PASSAGE, "prompt")
    flipped = bytearray(message)
    flipped[8] ^= 4
    other = message[:3] + bytes([message[3] ^ 1]) + message[4:-4]
    newer = message[:2] + bytes([2]) + message[3:]
    for bad, words in (
        (b"", "no LatentWire message"), (b"PK\3\4" + message, "no LatentWire message"), (message[:7], "cut off"),
        (message[:-1], "checksum"), (message + b"\0", "checksum"), (bytes(flipped), "checksum"),
        (other + struct.pack("<I", zlib.crc32(other)), "another wire"), (newer, "version 2"),
    ):  # fmt: skip
        with pytest.raises(common.UserError, match=words) as refusal:
            codec.text(bad)
        assert "\n" not in str(refusal.value)


def mutated(rng: random.Random, message: bytes) -> bytes:
    data = bytearray(message)
    for _ in range(rng.randint(1, 4)):
        kind, at = rng.randrange(4), rng.randrange(len(data) + 1)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at:at] = rng.randbytes(rng.randint(1, 8))
        elif kind == 2:
            del data[at : at + rng.randint(1, 8)]
        elif at < len(data):
            data[at] = rng.randrange(256)
    return bytes(data)


def test_100000_mutated_messages_are_refused_or_read(codec):
    rng = random.Random(0)
    messages = [codec.send(text, "prompt") for text in ODD_TEXTS]
    for i in range(100_000):
        try:
            text, _ = codec.text(mutated(rng, messages[i % len(messages)]))
        except common.UserError:
            continue
        assert text in ODD_TEXTS  # a mutation of a mutation may undo it


def test_mutated_messages_with_a_fitting_checksum_never_crash_or_grow(codec):
    rng = random.Random(0)
    messages = [codec.send(text, "prompt") for text in ODD_TEXTS]
    outcomes = set()
    for i in range(400):
        body = mutated(rng, messages[i % len(messages)][5:-4])
        flags = bytes([1 | rng.choice((0, 64, 128, 192))])
        data = b"LW" + flags + codec.fingerprint + body
        try:
            text, _ = codec.text(data + struct.pack("<I", zlib.crc32(data)))
            assert len(text.encode()) <= stage3.MAX_TEXT
            outcomes.add("read")
        except common.UserError as refusal:
            outcomes.add(str(refusal))
    assert {"read", str(stage3.BROKEN)} <= outcomes
    assert all(outcome == "read" or "cut off" in outcome or outcome == str(stage3.BROKEN) for outcome in outcomes)
    bomb = zlib.compress(b"a" * 10_000_000, 9)
    for body, flags in ((bomb, 65), (b"\xff\xff\x7f", 1), (b"\xff" * 40, 1), (b"\xff\xff\x03", 1), (b"\0", 1)):
        data = b"LW" + bytes([flags]) + codec.fingerprint + body
        with pytest.raises(common.UserError, match="not well formed"):
            codec.text(data + struct.pack("<I", zlib.crc32(data)))


# --- two processes


def test_one_process_sends_and_another_receives(tmp_path):
    text = tmp_path / "passage.txt"
    text.write_text(PASSAGE)
    send = [sys.executable, HERE / "stage3_full.py", "--send", text, "--wire-carries", "context"]
    message = subprocess.run(send, cwd=tmp_path, capture_output=True, check=True).stdout
    assert len(message) < len(PASSAGE)
    (tmp_path / "message").write_bytes(message)
    for model in ("tiny", "tiny-qwen"):
        run = run_stage(
            stage3, "--receive", tmp_path / "message", "--model", model, "--question", "What does Pergalan sell?"
        )
        assert run.code == 0 and run.stdout.strip(), run.stderr


def test_the_sender_loads_no_llm(monkeypatch, capfdbinary):
    def refuse(*args, **kwargs):
        raise AssertionError("the sender loaded a model or a tokenizer")

    for name in ("AutoModelForCausalLM", "AutoTokenizer"):
        monkeypatch.setattr(getattr(common, name), "from_pretrained", refuse)
    monkeypatch.setattr(common, "load_reader", refuse)
    monkeypatch.setattr(sys, "argv", ["stage3_full.py", "--send", PASSAGE, "--question", "What is sold?"])
    common.run(stage3.main)
    assert capfdbinary.readouterr().out.startswith(b"LW\1")


def test_wrong_uses_are_one_line(tmp_path, codec, random_llm):
    (tmp_path / "prompt").write_bytes(codec.send(PASSAGE, "prompt"))
    (tmp_path / "context").write_bytes(codec.send(PASSAGE, "context"))
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for flags, words in (
        (("--send", "x", "--receive", "y"), "two processes"),
        (("--send", "x"), "needs a --question"),
        (("--send", " "), "no text to send"),
        (("--send", "x", "--question", "y", "--wire-carries", "context"), "drop --question"),
        (("--send", tmp_path / "latin", "--question", "y"), "not UTF-8"),
        (("--send", "x", "--question", "y", "--wire", tmp_path), "is not a trained wire"),
        (("--receive", tmp_path / "nothing"), "No such file"),
        (("--receive", tmp_path / "latin"), "no LatentWire message"),
        (("--receive", tmp_path / "prompt", "--question", "What?"), "give no --question"),
        (("--receive", tmp_path / "context"), "give a --question"),
        (("--receive", tmp_path / "prompt", "--model", random_llm), "has no receiver for"),
        (("--eval-only", SHIPPED, "--model", random_llm), "has no receiver for"),
        (("--wire", SHIPPED), "--wire belongs to"),
        (("--question", "What?"), "--question belongs to"),
        (("--stage2", HERE / "tiny/wires/stage1"), "is a wire of stage1"),
        (("--stage2", "tiny/wires/stage2-qwen"), "it can receive, but not send"),
    ):
        run = run_stage(stage3, *flags, "--out", tmp_path / "out")
        assert run.code == 2 and words in run.stderr and run.stderr.count("\n") == 1, (flags, run.stderr)


# --- the script


def test_smoke_run_and_evaluation_of_what_it_trained(tmp_path):
    done = subprocess.run(
        [sys.executable, "stage3_full.py", "--smoke", "--out", tmp_path / "out"],
        cwd=HERE,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.strip().split("\n")[-1])
    assert (
        list(result) == common.RESULT_KEYS and result["model"] == "tiny" and "bit for bit      40  of 40" in done.stdout
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [entry["metrics"]["model"] for entry in config["others"]] == ["tiny-qwen"]
    assert config["others"][0]["metrics"]["wire_bytes"] == result["wire_bytes"]  # one message
    assert (tmp_path / "out" / "tiny-qwen" / "report.png").exists()
    again = run_stage(
        stage3,
        "--eval-only",
        tmp_path / "out",
        "--eval-examples",
        "40",
        "--model",
        "tiny-qwen",
        "--out",
        tmp_path / "b",
    )
    assert again.code == 0, again.stderr
    for key in ("f1", "nll_wire", "wire_bytes", "shuffled_f1"):
        assert again.result[key] == config["others"][0]["metrics"][key]


def test_context_alone_travels_and_the_shuffled_control_is_another_message(tmp_path):
    run = run_stage(
        stage3, "--eval-only", SHIPPED, "--model", "tiny", "--wire-carries", "context", "--eval-examples", "30",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert run.code == 0, run.stderr
    whole = run_stage(
        stage3, "--eval-only", SHIPPED, "--model", "tiny", "--eval-examples", "30", "--out", tmp_path / "b"
    )
    assert run.result["f1"] == whole.result["f1"] == run.result["text_f1"]
    assert run.result["wire_bytes"] < whole.result["wire_bytes"]
    assert run.result["text_bytes"] < whole.result["text_bytes"]
    assert run.result["shuffled_f1"] < 20


def test_resumed_run_equals_an_unbroken_one(tmp_path, monkeypatch):
    assert run_stage(stage3, *QUICK, "--out", tmp_path / "whole").code == 0
    save = common.save_checkpoint

    def save_then_stop(path, payload):
        save(path, payload)
        if payload["step"] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(common, "save_checkpoint", save_then_stop)
    assert run_stage(stage3, *QUICK, "--out", tmp_path / "broken").code == 130
    monkeypatch.setattr(common, "save_checkpoint", save)
    resumed = run_stage(stage3, *QUICK, "--resume", "--out", tmp_path / "broken")
    assert resumed.code == 0 and "resumed at step 3" in resumed.stdout
    wires = [hashlib.sha256((tmp_path / n / "wire.safetensors").read_bytes()).hexdigest() for n in ("whole", "broken")]
    assert wires[0] == wires[1]


def test_micro_batches_and_the_receiver_measured_change_nothing(tmp_path):
    flags = ("--steps", "3", "--batch-size", "4", "--eval-examples", "2")
    runs = {"a": (), "b": ("--micro-batch-size", "1"), "c": ("--model", "tiny-qwen")}
    losses = {}
    for name, more in runs.items():
        assert run_stage(stage3, *flags, *more, "--out", tmp_path / name).code == 0
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(row)["loss_index"] for row in rows]
    assert losses["a"] == pytest.approx(losses["b"], rel=1e-4) and losses["a"] == losses["c"]


@pytest.mark.parametrize("without", stage3.ABLATIONS)
def test_every_ablation_runs_and_its_messages_are_read(without, tmp_path):
    run = run_stage(stage3, *QUICK, "--without", without, "--model", "tiny", "--out", tmp_path / "out")
    assert run.code == 0, run.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["without"] == without and config["controls"]["arrived"] == 8


def test_a_third_llm_joins_with_a_stage2_wire(tmp_path, random_llm):
    """Its stages 1 and 2 are trained; the sender and its messages stay."""
    flags = ("--model", random_llm, "--smoke")
    assert run_stage(stage1, *flags, "--code-dim", "8", "--out", tmp_path / "1").code == 0
    assert run_stage(stage2, *flags, "--stage1", tmp_path / "1", "--out", tmp_path / "2").code == 0
    joined = run_stage(
        stage3, "--eval-only", SHIPPED, "--stage2", tmp_path / "2", "--eval-examples", "8", "--out", tmp_path / "3"
    )
    assert joined.code == 0, joined.stderr
    assert joined.result["model"] == str(random_llm) and joined.result["positions"] > 0
    send = (sys.executable, HERE / "stage3_full.py", "--send", PASSAGE, "--question", "What?", "--wire", SHIPPED)
    (tmp_path / "message").write_bytes(subprocess.run(send, capture_output=True, check=True).stdout)
    run = run_stage(stage3, "--receive", tmp_path / "message", "--wire", tmp_path / "3", "--model", random_llm)
    assert run.code == 0, run.stderr
    twice = run_stage(stage3, "--eval-only", SHIPPED, "--stage2", "tiny/wires/stage2", "--out", tmp_path / "4")
    assert twice.code == 2 and "there is a receiver for tiny already" in twice.stderr


def test_plain_text_and_a_row_with_nothing_in_it(tmp_path):
    rows = [{"context": f"Town {i} sells oil." * (i % 9 > 0), "question": "What?" * (i % 7 > 0), "answers": ["oil"]}
            for i in range(200)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "some.txt").write_text("Once upon a time there was a town. It sold olive oil to Stelvidan. " * 300)
    for file in ("rows.jsonl", "some.txt"):
        run = run_stage(stage3, *QUICK, "--model", "tiny-qwen", "--data", tmp_path / file, "--out", tmp_path / "out")
        assert run.code == 0, run.stderr
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["controls"]["arrived"] == run.result["examples"]
    flags = ("--eval-only", SHIPPED, "--wire-carries", "context", "--eval-examples", "8", "--out", tmp_path / "b")
    assert run_stage(stage3, *flags, "--data", tmp_path / "rows.jsonl").code == 0
    for file, code in (("rows.jsonl", 0), ("some.txt", 2)):
        run = run_stage(
            stage3, "--receiver", "direct", *QUICK, "--steps", "12", "--micro-batch-size", "1", "--data",
            tmp_path / file, "--out", tmp_path / "c",
        )  # fmt: skip
        assert run.code == code and (code == 0 or "no questions for a direct receiver" in run.stderr), run.stderr
    run = run_stage(stage3, *flags, "--data", tmp_path / "some.txt")
    assert run.code == 2 and "plain text has no questions" in run.stderr


def test_a_tampered_wire_is_refused(tmp_path):
    wire = shutil.copytree(SHIPPED, tmp_path / "wire")
    tensors = safetensors.torch.load_file(wire / "wire.safetensors")
    del tensors["sender.lengths"]
    safetensors.torch.save_file(tensors, wire / "wire.safetensors")
    run = run_stage(stage3, "--send", "x", "--question", "y", "--wire", wire)
    assert run.code == 2 and "lacks sender.lengths" in run.stderr


# --- a direct receiver


@pytest.fixture(scope="module")
def direct(codec):
    """A direct receiver for tiny with a pooler that has not been trained: what does not stay is just gone."""
    tensors, config = common.load_wire(str(SHIPPED), "stage3", ("receivers",), stage3.NEEDED)
    reader = common.load_reader("tiny", torch.device("cpu"), torch.float32)
    receiver = stage3.load_receiver(tensors, config["receivers"][0], reader, "shipped")
    torch.manual_seed(0)
    return stage3.DirectWire(codec, receiver, stage3.Pooler(192, receiver.constant_rms.item()), 2.0)


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_surprisal_is_what_a_message_costs(codec, text):
    nats = codec.surprisal(text)
    assert len(nats) == len(text.encode()) and (nats >= 0).all()
    message = stage3.unpack(codec.send(text, "context"), codec.fingerprint)
    if message.latents:
        assert abs(nats.sum() / math.log(2) / 8 - len(message.payload)) <= 2


def test_the_most_surprising_tokens_stay():
    reading = stage3.Reading(torch.zeros(9, 2), 2, 7, torch.tensor([1.0, 5.0, 1.0, 4.0, 1.0]))
    assert reading.stays(1).all()
    assert reading.stays(2).tolist() == [True, True, False, True, False]  # of equals, the first
    assert reading.stays(4).tolist() == [False, True, False, True, False]
    assert reading.stays(64).tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("context", (PASSAGE, PASSAGE * 3, "Hello Émile 😀 naïve", "\nQuestion: no", "", " "))
def test_a_direct_receiver_reads_the_contexts_surprising_tokens_and_the_question(direct, codec, context):
    message, question = codec.send(context, "context"), "What does Pergalan sell?"
    whole = stage3.Wire(codec, direct.receiver, "context").embeddings(message, question)
    reading = direct.read(context, question)
    torch.testing.assert_close(reading.embeddings, whole, rtol=0, atol=0)
    tokens = reading.last - reading.first
    assert reading.first == 1 and (tokens > 0) == bool(context) and len(reading.nats) == tokens
    if context:
        true = len(direct.receiver.reader.tokenizer(context, add_special_tokens=False)["input_ids"])
        assert abs(tokens - true) <= 1 + true // 20  # what the encoder finds, not what the tokenizer would
        assert reading.nats.sum() == pytest.approx(codec.surprisal(context).sum(), rel=1e-4)
    for rate in (1.0, 2.0, 4.0):
        short = stage3.DirectWire(codec, direct.receiver, direct.pooler, rate).embeddings(message, question)
        assert len(short) == len(whole) - tokens + math.ceil(tokens / rate)
        behind = len(whole) - reading.last
        assert torch.equal(short[:1], whole[:1]) and torch.equal(short[-behind:], whole[-behind:])
        kept = whole[reading.first : reading.last][reading.stays(rate)] if context else whole[:0]
        assert torch.equal(short[1 : len(short) - behind], kept)
    with pytest.raises(common.UserError, match="needs a message with a context"):
        direct.embeddings(codec.send(context or "x", "prompt"), None)


def test_the_pooler_reads_its_own_context_alone(direct):
    """What stands in the padding of a batch changes nothing."""
    torch.manual_seed(1)
    pooler = stage3.Pooler(192, 0.1)
    torch.nn.init.normal_(pooler.out.weight)
    x, stays = torch.randn(2, 12, 192), torch.rand(2, 12) < 0.5
    real = torch.ones(2, 12, dtype=torch.bool)
    real[0, 7:] = False
    alone = pooler(x[:1, :7], stays[:1, :7], real[:1, :7])
    torch.testing.assert_close(pooler(x, stays, real)[:1, :7], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(alone, x[:1, :7], atol=1e-2)


def test_the_teacher_of_a_direct_receiver_is_the_unpacking_one(direct):
    reader = direct.receiver.reader
    rows = common.load_data("tiny", reader, 4).test
    same = [part for part in stage3.direct_losses(direct, rows, [1.0] * 4, 4)]
    assert len(same) == 1 and same[0][0] < 0.2  # every token stays: the reader answers, and there is nothing to learn
    assert same[0][1].item() == pytest.approx(0, abs=1e-5) and same[0][2].item() == pytest.approx(0, abs=1e-8)
    rates = [2.0, 3.0, 2.0, 4.0]
    whole = torch.stack(next(iter(stage3.direct_losses(direct, rows, rates, 4))))
    parts = sum(torch.stack(part) for part in stage3.direct_losses(direct, rows, rates, 1))
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)
    assert whole.min() > 0.01
    whole.sum().backward()
    assert all(p.grad is None for p in reader.model.parameters())
    assert direct.pooler.out.weight.grad.abs().sum() > 0


def test_a_direct_receiver_is_trained_resumed_and_used(tmp_path, monkeypatch, codec, random_llm):
    flags = ("--receiver", "direct", "--rate", "3", *QUICK)
    whole = run_stage(stage3, *flags, "--out", tmp_path / "whole")
    assert whole.code == 0, whole.stderr
    save = common.save_checkpoint

    def save_then_stop(path, payload):
        save(path, payload)
        if payload["step"] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(common, "save_checkpoint", save_then_stop)
    assert run_stage(stage3, *flags, "--out", tmp_path / "broken").code == 130
    monkeypatch.setattr(common, "save_checkpoint", save)
    assert run_stage(stage3, *flags, "--resume", "--out", tmp_path / "broken").code == 0
    wires = [safetensors.torch.load_file(tmp_path / n / "wire.safetensors") for n in ("whole", "broken")]
    assert all(torch.equal(wires[0][name], wires[1][name]) for name in wires[0] | wires[1])
    shipped = safetensors.torch.load_file(SHIPPED / "wire.safetensors")
    assert all(torch.equal(shipped[name], wires[0][name]) for name in shipped)  # the sender and the rest stay
    assert wires[0]["receiver0.pooler.out.weight"].any()
    for without in stage3.DIRECT_ABLATIONS:
        run = run_stage(stage3, *flags, "--without", without, "--out", tmp_path / without)
        assert run.code == 0, run.stderr
        other = safetensors.torch.load_file(tmp_path / without / "wire.safetensors")
        assert not torch.equal(other["receiver0.pooler.out.weight"], wires[0]["receiver0.pooler.out.weight"])
    more = run_stage(stage3, *flags, "--wire", tmp_path / "whole", "--out", tmp_path / "more")
    assert more.code == 0 and more.result["nll_wire"] != whole.result["nll_wire"]  # it goes on from where it was
    losses = [json.loads((tmp_path / n / "metrics.jsonl").read_text().split("\n")[0]) for n in ("whole", "more")]
    assert losses[0]["loss_answer"] != losses[1]["loss_answer"]
    again = run_stage(
        stage3, "--eval-only", tmp_path / "whole", "--receiver", "direct", "--rate", "3", "--eval-examples", "8",
        "--out", tmp_path / "again",
    )  # fmt: skip
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert again.code == 0 and again.result["nll_wire"] == whole.result["nll_wire"] == config["metrics"]["nll_wire"]
    assert again.result["positions"] < 0.7 * again.result["text_positions"]
    cost = config["controls"]["prefill"]
    assert cost["direct"]["kv_bytes"] / cost["direct"]["positions"] == 2 * 5 * 192 * 4  # keys, values x layers x d x 4
    assert cost["unpack"]["kv_bytes"] / cost["unpack"]["positions"] == 2 * 5 * 192 * 4
    (tmp_path / "message").write_bytes(codec.send(PASSAGE, "context"))
    receive = ("--receive", tmp_path / "message", "--question", "What does Pergalan sell?", "--receiver", "direct")
    assert run_stage(stage3, *receive, "--wire", tmp_path / "whole").stdout.strip()
    for more, words in (
        (receive, "has no direct receiver for tiny"),
        (("--receiver", "direct", "--eval-only", SHIPPED), "has no direct receiver for tiny"),
        (("--receiver", "direct", "--wire-carries", "prompt"), "use --wire-carries context"),
        (("--receiver", "direct", "--stage2", "x"), "give --wire, not --stage2"),
        (("--receiver", "direct", "--without", "copies"), "leaves nothing out of a --receiver direct"),
        (("--without", "states"), "leaves nothing out of a --receiver unpack"),
        (("--receiver", "direct", "--send", "x"), "the message is the same"),
        (("--receiver", "direct", "--rate", "0.5"), "from 1 to 64"),
        (("--receiver", "direct", "--model", random_llm), "has no receiver for"),
        (("--rate", "2"), "--rate belongs to"),
    ):
        run = run_stage(stage3, *more, *(() if "--receive" in more else ("--out", tmp_path / "out")))
        assert run.code == 2 and words in run.stderr and run.stderr.count("\n") == 1, (more, run.stderr)
