"""Stage 3 as its users run it: coder and predictor, the message, the sender, and two receivers of one message."""

import json
import random
import re
import shutil
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import CPU, HERE, QUICK, Run, run_script, run_stage, succeed

import stage3_full as stage3
from common import PROMPT, load_reader
from plumbing.hub import AutoModelForCausalLM, AutoTokenizer
from plumbing.launch import UserError, launch
from plumbing.report import RESULT_KEYS
from plumbing.wires import load_wire
from stage3.message import BROKEN, CARRIES, MAX_TEXT, FromBits, IntegerPredictor, inflate, to_bits
from stage3.receivers import load_receiver
from tiny import world

SHIPPED = HERE / stage3.SHIPPED
PASSAGE = "Pergalan is a firm. It sells olive oil to the town of Stelvidan."
QUESTION = "What does Pergalan sell?"
ODD_TEXTS = (
    PASSAGE, "Hello Émile 😀 naïve  x\n12345 cafe\u0301", "ALL CAPS and lower", "👍🏽🇫🇷❤️ ok", "\t\n  \n",
    "中文字 한국어",
    "", "a", " ", "\x00\x7f", "x" * 300, "a </s> b <s> <unk>", "▁", "\ufeff" * 40, PASSAGE * 60,
)  # fmt: skip


# --- the coder and the predictor


def test_the_coder_gives_back_what_it_was_given_at_the_price_of_its_information():
    rng = np.random.default_rng(0)
    frequencies = rng.integers(1, 1000, (2000, 50))
    frequencies[::7, 3] = 10**6  # near certainty, and near impossibility
    ends = frequencies.cumsum(1)
    chosen = [int(rng.choice(50, p=row / row.sum())) for row in frequencies]
    intervals = [(int(row[i - 1]) if i else 0, int(row[i]), int(row[-1])) for row, i in zip(ends, chosen, strict=True)]
    data = to_bits(intervals)
    bits = FromBits(data)
    assert [bits.next(row) for row in ends] == chosen
    information = sum(np.log2(total / (end - start)) for start, end, total in intervals)
    assert information / 8 <= len(data) + 1 and len(data) <= information / 8 * 1.001 + 1


def random_inputs(vocabulary: int) -> list[np.ndarray]:
    """Contexts, copies and what was seen, in front of each index of four random messages."""
    lists = [[random.Random(i).randrange(vocabulary) for _ in range(40)] * 2 for i in range(4)]
    every = [stage3.features(ids, vocabulary, None) for ids in lists]
    return [np.concatenate(part) for part in zip(*every, strict=True)]


def by_hand(tensors: dict, context: np.ndarray, copy: np.ndarray, seen: np.ndarray) -> list[int]:
    """The frequencies at one place in Python's own integers, which never round."""
    vocabulary = len(seen)
    row = [int(v) for i in [*context, *copy] for v in tensors["embedding.weight"][i].tolist()]
    for name in ("hidden", "out"):
        weight, bias = tensors[f"{name}.weight"].tolist(), tensors[f"{name}.bias"].tolist()
        row = [
            (sum(w * x for w, x in zip(ws, row, strict=True)) + b * 4096) // 4096
            for ws, b in zip(weight, bias, strict=True)
        ]
        row = [min(max(value, 0), 1 << 22) for value in row] if name == "hidden" else row
    logits = row[:vocabulary] + [0]
    for order, index in enumerate(copy.tolist()):
        logits[index] += row[vocabulary + order]
    logits = [value + row[-1] * int(was) for value, was in zip(logits[:vocabulary], seen.tolist(), strict=True)]
    table = tensors["exponential"].tolist()
    weights = [table[min((max(logits) - value) >> 6, 1023)] for value in logits]
    return [1 + w * (IntegerPredictor.TOTAL - vocabulary) // sum(weights) for w in weights]


def assert_exact(tensors: dict, inputs: list[np.ndarray]) -> np.ndarray:
    """The frequencies are the same in a batch, row by row, and by hand: not a bit differs. Returns them."""
    whole = IntegerPredictor(tensors, None)
    frequencies = whole.frequencies(*inputs)
    assert frequencies.min() >= 1 and frequencies.sum(1).max() <= whole.TOTAL
    one_by_one = [whole.frequencies(*(part[i : i + 1] for part in inputs))[0] for i in range(8)]
    assert np.array_equal(np.stack(one_by_one), frequencies[:8])
    for i in (5, 77):
        assert frequencies[i].tolist() == by_hand(tensors, *(part[i] for part in inputs))
    return frequencies


def test_the_predictor_in_use_is_the_trained_one_and_is_exact():
    torch.manual_seed(0)
    trained = stage3.Predictor(300)
    with torch.no_grad():
        for layer in (trained.hidden, trained.out):
            layer.weight.mul_(3)
    inputs = random_inputs(300)
    frequencies = assert_exact(IntegerPredictor.tensors(trained), inputs)
    with torch.no_grad():
        logits = trained(*(torch.from_numpy(part) for part in inputs))
    shares = torch.from_numpy(frequencies / frequencies.sum(1, keepdims=True))
    torch.testing.assert_close(shares, logits.softmax(1).double(), atol=0.02, rtol=0.1)


def test_the_predictor_is_exact_with_the_largest_numbers():
    """Its sums reach 2^46: float32 keeps 24 bits of them. The last layer's rows differ little, so that it shows."""
    generator = torch.Generator().manual_seed(0)
    tensors = IntegerPredictor.tensors(stage3.Predictor(300))
    for name in ("embedding.weight", "hidden.weight", "hidden.bias", "out.bias"):
        shape = tensors[name].shape
        tensors[name] = torch.randint(-32768, 32768, shape, generator=generator, dtype=torch.int16)
    rows, columns = tensors["out.weight"].shape
    row = torch.randint(-30000, 30000, (1, columns), generator=generator, dtype=torch.int16)
    tensors["out.weight"] = row + torch.randint(-2, 3, (rows, columns), generator=generator, dtype=torch.int16)
    tensors["out.weight"][300:] //= 4096  # what a copy adds, and an earlier index: no more than the others differ by
    tensors["out.bias"] //= 64
    frequencies = assert_exact(tensors, random_inputs(300))
    assert np.median((frequencies > 100).sum(1)) > 3  # not one index with all, so the numbers behind them show


def test_sender_and_receiver_see_the_same_history():
    ids = [5, 6, 7, 5, 6, 7, 5, 6, 8, 5, 6]
    contexts, copies, seen = stage3.features(ids, 10, None)
    assert copies[5].tolist() == [10, 7, 7] and copies[8].tolist() == [7, 7, 7] and copies[0].tolist() == [10] * 3
    assert contexts[2].tolist() == [10] * 6 + [5, 6] and seen[3].nonzero()[0].tolist() == [5, 6, 7]


def test_a_text_has_the_same_latents_alone_and_beside_others(codec):
    """In training, the encoder reads the texts of a step end to end: no byte may see another text."""
    rows = world.make_examples("test", 24)
    texts = [text for text in ODD_TEXTS if text] + [row["context"] for row in rows] + [row["question"] for row in rows]
    assert codec.latents(texts) == [codec.latents([text])[0] for text in texts]


# --- the message


@pytest.mark.parametrize("text", ODD_TEXTS)
@pytest.mark.parametrize("carries", CARRIES)
def test_any_text_arrives_bit_for_bit(codec, text, carries):
    message = codec.send(text, carries)
    codec.text.cache_clear()
    assert codec.text(message) == (text, carries)
    assert len(message) <= len(zlib.compress(text.encode(), 9)) + 9


def test_a_message_is_much_shorter_than_its_text(codec):
    texts = [PROMPT.format(**row) for row in world.make_examples("test", 50)]
    assert sum(len(codec.send(text, "prompt")) for text in texts) < sum(len(text.encode()) for text in texts) / 4


def test_texts_that_cannot_be_sent_are_refused(codec):
    for text, words in (("half \ud800", "surrogate"), ("x" * 65537, "longer than the 65536 bytes")):
        with pytest.raises(UserError, match=words):
            codec.send(text, "prompt")


def test_the_format_is_the_documented_one(codec):
    message = codec.send(PASSAGE, "context")
    assert message[:2] == b"LW" and message[2] == 1 | 128 and message[3:5] == codec.fingerprint
    assert message[5] == len(codec.latents([PASSAGE])[0]) < 128
    assert struct.unpack("<I", message[-4:])[0] == zlib.crc32(message[:-4])


def test_messages_of_another_machine_are_read(codec):
    """They were made once with the shipped wire: whatever reads them predicts bit for bit what the sender predicted."""
    for message, text in (
        ("4c5781134518489c160f1c51af0bcbb4fdc89a56ff1fad4498f70443", PASSAGE),
        ("4c578113450471dab3fe3a228097178ba1", "Émile 😀"),
    ):
        assert codec.text(bytes.fromhex(message)) == (text, "context")


def test_damaged_and_foreign_messages_are_refused_by_name(codec):
    message = codec.send(PASSAGE, "prompt")
    flipped = bytearray(message)
    flipped[8] ^= 4
    other = message[:3] + bytes([message[3] ^ 1]) + message[4:-4]
    newer = message[:2] + bytes([2]) + message[3:]
    for bad, words in (
        (b"", "not a LatentWire message"), (b"PK\3\4" + message, "not a LatentWire message"), (message[:7], "cut off"),
        (message[:-1], "checksum"), (message + b"\0", "checksum"), (bytes(flipped), "checksum"),
        (other + struct.pack("<I", zlib.crc32(other)), "another wire"), (newer, "version 2"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words) as refusal:
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


@pytest.mark.parametrize("count", (2_000, pytest.param(100_000, marks=pytest.mark.slow)))
def test_mutated_messages_are_refused_or_read(codec, count):
    rng = random.Random(0)
    messages = [codec.send(text, "prompt") for text in ODD_TEXTS]
    for i in range(count):
        try:
            text, _ = codec.text(mutated(rng, messages[i % len(messages)]))
        except UserError:
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
            assert len(text.encode()) <= MAX_TEXT
            outcomes.add("read")
        except UserError as refusal:
            outcomes.add(str(refusal))
    assert {"read", BROKEN} <= outcomes
    assert all(outcome == "read" or "cut off" in outcome or outcome == BROKEN for outcome in outcomes)
    bomb = zlib.compress(b"a" * 10_000_000, 9)
    for body, flags in ((bomb, 65), (b"\xff\xff\x7f", 1), (b"\xff" * 40, 1), (b"\xff\xff\x03", 1), (b"\0", 1)):
        data = b"LW" + bytes([flags]) + codec.fingerprint + body
        with pytest.raises(UserError, match="not well formed"):
            codec.text(data + struct.pack("<I", zlib.crc32(data)))


# --- the sender, and several receivers


def test_one_process_sends_and_another_receives(tmp_path):
    row = world.make_examples("test", 1)[0]
    text = tmp_path / "passage.txt"
    text.write_text(row["context"])
    send = [sys.executable, HERE / "stage3_full.py", "--send", text, "--wire-carries", "context"]
    message = subprocess.run(send, cwd=tmp_path, capture_output=True, check=True).stdout
    assert len(message) < len(row["context"]) / 3
    (tmp_path / "message").write_bytes(message)
    for model in ("tiny", "tiny-qwen"):
        run = succeed(stage3, "--receive", tmp_path / "message", "--model", model, "--question", row["question"])
        assert run.stdout.strip() in row["answers"]


def test_the_sender_loads_no_llm(monkeypatch, capfdbinary):
    def refuse(*args, **kwargs):
        raise AssertionError("the sender loaded a model or a tokenizer")

    for loader in (AutoModelForCausalLM, AutoTokenizer):
        monkeypatch.setattr(loader, "from_pretrained", refuse)
    monkeypatch.setattr(stage3, "load_reader", refuse)
    monkeypatch.setattr(sys, "argv", ["stage3_full.py", "--send", PASSAGE, "--question", "What is sold?"])
    launch(stage3.main)
    assert capfdbinary.readouterr().out.startswith(b"LW\1")


def test_each_receiver_is_the_stage2_wire_of_its_own_llm():
    saved = load_wire(str(SHIPPED), "stage3", stage3.WIRE)
    for number, (name, stage2) in enumerate((("tiny", "stage2"), ("tiny-qwen", "stage2-qwen"))):
        reader, entry = load_reader(name, CPU, torch.float32), saved.config["receivers"][number]
        assert (entry["model"], entry["fingerprint"]) == (name, reader.fingerprint)
        receiver = load_receiver(saved.tensors, entry, reader, "shipped")
        below = safetensors.torch.load_file(HERE / "tiny" / "wires" / stage2 / "wire.safetensors")
        mine = {f"encoder.{key}": tensor for key, tensor in receiver.encoder.state_dict().items()}
        mine |= {f"adapter.{key}": tensor for key, tensor in receiver.adapter.state_dict().items()}
        mine |= {"prefix_codes": receiver.prefix_codes, "target_rms": receiver.constant_rms}
        assert all(torch.equal(tensor, below[key]) for key, tensor in mine.items())
        assert mine.keys() == below.keys() - {"mean", "components"}


def test_a_third_llm_joins_with_a_stage2_wire(codec, tmp_path, random_llm, ladder, no_picture):
    """Its stages 1 and 2 are trained; the sender and its messages stay."""
    joins = ("--eval-only", SHIPPED, "--stage2", ladder / "stage2", "--eval-examples", "8")
    joined = succeed(stage3, *joins, "--out", tmp_path / "3")
    assert joined.result["model"] == str(random_llm) and joined.result["positions"] > 0
    (tmp_path / "message").write_bytes(codec.send(PROMPT.format(context=PASSAGE, question="What?"), "prompt"))
    succeed(stage3, "--receive", tmp_path / "message", "--wire", tmp_path / "3", "--model", random_llm)
    twice = run_stage(stage3, "--eval-only", SHIPPED, "--stage2", "tiny/wires/stage2", "--out", tmp_path / "4")
    assert twice.code == 2 and "there is a receiver for tiny already" in twice.stderr


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
        (("--receive", tmp_path / "latin"), "not a LatentWire message"),
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


def test_no_exception_is_shared_by_two_messages():
    """A shared one keeps the frames, and with them the messages, of every time that it was raised."""
    errors = []
    for _ in range(2):
        with pytest.raises(UserError, match="not well formed") as caught:
            inflate(b"no deflated text")
        errors.append(caught.value)
    assert errors[0] is not errors[1]


def test_a_tampered_wire_is_refused(tmp_path):
    wire = shutil.copytree(SHIPPED, tmp_path / "wire")
    tensors = safetensors.torch.load_file(wire / "wire.safetensors")
    del tensors["sender.lengths"]
    safetensors.torch.save_file(tensors, wire / "wire.safetensors")
    run = run_stage(stage3, "--send", "x", "--question", "y", "--wire", wire)
    assert run.code == 2 and "sender.lengths in wire.safetensors is not there" in run.stderr


# --- training and evaluation


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[Run, object]:
    """A short training that measures both receivers of the shipped stage-2 wires, and its directory."""
    out = tmp_path_factory.mktemp("both") / "out"
    return succeed(stage3, *QUICK, "--out", out), out


def check_both(run: Run, out, examples: int, again) -> None:
    """Both receivers were measured on the same messages, and --eval-only finds the same."""
    assert list(run.result) == RESULT_KEYS and run.result["model"] == "tiny"
    assert len(re.findall(f"bit for bit +{examples}  of {examples}\n", run.stdout)) == 2
    config = json.loads((out / "config.json").read_text())
    assert [entry["metrics"]["model"] for entry in config["others"]] == ["tiny-qwen"]
    assert config["others"][0]["metrics"]["wire_bytes"] == run.result["wire_bytes"]  # one message
    assert (out / "tiny-qwen" / "report.png").exists()
    flags = ("--eval-only", out, "--eval-examples", examples, "--model", "tiny-qwen", "--out", again)
    result = succeed(stage3, *flags).result
    for key in ("f1", "nll_wire", "wire_bytes", "shuffled_f1"):
        assert result[key] == config["others"][0]["metrics"][key]


def test_a_run_measures_both_receivers_with_the_same_messages(both, tmp_path):
    check_both(*both, 8, tmp_path)


@pytest.mark.slow
def test_a_smoke_run_measures_both_receivers_with_the_same_messages(tmp_path):
    run = run_script(stage3, "--smoke", "--out", tmp_path / "out")
    assert run.code == 0, run.stderr
    check_both(run, tmp_path / "out", 40, tmp_path / "again")


def test_the_receiver_measured_does_not_change_the_training(both, tmp_path, no_picture):
    _, out = both
    succeed(stage3, *QUICK, "--eval-examples", "2", "--model", "tiny-qwen", "--out", tmp_path)
    for name in ("metrics.jsonl", "wire.safetensors"):
        mine, theirs = (
            [json.loads(row) | {"seconds": 0} for row in (place / name).read_text().splitlines()]
            if name.endswith("jsonl")
            else (place / name).read_bytes()
            for place in (tmp_path, out)
        )
        assert mine == theirs


def test_context_alone_travels_and_the_shuffled_control_is_another_message(codec, tmp_path, no_picture):
    rows = world.make_examples("test", 30)
    evaluate = ("--eval-only", SHIPPED, "--model", "tiny", "--eval-examples", len(rows))
    run = succeed(stage3, *evaluate, "--wire-carries", "context", "--out", tmp_path / "out")
    whole = succeed(stage3, *evaluate, "--out", tmp_path / "b")
    assert run.result["f1"] == whole.result["f1"] >= run.result["text_f1"]
    assert run.result["wire_bytes"] < whole.result["wire_bytes"]
    assert run.result["text_bytes"] < whole.result["text_bytes"]
    assert run.result["shuffled_f1"] < 20
    # bytes are those of whole messages with their frames, and of what they carry
    for result, carries, texts in (
        (run.result, "context", [row["context"] for row in rows]),
        (whole.result, "prompt", [PROMPT.format(**row) for row in rows]),
    ):
        mean_bytes = sum(len(codec.send(text, carries)) for text in texts) / len(rows)
        assert result["wire_bytes"] == pytest.approx(mean_bytes, rel=1e-5)
        assert result["text_bytes"] == pytest.approx(sum(len(text.encode()) for text in texts) / len(rows), rel=1e-5)


@pytest.mark.parametrize("without", stage3.ABLATIONS)
def test_every_ablation_runs_and_its_messages_are_read(without, ladder, tmp_path, no_picture):
    succeed(stage3, *QUICK, "--stage2", ladder / "stage2", "--without", without, "--out", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["without"] == without and config["controls"]["arrived"] == 8


def write_data(file) -> None:
    """rows.jsonl, of which some rows have no context and some no question; or some.txt."""
    rows = [{"context": f"Town {i} sells oil." * (i % 9 > 0), "question": "What?" * (i % 7 > 0), "answers": ["oil"]}
            for i in range(200)]  # fmt: skip
    text = "Once upon a time there was a town. It sold olive oil to Stelvidan. " * 300
    file.write_text(text if file.suffix == ".txt" else "".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("file", ("rows.jsonl", "some.txt"))
def test_plain_text_and_a_row_with_nothing_in_it_arrive(file, tmp_path, no_picture):
    write_data(tmp_path / file)
    data = ("--data", tmp_path / file)
    run = succeed(stage3, *QUICK, "--model", "tiny-qwen", *data, "--out", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["controls"]["arrived"] == run.result["examples"]
    flags = ("--eval-only", SHIPPED, "--wire-carries", "context", "--eval-examples", "8")
    run = run_stage(stage3, *flags, *data, "--out", tmp_path / "b")
    if file == "rows.jsonl":
        assert run.code == 0, run.stderr
    else:
        assert run.code == 2 and "plain text has no questions" in run.stderr
