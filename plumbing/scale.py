"""What a model needs, and what the wire adds to a training step: from the model's shape alone, without its weights.

    python stage1_pca_adapter.py --model llama-3.1-70b --dry-run                # counts bytes and FLOPs, allocates none
    python stage1_pca_adapter.py --model llama-7b --random-weights --steps 20             # times steps, on a GPU
    python stage1_pca_adapter.py --model llama-7b --random-weights 2 --steps 10           # two of its layers, on a CPU

Both look at one micro-batch of stage 1: LENGTH tokens a row, of which ANSWER are the answer, and the rest is sent.
The dry run *runs* that step on fake tensors, which have a shape and no numbers. So it counts the bytes alive at the
peak instead of guessing them, for every architecture of transformers.

Functions take `stage1`, the module whose step they measure, so that nothing here imports a stage.
"""

import contextlib
import gc
import json
import logging
import math
import os
import statistics
import time
import weakref
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop,
    sdpa_flop,
)

import kernels.adapter  # noqa: F401  registers torch.ops.latentwire
from common import IGNORE, MAX_NEW_TOKENS, PCA, Batch, Reader, answer_logits, embedding_table
from plumbing.hub import MODELS, transformers
from plumbing.launch import ROOT, UserError, commit, name_of, set_up, versions
from plumbing.models import check_memory, checkpoint_layers
from plumbing.report import print_table, rounded

logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # CannotTrace says it in one line

LENGTH, ANSWER = 512, 16  # tokens of a row, and of its answer: a long passage of SQuAD with its question
CARDS = {"24 GB": 24e9, "40 GB": 40e9, "80 GB": 80e9, "141 GB": 141e9}
USABLE = 0.92  # share of a card's memory; the driver and the libraries take the rest, or it is lost between blocks

# what config.json of these models says, so that their shapes are here without the hub
SHAPES = {
    "llama-7b": dict(max_position_embeddings=2048),  # transformers' defaults are this model's
    "llama-3.2-1b": dict(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-5, tie_word_embeddings=True,
    ),
    "llama-3.1-8b": dict(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-5,
    ),
    "llama-3.1-70b": dict(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-5,
    ),
}  # fmt: skip


def config_of(name: str, layers: int | None = None) -> transformers.PretrainedConfig:
    """The configuration of an alias, hub id or local directory, cut to so many layers. Raises UserError."""
    if name in SHAPES:
        config = transformers.LlamaConfig(**SHAPES[name])
    else:
        target = MODELS.get(name, name)
        where = ROOT / target if target.startswith("tiny/") else Path(os.path.expanduser(target))  # which never fails
        local = where.is_dir()
        try:
            config = transformers.AutoConfig.from_pretrained(where if local else target, local_files_only=local)
        except (OSError, ValueError, KeyError) as error:
            line = str(error).strip().split("\n")[0][:160]
            shapes = ", ".join(SHAPES)
            raise UserError(
                f"--model {name}: no config.json of it, here or on the hub ({line}); with no hub: {shapes}, a directory"
            ) from None
    text = config.get_text_config()
    if layers is not None:
        if layers > text.num_hidden_layers:
            raise UserError(f"--random-weights {layers}: {name} has {text.num_hidden_layers} layers")
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):  # of some architectures: one for each layer
            with contextlib.suppress(AttributeError):  # or made from their number
                text.layer_types = text.layer_types[:layers]
    return config


def random_reader(name: str, layers: int | None, device: torch.device, dtype: torch.dtype) -> Reader:
    """A frozen LLM of this shape with random weights. It has no tokenizer: batches are random ids."""
    config = config_of(name, layers)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.requires_grad_(False).eval()
    table, context = embedding_table(model), getattr(config.get_text_config(), "max_position_embeddings", LENGTH)
    return Reader(name, model, None, table, context, "random", device, dtype)


def random_batch(reader: Reader, rows: int, length: int, answer: int) -> Batch:
    """Ids with the frequencies of Zipf's law, so that some repeat as in real text. Tensors [rows, length]."""
    generator = torch.Generator().manual_seed(0)
    share = 1 / torch.arange(1, len(reader.table) + 1)
    ids = torch.multinomial(share, rows * length, replacement=True, generator=generator).view(rows, length)
    sent = (torch.arange(length) < length - answer).expand(rows, -1)
    labels = torch.where(sent, IGNORE, ids)
    return Batch(*(part.to(reader.device) for part in (ids, torch.ones_like(ids), sent, labels)))


def random_wire(stage1: ModuleType, reader: Reader, k: int, kind: str):
    """A wire as stage 1 builds it, around an adapter that has learned nothing: its speed is that of any other."""
    d, device = reader.table.shape[1], reader.device
    components, _ = torch.linalg.qr(torch.randn(d, k, device=device))
    pca = PCA(reader.table.mean(0), components, torch.ones(d, dtype=torch.float64))
    wire = stage1.Wire(reader, pca, reader.table.square().mean().sqrt())
    counts = torch.ones(len(reader.table), device=device)
    wire.adapter = stage1.Adapter(kind, pca, reader, wire.codes, counts).to(device)
    return wire


# attention on a CPU, which torch's counter leaves out
flop_registry.setdefault(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, sdpa_flop)
flop_registry.setdefault(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward, sdpa_backward_flop)


@register_flop_formula(torch.ops.latentwire.adapt)
def adapt_flops(codes, weight, bias, target, ids=None, *args, **kwargs) -> int:
    """The matmul [N,k] by [k,d]. Arguments: those of `kernels.adapter`, as shapes."""
    return 2 * (ids or codes)[0] * weight[0] * weight[1]


# ---------------------------------------------------------------------------------------------------------------------
# one training step, three ways


def steps_of(stage1: ModuleType, wire, batch: Batch) -> dict:
    """{name: step()}, each a forward and a backward pass over the batch.

    "wire" is a step of stage 1 through the LLM (--llm-steps), with AdamW's update. "LLM alone" is the same LLM on its
    own embeddings, with no wire. "plain" is the obvious way to write the wire: every token through the adapter, logits
    at every position.
    """
    reader, adapter = wire.reader, wire.adapter
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-4, betas=(0.9, 0.98), weight_decay=0.0)
    targets, sent, variance = (batch.labels != IGNORE).sum(), batch.sent.sum(), reader.table.var()

    def update(loss: Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def with_wire() -> None:
        ce, mse = stage1.llm_losses(wire, batch, targets, sent, variance)
        update(ce + mse)

    def alone() -> None:
        embeddings = reader.table[batch.ids].requires_grad_()
        logits = answer_logits(reader, batch, embeddings)
        F.cross_entropy(logits, batch.labels[batch.labels != IGNORE], reduction="sum").div(targets).backward()

    def plain() -> None:
        ids = batch.ids[batch.sent]
        decoded, real = wire.adapter(wire.codes, wire.target_rms(ids), ids), reader.table[ids]
        embeddings = reader.table[batch.ids].masked_scatter(batch.sent[..., None], decoded)
        output = reader.model(
            inputs_embeds=embeddings.to(reader.dtype), attention_mask=batch.attention, use_cache=False
        )
        logits = output.logits.float().flatten(0, 1)  # [B * T, V]
        ce = F.cross_entropy(logits, batch.labels.flatten(), ignore_index=IGNORE)
        update(ce + F.mse_loss(decoded, real) / variance)

    return {"wire": with_wire, "LLM alone": alone, "plain": plain}


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def peak_bytes(step, device: torch.device) -> int | None:
    """Memory of the process (on CUDA: of its tensors) at the peak of a step; None where that cannot be read."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if device.type != "cpu" or not reset.exists():
        return None
    reset.write_text("5")  # resets the peak
    step()
    return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of a large matmul: the ceiling that MFU is a share of."""
    side = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(8):
        synchronize(device)
        started = time.perf_counter()
        a @ b
        synchronize(device)
        times.append(time.perf_counter() - started)
    return 2 * side**3 / statistics.median(times[1:])


def measure(stage1: ModuleType, args, device: torch.device, dtype: torch.dtype) -> dict:
    """Time and memory of training steps of a model with random weights; prints a table. args: stage 1's."""
    remedy = (
        "time fewer layers (--random-weights LAYERS) or use --dtype bfloat16, --gradient-checkpointing or a smaller"
    )
    with contextlib.suppress(CannotTrace):
        traced = trace(stage1, args, dtype, args.gradient_checkpointing)
        need = traced["training_bytes"] + 4 * traced["logits_everywhere"]  # of the plain way, softmax and gradients too
        check_memory(f"--model {args.model}: a step takes", need, device, f"{remedy} --micro-batch-size")
    reader = random_reader(args.model, args.random_weights or None, device, dtype)
    vocabulary, d = reader.table.shape
    k, layers = args.code_dim or max(1, d // 8), reader.model.config.get_text_config().num_hidden_layers
    rows = args.micro_batch_size
    batch = random_batch(reader, rows, min(LENGTH, reader.context_tokens), ANSWER)
    one_row = Batch(batch.ids[:1], batch.attention[:1], batch.sent[:1], batch.labels[:1])
    wire = random_wire(stage1, reader, k, args.adapter)
    print(f"{args.model}, {layers} layers, random weights: V {vocabulary}, d {d}, {args.adapter} adapter, k {k}")
    print(f"{batch.ids.numel()} random tokens a step, {len(batch.ids[batch.sent].unique())} different", flush=True)
    steps = steps_of(stage1, wire, batch)

    def checkpointing(name: str) -> None:
        if args.gradient_checkpointing:
            checkpoint_layers(reader.model, name != "plain")

    peaks, flops, times = {}, {}, {name: [] for name in steps}
    for name, step in steps_of(stage1, wire, one_row).items():  # no checkpointing: MFU counts no work twice
        with FlopCounterMode(display=False) as counter:
            step()
        flops[name] = rows * counter.get_total_flops()
    unique = batch.ids[batch.sent].unique()  # of the whole batch, which are fewer than those of its rows together
    with FlopCounterMode(display=False) as counter:
        wire.adapter(wire.codes, wire.target_rms(unique), unique).sum().backward()
    wire.adapter.zero_grad(set_to_none=True)
    flops["wire"] = flops["LLM alone"] + counter.get_total_flops()
    for name, step in steps.items():
        checkpointing(name)
        step()  # what the first step alone does is not measured
        peaks[name] = peak_bytes(step, device)
    for _ in range(args.steps):  # in turns, so that what disturbs the machine disturbs all of them
        for name, step in steps.items():
            checkpointing(name)
            synchronize(device)
            started = time.perf_counter()
            step()
            synchronize(device)
            times[name].append(time.perf_counter() - started)
    rate, tokens = matmul_rate(device, dtype), batch.ids.numel()
    ways = {}
    for name, values in times.items():
        seconds = statistics.median(values)
        ways[name] = {
            "seconds": seconds, "tokens_per_second": tokens / seconds, "flops": flops[name],
            "mfu": flops[name] / seconds / rate, "peak_bytes": peaks[name],
        }  # fmt: skip

    def paired(function) -> float:
        return statistics.median(function(*values) for values in zip(*times.values(), strict=True))

    result = {
        "model": args.model, "layers": layers, "adapter": args.adapter, "d": d, "k": k, "vocabulary": vocabulary,
        "batch": list(batch.ids.shape), "unique_tokens": len(batch.ids[batch.sent].unique()),
        "gradient_checkpointing": args.gradient_checkpointing, "measured_steps": args.steps, "ways": ways,
        "matmul_flops_per_second": rate, "wire_share": paired(lambda wire, alone, plain: 1 - alone / wire),
        "plain_over_wire": paired(lambda wire, alone, plain: plain / wire),
        "memory_over_plain": peaks["wire"] / peaks["plain"] if peaks["plain"] else None,
    }  # fmt: skip
    print_table(
        f"a training step, {args.steps} times each, in turns",
        [
            (
                name,
                f"{row['seconds'] * 1e3:.0f} ms",
                f"{row['tokens_per_second']:.0f} tokens/s, MFU {100 * row['mfu']:.0f}% of a matmul's {rate / 1e12:.2g} "
                "TFLOP/s" + (f", peak {row['peak_bytes'] / 1e9:.2f} GB" if row["peak_bytes"] else ""),
            )
            for name, row in ways.items()
        ]
        + [
            ("share of the wire", f"{100 * result['wire_share']:.1f}%", "of a step"),
            ("plain / wire", f"{result['plain_over_wire']:.2f}x", "time"),
            ("wire / plain", f"{result['memory_over_plain'] or math.nan:.2f}x", "peak memory"),
        ],
    )
    return result


# ---------------------------------------------------------------------------------------------------------------------
# dry run: the same step on fake tensors


class PeakMemory(TorchDispatchMode):
    """Bytes of the tensors that are alive at once, at their peak, among those made inside. Fake ones count as real."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.alive = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.see(leaf.untyped_storage())
        return result

    def see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


class CannotTrace(UserError):
    """A step that cannot run on fake tensors."""


def trace(stage1: ModuleType, args, dtype: torch.dtype, checkpointing: bool) -> dict:
    """What one micro-batch of stage 1 takes: shapes, bytes at its peak, FLOPs. Mirrors `stage1.llm_losses`."""
    with FakeTensorMode(), PeakMemory() as memory:
        reader = random_reader(args.model, args.random_weights or None, torch.device("cpu"), dtype)
        V, d = reader.table.shape
        k = args.code_dim or max(1, d // 8)
        if k > d:
            raise UserError(f"--code-dim {k} is above the embedding width of {args.model}, {d}")
        text = reader.model.config.get_text_config()
        rows, length = args.micro_batch_size, min(LENGTH, reader.context_tokens)
        sent_tokens = rows * (length - ANSWER)
        unique_tokens = round(expected_unique_tokens(V, sent_tokens))
        pca = PCA(torch.zeros(d), torch.zeros(d, k), torch.zeros(d, dtype=torch.float64))
        codes = torch.zeros(V, k)

        def adapter_of(kind: str) -> torch.nn.Module:
            return stage1.Adapter(kind, pca, reader, codes, torch.ones(V))

        adapter, controls = adapter_of(args.adapter), [adapter_of(args.adapter), adapter_of("linear")]
        adapter.blended = lambda z: slice(None)  # fake tensors have no values: assume that every token is blended
        if checkpointing:
            checkpoint_layers(reader.model)
        gc.collect()
        resting = memory.peak = memory.now

        def step() -> None:
            embeddings = reader.table[torch.zeros(rows, length, dtype=torch.long)]  # [B,T,d]
            unique = torch.zeros(unique_tokens, dtype=torch.long)
            decoded, real = adapter(codes, torch.tensor(1.0), unique), reader.table[unique]  # [U,d]
            mse = ((decoded - real).square() * torch.ones(unique_tokens, 1)).sum()
            sent = (torch.arange(length) < length - ANSWER).expand(rows, -1)[..., None]
            wired = embeddings.masked_scatter(sent, decoded[torch.zeros(sent_tokens, dtype=torch.long)])
            output = reader.model(
                inputs_embeds=wired.to(dtype), attention_mask=torch.ones(rows, length, dtype=torch.long),
                use_cache=False, logits_to_keep=ANSWER + 1,
            )  # fmt: skip
            logits = output.logits[:, :-1].float().flatten(0, 1)  # [B * ANSWER, V]
            ce = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long), reduction="sum")
            (ce + mse).backward()

        try:
            step()
        except RuntimeError as error:  # some operations have no rule for tensors without numbers
            line, name = str(error).split("\n")[0][:120], type(reader.model).__name__
            raise CannotTrace(
                f"--model {args.model}: a step of a {name} cannot be counted in {name_of(dtype)} "
                f"without running it ({line}): try another --dtype, or time it with --random-weights"
            ) from None
        activations, flops = memory.peak - resting, 0
        if not checkpointing:
            with FlopCounterMode(display=False) as counter:  # in a step of its own: the counter keeps tensors alive
                step()
            flops = counter.get_total_flops()

        def size(*modules: torch.nn.Module) -> int:
            parts = {p for module in modules for p in (*module.parameters(), *module.buffers())}
            return sum(p.numel() * p.element_size() for p in parts)

        trained = sum(p.numel() for p in adapter.parameters())
        attention_heads = getattr(text, "num_attention_heads", 0)  # 0: states instead of keys and values
        heads = getattr(text, "num_key_value_heads", None) or attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // max(1, attention_heads)
        cache = 2 * text.num_hidden_layers * heads * head_dim * dtype.itemsize  # of one position
        used = [reader.table] + ([reader.values] if args.adapter == "codebook" else [])
        tables = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in used}
        tables.pop(reader.model.get_input_embeddings().weight.untyped_storage()._cdata, None)  # counted as weights
        held = {
            "weights": size(reader.model),
            "embedding table": sum(tables.values()),
            "codes and adapters": codes.numel() * 4 + size(adapter, *controls),
            "optimiser": 8 * trained,
        }
        evaluation = {
            "keys and values": 2 * rows * (length + MAX_NEW_TOKENS) * cache,
            "identity wire": 4 * (V * d + 2 * d * d),
        }
        return {
            "architecture": type(reader.model).__name__, "vocabulary": V, "d": d, "k": k,
            "layers": text.num_hidden_layers, "parameters": sum(p.numel() for p in reader.model.parameters()),
            "trained_parameters": trained, "batch": [rows, length], "unique_tokens": unique_tokens,
            "flops": flops, "held": held, "activations": activations, "evaluation": evaluation,
            "logits_everywhere": rows * length * V * 4,
            "training_bytes": sum(held.values()) + activations,
            "evaluation_bytes": sum(held.values()) + sum(evaluation.values()),
        }  # fmt: skip


def expected_unique_tokens(vocabulary: int, tokens: int) -> float:
    """Expected number of different ones among so many tokens that follow Zipf's law."""
    ranks = range(1, vocabulary + 1)
    total = sum(1 / rank for rank in ranks)
    return sum(1 - (1 - 1 / (rank * total)) ** tokens for rank in ranks)


def dry_run(stage1: ModuleType, args, dtype: torch.dtype) -> dict:
    """Print what stage 1 needs of a GPU and of the host for this model, and return it. args: stage 1's."""
    ways = {name: trace(stage1, args, dtype, on) for name, on in (("without", False), ("with", True))}
    shape = ways["without"]
    rows, length = shape["batch"]

    def gigabytes(count: float) -> str:
        return f"{count / 1e9:.2f} GB"

    held, step = shape["held"], {name: way["activations"] for name, way in ways.items()}
    training = {name: way["training_bytes"] for name, way in ways.items()}
    needs = {name: max(training[name], way["evaluation_bytes"]) for name, way in ways.items()}
    needs["default"] = shape["evaluation_bytes"]  # a step without the LLM needs less
    fits = {
        name: [card for card, memory in CARDS.items() if need <= USABLE * memory] or ["no single one"]
        for name, need in needs.items()
    }
    table = [
        ("parameters", f"{shape['parameters'] / 1e9:.3f} B", f"{shape['layers']} layers, d {shape['d']}, V "
         f"{shape['vocabulary']}; trained: {shape['trained_parameters'] / 1e6:.2f} M ({args.adapter}, k {shape['k']})"),
        ("weights", gigabytes(held["weights"]), f"{name_of(dtype)}, frozen: no gradients"),
        ("embedding table", gigabytes(held["embedding table"]), "float32"),
        ("codes and adapters", gigabytes(held["codes and adapters"]), "float32; the trained one, and two controls"),
        ("optimiser", gigabytes(held["optimiser"]), "AdamW, of the adapter alone"),
        ("evaluation", gigabytes(shape["evaluation_bytes"]), f"keys and values of {2 * rows} prompts, identity wire"),
        ("fits a GPU of", ", ".join(fits["default"]), "no step goes through the LLM, unless --llm-steps asks for it"),
        ("activations", gigabytes(step["without"]), f"of a step through the LLM: {rows} x {length} tokens at once"),
        ("", gigabytes(step["with"]), "with --gradient-checkpointing"),
        ("with --llm-steps", gigabytes(training["without"]), f"checkpointing: {gigabytes(training['with'])}"),
        ("fits a GPU of", ", ".join(fits["without"]), f"checkpointing: {', '.join(fits['with'])}"),
        ("not made", gigabytes(shape["logits_everywhere"]), "float32 logits at every position"),
        ("FLOPs of a micro-batch", f"{shape['flops'] / 1e12:.1f} T", "a third more with checkpointing"),
    ]  # fmt: skip
    where = "per GPU" if dtype == torch.bfloat16 else "per GPU, in float32"
    print_table(f"dry run: stage 1 on {args.model}, {where}", table)
    shared = {key: value for key, value in shape.items() if key not in ("activations", "training_bytes")}
    return {
        "model": args.model, "adapter": args.adapter, **shared,
        "activation_bytes": step, "training_bytes": training, "fits": fits,
    }  # fmt: skip


def report(args, stage1: ModuleType) -> None:
    """Print what --dry-run or --random-weights asks for; the last line is JSON. args: stage 1's."""
    if args.dry_run:
        dtype = torch.float32 if args.dtype == "float32" else torch.bfloat16  # `auto` is bfloat16 on a GPU
        result = dry_run(stage1, args, dtype)
    else:
        device, dtype = set_up(args)
        result = measure(stage1, args, device, dtype)
        result["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        result["threads"] = torch.get_num_threads()
    result |= {"dtype": name_of(dtype), "versions": versions(), "commit": commit()}
    print(json.dumps(rounded(result)))
