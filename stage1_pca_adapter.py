"""Stage 1: a frozen LLM answers questions about text that it received as 8x smaller PCA codes. One thing is learned.

    tokens -> frozen embeddings [L,d] -> PCA codes [L,k] -> adapter -> RMS match -> frozen LLM -> answer
              known                      fixed             trained    known        frozen

Why this works where stage 0 fails: the input of the trained part is known (codes that keep most of the variance), its
target is known (the LLM's own embeddings), it starts at a sensible answer (the PCA inverse), and the vectors that the
LLM reads keep the statistics of real embeddings. The loss needs no LLM:

    loss = |decoded - embedding|^2 / variance, of tokens drawn as often as they occur

An adapter that cannot come close to the embeddings, as `linear` cannot, gains from a second target: in the last
`--llm-steps`, the loss is that of the prompts' tokens + cross-entropy of every answer token, EOS included. The default
has no such step, because it gained nothing from them. Every run also measures the PCA inverse, where training starts.

This compresses *dimensions* (192 -> 24), not bytes: 24 float16 numbers a token are more than the text. The table at the
end says so. Bytes are stage 3's subject.

    python stage1_pca_adapter.py                                      # the embedded reader; README has time and score
    python stage1_pca_adapter.py --model tiny-qwen --code-dim 10 --adapter linear --steps 200 --llm-steps 200
    python stage1_pca_adapter.py --eval-only tiny/wires/stage1        # the shipped wire
    python stage1_pca_adapter.py --model llama-7b --data squad --code-dim 512 --micro-batch-size 4       # one GPU

Letters: B batch, T padded length, L tokens of a prompt, U different tokens of a batch, V vocabulary, d LLM embedding
width, k code width. In an adapter, N codes that are decoded together, n tokens that they blend.
"""

import plumbing.early  # noqa: F401

# isort: split
import copy
import math
import struct
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (
    PCA,
    Batch,
    Prompt,
    Reader,
    answer_logits,
    check_prompts,
    evaluate,
    fit_pca,
    load_reader,
    make_batch,
    score_wire,
    show_samples,
    token_counts,
)
from kernels.adapter import adapt, project
from plumbing.arguments import Parser, add_arguments, finish_arguments, merge_with_saved, positive_int, whole_number
from plumbing.checkpoints import module_tensors
from plumbing.data import Data, load_data
from plumbing.kinds import ANYTHING, COUNT, NUMBER, one_of
from plumbing.launch import UserError, launch, set_up
from plumbing.models import check_fingerprint
from plumbing.processes import my_share, rank, world_size
from plumbing.report import finish
from plumbing.training import Run, micro_batches, must_match
from plumbing.wires import MODULE, Contents, load_module, load_wire, open_out

# ---------------------------------------------------------------------------------------------------------------------
# configuration: lower case are flags (--help), upper case are fixed

STAGE = "stage1"
CONFIG = dict(
    model="tiny",  # an alias, hub id or directory; tiny is embedded and needs no download
    data="tiny",  # questions about invented passages; or squad, or a file
    steps=2000,  # 45 seconds on two cores
    batch_size=16,  # questions of a step through the LLM
    lr=1e-2,  # peak; inputs and outputs are in units of their spread, so one rate fits all models
    llm_steps=0,  # the last ones, through the LLM
    code_dim=None,  # k, numbers a token; None: an eighth of the embedding width
    adapter="mlp",  # the smallest without a table of tokens that reads nearly like text; see class Adapter
)
FIXED_BY_WIRE = ("model", "data", "code_dim", "adapter")  # --eval-only reads these from the wire
ADAPTERS = ("linear", "mlp", "codebook")
WIRE = Contents(  # what is saved; anything else is refused
    config={
        "embedding_width": COUNT, "code_dim": COUNT, "adapter": one_of(*ADAPTERS),
        "controls": {"explained_variance": NUMBER, "*": ANYTHING},
    },
    tensors={"mean": "d float32", "components": "d k float32", "target_rms": "float32", "adapter.*": MODULE},
)  # fmt: skip
TOKENS = 512  # of a step without the LLM
HIDDEN = 512  # numbers of each of the mlp's hidden layers
SMALL = 8192  # tokens: a codebook blends all of a vocabulary up to this size


def parse_arguments():
    parser = Parser(description=__doc__.split("\n")[0])
    add_arguments(parser, STAGE, CONFIG)
    add = parser.add_argument
    add("--code-dim", type=positive_int, help="k; default: an eighth of the embedding width")
    add("--llm-steps", type=whole_number, default=CONFIG["llm_steps"], help="last steps, through the LLM")
    add("--adapter", choices=ADAPTERS, help=f"default: {CONFIG['adapter']}")
    add("--dry-run", action="store_true", help="say what this model needs, from its shape alone")
    add("--random-weights", metavar="LAYERS", nargs="?", const=0, type=positive_int,
        help="time steps of a random model of this shape (of so many layers)")  # fmt: skip
    args = finish_arguments(parser)
    if args.dry_run or args.random_weights is not None:
        if args.eval_only or args.resume or args.data not in (None, "tiny"):
            parser.error("--dry-run and --random-weights have no data: drop --data, --resume and --eval-only")
        if args.random_weights is not None and args.device == "split":
            parser.error("--random-weights measures one device: drop --device split")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# the adapter: codes [N,k] -> embeddings [N,d]


class Adapter(nn.Module):
    """The part that is trained. All three kinds start from the PCA and end in the same operator, kernels/adapter.py.

    linear    y = z A + b, started at the PCA inverse
    mlp       + two hidden layers whose output starts at zero
    codebook  a table of tokens: y = softmax(-|z - keys|^2 * sharpness / 2) @ table. keys [V,k] start at every token's
              code, the values are the LLM's frozen embedding table. Its output is always a mixture of real embeddings.
              Here it does little more than look the token up again; in stage 2, where codes are noisy, it decodes.

    Codes are divided by their mean standard deviation and y is in units of the embeddings' RMS, so that one learning
    rate fits a small reader and a 7B model, whose embeddings have an RMS near 0.01.
    """

    def __init__(self, kind: str, pca: PCA, reader: Reader, codes: Tensor, counts: Tensor):
        """codes: [V,k] of the reader's frozen embeddings; counts: [V] of the training split."""
        super().__init__()
        k, d = codes.shape[1], reader.table.shape[1]
        frequency = counts / counts.sum()
        code_scale = (frequency @ codes.square()).mean().sqrt()
        self.kind = kind
        self.register_buffer("code_scale", code_scale)
        if kind == "codebook":
            self.table = reader.values  # the LLM's own: not saved with the wire
            self.keys = nn.Parameter(codes / code_scale)  # [V,k]
            # with unit variance a dimension, the squared distance of two tokens is 2k on average
            self.log_sharpness = nn.Parameter(torch.tensor(math.log(100 / k)))
        else:
            table_rms = (frequency @ reader.table.square()).mean().sqrt()
            self.weight = nn.Parameter(pca.components.T * code_scale / table_rms)  # [k,d]
            self.bias = nn.Parameter(pca.mean / table_rms)  # [d]
        if kind == "mlp":
            self.hidden1, self.hidden2 = nn.Linear(k, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
            self.weight2 = nn.Parameter(torch.zeros(HIDDEN, d))

    def forward(self, codes: Tensor, target_rms: Tensor, ids: Tensor | None = None) -> Tensor:
        """codes: [N,k], or with ids [N] a table [V,k]; target_rms: scalar or [N,1]. Returns embeddings [N,d]."""
        if self.kind == "linear":
            return adapt(codes, self.weight, self.bias, target_rms, ids, self.code_scale)
        z = (codes if ids is None else codes[ids]) / self.code_scale
        if self.kind == "codebook":
            blended = self.blended(z)
            keys, table = self.keys[blended], self.table[blended]  # [n,k], [n,d]
            blend = torch.softmax(self.scores(z, keys), dim=-1).to(table.dtype)
            return adapt(blend, table, table.new_zeros(table.shape[1]), target_rms).float()
        hidden = F.gelu(self.hidden1(z))
        hidden = hidden + F.gelu(self.hidden2(hidden))
        z = torch.cat([z, hidden], dim=1)  # [N, k+HIDDEN]
        return adapt(z, torch.cat([self.weight, self.weight2]), self.bias, target_rms)

    def scores(self, z: Tensor, keys: Tensor) -> Tensor:
        """[N,n]: -|z - key|^2 * sharpness / 2, less its part with |z|^2, which is the same for all keys of a code.

        One operation: the backward pass then keeps the softmax of this large matrix, and no other of its size.
        """
        sharpness = self.log_sharpness.exp()
        return torch.addmm(-0.5 * sharpness * keys.square().sum(1), sharpness * z, keys.T)

    @torch.no_grad()
    def blended(self, z: Tensor) -> Tensor | slice:
        """The tokens [n] that any of the codes z [N,k] blends with a weight above 1e-10; all of a small vocabulary.

        Wide codes lie far apart: 200 tokens of tiny, at k 24, blend 471. The others of a vocabulary of 128,000 together
        weigh less than 2e-5, and would be most of the work: a [N,V] by [V,d] product forward, and one backward.
        """
        if len(self.keys) <= SMALL:
            return slice(None)
        keys, dtype = self.keys, self.table.dtype
        tokens = torch.arange(len(keys), device=keys.device)
        if dtype != torch.float32:  # a first look in the LLM's dtype costs a GPU a tenth; scores are a few units off
            tokens = tokens[self.weigh(z.to(dtype), keys.to(dtype), 1e-20)]
            keys = keys[tokens]
        return tokens[self.weigh(z, keys, 1e-10)]

    def weigh(self, z: Tensor, keys: Tensor, least: float) -> Tensor:
        """[n]: has a key a weight above `least` in any of the codes?"""
        weight = torch.zeros(len(keys), device=z.device)
        for part in z.split(1024):
            weight = torch.maximum(weight, torch.softmax(self.scores(part, keys).float(), dim=-1).amax(0))
        # NaN compares false with everything: a NaN code selects every token, and its output is NaN, as it should be
        return ~(weight <= least)


# ---------------------------------------------------------------------------------------------------------------------
# the wire: token ids -> message -> embeddings. Everything the receiver uses is in the message or in the trained wire.


class Wire:
    """Sender and receiver around an adapter.

    Message: uint32 count L, then L x k codes in float16. All embeddings get one RMS, a constant of the wire: sending
    each token's own gained at most 0.3 points. The identity control is `exact`: it sends float32, and behind the codes
    the RMS of each token, so that nothing but the plumbing is under test.
    """

    def __init__(self, reader: Reader, pca: PCA, constant_rms: Tensor, exact: bool = False):
        self.reader, self.exact, self.number = reader, exact, "<f4" if exact else "<f2"
        self.width = pca.components.shape[1]
        sent_dtype = torch.float32 if exact else torch.float16
        # embeddings are rows of a frozen table, so the projection runs once over V rows, and then is a gather
        codes = project(reader.table, pca.mean, pca.components)
        self.codes = codes.to(sent_dtype).float()  # [V,k] as the receiver will see them
        token_rms = reader.table.square().mean(1, keepdim=True).sqrt()  # [V,1]
        self.constant_rms = constant_rms  # scalar
        self.rms = token_rms.to(sent_dtype).float()
        if not all(torch.isfinite(part).all() for part in (self.codes, self.rms)):
            raise UserError(f"the embeddings of {reader.name} do not fit into float16 codes")
        self.adapter: Adapter | None = None

    def with_adapter(self, adapter: Adapter) -> "Wire":
        """The same wire around another adapter."""
        other = copy.copy(self)
        other.adapter = adapter
        return other

    def target_rms(self, ids: Tensor) -> Tensor:
        return self.rms[ids] if self.exact else self.constant_rms  # [N,1] or scalar

    def send(self, prompt: Prompt) -> bytes:
        """Token ids of a prompt -> message."""
        parts = [self.codes[prompt.ids]] + ([self.rms[prompt.ids]] if self.exact else [])
        payload = b"".join(part.cpu().numpy().astype(self.number).tobytes() for part in parts)
        return struct.pack("<I", len(prompt.ids)) + payload

    @torch.no_grad()
    def receive(self, message: bytes) -> Tensor:
        """Message -> embeddings [L,d]."""
        (count,) = struct.unpack_from("<I", message)
        numbers = np.frombuffer(message, self.number, offset=4).astype(np.float32)
        numbers = torch.from_numpy(numbers).to(self.reader.device)
        codes, sent_rms = numbers[: count * self.width].view(count, self.width), numbers[count * self.width :]
        return self.adapter(codes, sent_rms[:, None] if self.exact else self.constant_rms)


# ---------------------------------------------------------------------------------------------------------------------
# the loss: the embeddings that the code decodes to, and the answer that the LLM gives from them


def llm_losses(wire: Wire, batch: Batch, targets: int, sent_tokens: int, variance: Tensor) -> tuple[Tensor, Tensor]:
    """(cross-entropy, MSE / variance) of a micro-batch: its part of the means of a step through the LLM.

    targets, sent_tokens: labels and tokens of the whole step; variance: of an embedding number.
    """
    reader = wire.reader
    embeddings = reader.table[batch.ids]  # [B,T,d] the prompt through the wire, the answer as it is
    # a token decodes to the same embedding wherever it stands: decode each of the U different ones once
    unique, inverse = batch.ids[batch.sent].unique(return_inverse=True)  # [U], [sent tokens]
    decoded = wire.adapter(wire.codes, wire.target_rms(unique), unique)  # [U,d]
    real = reader.table[unique]
    occurrences = torch.bincount(inverse, minlength=len(unique))[:, None]  # [U,1]
    mse = ((decoded - real).square() * occurrences).sum() / (sent_tokens * real.shape[1] * variance)
    wired = embeddings.masked_scatter(batch.sent[..., None], decoded[inverse])
    logits = answer_logits(reader, batch, wired)  # [targets of this part, V]
    ce = F.cross_entropy(logits, batch.targets, reduction="sum") / targets
    return ce, mse


def token_loss(wire: Wire, ids: Tensor, tokens: int, variance: Tensor) -> Tensor:
    """MSE / variance (scalar) of tokens ids [N]: their part of the mean over the `tokens` of the whole step."""
    decoded = wire.adapter(wire.codes, wire.target_rms(ids), ids)  # [N,d]
    return (decoded - wire.reader.table[ids]).square().sum() / (tokens * decoded.shape[1] * variance)


# ---------------------------------------------------------------------------------------------------------------------
# the controls: what the PCA gives without training, and a wire that must read like text


def measure_controls(
    wire: Wire, pca: PCA, full_pca: PCA, counts: Tensor, data: Data, batch_size: int
) -> tuple[dict[str, float], list[str]]:
    """({"pca_inverse", "identity"}: F1 or NLL through each, answers through the identity wire).

    The identity wire has all d components, float32 codes and each token's RMS: only the plumbing is under test.
    """
    print("  controls: PCA inverse, identity wire", flush=True)
    reader, controls = wire.reader, {}
    inverse = Adapter("linear", pca, reader, wire.codes, counts).to(reader.device)
    controls["pca_inverse"], _ = score_wire(wire.with_adapter(inverse), data, batch_size)
    identity_wire = Wire(reader, full_pca, wire.constant_rms, exact=True)
    identity_wire.adapter = Adapter("linear", full_pca, reader, identity_wire.codes, counts).to(reader.device)
    controls["identity"], answers = score_wire(identity_wire, data, batch_size)
    return controls, answers


def main() -> None:
    # -----------------------------------------------------------------------------------------------------------------
    # setup: arguments, frozen LLM, data
    args = parse_arguments()
    saved = None
    if args.eval_only:
        saved = load_wire(args.eval_only, STAGE, WIRE)
    merge_with_saved(args, {key: CONFIG[key] for key in FIXED_BY_WIRE}, saved)
    if args.dry_run or args.random_weights is not None:
        from plumbing import scale  # it stands on common.py, and is needed here only

        return scale.report(args, sys.modules[__name__])
    device, dtype = set_up(args)
    reader = load_reader(args.model, device, dtype, args.gradient_checkpointing, args.device == "split")
    if saved:
        check_fingerprint(reader, saved.config, saved.name)
    d = reader.table.shape[1]
    k = args.code_dim if args.code_dim is not None else max(1, d // 8)
    if k > d:
        raise UserError(f"--code-dim {k} is above the embedding width of {args.model}, {d}")
    data = load_data(args.data, reader, args.eval_examples)
    check_prompts(reader, data)

    # -----------------------------------------------------------------------------------------------------------------
    # model: PCA (exact, from token counts) and the adapter. The LLM is frozen.
    counts = token_counts(reader, data, args.seed)  # [V]
    full_pca = fit_pca(reader.table, counts)
    pca = full_pca.first(k)
    frequency = counts / counts.sum()
    rms = (frequency @ reader.table.square().mean(1)).sqrt()
    variance = (frequency @ (reader.table - frequency @ reader.table).square()).mean()  # of an embedding number
    if saved:
        pca.mean, pca.components, rms = (saved.tensors[n].to(device) for n in ("mean", "components", "target_rms"))
    wire = Wire(reader, pca, rms)
    adapter = wire.adapter = Adapter(args.adapter, pca, reader, wire.codes, counts).to(device)
    if saved:
        load_module(adapter, "adapter.", saved.tensors, saved.name)
    explained = saved.config["controls"]["explained_variance"] if saved else pca.explained
    out = open_out(args)
    print(f"codes: k {k} of d {d} ({d / k:.3g}x fewer)")
    for parameter in adapter.parameters():
        parameter.requires_grad_(parameter.ndim == 2)  # Muon takes matrices alone: biases stay as they start
    matrices = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    print(f"adapter {args.adapter}: {sum(p.numel() for p in matrices):,} trained parameters", flush=True)

    # -----------------------------------------------------------------------------------------------------------------
    # training
    # Muon leaves half the error of Adam
    optimizer = torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    modules = {"adapter": adapter}
    fits = must_match(args, reader.fingerprint)  # a checkpoint must fit this run
    run = Run(args, out, modules, optimizer, fits, show=lambda: show_samples(wire, data))
    generator = torch.Generator(device)
    for step in run.steps():  # resumes where it stopped; after the body: log, checkpoint, stop if told to
        # warm-up over 5% of the steps, then linearly to zero
        warmth = min(1.0, (step + 1) / (0.05 * args.steps), (args.steps - step) / (0.95 * args.steps))
        optimizer.param_groups[0]["lr"] = args.lr * warmth
        # losses are means over the whole step, of which each process (of torchrun, if there are several) has a part
        if step < args.steps - args.llm_steps:
            generator.manual_seed(args.seed * args.steps + step)
            ids = torch.multinomial(frequency, TOKENS, replacement=True, generator=generator)
            mse = token_loss(wire, ids.tensor_split(world_size())[rank()], TOKENS, variance)
            mse.backward()
            run.add(mse=mse)
        else:
            rows = data.train_rows(args.seed, step * args.batch_size, args.batch_size)
            batches = [make_batch(reader, part) for part in micro_batches(rows, args.micro_batch_size)]
            targets = sum(len(batch.targets) for batch in batches)
            sent_tokens = sum(int(batch.sent.sum()) for batch in batches)
            for batch in my_share(batches):
                ce, mse = llm_losses(wire, batch, targets, sent_tokens, variance)
                (ce + mse).backward()
                run.add(ce=ce, mse=mse)
        run.reduce()  # gradients and losses, summed over the processes
        norm = torch.nn.utils.clip_grad_norm_(matrices, 1.0)
        if run.accepts(norm):  # neither NaN nor a spike
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    # -----------------------------------------------------------------------------------------------------------------
    # evaluation: the wire and every control, on test passages whose names were never seen
    batch_size = 2 * args.micro_batch_size  # no gradients: twice the rows fit
    metrics, records = evaluate(wire, data, batch_size)
    controls, answers = measure_controls(wire, pca, full_pca, counts, data, batch_size)
    controls["explained_variance"] = explained
    unit, note = "NLL", "must equal the NLL from text"
    if answers:
        same = sum(answer == record["text"] for answer, record in zip(answers, records, strict=True))
        unit, note = "F1", f"{same} of {len(records)} answers are those from text"
        controls["identity_same_answers"] = same
    variance_kept = f"untrained; k {k}, {100 * explained:.1f}% of the variance"
    rows = [
        (f"PCA inverse: {unit}", f"{controls['pca_inverse']:.3f}", variance_kept),
        (f"identity wire: {unit}", f"{controls['identity']:.3f}", f"k = d, RMS sent: {note}"),
    ]
    config = {"embedding_width": d, "code_dim": k, "adapter": args.adapter}
    tensors = {"mean": pca.mean, "components": pca.components, "target_rms": wire.constant_rms}
    tensors |= module_tensors(modules)
    title = f"stage 1: {args.adapter}, {d} -> {k} numbers a token"
    bars = {"PCA inverse": controls["pca_inverse"], "identity": controls["identity"]}
    finish(run, reader, saved, title, metrics, controls, config, rows, records, tensors, bars=bars)


if __name__ == "__main__":
    launch(main)
