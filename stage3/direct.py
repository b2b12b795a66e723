"""The direct receiver of stage 3: its LLM reads fewer positions than the context has tokens (--receiver direct).

    message -> text -> codes and adapter of this LLM [L,d] -> the costliest tokens stay, pooler -> [L',d] -> frozen LLM
                       stage 2: proven                        learned

Positions go where the bits went: the tokens that cost most in the message stay, the others are dropped, and a pooler
tells the tokens that stay what stood around them. Its targets are known: the LLM's own states behind the unpacking
receiver, which reads every token. It is trained on top of a stage-3 wire, whose messages do not change.

    python stage3_full.py --receiver direct --model tiny --rate 2
    python stage3_full.py --receiver direct --eval-only out/stage3 --rate 3

Letters: B batch, T padded length, L tokens of a prompt, L' positions that are read, C pooler width, d LLM embedding
width.
"""

import functools
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common import PROMPT, answer_logits, as_prompt, load_reader, make_batch, sent_prompt, splice
from plumbing.arguments import Parser, merge_with_saved
from plumbing.launch import UserError, set_up
from plumbing.processes import map_over_processes, my_share
from plumbing.report import finish
from plumbing.training import Run, identity
from plumbing.wires import load_module, load_wire, open_out
from stage2_encoder import Wire as Stage2Wire
from stage3.evaluation import measure, message_rows
from stage3.receivers import entry_of, load_receiver
from stage3_full import (
    BETAS,
    CONFIG,
    SHIPPED,
    STAGE,
    WEIGHT_DECAY,
    WIRE,
    Codec,
    Predictor,
    Wire,
    load_texts,
)

WIDTH, KERNEL, LAYERS = 128, 5, 4  # of the pooler
RATE = 2.0  # tokens of a context a position


def check_arguments(args, parser: Parser) -> None:
    """Fill in what --receiver direct fixes, and refuse what does not go with it."""
    if args.rate is not None and not 1 <= args.rate <= 64:
        parser.error(f"argument --rate: must be from 1 to 64 tokens a position, not {args.rate:g}")
    if args.send is not None:
        parser.error("--receiver direct is the receiver's affair: the message is the same; drop it from --send")
    if args.wire_carries == "prompt":
        parser.error("--receiver direct reads contexts, with the question as text: use --wire-carries context")
    if args.stage2:
        parser.error("--receiver direct is trained on top of a stage-3 wire: give --wire, not --stage2")
    args.rate, args.wire_carries = args.rate or RATE, "context"


class Pooler(nn.Module):
    """Embeddings of a context -> what the LLM reads at the positions that stay. Untrained, the others are just gone."""

    def __init__(self, d: int, rms: float):
        super().__init__()
        C = WIDTH
        self.rms = rms  # of the LLM's embeddings
        self.inner = nn.Linear(d, C)
        self.stays = nn.Embedding(2, C)
        self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(LAYERS))
        self.convolutions = nn.ModuleList(nn.Conv1d(C, 2 * C, KERNEL, padding="same") for _ in range(LAYERS))
        self.out = nn.Linear(C, d)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, embeddings: Tensor, stays: Tensor, real: Tensor) -> Tensor:
        """embeddings [B,T,d]; stays [B,T] bool; real [B,T] bool, False on padding. Returns [B,T,d]."""
        x = (self.inner(embeddings / self.rms) + self.stays(stays.long())) * real[..., None]
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            y = convolution((norm(x) * real[..., None]).transpose(1, 2)).transpose(1, 2)
            x = x + F.glu(y, -1) * real[..., None]
        return embeddings + self.rms * self.out(x)


@dataclass
class Reading:
    """The embeddings of a prompt, and what each token of its context costs in a message."""

    embeddings: Tensor  # [L,d]
    first: int  # token of the context
    last: int  # and the first behind it
    nats: Tensor  # [last-first] what each token of the context costs in a message

    def stays(self, rate: float) -> Tensor:
        """Bool [last-first]: positions go where the bits went. Of n tokens, the ceil(n / rate) that cost most stay."""
        chosen = torch.zeros(len(self.nats), dtype=torch.bool)
        order = self.nats.argsort(descending=True, stable=True)
        chosen[order[: math.ceil(len(order) / rate)]] = True
        return chosen.to(self.embeddings.device)


@functools.lru_cache(4096)
def surprisal(codec: Codec, text: str) -> np.ndarray:
    """What each byte of a text costs in a message, in nats [N]: a latent's cost, shared by the bytes it spells."""
    ids = codec.latents([text])[0] if text else []
    lengths = np.array([len(codec.pieces[index]) for index in ids], dtype=int)
    nats = np.array([math.log(total / (end - start)) for start, end, total in codec.intervals(ids)])
    return np.repeat(nats / lengths, lengths)


class DirectWire(Wire):
    """A receiver whose LLM reads ceil(n / rate) positions where the context has n tokens, and the question as text."""

    def __init__(self, codec: Codec, receiver: Stage2Wire, pooler: Pooler, rate: float):
        super().__init__(codec, receiver, "context")
        self.pooler, self.rate = pooler, rate

    @classmethod
    def of(cls, wire: Wire, tensors: dict[str, Tensor], entry: dict, rate: float, name: str) -> "DirectWire":
        """The direct receiver of a trained wire. Raises UserError if it has none for this LLM."""
        pooler = Pooler(wire.reader.table.shape[1], wire.receiver.constant_rms.item()).to(wire.reader.device)
        load_pooler(pooler, tensors, entry, name)
        return cls(wire.codec, wire.receiver, pooler, rate)

    @torch.no_grad()
    def read(self, context: str, question: str) -> Reading:
        """What unpacking gives: the embeddings of the prompt, and which of them are the context's."""
        receiver = self.receiver
        text = as_prompt(receiver.reader, PROMPT.format(context=context, question=question))
        at = max(0, text.find(PROMPT.split("{question}")[0].format(context=context)))
        spell = receiver.reader.spelling.spell
        begin, end = (len(spell(part).encode()) if part else 0 for part in (text[:at], text[: at + len(context)]))
        ends, codes = receiver.segment(spell(text))
        room, prefix = receiver.reader.prompt_tokens - len(receiver.prefix_codes), receiver.prefix_codes
        ends, codes = ends[-room:].cpu().numpy(), codes[-room:]
        embeddings = receiver.adapter(torch.cat([prefix, codes]).half().float(), receiver.constant_rms)
        first, last = np.searchsorted(ends, (begin, end), side="right")  # tokens that end within the context
        total = np.concatenate([[0.0], surprisal(self.codec, context).cumsum()])
        places = np.clip(np.concatenate([[begin], ends[first:last]]) - begin, 0, len(total) - 1)
        nats = torch.from_numpy(np.diff(total[places]).astype(np.float32))
        return Reading(embeddings, len(prefix) + int(first), len(prefix) + int(last), nats)

    def shorten(self, readings: list[Reading], rates: list[float]) -> tuple[list[Tensor], list[Tensor]]:
        """For each prompt: (embeddings [L',d], which of its L positions they stand at [L'])."""
        pad = nn.utils.rnn.pad_sequence
        stays = [reading.stays(rate) for reading, rate in zip(readings, rates, strict=True)]
        contexts = [reading.embeddings[reading.first : reading.last] for reading in readings]
        real = pad([torch.ones_like(part) for part in stays], batch_first=True)
        pooled = pad(contexts, batch_first=True)
        if pooled.shape[1]:  # not every context is empty
            pooled = self.pooler(pooled, pad(stays, batch_first=True), real)
        parts, places = [], []
        for reading, chosen, new in zip(readings, stays, pooled, strict=True):
            e, first, last = reading.embeddings, reading.first, reading.last
            parts.append(torch.cat([e[:first], new[: len(chosen)][chosen], e[last:]]))
            every = torch.ones(len(e), dtype=torch.bool, device=e.device)
            every[first:last] = chosen
            places.append(every.nonzero()[:, 0])
        return parts, places

    @torch.no_grad()
    def embeddings(self, message: bytes, question: str | None) -> Tensor:
        """Message [bytes] and question -> [L',d]. Raises UserError."""
        text, carries = self.codec.text(message)
        if carries == "prompt" or question is None:
            raise UserError("a direct receiver needs a message with a context, and a --question")
        reading = self.read(text, question)
        if reading.first == reading.last:
            return reading.embeddings
        return self.shorten([reading], [self.rate])[0][0]


def load_pooler(pooler: Pooler, tensors: dict[str, Tensor], entry: dict, wire: str) -> None:
    """The trained weights of a direct receiver. Raises UserError."""
    if "direct" not in entry:
        raise UserError(f"{wire} has no direct receiver for {entry['model']}: train one with --receiver direct")
    load_module(pooler, entry["prefix"] + "pooler.", tensors, wire)


def direct_losses(
    wire: DirectWire, rows: list[dict], rates: list[float], micro_batch_size: int
) -> Iterator[list[Tensor]]:
    """For each micro-batch [cross-entropy of the answer, KL from the teacher, error of the LLM's states]; scalars.

    The teacher is the same LLM behind the unpacking receiver, which reads every token. So the targets are known: at
    every layer, the states where a token stays, and behind the context, are the teacher's at that token. The error is
    |mine - theirs|^2 / |theirs|^2, its mean over layers and positions. All three by the number in the whole step.
    """
    reader = wire.receiver.reader
    prompts = [sent_prompt(reader, row) for row in rows]
    readings = [wire.read(prompt.context, prompt.question) for prompt in prompts]
    batches = [slice(at, at + micro_batch_size) for at in range(0, len(rows), micro_batch_size)]
    targets = positions = 0
    for part in batches:
        batch = make_batch(reader, rows[part])
        targets += len(batch.targets)
        positions += int(batch.attention.sum() - batch.sent.sum())
    for reading, rate in zip(readings, rates, strict=True):
        positions += math.ceil(len(reading.nats) / rate) + len(reading.embeddings) - reading.last
    for part in my_share(batches):  # all of them, unless torchrun started several processes
        batch = make_batch(reader, rows[part])
        shorter, places = wire.shorten(readings[part], rates[part])
        with torch.no_grad():
            whole, embeddings = splice(reader, batch, [reading.embeddings for reading in readings[part]])
            taught, theirs = answer_logits(reader, whole, embeddings, states=True)
        spliced, embeddings = splice(reader, batch, shorter)
        logits, mine = answer_logits(reader, spliced, embeddings, states=True)
        ce = F.cross_entropy(logits, spliced.targets, reduction="sum")
        kl = F.kl_div(logits.log_softmax(-1), taught.log_softmax(-1), log_target=True, reduction="sum")
        at = torch.zeros_like(spliced.attention, dtype=torch.bool)  # [B,L'] whose states have a target
        there = torch.zeros_like(whole.attention, dtype=torch.bool)  # [B,L] where it is
        for i, (reading, place) in enumerate(zip(readings[part], places, strict=True)):
            answer = torch.arange(len(reading.embeddings), int(whole.attention[i].sum()), device=place.device)
            place = torch.cat([place, answer])
            at[i, reading.first : len(place)] = True
            there[i, place[reading.first :]] = True
        error = torch.zeros((), device=at.device)
        for x, y in zip(mine, theirs, strict=True):
            x, y = x[at].float(), y[there].float()
            error = error + ((x - y).square().sum(1) / y.square().sum(1)).sum() / len(mine)
        yield [ce / targets, kl / targets, error / positions]


@torch.inference_mode()
def prefill_cost(wire: Wire, messages: list[bytes], questions: list[str]) -> dict[str, float]:
    """What the LLM does and keeps before its first token; means over messages, one at a time.

    FLOPs (the pooler's too), bytes of keys and values, and milliseconds (median) from an unpacked text to that token.
    """
    model, dtype = wire.receiver.reader.model, wire.receiver.reader.dtype

    def first_token(message: bytes, question: str):
        embeddings = wire.embeddings(message, question)
        output = model(inputs_embeds=embeddings[None].to(dtype), use_cache=True, logits_to_keep=1)
        return len(embeddings), output.logits[0, -1].argmax().item(), output.past_key_values

    flops = kept = positions = 0
    seconds = []
    for message, question in zip(messages, questions, strict=True):
        wire.codec.text(message)  # from here on it is unpacked
        with FlopCounterMode(display=False) as counter:
            length, _, cache = first_token(message, question)
        flops, positions = flops + counter.get_total_flops(), positions + length
        kept += sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
        started = time.perf_counter()
        first_token(message, question)
        seconds.append(time.perf_counter() - started)
    n = len(messages)
    return {"positions": positions / n, "flops": flops / n, "kv_bytes": kept / n, "ms": 1e3 * float(np.median(seconds))}


def prefill_rows(prefill: dict) -> list[tuple[str, str, str]]:
    """What the LLM does before its first token as rows (name, value, note) of the table, beside the unpacking one."""
    rows = []
    for name, key in (("FLOPs", "flops"), ("bytes of keys and values", "kv_bytes")):
        rows.append((f"prefill: {name}", f"{prefill['direct'][key]:.3g}", f"unpacked {prefill['unpack'][key]:.3g}"))
    milliseconds = [f"{prefill[kind]['ms']:.1f}" for kind in ("direct", "unpack")]
    return [*rows, ("from text to first token", milliseconds[0], f"ms; unpacked {milliseconds[1]}")]


def main(args) -> None:
    """--receiver direct, trained or with --eval-only. args: stage 3's."""
    # -----------------------------------------------------------------------------------------------------------------
    # setup: the stage-3 wire, one frozen LLM, data
    saved = load_wire(args.eval_only or args.wire or SHIPPED, STAGE, WIRE)
    merge_with_saved(args, {key: CONFIG[key] for key in ("data", "stage2")}, saved)
    device, dtype = set_up(args)
    tensors, receivers = dict(saved.tensors), list(saved.config["receivers"])
    # one LLM at a time: the sender's own, or the first that has a direct receiver
    able = [entry["model"] for entry in receivers if "direct" in entry]
    name = args.model or (able[0] if args.eval_only and able else receivers[0]["model"])
    reader = load_reader(name, device, dtype, args.gradient_checkpointing, args.device == "split")
    entry = entry_of(receivers, reader, saved.name)
    data = load_texts(args, reader)

    # -----------------------------------------------------------------------------------------------------------------
    # model: the unpacking receiver, proven by stages 2 and 3, and the pooler
    codec = Codec(tensors, saved.config["without"], device)
    Predictor(len(codec.pieces))  # draws random numbers before the pooler does, as in the runs behind results/stage3
    unpacking = Wire(codec, load_receiver(tensors, entry, reader, saved.name), "context")
    goes_on = "direct" in entry  # the wire has a pooler for this LLM: it is trained further
    if args.eval_only or goes_on:
        wire = DirectWire.of(unpacking, tensors, entry, args.rate, saved.name)
    else:
        pooler = Pooler(reader.table.shape[1], unpacking.receiver.constant_rms.item()).to(device)
        wire = DirectWire(codec, unpacking.receiver, pooler, args.rate)
    pooler = wire.pooler
    out = open_out(args)
    print(f"pooler: {sum(p.numel() for p in pooler.parameters()):,} trained parameters", flush=True)

    # -----------------------------------------------------------------------------------------------------------------
    # training
    learned_from = {"states": 2, "teacher": 1}.get(args.without, 3)  # of the three losses
    optimizer = torch.optim.AdamW(pooler.parameters(), lr=args.lr, betas=BETAS, weight_decay=WEIGHT_DECAY)
    run = Run(args, out, {"pooler": pooler}, optimizer, identity(args, reader.fingerprint, saved.sha256))
    for step in run.steps():  # resumes where it stopped; after the body: log, checkpoint, stop if told to
        # warm-up over 5% of the steps, then linearly to zero
        warmth = min(1.0, (step + 1) / (0.05 * args.steps), (args.steps - step) / (0.95 * args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warmth
        rows = data.train_rows(args.seed, step * args.batch_size, args.batch_size)
        rng = random.Random(f"{args.seed}-{step}")
        # every rate between 1 and the highest, which comes to --rate in the first third of a first training
        top = 1 + (args.rate - 1) * (1.0 if goes_on else min(1.0, 0.1 + 3 * step / args.steps))
        rates = [rng.uniform(1, top) for _ in rows]
        for losses in direct_losses(wire, rows, rates, args.micro_batch_size):  # one micro-batch at a time
            total = sum(losses[:learned_from])
            if total.requires_grad:  # else no row has a context
                total.backward()
            run.add(**dict(zip(("answer", "kl", "states"), losses, strict=True)))
        run.reduce()  # gradients and losses, summed over the processes
        norm = torch.nn.utils.clip_grad_norm_(pooler.parameters(), 1.0)
        if run.accepts(norm):  # neither NaN nor a spike
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if not args.eval_only:
        state = pooler.state_dict().items()
        tensors |= {f"{entry['prefix']}pooler.{name}": tensor.detach().cpu() for name, tensor in state}
        entry["direct"] = {"rate": args.rate, "steps": args.steps, "train_seconds": run.seconds}

    # -----------------------------------------------------------------------------------------------------------------
    # evaluation: this receiver, and what its LLM does before the first token, beside the unpacking one
    metrics, controls, records = measure(wire, data, 2 * args.micro_batch_size, args.seed)
    metrics |= {key: entry["direct"][key] for key in ("steps", "train_seconds")}
    questions = [row["question"] for row in data.test]
    contexts = [sent_prompt(reader, row).context for row in data.test]
    messages = map_over_processes(lambda context: codec.send(context, "context"), contexts)
    id_lists = [reader.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in contexts]
    controls["context_tokens"] = sum(map(len, id_lists)) / len(id_lists)
    pairs = messages[:100], questions[:100]
    controls["prefill"] = {"direct": prefill_cost(wire, *pairs), "unpack": prefill_cost(unpacking, *pairs)}
    rows = message_rows(controls, metrics["examples"]) + prefill_rows(controls["prefill"])
    config = {
        "model": entry["model"], "receivers": receivers, "stage2": args.stage2, "without": saved.config["without"],
        "wire_carries": "context", "receiver": "direct", "rate": args.rate, "untaught": args.without, "others": [],
    }  # fmt: skip
    title = f"stage 3: context -> {controls['latents']:.0f} latents, read at {args.rate:g} tokens a position"
    finish(run, reader, saved, title, metrics, controls, config, rows, records, tensors)
