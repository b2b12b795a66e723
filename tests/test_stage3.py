"""Stage 3 as its users run it: coder and predictor, the message, the sender, and any LLM that reads it."""

import base64
import json
import random
import re
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
from plumbing.launch import UserError
from plumbing.report import RESULT_KEYS
from stage3.message import CARRIES, MAX_TEXT, VERSION, Decoder, broken, deflate, encode, inflate
from stage3.sender import CONTEXT, MAX_LATENTS, MEMBERS, ORDERS, SEES, IntegerPredictor
from tiny import world

SHIPPED = HERE / stage3.SHIPPED
PASSAGE = "Pergalan is a firm. It sells olive oil to the town of Stelvidan."
QUESTION = "What does Pergalan sell?"
ODD_TEXTS = (
    PASSAGE, "Hello Émile 😀 naïve  x\n12345 cafe\u0301", "ALL CAPS and lower", "👍🏽🇫🇷❤️ ok", "\t\n  \n",
    "中文字 한국어",
    "", "a", " ", "\x00\x7f", "x" * 300, "\0" * 500, "a </s> b <s> <unk>", "▁", "\ufeff" * 40, PASSAGE * 60,
)  # fmt: skip


# --- the coder and the predictor


def test_the_coder_gives_back_what_it_was_given_at_the_price_of_its_information():
    rng = np.random.default_rng(0)
    frequencies = rng.integers(1, 1000, (2000, 50))
    frequencies[::7, 3] = 10**6  # near certainty, and near impossibility
    ends = frequencies.cumsum(1)
    chosen = [int(rng.choice(50, p=row / row.sum())) for row in frequencies]
    intervals = [(int(row[i - 1]) if i else 0, int(row[i]), int(row[-1])) for row, i in zip(ends, chosen, strict=True)]
    for count in (0, 1, 2, 3, 5, 8, 40, 2000):
        data = encode(intervals[:count])
        numbers = Decoder(data)
        assert [numbers.next(row) for row in ends[:count]] == chosen[:count]
        information = sum(np.log2(total / (end - start)) for start, end, total in intervals[:count]) / 8
        assert information <= len(data) + 1 and len(data) <= information * 1.0001 + 1


def test_a_message_of_zeros_keeps_what_its_reader_looks_for():
    """Every interval begins at 0. A reader refuses more than 16 bytes beyond the end of a message."""
    data, ends = encode([(0, 1, 2)] * 300), np.array([1, 2])
    numbers = Decoder(data)
    assert [numbers.next(ends) for _ in range(300)] == [0] * 300 and numbers.read <= len(data) + 16


def random_tensors(large: bool = False) -> dict[str, np.ndarray]:
    """Those of a predictor of 4 groups; `large`: with the largest numbers in front of the last layer."""
    torch.manual_seed(0)
    predictor = stage3.Predictor(4 * MEMBERS)
    with torch.no_grad():
        predictor.hidden.weight.mul_(3)
    tensors = {name.removeprefix("predictor."): t.numpy() for name, t in predictor.integers().items()}
    if large:
        rng = np.random.default_rng(0)
        for name in ("embedding.weight", "hidden.weight", "hidden.bias"):
            tensors[name] = rng.integers(-32768, 32768, tensors[name].shape).astype(np.int16)
        for name in ("group", "members"):  # rows that differ little, so that a bit that is lost shows
            row = rng.integers(-30000, 30000, (1, tensors[f"{name}.weight"].shape[1]))
            shape = tensors[f"{name}.weight"].shape
            tensors[f"{name}.weight"] = (row + rng.integers(-2, 3, shape)).astype(np.int16)
        tensors["group.weight"][4:] //= 4096  # what copies add: no more than the others differ by
    return tensors


def random_places(count: int) -> list[tuple[list[int], int]]:
    """What the predictor sees at places of a random message with copies in it, and the index that comes."""
    rng, history, places = random.Random(0), stage3.History(4 * MEMBERS), []
    indices = [rng.randrange(4 * MEMBERS) for _ in range(count // 2)] * 2
    for index in indices:
        places.append((history.sees(), index))
        history.add(index)
    return places


def by_hand(tensors: dict, sees: list[int], seen: np.ndarray, group: int) -> tuple[list[int], list[int]]:
    """The frequencies of the groups, and of the members of one, in Python's own integers, which never round."""
    whole = {name: tensor.tolist() for name, tensor in tensors.items()}
    W = len(whole["embedding.weight"][0])

    def product(weights, bias, row):
        sums = [sum(w * x for w, x in zip(ws, row, strict=True)) for ws in weights]
        return [total + b * 4096 for total, b in zip(sums, bias, strict=True)]

    y = list(whole["hidden.bias"])
    for slot, index in enumerate(sees):
        for unit, weights in enumerate(whole["hidden.weight"]):
            here = zip(weights[slot * W : (slot + 1) * W], whole["embedding.weight"][index], strict=True)
            y[unit] += round(sum(w * x for w, x in here) / 4096)  # to even, as numpy does; 2^53 is out of reach
    h = [min(max(value, 0), 1 << 22) for value in y]
    heads = product(whole["group.weight"], whole["group.bias"], h)
    groups, (to_group, to_member, to_seen) = heads[:4], (heads[4:7], heads[7:10], heads[10])
    mine = slice(group * MEMBERS, (group + 1) * MEMBERS)
    logits = product(whole["members.weight"][mine], whole["members.bias"][mine], h)
    logits = [value + to_seen * int(was) for value, was in zip(logits, seen[group], strict=True)]
    for order, index in enumerate(sees[CONTEXT:]):
        if index < 4 * MEMBERS:
            groups[index // MEMBERS] += to_group[order]
        if index // MEMBERS == group:
            logits[index % MEMBERS] += to_member[order]
    table = whole["exponential"]
    return tuple([table[min(max(row) - value >> 18, 1023)] for value in row] for row in (groups, logits))


@pytest.mark.parametrize("large", (False, True))
def test_the_predictor_is_exact(large):
    """With the largest numbers its sums reach 2^46: float32 keeps 24 bits of them."""
    tensors = random_tensors(large)
    predictor, seen, shown = IntegerPredictor(tensors), np.zeros((4, MEMBERS)), 0
    for sees, index in random_places(60):
        walk = predictor.walk(sees, seen)
        found = [np.diff(ends, prepend=0).tolist() for ends in (next(walk), walk.send(index // MEMBERS))]
        assert found == list(by_hand(tensors, sees, seen, index // MEMBERS))
        assert all(min(row) >= 1 for row in found)
        shown += sum(frequency > 1000 for frequency in found[1]) > 3  # not one with all: the numbers behind it show
        seen[divmod(index, MEMBERS)] = 1
    assert shown > 20


def test_the_predictor_in_use_is_the_trained_one():
    torch.manual_seed(0)
    trained = stage3.Predictor(4 * MEMBERS).eval()
    with torch.no_grad():
        trained.hidden.weight.mul_(3)
    integers = {name.removeprefix("predictor."): t.numpy() for name, t in trained.integers().items()}
    predictor, seen = IntegerPredictor(integers), np.zeros((4, MEMBERS))
    places = random_places(80)
    sees, shown = stage3.features([index for _, index in places], 4 * MEMBERS)
    nll = trained(*map(torch.from_numpy, (sees, shown)), torch.tensor([index for _, index in places]))
    for (before, index), wanted in zip(places, nll.tolist(), strict=True):
        (group, member), cost = divmod(index, MEMBERS), 0.0
        walk = predictor.walk(before, seen)
        for ends, at in ((next(walk), group), (walk.send(group), member)):
            cost -= np.log(np.diff(ends, prepend=0)[at] / ends[-1])
        assert cost == pytest.approx(wanted, abs=0.05)
        seen[group, member] = 1


def test_sender_and_receiver_see_the_same_history():
    indices, nothing = [5, 6, 7, 5, 6, 7, 5, 6, 8, 5, 6], 2 * MEMBERS
    sees, seen = stage3.features(indices, nothing)
    assert sees.shape == (11, SEES) and len(ORDERS) == 3
    assert sees[0].tolist() == [nothing] * SEES and sees[2].tolist() == [6, 5] + [nothing] * (SEES - 2)
    assert sees[5, CONTEXT:].tolist() == [nothing, 7, 7] and sees[8, CONTEXT:].tolist() == [7, 7, 7]
    assert seen[3].nonzero()[0].tolist() == [5, 6, 7]


# --- the message


@pytest.mark.parametrize("carries", CARRIES)
@pytest.mark.parametrize("text", ODD_TEXTS)
def test_any_text_arrives_bit_for_bit(sender, text, carries):
    message = sender.send(text, carries)
    sender.text.cache_clear()
    assert sender.text(message) == (text, carries)
    assert len(message) <= len(deflate(text.encode())) + 5


@pytest.mark.slow
def test_random_unicode_arrives_bit_for_bit(sender):
    rng = random.Random(0)
    for _ in range(3000):
        alphabet = [chr(rng.randrange(rng.choice((128, 0x3000, 0x110000)))) for _ in range(9)]
        letters = rng.choices(alphabet, k=rng.randrange(60))
        text = "".join(letter for letter in letters if not "\ud800" <= letter < "\ue000")  # no half of a pair
        assert sender.text(sender.send(text, "context"))[0] == text


def test_a_message_is_much_shorter_than_its_text(sender):
    texts = [PROMPT.format(**row) for row in world.make_examples("test", 50)]
    assert sum(len(sender.send(text, "prompt")) for text in texts) < sum(len(text.encode()) for text in texts) / 4


def test_texts_that_cannot_be_sent_are_refused(sender):
    for text, words in (("half \ud800", "surrogate"), ("x" * 65537, "longer than the 65536 bytes")):
        with pytest.raises(UserError, match=words):
            sender.send(text, "prompt")


def test_a_text_of_more_latents_than_a_receiver_has_time_for_is_deflated(sender):
    rng = random.Random(0)
    text = "".join(rng.choice("qxjz") for _ in range(MAX_TEXT))
    assert len(sender.split(text.encode())) > MAX_LATENTS
    message = sender.send(text, "context")
    assert message[0] & 1 and sender.text(message) == (text, "context")


def test_the_format_is_the_documented_one(sender):
    message = sender.send(PASSAGE, "context")
    assert message[0] == 128 | VERSION << 2 | 2
    assert message[1] == len(sender.split(PASSAGE.encode())) < 128
    assert int.from_bytes(message[-4:], "little") == zlib.crc32(sender.fingerprint + message[:-4])


def test_messages_of_another_machine_are_read(sender):
    """They were made once with the shipped wire: whatever reads them predicts bit for bit what the sender predicted."""
    for message, text in (
        ("8a1483b5891bfe0aee018c84ec9767bf5194248f6420", PASSAGE), ("8a05fe81bd6aa25d57b4460c4b", "Émile 😀"),
    ):  # fmt: skip
        assert sender.text(bytes.fromhex(message)) == (text, "context")


def test_damaged_and_foreign_messages_are_refused_by_name(sender):
    message = sender.send(PASSAGE, "prompt")
    flipped = bytearray(message)
    flipped[8] ^= 4
    newer = bytes([message[0] ^ 4]) + message[1:]
    other = message[:-4] + zlib.crc32(b"another wire" + message[:-4]).to_bytes(4, "little")
    for bad, words in (
        (b"", "not a LatentWire message"), (b"PK\3\4" + message, "not a LatentWire message"), (message[:5], "cut off"),
        (message[:-1], "checksum"), (message + b"\0", "checksum"), (bytes(flipped), "checksum"),
        (other, "another wire"), (newer, f"version {VERSION ^ 1}"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words) as refusal:
            sender.text(bad)
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
def test_mutated_messages_are_refused_or_read(sender, count):
    rng = random.Random(0)
    messages = [sender.send(text, "prompt") for text in ODD_TEXTS]
    for i in range(count):
        try:
            text, _ = sender.text(mutated(rng, messages[i % len(messages)]))
        except UserError:
            continue
        assert text in ODD_TEXTS  # a mutation of a mutation may undo it


@pytest.mark.parametrize("count", (400, pytest.param(20_000, marks=pytest.mark.slow)))
def test_mutated_messages_with_a_fitting_checksum_never_crash_or_grow(sender, count):
    rng, refusal = random.Random(0), str(broken())
    messages = [sender.send(text, "prompt") for text in ODD_TEXTS]
    outcomes = set()
    for i in range(count):
        data = bytes([128 | VERSION << 2 | rng.randrange(4)]) + mutated(rng, messages[i % len(messages)][1:-4])
        try:
            text, _ = sender.text(data + zlib.crc32(sender.fingerprint + data).to_bytes(4, "little"))
            assert len(text.encode()) <= MAX_TEXT
            outcomes.add("read")
        except UserError as error:
            outcomes.add(str(error))
    assert {"read", refusal} <= outcomes
    assert all(outcome in ("read", refusal) or "cut off" in outcome for outcome in outcomes)
    for body, deflated in (
        (deflate(b"a" * 10_000_000), 1), (b"\xff\xff\x7f", 0), (b"\xff" * 40, 0), (b"\xff\xff\x03", 0), (b"\0", 0)
    ):  # fmt: skip
        data = bytes([128 | VERSION << 2 | deflated]) + body
        with pytest.raises(UserError, match="not well formed"):
            sender.text(data + zlib.crc32(sender.fingerprint + data).to_bytes(4, "little"))


def test_no_exception_is_shared_by_two_messages():
    """A shared one keeps the frames, and with them the messages, of every time that it was raised."""
    errors = []
    for _ in range(2):
        with pytest.raises(UserError, match="not well formed") as caught:
            inflate(b"no deflated text")
        errors.append(caught.value)
    assert errors[0] is not errors[1]


# --- the sender, and several receivers


def test_one_process_sends_and_another_receives(tmp_path, sender):
    row = world.make_examples("test", 1)[0]
    text = tmp_path / "passage.txt"
    text.write_bytes(row["context"].replace("\n", "\r\n").encode())
    send = [sys.executable, HERE / "stage3_full.py", "--send", text]
    message = subprocess.run(send, cwd=tmp_path, capture_output=True, check=True).stdout
    piped = subprocess.run([*send[:-1], "-"], cwd=tmp_path, capture_output=True, check=True, input=text.read_bytes())
    assert piped.stdout == message and len(message) < len(row["context"]) / 3
    assert sender.text(message)[0].encode() == text.read_bytes()  # line ends, too
    (tmp_path / "message").write_bytes(message)
    for model in ("tiny", "tiny-qwen"):
        run = succeed(stage3, "--receive", tmp_path / "message", "--model", model, "--question", row["question"])
        assert run.stdout.strip() in row["answers"]


def test_many_lines_are_sent_by_one_process(tmp_path, sender):
    lines = [row["context"].replace("\n", " ") for row in world.make_examples("test", 1500)] + ["", "a\u2028b", PASSAGE]
    (tmp_path / "lines").write_text("\n".join(lines) + "\n")
    send = [sys.executable, HERE / "stage3_full.py", "--send-lines", tmp_path / "lines"]
    done = subprocess.run(send, capture_output=True, check=True)
    messages = [base64.b64decode(line) for line in done.stdout.splitlines()]
    assert [sender.text(message)[0] for message in messages] == lines
    assert done.stderr.decode() == f"1000 of {len(lines)} lines\n"


def test_the_sender_needs_no_llm_and_no_transformers():
    code = (
        "import sys; sys.argv = ['stage3_full.py', '--send', 'Ada lives in Paris.']\n"
        "import stage3_full, plumbing.launch\n"
        "plumbing.launch.launch(stage3_full.main)\n"
        "assert not {'transformers', 'tokenizers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True)
    assert done.returncode == 0 and done.stdout[0] >> 6 == 2, done.stderr


@pytest.mark.parametrize("name", ("tiny", "tiny-qwen"))
def test_what_arrives_is_read_as_the_text_is(name, sender):
    """Token for token, whatever the text, and with the question from either side."""
    reader = load_reader(name, CPU, torch.float32)
    rows = [*world.make_examples("test", 20), {"context": "Ada lives in Paris.", "question": "Where does Ada live?"}]
    rows += [{"context": text, "question": "What?\nQuestion: which?\nAnswer: that"} for text in ODD_TEXTS]
    for row in rows:
        prompt = stage3.make_prompt(reader, row["context"], row["question"])
        for carries in CARRIES:
            wire = stage3.Wire(sender, reader, carries)
            assert torch.equal(wire.receive(wire.send(prompt)), reader.table[prompt.ids])


def test_an_llm_that_nothing_was_trained_for_reads_a_message(random_llm, tmp_path, sender):
    (tmp_path / "message").write_bytes(sender.send(PROMPT.format(context=PASSAGE, question=QUESTION), "prompt"))
    succeed(stage3, "--receive", tmp_path / "message", "--model", random_llm)
    (tmp_path / "long").write_bytes(sender.send("One. " * 400, "context"))
    run = succeed(stage3, "--receive", tmp_path / "long", "--model", random_llm, "--question", QUESTION)
    assert run.stderr == "note: the prompt exceeds 224 tokens: the context is cut at its end\n"
    run = run_stage(stage3, "--receive", tmp_path / "long", "--model", random_llm, "--question", "Why? " * 300)
    assert run.code == 2 and "does not fit into 224 tokens" in run.stderr and run.stderr.count("\n") == 1


def test_wrong_uses_are_one_line(tmp_path, sender, random_llm):
    (tmp_path / "prompt").write_bytes(sender.send(PASSAGE, "prompt"))
    (tmp_path / "context").write_bytes(sender.send(PASSAGE, "context"))
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "latin.json").write_bytes(b'{"data": "caf\xe9"}')
    for flags, words in (
        (("--send", "x", "--receive", "y"), "separate processes"),
        (("--send", "x", "--eval-only", "y"), "give it as --wire"),
        (("--send", "x", "--wire-carries", "prompt"), "needs a --question"),
        (("--send", " "), "no text to send"),
        (("--send", "x", "--question", "y", "--wire-carries", "context"), "drop --question"),
        (("--send", tmp_path / "latin", "--question", "y"), "not UTF-8"),
        (("--send-lines", tmp_path / "nothing"), "no such file"),
        (("--send", "x", "--question", "y", "--wire", tmp_path), "is not a trained wire"),
        (("--receive", tmp_path / "nothing"), "No such file"),
        (("--receive", tmp_path / "latin"), "not a LatentWire message"),
        (("--receive", tmp_path / "prompt", "--question", "What?"), "give no --question"),
        (("--receive", tmp_path / "context"), "give a --question"),
        (("--wire", SHIPPED), "--wire belongs to"),
        (("--question", "What?"), "--question belongs to"),
        (("--corpus", tmp_path / "nothing.txt"), "no such file"),
        (("--corpus", tmp_path / "latin.json"), "latin.json: not UTF-8"),
        (("--eval-only", SHIPPED, "--corpus", "squad"), "was trained with --corpus"),
    ):
        run = run_stage(stage3, *flags, "--out", tmp_path / "out")
        assert run.code == 2 and words in run.stderr and run.stderr.count("\n") == 1, (flags, run.stderr)


# --- training and evaluation


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[Run, object]:
    """A short training that measures both embedded readers, and its directory."""
    out = tmp_path_factory.mktemp("both") / "out"
    return succeed(stage3, *QUICK, "--out", out), out


def check_both(run: Run, out, examples: int, again) -> None:
    """Both receivers were measured on the same messages, and --eval-only finds the same."""
    assert list(run.result) == RESULT_KEYS and run.result["model"] == "tiny"
    assert run.result["f1"] == run.result["text_f1"] and run.result["nll_wire"] == run.result["nll_text"]
    assert len(re.findall(f"bit for bit +{examples}  of {examples}\n", run.stdout)) == 2
    config = json.loads((out / "config.json").read_text())
    assert [entry["metrics"]["model"] for entry in config["others"]] == ["tiny-qwen"]
    assert config["others"][0]["metrics"]["wire_bytes"] == run.result["wire_bytes"]  # one message
    assert (out / "tiny-qwen" / "report.png").exists() and (out / "message.png").exists()
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
    assert (tmp_path / "wire.safetensors").read_bytes() == (out / "wire.safetensors").read_bytes()


def test_context_alone_travels_and_the_shuffled_control_is_another_message(sender, tmp_path, no_picture):
    rows = world.make_examples("test", 30)
    evaluate = ("--eval-only", SHIPPED, "--model", "tiny", "--eval-examples", len(rows))
    run = succeed(stage3, *evaluate, "--wire-carries", "context", "--out", tmp_path / "out")
    whole = succeed(stage3, *evaluate, "--out", tmp_path / "b")
    assert run.result["f1"] == whole.result["f1"] == run.result["text_f1"]
    assert run.result["wire_bytes"] < whole.result["wire_bytes"]
    assert run.result["text_bytes"] < whole.result["text_bytes"]
    assert run.result["shuffled_f1"] < 20
    # bytes are those of whole messages with their frames, and of what they carry
    for result, carries, texts in (
        (run.result, "context", [row["context"] for row in rows]),
        (whole.result, "prompt", [PROMPT.format(**row) for row in rows]),
    ):
        mean_bytes = sum(len(sender.send(text, carries)) for text in texts) / len(rows)
        assert result["wire_bytes"] == pytest.approx(mean_bytes, rel=1e-5)
        assert result["text_bytes"] == pytest.approx(sum(len(text.encode()) for text in texts) / len(rows), rel=1e-5)


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


@pytest.mark.parametrize("file", ("rows.jsonl", "some.txt"))
def test_a_corpus_is_learned_beside_the_data(file, tmp_path, no_picture):
    write_data(tmp_path / file)
    learned = succeed(stage3, *QUICK, "--model", "tiny", "--corpus", tmp_path / file, "--out", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["corpus"] == [str(tmp_path / file)] and learned.result["f1"] == learned.result["text_f1"]
    lengths = safetensors.torch.load_file(tmp_path / "out" / "wire.safetensors")["pieces.lengths"]
    assert len(lengths) % MEMBERS == 0
