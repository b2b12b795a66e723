"""Stage 3, the last rung: stage 0's own shape, 32 latents of 256 numbers for a context, in the order that works.

    context -> frozen LLM + [update] -> keys and values of 32 slots  -> [encoder] -> 32 latents x 256
               known    starts at zero  chosen by trained scorers        starts at the PCA
    latents -> [adapter] -> keys and values of 32 slots -> frozen LLM, which reads the question behind them -> answer
               starts at the inverse PCA

Everything starts as something that works. An LLM that has read a context keeps keys and values of every token. It can
go on from those of a few tokens (*slots*), at their original positions. Scorers choose them (stage3/scorers.py), and
learn first: each head keeps tokens of its own, those that the answers need. A slot stands where one token stood. Most
heads keep that token there; the others keep one that they want more. A PCA makes 256 numbers of the `n` that a slot has
in all layers together; it looks at each number as closely as the answers depend on it. Then the training begins. A
low-rank update of the LLM that reads the context learns to move what the other tokens say into those that stay; the two
matrices around the latents learn with it, slowly. The LLM that answers is frozen, and has no update.

    python stage3_full.py --receiver slots --model tiny                                     # README has the scores
    python stage3_full.py --receiver slots --eval-only tiny/wires/stage3 --rate 2           # half as many positions
    python stage3_full.py --receive message --receiver slots --question "Who?" "Where?"     # one cache, two questions

Letters: B batch, T padded length, S slots, n numbers of a row (keys and values of a token in every layer), H heads that
keep them, in all layers together, d LLM embedding width, V vocabulary.
"""

import contextlib
import functools
import math
import random
import struct
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common import Reader, check_prompts, load_reader
from plumbing.arguments import Parser, add_arguments, finish_arguments, merge_with_saved, positive_float, positive_int
from plumbing.checkpoints import module_tensors
from plumbing.data import load_data
from plumbing.hub import MODELS
from plumbing.kinds import COUNT
from plumbing.launch import ROOT, UserError, set_up
from plumbing.models import check_fingerprint
from plumbing.processes import my_share
from plumbing.report import finish
from plumbing.training import Run, micro_batches, must_match
from plumbing.wires import MODULE, Contents, SavedWire, load_module, load_wire, open_out
from stage3 import scorers
from stage3.cache import Layout, Memory, Passage, answers_behind, nll_behind, opening_ids, padded, stacked
from stage3.evaluation import measure_slots, slot_rows

# ---------------------------------------------------------------------------------------------------------------------
# configuration: lower case are flags (--help), upper case are fixed

STAGE = "slots"  # of the wire; it is started as stage3_full.py --receiver slots
CONFIG = dict(
    model="tiny",  # an alias, hub id or directory; tiny is embedded and needs no download
    data="tiny",  # questions about invented passages; or squad, or a file
    steps=3000,  # an hour on one core, after twenty minutes for the scorers
    batch_size=8,  # passages a step
    lr=2e-3,  # peak
)
FIXED_BY_WIRE = ("model", "data")  # --eval-only reads these from the wire
WIRE = Contents({"embedding_width": COUNT}, {"slots.*": MODULE})  # what is saved
BETAS = (0.9, 0.98)
SLOW_RATE = 0.05  # times the learning rate: what starts at the PCA should not leave it at once
LATENTS, LATENT_WIDTH = 32, 256  # stage 0's
RANK = 64  # of the update of each matrix
RATES = 1.0, 5.0  # tokens of a context for each slot, drawn anew for each passage of the training
QUESTIONS = 6  # about each passage of a step
ALL = 100  # questions about each passage that scorers and PCA are fitted on, if there are so many
KNOWN = 300  # passages that scorers and PCA are fitted on
CURVE = 1, 2, 3, 4  # tokens of a context for each slot, at which every evaluation measures F1, too


def rate(text: str) -> float:
    """Tokens of a context for each slot, from the command line. Raises ArgumentTypeError."""
    value = positive_float(text)
    if value < 1:
        raise ArgumentTypeError(f"must be at least 1, not {text!r}: a slot stands for at least one token")
    return value


def add_receiver(parser: Parser) -> None:
    """The flags that stage3_full.py and this file share."""
    add, told = parser.add_argument, "text: the LLM reads every token; slots: it reads few positions of a context"
    add("--receiver", choices=("text", "slots"), default="text", help=f"{told} (stage3/slots.py)")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--latents", metavar="N", type=positive_int, help=f"slots of a context (default: {LATENTS})")
    add("--rate", metavar="R", type=rate, help="instead of --latents: tokens of a context for each slot")


def parse_arguments():
    parser = Parser(description=__doc__.split("\n")[0])
    add_receiver(parser)
    add_arguments(parser, STAGE, CONFIG)
    args = finish_arguments(parser)
    if args.gradient_checkpointing:
        parser.error("--gradient-checkpointing: slots take keys and values from all layers, which it would not keep")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# the model: what is read of a context, which tokens stay, and the latents between


class Update(nn.Module):
    """A low-rank update of every matrix of an LLM (Hu et al. 2021, LoRA), which is zero before training."""

    def __init__(self, model: nn.Module):
        super().__init__()
        output = model.get_output_embeddings()
        self.parts = {
            name.replace(".", "_"): part
            for name, part in model.named_modules()
            if part is not output and (isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D")  # GPT-2's
        }
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        for name, part in self.parts.items():
            rows, columns = part.weight.shape if type(part).__name__ == "Conv1D" else part.weight.shape[::-1]
            self.a[name] = nn.Parameter(torch.randn(rows, RANK) / rows**0.5)
            self.b[name] = nn.Parameter(torch.zeros(RANK, columns))

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Inside, the LLM computes with the update."""

        def updated(a: Tensor, b: Tensor):
            return lambda _, inputs, output: output + inputs[0] @ a.to(output.dtype) @ b.to(output.dtype)

        parts = self.parts.items()
        hooks = [part.register_forward_hook(updated(self.a[name], self.b[name])) for name, part in parts]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class Slots(nn.Module):
    """A context -> latents [S,256] and where their tokens stood; latents -> keys and values of slots."""

    def __init__(self, reader: Reader, width: int = LATENT_WIDTH):
        super().__init__()
        d, self.reader, self.layout, self.width = reader.table.shape[1], reader, Layout(reader), width
        n = self.layout.n
        self.update = Update(reader.model)
        self.stays = nn.Parameter(torch.zeros(d))  # added to the embeddings of the tokens that stay
        self.encoder, self.adapter = nn.Linear(n, width), nn.Linear(width, n)
        self.register_buffer("scale", torch.ones(n))  # of each number of a row: the larger, the less it matters
        self.register_buffer("scorer", torch.zeros(6 * d + 1, self.layout.heads))

    def choose(self, passages: list[Passage], counts: list[int]) -> list[scorers.Choice]:
        """The `counts` slots of each context."""
        return scorers.choose(self.reader, self.scorer, passages, counts)

    def latents(self, passages: list[Passage], chosen: list[scorers.Choice]) -> list[Tensor]:
        """[S,256] of each context, where the `chosen` tokens stay."""
        ids, real = padded([passage.ids for passage in passages], self.reader.device)
        zeros = torch.zeros(ids.shape[1], device=ids.device)
        stay = torch.stack([zeros.index_fill(0, choice.at, 1.0) for choice in chosen])
        embeddings = self.reader.table[ids] + stay[..., None] * self.stays
        with self.update.at_work():
            rows = self.layout.read(real, inputs_embeds=embeddings.to(self.reader.dtype))
        slots = [choice.rows(row, self.layout.owners) for row, choice in zip(rows, chosen, strict=True)]
        return [self.encoder(part / self.scale) for part in slots]

    def decoded(self, latents: list[Tensor]) -> list[Tensor]:
        """Rows [S,n] of slots from the latents [S,256] of each context."""
        return [self.adapter(part) * self.scale for part in latents]


# ---------------------------------------------------------------------------------------------------------------------
# the start: a PCA, fitted on the frozen LLM


def fit_latents(wire: "Wire", passages: list[Passage], drawn: random.Random) -> float:
    """Fit encoder and adapter to the PCA of slots, and return the share of their variance that latents hold.

    Each number of a row counts as much as the answers depend on it: by the RMS of their loss's gradient.
    """
    slots, sample, squares = wire.slots, [], 0.0
    for passage in passages:
        chosen = slots.choose([passage], draw_counts(drawn, [passage]))
        with torch.no_grad():
            rows = chosen[0].rows(slots.layout.contexts([passage])[0], slots.layout.owners)
        rows.requires_grad_()
        memory = wire.behind_openings([passage], chosen, [rows])
        nll_behind(slots.layout, memory, [passage]).backward()
        sample.append(rows.detach().cpu())
        squares = squares + rows.grad.square().sum(0)
    with torch.no_grad():
        sample = torch.cat(sample)[: 16 * 1024].to(squares.device)
        numbers = [heads * width for heads, width in slots.layout.shapes]
        size = torch.cat([part.square().mean().sqrt().expand(part.shape[1]) for part in sample.split(numbers, 1)])
        size = size.clamp(min=1e-6)  # RMS of each layer's keys or values
        matters = squares * size.square()
        scale = size / (matters + 0.01 * matters.mean()).sqrt()
        slots.scale.copy_(scale * (sample / scale).square().mean().sqrt())
        sample /= slots.scale
        mean = sample.mean(0)
        components = torch.svd_lowrank(sample - mean, q=min(slots.width, *sample.shape), niter=4)[2]  # [n, width]
        slots.encoder.weight.zero_()
        slots.adapter.weight.zero_()
        slots.encoder.weight[: components.shape[1]] = components.T
        slots.adapter.weight[:, : components.shape[1]] = components
        slots.encoder.bias.copy_(-slots.encoder.weight @ mean)
        slots.adapter.bias.copy_(mean)
        return (((sample - mean) @ components).square().sum() / (sample - mean).square().sum()).item()


# ---------------------------------------------------------------------------------------------------------------------
# the wire: context -> message -> memory; the question travels as text


class Wire:
    """Message: three counts (tokens of the context, of its opening, latents), then the positions and the latents.

    Counts and positions have 32 bits, the numbers of a latent 16.
    """

    def __init__(self, slots: Slots, count: Callable[[Passage], int]):
        """count: how many latents a passage has, at most."""
        self.slots, self.count, self.reader = slots, count, slots.reader
        # the rows [h,n] of the tokens before every context, as the frozen LLM keeps them: they do not travel
        self.opening_rows = torch.zeros(0, slots.layout.n, device=self.reader.device)
        opening = opening_ids(self.reader)
        if opening:
            ids, real = padded([opening], self.reader.device)
            with torch.no_grad():
                self.opening_rows = slots.layout.read(real, input_ids=ids)[0]

    def at_rate(self, rate: float) -> "Wire":
        """The same, with a latent for so many tokens of a context."""
        return Wire(self.slots, functools.partial(Passage.count, rate=rate))

    def behind_openings(self, passages: list[Passage], chosen: list[scorers.Choice], rows: list[Tensor]) -> Memory:
        """Memory of the rows [S,n] of each passage's slots, behind the rows of its opening."""
        openings = [self.opening_rows[: passage.opening] for passage in passages]
        return stacked(openings, rows, [choice.at for choice in chosen], [len(passage.ids) for passage in passages])

    @staticmethod
    def latents_in(message: bytes) -> int:
        return struct.unpack_from("<3I", message)[2]

    @torch.no_grad()
    def send(self, passage: Passage) -> bytes:
        (chosen,) = self.slots.choose([passage], [self.count(passage)])
        (latents,) = self.slots.latents([passage], [chosen])
        counts = struct.pack("<3I", len(passage.ids), passage.opening, len(chosen.at))
        places, numbers = chosen.at.cpu().numpy().astype("<u4"), latents.half().cpu().numpy().astype("<f2")
        return counts + places.tobytes() + numbers.tobytes()

    @torch.no_grad()
    def selected(self, passages: list[Passage]) -> Memory:
        """Nothing is learned but the choice: the tokens that stay, as the frozen LLM keeps them."""
        chosen = self.slots.choose(passages, [self.count(passage) for passage in passages])
        owners, pairs = self.slots.layout.owners, zip(self.slots.layout.contexts(passages), chosen, strict=True)
        kept = [choice.rows(row, owners) for row, choice in pairs]
        return self.behind_openings(passages, chosen, kept)

    @torch.no_grad()
    def receive(self, messages: list[bytes]) -> Memory:
        device, width, openings, latents, at, lengths = self.reader.device, self.slots.width, [], [], [], []
        for message in messages:
            length, opening, count = struct.unpack_from("<3I", message)
            places = np.frombuffer(message, "<u4", count, 12).astype(np.int64)
            numbers = np.frombuffer(message, "<f2", count * width, 12 + 4 * count).astype(np.float32)
            openings.append(self.opening_rows[:opening])
            latents.append(torch.from_numpy(numbers).view(count, width).to(device))
            at.append(torch.from_numpy(places).to(device))
            lengths.append(length)
        return stacked(openings, self.slots.decoded(latents), at, lengths)


# ---------------------------------------------------------------------------------------------------------------------
# the loss: answers to several questions about each context, from its slots


def draw_rate(drawn: random.Random) -> float:
    """Tokens of a context for each slot."""
    low, high = map(math.log, RATES)
    return math.exp(drawn.uniform(low, high))


def draw_counts(drawn: random.Random, passages: list[Passage]) -> list[int]:
    """Slots of each passage, at a rate that is drawn anew for it."""
    return [passage.count(draw_rate(drawn)) for passage in passages]


def answer_loss(wire: Wire, passages: list[Passage], counts: list[int], targets: int) -> Tensor:
    """Cross-entropy (scalar) of every answer token, EOS included, divided by the `targets` of the whole step."""
    slots = wire.slots
    chosen = slots.choose(passages, counts)
    memory = wire.behind_openings(passages, chosen, slots.decoded(slots.latents(passages, chosen)))
    return nll_behind(slots.layout, memory, passages) / targets


# ---------------------------------------------------------------------------------------------------------------------
# using it


def load_slots(directory: str, model: str) -> SavedWire:
    """The slots of a model: a wire of its own, or one beside the sender of stage 3."""
    beside = f"{directory}/slots-{Path(MODELS.get(model, model)).name}"
    if any(Path(base, beside).exists() for base in (".", ROOT)):
        return load_wire(beside, STAGE, WIRE)
    try:
        return load_wire(directory, STAGE, WIRE)
    except UserError as error:
        raise UserError(f"{error}; slots that are trained with --out {beside} would be found there") from None


def restore_slots(slots: Slots, saved: SavedWire) -> None:
    """Load a trained wire, which holds numbers of 16 bits. Raises UserError naming a tensor that does not fit."""
    tensors = {name: t.float() if t.dtype == torch.float16 else t for name, t in saved.tensors.items()}
    load_module(slots, "slots.", tensors, saved.name)


def how_many(args) -> Callable[[Passage], int]:
    """How many latents --latents or --rate gives a passage."""
    return functools.partial(Passage.count, rate=args.rate) if args.rate else lambda _: args.latents or LATENTS


def ask(reader: Reader, saved: SavedWire, args, context: str, questions: list[str]) -> tuple[list[str], bool]:
    """(answers to questions about a context, all from one cache of a few slots; whether the context was cut)."""
    check_fingerprint(reader, saved.config, saved.name)
    slots = Slots(reader).to(reader.device)
    restore_slots(slots, saved)
    wire = Wire(slots, how_many(args))
    passage = Passage(reader, [{"context": context, "question": question} for question in questions])
    memory = wire.receive([wire.send(passage)])
    return answers_behind(slots.layout, memory.of([0] * len(questions)), passage.tails), passage.truncated


def main() -> None:
    args = parse_arguments()

    # -----------------------------------------------------------------------------------------------------------------
    # setup: frozen LLM, passages
    saved = load_slots(args.eval_only, args.model or CONFIG["model"]) if args.eval_only else None
    merge_with_saved(args, {key: CONFIG[key] for key in FIXED_BY_WIRE}, saved)
    device, dtype = set_up(args)
    reader = load_reader(args.model, device, dtype, split=args.device == "split")
    if saved:
        check_fingerprint(reader, saved.config, saved.name)
    data = load_data(args.data, reader, args.eval_examples)
    if data.kind == "text":
        raise UserError(f"--data {args.data}: slots learn from answers; give questions, not plain text")
    check_prompts(reader, data)
    out = open_out(args)

    # -----------------------------------------------------------------------------------------------------------------
    # model: an update that is zero, scorers that have learned, the PCA of what they choose
    slots, start = Slots(reader).to(device), Slots(reader).to(device)
    count, known = how_many(args), 10 if args.smoke else KNOWN
    wire, before = Wire(slots, count), Wire(start, count)
    slow = [*slots.encoder.parameters(), *slots.adapter.parameters(), slots.stays]
    groups = [{"params": [*slots.update.parameters()], "rate": 1.0}, {"params": slow, "rate": SLOW_RATE}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=BETAS, weight_decay=0.0)
    run = Run(args, out, {"slots": slots}, optimizer, must_match(args, reader.fingerprint))
    passages = [Passage(reader, rows) for rows in data.train_passages(args.seed, 0, known, ALL)]
    if saved:
        restore_slots(slots, saved)
    if saved or args.resume:
        start.scorer.copy_(slots.scorer)  # it does not learn any more
    else:
        print("scorers", flush=True)

        def passages_of(step: int) -> list[Passage]:
            found = data.train_passages(args.seed, known + step * scorers.PASSAGES, scorers.PASSAGES, QUESTIONS)
            return [Passage(reader, rows) for rows in found]

        def gates_of(scores: Tensor, drawn: random.Random) -> Tensor:
            return scorers.gates(scores, math.ceil(len(scores) / draw_rate(drawn)), drawn)

        steps, size = 4 if args.smoke else scorers.STEPS, args.micro_batch_size
        with scorers.eager(reader):
            scorer = scorers.fit_scorer(start.layout, passages)
            scorer = scorers.learn_scorer(start.layout, scorer, passages_of, gates_of, steps, args.seed, size)
        start.scorer.copy_(scorer)
    print("PCA", flush=True)
    explained = fit_latents(before, passages, random.Random(args.seed))
    if not saved and not args.resume:
        slots.load_state_dict(start.state_dict())
    print(f"{sum(p.numel() for p in slots.parameters()):,} trained parameters; rows of {slots.layout.n} numbers")

    # -----------------------------------------------------------------------------------------------------------------
    # training
    for step in run.steps():  # resumes where it stopped; after the body: log, checkpoint, stop if told to
        # warm-up over 2% of the steps, then linearly to zero
        warmth = min(1.0, (step + 1) / (0.02 * args.steps), (args.steps - step) / (0.98 * args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * group["rate"] * warmth
        found = data.train_passages(args.seed, known + step * args.batch_size, args.batch_size, QUESTIONS)
        passages = [Passage(reader, rows) for rows in found]
        counts = draw_counts(random.Random(f"{args.seed}-{step}"), passages)
        targets = sum(len(answer) for passage in passages for answer in passage.answers)
        parts = zip(*(micro_batches(items, args.micro_batch_size) for items in (passages, counts)), strict=True)
        for part, some in my_share(list(parts)):  # all, unless torchrun started several processes
            ce = answer_loss(wire, part, some, targets)
            ce.backward()
            run.add(ce=ce)
        run.reduce()  # gradients and losses, summed over the processes
        norm = torch.nn.utils.clip_grad_norm_(slots.parameters(), 1.0)
        if run.accepts(norm):  # neither NaN nor a spike
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    # -----------------------------------------------------------------------------------------------------------------
    # evaluation: the wire and every control, on test passages whose names were never seen
    slots.half().float()  # as it is saved, with 16 bits a number
    curve = CURVE[:1] if args.smoke else CURVE
    metrics, controls, records = measure_slots(wire, before, data, 2 * args.micro_batch_size, curve)
    controls["explained_variance"] = explained
    many = f"{args.rate:g} tokens a latent" if args.rate else f"{args.latents or LATENTS} latents"
    title, config = f"stage 3, slots: {many}, {LATENT_WIDTH} numbers each", {"embedding_width": reader.table.shape[1]}
    tensors = {name: tensor.half() for name, tensor in module_tensors({"slots": slots}).items()}
    bars = {"before training": controls["start_f1"]}
    finish(run, reader, saved, title, metrics, controls, config, slot_rows(controls), records, tensors, bars=bars)
