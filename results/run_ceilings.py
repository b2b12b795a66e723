"""What a frozen LLM could read of a context, whatever encodes it, as JSON in results/ceilings/.

    python results/run_ceilings.py                    # both readers, several hours on one core
    python results/make.py                            # the table in results/README.md

- pairs: the keys and values of some pairs of a head and a token, those with the largest scores in all layers and heads
  together. The scorer is trained for that, as that of slots is for theirs. Heads keep different numbers of tokens, so
  this saves numbers, not positions.
- bits: the keys and values of all tokens, with 8 or 4 bits a number.
- PCA: latents of other widths before the update learns, and slots whose numbers all stay.
- crammed: latents that are optimised for one passage alone, through the shipped adapter, on some wordings of its
  questions. The answers are to other wordings of the same questions.
"""

import argparse
import functools
import json
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common import MAX_NEW_TOKENS, Reader, load_reader, score  # noqa: E402
from plumbing.data import Data  # noqa: E402
from plumbing.launch import commit, versions  # noqa: E402
from plumbing.report import rounded  # noqa: E402
from plumbing.training import micro_batches  # noqa: E402
from results.run_readers import MODELS, attending  # noqa: E402
from stage3 import scorers, slots  # noqa: E402
from stage3.cache import Layout, Memory, Passage, answers_behind, nll_behind, whole  # noqa: E402
from stage3_full import SHIPPED  # noqa: E402
from tiny import world  # noqa: E402

BUDGETS = 4, 8, 16  # pairs for each that stays
WIDTHS = 64, 128, slots.LATENT_WIDTH, 512
STEPS, RATE = 60, 0.1  # of crammed latents: Adam's steps and its learning rate, which falls to zero
WORDINGS, TAUGHT, ASKED = 4, 24, 6  # drawn of each question; questions of a passage to learn from, and to answer


# ---------------------------------------------------------------------------------------------------------------------
# pairs of a head and a token


def training_passages(reader: Reader, first: int, count: int, questions: int) -> list[Passage]:
    """What slots are trained on: passages `first` .. `first + count - 1`, with up to so many questions about each."""
    rows = Data("qa", None, [], []).train_passages(0, first, count, questions)
    return [Passage(reader, part) for part in rows]


def pair_scorer(layout: Layout) -> Tensor:
    """[6d+1,H]: a scorer whose gates are open for the largest scores of all heads together."""
    low, high = math.log(min(BUDGETS)), math.log(max(BUDGETS))

    def passages_of(step: int) -> list[Passage]:
        return training_passages(
            layout.reader, slots.KNOWN + step * scorers.PASSAGES, scorers.PASSAGES, slots.QUESTIONS
        )

    def gates_of(scores: Tensor, drawn: random.Random) -> Tensor:
        pairs = round(scores.numel() / math.exp(drawn.uniform(low, high)))
        return scorers.gates(scores.flatten()[:, None], pairs, drawn).view_as(scores)

    with scorers.eager(layout.reader):
        fitted = scorers.fit_scorer(layout, training_passages(layout.reader, 0, slots.KNOWN, slots.ALL))
        return scorers.learn_scorer(layout, fitted, passages_of, gates_of, scorers.STEPS, 0)


@torch.inference_mode()
def kept_pairs(layout: Layout, scorer: Tensor, passage: Passage, budget: int) -> Tensor:
    """[H,T] bool: of all pairs of a head and a token, those that the scorer wants most; one of `budget` stays."""
    wanted = (scorers.seen(layout.reader, [passage]) @ scorer)[0].T.clone()  # [H, T]
    wanted[:, : passage.opening] = float("-inf")
    pairs = layout.heads * (len(passage.ids) - passage.opening) // budget
    kept = torch.zeros(wanted.shape, dtype=torch.bool)
    kept.view(-1)[wanted.flatten().topk(pairs).indices] = True
    kept[:, : passage.opening] = True
    return kept


@torch.inference_mode()
def answers_from_pairs(layout: Layout, passages: list[Passage], kept: list[Tensor]) -> list[str]:
    """Greedy answers to the first question about each passage, where question and answer see only the `kept` pairs."""
    reader, layers = layout.reader, layout.layers
    queries = reader.model.config.num_attention_heads
    texts, found, done = [passage.ids + passage.tails[0] for passage in passages], [[] for _ in passages], set()
    while len(done) < len(texts) and len(found[0]) < MAX_NEW_TOKENS:
        ids = pad_sequence([torch.tensor(text) for text in texts], batch_first=True)  # [B, T]
        T = ids.shape[1]
        sees = torch.ones(T, T, dtype=torch.bool).tril().repeat(len(texts), sum(layers), 1, 1)  # query, key
        for i, (passage, pairs) in enumerate(zip(passages, kept, strict=True)):
            n = len(passage.ids)
            sees[i, :, n:, :n] &= pairs[:, None, :]
        masks = [mask.repeat_interleave(queries // mask.shape[1], 1) for mask in sees.split(layers, 1)]
        with attending(reader, masks):
            logits = reader.model(input_ids=ids, use_cache=False).logits
        for i, text in enumerate(texts):
            token = logits[i, len(text) - 1].argmax().item()
            found[i].append(token)
            text.append(token)
            done |= {i} if token in reader.eos_ids else set()
    return [reader.answer(tokens) for tokens in found]


# ---------------------------------------------------------------------------------------------------------------------
# bits of keys and values


def with_bits(rows: Tensor, shapes: list[tuple[int, int]], bits: int) -> Tensor:
    """Rows [T,n] with `bits` a number: whole multiples of a scale that each head of each token has for itself."""
    parts, most = [], 2 ** (bits - 1) - 1
    for part, shape in zip(rows.split([heads * width for heads, width in shapes], 1), shapes, strict=True):
        part = part.unflatten(1, shape)
        scale = part.abs().amax(-1, keepdim=True).clamp(min=1e-12) / most
        parts.append(((part / scale).round() * scale).flatten(1))
    return torch.cat(parts, 1)


@torch.no_grad()
def read_whole(wire: slots.Wire, passages: list[Passage], bits: int | None = None) -> Memory:
    """Memory of passages with the keys and values of all their tokens."""
    memory = whole(wire.slots.layout, passages)
    if bits:
        memory.rows = torch.stack([with_bits(rows, wire.slots.layout.shapes, bits) for rows in memory.rows])
    return memory


# ---------------------------------------------------------------------------------------------------------------------
# the width of a latent


def untrained(wire: slots.Wire, width: int) -> slots.Wire:
    """Slots with the same scorers, whose latents have another width and are not trained."""
    start = slots.Slots(wire.reader, width)
    start.scorer.copy_(wire.slots.scorer)
    before = slots.Wire(start, wire.count)
    slots.fit_latents(before, training_passages(wire.reader, 0, slots.KNOWN, slots.ALL), random.Random(0))
    return before


# ---------------------------------------------------------------------------------------------------------------------
# latents that are optimised for one passage


def two_wordings(count: int) -> list[tuple[list[dict], list[dict]]]:
    """(rows to learn from, rows to answer) of so many test passages: the same questions in other words."""
    asked_of, found, index = world.asked_of, [], 0
    while len(found) < count:
        worded = []
        for wording in range(WORDINGS):

            def asked(fact, rng, wording=wording):  # the same passage, other wordings of its questions
                return asked_of(fact, random.Random(f"{rng.randrange(10**9)}/{wording}"))

            with mock.patch.object(world, "asked_of", asked):
                worded.append(world.make_questions("test", 0, index))
        index += 1
        to_answer = worded[0]  # a wording with fewer questions may change what is drawn after them: the style
        others = [row for rows in worded[1:] for row in rows if row["context"] == to_answer[0]["context"]]
        questions = {row["question"] for row in to_answer}
        taught = list({row["question"]: row for row in others if row["question"] not in questions}.values())[:TAUGHT]
        answers = {row["answers"][0] for row in taught}
        to_answer = [row for row in to_answer if row["answers"][0] in answers][:ASKED]
        if to_answer and len(taught) > 3:
            found.append((taught, to_answer))
    return found


def cram(wire: slots.Wire, taught: list[Passage], rate: float | None) -> Memory:
    """Memory of passages whose latents are optimised for the answers to what they are taught; rate: tokens a latent."""
    model, counts = wire.slots, [passage.count(rate) if rate else slots.LATENTS for passage in taught]
    chosen = model.choose(taught, counts)
    with torch.no_grad():
        latents = [nn.Parameter(part) for part in model.latents(taught, chosen)]
    targets = sum(len(answer) for passage in taught for answer in passage.answers)
    optimizer = torch.optim.Adam(latents)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, 2 * (STEPS - step) / STEPS)
        memory = wire.behind_openings(taught, chosen, model.decoded(latents))
        (nll_behind(model.layout, memory, taught) / targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        return wire.behind_openings(taught, chosen, model.decoded(latents))


# ---------------------------------------------------------------------------------------------------------------------


def measure(name: str, examples: int, passages: int) -> dict:
    reader = load_reader(name, torch.device("cpu"), torch.float32)
    saved = slots.load_slots(SHIPPED, name)
    model = slots.Slots(reader)
    slots.restore_slots(model, saved)
    wire = slots.Wire(model.requires_grad_(False), lambda _: slots.LATENTS)
    rows = world.make_examples("test", examples)
    asked, f1, scorer = [Passage(reader, [row]) for row in rows], {}, pair_scorer(model.layout)

    def scored(what: str, answers: list[str], rows: list[dict]) -> None:
        f1[what] = score(answers, rows)[0]
        print(name, what, f1[what], flush=True)

    def from_pairs(budget: int, part: list[Passage]) -> list[str]:
        kept = [kept_pairs(model.layout, scorer, passage, budget) for passage in part]
        return answers_from_pairs(model.layout, part, kept)

    def behind(memory_of: Callable[[list[Passage]], Memory], part: list[Passage]) -> list[str]:
        return answers_behind(model.layout, memory_of(part), [passage.tails[0] for passage in part])

    def through_pca(width: int) -> Callable[[list[Passage]], Memory]:
        before = untrained(wire, width)
        return lambda part: before.receive([before.send(passage) for passage in part])

    ways = {f"pairs, {budget}x": functools.partial(from_pairs, budget) for budget in BUDGETS}
    memories = {"all pairs": functools.partial(read_whole, wire)}
    memories |= {f"{bits} bits": functools.partial(read_whole, wire, bits=bits) for bits in (8, 4)}
    memories |= {f"PCA of {width}": through_pca(width) for width in WIDTHS} | {"selection": wire.selected}
    ways |= {what: functools.partial(behind, memory_of) for what, memory_of in memories.items()}
    for what, way in ways.items():
        scored(what, [answer for part in micro_batches(asked, 20) for answer in way(part)], rows)
    worded = two_wordings(passages)
    pairs = [[Passage(reader, part) for part in both] for both in worded]
    to_answer = [row for _, part in worded for row in part]
    ways = {"text": read_whole, "32 latents": functools.partial(cram, rate=None)}
    ways |= {f"{rate} tokens a latent": functools.partial(cram, rate=rate) for rate in (2, 4, 8)}
    for what, way in ways.items():
        answers = []
        for part in micro_batches(pairs, 10):
            memory, tails = way(wire, [taught for taught, _ in part]), [passage.tails for _, passage in part]
            of = [i for i, asked in enumerate(tails) for _ in asked]
            answers += answers_behind(model.layout, memory.of(of), sum(tails, []))
        scored(f"crammed, {what}", answers, to_answer)
    found = {"model": name, "fingerprint": reader.fingerprint, "examples": examples, "passages": passages, "f1": f1}
    found |= {"questions": len(to_answer), "versions": versions(), "commit": commit()}
    return found | {"command": " ".join(["python results/run_ceilings.py", *sys.argv[1:]])}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--examples", type=int, default=1000, help="test passages of pairs and bits")
    parser.add_argument("--passages", type=int, default=60, help="test passages of crammed latents")
    parser.add_argument("--only", choices=MODELS)
    args = parser.parse_args()
    (HERE / "ceilings").mkdir(exist_ok=True)
    for name in MODELS if args.only is None else [args.only]:
        row = rounded(measure(name, args.examples, args.passages))
        (HERE / "ceilings" / f"{name}.json").write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")
