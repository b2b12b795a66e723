"""Slots: few positions of a context. A cache with gaps, rows that come back, and what a message holds."""

import json
import math
import random
import shutil
import struct

import pytest
import torch
import transformers
from conftest import CPU, HERE, QUICK, run_stage, save_random_llm, succeed
from test_models import ARCHITECTURES, MORE, TEMPLATE, V, families

import stage3_full as stage3
from common import PROMPT, generate, load_reader, make_prompt
from plumbing import hub
from plumbing.launch import UserError
from plumbing.wires import load_wire
from stage3 import scorers, slots
from stage3.cache import Layout, Memory, Passage, answers_behind, logits_behind, nll_behind, opening_ids
from tiny import world

ROWS = [rows for rows in (world.make_questions("test", 5, i) for i in range(6)) if len(rows) > 1]
TEXT = "Ada lives in Paris. Ben sells olive oil."
REFUSED = {
    "mamba": "a MambaForCausalLM takes no positions",
    "qwen3-next": "keeps a LinearAttentionLayer of its context",
    "falcon, alibi": "attends by distance",
}
OLDER = {  # their attentions differ: a mask of bools, no config, another name for the layer
    "falcon": lambda: transformers.FalconConfig(
        vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, multi_query=False
    ),
    "codegen": lambda: transformers.CodeGenConfig(
        vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=256, rotary_dim=4
    ),
    "gpt-neo": lambda: transformers.GPTNeoConfig(
        vocab_size=V, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        max_position_embeddings=256,
    ),
}  # fmt: skip
FAMILIES = ARCHITECTURES | OLDER | {name: config for name, config in MORE.items() if name not in REFUSED}
NO_ROPE = (
    "gpt2",
    "gpt-neo",
    "opt",
    "opt-350m",
    "gpt-j",
    "codegen",
    "deepseek-v3",
)  # none, or one of another form: keys stay as they lie
DENSE = ("llama", "qwen3", "gemma2", "phi", "gpt-neox", "gpt2")  # take a mask for each pair of tokens


@pytest.fixture(scope="module", params=families(FAMILIES, (*DENSE, "opt")))
def reader(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("llm") / request.param.split(",")[0]
    tokenizer = ("tiny-llama", "tiny-qwen")[list(FAMILIES).index(request.param) % 2]
    llm = save_random_llm(directory, FAMILIES[request.param](), HERE / "tiny" / tokenizer)
    return load_reader(str(llm), CPU, torch.float32)


def family(reader) -> str:
    return reader.name.rpartition("/")[2]


def prefilled(layout: Layout, ids: list[int], kept: list[int]) -> Memory:
    """The memory of a context of which only some tokens are kept, just as the LLM has them."""
    with torch.no_grad():
        cache = layout.reader.model(input_ids=torch.tensor([ids]), past_key_values=hub.DynamicCache()).past_key_values
        rows = layout.rows(cache, torch.arange(len(ids))[None])
    real = torch.ones(1, len(kept), dtype=torch.long)
    return Memory(rows[:, kept], torch.tensor([kept]), real, torch.tensor([len(ids)]))


def test_all_rows_are_the_text(reader):
    layout, passage = Layout(reader), Passage(reader, ROWS[0])
    memory = prefilled(layout, passage.ids, list(range(len(passage.ids))))
    pairs = list(zip(passage.tails, passage.answers, strict=True))
    with torch.no_grad():
        found = logits_behind(layout, memory, [0] * len(pairs), [t + a for t, a in pairs], [len(t) for t, _ in pairs])
        whole = []
        for tail, answer in pairs:
            logits = reader.model(input_ids=torch.tensor([passage.ids + tail + answer])).logits[0]
            whole.append(logits[len(passage.ids) + len(tail) - 1 : -1])
    torch.testing.assert_close(found, torch.cat(whole), rtol=1e-4, atol=1e-4)
    prompts = [passage.ids + tail for tail in passage.tails]
    assert answers_behind(layout, memory.of([0] * len(pairs)), passage.tails) == generate(reader, prompts, 3)


def test_a_cache_with_gaps_is_dense_attention_with_hidden_keys(reader):
    if family(reader) not in DENSE:
        pytest.skip("it takes no mask for each pair of tokens")
    layout, passage = Layout(reader), Passage(reader, ROWS[1])
    before, (tail, answer) = len(passage.ids), (passage.tails[0], passage.answers[0])
    kept = sorted({0, *range(1, before, 3)})
    ids = passage.ids + tail + answer
    hidden = torch.full((len(ids), len(ids)), float("-inf")).triu(1)
    hidden[before:, [i for i in range(before) if i not in kept]] = float("-inf")
    with torch.no_grad():
        found = logits_behind(layout, prefilled(layout, passage.ids, kept), [0], [tail + answer], [len(tail)])
        dense = reader.model(input_ids=torch.tensor([ids]), attention_mask=hidden[None, None]).logits[0]
    torch.testing.assert_close(found, dense[before + len(tail) - 1 : -1], rtol=1e-4, atol=1e-4)
    text = reader.model(input_ids=torch.tensor([ids])).logits[0, before + len(tail) - 1 : -1]
    assert (found - text).abs().max() > 1e-3  # what is hidden matters, so the comparison means something


@pytest.fixture
def eager(reader):
    with scorers.eager(reader):
        yield reader


def test_a_closed_gate_hides_a_token(eager):
    if family(eager) in ("mistral", "gpt-oss"):
        pytest.skip("its short window reaches over more tokens where there are gaps")
    layout, passage = Layout(eager), Passage(eager, ROWS[1])
    before, asked = len(passage.ids), ([0], [passage.tails[0] + passage.answers[0]], [len(passage.tails[0])])
    kept = sorted({0, *range(1, before, 3)})
    gates = torch.full((1, before, layout.heads), -1e4).index_fill(1, torch.tensor(kept), 0.0)
    everything, some = (prefilled(layout, passage.ids, tokens) for tokens in (list(range(before)), kept))
    with torch.no_grad():
        with scorers.behind_gates(layout, gates):
            found = logits_behind(layout, everything, *asked)
        gaps, text = (logits_behind(layout, memory, *asked) for memory in (some, everything))  # no gate is left behind
    assert (found - gaps).abs().max() < 0.02 * (found - text).abs().max()


def test_each_head_has_its_own_gates(eager):
    if family(eager) not in DENSE:
        pytest.skip("it takes no mask for each pair of tokens")
    layout, passage = Layout(eager), Passage(eager, ROWS[1])
    before, (tail, answer) = len(passage.ids), (passage.tails[0], passage.answers[0])
    ids, (heads,) = passage.ids + tail + answer, set(layout.layers)
    gates = torch.randn(before, heads, generator=torch.Generator().manual_seed(0))
    mask = torch.full((heads, len(ids), len(ids)), float("-inf")).triu(1)
    mask[:, before:, :before] += gates.T[:, None]
    mask = mask.repeat_interleave(eager.model.config.num_attention_heads // heads, 0)[None]  # of grouped queries
    whole = prefilled(layout, passage.ids, list(range(before)))
    with torch.no_grad():
        with scorers.behind_gates(layout, gates.repeat(1, len(layout.layers))[None]):
            found = logits_behind(layout, whole, [0], [tail + answer], [len(tail)])
        dense = eager.model(input_ids=torch.tensor([ids]), attention_mask=mask).logits
    torch.testing.assert_close(found, dense[0, before + len(tail) - 1 : -1], rtol=1e-4, atol=1e-4)


def test_gates_are_open_for_the_largest_scores(monkeypatch):
    def opened(count: int) -> torch.Tensor:
        return scorers.gates(scores, count, random.Random(0)) > math.log(0.5)

    scores = (0.1 * torch.randn(40, 3, generator=torch.Generator().manual_seed(0))).requires_grad_()
    largest = torch.zeros(40, 3, dtype=torch.bool).scatter(0, scorers.best(scores, 9), True)
    assert opened(9).sum(0).tolist() == [9, 9, 9] and not torch.equal(opened(9), largest)  # with noise
    monkeypatch.setattr(scorers, "NOISE", 0.0)
    gates = scorers.gates(scores, 9, random.Random(0))
    assert torch.equal(opened(9), largest) and opened(39).sum() == 3 * 39 and opened(40).all()
    gates[~largest].sum().backward()
    pushes = (scores.grad * (scores.square() + scorers.SMALL**2).sqrt()).detach()  # on the scale of asinh
    assert pushes.sum(0).abs().max() < 1e-3 * pushes.abs().max()  # tokens compete: nothing is won if all scores rise
    scores = torch.zeros(1, 3)
    assert opened(1).all() and opened(0).sum() == 0


def test_keys_are_the_same_wherever_their_token_stands(reader):
    layout = Layout(reader)
    with torch.no_grad():
        cache = reader.model(input_ids=torch.tensor([[7, 8, 7, 7]]), use_cache=True).past_key_values
    keys, at = cache.layers[0].keys, torch.arange(4)[None]
    back = layout.turned(keys, at, back=True)
    torch.testing.assert_close(layout.turned(back, at), keys)
    if family(reader) in NO_ROPE:
        assert layout.rotary is None and torch.equal(back, keys)
    else:
        torch.testing.assert_close(back[:, :, 0], back[:, :, 3])
        assert not torch.allclose(keys[:, :, 0], keys[:, :, 3], atol=1e-3)


@pytest.mark.parametrize("name", REFUSED)
def test_an_llm_without_keys_and_values_is_refused(name, tmp_path):
    llm = save_random_llm(tmp_path / "llm", MORE[name](), HERE / "tiny" / "tiny-qwen")
    with pytest.raises(UserError, match=REFUSED[name]):
        Layout(load_reader(str(llm), CPU, torch.float32))


def test_a_chat_template_stands_before_every_context(random_llm):
    reader = load_reader(str(random_llm), CPU, torch.float32)
    reader.tokenizer.chat_template = TEMPLATE
    passage = Passage(reader, ROWS[0])
    opening = opening_ids(reader)
    assert passage.opening >= len(opening) - 1 > 10  # the joint with the context may be another token
    prompt = make_prompt(reader, ROWS[0][0]["context"], ROWS[0][0]["question"])
    assert passage.ids + passage.tails[0] == prompt.ids
    assert reader.tokenizer.decode(passage.ids[passage.opening :]).strip() == ROWS[0][0]["context"]
    wire = slots.Wire(slots.Slots(reader), lambda passage: 5)
    memory = wire.receive([wire.send(passage)])
    assert memory.rows.shape[1] == passage.opening + 5
    assert torch.equal(memory.rows[0, : passage.opening], wire.opening_rows[: passage.opening])


def test_a_chat_template_may_strip_the_end_of_a_question(random_llm):
    reader = load_reader(str(random_llm), CPU, torch.float32)
    reader.tokenizer.chat_template = TEMPLATE.replace("message.content", "message.content | trim")
    passage = Passage(reader, [{"context": "Ada lives in Paris.", "question": "Where? \n"}])
    assert passage.ids + passage.tails[0] == make_prompt(reader, "Ada lives in Paris.", "Where? \n").ids


@pytest.fixture(scope="module")
def tiny():
    return load_reader("tiny", CPU, torch.float32)


def test_a_context_is_cut_for_the_question_with_most_tokens(tiny):
    asked = ["What is the name of the man in the house?", "Xq-zv-kj-wq-px-zk-qv-jx-zq?"]
    rows = [
        [{"context": context, "question": question} for question in asked] for context in ("A bee.", 999 * "A bee. ")
    ]
    short, long = (Passage(tiny, part) for part in rows)
    assert [len(tail) for tail in short.tails] == [len(tail) for tail in long.tails] and long.truncated


def fitted(reader, passages: list[Passage]) -> tuple[slots.Wire, float]:
    """Slots before training, and the share of the variance that their latents hold."""
    wire = slots.Wire(slots.Slots(reader), lambda passage: 9)
    with scorers.eager(reader):
        wire.slots.scorer.copy_(scorers.fit_scorer(wire.slots.layout, passages))
    return wire, slots.fit_latents(wire, passages, random.Random(0))


def test_the_start_is_the_llm_itself(tiny):
    """Before training, the update changes nothing, and what stays goes through the PCA alone."""
    passages = [Passage(tiny, rows) for rows in ROWS]
    wire, explained = fitted(tiny, passages)
    fresh, counts = wire.slots, [passage.count(1) for passage in passages]
    assert explained > 0.9
    chosen = fresh.choose(passages, counts)
    with torch.no_grad():
        latents = fresh.latents(passages, chosen)
        for passage, choice, latent in zip(passages, chosen, latents, strict=True):
            everything = torch.arange(passage.opening, len(passage.ids))
            assert torch.equal(choice.at, everything) and (choice.tokens.T == everything).all()
            rows = prefilled(fresh.layout, passage.ids, everything.tolist()).rows[0] / fresh.scale
            assert (fresh.adapter(latent) - rows).square().mean() < 0.1 * rows.square().mean()
    scores = scorers.seen(tiny, passages) @ fresh.scorer
    assert (scores.flatten(0, 1).std(0) > 0).all() and torch.isfinite(scores).all()


def test_each_head_keeps_what_it_wants(tiny):
    wire, _ = fitted(tiny, [Passage(tiny, rows) for rows in ROWS])
    passage, layout = Passage(tiny, ROWS[0]), wire.slots.layout
    (choice,) = wire.slots.choose([passage], [9])
    scores = (scorers.seen(tiny, [passage]) @ wire.slots.scorer)[0, passage.opening :].round(decimals=3)  # [tokens, H]

    def most(scores: torch.Tensor) -> set[int]:  # the first of equals
        return set(sorted(range(len(scores)), key=lambda i: -scores[i].item())[:9])

    assert set((choice.at - passage.opening).tolist()) == most(scores.sum(1))
    differ = 0
    for head in range(layout.heads):
        wanted, kept = most(scores[:, head]), choice.tokens[:, head] - passage.opening
        assert set(kept.tolist()) == wanted
        for slot, token in zip((choice.at - passage.opening).tolist(), kept.tolist(), strict=True):
            assert token == slot or slot not in wanted  # what it wants of the slots' own tokens stays in its slot
            differ += token != slot
    assert differ > layout.heads  # else heads would agree, and nothing was tested
    rows = layout.contexts([passage])[0]
    kept = choice.rows(rows, layout.owners)
    heads, width = layout.shapes[0]  # of every layer of this LLM
    for number in range(0, layout.n, 7):
        layer, place = divmod(number, 2 * heads * width)
        head = layer * heads + place % (heads * width) // width
        assert torch.equal(kept[:, number], rows[choice.tokens[:, head], number])


def test_scorers_learn_from_the_loss(tiny, monkeypatch):
    monkeypatch.setattr(scorers, "LR", 3e-3)
    passages = [Passage(tiny, rows[:6]) for rows in ROWS]
    wire, layout = slots.Wire(slots.Slots(tiny), lambda passage: passage.count(3)), Layout(tiny)

    def loss(scorer: torch.Tensor) -> float:
        wire.slots.scorer.copy_(scorer)
        with torch.no_grad():
            return nll_behind(layout, wire.selected(passages), passages).item()

    def learned(scorer: torch.Tensor, factor: float, steps: int, size: int = 8) -> torch.Tensor:
        def gates_of(scores: torch.Tensor, drawn: random.Random) -> torch.Tensor:
            return factor * scorers.gates(scores, len(scores) // 3, drawn)

        return scorers.learn_scorer(layout, scorer, lambda step: passages, gates_of, steps, 0, size)

    with scorers.eager(tiny):
        fitted = scorers.fit_scorer(layout, passages)
        assert loss(learned(fitted, 1.0, 20)) < 0.8 * loss(fitted)
        assert torch.equal(learned(fitted, float("nan"), 4), fitted)  # steps with a NaN loss are skipped
        with pytest.raises(UserError, match="for 5 steps up to 5: stopped"):
            learned(fitted, float("nan"), 5)
        torch.testing.assert_close(learned(fitted, 1.0, 1, 2), learned(fitted, 1.0, 1), rtol=1e-3, atol=1e-5)


def test_heads_with_their_own_tokens_are_dense_attention_with_other_hidden_keys(tmp_path):
    """In GPT-2, whose keys have no positions of their own, so that they may stand elsewhere."""
    llm = save_random_llm(tmp_path / "llm", ARCHITECTURES["gpt2"](), HERE / "tiny" / "tiny-qwen")
    reader = load_reader(str(llm), CPU, torch.float32)
    reader.model.set_attn_implementation("eager")
    layout, passage = Layout(reader), Passage(reader, ROWS[1])
    before, tail, answer = len(passage.ids), passage.tails[0], passage.answers[0]
    (heads,) = set(layout.layers)
    tokens = torch.stack([torch.arange(head, head + 3 * 8, 3) for head in range(heads)], 1)  # [8, heads]
    choice = scorers.Choice(torch.arange(8), tokens.repeat(1, len(layout.layers)))  # the same in every layer
    hidden = torch.full((heads, before + len(tail + answer), before + len(tail + answer)), float("-inf")).triu(1)
    for head in range(heads):
        others = [i for i in range(before) if i not in tokens[:, head].tolist()]
        hidden[head, before:, others] = float("-inf")
    whole = prefilled(layout, passage.ids, list(range(before)))
    memory = Memory(choice.rows(whole.rows[0], layout.owners)[None], choice.at[None], whole.real[:, :8], whole.lengths)
    ids = torch.tensor([passage.ids + tail + answer])
    with torch.no_grad():
        found = logits_behind(layout, memory, [0], [tail + answer], [len(tail)])
        dense = reader.model(input_ids=ids, attention_mask=hidden[None]).logits[0, before + len(tail) - 1 : -1]
        text = reader.model(input_ids=ids).logits[0, before + len(tail) - 1 : -1]
    torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-4)
    assert (found - text).abs().max() > 1e-3


def test_micro_batches_have_the_gradient_of_the_whole_step(tiny):
    passages = [Passage(tiny, rows[:3]) for rows in ROWS]
    wire, _ = fitted(tiny, passages)
    model, counts = wire.slots, [passage.count(2.5) for passage in passages]
    for part in model.update.b.values():  # zero at first, which hides the gradient of the other factor
        torch.nn.init.normal_(part, std=0.01)
    alone = [model.choose([passage], [count])[0] for passage, count in zip(passages, counts, strict=True)]
    for together, choice in zip(model.choose(passages, counts), alone, strict=True):  # padding has no say
        assert torch.equal(together.at, choice.at) and torch.equal(together.tokens, choice.tokens)
    targets = sum(len(answer) for passage in passages for answer in passage.answers)
    slots.answer_loss(wire, passages, counts, targets).backward()
    # the last layer's parts behind its keys and values have no gradient
    trained = {name: part for name, part in model.named_parameters() if part.grad is not None}
    whole = {name: part.grad.clone() for name, part in trained.items()}
    model.zero_grad()
    for passage, count in zip(passages, counts, strict=True):
        slots.answer_loss(wire, [passage], [count], targets).backward()
    for name, part in trained.items():
        atol = 1e-4 * whole[name].abs().max().item()
        torch.testing.assert_close(part.grad, whole[name], rtol=1e-3, atol=atol, msg=lambda t, n=name: f"{n}: {t}")
    assert all(grad.abs().max() > 0 for grad in whole.values()) and {"stays", "encoder.weight"} < set(whole)
    assert not any(part.requires_grad for part in (model.scale, model.scorer))
    assert all(p.grad is None and not p.requires_grad for p in tiny.model.parameters())


def test_receivers_see_the_message_alone(tiny):
    passages = [Passage(tiny, rows) for rows in ROWS]
    wire = slots.Wire(slots.Slots(tiny), lambda passage: 9)
    messages = [wire.send(passage) for passage in passages]
    assert {len(message) for message in messages} == {12 + 9 * 4 + 9 * 2 * slots.LATENT_WIDTH}
    together = wire.receive(messages)
    for i, message in enumerate(messages):
        alone = wire.receive([bytes(message)])
        assert torch.equal(alone.rows[0], together.rows[i, -alone.rows.shape[1] :])
        assert struct.unpack_from("<3I", message)[0] == together.lengths[i] == len(passages[i].ids)


def test_a_message_does_not_depend_on_the_question(tiny):
    wire = slots.Wire(slots.Slots(tiny), lambda passage: 9)
    for rows in ROWS:
        assert len({wire.send(Passage(tiny, [row])) for row in rows}) == 1


def test_a_short_context_keeps_every_token(tiny):
    passage = Passage(tiny, [{"context": "Ada lives in Paris.", "question": "Where does Ada live?"}])
    message = slots.Wire(slots.Slots(tiny), lambda passage: 32).send(passage)
    assert struct.unpack_from("<3I", message) == (len(passage.ids), passage.opening, len(passage.ids) - passage.opening)
    assert passage.count(1) == len(passage.ids) - passage.opening and passage.count(2) == -(-passage.count(1) // 2)


def test_several_questions_to_one_message(random_llm, ladder, tmp_path):
    wire = tmp_path / "stage3"
    shutil.copytree(ladder / "stage3", wire)
    shutil.copytree(ladder / "slots", wire / f"slots-{random_llm.name}")
    (tmp_path / "message").write_bytes(
        stage3.load_sender(load_wire(str(wire), "stage3", stage3.WIRE)).send(TEXT, "context")
    )
    on = ("--model", random_llm, "--wire", wire, "--receive", tmp_path / "message")
    ask = ("--receiver", "slots", "--question", "Where does Ada live?", "What does Ben sell?")
    together = succeed(stage3, *on, *ask).stdout.split("\n")
    assert together == [*(succeed(stage3, *on, *ask[:3], question).stdout.strip("\n") for question in ask[3:]), ""]
    assert "cut" not in succeed(stage3, *on, *ask).stderr
    run = run_stage(stage3, *on, "--receiver", "slots")
    assert run.code == 2 and "give a --question" in run.stderr
    whole = PROMPT.format(context=TEXT, question="x")
    sender = stage3.load_sender(load_wire(str(wire), "stage3", stage3.WIRE))
    (tmp_path / "prompt").write_bytes(sender.send(whole, "prompt"))
    run = run_stage(stage3, *on[:5], tmp_path / "prompt", *ask)
    assert run.code == 2 and "send it without --question" in run.stderr
    (tmp_path / "message").write_bytes(
        stage3.load_sender(load_wire(str(wire), "stage3", stage3.WIRE)).send(100 * TEXT, "context")
    )
    assert "the context is cut at its end" in succeed(stage3, *on, *ask).stderr


def test_slots_are_found_beside_the_sender(random_llm, ladder, tmp_path):
    wire = tmp_path / "stage3"
    shutil.copytree(ladder / "slots", wire / f"slots-{random_llm.name}")
    on = ("--receiver", "slots", "--model", random_llm, *QUICK, "--out", tmp_path / "out")
    runs = [succeed(stage3, *on, "--eval-only", place).result for place in (wire, ladder / "slots")]
    assert runs[0]["f1"] == runs[1]["f1"] and runs[0]["nll_wire"] == runs[1]["nll_wire"]
    run = run_stage(stage3, *on, "--eval-only", ladder / "stage3")
    assert run.code == 2 and "is a wire of stage3, not of slots" in run.stderr


def test_fewer_slots_than_asked_for_in_training(random_llm, ladder, tmp_path):
    on = ("--receiver", "slots", "--model", random_llm, *QUICK)
    on += ("--out", tmp_path / "out", "--eval-only", ladder / "slots")
    by_rate, by_count = (succeed(stage3, *on, *flags).result for flags in (("--rate", "4"), ("--latents", "7")))
    assert by_rate["positions"] < by_rate["text_positions"]
    assert by_count["wire_bytes"] == 12 + 7 * 4 + 7 * 2 * slots.LATENT_WIDTH


def test_slots_flags_are_refused_where_there_are_none(random_llm):
    for flags in (("--rate", "2"), ("--latents", "8"), ("--receiver", "slots", "--rate", "2", "--latents", "8")):
        run = run_stage(stage3, "--model", random_llm, *flags)
        assert run.code == 2 and flags[-2] in run.stderr and run.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "wrong"),
    (
        (("--latents", "0"), "--latents: must be a whole number of at least 1"),
        (("--rate", "nan"), "--rate: must be a number above 0"),
        (("--rate", "0.9"), "--rate: must be at least 1"),
        (("--gradient-checkpointing",), "slots take keys and values from all layers"),
        (("--data", "text"), "slots learn from answers"),
        (("--corpus", "x"), "unrecognized arguments: --corpus x"),
    ),
)
def test_bad_input_is_one_line(random_llm, tmp_path, flags, wrong):
    text = tmp_path / "text.txt"
    text.write_text("A line of plain text. " * 400)
    flags = [str(text) if flag == "text" else flag for flag in flags]
    run = run_stage(stage3, "--receiver", "slots", "--model", random_llm, *QUICK, "--out", tmp_path / "out", *flags)
    assert run.code == 2 and wrong in run.stderr and run.stderr.count("\n") == 1
    assert not (tmp_path / "out" / "wire.safetensors").exists()


@pytest.mark.parametrize("model", ("tiny", "tiny-qwen"))
def test_the_shipped_slots_answer_from_one_message(model, sender, tmp_path):
    (tmp_path / "message").write_bytes(sender.send(TEXT, "context"))
    on = ("--model", model, "--receive", tmp_path / "message", "--receiver", "slots")
    run = succeed(stage3, *on, "--question", "Where does Ada live?", "What does Ben sell?")
    assert run.stdout == "Paris\nolive oil\n"


@pytest.mark.slow
@pytest.mark.parametrize("model,examples", (("tiny", "1000"), ("tiny-qwen", "100")))  # tiny's scorers alone are close
def test_the_shipped_slots_keep_more_than_scorers_and_pca_alone(model, examples, tmp_path):
    on = ("--receiver", "slots", "--eval-only", stage3.SHIPPED, "--model", model, "--eval-examples", examples)
    result = succeed(stage3, *on, "--out", tmp_path).result
    controls = json.loads((tmp_path / "config.json").read_text())["controls"]
    start = max(result["truncated_f1"], controls["selection_f1"], controls["start_f1"])
    assert result["f1"] > start + 3 and controls["rates"]["1"] > 0.9 * result["text_f1"]
    assert result["shuffled_f1"] < 10 and result["positions"] < 0.6 * result["text_positions"]
