"""Stage 1: a frozen LLM answers questions about text that it received as 8x smaller PCA codes. One thing is learned.

    tokens -> frozen embeddings [L,d] -> PCA codes [L,k] -> adapter -> RMS match -> frozen LLM -> answer
              known                      fixed             trained    known        frozen

Why this works where stage 0 fails: the input of the trained part is known (codes that keep most of the variance), its
target is known (the LLM's own embeddings), it starts at a sensible answer (the PCA inverse, or a look-up of the nearest
code), and what the LLM reads keeps the statistics of real embeddings. The loss says both what we know and what we want:

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
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from kernels.adapter import adapt, project

STAGE = "stage1"

# ---------------------------------------------------------------------------------------------------------------------
# arguments


def parse_arguments():
    parser = common.Parser(description=__doc__.split("\n")[0])
    common.add_arguments(parser, STAGE, steps=200, batch_size=16, lr=3e-3)
    parser.add_argument("--code-dim", type=common.positive_int, help="k; default: an eighth of the embedding width")
    parser.add_argument("--adapter", choices=("linear", "mlp", "codebook"), help="default: codebook")
    parser.add_argument("--rms", choices=("constant", "sent"), help="RMS to match: a constant of the wire (default), "
                        "or each token's own, sent as a float16 and counted in the bytes")  # fmt: skip
    parser.add_argument(
        "--kd-weight", type=float, help="weight of KL(LLM reading text || LLM reading the wire); default 0"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what this model needs, from its shape alone")
    parser.add_argument("--random-weights", metavar="LAYERS", nargs="?", const=0, type=common.positive_int,
                        help="time steps of a random model of this shape (of so many layers)")  # fmt: skip
    args = common.finish_arguments(parser)
    args.shape_only = args.dry_run or args.random_weights is not None
    if args.shape_only and (args.eval_only or args.resume or args.data not in (None, "tiny")):
        parser.error("--dry-run and --random-weights have no data: drop --data, --resume and --eval-only")
    if args.random_weights is not None and args.device == "split":
        parser.error("--random-weights measures one device: drop --device split")
    if args.kd_weight is not None and not (math.isfinite(args.kd_weight) and args.kd_weight >= 0):
        parser.error(f"argument --kd-weight: must be a number of at least 0, not {args.kd_weight}")
    return args


# what a trained wire fixes: --eval-only reads these from its config.json and refuses other values
DEFAULTS = {
    "model": "tiny",
    "data": "tiny",
    "code_dim": None,
    "adapter": "codebook",
    "rms": "constant",
    "kd_weight": 0.0,
}

NOT_OF_THE_RUN = ("out", "resume", "eval_only", "dry_run", "random_weights", "shape_only")

# ---------------------------------------------------------------------------------------------------------------------
# the adapter: codes [N,k] -> embeddings [N,d]


class Adapter(nn.Module):
    """The part that is trained. All three kinds start from the PCA and end in the same operator, kernels/adapter.py.

    linear    y = z A + b, started at the PCA inverse
    mlp       + a hidden layer of 512 whose output starts at zero
    codebook  y = softmax(-|z - keys|^2 * sharpness / 2) @ table: keys [V,k] start at every token's code, the values are
              the LLM's frozen embedding table. It can only say real embeddings or blends of them: in this stage alone
              it is a soft re-tokeniser. It earns its place by repairing what a flat spectrum loses here, and an
              encoder's small errors in stage 2.

    Codes are divided by their mean standard deviation and y is in units of the embeddings' RMS, so that one learning
    rate fits a small reader and a 7B model, whose embeddings have an RMS near 0.01.
    """

    HIDDEN, SMALL = 512, 8192  # numbers of the hidden layer; tokens of a vocabulary that are all blended

    def __init__(self, kind: str, pca: common.PCA, reader: common.Reader, codes: Tensor, counts: Tensor):
        """codes: [V,k] of the reader's frozen embeddings; counts: [V] of the training split."""
        super().__init__()
        k, d = codes.shape[1], reader.table.shape[1]
        share = counts / counts.sum()
        code_scale = (share @ codes.square()).mean().sqrt()
        self.kind = kind
        self.register_buffer("code_scale", code_scale)
        if kind == "codebook":
            self.table = reader.values  # the LLM's own: not saved with the wire
            self.keys = nn.Parameter(codes / code_scale)  # [V,k]
            # unit variance a dimension puts two tokens 2k apart on average; 20 / k was too soft to read at the start
            self.log_sharpness = nn.Parameter(torch.tensor(math.log(100 / k)))
        else:
            table_rms = (share @ reader.table.square()).mean().sqrt()
            self.weight = nn.Parameter(pca.components.T * code_scale / table_rms)  # [k,d]
            self.bias = nn.Parameter(pca.mean / table_rms)  # [d]
        if kind == "mlp":
            self.hidden = nn.Linear(k, self.HIDDEN)
            self.weight2 = nn.Parameter(torch.zeros(self.HIDDEN, d))

    def forward(self, codes: Tensor, target_rms: Tensor) -> Tensor:
        """codes: [N,k]; target_rms: scalar or [N,1]. Returns embeddings [N,d]."""
        z = codes / self.code_scale
        if self.kind == "codebook":
            blended = self.blended(z)
            keys, table = self.keys[blended], self.table[blended]  # [n,k], [n,d]
            blend = torch.softmax(self.scores(z, keys), dim=-1).to(table.dtype)
            return adapt(blend, table, table.new_zeros(table.shape[1]), target_rms).float()
        if self.kind == "mlp":
            z = torch.cat([z, F.gelu(self.hidden(z))], dim=1)  # [N, k+512]
            return adapt(z, torch.cat([self.weight, self.weight2]), self.bias, target_rms)
        return adapt(z, self.weight, self.bias, target_rms)

    def scores(self, z: Tensor, keys: Tensor) -> Tensor:
        """[N,n]: -|z - key|^2 * sharpness / 2, less its part with |z|^2, which is the same for all keys of a code.

        One operation, since [N,V] is large: nothing of that size is kept for the backward pass but the softmax of it.
        """
        sharpness = self.log_sharpness.exp()
        return torch.addmm(-0.5 * sharpness * keys.square().sum(1), sharpness * z, keys.T)

    @torch.no_grad()
    def blended(self, z: Tensor) -> Tensor | slice:
        """The tokens [n] that any of the codes z [N,k] blends with a weight above 1e-10; all of a small vocabulary.

        Wide codes lie far apart: 200 tokens of tiny, at k 24, blend 471. The others of a vocabulary of 128,000 together
        weigh less than 2e-5, and would be most of the work: a [N,V] by [V,d] product forward, and one backward.
        """
        if len(self.keys) <= self.SMALL:
            return slice(None)
        weight = torch.zeros_like(self.keys[:, 0])
        for part in z.split(1024):
            weight = torch.maximum(weight, torch.softmax(self.scores(part, self.keys), dim=-1).amax(0))
        # a code that is no number has no weight at or below that: it blends all, and what comes of it is none either
        return (~(weight <= 1e-10)).nonzero()[:, 0]


# ---------------------------------------------------------------------------------------------------------------------
# the wire: token ids -> message -> embeddings. Everything the receiver uses is in the message or in the trained wire.


class Wire:
    """Sender and receiver around an adapter.

    Message: uint32 count L, then L x k codes in `code_format`, then, if the RMS is sent, L numbers in that format:
    "<f2" (float16), or "<f4" in the identity control, so that nothing but the plumbing is under test.
    """

    def __init__(
        self, reader: common.Reader, pca: common.PCA, rms: str, constant_rms: Tensor, code_format: str = "<f2"
    ):
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
            raise common.UserError(f"the embeddings of {reader.name} do not fit into float16 codes")
        self.adapter: Adapter | None = None

    def target_rms(self, ids: Tensor) -> Tensor:
        return self.rms[ids] if self.rms_is_sent else self.constant_rms  # [N,1] or scalar

    def send(self, prompt: common.Prompt) -> bytes:
        """Token ids of a prompt -> message."""
        parts = [self.codes[prompt.ids]] + ([self.rms[prompt.ids]] if self.rms_is_sent else [])
        return struct.pack("<I", len(prompt.ids)) + b"".join(
            part.cpu().numpy().astype(self.code_format).tobytes() for part in parts
        )

    @torch.no_grad()
    def receive(self, message: bytes) -> Tensor:
        """Message -> embeddings [L,d]."""
        (count,) = struct.unpack_from("<I", message)
        numbers = torch.from_numpy(np.frombuffer(message, self.code_format, offset=4).astype(np.float32)).to(
            self.reader.device
        )
        codes, sent_rms = numbers[: count * self.width].view(count, self.width), numbers[count * self.width :]
        return self.adapter(codes, sent_rms[:, None] if self.rms_is_sent else self.constant_rms)


# ---------------------------------------------------------------------------------------------------------------------
# the loss: the embeddings that the code decodes to, and the answer that the LLM gives from them


def step_losses(
    wire: Wire, batch: common.Batch, targets: Tensor, sent_tokens: Tensor, variance: Tensor, with_kd: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(cross-entropy, MSE / variance, KL from the LLM reading text) of a micro-batch: its part of the batch's means.

    targets, sent_tokens: labels and tokens of the whole batch; variance: of an embedding number.
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
    logits = common.answer_logits(reader, batch, wired)  # [targets of this part, V]
    ce = F.cross_entropy(logits, batch.labels[batch.labels != common.IGNORE], reduction="sum") / targets
    kd = torch.zeros_like(ce)
    if with_kd:
        with torch.no_grad():
            teacher = common.answer_logits(reader, batch, embeddings).log_softmax(-1)
        kd = F.kl_div(logits.log_softmax(-1), teacher, log_target=True, reduction="sum") / targets
    return ce, mse, kd


def main() -> None:
    # -----------------------------------------------------------------------------------------------------------------
    # setup: arguments, frozen LLM, data
    args = parse_arguments()
    saved_tensors, saved_config = {}, None
    if args.eval_only:
        config_keys = ("embedding_width", *DEFAULTS, "controls.explained_variance", "metrics.train_seconds")
        tensor_keys = ("mean", "components", "target_rms")
        saved_tensors, saved_config = common.load_wire(args.eval_only, STAGE, config_keys, tensor_keys)
    common.settle_arguments(args, DEFAULTS, saved_config)
    if args.shape_only:
        import scale

        return scale.report(args)
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
    k = args.code_dim if args.code_dim is not None else max(1, d // 8)
    if k > d:
        raise common.UserError(f"--code-dim {k} is above the embedding width of {args.model}, {d}")
    data = common.load_data(args.data, reader, args.eval_examples)
    common.check_questions(reader, data)
    run_arguments = {key: value for key, value in vars(args).items() if key not in NOT_OF_THE_RUN}
    checkpoint_path = Path(args.out) / "checkpoint.safetensors"
    resumed = common.load_checkpoint(checkpoint_path, run_arguments, reader.fingerprint) if args.resume else None
    print(f"model {args.model}: V {vocabulary}, d {d}, fingerprint {reader.fingerprint}")
    size = "unlimited" if data.train is None else len(data.train)
    print(f"data {args.data} ({data.kind}): {size} training rows, {len(data.test)} test rows", flush=True)

    # -----------------------------------------------------------------------------------------------------------------
    # model: PCA (exact, from token counts), adapter. The LLM is frozen.
    counts = common.token_counts(reader, data, args.seed).to(device)
    full_pca = common.fit_pca(reader.table, counts)
    pca = full_pca.first(k)
    explained = pca.explained
    share = counts / counts.sum()  # [V] of the corpus
    constant_rms = (share @ reader.table.square().mean(1)).sqrt()
    if args.eval_only:
        pca.mean, pca.components = saved_tensors["mean"].to(device), saved_tensors["components"].to(device)
        constant_rms = saved_tensors["target_rms"].to(device)
        explained = saved_config["controls"]["explained_variance"]
        if pca.components.shape != (d, k):
            raise common.UserError(f"{args.eval_only}: its components are {list(pca.components.shape)}, not [{d}, {k}]")
    variance = (share @ (reader.table - share @ reader.table).square()).mean()  # of an embedding number, for the loss
    wire = Wire(reader, pca, args.rms, constant_rms)
    untrained = Adapter("linear", pca, reader, wire.codes, counts).to(device)
    adapter = Adapter(args.adapter, pca, reader, wire.codes, counts).to(device)
    start = Adapter(args.adapter, pca, reader, wire.codes, counts).to(device)  # stays so: what does training add?
    if args.eval_only:
        common.load_module(adapter, "adapter.", saved_tensors, args.eval_only)
    wire.adapter = adapter
    out = common.open_out(args.out)
    trained_parameters = sum(p.numel() for p in adapter.parameters())
    print(f"codes: k {k} of d {d} ({d / k:.3g}x fewer), {100 * explained:.1f}% of the variance")
    print(f"adapter {args.adapter}: {trained_parameters:,} trained parameters", flush=True)

    # -----------------------------------------------------------------------------------------------------------------
    # training
    history: list[dict] = []
    steps = 0 if args.eval_only else args.steps
    step, train_seconds = 0, 0.0
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0)
    if resumed:
        adapter.load_state_dict(resumed["adapter"])
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
        targets = sum((batch.labels != common.IGNORE).sum() for batch in batches)
        sent_tokens = sum(batch.sent.sum() for batch in batches)
        losses = {"loss_ce": 0.0, "loss_mse": 0.0, "loss_kd": 0.0}
        for batch in common.own_share(batches):  # all of them, unless torchrun started several processes
            ce, mse, kd = step_losses(wire, batch, targets, sent_tokens, variance, args.kd_weight > 0)
            (ce + mse + args.kd_weight * kd).backward()
            for name, value in zip(losses, (ce, mse, kd), strict=True):
                losses[name] += value.item()
        losses = dict(zip(losses, common.add_up(adapter.parameters(), list(losses.values())), strict=True))
        norm = torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        if guard.accepts(sum(losses.values()), norm.item(), step + 1):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        train_seconds = time.perf_counter() - started
        if step % 10 == 0 or step in (1, steps):
            row = {"step": step, "lr": args.lr * scale} | (losses if args.kd_weight else {**losses, "loss_kd": None})
            history.append(common.rounded(row))
            common.append_jsonl(out / "metrics.jsonl", history[-1] | {"seconds": round(train_seconds, 1)})
        progress.show(
            step, " ".join(f"{n.removeprefix('loss_')} {v:.3f}" for n, v in losses.items() if v or n != "loss_kd")
        )
        if guard.due(step):
            common.save_checkpoint(
                checkpoint_path,
                {
                    "adapter": adapter.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                    "train_seconds": train_seconds, "history": history, "arguments": run_arguments,
                    "fingerprint": reader.fingerprint, "guard": guard.state(),
                },
            )  # fmt: skip
            guard.saved(step)
            common.print_samples(reader, data, wire.send, wire.receive)
    guard.close()

    # -----------------------------------------------------------------------------------------------------------------
    # evaluation: the wire and every control, on test passages whose names were never seen
    print(f"evaluating on {len(data.test)} test rows", flush=True)
    eval_started = time.perf_counter()
    batch_size = 2 * args.micro_batch_size  # no gradients: twice the rows fit
    metrics, records = common.evaluate(reader, data, batch_size, wire.send, wire.receive)

    def control(other: Wire) -> tuple[float, list[str]]:
        """(F1 or NLL, answers) through another wire."""
        if data.kind == "text":
            return common.mean_nll(reader, data.test, batch_size, other.send, other.receive), []
        messages = [other.send(common.sent_prompt(reader, row)) for row in data.test]
        answers = common.generate(reader, messages, batch_size, other.receive)
        return common.score(answers, data.test)[0], answers

    print("  controls: PCA inverse, untrained adapter, identity wire", flush=True)
    untrained_wire = copy.copy(wire)
    untrained_wire.adapter = untrained
    inverse_score, _ = control(untrained_wire)
    start_score = inverse_score  # linear and mlp start there
    if args.adapter == "codebook":
        untrained_wire.adapter = start
        start_score, _ = control(untrained_wire)
    identity_wire = Wire(reader, full_pca, "sent", constant_rms, code_format="<f4")  # k = d: must read like text
    identity_wire.adapter = Adapter("linear", full_pca, reader, identity_wire.codes, counts).to(device)
    identity_score, identity_answers = control(identity_wire)
    same = sum(answer == record["text"] for answer, record in zip(identity_answers, records, strict=False))
    metrics |= {
        "stage": STAGE, "model": args.model, "data": args.data, "seed": args.seed,
        "steps": saved_config["arguments"]["steps"] if args.eval_only else args.steps,
        "train_seconds": saved_config["metrics"]["train_seconds"] if args.eval_only else train_seconds,
        "eval_seconds": time.perf_counter() - eval_started, "device": device.type,
        "dtype": str(dtype).removeprefix("torch."), "versions": common.versions(), "commit": common.commit(),
    }  # fmt: skip
    metrics = common.rounded(metrics)

    what, same_note = "NLL", "must equal the NLL from text"
    if identity_answers:
        what, same_note = "F1", f"{same} of {len(records)} answers are those from text"
    extra = [
        (
            f"PCA inverse: {what}",
            f"{inverse_score:.3f}",
            f"untrained; k {k}, {100 * explained:.1f}% of the variance",
        ),
        (f"{args.adapter} before training: {what}", f"{start_score:.3f}", ""),
        (f"identity wire: {what}", f"{identity_score:.3f}", f"k = d, RMS sent: {same_note}"),
    ]
    controls = {
        "pca_inverse": inverse_score,
        "untrained": start_score,
        "identity": identity_score,
        "explained_variance": explained,
    }
    if identity_answers:
        controls["identity_same_answers"] = same
    config = {
        "stage": STAGE, "model": args.model, "fingerprint": reader.fingerprint, "embedding_width": d, "code_dim": k,
        "adapter": args.adapter, "rms": args.rms, "kd_weight": args.kd_weight, "data": args.data,
        "arguments": saved_config["arguments"] if args.eval_only else run_arguments,
        "metrics": metrics, "controls": common.rounded(controls),
    }  # fmt: skip
    tensors = {"mean": pca.mean, "components": pca.components, "target_rms": wire.constant_rms}
    tensors |= {f"adapter.{name}": tensor for name, tensor in adapter.state_dict().items()}
    common.finish_run(
        out, tensors, config, history, records, extra, f"stage 1: {args.adapter}, {d} -> {k} numbers a token"
    )


if __name__ == "__main__":
    common.run(main)
