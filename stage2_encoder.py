"""Stage 2: from raw UTF-8 bytes. One thing is added to stage 1, a byte encoder, and its target is known token by token.

    bytes [N] -> encoder -> where tokens end, and a code [k] for each -> stage-1 adapter -> RMS match -> frozen LLM
    known        trained    known: the tokenizer's offsets, stage 1's PCA codes   proven         known        frozen

Why this works where stage 0 fails: stage 1 has shown that the LLM reads these codes through this adapter. So the
encoder needs no gradient through an LLM to learn what to say: it is told where each token ends and which code it has.

    loss = 10 * cross-entropy(token ends here?) + |code - PCA code|^2 / variance
           + cross-entropy(which token the adapter will read, if it is a codebook)

The LLM takes no part in the training. `--without code-target` trains the codes through it, from the answers, instead.

At inference the sender needs no tokenizer: it predicts where tokens end and sends stage 1's format. A tokenizer's
merges are local, so a stack of convolutions over hashed n-grams finds the ends, and cost grows linearly with the text.
A code depends on the bytes of its token alone. Tried, and worse: convolutions without n-grams, codes from the
convolutions, depthwise convolutions of width 9 with an MLP, and codes from mean squared error alone.

    python stage2_encoder.py                                         # the embedded reader; README has time and score
    python stage2_encoder.py --eval-only tiny/wires/stage2           # the shipped wire; stage2-qwen for tiny-qwen
    python stage2_encoder.py --model llama-7b --data squad --stage1 out/stage1 --micro-batch-size 4       # one GPU

Letters: B batch, N padded length in bytes, C encoder width, L tokens of a prompt, U different tokens of a batch, V
vocabulary, d LLM embedding width, k code width.
"""

import plumbing.early  # noqa: F401

# isort: split
import random
import struct

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
    load_reader,
    make_batch,
    score_wire,
    sent_prompt,
    show_samples,
    splice,
    to_bytes,
)
from kernels.adapter import project
from plumbing.arguments import Parser, add_arguments, finish_arguments, merge_with_saved
from plumbing.checkpoints import module_tensors
from plumbing.data import halve_windows, load_data
from plumbing.kinds import COUNT, TEXT, one_of
from plumbing.launch import UserError, launch, set_up
from plumbing.models import check_fingerprint
from plumbing.processes import my_share
from plumbing.report import finish
from plumbing.spelling import odd_text, prefix_ids, spells, token_ends, words_of
from plumbing.training import Run, micro_batches, must_match
from plumbing.wires import MODULE, Contents, SavedWire, check_shapes, load_module, load_wire, open_out
from stage1_pca_adapter import ADAPTERS, Adapter
from stage1_pca_adapter import WIRE as STAGE1_WIRE

# ---------------------------------------------------------------------------------------------------------------------
# configuration: lower case are flags (--help), upper case are fixed

STAGE = "stage2"
CONFIG = dict(
    model="tiny",  # an alias, hub id or directory; tiny is embedded and needs no download
    data="tiny",  # questions about invented passages; or squad, or a file
    steps=3000,  # twelve minutes on one core
    batch_size=8,  # prompts a step
    lr=3e-3,  # peak
    stage1=None,  # the trained stage-1 wire to start from; None: the shipped one of the model
    without=None,  # an ablation: the known target that is left out
)
FIXED_BY_WIRE = ("model", "data", "stage1", "without")  # --eval-only reads these from the wire
BETAS = (0.9, 0.98)
WIDTH, KERNEL, LAYERS = 128, 5, 3  # of the encoder's convolutions
GRAMS, GRAM, BUCKETS = (2, 3, 4, 5, 6), 16, 1 << 13  # lengths in bytes of what is looked up; numbers of each; rows
PRIME = (1 << 31) - 1  # of the hash
TABLE_RATE = 60  # times the learning rate: a row of the tables takes part in few steps
LETTER, LONGEST = 32, 16  # numbers for a byte of a token; bytes of a token that its code depends on
REACH = LAYERS * (KERNEL // 2) + max(GRAMS) - 1  # bytes that a byte sees before it; fewer behind it
ODD = 3  # odd texts (`odd_text`) beside each prompt: they hold the rare tokens of which unknown names are made
WEIGHTS = {"end": 10, "mse": 1, "token": 1, "ce": 1}  # of the losses; a wrong end costs a token on each side of it
ABLATIONS = ("code-target",)  # the codes learn from the answers alone, through the LLM
WIRE = Contents(  # what is saved; anything else is refused
    config={
        "embedding_width": COUNT, "code_dim": COUNT, "adapter": one_of(*ADAPTERS), "stage1": TEXT,
        "without": one_of(None, *ABLATIONS),
    },
    tensors=STAGE1_WIRE.tensors | {"prefix_codes": "n k float32", "encoder.*": MODULE},  # n tokens start every prompt
)  # fmt: skip
CODEBOOKS = "tiny/wires/stage1-codebook", "tiny/wires/stage1-codebook-qwen"
SHIPPED = {"tiny": CODEBOOKS[0], "tiny-llama": CODEBOOKS[0], "tiny-qwen": CODEBOOKS[1]}


def parse_arguments():
    parser = Parser(description=__doc__.split("\n")[0])
    add_arguments(parser, STAGE, CONFIG)
    add = parser.add_argument
    add("--stage1", metavar="WIRE_DIR", help="the trained stage-1 wire to start from; default: the shipped one")
    add("--without", choices=ABLATIONS, help="an ablation: leave this known target out")
    return finish_arguments(parser)


# ---------------------------------------------------------------------------------------------------------------------
# the encoder: bytes [B,N] -> token ends [B,N]; the bytes of each token -> its code [k]


class Encoder(nn.Module):
    """Residual convolutions find where tokens end; a network reads the code of a token from its own bytes alone.

    Byte 256 is padding: how much of it stands behind a text changes neither its ends nor its codes. Beside its own
    embedding, a byte has those of the 2, 3, ... bytes that end with it, looked up by a hash (Pagnoni et al. 2024, Byte
    Latent Transformer). Where a token ends depends on which strings the tokenizer knows, and a table remembers them
    better than convolutions do: five of these without tables, instead of three with them, leave four times as many
    wrong ends in more time.
    """

    def __init__(self, k: int):
        super().__init__()
        C = WIDTH
        self.embedding = nn.Embedding(257, C)
        self.grams = nn.ModuleList(nn.Embedding(BUCKETS, GRAM) for _ in GRAMS)
        for table in self.grams:
            nn.init.normal_(table.weight, std=0.02)
        self.mix = nn.Linear(len(GRAMS) * GRAM, C)
        self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(LAYERS))
        self.convolutions = nn.ModuleList(nn.Conv1d(C, C, KERNEL, padding="same") for _ in range(LAYERS))
        self.mixers = nn.ModuleList(nn.Linear(C, C) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(C)
        self.end = nn.Linear(C, 1)
        self.spelling = nn.Embedding(257, LETTER)
        self.code = nn.Sequential(
            nn.Linear(LONGEST * LETTER, 4 * C), nn.GELU(), nn.Linear(4 * C, 4 * C), nn.GELU(), nn.Linear(4 * C, k)
        )

    def forward(self, data: Tensor) -> Tensor:
        """Bytes [B,N] -> logits [B,N] that a token ends with this byte."""
        real = (data < 256)[..., None]
        grams = [table(buckets(data, n)) for n, table in zip(GRAMS, self.grams, strict=True)]  # [B,N,GRAM] each
        x = self.embedding(data) + self.mix(torch.cat(grams, dim=-1))  # [B,N,C]
        for norm, convolution, mixer in zip(self.norms, self.convolutions, self.mixers, strict=True):
            y = convolution((norm(x) * real).transpose(1, 2)).transpose(1, 2)
            x = x + mixer(F.gelu(y))
        return self.end(self.norm(x))[..., 0]

    def codes(self, data: Tensor, is_end: Tensor) -> Tensor:
        """Codes [n,k] of the n tokens that end where is_end [B,N] says, row by row, from their last LONGEST bytes."""
        token = is_end.cumsum(1) - is_end.long()  # [B,N] the number of the token that a byte belongs to
        row, end = is_end.nonzero(as_tuple=True)
        at = end[:, None] + torch.arange(1 - LONGEST, 1, device=data.device)  # [n,LONGEST]
        row, inside = row[:, None], at >= 0
        inside &= token[row, at.clamp_min(0)] == token[row, end[:, None]]
        letters = torch.where(inside, data[row, at.clamp_min(0)], 256)
        letters, which = letters.unique(dim=0, return_inverse=True)  # most tokens occur more than once
        return self.code(self.spelling(letters).flatten(1))[which]


def buckets(data: Tensor, n: int) -> Tensor:
    """Bytes [B,N] -> a number [B,N] below BUCKETS for the n bytes that end with each one: a polynomial hash."""
    value = torch.zeros_like(data)
    for back in range(n):
        value = (value * 1_000_003 + F.pad(data, (back, 0), value=256)[:, : data.shape[1]]) % PRIME
    return value * 48_271 % PRIME % BUCKETS


# ---------------------------------------------------------------------------------------------------------------------
# the wire: text -> message -> embeddings. The sender has the encoder; the receiver has adapter and LLM.


class Wire:
    """Message: uint32 count L, then L x k codes in float16, as in stage 1 with a constant RMS.

    It starts with constant codes: those of the tokens that stand before any text (a start token, or none).
    """

    def __init__(self, reader: Reader, encoder: Encoder, adapter: Adapter, prefix_codes: Tensor, rms: Tensor):
        self.reader, self.encoder, self.adapter = reader, encoder, adapter
        self.prefix_codes, self.constant_rms = prefix_codes, rms  # [P,k], scalar
        self.code_scale = adapter.code_scale

    @torch.no_grad()
    def segment(self, text: str) -> tuple[Tensor, Tensor]:
        """(ends [L] in bytes, codes [L,k]) that the encoder finds in a text."""
        data = to_bytes([text], self.reader.device)
        is_end = self.encoder(data) > 0  # [1,N]
        is_end[0, -1] = True
        return is_end[0].nonzero()[:, 0] + 1, self.encoder.codes(data, is_end) * self.code_scale

    def send(self, prompt: Prompt) -> bytes:
        """Text of a prompt -> message, without its token ids. Raises UserError for half a surrogate pair.

        If the encoder finds more tokens than the LLM's context holds, the last ones are sent.
        """
        _, codes = self.segment(self.reader.spelling.spell(prompt.text))
        room = self.reader.prompt_tokens - len(self.prefix_codes)
        codes = torch.cat([self.prefix_codes, codes[-room:]])
        return pack_codes(codes)

    @torch.no_grad()
    def receive(self, message: bytes) -> Tensor:
        """Message -> embeddings [L,d]."""
        (count,) = struct.unpack_from("<I", message)
        codes = torch.from_numpy(np.frombuffer(message, "<f2", offset=4).astype(np.float32)).to(self.reader.device)
        return self.adapter(codes.view(count, -1), self.constant_rms)


class TrueCodes(Wire):
    """A control: the sender knows the tokenizer and sends the codes that the encoder should find."""

    def __init__(self, wire: Wire, table_codes: Tensor):
        super().__init__(wire.reader, wire.encoder, wire.adapter, wire.prefix_codes, wire.constant_rms)
        self.table_codes = table_codes  # [V,k]

    def send(self, prompt: Prompt) -> bytes:
        return pack_codes(self.table_codes[prompt.ids])


def pack_codes(codes: Tensor) -> bytes:
    """Codes [L,k] -> message."""
    return struct.pack("<I", len(codes)) + codes.cpu().numpy().astype("<f2").tobytes()


# ---------------------------------------------------------------------------------------------------------------------
# the targets: where the tokenizer's tokens end, in prompts and in odd texts that no prompt would hold


def known_targets(reader: Reader, texts: list[str], data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(real [B,N] bool, is_end [B,N] bool, ids of the tokens that end there, in order), for training only.

    Token ends are not known in a text that the tokens do not spell (it has a character that the tokenizer lacks): its
    bytes are marked as not real, and teach nothing.
    """
    real, is_end, all_ids = data < 256, torch.zeros_like(data, dtype=torch.bool), []
    for i, text in enumerate(texts):  # data: of their spelling
        try:
            ids, ends = token_ends(reader, text)
        except UserError:
            real[i] = False
            continue
        is_end[i, torch.tensor(ends, device=data.device) - 1] = True
        all_ids += ids
    return real, is_end, torch.tensor(all_ids, dtype=torch.long, device=data.device)


def pack_texts(data: Tensor, *marks: Tensor) -> list[Tensor]:
    """Padded texts [B,N], and marks [B,N] of their bytes, as [1,M]: one text after another, just out of reach.

    The encoder's output for a byte is that in [B,N], and the padding of short texts costs no work.
    """
    gap = max(REACH, LONGEST)
    kept = torch.arange(data.shape[1] + gap, device=data.device) < (data < 256).sum(1, keepdim=True) + gap
    return [F.pad(x, (0, gap), value=v)[kept][None] for x, v in ((data, 256), *((mark, 0) for mark in marks))]


def step_targets(reader: Reader, parts: list[list[dict]], rng: random.Random) -> list[tuple[Tensor, ...]]:
    """For each micro-batch, of its prompts and ODD texts for each, end to end: bytes, real, is_end [1,M] each, and ids.

    See known_targets for their meaning.
    """
    prompts = [[sent_prompt(reader, row).text for row in part] for part in parts]
    words = words_of([text for texts in prompts for text in texts])
    targets = []
    for texts in prompts:
        texts = texts + [odd_text(rng, text, words, reader) for text in texts for _ in range(ODD)]
        data = to_bytes([reader.spelling.spell(text) for text in texts], reader.device)  # [B*(1+ODD),N]
        real, is_end, ids = known_targets(reader, texts, data)
        targets.append((*pack_texts(data, real, is_end), ids))
    return targets


# ---------------------------------------------------------------------------------------------------------------------
# the losses: ends and codes from their targets; the answers, where the target of the codes is left out


def encoder_losses(
    wire: Wire, targets: tuple[Tensor, ...], table_codes: Tensor, bytes_of_step: int, tokens_of_step: int,
    with_codes: bool,
) -> dict[str, Tensor]:  # fmt: skip
    """{"end", "mse", "token"} of a micro-batch (scalars): its part of the means over the whole step."""
    data, real, is_end, ids = targets
    logits = wire.encoder(data)
    end = F.binary_cross_entropy_with_logits(logits[real], is_end[real].float(), reduction="sum") / bytes_of_step
    if not with_codes:
        return {"end": end}
    z = wire.encoder.codes(data, is_end)  # [n,k]
    # a token has one code wherever it stands: each of the U different ones is compared once, and weighs its count
    ids, which, counts = ids.unique(return_inverse=True, return_counts=True)
    place = torch.empty_like(ids).scatter_(0, which, torch.arange(len(which), device=ids.device))
    mse, token = code_losses(wire, z[place], table_codes[ids] / wire.code_scale, ids)
    return {
        "end": end,
        "mse": (counts.float() @ mse) / tokens_of_step,
        "token": (counts.float() @ token) / tokens_of_step,
    }


def code_losses(wire: Wire, z: Tensor, target: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(mean squared error, cross-entropy of the token that the adapter will read), [U] each, of predicted codes.

    z, target: [U,k] codes divided by their scale; ids: [U] of the tokens.
    """
    mse = (z - target).square().mean(1)
    if wire.adapter.kind != "codebook":
        return mse, torch.zeros_like(mse)
    keys = wire.adapter.keys
    # the scores of a codebook whose sharpness is 4, for every token of the vocabulary
    logits = -2.0 * (keys.square().sum(1) - 2 * z @ keys.T)  # [U,V]
    return mse, F.cross_entropy(logits, ids, reduction="none")


def answer_loss(wire: Wire, rows: list[dict], batch: Batch, targets: int) -> Tensor:
    """Cross-entropy (scalar) of the answers when the LLM reads what encoder and adapter make of the prompts.

    Tokens end where the tokenizer's do; in a text that the tokens do not spell, where the encoder says. Summed over
    `batch` of these rows and divided by the `targets` answer tokens of the whole step.
    """
    reader = wire.reader
    texts = [sent_prompt(reader, row).text for row in rows]
    data = to_bytes([reader.spelling.spell(text) for text in texts], reader.device)  # [B,N]
    real = data < 256
    line, real_line = pack_texts(data, real)
    logits = wire.encoder(line)
    known, is_end, _ = known_targets(reader, texts, data)
    found = torch.zeros_like(real).masked_scatter(real, logits[real_line] > 0)
    is_end = torch.where(known.any(1, keepdim=True), is_end, found)
    is_end[torch.arange(len(data), device=data.device), real.sum(1) - 1] = True
    counts = is_end.sum(1).tolist()
    codes = (wire.encoder.codes(data, is_end) * wire.code_scale).split(counts)  # [L,k] each
    received = wire.adapter(torch.cat([part for c in codes for part in (wire.prefix_codes, c)]), wire.constant_rms)
    spliced, embeddings = splice(reader, batch, received.split([len(wire.prefix_codes) + n for n in counts]))
    logits = answer_logits(reader, spliced, embeddings)
    return F.cross_entropy(logits, spliced.targets, reduction="sum") / targets


@torch.no_grad()
def measure_encoder(wire: Wire, table_codes: Tensor, rows: list[dict]) -> dict[str, float]:
    """How close the encoder comes to its targets on test prompts, in percent; cosine of codes less their mean.

    A text that the tokens do not spell has no targets: it is left out, and `no_targets` counts it.
    """
    reader, hits, found, real, exact, cosine, whole, left_out = wire.reader, 0, 0, 0, 0, 0.0, 0, 0
    directions = F.normalize(reader.table, dim=-1)  # [V,d] once: a 7B model's takes a second on a CPU
    for row in rows:
        text = sent_prompt(reader, row).text
        try:
            ids, ends = token_ends(reader, text)
        except UserError:
            left_out += 1
            continue
        found_ends, codes = wire.segment(reader.spelling.spell(text))
        shared = set(ends) & set(found_ends.tolist())
        hits, found, real = hits + len(shared), found + len(found_ends), real + len(ends)
        whole += len(shared) == len(ends) == len(found_ends)
        mine = codes[[i for i, end in enumerate(found_ends.tolist()) if end in shared]]
        true_ids = torch.tensor([token for token, end in zip(ids, ends, strict=True) if end in shared]).to(codes.device)
        cosine += F.cosine_similarity(mine, table_codes[true_ids], dim=-1).sum().item()
        decoded = wire.adapter(mine.to(torch.float16).float(), wire.constant_rms)
        nearest = (F.normalize(decoded, dim=-1) @ directions.T).argmax(-1)
        exact += (nearest == true_ids).sum().item()
    measured = max(1, len(rows) - left_out)
    return {
        "boundary_f1": 200 * hits / max(1, found + real), "exact_token": 100 * exact / max(1, real),
        "code_cosine": cosine / max(1, hits), "whole_prompts": 100 * whole / measured, "no_targets": left_out,
    }  # fmt: skip


def load_stage1(args) -> SavedWire:
    """The stage-1 wire that --stage1 names, or the shipped one of --model. Raises UserError."""
    args.stage1 = args.stage1 or SHIPPED.get(args.model)
    if args.stage1 is None:
        raise UserError(
            f"stage 2 starts from a stage-1 wire: run stage1_pca_adapter.py --model {args.model}, then --stage1 DIR"
        )
    return load_wire(args.stage1, "stage1", STAGE1_WIRE)


def main() -> None:
    # -----------------------------------------------------------------------------------------------------------------
    # setup: arguments, the wire of stage 1, frozen LLM, data
    args = parse_arguments()
    saved = None
    if args.eval_only:
        saved = load_wire(args.eval_only, STAGE, WIRE)
    merge_with_saved(args, {key: CONFIG[key] for key in FIXED_BY_WIRE}, saved)
    below = saved or load_stage1(args)  # where PCA and adapter come from
    device, dtype = set_up(args)
    reader = load_reader(args.model, device, dtype, args.gradient_checkpointing, args.device == "split")
    check_fingerprint(reader, below.config, below.name)
    data = load_data(args.data, reader, args.eval_examples)
    halve_windows(args.data, data, reader)
    check_prompts(reader, data)
    tried = (data.train_rows(args.seed, 0, 16) + data.test)[:16]
    if not saved and not any(spells(reader, sent_prompt(reader, row).text) for row in tried):
        raise UserError(
            f"--model {args.model}: the names of its tokens do not spell its prompts, so token ends are not known"
        )

    # -----------------------------------------------------------------------------------------------------------------
    # model: PCA and adapter of stage 1, and the encoder, which alone is trained
    (vocabulary, d), k, without = reader.table.shape, below.config["code_dim"], args.without
    mean, components, rms = (below.tensors[name].to(device) for name in ("mean", "components", "target_rms"))
    table_codes = project(reader.table, mean, components).to(torch.float16).float()  # [V,k]
    pca, ones = PCA(mean, components, torch.ones(d)), torch.ones(vocabulary, device=device)
    adapter = Adapter(below.config["adapter"], pca, reader, table_codes, ones).to(device).requires_grad_(False)
    load_module(adapter, "adapter.", below.tensors, below.name)
    prefix_codes = table_codes[prefix_ids(reader)]
    encoder = Encoder(k).to(device)
    if saved:
        check_shapes(saved.name, saved.tensors, WIRE.tensors, n=len(prefix_codes))
        prefix_codes = saved.tensors["prefix_codes"].to(device)
        load_module(encoder, "encoder.", saved.tensors, saved.name)
    wire = Wire(reader, encoder, adapter, prefix_codes, rms)
    out = open_out(args)
    trained_parameters = sum(p.numel() for p in encoder.parameters())
    print(f"encoder: {trained_parameters:,} trained parameters, a byte sees {REACH} before it", flush=True)
    print(f"adapter {adapter.kind} of {args.stage1}, k {k} of d {d}", flush=True)

    # -----------------------------------------------------------------------------------------------------------------
    # training
    tables = [*encoder.grams.parameters()]
    others = [p for name, p in encoder.named_parameters() if not name.startswith("grams.")]
    groups = [{"params": others}, {"params": tables}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=BETAS, weight_decay=0.0)
    fits = must_match(args, reader.fingerprint, below.sha256)  # a checkpoint must fit this run
    run = Run(args, out, {"encoder": encoder}, optimizer, fits, show=lambda: show_samples(wire, data))
    for step in run.steps():  # resumes where it stopped; after the body: log, checkpoint, stop if told to
        # warm-up over 5% of the steps, then linearly to zero
        warmth = min(1.0, (step + 1) / (0.05 * args.steps), (args.steps - step) / (0.95 * args.steps))
        for group, rate in zip(optimizer.param_groups, (1, TABLE_RATE), strict=True):
            group["lr"] = args.lr * warmth * rate
        rows = data.train_rows(args.seed, step * args.batch_size, args.batch_size)
        parts = micro_batches(rows, args.micro_batch_size)
        known = step_targets(reader, parts, random.Random(f"{args.seed}-{step}-0"))
        batches = [make_batch(reader, part) for part in parts] if without == "code-target" else []
        # losses are means over the whole step, so that the micro-batch size changes nothing
        real_bytes = max(1, sum(int(real.sum()) for _, real, _, _ in known))
        tokens = max(1, sum(len(ids) for *_, ids in known))
        targets = sum(len(batch.targets) for batch in batches)
        for number, part in my_share(enumerate(parts)):  # all of them, unless torchrun started several processes
            losses = encoder_losses(wire, known[number], table_codes, real_bytes, tokens, without is None)
            if batches:
                losses["ce"] = answer_loss(wire, part, batches[number], targets)
            sum(WEIGHTS[name] * loss for name, loss in losses.items()).backward()
            run.add(**losses)
        run.reduce()  # gradients and losses, summed over the processes
        norm = torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        if run.accepts(norm):  # neither NaN nor a spike
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    # -----------------------------------------------------------------------------------------------------------------
    # evaluation: the wire and every control, on test passages whose names were never seen
    encoder.eval()
    batch_size = 2 * args.micro_batch_size  # no gradients: twice the rows fit
    metrics, records = evaluate(wire, data, batch_size)
    print("  controls: the encoder's own targets, the true codes through the same adapter", flush=True)
    controls = measure_encoder(wire, table_codes, data.test)
    controls["true_codes"], answers = score_wire(TrueCodes(wire, table_codes), data, batch_size)
    whole, unit = f"all right in {controls['whole_prompts']:.1f}% of texts", "F1" if answers else "NLL"
    rows = [
        ("token ends: F1", f"{controls['boundary_f1']:.2f}", whole),
        ("exact tokens, %", f"{controls['exact_token']:.2f}", "nearest embedding after the adapter, at the right end"),
        ("cosine of codes", f"{controls['code_cosine']:.3f}", "with the PCA codes, at the right ends"),
        (f"true codes, same adapter: {unit}", f"{controls['true_codes']:.3f}", "what the encoder aims at"),
    ]
    config = {"embedding_width": d, "code_dim": k, "adapter": adapter.kind}
    config |= {"stage1": args.stage1, "without": without}
    tensors = {"mean": mean, "components": components, "target_rms": rms, "prefix_codes": prefix_codes}
    tensors |= module_tensors({"adapter": adapter, "encoder": encoder})
    title = f"stage 2: bytes -> {k} numbers a token"
    bars = {"true codes": controls["true_codes"]}
    finish(run, reader, saved, title, metrics, controls, config, rows, records, tensors, bars=bars)


if __name__ == "__main__":
    launch(main)
