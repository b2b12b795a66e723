"""The direct receiver of stage 3, whose LLM reads fewer positions than the context has tokens."""

import json
import math

import pytest
import safetensors.torch
import torch
from conftest import CPU, QUICK, run_stage, succeed
from test_stage3 import ODD_TEXTS, PASSAGE, QUESTION, SHIPPED, write_data

import stage3_full as stage3
from common import load_reader
from plumbing.launch import UserError
from plumbing.wires import load_wire
from stage3.direct import DirectWire, Pooler, Reading, direct_losses, surprisal
from stage3.message import unpack
from stage3.receivers import load_receiver
from tiny import world


@pytest.fixture(scope="module")
def direct(codec):
    """A direct receiver for tiny with a pooler that has not been trained: what does not stay is just gone."""
    saved = load_wire(str(SHIPPED), "stage3", stage3.WIRE)
    reader = load_reader("tiny", CPU, torch.float32)
    receiver = load_receiver(saved.tensors, saved.config["receivers"][0], reader, "shipped")
    torch.manual_seed(0)
    return DirectWire(codec, receiver, Pooler(192, receiver.constant_rms.item()), 2.0)


# --- which tokens stay


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_surprisal_is_what_a_message_costs(codec, text):
    nats = surprisal(codec, text)
    assert len(nats) == len(text.encode()) and (nats >= 0).all()
    message = unpack(codec.send(text, "context"), codec.fingerprint)
    if message.latents:
        assert abs(nats.sum() / math.log(2) / 8 - len(message.payload)) <= 2


@pytest.mark.parametrize("text", (PASSAGE * 2, "Hello Émile 😀 naïve"))
def test_surprisal_is_where_a_message_spends_its_bits(codec, text):
    nats, at = surprisal(codec, text), 0
    (ids,) = codec.latents([text])
    for index, (start, end, total) in zip(ids, codec.intervals(ids), strict=True):
        behind = at + len(codec.pieces[index])
        assert nats[at:behind].sum() == pytest.approx(math.log(total / (end - start)))
        at = behind
    assert at == len(nats)
    if text.startswith(PASSAGE):  # what the text has said before costs less
        assert nats[len(PASSAGE) :].sum() < nats[: len(PASSAGE)].sum()


def test_the_most_surprising_tokens_stay():
    reading = Reading(torch.zeros(9, 2), 2, 7, torch.tensor([1.0, 5.0, 1.0, 4.0, 1.0]))
    assert reading.stays(1).all()
    assert reading.stays(2).tolist() == [True, True, False, True, False]  # of equals, the first
    assert reading.stays(4).tolist() == [False, True, False, True, False]
    assert reading.stays(64).tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("context", (PASSAGE, PASSAGE * 3, "Hello Émile 😀 naïve", "\nQuestion: no", "", " "))
def test_a_direct_receiver_reads_the_contexts_surprising_tokens_and_the_question(direct, codec, context):
    message = codec.send(context, "context")
    whole = stage3.Wire(codec, direct.receiver, "context").embeddings(message, QUESTION)
    reading = direct.read(context, QUESTION)
    torch.testing.assert_close(reading.embeddings, whole, rtol=0, atol=0)
    tokens = reading.last - reading.first
    assert reading.first == 1 and (tokens > 0) == bool(context) and len(reading.nats) == tokens
    if context:
        true = len(direct.receiver.reader.tokenizer(context, add_special_tokens=False)["input_ids"])
        assert abs(tokens - true) <= 1 + true // 20  # what the encoder finds, not what the tokenizer would
        assert reading.nats.sum() == pytest.approx(surprisal(codec, context).sum(), rel=1e-4)
    for rate in (1.0, 2.0, 4.0):
        short = DirectWire(codec, direct.receiver, direct.pooler, rate).embeddings(message, QUESTION)
        assert len(short) == len(whole) - tokens + math.ceil(tokens / rate)
        behind = len(whole) - reading.last
        assert torch.equal(short[:1], whole[:1]) and torch.equal(short[-behind:], whole[-behind:])
        kept = whole[reading.first : reading.last][reading.stays(rate)] if context else whole[:0]
        assert torch.equal(short[1 : len(short) - behind], kept)
    with pytest.raises(UserError, match="needs a message with a context"):
        direct.embeddings(codec.send(context or "x", "prompt"), None)


# --- the pooler and its losses


def test_the_pooler_reads_its_own_context_alone():
    """What stands in the padding of a batch changes nothing."""
    torch.manual_seed(1)
    pooler = Pooler(192, 0.1)
    torch.nn.init.normal_(pooler.out.weight)
    x, stays = torch.randn(2, 12, 192), torch.rand(2, 12) < 0.5
    real = torch.ones(2, 12, dtype=torch.bool)
    real[0, 7:] = False
    alone = pooler(x[:1, :7], stays[:1, :7], real[:1, :7])
    torch.testing.assert_close(pooler(x, stays, real)[:1, :7], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(alone, x[:1, :7], atol=1e-2)


def test_the_teacher_of_a_direct_receiver_is_the_unpacking_one(direct):
    reader, rows = direct.receiver.reader, world.make_examples("test", 4)
    same = list(direct_losses(direct, rows, [1.0] * 4, 4))
    assert len(same) == 1 and same[0][0] < 0.2  # every token stays: the reader answers, and there is nothing to learn
    assert same[0][1].item() == pytest.approx(0, abs=1e-5) and same[0][2].item() == pytest.approx(0, abs=1e-8)
    rates = [2.0, 3.0, 2.0, 4.0]
    whole = torch.stack(next(iter(direct_losses(direct, rows, rates, 4))))
    parts = sum(torch.stack(part) for part in direct_losses(direct, rows, rates, 1))
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)
    assert whole.min() > 0.01
    whole.sum().backward()
    assert all(p.grad is None for p in reader.model.parameters())
    assert direct.pooler.out.weight.grad.abs().sum() > 0


# --- training and evaluation


RATE = ("--receiver", "direct", "--rate", "3")


def wire_of(out) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(out / "wire.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A direct receiver for tiny, trained on top of the shipped wire: its run and its directory."""
    out = tmp_path_factory.mktemp("direct") / "out"
    return succeed(stage3, *RATE, *QUICK, "--out", out), out


def test_training_adds_a_pooler_and_changes_nothing_else(trained):
    before, after = wire_of(SHIPPED), wire_of(trained[1])
    assert all(torch.equal(before[name], after[name]) for name in before)  # the sender and the receivers stay
    added = after.keys() - before.keys()
    assert added and all(name.startswith("receiver0.pooler.") for name in added)
    assert after["receiver0.pooler.out.weight"].any()


def test_a_trained_direct_receiver_is_evaluated_and_used(trained, codec, tmp_path, no_picture):
    run, out = trained
    again = succeed(stage3, "--eval-only", out, *RATE, "--eval-examples", "8", "--out", tmp_path / "again")
    config = json.loads((out / "config.json").read_text())
    assert again.result["nll_wire"] == run.result["nll_wire"] == config["metrics"]["nll_wire"]
    assert again.result["positions"] < 0.7 * again.result["text_positions"]
    cost = config["controls"]["prefill"]
    for kind in ("direct", "unpack"):
        assert cost[kind]["kv_bytes"] / cost[kind]["positions"] == 2 * 6 * 192 * 4  # keys, values x layers x d x 4
    (tmp_path / "message").write_bytes(codec.send(PASSAGE, "context"))
    receive = ("--receive", tmp_path / "message", "--question", QUESTION, "--receiver", "direct")
    assert succeed(stage3, *receive, "--wire", out).stdout.strip()
    refused = run_stage(stage3, *receive)  # by the shipped wire
    assert refused.code == 2 and "has no direct receiver for tiny" in refused.stderr
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize("without", stage3.DIRECT_ABLATIONS)
def test_every_ablation_learns_something_else(without, random_llm, ladder, tmp_path, no_picture):
    flags = ("--receiver", "direct", "--model", random_llm, "--wire", ladder / "stage3", *QUICK)
    succeed(stage3, *flags, "--without", without, "--out", tmp_path)
    name = "receiver0.pooler.out.weight"
    assert not torch.equal(wire_of(tmp_path)[name], wire_of(ladder / "direct")[name])


def test_training_goes_on_from_where_a_wire_was(random_llm, ladder, tmp_path, no_picture):
    flags = ("--receiver", "direct", "--model", random_llm, *QUICK)
    more = succeed(stage3, *flags, "--wire", ladder / "direct", "--out", tmp_path)
    first = json.loads((ladder / "direct" / "config.json").read_text())["metrics"]
    assert more.result["nll_wire"] != first["nll_wire"]
    losses = [json.loads((out / "metrics.jsonl").read_text().split("\n")[0]) for out in (ladder / "direct", tmp_path)]
    assert losses[0]["loss_answer"] != losses[1]["loss_answer"]


@pytest.mark.parametrize("file", ("rows.jsonl", "some.txt"))
def test_a_row_with_nothing_in_it_teaches_nothing_and_plain_text_is_refused(file, tmp_path, no_picture):
    write_data(tmp_path / file)
    flags = ("--receiver", "direct", *QUICK, "--steps", "12", "--micro-batch-size", "1")
    run = run_stage(stage3, *flags, "--data", tmp_path / file, "--out", tmp_path / "out")
    if file == "rows.jsonl":
        assert run.code == 0, run.stderr
    else:
        assert run.code == 2 and "plain text has no questions" in run.stderr and "no --receiver direct" in run.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    (
        (("--eval-only", SHIPPED), "has no direct receiver for tiny"),
        (("--wire-carries", "prompt"), "use --wire-carries context"),
        (("--stage2", "x"), "give --wire, not --stage2"),
        (("--without", "copies"), "leaves nothing out of a --receiver direct"),
        (("--receiver", "unpack", "--without", "states"), "leaves nothing out of a --receiver unpack"),
        (("--send", "x"), "the message is the same"),
        (("--rate", "0.5"), "from 1 to 64"),
        (("--model", "RANDOM"), "has no receiver for"),
        (("--receiver", "unpack", "--rate", "2"), "--rate belongs to"),
    ),
)
def test_wrong_uses_are_one_line(flags, words, random_llm, tmp_path):
    flags = [random_llm if flag == "RANDOM" else flag for flag in flags]
    run = run_stage(stage3, "--receiver", "direct", *flags, "--out", tmp_path / "out")
    assert run.code == 2 and words in run.stderr and run.stderr.count("\n") == 1, run.stderr
