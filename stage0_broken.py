"""Stage 0: the known attempt, faithfully, and why it fails. Everything is learned at once, from the answer loss alone.

    bytes [N] -> encoder -> 32 latents x 256 -> adapter -> 32 embeddings -> frozen LLM -> answer
                 trained    no target            trained   no target        frozen

What is wrong with it, and what the end of a run measures:

    1 too many unknowns        encoder and adapter are both random at first: each learns against the other's noise
    2 no supervision between   nothing says what a latent should hold; the only signal comes through the whole LLM
    3 extreme compression      32 positions for a prompt of 88 tokens: every position must say what no token ever said
    4 distribution mismatch    the LLM has only ever read rows of its table; these vectors lie nowhere near them

It is not sabotaged. Bytes are convolved, shortened and attended to; the adapter starts with outputs of the embeddings'
RMS; warm-up, clipping, and a sweep of learning rates in results/stage0/. It has the batch size, the examples and the
optimiser steps of stage 2. What it learns is how answers look, not what the prompt says.

    python stage0_broken.py                      # minutes on two cores; README has time and score
    python stage0_broken.py --model tiny-qwen

Letters: B batch, N padded length in bytes, M latents of a message, C encoder width, L tokens of a prompt, V vocabulary,
d LLM embedding width.
"""

import copy
import math
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common

STAGE = "stage0"
LATENTS, LATENT_WIDTH = 32, 256

# ---------------------------------------------------------------------------------------------------------------------
# arguments


def parse_arguments():
    parser = common.Parser(description=__doc__.split("\n")[0])
    common.add_arguments(parser, STAGE, steps=1200, batch_size=16, lr=1e-3)
    return common.finish_arguments(parser)


# what a trained wire fixes: --eval-only reads these from its config.json and refuses other values
DEFAULTS = {"model": "tiny", "data": "tiny"}

# ---------------------------------------------------------------------------------------------------------------------
# the encoder: bytes [B,N] -> latents [B,M,256]; the adapter: latents -> embeddings [B,M,d]


class Encoder(nn.Module):
    """Bytes, shortened 4x by a convolution, two transformer layers, and 32 learned queries that attend to them."""

    WIDTH, SHORTER = 128, 4

    def __init__(self):
        super().__init__()
        C = self.WIDTH
        self.embedding = nn.Embedding(257, C)  # 256 is padding
        self.shorten = nn.Conv1d(C, C, 2 * self.SHORTER + 1, stride=self.SHORTER, padding=self.SHORTER)
        layer = {
            "d_model": C,
            "nhead": 4,
            "dim_feedforward": 2 * C,
            "dropout": 0.0,
            "batch_first": True,
            "norm_first": True,
        }
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(**layer) for _ in range(2))
        self.queries = nn.Parameter(torch.randn(LATENTS, C) / C**0.5)
        self.cross = nn.TransformerDecoderLayer(**layer)
        self.latent = nn.Sequential(nn.LayerNorm(C), nn.Linear(C, LATENT_WIDTH))

    def forward(self, data: Tensor) -> Tensor:
        """data: [B,N] bytes, 256 for padding. Returns [B,M,256]."""
        real = data < 256
        x = (self.embedding(data) * real[..., None]).transpose(1, 2)  # [B,C,N]
        x = F.gelu(self.shorten(x)).transpose(1, 2)  # [B,N/4,C]
        blank = ~real[:, :: self.SHORTER][:, : x.shape[1]]
        x = x + sinusoids(x.shape[1], self.WIDTH, x.device)
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

    def __init__(self, reader: common.Reader, encoder: Encoder, adapter: Adapter):
        self.reader, self.encoder, self.adapter = reader, encoder, adapter
        self.prefix = reader.table[common.prefix_ids(reader)]  # [P,d], P 0 or 1

    @torch.no_grad()
    def send(self, prompt: common.Prompt) -> bytes:
        latents = self.encoder(common.to_bytes([prompt.text], self.reader.device))[0]  # [M,256]
        return latents.cpu().numpy().astype("<f2").tobytes()

    @torch.no_grad()
    def receive(self, message: bytes) -> Tensor:
        """Message -> embeddings [P+M,d]."""
        latents = torch.from_numpy(np.frombuffer(message, "<f2").astype(np.float32)).to(self.reader.device)
        return torch.cat([self.prefix, self.adapter(latents.view(LATENTS, LATENT_WIDTH))])


def answer_loss(wire: Wire, rows: list[dict], batch: common.Batch, targets: int) -> Tensor:
    """Cross-entropy (scalar) of every answer token, EOS included. There is no other loss.

    Summed over `batch` of these rows and divided by the `targets` answer tokens of the whole step.
    """
    texts = [common.sent_prompt(wire.reader, row).text for row in rows]
    embeddings = wire.adapter(wire.encoder(common.to_bytes(texts, wire.reader.device)))  # [B,M,d]
    received = [torch.cat([wire.prefix, part]) for part in embeddings]
    batch, spliced = common.splice(wire.reader, batch, received)
    logits = common.answer_logits(wire.reader, batch, spliced)
    return F.cross_entropy(logits, batch.labels[batch.labels != common.IGNORE], reduction="sum") / targets


# ---------------------------------------------------------------------------------------------------------------------
# the diagnosis: one number or two for each of the four causes


@torch.no_grad()
def latents_of(wire: Wire, rows: list[dict]) -> Tensor:
    """[rows, M, 256]"""
    prompts = [common.sent_prompt(wire.reader, row).text for row in rows]
    return torch.cat(
        [wire.encoder(common.to_bytes(prompts[i : i + 50], wire.reader.device)) for i in range(0, len(prompts), 50)]
    )


def probe_tokens(wire: Wire, train: list[dict], test: list[dict]) -> tuple[float, float]:
    """(accuracy, accuracy of always guessing the commonest), %: which token stands at 32 even places of the prompt?

    Linear probes, ridge regression from one latent to one-hot tokens. Each place is read off the latent that reads it
    best on the last quarter of `train`; the first three quarters fit, `test` is neither.
    """
    reader, V = wire.reader, len(wire.reader.table)

    def tokens(rows):  # [rows, 32]
        lists = [common.sent_prompt(reader, row).ids for row in rows]
        return torch.tensor([[ids[(2 * j + 1) * len(ids) // 64] for j in range(32)] for ids in lists])

    fitted = max(1, 3 * len(train) // 4)
    y, y_test = tokens(train), tokens(test)
    place = torch.arange(32).expand(fitted, -1)
    # only tokens that occur in a place can be guessed there: [pairs] of place and token, and the pair of each label
    pairs, pair = torch.unique((place * V + y[:fitted]).flatten(), return_inverse=True)
    share = torch.bincount(pair) / fitted

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
        chosen = (guesses(other @ weights + share) == y[fitted:]).sum(0)
        hits = (guesses(unseen @ weights + share) == y_test).sum(0)
        right = torch.where(chosen > best, hits, right)
        best = torch.maximum(chosen, best)
    constant = (guesses(share[None]) == y_test).sum()
    return 100 * right.sum().item() / y_test.numel(), 100 * constant.item() / y_test.numel()


@torch.no_grad()
def first_token_accuracy(wire: Wire, rows: list[dict], batch_size: int) -> float:
    """% of answers whose first token is right; teacher forcing has no part in it."""
    right = 0
    for at in range(0, len(rows), batch_size):
        part = rows[at : at + batch_size]
        received = [wire.receive(wire.send(common.sent_prompt(wire.reader, row))) for row in part]
        batch, spliced = common.splice(wire.reader, common.make_batch(wire.reader, part), received)
        logits = common.answer_logits(wire.reader, batch, spliced)
        targets = batch.labels[batch.labels != common.IGNORE]
        counts = (batch.labels != common.IGNORE).sum(1)
        first = torch.cat([counts.new_zeros(1), counts.cumsum(0)[:-1]])
        right += (logits[first].argmax(-1) == targets[first]).sum().item()
    return 100 * right / len(rows)


def gradient_rms(module: nn.Module) -> float:
    """Of one parameter's gradient, on average."""
    total = sum(p.grad.square().sum().item() for p in module.parameters() if p.grad is not None)
    return math.sqrt(total / sum(p.numel() for p in module.parameters()))


def main() -> None:
    # -----------------------------------------------------------------------------------------------------------------
    # setup: arguments, frozen LLM, data
    args = parse_arguments()
    saved_tensors, saved_config = {}, None
    if args.eval_only:
        config_keys = ("embedding_width", *DEFAULTS, "metrics.train_seconds")
        saved_tensors, saved_config = common.load_wire(args.eval_only, STAGE, config_keys, ())
    common.settle_arguments(args, DEFAULTS, saved_config)
    if saved_config:
        args.seed = saved_config["arguments"]["seed"]
    device, device_reason = common.pick_device(args.device)
    split = args.device == "split"
    common.seed_everything(args.seed, device)
    dtype, dtype_reason = common.pick_dtype(args.dtype, device)
    print(
        f"device {device.type} ({device_reason}), dtype {str(dtype).removeprefix('torch.')} ({dtype_reason})",
        flush=True,
    )
    reader = common.load_reader(args.model, device, dtype, args.gradient_checkpointing, split)
    common.check_fingerprint(reader, saved_config, args.eval_only)
    vocabulary, d = reader.table.shape
    data = common.load_data(args.data, reader, args.eval_examples)
    if data.kind == "text":
        raise common.UserError(f"--data {args.data}: stage 0 learns from answers; give questions, not plain text")
    common.check_questions(reader, data)
    run_arguments = {key: value for key, value in vars(args).items() if key not in ("out", "resume", "eval_only")}
    checkpoint_path = Path(args.out) / "checkpoint.safetensors"
    resumed = common.load_checkpoint(checkpoint_path, run_arguments, reader.fingerprint) if args.resume else None
    print(f"model {args.model}: V {vocabulary}, d {d}, fingerprint {reader.fingerprint}")
    size = "unlimited" if data.train is None else len(data.train)
    print(f"data {args.data} ({data.kind}): {size} training rows, {len(data.test)} test rows", flush=True)

    # -----------------------------------------------------------------------------------------------------------------
    # model: all of it random. The LLM is frozen.
    table_rms = reader.table.square().mean().sqrt().item()
    encoder, adapter = Encoder().to(device), Adapter(d, table_rms).to(device)
    start = copy.deepcopy((encoder, adapter))  # stays random: what did training add?
    if args.eval_only:
        common.load_module(encoder, "encoder.", saved_tensors, args.eval_only)
        common.load_module(adapter, "adapter.", saved_tensors, args.eval_only)
    wire = Wire(reader, encoder, adapter)
    out = common.open_out(args.out)
    sizes = [sum(p.numel() for p in module.parameters()) for module in (encoder, adapter)]
    print(
        f"encoder {sizes[0]:,} + adapter {sizes[1]:,} trained parameters, {LATENTS} x {LATENT_WIDTH} latents",
        flush=True,
    )

    # -----------------------------------------------------------------------------------------------------------------
    # training
    history: list[dict] = []
    steps = 0 if args.eval_only else args.steps
    step, train_seconds = 0, 0.0
    optimizer = torch.optim.AdamW(
        [*encoder.parameters(), *adapter.parameters()], lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01
    )
    if resumed:
        adapter.load_state_dict(resumed["adapter"])
        encoder.load_state_dict(resumed["encoder"])
        optimizer.load_state_dict(resumed["optimizer"])
        step, train_seconds, history = resumed["step"], resumed["train_seconds"], resumed["history"]
        print(f"resumed at step {step}", flush=True)
    else:
        checkpoint_path.unlink(missing_ok=True)  # of an older run: this one must not be taken for it
    common.write_jsonl(out / "metrics.jsonl", history)
    accumulation = args.batch_size // args.micro_batch_size
    assert accumulation * args.micro_batch_size == args.batch_size, (args.batch_size, args.micro_batch_size)
    progress = common.Progress(steps, step)
    guard, started = common.Guard(steps, resumed), time.perf_counter() - train_seconds
    while step < steps:
        # warm-up over 5% of the steps, then linearly to zero
        scale = min(1.0, (step + 1) / (0.05 * steps), (steps - step) / (0.95 * steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * scale
        rows = data.train_rows(args.seed, step * args.batch_size, args.batch_size)
        parts = [rows[i * args.micro_batch_size : (i + 1) * args.micro_batch_size] for i in range(accumulation)]
        batches = [common.make_batch(reader, part) for part in parts]
        targets = sum(int((batch.labels != common.IGNORE).sum()) for batch in batches)
        loss = 0.0
        # all micro-batches, unless torchrun started several processes
        for part, batch in common.own_share(list(zip(parts, batches, strict=True))):
            share = answer_loss(wire, part, batch, targets)
            share.backward()
            loss += share.item()
        (loss,) = common.add_up([*encoder.parameters(), *adapter.parameters()], [loss])
        gradients = {"gradient_encoder": gradient_rms(encoder), "gradient_adapter": gradient_rms(adapter)}
        norm = torch.nn.utils.clip_grad_norm_([*encoder.parameters(), *adapter.parameters()], 1.0)
        if guard.accepts(loss, norm.item(), step + 1):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        train_seconds = time.perf_counter() - started
        if step % 10 == 0 or step in (1, steps):
            history.append(common.rounded({"step": step, "lr": args.lr * scale, "loss_ce": loss} | gradients))
            common.append_jsonl(out / "metrics.jsonl", history[-1] | {"seconds": round(train_seconds, 1)})
        progress.show(step, f"ce {loss:.3f}")
        if guard.due(step):
            common.save_checkpoint(
                checkpoint_path,
                {
                    "adapter": adapter.state_dict(), "encoder": encoder.state_dict(),
                    "optimizer": optimizer.state_dict(), "step": step, "train_seconds": train_seconds,
                    "history": history, "arguments": run_arguments, "fingerprint": reader.fingerprint,
                    "guard": guard.state(),
                },
            )  # fmt: skip
            guard.saved(step)
            common.print_samples(reader, data, wire.send, wire.receive)
    guard.close()

    # -----------------------------------------------------------------------------------------------------------------
    # evaluation: the wire and every control, on test passages whose names were never seen
    print(f"evaluating on {len(data.test)} test rows", flush=True)
    eval_started = time.perf_counter()
    encoder.eval()
    batch_size = 2 * args.micro_batch_size  # no gradients: twice the rows fit
    metrics, records = common.evaluate(reader, data, batch_size, wire.send, wire.receive)

    print("  the diagnosis", flush=True)
    prompts = [common.sent_prompt(reader, row) for row in data.test]

    def score_of(other: Wire) -> float:
        messages = [other.send(prompt) for prompt in prompts]
        return common.score(common.generate(reader, messages, batch_size, other.receive), data.test)[0]

    random_encoder, random_adapter = Wire(reader, start[0].eval(), adapter), Wire(reader, encoder, start[1])
    known = data.train_rows(args.seed, 0, 10 if args.smoke else 1000)
    probe, guess = probe_tokens(wire, known, data.test)
    latents = latents_of(wire, data.test).flatten(1)  # [rows, M*256]
    unit = F.normalize(latents, dim=1)
    pairs = len(unit) * (len(unit) - 1)
    alike = ((unit @ unit.T).sum() - len(unit)).item() / pairs if pairs else 1.0
    spectrum = torch.linalg.svdvals((latents - latents.mean(0)).cpu().double()).square()
    fakes = torch.cat([wire.receive(wire.send(p))[len(wire.prefix) :] for p in prompts[:200]])  # [200*M, d]

    def nearest_cosine(vectors: Tensor) -> float:
        return (F.normalize(vectors, dim=1) @ F.normalize(reader.table, dim=1).T).amax(1).mean().item()

    nearest, random_nearest = nearest_cosine(fakes), nearest_cosine(torch.randn_like(fakes))
    answers = Counter(record["wire"] for record in records)
    first, recent = history[:2], history[-10:]

    def mean_of(key: str, rows: list[dict]) -> float | None:
        return sum(row[key] for row in rows) / len(rows) if rows else None

    controls = {
        "gradient_encoder": mean_of("gradient_encoder", recent),
        "gradient_adapter": mean_of("gradient_adapter", recent),
        "first_gradient_encoder": mean_of("gradient_encoder", first),
        "first_gradient_adapter": mean_of("gradient_adapter", first),
        "random_encoder_f1": score_of(random_encoder), "random_adapter_f1": score_of(random_adapter),
        "probe_accuracy": probe, "probe_guess": guess,
        "bits_offered": 16.0 * LATENTS * LATENT_WIDTH, "bits_needed": 8 * metrics["packed_token_bytes"],
        "effective_dimensions": (spectrum.sum().square() / spectrum.square().sum()).item() if pairs else 0.0,
        "rms": fakes.square().mean().sqrt().item(), "real_rms": table_rms,
        "mean_norm": fakes.mean(0).norm().item(), "real_mean_norm": reader.table.mean(0).norm().item(),
        "nearest_cosine": nearest, "random_nearest_cosine": random_nearest, "latent_cosine": alike,
        "commonest_answer": answers.most_common(1)[0][0],
        "commonest_share": 100 * answers.most_common(1)[0][1] / len(records),
        "first_token_accuracy": first_token_accuracy(wire, data.test, batch_size),
    }  # fmt: skip
    metrics |= {
        "stage": STAGE, "model": args.model, "data": args.data, "seed": args.seed,
        "steps": saved_config["arguments"]["steps"] if args.eval_only else args.steps,
        "train_seconds": saved_config["metrics"]["train_seconds"] if args.eval_only else train_seconds,
        "eval_seconds": time.perf_counter() - eval_started, "device": device.type,
        "dtype": str(dtype).removeprefix("torch."), "versions": common.versions(), "commit": common.commit(),
    }  # fmt: skip
    metrics, c = common.rounded(metrics), common.rounded(controls)
    gradients = "no training in this run"
    if recent:
        gradients = (
            f"{c['gradient_encoder']:.2g} a parameter of the encoder, {c['gradient_adapter']:.2g} of the adapter; "
            f"in the first steps {c['first_gradient_encoder']:.2g} and {c['first_gradient_adapter']:.2g}"
        )
    offered = f"{c['bits_offered']:.0f} bits offered, {c['bits_needed']:.0f} needed"
    used = f"{c['effective_dimensions']:.1f} of {LATENTS * LATENT_WIDTH} dimensions used"
    statistics = (
        f"RMS {c['rms']:.3g} (real {c['real_rms']:.3g}), "
        f"norm of the mean {c['mean_norm']:.3g} (real {c['real_mean_norm']:.3g})"
    )
    different = f"{metrics['unique_answers']} different ones to {metrics['examples']} questions"
    extra = [
        ("1 too many unknowns", "", f"gradient RMS at the end: {gradients}"),
        ("  encoder random again: F1", f"{c['random_encoder_f1']:.1f}", ""),
        ("  adapter random again: F1", f"{c['random_adapter_f1']:.1f}", ""),
        ("2 no supervision between", f"{probe:.1f}", f"% of tokens that linear probes read; guessing {guess:.1f}"),
        (
            "3 extreme compression",
            f"{LATENTS}",
            f"positions for {metrics['text_positions']:.0f} tokens; {offered}, {used}",
        ),
        (
            "4 distribution mismatch",
            f"{nearest:.3f}",
            f"cosine to the nearest token, of random vectors {random_nearest:.3f}; {statistics}",
        ),
        ("collapse: latents alike", f"{alike:.3f}", "mean cosine of different prompts' latents"),
        ("  commonest answer, %", f"{c['commonest_share']:.1f}", f"{c['commonest_answer']!r}; {different}"),
        ("  first answer token, %", f"{c['first_token_accuracy']:.1f}", "right"),
    ]
    config = {
        "stage": STAGE, "model": args.model, "fingerprint": reader.fingerprint, "embedding_width": d,
        "data": args.data, "arguments": saved_config["arguments"] if args.eval_only else run_arguments,
        "metrics": metrics, "controls": c,
    }  # fmt: skip
    tensors = {f"adapter.{name}": tensor for name, tensor in adapter.state_dict().items()}
    tensors |= {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    bars = {
        "random encoder": c["random_encoder_f1"], "random adapter": c["random_adapter_f1"],
        "first token right": c["first_token_accuracy"], "commonest answer's share": c["commonest_share"],
    }  # fmt: skip
    title = f"stage 0: {LATENTS} x {LATENT_WIDTH} latents, answer loss alone"
    common.finish_run(out, tensors, config, history, records, extra, title, bars)


if __name__ == "__main__":
    common.run(main)
