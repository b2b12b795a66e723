"""Stage 0: the known attempt, faithfully, and why it fails. Everything is learned at once, from the answer loss alone.

    bytes [N] -> encoder -> 32 latents x 256 -> adapter -> 32 embeddings -> frozen LLM -> answer
                 trained    no target            trained   no target        frozen

What is wrong with it, and what the end of a run measures:

    1 too many unknowns        encoder and adapter are both random at first: each learns against the other's noise
    2 no supervision between   nothing says what a latent should hold; the only signal comes through the whole LLM
    3 extreme compression      32 positions for a prompt of 100 tokens: every position must say what no token ever said
    4 distribution mismatch    the LLM has only ever read rows of its table; these vectors lie nowhere near them

It is not sabotaged. Bytes are convolved, shortened and attended to; the adapter starts with outputs of the embeddings'
RMS; warm-up, clipping, and other learning rates in results/stage0/. It sees 19,200 questions in 1,200 steps; stage 2
sees 24,000 prompts in 3,000. It learns how answers look, not what the prompt says.

    python stage0_broken.py                      # minutes on two cores; README has time and score
    python stage0_broken.py --model tiny-qwen

Letters: B batch, N padded length in bytes, M latents of a message, C encoder width, L tokens of a prompt, V vocabulary,
d LLM embedding width.
"""

import plumbing.early  # noqa: F401

# isort: split
import copy
import math
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (
    IGNORE,
    Batch,
    Prompt,
    Reader,
    answer_logits,
    check_prompts,
    evaluate,
    load_reader,
    make_batch,
    score_wire,
    sent_prompt,
    show_samples,
    splice,
    to_bytes,
)
from plumbing.arguments import Parser, add_arguments, finish_arguments, merge_with_saved
from plumbing.checkpoints import module_tensors
from plumbing.data import Data, load_data
from plumbing.kinds import COUNT
from plumbing.launch import UserError, launch, set_up
from plumbing.models import check_fingerprint
from plumbing.processes import my_share
from plumbing.report import finish
from plumbing.spelling import prefix_ids
from plumbing.training import Run, micro_batches, must_match
from plumbing.wires import MODULE, Contents, load_module, load_wire, open_out

# ---------------------------------------------------------------------------------------------------------------------
# configuration: lower case are flags (--help), upper case are fixed

STAGE = "stage0"
CONFIG = dict(
    model="tiny",  # an alias, hub id or directory; tiny is embedded and needs no download
    data="tiny",  # questions about invented passages; or squad, or a file
    steps=1200,  # four minutes on one core
    batch_size=16,  # questions a step
    lr=1e-3,  # results/stage0/ has 3e-4 and 3e-3, too
)
FIXED_BY_WIRE = ("model", "data")  # --eval-only reads these from the wire
WIRE = Contents({"embedding_width": COUNT}, {"encoder.*": MODULE, "adapter.*": MODULE})  # what is saved
BETAS, WEIGHT_DECAY = (0.9, 0.98), 0.01
LATENTS, LATENT_WIDTH = 32, 256  # the attempt's own: 131,072 bits, where a prompt needs about 1,200
WIDTH, SHORTER = 128, 4  # of the encoder; bytes that become one position in it


def parse_arguments():
    parser = Parser(description=__doc__.split("\n")[0])
    add_arguments(parser, STAGE, CONFIG)
    return finish_arguments(parser)


# ---------------------------------------------------------------------------------------------------------------------
# the encoder: bytes [B,N] -> latents [B,M,256]; the adapter: latents -> embeddings [B,M,d]


class Encoder(nn.Module):
    """Bytes, shortened 4x by a convolution, two transformer layers, and 32 learned queries that attend to them."""

    def __init__(self):
        super().__init__()
        C = WIDTH
        self.embedding = nn.Embedding(257, C)  # 256 is padding
        self.shorten = nn.Conv1d(C, C, 2 * SHORTER + 1, stride=SHORTER, padding=SHORTER)
        layer = dict(d_model=C, nhead=4, dim_feedforward=2 * C, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(**layer) for _ in range(2))
        self.queries = nn.Parameter(torch.randn(LATENTS, C) / C**0.5)
        self.cross = nn.TransformerDecoderLayer(**layer)
        self.latent = nn.Sequential(nn.LayerNorm(C), nn.Linear(C, LATENT_WIDTH))

    def forward(self, data: Tensor) -> Tensor:
        """data: [B,N] bytes, 256 for padding. Returns [B,M,256]."""
        real = data < 256
        x = (self.embedding(data) * real[..., None]).transpose(1, 2)  # [B,C,N]
        x = F.gelu(self.shorten(x)).transpose(1, 2)  # [B,N/4,C]
        blank = ~real[:, ::SHORTER][:, : x.shape[1]]
        x = x + sinusoids(x.shape[1], WIDTH, x.device)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=blank)
        queries = self.queries.expand(len(data), -1, -1)
        return self.latent(self.cross(queries, x, memory_key_padding_mask=blank))


def sinusoids(length: int, width: int, device: torch.device) -> Tensor:
    """[length,width] positions as in "Attention is all you need": any length, nothing learned."""
    angles = torch.arange(length, device=device)[:, None] * 10000 ** (-torch.arange(0, width, 2, device=device) / width)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Adapter(nn.Module):
    """Latents -> embeddings: a layer norm, a linear layer, and a gain that starts at the embeddings' RMS."""

    def __init__(self, d: int, table_rms: float):
        super().__init__()
        self.norm = nn.LayerNorm(LATENT_WIDTH)
        self.out = nn.Linear(LATENT_WIDTH, d)
        nn.init.normal_(self.out.weight, std=LATENT_WIDTH**-0.5)
        nn.init.zeros_(self.out.bias)
        self.log_gain = nn.Parameter(torch.tensor(math.log(table_rms)))

    def forward(self, latents: Tensor) -> Tensor:
        """latents: [...,M,256]. Returns [...,M,d]."""
        return self.out(self.norm(latents)) * self.log_gain.exp()


# ---------------------------------------------------------------------------------------------------------------------
# the wire: text -> message -> embeddings


class Wire:
    """Message: 32 x 256 latents in float16. The receiver puts the LLM's start token in front, as it would with text."""

    def __init__(self, reader: Reader, encoder: Encoder, adapter: Adapter):
        self.reader, self.encoder, self.adapter = reader, encoder, adapter
        self.prefix = reader.table[prefix_ids(reader)]  # [P,d], P 0 or 1

    @torch.no_grad()
    def send(self, prompt: Prompt) -> bytes:
        latents = self.encoder(to_bytes([prompt.text], self.reader.device))[0]  # [M,256]
        return latents.cpu().numpy().astype("<f2").tobytes()

    @torch.no_grad()
    def receive(self, message: bytes) -> Tensor:
        """Message -> embeddings [P+M,d]."""
        latents = torch.from_numpy(np.frombuffer(message, "<f2").astype(np.float32)).to(self.reader.device)
        return torch.cat([self.prefix, self.adapter(latents.view(LATENTS, LATENT_WIDTH))])


# ---------------------------------------------------------------------------------------------------------------------
# the loss: the answer that the LLM gives, and nothing else


def answer_loss(wire: Wire, rows: list[dict], batch: Batch, targets: int) -> Tensor:
    """Cross-entropy (scalar) of every answer token, EOS included. There is no other loss.

    Summed over `batch` of these rows and divided by the `targets` answer tokens of the whole step.
    """
    texts = [sent_prompt(wire.reader, row).text for row in rows]
    embeddings = wire.adapter(wire.encoder(to_bytes(texts, wire.reader.device)))  # [B,M,d]
    batch, spliced = splice(wire.reader, batch, [torch.cat([wire.prefix, part]) for part in embeddings])
    logits = answer_logits(wire.reader, batch, spliced)
    return F.cross_entropy(logits, batch.targets, reduction="sum") / targets


# ---------------------------------------------------------------------------------------------------------------------
# the diagnosis: one number or two for each of the four causes


def diagnose(
    wire: Wire, start: Wire, data: Data, known: list[dict], metrics: dict, records: list[dict], history: list[dict],
    batch_size: int,
) -> dict:  # fmt: skip
    """Why it fails, in numbers: config.json's "controls".

    start: the wire before training; known: training rows for the probes; metrics, records: from `evaluate`.
    """
    reader = wire.reader
    latents = latents_of(wire, data.test).flatten(1)  # [rows, M*256]
    if not latents.isfinite().all():
        raise UserError("the encoder makes latents that are no numbers: its weights are too large to be a trained wire")
    probe, guess = probe_tokens(wire, known, data.test)
    unit = F.normalize(latents, dim=1)
    pairs = len(unit) * (len(unit) - 1)
    spectrum = torch.linalg.svdvals((latents - latents.mean(0)).cpu().double()).square()
    messages = [wire.send(sent_prompt(reader, row)) for row in data.test[:200]]
    fakes = torch.cat([wire.receive(message)[len(wire.prefix) :] for message in messages])  # [200*M, d]
    answers = Counter(record["wire"] for record in records)
    (commonest, times), *_ = answers.most_common(1)
    history = [row for row in history if row["step"] == 1 or row["step"] % 10 == 0]  # "first" are 1 and 10
    first, recent = history[:2], history[-10:]
    return {
        "gradient_encoder": mean_of(recent, "gradient_encoder"),
        "gradient_adapter": mean_of(recent, "gradient_adapter"),
        "first_gradient_encoder": mean_of(first, "gradient_encoder"),
        "first_gradient_adapter": mean_of(first, "gradient_adapter"),
        "probe_accuracy": probe,
        "probe_guess": guess,
        "bits_offered": 16.0 * LATENTS * LATENT_WIDTH,
        "bits_needed": 8 * metrics["packed_token_bytes"],
        "effective_dimensions": (spectrum.sum().square() / spectrum.square().sum()).item() if pairs else 0.0,
        "rms": fakes.square().mean().sqrt().item(),
        "real_rms": reader.table.square().mean().sqrt().item(),
        "mean_norm": fakes.mean(0).norm().item(),
        "real_mean_norm": reader.table.mean(0).norm().item(),
        "nearest_cosine": nearest_cosine(reader, fakes),
        "random_nearest_cosine": nearest_cosine(reader, torch.randn_like(fakes)),
        "latent_cosine": ((unit @ unit.T).sum() - len(unit)).item() / pairs if pairs else 1.0,
        "commonest_answer": commonest,
        "commonest_share": 100 * times / len(records),
        "first_token_accuracy": first_token_accuracy(wire, data.test, batch_size),
        "random_encoder_f1": score_wire(Wire(reader, start.encoder, wire.adapter), data, batch_size)[0],
        "random_adapter_f1": score_wire(Wire(reader, wire.encoder, start.adapter), data, batch_size)[0],
    }


def diagnosis_rows(c: dict, metrics: dict) -> list[tuple[str, str, str]]:
    """The diagnosis as rows (name, value, note) of the table. c: `diagnose`; metrics: `evaluate`."""
    gradients = "no training in this run"
    if c["gradient_encoder"] is not None:
        gradients = (
            f"{c['gradient_encoder']:.2g} a parameter of the encoder, {c['gradient_adapter']:.2g} of the adapter; "
            f"in the first steps {c['first_gradient_encoder']:.2g} and {c['first_gradient_adapter']:.2g}"
        )
    tokens = metrics["text_positions"]
    bits = f"{c['bits_offered']:.0f} bits offered, {c['bits_needed']:.0f} needed"
    used = f"{c['effective_dimensions']:.1f} of {LATENTS * LATENT_WIDTH} dimensions used"
    rms = f"RMS {c['rms']:.3g} (real {c['real_rms']:.3g})"
    mean = f"norm of the mean {c['mean_norm']:.3g} (real {c['real_mean_norm']:.3g})"
    random = f"cosine to the nearest token, of random vectors {c['random_nearest_cosine']:.3f}"
    different = f"{metrics['unique_answers']} different ones to {metrics['examples']} questions"
    return [
        ("1 too many unknowns", "", f"gradient RMS at the end: {gradients}"),
        ("  encoder random again: F1", f"{c['random_encoder_f1']:.1f}", ""),
        ("  adapter random again: F1", f"{c['random_adapter_f1']:.1f}", ""),
        ("2 no supervision between", f"{c['probe_accuracy']:.1f}", f"% of tokens that linear probes read; guessing "
         f"{c['probe_guess']:.1f}"),
        ("3 extreme compression", f"{LATENTS}", f"positions for {tokens:.0f} tokens; {bits}, {used}"),
        ("4 distribution mismatch", f"{c['nearest_cosine']:.3f}", f"{random}; {rms}, {mean}"),
        ("collapse: latents alike", f"{c['latent_cosine']:.3f}", "mean cosine of different prompts' latents"),
        ("  commonest answer, %", f"{c['commonest_share']:.1f}", f"{c['commonest_answer']!r}; {different}"),
        ("  first answer token, %", f"{c['first_token_accuracy']:.1f}", "right"),
    ]  # fmt: skip


def mean_of(rows: list[dict], key: str) -> float | None:
    return sum(row[key] for row in rows) / len(rows) if rows else None


def nearest_cosine(reader: Reader, vectors: Tensor) -> float:
    """Mean cosine of vectors [n,d] to the nearest row of the embedding table."""
    return (F.normalize(vectors, dim=1) @ F.normalize(reader.table, dim=1).T).amax(1).mean().item()


@torch.no_grad()
def latents_of(wire: Wire, rows: list[dict]) -> Tensor:
    """[rows, M, 256]"""
    prompts = [sent_prompt(wire.reader, row).text for row in rows]
    batches = [to_bytes(prompts[i : i + 50], wire.reader.device) for i in range(0, len(prompts), 50)]
    return torch.cat([wire.encoder(batch) for batch in batches])


@torch.no_grad()
def probe_tokens(wire: Wire, train: list[dict], test: list[dict]) -> tuple[float, float]:
    """(accuracy, accuracy of always guessing the commonest), %: which token stands at 32 even places of the prompt?

    Linear probes, ridge regression from one latent to one-hot tokens. Each place is read off the latent that reads it
    best on the last quarter of `train`; the first three quarters fit, `test` is neither.
    """
    reader, V = wire.reader, len(wire.reader.table)

    def tokens(rows):  # [rows, 32]
        lists = [sent_prompt(reader, row).ids for row in rows]
        return torch.tensor([[ids[(2 * j + 1) * len(ids) // 64] for j in range(32)] for ids in lists])

    fitted = max(1, 3 * len(train) // 4)
    y, y_test = tokens(train), tokens(test)
    place = torch.arange(32).expand(fitted, -1)
    # only tokens that occur in a place can be guessed there: [pairs] of place and token, and the pair of each label
    pairs, pair = torch.unique((place * V + y[:fitted]).flatten(), return_inverse=True)
    frequency = torch.bincount(pair) / fitted

    def guesses(scores: Tensor) -> Tensor:  # [rows, pairs] -> [rows, 32] tokens
        full = torch.full((len(scores), 32 * V), -math.inf)
        return full.index_copy_(1, pairs, scores).view(-1, 32, V).argmax(2)

    x, x_test = latents_of(wire, train).cpu().float(), latents_of(wire, test).cpu().float()  # [rows, M, 256]
    best, right = torch.full((32,), -1), torch.zeros(32, dtype=torch.long)
    for latent in range(x.shape[1]):
        mean, scale = x[:fitted, latent].mean(0), x[:fitted, latent].std(0, correction=0) + 1e-6
        known, other, unseen = (
            (part - mean) / scale for part in (x[:fitted, latent], x[fitted:, latent], x_test[:, latent])
        )
        # X^T Y of one-hot Y: sums of the rows with that token
        moments = torch.zeros(len(pairs), x.shape[2]).index_add_(0, pair, known.repeat_interleave(32, 0))
        ridge = known.T @ known + 0.03 * fitted * torch.eye(x.shape[2])
        weights = torch.linalg.solve(ridge, moments.T)  # [256, pairs]
        chosen = (guesses(other @ weights + frequency) == y[fitted:]).sum(0)
        hits = (guesses(unseen @ weights + frequency) == y_test).sum(0)
        right = torch.where(chosen > best, hits, right)
        best = torch.maximum(chosen, best)
    constant = (guesses(frequency[None]) == y_test).sum()
    return 100 * right.sum().item() / y_test.numel(), 100 * constant.item() / y_test.numel()


@torch.no_grad()
def first_token_accuracy(wire: Wire, rows: list[dict], batch_size: int) -> float:
    """% of answers whose first token is right; teacher forcing has no part in it."""
    right = 0
    for part in micro_batches(rows, batch_size):
        received = [wire.receive(wire.send(sent_prompt(wire.reader, row))) for row in part]
        batch, spliced = splice(wire.reader, make_batch(wire.reader, part), received)
        logits = answer_logits(wire.reader, batch, spliced)
        counts = (batch.labels != IGNORE).sum(1)
        first = torch.cat([counts.new_zeros(1), counts.cumsum(0)[:-1]])
        right += (logits[first].argmax(-1) == batch.targets[first]).sum().item()
    return 100 * right / len(rows)


def gradient_rms(module: nn.Module) -> float:
    """RMS of the gradient, over all numbers of a module."""
    total = sum(p.grad.square().sum().item() for p in module.parameters() if p.grad is not None)
    return math.sqrt(total / sum(p.numel() for p in module.parameters()))


def main() -> None:
    # -----------------------------------------------------------------------------------------------------------------
    # setup: arguments, frozen LLM, data
    args = parse_arguments()
    saved = None
    if args.eval_only:
        saved = load_wire(args.eval_only, STAGE, WIRE)
    merge_with_saved(args, {key: CONFIG[key] for key in FIXED_BY_WIRE}, saved)
    device, dtype = set_up(args)
    reader = load_reader(args.model, device, dtype, args.gradient_checkpointing, args.device == "split")
    if saved:
        check_fingerprint(reader, saved.config, saved.name)
    data = load_data(args.data, reader, args.eval_examples)
    if data.kind == "text":
        raise UserError(f"--data {args.data}: stage 0 learns from answers; give questions, not plain text")
    check_prompts(reader, data)

    # -----------------------------------------------------------------------------------------------------------------
    # model: all of it random. The LLM is frozen.
    d, table_rms = reader.table.shape[1], reader.table.square().mean().sqrt().item()
    encoder, adapter = Encoder().to(device), Adapter(d, table_rms).to(device)
    wire = Wire(reader, encoder, adapter)
    start = Wire(reader, *copy.deepcopy((encoder, adapter)))  # stays random: what did training add?
    if saved:
        load_module(encoder, "encoder.", saved.tensors, saved.name)
        load_module(adapter, "adapter.", saved.tensors, saved.name)
    out = open_out(args)
    sizes = [sum(p.numel() for p in module.parameters()) for module in (encoder, adapter)]
    print(f"encoder {sizes[0]:,} + adapter {sizes[1]:,} trained parameters, {LATENTS} x {LATENT_WIDTH} latents")

    # -----------------------------------------------------------------------------------------------------------------
    # training
    parameters = [*encoder.parameters(), *adapter.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=BETAS, weight_decay=WEIGHT_DECAY)
    modules = {"adapter": adapter, "encoder": encoder}
    fits = must_match(args, reader.fingerprint)  # a checkpoint must fit this run
    run = Run(args, out, modules, optimizer, fits, show=lambda: show_samples(wire, data))
    for step in run.steps():  # resumes where it stopped; after the body: log, checkpoint, stop if told to
        # warm-up over 5% of the steps, then linearly to zero
        warmth = min(1.0, (step + 1) / (0.05 * args.steps), (args.steps - step) / (0.95 * args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warmth
        rows = data.train_rows(args.seed, step * args.batch_size, args.batch_size)
        parts = micro_batches(rows, args.micro_batch_size)
        batches = [make_batch(reader, part) for part in parts]
        # the loss is a mean over the whole step, so that the micro-batch size changes nothing
        targets = sum(len(batch.targets) for batch in batches)
        for part, batch in my_share(zip(parts, batches, strict=True)):  # all, unless torchrun started several processes
            ce = answer_loss(wire, part, batch, targets)
            ce.backward()
            run.add(ce=ce)
        run.reduce()  # gradients and losses, summed over the processes
        run.note(gradient_encoder=gradient_rms(encoder), gradient_adapter=gradient_rms(adapter))
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if run.accepts(norm):  # neither NaN nor a spike
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    # -----------------------------------------------------------------------------------------------------------------
    # evaluation: the wire and every control, on test passages whose names were never seen
    encoder.eval()
    start.encoder.eval()
    batch_size = 2 * args.micro_batch_size  # no gradients: twice the rows fit
    metrics, records = evaluate(wire, data, batch_size)
    print("  the diagnosis", flush=True)
    known = data.train_rows(args.seed, 0, 10 if args.smoke else 1000)
    controls = diagnose(wire, start, data, known, metrics, records, run.history, batch_size)
    bars = {
        "random encoder": controls["random_encoder_f1"], "random adapter": controls["random_adapter_f1"],
        "first token right": controls["first_token_accuracy"], "commonest answer's share": controls["commonest_share"],
    }  # fmt: skip
    rows, tensors = diagnosis_rows(controls, metrics), module_tensors(modules)
    title = f"stage 0: {LATENTS} x {LATENT_WIDTH} latents, answer loss alone"
    config = {"embedding_width": d}
    finish(run, reader, saved, title, metrics, controls, config, rows, records, tensors, bars=bars)


if __name__ == "__main__":
    launch(main)
