"""Stage 2: from raw UTF-8 bytes. One thing is added to stage 1, a byte encoder, and its target is known token by token.

    bytes [N] -> encoder -> where tokens end, and a code [k] for each -> stage-1 adapter -> RMS match -> frozen LLM
    known        trained    known: the tokenizer's offsets, stage 1's PCA codes   proven         known        frozen

Why this works where stage 0 fails: stage 1 has shown that the LLM reads these codes through this adapter. So the
encoder needs no gradient through an LLM to learn what to say: it is told where each token ends and which code it has.

    loss = 10 * cross-entropy(token ends here?) + |code - PCA code|^2 / variance
           + cross-entropy(which token the adapter will read, if it is a codebook)
    last steps: + cross-entropy of the answer, through the LLM, encoder and adapter both learning at a tenth of the rate

At inference the sender never calls the LLM's tokenizer: it predicts the ends, and speaks stage 1's message format. The
encoder is a stack of convolutions, so a byte sees its 10 neighbours on each side and cost grows linearly with the
text: a tokenizer's merges are local. What was tried: depthwise convolutions of width 9 with an MLP (slower here, and
worse per step); codes from mean squared error alone (slower to the exact token than with the codebook's cross-entropy).

    python stage2_encoder.py                                         # the embedded reader; README has time and score
    python stage2_encoder.py --eval-only tiny/wires/stage2           # the shipped wire; stage2-qwen for tiny-qwen
    python stage2_encoder.py --model llama-7b --data squad --stage1 out/stage1 --micro-batch-size 4       # one GPU

Letters: B batch, N padded length in bytes, C encoder width, L tokens of a prompt, V vocabulary, d LLM embedding width,
k code width.
"""

import hashlib
import random
import struct
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from kernels.adapter import project
from stage1_pca_adapter import Adapter

STAGE = "stage2"
SHIPPED = {"tiny": "tiny/wires/stage1", "tiny-llama": "tiny/wires/stage1", "tiny-qwen": "tiny/wires/stage1-qwen"}
ABLATIONS = ("code-target", "boundary-target", "stage1-adapter", "pca")

# ---------------------------------------------------------------------------------------------------------------------
# arguments


def parse_arguments():
    parser = common.Parser(description=__doc__.split("\n")[0])
    common.add_arguments(parser, STAGE, steps=1200, batch_size=16, lr=3e-3)
    parser.add_argument("--stage1", metavar="WIRE_DIR", help="the trained stage-1 wire to start from; default: shipped")
    parser.add_argument(
        "--llm-steps", type=int, help="of the steps, how many last ones go through the LLM; default 100"
    )
    parser.add_argument("--without", choices=ABLATIONS, help="an ablation: leave this known target or start out")
    args = common.finish_arguments(parser)
    if args.llm_steps is not None and args.llm_steps < 0:
        parser.error(f"argument --llm-steps: must be 0 or more, not {args.llm_steps}")
    return args


# what a trained wire fixes: --eval-only reads these from its config.json and refuses other values
DEFAULTS = {"model": "tiny", "data": "tiny", "stage1": None, "llm_steps": 100, "without": None}

# ---------------------------------------------------------------------------------------------------------------------
# the encoder: bytes [B,N] -> token ends [B,N], features [B,N,C]; features of an end -> code [k]


class Encoder(nn.Module):
    """Residual convolutions over bytes. Byte 256 is padding, and the same as nothing: no code depends on it."""

    WIDTH, KERNEL, LAYERS = 128, 5, 5
    REACH = LAYERS * (KERNEL // 2)  # bytes that a byte sees on each side

    def __init__(self, k: int):
        super().__init__()
        C = self.WIDTH
        self.embedding = nn.Embedding(257, C)
        self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(self.LAYERS))
        self.convolutions = nn.ModuleList(nn.Conv1d(C, C, self.KERNEL, padding="same") for _ in range(self.LAYERS))
        self.mixers = nn.ModuleList(nn.Linear(C, C) for _ in range(self.LAYERS))
        self.norm = nn.LayerNorm(C)
        self.end = nn.Linear(C, 1)
        self.code = nn.Sequential(nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, k))

    def forward(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """data: [B,N] bytes. Returns logits [B,N] that a token ends with this byte, and features [B,N,C]."""
        real = (data < 256)[..., None]
        x = self.embedding(data)  # [B,N,C]
        for norm, convolution, mixer in zip(self.norms, self.convolutions, self.mixers, strict=True):
            y = convolution((norm(x) * real).transpose(1, 2)).transpose(1, 2)
            x = x + mixer(F.gelu(y))
        x = self.norm(x)
        return self.end(x)[..., 0], x


# ---------------------------------------------------------------------------------------------------------------------
# the wire: text -> message -> embeddings. The sender has the encoder; the receiver has adapter and LLM.


class Wire:
    """Message: uint32 count L, then L x k codes in float16, as in stage 1 with a constant RMS.

    A prompt starts with the codes of `prefix`, the tokens that stand for no text (a start token), which are constants.
    """

    def __init__(self, reader: common.Reader, encoder: Encoder, adapter: Adapter, prefix_codes: Tensor, rms: Tensor):
        self.reader, self.encoder, self.adapter = reader, encoder, adapter
        self.prefix_codes, self.constant_rms = prefix_codes, rms  # [P,k], scalar
        self.code_scale = adapter.code_scale
        self.fixed_length = 0  # in an ablation: bytes a token, instead of predicted ends

    @torch.no_grad()
    def segment(self, text: str) -> tuple[Tensor, Tensor]:
        """(ends [L] in bytes, codes [L,k]) that the encoder finds in a text."""
        data = common.to_bytes([text], self.reader.device)
        logits, features = self.encoder(data)  # [1,N], [1,N,C]
        is_end = logits[0] > 0
        if self.fixed_length:
            is_end = (torch.arange(data.shape[1], device=data.device) + 1) % self.fixed_length == 0
        is_end[-1] = True
        return is_end.nonzero()[:, 0] + 1, self.encoder.code(features[0, is_end]) * self.code_scale

    def send(self, prompt: common.Prompt) -> bytes:
        """Text of a prompt -> message. Its token ids are not looked at. Raises UserError for text that is no text.

        Of a text in which the encoder finds more tokens than the LLM takes, the last are sent.
        """
        _, codes = self.segment(self.reader.spelling.spell(prompt.text))
        room = self.reader.prompt_tokens - len(self.prefix_codes)
        codes = torch.cat([self.prefix_codes, codes[-room:]])
        return struct.pack("<I", len(codes)) + codes.cpu().numpy().astype("<f2").tobytes()

    @torch.no_grad()
    def receive(self, message: bytes) -> Tensor:
        """Message -> embeddings [L,d]."""
        (count,) = struct.unpack_from("<I", message)
        codes = torch.from_numpy(np.frombuffer(message, "<f2", offset=4).astype(np.float32)).to(self.reader.device)
        return self.adapter(codes.view(count, -1), self.constant_rms)


# ---------------------------------------------------------------------------------------------------------------------
# what the encoder learns from: prompts, and pieces of text that no prompt would hold


ODD = (
    "àâäåçéèêëíîïñóôöøœßúùûüýÿ" "ÀÉÖØŁŽ" "αβγδλπΩ" "жиляюДЖ" "אבג" "عرب" "中文字日本語" "ひらカナ" "한국어"
    "😀😂🚀🌍👍🏽🇫🇷❤️✨" "“”‘’–—…€£¥°±×÷→≤≥" "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~" "\t\n  "
)  # fmt: skip


def odd_text(rng: random.Random, prompt: str, reader: common.Reader) -> str:
    """A piece of a prompt with other casing, digits, accents, emoji, other scripts; or random tokens."""
    if rng.random() < 0.3:
        ids = [rng.randrange(len(reader.tokenizer)) for _ in range(rng.randint(1, 40))]
        return reader.tokenizer.decode(ids, skip_special_tokens=True) or "?"
    start = rng.randrange(len(prompt))
    words = prompt[start : start + rng.randint(1, 130)].split(" ")
    rate = rng.choice((0.1, 0.5, 1.0))
    for i, word in enumerate(words):
        if rng.random() > rate:
            continue
        kind = rng.randrange(7)
        if kind == 0:
            words[i] = word.upper()
        elif kind == 1:
            words[i] = word.lower() if rng.random() < 0.5 else word.title()
        elif kind == 2:
            words[i] = str(rng.randrange(10 ** rng.randint(1, 9)))
        elif kind == 3:
            words[i] = "".join(
                rng.choice("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(rng.randint(1, 12))
            )
        elif kind == 4:
            words[i] = "".join(rng.choice(ODD) if rng.random() < 0.3 else letter for letter in word)
        elif kind == 5:
            words[i] = "".join(rng.choice(ODD) for _ in range(rng.randint(1, 6)))
        else:
            words[i] = word + rng.choice(ODD) * rng.randint(1, 3)
    return " ".join(words) or "?"


def known_targets(reader: common.Reader, texts: list[str], data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(real [B,N] bool, is_end [B,N] bool, ids of the tokens that end there, in order), for training only.

    A text that the tokens do not spell (a character that the tokenizer does not know) teaches nothing: it is not real.
    """
    real, is_end, all_ids = data < 256, torch.zeros_like(data, dtype=torch.bool), []
    for i, text in enumerate(texts):  # data: of their spelling
        try:
            ids, ends = common.token_ends(reader, text)
        except common.UserError:
            real[i] = False
            continue
        is_end[i, torch.tensor(ends, device=data.device) - 1] = True
        all_ids += ids
    return real, is_end, torch.tensor(all_ids, dtype=torch.long, device=data.device)


def end_to_end(data: Tensor, *marks: Tensor) -> list[Tensor]:
    """Padded texts [B,N], and marks [B,N] of their bytes, as [1,M]: one text after another, just out of reach.

    The encoder says of every byte what it says of it in [B,N], with no work for the padding of short texts.
    """
    apart = Encoder.REACH
    kept = torch.arange(data.shape[1] + apart, device=data.device) < (data < 256).sum(1, keepdim=True) + apart
    return [F.pad(x, (0, apart), value=v)[kept][None] for x, v in ((data, 256), *((mark, 0) for mark in marks))]


def spells(reader: common.Reader, text: str) -> bool:
    try:
        common.token_ends(reader, text)
    except common.UserError:
        return False
    return True


def code_losses(wire: Wire, codes: Tensor, target_codes: Tensor, ids: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """(MSE / variance, cross-entropy of the token that the adapter will read) of predicted codes [n,k].

    Scalars: summed over the n tokens ids [n] and divided by the `tokens` of the whole step.
    """
    mse = ((codes - target_codes) / wire.code_scale).square().sum() / (tokens * codes.shape[1])
    if wire.adapter.kind != "codebook":
        return mse, torch.zeros_like(mse)
    z, keys = codes / wire.code_scale, wire.adapter.keys.detach()
    # the codebook's own softmax is close to one-hot: a softer one has a gradient from the first step on
    logits = -2.0 * (keys.square().sum(1) - 2 * z @ keys.T)  # [n,V]
    return mse, F.cross_entropy(logits, ids, reduction="sum") / tokens


def answer_loss(wire: Wire, rows: list[dict], batch: common.Batch, targets: int) -> Tensor:
    """Cross-entropy (scalar) of the answers when the LLM reads what encoder and adapter make of the prompts.

    Tokens end where they truly do, or where the encoder says so in a text that the tokens do not spell. Summed over
    `batch` of these rows and divided by the `targets` answer tokens of the whole step.
    """
    reader = wire.reader
    texts = [common.sent_prompt(reader, row).text for row in rows]
    data = common.to_bytes([reader.spelling.spell(text) for text in texts], reader.device)  # [B,N]
    real = data < 256
    line, real_line = end_to_end(data, real)
    logits, features = wire.encoder(line)
    if wire.fixed_length:
        is_end = (torch.arange(data.shape[1], device=data.device) + 1) % wire.fixed_length == 0
        is_end = is_end & real
    else:
        known, is_end, _ = known_targets(reader, texts, data)
        found = torch.zeros_like(real).masked_scatter(real, logits[real_line] > 0)
        is_end = torch.where(known.any(1, keepdim=True), is_end, found)
    is_end[torch.arange(len(data), device=data.device), real.sum(1) - 1] = True
    counts = is_end.sum(1).tolist()
    codes = (wire.encoder.code(features[real_line][is_end[real]]) * wire.code_scale).split(counts)  # [L,k] each
    received = wire.adapter(torch.cat([part for c in codes for part in (wire.prefix_codes, c)]), wire.constant_rms)
    spliced, embeddings = common.splice(reader, batch, received.split([len(wire.prefix_codes) + n for n in counts]))
    logits = common.answer_logits(reader, spliced, embeddings)
    return F.cross_entropy(logits, spliced.labels[spliced.labels != common.IGNORE], reduction="sum") / targets


def halve(reader: common.Reader, rows: list[dict]) -> list[dict]:
    """Windows of a text, of which the first half travels, as its text, and the LLM predicts the second.

    The first half is tokenised again, as whoever receives a text would. A half that does not survive that (cut inside
    a character, say) is left out.
    """
    halves = []
    for row in rows:
        middle = len(row["ids"]) // 2
        text = reader.tokenizer.decode(row["ids"][:middle], skip_special_tokens=True)
        ids = common.tokenize(reader, text) if text else []
        if text and reader.tokenizer.decode(ids, skip_special_tokens=True) == text:
            halves.append({"ids": (ids + row["ids"][middle:])[: reader.context_tokens], "sent": len(ids)})
    return halves


@torch.no_grad()
def measure_encoder(wire: Wire, table_codes: Tensor, rows: list[dict]) -> dict[str, float]:
    """How close the encoder comes to its targets on test prompts, in percent; cosine of codes less their mean.

    A text that the tokens do not spell has no targets: it is left out, and `no_targets` counts it.
    """
    reader, hits, found, real, exact, cosine, whole, left_out = wire.reader, 0, 0, 0, 0, 0.0, 0, 0
    directions = F.normalize(reader.table, dim=-1)  # [V,d] once: a 7B model's takes a second on a CPU
    for row in rows:
        text = common.sent_prompt(reader, row).text
        try:
            ids, ends = common.token_ends(reader, text)
        except common.UserError:
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


def main() -> None:
    # -----------------------------------------------------------------------------------------------------------------
    # setup: arguments, frozen LLM, data
    args = parse_arguments()
    saved_tensors, saved_config = {}, None
    if args.eval_only:
        config_keys = ("embedding_width", "code_dim", "adapter", *DEFAULTS, "metrics.train_seconds")
        tensor_keys = ("mean", "components", "target_rms", "prefix_codes")
        saved_tensors, saved_config = common.load_wire(args.eval_only, STAGE, config_keys, tensor_keys)
    common.settle_arguments(args, DEFAULTS, saved_config)
    if saved_config:
        args.seed = saved_config["arguments"]["seed"]
    if args.smoke and not args.eval_only:
        args.llm_steps = min(args.llm_steps, 4)
    device, device_reason = common.pick_device(args.device)
    split = args.device == "split"
    common.seed_everything(args.seed, device)
    dtype, dtype_reason = common.pick_dtype(args.dtype, device)
    print(
        f"device {device.type} ({device_reason}), dtype {str(dtype).removeprefix('torch.')} ({dtype_reason})",
        flush=True,
    )
    stage1_tensors, stage1_config = saved_tensors, saved_config
    if not args.eval_only:
        args.stage1 = args.stage1 or SHIPPED.get(args.model)
        if args.stage1 is None:
            raise common.UserError(
                f"stage 2 starts from a stage-1 wire: run stage1_pca_adapter.py --model {args.model}, then --stage1 DIR"
            )
        config_keys, tensor_keys = (
            ("embedding_width", "code_dim", "adapter", "rms"),
            ("mean", "components", "target_rms"),
        )
        where = common.HERE / args.stage1 if args.stage1 in SHIPPED.values() else args.stage1
        stage1_tensors, stage1_config = common.load_wire(str(where), "stage1", config_keys, tensor_keys)
        stage1_sha256 = hashlib.sha256((Path(where) / "wire.safetensors").read_bytes()).hexdigest()
        if stage1_config["rms"] != "constant":
            raise common.UserError(
                f"{args.stage1} sends each token's RMS; stage 2 starts from a wire with --rms constant"
            )
    reader = common.load_reader(args.model, device, dtype, args.gradient_checkpointing, split)
    common.check_fingerprint(reader, stage1_config, args.eval_only or args.stage1)
    vocabulary, d = reader.table.shape
    data = common.load_data(args.data, reader, args.eval_examples)
    common.check_questions(reader, data)
    if data.kind == "text":
        windows = len(data.test)
        data.train, data.validation, data.test = (
            halve(reader, part) for part in (data.train, data.validation, data.test)
        )
        if not data.train or not data.test:
            raise common.UserError(f"--data {args.data}: no window's first half is text that can be tokenised again")
        print(f"windows whose first half is text by itself: {len(data.test)} of {windows} test windows")
    tried = (data.train_rows(args.seed, 0, 16) + data.test)[:16]
    if not args.eval_only and not any(spells(reader, common.sent_prompt(reader, row).text) for row in tried):
        raise common.UserError(
            f"--model {args.model}: the names of its tokens do not spell its prompts, so token ends are not known"
        )
    run_arguments = {key: value for key, value in vars(args).items() if key not in ("out", "resume", "eval_only")}
    checkpoint_path = Path(args.out) / "checkpoint.safetensors"
    resumed = common.load_checkpoint(checkpoint_path, run_arguments, reader.fingerprint) if args.resume else None
    if resumed and resumed["stage1_sha256"] != stage1_sha256:
        raise common.UserError(
            f"--resume: {checkpoint_path} was made from another wire than {args.stage1} is now; start without --resume"
        )
    print(f"model {args.model}: V {vocabulary}, d {d}, fingerprint {reader.fingerprint}")
    size = "unlimited" if data.train is None else len(data.train)
    print(f"data {args.data} ({data.kind}): {size} training rows, {len(data.test)} test rows", flush=True)

    # -----------------------------------------------------------------------------------------------------------------
    # model: PCA and adapter of stage 1, and the encoder. The LLM is frozen.
    mean, components = stage1_tensors["mean"].to(device), stage1_tensors["components"].to(device)
    k = stage1_config["code_dim"]
    if tuple(components.shape) != (d, k):
        raise common.UserError(
            f"{args.eval_only or args.stage1}: its components are {list(components.shape)}, not {[d, k]}"
        )
    if args.without == "pca" and not args.eval_only:  # any k orthonormal directions instead of those of most variance
        components = torch.linalg.qr(torch.randn(d, k)).Q.to(device)
    table_codes = project(reader.table, mean, components).to(torch.float16).float()  # [V,k]
    ones = torch.ones(vocabulary, device=device)
    adapter = Adapter(
        stage1_config["adapter"], common.PCA(mean, components, torch.ones(d)), reader, table_codes, ones
    ).to(device)
    if args.eval_only or args.without not in ("pca", "stage1-adapter"):
        common.load_module(adapter, "adapter.", stage1_tensors, args.eval_only or args.stage1)
    elif args.without == "stage1-adapter":
        for parameter in adapter.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=parameter.std().item())
    prefix = common.prefix_ids(reader)
    encoder = Encoder(k).to(device)
    if args.eval_only:
        common.load_module(encoder, "encoder.", saved_tensors, args.eval_only)
    constant_rms = stage1_tensors["target_rms"].to(device)
    prefix_codes = saved_tensors["prefix_codes"].to(device) if args.eval_only else table_codes[prefix]
    wire = Wire(reader, encoder, adapter, prefix_codes, constant_rms)
    if args.without == "boundary-target":
        wire.fixed_length = 3  # about a token of the embedded readers
    out = common.open_out(args.out)
    trained_parameters = sum(p.numel() for p in encoder.parameters())
    print(f"encoder: {trained_parameters:,} trained parameters, a byte sees {Encoder.REACH} on each side", flush=True)
    print(f"adapter {adapter.kind} of {args.stage1}, k {k} of d {d}", flush=True)

    # -----------------------------------------------------------------------------------------------------------------
    # training
    history: list[dict] = []
    steps = 0 if args.eval_only else args.steps
    step, train_seconds = 0, 0.0
    through_llm_always = args.without in ("stage1-adapter", "code-target", "boundary-target")
    groups = [{"params": encoder.parameters()}, {"params": adapter.parameters()}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
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
        # warm-up over 5% of the steps, then linearly to zero; a tenth of that through the LLM
        scale = min(1.0, (step + 1) / (0.05 * steps), (steps - step) / (0.95 * steps))
        through_llm = step >= steps - args.llm_steps or through_llm_always
        if step == steps - args.llm_steps:
            guard.norms.clear()  # another loss has other gradients
        optimizer.param_groups[0]["lr"] = args.lr * scale
        optimizer.param_groups[1]["lr"] = args.lr * scale * (1.0 if through_llm_always else 0.1 if through_llm else 0.0)
        rows = data.train_rows(args.seed, step * args.batch_size, args.batch_size)
        parts = [rows[i * args.micro_batch_size : (i + 1) * args.micro_batch_size] for i in range(accumulation)]
        losses = {"loss_end": 0.0, "loss_mse": 0.0, "loss_token": 0.0, "loss_ce": 0.0}
        known = []  # of each part: bytes, which are real, which end a token, ids of the tokens
        rng = random.Random(f"{args.seed}-{step}-0")
        for part in parts if args.without != "boundary-target" else []:
            texts = [common.sent_prompt(reader, row).text for row in part]
            texts += [odd_text(rng, text, reader) for text in texts]
            data_bytes = common.to_bytes([reader.spelling.spell(text) for text in texts], device)  # [2B,N]
            real, is_end, ids = known_targets(reader, texts, data_bytes)
            known.append((*end_to_end(data_bytes, real, is_end), ids))
        batches = [common.make_batch(reader, part) for part in parts] if through_llm else []
        # every part's losses are its share of the whole step's means
        bytes_of_step = max(1, sum(int(real.sum()) for _, real, _, _ in known))
        tokens_of_step = max(1, sum(len(ids) for *_, ids in known))
        targets_of_step = sum(int((batch.labels != common.IGNORE).sum()) for batch in batches)
        # all micro-batches, unless torchrun started several processes
        for number, part in common.own_share(list(enumerate(parts))):
            total = torch.zeros((), device=device)
            if known:
                data_bytes, real, is_end, ids = known[number]
                logits, features = encoder(data_bytes)
                end = F.binary_cross_entropy_with_logits(logits[real], is_end[real].float(), reduction="sum")
                end = end / bytes_of_step
                total = total + 10 * end
                losses["loss_end"] += end.item()
            if known and args.without != "code-target":
                codes = encoder.code(features[is_end]) * wire.code_scale
                mse, token = code_losses(wire, codes, table_codes[ids], ids, tokens_of_step)
                total = total + mse
                losses["loss_mse"] += mse.item()
                if args.without != "stage1-adapter":  # there the keys are random: not a target, but to be learned
                    total = total + token
                    losses["loss_token"] += token.item()
            if through_llm:
                ce = answer_loss(wire, part, batches[number], targets_of_step)
                total = total + ce
                losses["loss_ce"] += ce.item()
            total.backward()
        summed = common.add_up([*encoder.parameters(), *adapter.parameters()], list(losses.values()))
        losses = dict(zip(losses, summed, strict=True))
        norm = torch.nn.utils.clip_grad_norm_([*encoder.parameters(), *adapter.parameters()], 1.0)
        if guard.accepts(sum(losses.values()), norm.item(), step + 1):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        train_seconds = time.perf_counter() - started
        if step % 10 == 0 or step in (1, steps):
            history.append(common.rounded({"step": step, "lr": args.lr * scale} | losses))
            common.append_jsonl(out / "metrics.jsonl", history[-1] | {"seconds": round(train_seconds, 1)})
        progress.show(step, " ".join(f"{n.removeprefix('loss_')} {v:.4f}" for n, v in losses.items() if v))
        if guard.due(step):
            common.save_checkpoint(
                checkpoint_path,
                {
                    "adapter": adapter.state_dict(), "encoder": encoder.state_dict(),
                    "optimizer": optimizer.state_dict(), "step": step, "train_seconds": train_seconds,
                    "history": history, "arguments": run_arguments, "fingerprint": reader.fingerprint,
                    "stage1_sha256": stage1_sha256, "guard": guard.state(),
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
    print("  controls: the encoder's own targets, the true codes through the same adapter", flush=True)
    controls = measure_encoder(wire, table_codes, data.test)

    def send_true_codes(prompt: common.Prompt) -> bytes:
        codes = table_codes[prompt.ids]
        return struct.pack("<I", len(codes)) + codes.cpu().numpy().astype("<f2").tobytes()

    if data.kind == "text":
        what, true_codes = "NLL", common.mean_nll(reader, data.test, batch_size, send_true_codes, wire.receive)
    else:
        messages = [send_true_codes(common.sent_prompt(reader, row)) for row in data.test]
        what, true_codes = "F1", common.score(common.generate(reader, messages, batch_size, wire.receive), data.test)[0]
    controls["true_codes"] = true_codes
    metrics |= {
        "stage": STAGE, "model": args.model, "data": args.data, "seed": args.seed,
        "steps": saved_config["arguments"]["steps"] if args.eval_only else args.steps,
        "train_seconds": saved_config["metrics"]["train_seconds"] if args.eval_only else train_seconds,
        "eval_seconds": time.perf_counter() - eval_started, "device": device.type,
        "dtype": str(dtype).removeprefix("torch."), "versions": common.versions(), "commit": common.commit(),
    }  # fmt: skip
    metrics = common.rounded(metrics)
    extra = [
        ("token ends: F1", f"{controls['boundary_f1']:.2f}", f"all right in {controls['whole_prompts']:.1f}% of texts"),
        ("exact tokens, %", f"{controls['exact_token']:.2f}", "nearest embedding after the adapter, at the right end"),
        ("cosine of codes", f"{controls['code_cosine']:.3f}", "with the PCA codes, at the right ends"),
        (f"true codes, same adapter: {what}", f"{true_codes:.3f}", "what the encoder is measured against"),
    ]  # fmt: skip
    config = {
        "stage": STAGE, "model": args.model, "fingerprint": reader.fingerprint, "embedding_width": d, "code_dim": k,
        "adapter": adapter.kind, "stage1": args.stage1, "llm_steps": args.llm_steps, "without": args.without,
        "data": args.data, "arguments": saved_config["arguments"] if args.eval_only else run_arguments,
        "metrics": metrics, "controls": common.rounded(controls),
    }  # fmt: skip
    tensors = {
        "mean": mean, "components": components, "target_rms": wire.constant_rms, "prefix_codes": wire.prefix_codes,
    }  # fmt: skip
    tensors |= {f"adapter.{name}": tensor for name, tensor in adapter.state_dict().items()}
    tensors |= {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    common.finish_run(out, tensors, config, history, records, extra, f"stage 2: bytes -> {k} numbers a token")


if __name__ == "__main__":
    common.run(main)
