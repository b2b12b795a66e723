"""Stage 2 as its users run it, and the promises of its encoder: no tokenizer, any text, known targets."""

import json
import random
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import CPU, HERE, QUICK, SHARED, ladder_flags, need, run_script, run_stage, succeed

import stage1_pca_adapter as stage1
import stage2_encoder as stage2
from common import IGNORE, PCA, Prompt, load_reader, make_batch, prompt_text, sent_prompt, splice, to_bytes
from plumbing.data import load_data
from plumbing.launch import UserError
from plumbing.report import RESULT_KEYS
from plumbing.spelling import odd_text, prefix_ids, spells, token_ends, tokenize
from plumbing.wires import save_wire

ODD_TEXTS = (
    "Hello Émile 😀 naïve  x\n12345 cafe\u0301", "ALL CAPS and lower", "👍🏽🇫🇷❤️ ok", "1234567890 3.14159", "\t\n  \n",
    "中文字 한국어", "a", " ", "Zürich–Łódź “quoted”…", "\x00\x7f", "x" * 300,
)  # fmt: skip


@pytest.fixture(scope="module", params=("tiny", "tiny-qwen", "stories260k"))
def reader(request):
    name = request.param
    if name == "stories260k":
        name = str(need(SHARED / "models" / name))
    return load_reader(name, CPU, torch.float32)


@pytest.fixture(scope="module")
def wire():
    """An encoder with random weights: what it promises does not depend on what it learned."""
    reader = load_reader("tiny", CPU, torch.float32)
    torch.manual_seed(0)
    codes = torch.randn(len(reader.table), 24)
    pca = PCA(torch.zeros(192), torch.zeros(192, 24), torch.ones(192))
    adapter = stage2.Adapter("codebook", pca, reader, codes, torch.ones(4096))
    return stage2.Wire(reader, stage2.Encoder(24).eval(), adapter, codes[[1]], torch.tensor(0.1))


# --- targets from the tokenizer


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_token_ends_spell_the_bytes(reader, text):
    spelled = reader.spelling.spell(text)
    ids, ends = token_ends(reader, text)
    raw = spelled.encode()
    assert ends[-1] == len(raw) and ends == sorted(set(ends)) and len(ids) == len(ends)
    assert prefix_ids(reader) + ids == tokenize(reader, text)
    # each token alone says the bytes between its neighbours' ends, where these are whole characters
    for token, start, end in zip(ids, [0, *ends[:-1]], ends, strict=True):
        try:
            piece = raw[start:end].decode()
        except UnicodeDecodeError:
            continue
        if piece.isprintable():
            assert reader.tokenizer.decode([token]).strip() == piece.strip()


def test_odd_text_is_text_that_the_tokenizer_spells(reader):
    prompt = "Pergalan is a firm. It sells olive oil.\nQuestion: What does Pergalan sell?\nAnswer:"
    rng = random.Random(0)
    texts = [odd_text(rng, prompt, prompt.split(" "), reader) for _ in range(200)]
    assert len(set(texts)) > 190 and any(not text.isascii() for text in texts)
    for text in texts:
        token_ends(reader, text)


@pytest.mark.parametrize("template", (None, "<s>[INST] {{ messages[0]['content'] }} [/INST]"))
@pytest.mark.parametrize("scheme", ("first", "always"))
def test_spaces_that_a_tokenizer_puts_in_front_are_spelled(scheme, template, tmp_path):
    directory = shutil.copytree(HERE / "tiny" / "tiny-llama", tmp_path / "llm")
    description = json.loads((directory / "tokenizer.json").read_text())
    description["pre_tokenizer"] = {**description["pre_tokenizer"]["pretokenizers"][-1], "prepend_scheme": scheme}
    (directory / "tokenizer.json").write_text(json.dumps(description))
    reader = load_reader(str(directory), CPU, torch.float32)
    reader.tokenizer.chat_template = template
    whole = prompt_text(reader, "Pergalan sells oil.", "Who?")
    for text in (whole, "oil", " oil", "a</s> b</s>c", "</s>", "x\ny"):
        ids, ends = token_ends(reader, text)
        assert ids and ends[-1] == len(reader.spelling.spell(text).encode())


def test_a_tokenizer_whose_names_spell_nothing_is_refused_before_training(tmp_path, random_llm):
    directory = shutil.copytree(random_llm, tmp_path / "llm")
    description = json.loads((directory / "tokenizer.json").read_text())
    description["normalizer"] = {"type": "Replace", "pattern": {"String": "Q"}, "content": "question"}
    (directory / "tokenizer.json").write_text(json.dumps(description))
    wire = tmp_path / "stage1"
    succeed(stage1, "--model", directory, *QUICK, "--code-dim", "4", "--out", wire)
    run = run_stage(stage2, "--model", directory, "--stage1", wire, "--smoke", "--out", tmp_path / "out")
    assert run.code == 2 and "do not spell its prompts" in run.stderr and run.stderr.count("\n") == 1


def test_a_training_text_that_the_tokens_do_not_spell_is_cut_where_the_encoder_says(wire):
    wire.reader.table.requires_grad_(False)
    rows = [{"context": context, "question": "Who?", "answers": ["oil"]} for context in ("a \u2581 b", "Pergalan")]
    assert not spells(wire.reader, sent_prompt(wire.reader, rows[0]).text)
    batch = make_batch(wire.reader, rows)
    loss = stage2.answer_loss(wire, rows, batch, int((batch.labels != IGNORE).sum()))
    alone = [stage2.answer_loss(wire, [row], make_batch(wire.reader, [row]), 1).item() for row in rows]
    assert loss.item() == pytest.approx(sum(alone) / int((batch.labels != IGNORE).sum()), rel=1e-4)


# --- the sender


def test_the_sender_never_calls_the_tokenizer(wire, monkeypatch):
    class Raises:
        def __getattr__(self, name):
            raise AssertionError(f"the sender asked the tokenizer for {name}")

        def __call__(self, *args, **kwargs):
            raise AssertionError("the sender called the tokenizer")

    prompt = "Pergalan sells olive oil."
    expected = wire.send(Prompt(prompt, [1, 2, 3], False))
    monkeypatch.setattr(wire.reader, "tokenizer", Raises())
    assert wire.send(Prompt(prompt, [], False)) == expected
    assert len(wire.receive(expected)) == (len(expected) - 4) // 48


def test_a_message_is_a_count_the_codes_of_the_prefix_and_those_of_the_text(wire):
    text = "Pergalan sells olive oil."
    message = wire.send(Prompt(text, [], False))
    _, codes = wire.segment(text)
    expected = torch.cat([wire.prefix_codes, codes]).half().numpy()
    assert len(wire.prefix_codes) == 1 and int.from_bytes(message[:4], "little") == len(expected)
    assert np.array_equal(np.frombuffer(message, "<f2", offset=4).reshape(-1, 24), expected)


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_any_text_becomes_a_message(wire, text):
    message = wire.send(Prompt(text, [], False))
    received = wire.receive(message)
    assert 2 <= len(received) <= 1 + len(text.encode()) and torch.isfinite(received).all()


def test_text_that_is_no_text_is_refused_in_one_line(wire):
    for text, words in (("", "no bytes to send"), ("half a pair \ud800", "surrogate")):
        with pytest.raises(UserError, match=words):
            wire.send(Prompt(text, [], False))


def test_padding_and_distant_text_change_nothing(wire):
    """A byte sees REACH neighbours: the middle of a text 10 times as long is encoded as it is alone."""
    text = "Pergalan sells olive oil to the town of Stelvidan. "
    alone, together = wire.encoder(to_bytes([text], CPU)), wire.encoder(to_bytes([text, text * 3], CPU))
    torch.testing.assert_close(together[0, : len(text)], alone[0])
    long = wire.encoder(to_bytes([text * 10], CPU))
    reach = stage2.REACH
    torch.testing.assert_close(long[0, reach : len(text)], together[1, reach : len(text)])
    middle = slice(4 * len(text), 5 * len(text))
    torch.testing.assert_close(long[0, middle], long[0, len(text) : 2 * len(text)], rtol=1e-4, atol=1e-4)


def test_a_code_depends_on_the_last_bytes_of_its_token_and_on_nothing_else(wire):
    def codes_of(*tokens: str) -> torch.Tensor:
        data, lengths = to_bytes(["".join(tokens)], CPU), torch.tensor([len(token) for token in tokens])
        is_end = torch.zeros(data.shape, dtype=torch.bool)
        is_end[0, lengths.cumsum(0) - 1] = True
        return wire.encoder.codes(data, is_end)  # [tokens,k]

    olive = codes_of("olive")
    torch.testing.assert_close(codes_of("Pergalan sells ", "olive", " oil")[1:2], olive)
    long = "b" * stage2.LONGEST
    torch.testing.assert_close(codes_of("a" + long), codes_of(long))
    for other in ("olivE", "Olive", " olive", "live", "evilo"):
        assert not torch.allclose(codes_of(other), olive, atol=1e-3)


# --- splicing any number of positions in front of an answer


def test_texts_end_to_end_are_encoded_as_one_by_one(wire):
    data = to_bytes(["A short one", "A longer one, é, that goes on for a while", "x"], CPU)
    real = data < 256
    line, real_line = stage2.pack_texts(data, real)
    assert line.shape == (1, real.sum() + 3 * max(stage2.REACH, stage2.LONGEST))
    with torch.no_grad():
        torch.testing.assert_close(wire.encoder(line)[real_line], wire.encoder(data)[real])
        is_end = real & (torch.arange(data.shape[1]) % 3 == 0)  # the last bytes of each text have no end
        (line_is_end,) = stage2.pack_texts(data, is_end)[1:]
        torch.testing.assert_close(wire.encoder.codes(line, line_is_end), wire.encoder.codes(data, is_end))


def test_splice_puts_the_answer_behind_whatever_was_received(wire):
    reader = wire.reader
    rows = load_data("tiny", reader, 3).test
    batch = make_batch(reader, rows)
    real = [reader.table[sent_prompt(reader, row).ids] for row in rows]
    same, embeddings = splice(reader, batch, real)
    assert torch.equal(same.labels, batch.labels) and torch.equal(same.attention, batch.attention)
    torch.testing.assert_close(embeddings, reader.table[batch.ids] * batch.attention[..., None])
    shorter, embeddings = splice(reader, batch, [part[-5:] for part in real])
    for i in range(3):
        targets = batch.labels[i][batch.labels[i] != IGNORE]
        assert torch.equal(shorter.labels[i][shorter.labels[i] != IGNORE], targets)
        assert shorter.labels[i, 4] == targets[0]  # the last position of the message predicts the first answer token
        assert torch.equal(embeddings[i, 5 : 4 + len(targets)], reader.table[targets[:-1]])


# --- the script


@pytest.mark.parametrize(
    "start,rows,examples", [(run_stage, 4, 4), pytest.param(run_script, 16, 40, marks=pytest.mark.slow)]
)
def test_smoke_run_and_evaluation_of_what_it_trained(start, rows, examples, tmp_path):
    flags = ("--smoke", "--batch-size", rows, "--eval-examples", examples)
    run = start(stage2, *flags, "--out", tmp_path / "out")
    assert run.code == 0, run.stderr
    result = run.result
    assert list(result) == RESULT_KEYS and result["stage"] == "stage2"
    assert result["wire_bytes"] == pytest.approx(4 + result["positions"] * 48)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["controls"]["boundary_f1"] > 50
    assert config["controls"]["true_codes"] > 0.9 * config["metrics"]["text_f1"]
    again = succeed(stage2, *flags, "--eval-only", tmp_path / "out", "--out", tmp_path / "again")
    for key in ("f1", "em", "nll_wire", "wire_bytes", "positions", "unique_answers"):
        assert again.result[key] == result[key]


@pytest.mark.slow
@pytest.mark.parametrize("wire_name", ("stage2", "stage2-qwen"))
def test_shipped_wire_reads_raw_bytes_as_the_text_is_read(wire_name, tmp_path):
    done = succeed(stage2, "--eval-only", f"tiny/wires/{wire_name}", "--eval-examples", "100", "--out", tmp_path)
    assert done.result["retention"] >= 97 and done.result["shuffled_f1"] < 10
    controls = json.loads((tmp_path / "config.json").read_text())["controls"]
    assert controls["boundary_f1"] >= 99.5 and controls["exact_token"] >= 99


def test_a_text_that_the_tokens_do_not_spell_is_left_out_of_the_measurement(wire):
    good = {"context": "Sorlo owns a sledge.", "question": "How does Sorlo travel?"}
    odd = good | {"context": "Sorlo owns a \u2581."}  # the letter that this tokenizer writes for a space
    codes = torch.randn(4096, 24)
    one = stage2.measure_encoder(wire, codes, [good])
    assert one["no_targets"] == 0
    assert stage2.measure_encoder(wire, codes, [odd, good]) == one | {"no_targets": 1}
    assert stage2.measure_encoder(wire, codes, [odd])["no_targets"] == 1


def test_resume_refuses_a_stage1_wire_that_has_changed(random_llm, ladder, tmp_path):
    stage1_wire = shutil.copytree(ladder / "stage1", tmp_path / "stage1")
    _, flags = ladder_flags(random_llm, tmp_path)["stage2"]
    flags = (*flags, *QUICK, "--out", tmp_path / "out")
    succeed(stage2, *flags)
    tensors = safetensors.torch.load_file(stage1_wire / "wire.safetensors")
    tensors["adapter.keys"] += 1e-3
    save_wire(stage1_wire, tensors, json.loads((stage1_wire / "config.json").read_text()))
    run = run_stage(stage2, *flags, "--resume")
    assert run.code == 2 and "was made with a wire of sha256" in run.stderr and run.stderr.count("\n") == 1


def test_a_text_of_more_tokens_than_the_llm_takes_is_cut(wire):
    received = wire.receive(wire.send(Prompt("x y z " * 400, [], False)))
    assert len(received) <= wire.reader.prompt_tokens


@pytest.mark.parametrize("without", stage2.ABLATIONS)
def test_every_ablation_runs(without, random_llm, ladder, tmp_path):
    _, flags = ladder_flags(random_llm, ladder)["stage2"]
    succeed(stage2, *flags, *QUICK, "--without", without, "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["without"] == without


def test_a_stage1_wire_that_does_not_fit_is_refused(tmp_path, random_llm):
    for flags, words in (
        (("--model", "tiny-qwen", "--stage1", HERE / "tiny/wires/stage1"), "was trained for another LLM"),
        (("--stage1", tmp_path), "is not a trained wire"),
        (("--model", random_llm), "stage 2 starts from a stage-1 wire"),
    ):
        run = run_stage(stage2, *flags, "--out", tmp_path / "out")
        assert run.code == 2 and words in run.stderr and run.stderr.count("\n") == 1, run.stderr
        assert not (tmp_path / "out" / "wire.safetensors").exists()
