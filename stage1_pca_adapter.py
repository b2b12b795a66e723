"""Stage 1: a frozen LLM answers questions about text that it received as 8x smaller PCA codes. One thing is learned.

    tokens -> frozen embeddings [L,d] -> PCA codes [L,k] -> adapter -> RMS match -> frozen LLM -> answer
              known                      fixed             trained    known        frozen

Why this works where stage 0 fails: the input of the trained part is known (codes that keep most of the variance), its
target is known (the LLM's own embeddings), it starts at a sensible answer (the PCA inverse, or a look-up of the nearest
code), and the vectors that the LLM reads keep the statistics of real embeddings. The loss holds both targets:

    loss = |decoded - embedding|^2 / variance + cross-entropy of every answer token, EOS included

The default adapter, the codebook, starts so well that training adds little: every run also measures it untrained.

This compresses *dimensions* (192 -> 24), not bytes: 24 float16 numbers a token are more than the text. The table at the
end says so. Bytes are stage 3's subject.

    python stage1_pca_adapter.py                                      # the embedded reader; README has time and score
    python stage1_pca_adapter.py --model tiny-qwen --code-dim 10 --adapter linear
    python stage1_pca_adapter.py --eval-only tiny/wires/stage1        # the shipped wire
    python stage1_pca_adapter.py --model llama-7b --data squad --code-dim 512 --micro-batch-size 4       # one GPU

Letters: B batch, T padded length, L tokens of a prompt, U different tokens of a batch, V vocabulary, d LLM embedding
width, k code width.
"""

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
from plumbing.arguments import Parser, add_arguments, finish_arguments, merge_with_saved, positive_int
from plumbing.checkpoints import module_tensors
from plumbing.data import Data, load_data
from plumbing.launch import UserError, launch, set_up
from plumbing.models import check_fingerprint
from plumbing.processes import my_share
from plumbing.report import finish
from plumbing.training import Run, identity, micro_batches
from plumbing.wires import load_module, load_wire, open_out

# ---------------------------------------------------------------------------------------------------------------------
# configuration: lower case are flags (--help), upper case are fixed

STAGE = "stage1"
CONFIG = dict(
    model="tiny",  # an alias, hub id or directory; tiny is embedded and needs no download
    data="tiny",  # questions about invented passages; or squad, or a file
    steps=200,  # a minute and a half on two cores
    batch_size=16,  # questions a step
    lr=3e-3,  # peak; inputs and outputs are in units of their spread, so one rate fits all models
    code_dim=None,  # k, numbers a token; None: an eighth of the embedding width
    adapter="codebook",  # it alone reads like text; see class Adapter for linear and mlp
    rms="constant",  # costs no bytes; sending each token's RMS gains at most 0.3 points
    kd_weight=0.0,  # of KL(LLM reading text || LLM reading the wire); it changes a score by at most 0.3 points
)
FIXED_BY_WIRE = ("model", "data", "code_dim", "adapter", "rms", "kd_weight")  # --eval-only reads these from the wire
BETAS, WEIGHT_DECAY = (0.9, 0.98), 0.0  # few steps: a shorter memory; the PCA inverse must not be pulled towards zero
HIDDEN = 512  # numbers of the mlp's hidden layer
SMALL = 8192  # tokens: a codebook blends all of a vocabulary up to this size


def parse_arguments():
    parser = Parser(description=__doc__.split("\n")[0])
    add_arguments(parser, STAGE, CONFIG)
    add = parser.add_argument
    add("--code-dim", type=positive_int, help="k; default: an eighth of the embedding width")
    add("--adapter", choices=("linear", "mlp", "codebook"), help=f"default: {CONFIG['adapter']}")
    add("--rms", choices=("constant", "sent"), help="RMS to match: a constant of the wire (default), or each token's "
        "own, sent as a float16 and counted in the bytes")  # fmt: skip
    add("--kd-weight", type=float, help="weight of KL(LLM reading text || LLM reading the wire); default: 0")
    add("--dry-run", action="store_true", help="say what this model needs, from its shape alone")
    add("--random-weights", metavar="LAYERS", nargs="?", const=0, type=positive_int,
        help="time steps of a random model of this shape (of so many layers)")  # fmt: skip
    args = finish_arguments(parser)
    if args.dry_run or args.random_weights is not None:
        if args.eval_only or args.resume or args.data not in (None, "tiny"):
            parser.error("--dry-run and --random-weights have no data: drop --data, --resume and --eval-only")
        if args.random_weights is not None and args.device == "split":
            parser.error("--random-weights measures one device: drop --device split")
    if args.kd_weight is not None and not (math.isfinite(args.kd_weight) and args.kd_weight >= 0):
        parser.error(f"argument --kd-weight: must be a number of at least 0, not {args.kd_weight}")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# the adapter: codes [N,k] -> embeddings [N,d]


class Adapter(nn.Module):
    """The part that is trained. All three kinds start from the PCA and end in the same operator, kernels/adapter.py.

    linear    y = z A + b, started at the PCA inverse
    mlp       + a hidden layer whose output starts at zero
    codebook  y = softmax(-|z - keys|^2 * sharpness / 2) @ table: keys [V,k] start at every token's code, the values are
              the LLM's frozen embedding table. Its output is always a mixture of real embeddings. In stage 1 it does
              little more than look the token up again; it matters when codes are crowded (small k, flat spectrum) or
              noisy (stage 2).

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
            # with unit variance a dimension, two tokens are 2k apart on average; 20 / k was too soft to read at first
            self.log_sharpness = nn.Parameter(torch.tensor(math.log(100 / k)))
        else:
            table_rms = (frequency @ reader.table.square()).mean().sqrt()
            self.weight = nn.Parameter(pca.components.T * code_scale / table_rms)  # [k,d]
            self.bias = nn.Parameter(pca.mean / table_rms)  # [d]
        if kind == "mlp":
            self.hidden = nn.Linear(k, HIDDEN)
            self.weight2 = nn.Parameter(torch.zeros(HIDDEN, d))

    def forward(self, codes: Tensor, target_rms: Tensor) -> Tensor:
        """codes: [N,k]; target_rms: scalar or [N,1]. Returns embeddings [N,d]."""
        z = codes / self.code_scale
        if self.kind == "codebook":
            blended = self.blended(z)
            keys, table = self.keys[blended], self.table[blended]  # [n,k], [n,d]
            blend = torch.softmax(self.scores(z, keys), dim=-1).to(table.dtype)
            return adapt(blend, table, table.new_zeros(table.shape[1]), target_rms).float()
        if self.kind == "mlp":
            z = torch.cat([z, F.gelu(self.hidden(z))], dim=1)  # [N, k+HIDDEN]
            return adapt(z, torch.cat([self.weight, self.weight2]), self.bias, target_rms)
        return adapt(z, self.weight, self.bias, target_rms)

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
        weight = torch.zeros_like(self.keys[:, 0])
        for part in z.split(1024):
            weight = torch.maximum(weight, torch.softmax(self.scores(part, self.keys), dim=-1).amax(0))
        # NaN compares false with everything: a NaN code selects every token, and its output is NaN, as it should be
        return (~(weight <= 1e-10)).nonzero()[:, 0]


# ---------------------------------------------------------------------------------------------------------------------
# the wire: token ids -> message -> embeddings. Everything the receiver uses is in the message or in the trained wire.


class Wire:
    """Sender and receiver around an adapter.

    Message: uint32 count L, then L x k codes in `code_format`, then, if the RMS is sent, L numbers in that format:
    "<f2" (float16), or "<f4" in the identity control, so that nothing but the plumbing is under test.
    """

    def __init__(self, reader: Reader, pca: PCA, rms: str, constant_rms: Tensor, code_format: str = "<f2"):
        self.reader, self.code_format, self.rms_is_sent = reader, code_format, rms == "sent"
        self.width = pca.components.shape[1]
        sent_dtype = torch.float16 if code_format == "<f2" else torch.float32
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
        return self.rms[ids] if self.rms_is_sent else self.constant_rms  # [N,1] or scalar

    def send(self, prompt: Prompt) -> bytes:
        """Token ids of a prompt -> message."""
        parts = [self.codes[prompt.ids]] + ([self.rms[prompt.ids]] if self.rms_is_sent else [])
        payload = b"".join(part.cpu().numpy().astype(self.code_format).tobytes() for part in parts)
        return struct.pack("<I", len(prompt.ids)) + payload

    @torch.no_grad()
    def receive(self, message: bytes) -> Tensor:
        """Message -> embeddings [L,d]."""
        (count,) = struct.unpack_from("<I", message)
        numbers = np.frombuffer(message, self.code_format, offset=4).astype(np.float32)
        numbers = torch.from_numpy(numbers).to(self.reader.device)
        codes, sent_rms = numbers[: count * self.width].view(count, self.width), numbers[count * self.width :]
        return self.adapter(codes, sent_rms[:, None] if self.rms_is_sent else self.constant_rms)


# ---------------------------------------------------------------------------------------------------------------------
# the loss: the embeddings that the code decodes to, and the answer that the LLM gives from them


def step_losses(
    wire: Wire, batch: Batch, targets: int, sent_tokens: int, variance: Tensor, with_kd: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(cross-entropy, MSE / variance, KL from the LLM reading text) of a micro-batch: its part of the step's means.

    targets, sent_tokens: labels and tokens of the whole step; variance: of an embedding number.
    """
    reader = wire.reader
    embeddings = reader.table[batch.ids]  # [B,T,d] the prompt through the wire, the answer as it is
    # a token decodes to the same embedding wherever it stands: decode each of the U different ones once
    unique, inverse = batch.ids[batch.sent].unique(return_inverse=True)  # [U], [sent tokens]
    decoded = wire.adapter(wire.codes[unique], wire.target_rms(unique))  # [U,d]
    real = reader.table[unique]
    occurrences = torch.bincount(inverse, minlength=len(unique))[:, None]  # [U,1]
    mse = ((decoded - real).square() * occurrences).sum() / (sent_tokens * real.shape[1] * variance)
    wired = embeddings.masked_scatter(batch.sent[..., None], decoded[inverse])
    logits = answer_logits(reader, batch, wired)  # [targets of this part, V]
    ce = F.cross_entropy(logits, batch.targets, reduction="sum") / targets
    kd = torch.zeros_like(ce)
    if with_kd:
        with torch.no_grad():
            teacher = answer_logits(reader, batch, embeddings).log_softmax(-1)
        kd = F.kl_div(logits.log_softmax(-1), teacher, log_target=True, reduction="sum") / targets
    return ce, mse, kd


# ---------------------------------------------------------------------------------------------------------------------
# the controls: what the PCA gives without training, and a wire that must read like text


def measure_controls(
    wire: Wire, untrained: Adapter, pca: PCA, full_pca: PCA, counts: Tensor, data: Data, batch_size: int
) -> tuple[dict[str, float], list[str]]:
    """({"pca_inverse", "untrained", "identity"}: F1 or NLL through each, answers through the identity wire).

    The identity wire has all d components, float32 codes and each token's RMS: only the plumbing is under test.
    """
    print("  controls: PCA inverse, untrained adapter, identity wire", flush=True)
    reader, controls = wire.reader, {}
    inverse = Adapter("linear", pca, reader, wire.codes, counts).to(reader.device)
    controls["pca_inverse"], _ = score_wire(wire.with_adapter(inverse), data, batch_size)
    controls["untrained"] = controls["pca_inverse"]  # linear and mlp start there
    if untrained.kind == "codebook":
        controls["untrained"], _ = score_wire(wire.with_adapter(untrained), data, batch_size)
    identity_wire = Wire(reader, full_pca, "sent", wire.constant_rms, code_format="<f4")
    identity_wire.adapter = Adapter("linear", full_pca, reader, identity_wire.codes, counts).to(reader.device)
    controls["identity"], answers = score_wire(identity_wire, data, batch_size)
    return controls, answers


def main() -> None:
    # -----------------------------------------------------------------------------------------------------------------
    # setup: arguments, frozen LLM, data
    args = parse_arguments()
    saved = None
    if args.eval_only:
        config_keys = (*FIXED_BY_WIRE, "embedding_width", "controls.explained_variance", "metrics.train_seconds")
        saved = load_wire(args.eval_only, STAGE, config_keys, ("mean", "components", "target_rms"))
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
        if pca.components.shape != (d, k):
            raise UserError(f"{saved.name}: its components are {list(pca.components.shape)}, not [{d}, {k}]")
    explained = saved.config["controls"]["explained_variance"] if saved else pca.explained
    wire = Wire(reader, pca, args.rms, rms)
    adapter = wire.adapter = Adapter(args.adapter, pca, reader, wire.codes, counts).to(device)
    untrained = Adapter(args.adapter, pca, reader, wire.codes, counts).to(device)  # what does training add?
    if saved:
        load_module(adapter, "adapter.", saved.tensors, saved.name)
    out = open_out(args.out)
    print(f"codes: k {k} of d {d} ({d / k:.3g}x fewer), {100 * explained:.1f}% of the variance")
    print(f"adapter {args.adapter}: {sum(p.numel() for p in adapter.parameters()):,} trained parameters", flush=True)

    # -----------------------------------------------------------------------------------------------------------------
    # training
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=args.lr, betas=BETAS, weight_decay=WEIGHT_DECAY)
    modules, fits = {"adapter": adapter}, identity(args, reader.fingerprint)  # a checkpoint must fit this run
    run = Run(args, out, modules, optimizer, fits, show=lambda: show_samples(wire, data))
    for step in run.steps():  # resumes where it stopped; after the body: log, checkpoint, stop if told to
        # warm-up over 5% of the steps, then linearly to zero
        warmth = min(1.0, (step + 1) / (0.05 * args.steps), (args.steps - step) / (0.95 * args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warmth
        rows = data.train_rows(args.seed, step * args.batch_size, args.batch_size)
        batches = [make_batch(reader, part) for part in micro_batches(rows, args.micro_batch_size)]
        # losses are means over the whole step, so that the micro-batch size changes nothing
        targets = sum(len(batch.targets) for batch in batches)
        sent_tokens = sum(int(batch.sent.sum()) for batch in batches)
        for batch in my_share(batches):  # all of them, unless torchrun started several processes
            ce, mse, kd = step_losses(wire, batch, targets, sent_tokens, variance, args.kd_weight > 0)
            (ce + mse + args.kd_weight * kd).backward()
            run.add(ce=ce, mse=mse, kd=kd)
        run.reduce()  # gradients and losses, summed over the processes
        norm = torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        if run.accepts(norm):  # neither NaN nor a spike
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    # -----------------------------------------------------------------------------------------------------------------
    # evaluation: the wire and every control, on test passages whose names were never seen
    batch_size = 2 * args.micro_batch_size  # no gradients: twice the rows fit
    metrics, records = evaluate(wire, data, batch_size)
    controls, answers = measure_controls(wire, untrained, pca, full_pca, counts, data, batch_size)
    controls["explained_variance"] = explained
    unit, note = "NLL", "must equal the NLL from text"
    if answers:
        same = sum(answer == record["text"] for answer, record in zip(answers, records, strict=True))
        unit, note = "F1", f"{same} of {len(records)} answers are those from text"
        controls["identity_same_answers"] = same
    variance_kept = f"untrained; k {k}, {100 * explained:.1f}% of the variance"
    rows = [
        (f"PCA inverse: {unit}", f"{controls['pca_inverse']:.3f}", variance_kept),
        (f"{args.adapter} before training: {unit}", f"{controls['untrained']:.3f}", ""),
        (f"identity wire: {unit}", f"{controls['identity']:.3f}", f"k = d, RMS sent: {note}"),
    ]
    config = {"embedding_width": d, "code_dim": k}
    config |= {"adapter": args.adapter, "rms": args.rms, "kd_weight": args.kd_weight}
    tensors = {"mean": pca.mean, "components": pca.components, "target_rms": wire.constant_rms}
    tensors |= module_tensors(modules)
    title = f"stage 1: {args.adapter}, {d} -> {k} numbers a token"
    bars = {"before training": controls["untrained"], "PCA inverse": controls["pca_inverse"]}
    bars["identity"] = controls["identity"]
    finish(run, reader, saved, title, metrics, controls, config, rows, records, tensors, bars=bars)


if __name__ == "__main__":
    launch(main)
