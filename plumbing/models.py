"""Loading an LLM, and refusing one that cannot serve: its files, its memory, how it reads embeddings."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.utils.checkpoint
from torch import Tensor

from plumbing import hub
from plumbing.launch import UserError, is_out_of_memory, name_of
from plumbing.wires import mark_as_read

if TYPE_CHECKING:
    from common import Reader

FLOATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
INTEGER_BYTES = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}  # of a number in a safetensors file


def check_directory(name: str, directory: Path) -> None:
    """Raises UserError if a model's directory lacks config, safetensors weights or tokenizer."""
    files = {path.name for path in directory.iterdir()}
    if "config.json" not in files:
        raise UserError(f"--model {name}: {directory} has no config.json; give a directory in the Hugging Face layout")
    if not any(file.endswith(".safetensors") for file in files):
        pickled = sorted(file for file in files if file.endswith((".bin", ".pt", ".pth", ".ckpt")))
        if pickled:
            raise UserError(
                f"--model {name}: {directory} has only pickled weights ({pickled[0]}), which can run code when loaded; "
                "convert them with save_pretrained(safe_serialization=True)"
            )
        raise UserError(f"--model {name}: {directory} has no weights in *.safetensors (pickled ones are never loaded)")
    if not files & {"tokenizer.json", "tokenizer.model", "vocab.json"}:
        raise UserError(f"--model {name}: {directory} has no tokenizer (tokenizer.json)")


def load_llm(name: str, directory: Path, device: torch.device, dtype: torch.dtype, split: bool) -> tuple:
    """(tokenizer, model on its device or devices) from a directory; code from the hub is never run.

    split: the layers over all GPUs, by accelerate. Weights that bitsandbytes saved in 8 or 4 bits stay so. Raises
    UserError for weights that do not fit into memory, do not load, or are not complete.
    """
    if split and importlib.util.find_spec("accelerate") is None:
        raise UserError("--device split needs accelerate, which moves data between the GPUs: pip install accelerate")
    mark_as_read(directory)
    check_directory(name, directory)
    check_weights(name, directory, dtype, device, split)
    hub.transformers.utils.logging.disable_progress_bar()  # stderr is for errors
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it explains itself at every layer in 8 bits
    local = dict(local_files_only=True, trust_remote_code=False)
    weights = dict(use_safetensors=True, dtype=dtype, output_loading_info=True, device_map="auto" if split else None)
    try:
        tokenizer = hub.AutoTokenizer.from_pretrained(directory, **local)
        model, loaded = hub.AutoModelForCausalLM.from_pretrained(directory, **local, **weights)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        line = str(error).strip().split("\n")[0][:200]
        raise UserError(f"--model {name}: {directory} does not load as a causal LM: {line}") from None
    if loaded["missing_keys"]:  # transformers would leave them random
        missing = sorted(loaded["missing_keys"])
        raise UserError(f"--model {name}: the weights in {directory} lack {missing[0]} ({len(missing)} missing in all)")
    if getattr(model, "is_loaded_in_4bit", False) and device.type == "cpu":
        raise UserError(f"--model {name}: bitsandbytes gives wrong gradients for weights in 4 bits on a CPU: use a GPU")
    if getattr(model, "is_quantized", False):  # transformers leaves what is not in few bits as it was saved
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype) if parameter.is_floating_point() else parameter.data
    if not split:
        return tokenizer, model.to(device)
    if torch.cuda.is_available() and {"cpu", "disk"} & set(model.hf_device_map.values()):
        gpus = f"{torch.cuda.device_count()} GPU(s)"
        raise UserError(f"--device split: {name} does not fit into the memory of {gpus}; --dry-run says what would")
    return tokenizer, model


def weight_bytes(directory: Path, dtype: torch.dtype) -> tuple[int, int]:
    """(bytes of a model's weights in this dtype, bytes of those that are converted), from the files' headers.

    Numbers of a float kind become `dtype` when loaded. (0, 0) where that cannot be told: the loader then says why.
    """
    try:
        from huggingface_hub import get_local_safetensors_metadata

        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        if config.get("quantization_config", {}).get("quant_method", "bitsandbytes") != "bitsandbytes":
            return 0, 0  # may be unpacked when it is loaded
        counts = get_local_safetensors_metadata(directory).parameter_count  # {"F32": numbers}
        floats = sum(counts.get(kind, 0) for kind in FLOATS.values())
        integers = sum(count * INTEGER_BYTES[kind] for kind, count in counts.items() if kind not in FLOATS.values())
    except Exception:
        return 0, 0
    return floats * dtype.itemsize + integers, (floats - counts.get(FLOATS[dtype], 0)) * dtype.itemsize


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can still have: of the GPU, or of the machine and its container; None if not known."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    found, group, unknown = [], Path("/sys/fs/cgroup"), (OSError, ValueError, IndexError)
    if device.type == "cpu":
        with contextlib.suppress(*unknown):
            found.append(1024 * int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]))
        with contextlib.suppress(*unknown):  # the limit is the word "max" where there is none
            limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
            pages = (group / "memory.stat").read_text()  # pages of files are given back when needed
            cached = sum(int(pages.split(f"\n{kind}_file ")[1].split()[0]) for kind in ("active", "inactive"))
            found.append(limit - used + cached)
    return min(found, default=None)


def check_memory(subject: str, need: float, device: torch.device, remedy: str) -> None:
    """Raises UserError where so many bytes are not free: a machine out of memory kills a process without a word."""
    free = free_memory(device)
    if free is not None and need > free:
        have = f"{free / 1e9:.1f} GB of memory are free ({device.type})"
        raise UserError(
            f"{subject} {need / 1e9:.1f} GB, and {have}: {remedy}; stage1_pca_adapter.py --dry-run says what fits where"
        )


def check_weights(name: str, directory: Path, dtype: torch.dtype, device: torch.device, split: bool) -> None:
    """Raises UserError if the weights of a model do not fit on the device, or the host cannot convert them."""
    total, converted = weight_bytes(directory, dtype)
    remedy = "use --dtype bfloat16 or a smaller model" if dtype == torch.float32 else "use a smaller model"
    # every process of a machine converts its own copy; weights that need no conversion are pages of one file
    on_host = converted * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.type == "cpu":
        check_memory(f"--model {name}: its weights take", total - converted + on_host, device, remedy)
        return
    if not split:  # over several GPUs, accelerate decides
        check_memory(f"--model {name}: its weights take", total, device, remedy)
    remedy = f"save it in {name_of(dtype)} once, with save_pretrained"
    check_memory(f"--model {name}: converting its weights takes", on_host, torch.device("cpu"), remedy)


def check_fingerprint(reader: Reader, config: dict, wire: str) -> None:
    """Raises UserError if a trained wire belongs to another LLM. config: the wire's, with its "fingerprint"."""
    if config["fingerprint"] != reader.fingerprint:
        raise UserError(
            f"{wire} was trained for another LLM: fingerprint {config['fingerprint']}, {reader.name} has "
            f"{reader.fingerprint}"
        )
    if config.get("embedding_width", reader.table.shape[1]) != reader.table.shape[1]:
        raise UserError(f"{wire}: its embedding_width is not that of {reader.name}, {reader.table.shape[1]}")


@torch.inference_mode()
def check_embeddings(reader: Reader, prompt: list[int]) -> None:
    """See, with two short prompts, that a wire can be put before this LLM. Raises UserError.

    It must read a token's embedding as it reads the token, ignore masked padding, see no token before its turn, and
    take vectors that are no token's embedding. Most causal LMs do; some look up more than one embedding for a token.
    """
    model, kind = reader.model, f"--model {reader.name}: a {type(reader.model).__name__}"
    if reader.prompt_tokens < 16:
        raise UserError(f"{kind} of {reader.context_tokens} tokens has no room for a prompt and an answer")
    ids = torch.tensor(prompt[: min(64, reader.prompt_tokens)])
    if int(ids.max()) >= len(reader.table):
        raise UserError(
            f"{kind} has {len(reader.table)} embeddings and its prompts the token {int(ids.max())}: the tokenizer is "
            "another model's, or the embeddings were not resized to it"
        )
    ids = ids.to(reader.device)  # [L]
    hidden = min(8, len(ids) // 3)  # how many tokens shorter the second prompt is
    shorter, columns = len(ids) - hidden, torch.arange(1, len(ids))
    prompts = torch.stack([ids, torch.cat([ids[:shorter], ids[:hidden]])])
    behind, before = torch.ones_like(prompts), torch.ones_like(prompts)  # padding behind the prompt, or before it
    behind[1, shorter:], before[1, :hidden] = 0, 0
    embeddings = reader.table[prompts]  # [2, L, d]
    padded = torch.cat([embeddings[0].mean(0).expand(hidden, -1), embeddings[1, :shorter]])  # padding is no token's
    settings = hub.GenerationConfig(
        max_new_tokens=2, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )

    def attempt(how: str, function: Callable, **inputs) -> Tensor:
        try:
            return function(**inputs)
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, ImportError, AssertionError) as error:
            if is_out_of_memory(error):
                raise
            line = str(error).strip().split("\n")[0][:160]
            raise UserError(f"{kind} does not run{how}: {line}") from None

    def logits(**inputs) -> Tensor:
        output = model(**inputs, attention_mask=behind, use_cache=False, logits_to_keep=columns)
        return output.logits.float()  # [2, L-1, V]

    def answer(**inputs) -> Tensor:
        output = model.generate(**inputs, attention_mask=before, generation_config=settings)
        return output.logits[0].float()  # [2, V] of the first token

    def alike(a: Tensor, b: Tensor) -> bool:
        return bool((a - b).norm() <= slack * b.norm())

    alone = " from embeddings alone"
    from_ids = attempt("", logits, input_ids=prompts)
    found = attempt(alone, logits, inputs_embeds=embeddings.to(reader.dtype))
    first = attempt(alone, answer, inputs_embeds=torch.stack([embeddings[0], padded]).to(reader.dtype))
    if found.shape[1] != len(columns):
        raise UserError(f"{kind} makes logits at every position, whatever is asked for")
    if not torch.isfinite(from_ids[0]).all():
        raise UserError(f"{kind} makes NaN or infinite logits: its weights are damaged, or not for {reader.dtype}")
    # measured: rounding is at most 0.008 in bfloat16 and 0.03 in 8 bits, an error at least 0.09. A router may waver
    config = model.config.get_text_config()
    has_experts = any((getattr(config, f"{name}_experts", 0) or 0) > 1 for name in ("num", "num_local", "n_routed"))
    exact = reader.dtype == torch.float32 and not getattr(model, "is_quantized", False)
    slack = 0.01 if exact else 0.2 if has_experts else 0.05
    if not alike(found[0], from_ids[0]):
        raise UserError(f"{kind} reads more of a token than its embedding, and a wire carries only that")
    if not alike(found[1, : shorter - 1], found[0, : shorter - 1]):
        raise UserError(f"{kind} looks at tokens that come later: it is no causal LM")
    if not alike(first, found[0, [-1, shorter - 2]]):
        raise UserError(f"{kind} does not ignore masked padding, so prompts cannot be answered in batches")


def checkpoint_layers(model: torch.nn.Module, on: bool = True) -> None:
    """Keep only the input of each of the LLM's layers for the backward pass, which then computes the layer again.

    transformers' own gradient checkpointing needs training mode, and with it the dropout of GPT-2 or OPT. Raises
    UserError if the architecture's layers are not marked for checkpointing.
    """
    layers = [module for module in model.modules() if isinstance(module, hub.GradientCheckpointingLayer)]
    if not layers:
        raise UserError(f"--gradient-checkpointing: the layers of a {type(model).__name__} cannot be told apart")
    for layer in layers:
        layer.forward = getattr(layer.forward, "once", layer.forward)  # as it was before an earlier call
        if on:
            layer.forward = twice(layer.forward)


def twice(forward: Callable) -> Callable:
    """A layer's forward that keeps nothing and is called again for the backward pass."""

    @functools.wraps(forward)
    def checkpointed(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return torch.utils.checkpoint.checkpoint(
            forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
        )

    checkpointed.once = forward
    return checkpointed
