"""Plumbing that the four stages share: models, data, scorer, PCA, generation, controls, run directories.

Nothing here learns anything; every idea of the ladder is in the stage files. Read `stage1_pca_adapter.py` first.

Letters: N tokens, B batch, T padded length, L tokens of a prompt, V vocabulary, d LLM embedding width, k code width.
"""

import argparse
import contextlib
import errno
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import platform
import random
import re
import signal
import statistics
import string
import subprocess
import sys
import threading
import time
import unicodedata
import urllib.request
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
import transformers
from torch import Tensor

# transformers asks for a package that is called kernels, too, and would be given the folder beside this file
transformers.utils.is_kernels_available = transformers.utils.import_utils.is_kernels_available = lambda *_, **__: False

from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig  # noqa: E402
from transformers.modeling_layers import GradientCheckpointingLayer  # noqa: E402

from tiny import world  # noqa: E402

try:
    import fcntl
except ImportError:  # Windows: --out is not locked there
    fcntl = None

HERE = Path(__file__).resolve().parent
IGNORE = -100  # a label that is no target
MAX_NEW_TOKENS = 32
MAX_LINE = 64 << 20  # bytes of a JSONL row
CHUNK_TOKENS = 256  # a .txt file is cut into windows of this many tokens

# alias -> hub id, or the directory of an embedded reader
MODELS = {
    "tiny": "tiny/tiny-llama",
    "tiny-llama": "tiny/tiny-llama",
    "tiny-qwen": "tiny/tiny-qwen",
    "llama-7b": "huggyllama/llama-7b",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "llama-3.1-70b": "meta-llama/Llama-3.1-70B-Instruct",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.3",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
}

# official SQuAD v1.1 files: name -> (address, bytes, sha256)
SQUAD = {
    "train-v1.1.json": (
        "https://rajpurkar.github.io/SQuAD-explorer/dataset/train-v1.1.json",
        30_288_272,
        "3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955",
    ),
    "dev-v1.1.json": (
        "https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v1.1.json",
        4_854_279,
        "95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9",
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# errors and arguments: what the user can mend is one line on stderr and exit code 2


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, and what to do."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line (its own print the whole usage first)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> None:
        self.exit(2, f"error: {message} (--help lists the flags)\n")


def positive_int(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return value


def seed_int(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 2**32):
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 4294967295, not {text!r}")
    return int(text)


def add_arguments(parser: Parser, stage: str, steps: int, batch_size: int, lr: float) -> None:
    """The flags that the four stages share, with the stage's defaults."""
    parser.add_argument("--model", help="alias, hub id or local directory; default: tiny")
    parser.add_argument("--data", help="tiny, squad, or a FILE (.json, .jsonl, .txt); default: tiny")
    parser.add_argument("--out", help=f"run directory; default: out/{stage}")
    parser.add_argument("--steps", type=positive_int, default=steps, help="optimiser steps (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=positive_int, default=batch_size, help="rows per optimiser step (default: %(default)s)"
    )
    parser.add_argument("--micro-batch-size", type=positive_int, help="rows in memory at once; default: the batch size")
    parser.add_argument("--lr", type=positive_float, default=lr, help="peak learning rate (default: %(default)s)")
    parser.add_argument(
        "--seed", type=seed_int, default=0, help="of everything random in training (default: %(default)s)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps", "split"), default="auto", help="split: the "
                        "LLM's layers over all GPUs (default: %(default)s)")  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the LLM (default: %(default)s)"
    )
    parser.add_argument("--gradient-checkpointing", action="store_true", help="compute the LLM's layers twice and keep "
                        "less of them in memory")  # fmt: skip
    parser.add_argument("--eval-examples", type=positive_int, default=1000, help="test rows (default: %(default)s)")
    parser.add_argument("--eval-only", metavar="WIRE_DIR", help="evaluate a trained wire; its config names the model")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--smoke", action="store_true", help="everything, tiny: a few steps, 40 test rows")
    parser.set_defaults(stage=stage)


def finish_arguments(parser: Parser) -> argparse.Namespace:
    """Parse, apply --smoke, and check what argparse cannot."""
    args = parser.parse_args()
    stage = vars(args).pop("stage")
    if args.smoke:
        args.steps, args.eval_examples = min(args.steps, 12), min(args.eval_examples, 40)
    if args.out is None:
        args.out = f"out/{stage}" + ("-smoke" if args.smoke else "") + ("-eval" if args.eval_only else "")
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # as torchrun says
    if args.micro_batch_size is None:  # the largest that gives every process one
        sizes = range(1, args.batch_size // processes + 1)
        args.micro_batch_size = max((size for size in sizes if args.batch_size % size == 0), default=args.batch_size)
    if args.batch_size % args.micro_batch_size:
        parser.error(f"--batch-size {args.batch_size} is not a multiple of --micro-batch-size {args.micro_batch_size}")
    if args.batch_size // args.micro_batch_size < processes:
        parser.error(
            f"--batch-size {args.batch_size} is {args.batch_size // args.micro_batch_size} micro-batches of "
            f"{args.micro_batch_size}: too few for {processes} processes"
        )
    if args.device == "split" and processes > 1:
        parser.error("--device split is one process that has all GPUs: start it with python, not torchrun")
    if args.lr > 100:
        parser.error(f"argument --lr: {args.lr:g} only diverges; Adam's useful range is about 1e-5 to 1e-2")
    if args.eval_only and Path(args.eval_only).resolve() == Path(args.out).resolve():
        parser.error(f"--out {args.out} is the wire under evaluation and would be overwritten: give another directory")
    if args.resume and args.eval_only:
        parser.error("--resume continues a training run and --eval-only has none: drop one of them")
    return args


def settle_arguments(args: argparse.Namespace, defaults: dict, saved_config: dict | None) -> None:
    """Fill in flags that were not given: from the trained wire if there is one, else from `defaults`.

    A wire was trained for one model, code width and adapter: UserError if a flag asks for another. Other data may.
    """
    for key, default in defaults.items():
        given = getattr(args, key)
        if saved_config is None:
            setattr(args, key, default if given is None else given)
        elif given is None:
            setattr(args, key, saved_config[key])
        elif key == "model" and (MODELS.get(given) == MODELS.get(saved_config[key], "") or Path(given).is_dir()):
            continue  # another name of the same model, or a directory: the fingerprint decides
        elif given != saved_config[key] and key != "data":
            flag = "--" + key.replace("_", "-")
            raise UserError(f"{flag} {given}: the wire in {args.eval_only} was trained with {flag} {saved_config[key]}")


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    signs = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)


def run(main: Callable[[], None]) -> None:
    """Call a stage's main(); a UserError, a full disk or lack of memory ends in one line and exit code 2."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # an answer may hold what a Windows pipe cannot
    commit()  # of the code that runs, not of what the checkout has become when it ends
    stdout, started = sys.stdout, False
    handlers = {number: signal.getsignal(number) for number in Guard.SIGNALS}
    try:
        started = join_processes()
        if rank():  # the first process speaks for all
            sys.stdout = open(os.devnull, "w")
        main()
    except UserError as error:
        if rank():
            time.sleep(3)  # what is wrong in the first too is said there, and torchrun then ends this one
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        print(f"error: {error.strerror or error}: {error.filename or 'while reading or writing'}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        remedy = "use --gradient-checkpointing or a smaller --micro-batch-size"
        print(f"error: out of memory: {remedy}; with --resume it goes on from the last checkpoint", file=sys.stderr)
        sys.exit(2)
    finally:
        sys.stdout = stdout
        if started:
            torch.distributed.destroy_process_group()
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)
        while _locks:
            lock = _locks.pop()
            Path(lock.name).unlink(missing_ok=True)
            lock.close()


# ---------------------------------------------------------------------------------------------------------------------
# several processes, where torchrun started them: each takes its micro-batches of every step and its test rows


def join_processes() -> bool:
    """Meet the other processes that torchrun started; True if this call did it, False for one process alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or torch.distributed.is_initialized():
        return False
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group()  # NCCL for what is on GPUs, gloo for the rest
    return True


def rank() -> int:
    """The number of this process: 0 writes and speaks."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def process_count() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def own_share(items: Sequence) -> list:
    """Those of the items (a step's micro-batches) that this process works on; all of them if it is alone."""
    return list(items)[rank() :: process_count()]


def spread(work: Callable, items: Sequence) -> list:
    """[work(item) for item in items], each item in one of the processes, and every process gets all the results."""
    mine = [work(item) for item in own_share(items)]
    if process_count() == 1:
        return mine
    shares: list = [None] * process_count()
    torch.distributed.all_gather_object(shares, mine)  # pickled, but only among the processes of one run
    return [shares[i % len(shares)][i // len(shares)] for i in range(len(items))]


def add_up(parameters: Iterable[Tensor], values: list[float]) -> list[float]:
    """Sum the gradients, in place, and the values over the processes. Bit for bit the same result in each of them."""
    if process_count() == 1:
        return values
    parameters = list(parameters)
    has_gradient = [float(p.grad is not None) for p in parameters]  # a process may have had no part in one
    numbers = torch.tensor(has_gradient + values, dtype=torch.float64)
    torch.distributed.all_reduce(numbers)
    for p, count in zip(parameters, numbers.tolist(), strict=False):
        if count and p.grad is None:
            p.grad = torch.zeros_like(p)
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
    return numbers[len(parameters) :].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# device, dtype, seed, versions


def pick_device(name: str) -> tuple[torch.device, str]:
    """(device, why). `auto` takes CUDA, else the CPU; MPS only when asked for, since it has been silently wrong.

    With `split` it is the device of what is not a layer of the LLM: codes, adapters, batches, logits.
    """
    if name in ("auto", "split"):
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device()), f"CUDA: {torch.cuda.get_device_name()}"
        return torch.device("cpu"), f"no CUDA device; {torch.get_num_threads()} threads"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: this torch sees no CUDA device; use --device cpu or install a CUDA build of torch"
        )
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this torch sees no Apple GPU; use --device cpu")
    return torch.device(name), "asked for"


def pick_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """(dtype of the LLM, why)."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name], "asked for"
    if device.type == "cuda":
        return torch.bfloat16, "CUDA: halves memory, and LLMs are trained in it"
    return torch.float32, "exact and reproducible off CUDA"


def seed_everything(seed: int, device: torch.device) -> None:
    """Seed every generator; on the CPU also forbid atomic adds (two threads summed gradients in a varying order)."""
    torch.use_deterministic_algorithms(device.type == "cpu")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    return found | {"numpy": np.__version__, "safetensors": safetensors.__version__}


@functools.cache
def commit() -> str | None:
    """The commit of this checkout when the run began, with "-dirty" if its code was changed; None outside git."""
    try:
        git = ["git", "-C", str(HERE)]
        top = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, timeout=10)
        if top.returncode:
            return None
        code = [*git, "status", "--porcelain", "-uno", "--", ":/", ":(top,exclude)results"]  # results change no result
        changed = subprocess.run(code, capture_output=True, text=True, timeout=10)
        return top.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")
    except (OSError, subprocess.TimeoutExpired):
        return None


# ---------------------------------------------------------------------------------------------------------------------
# models


@dataclass
class Reader:
    """A frozen causal LM and what the stages need to know of it."""

    name: str  # as the user gave it
    model: torch.nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    table: Tensor  # [V, d] float32: what the LLM takes as inputs_embeds for each token
    context_tokens: int
    fingerprint: str
    device: torch.device
    dtype: torch.dtype

    @property
    def prompt_tokens(self) -> int:
        """The longest prompt, with room for the answer."""
        return self.context_tokens - MAX_NEW_TOKENS

    @functools.cached_property
    def values(self) -> Tensor:
        """[V, d] the table in the LLM's own dtype, which holds its numbers exactly: what a codebook blends."""
        module = self.model.get_input_embeddings()
        if type(module) is torch.nn.Embedding and module.weight.dtype == self.dtype:  # Gemma's is one that scales
            return module.weight.detach()  # no second copy
        return self.table.to(self.dtype)

    @functools.cached_property
    def spelling(self) -> "Spelling":
        return Spelling.of(self.tokenizer)

    @property
    def eos_ids(self) -> list[int]:
        """Tokens that end an answer (an instruct model may have several)."""
        listed = self.model.generation_config.eos_token_id
        listed = listed if isinstance(listed, list) else [listed]
        return sorted({i for i in [*listed, self.tokenizer.eos_token_id] if i is not None})


def find_model(name: str) -> Path:
    """The local directory of an alias, a hub id (fetched into the hub's cache) or a directory.

    Raises UserError for an unknown name, an unreachable or gated repository, and pickle-only weights.
    """
    known = ", ".join(MODELS)
    target = MODELS.get(name, name)
    if name in MODELS and target.startswith("tiny/"):
        return HERE / target
    local = Path(target).expanduser()
    if local.is_dir():
        return local
    if target.startswith((".", "/", "~")) or target.count("/") != 1 or "\\" in target or local.exists():
        raise UserError(f"--model {name}: no such alias, hub id or directory; the aliases are {known}")
    from huggingface_hub import errors as hub_errors
    from huggingface_hub import snapshot_download

    address = f"https://huggingface.co/{target}"
    try:
        wanted = ["*.safetensors", "*.json", "tokenizer*", "*.model", "merges.txt", "*.jinja"]
        return Path(snapshot_download(target, allow_patterns=wanted, ignore_patterns=["original/*", "consolidated*"]))
    except hub_errors.GatedRepoError:
        raise UserError(
            f"--model {name}: {address} is gated: ask for access there, then set HF_TOKEN, or give a local directory"
        ) from None
    except (hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError):
        raise UserError(
            f"--model {name}: {address} does not exist or is private (set HF_TOKEN); the aliases are {known}"
        ) from None
    except Exception as error:  # the hub's client raises its HTTP library's errors too, and that library has changed
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        raise UserError(
            f"--model {name}: cannot reach {address} and it is not in the cache ({type(error).__name__}); "
            "go online once, or give a local directory with config.json, *.safetensors and tokenizer.json"
        ) from None


def load_reader(
    name: str, device: torch.device, dtype: torch.dtype, checkpointing: bool = False, split: bool = False
) -> Reader:
    """Load and freeze a causal LM from safetensors; code from the hub is never run. checkpointing: `checkpoint_layers`.

    split: its layers over all GPUs, by accelerate, which moves what goes from one to the next. Weights that were saved
    in 8 or 4 bits by bitsandbytes stay so. Raises UserError for a directory without config, weights or tokenizer, for
    weights that do not load or do not fit, and for an LLM that no wire can be put before (`check_embeddings`).
    """
    if split and importlib.util.find_spec("accelerate") is None:
        raise UserError("--device split needs accelerate, which moves data between the GPUs: pip install accelerate")
    directory = find_model(name)
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
    transformers.utils.logging.disable_progress_bar()  # stderr is for errors
    # of weights in 8 bits it says at every layer how it works
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    check_weights(name, directory, dtype, device, split)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            directory,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=dtype,
            output_loading_info=True,
            device_map="auto" if split else None,
        )
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
    # greedy means greedy: a repetition penalty from the model's own file would punish copying, but only from text
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    model.requires_grad_(False)  # frozen: only what a stage builds itself is ever trained
    model.eval()
    if split:
        if torch.cuda.is_available() and {"cpu", "disk"} & set(model.hf_device_map.values()):
            gpus = f"{torch.cuda.device_count()} GPU(s)"
            raise UserError(f"--device split: {name} does not fit into the memory of {gpus}; --dry-run says what would")
    else:
        model.to(device)
    if checkpointing:
        checkpoint_layers(model)
    table = embedding_table(model)
    device = table.device if split else device
    if tokenizer.vocab_size > len(table):  # fewer is common: tables are padded
        raise UserError(
            f"--model {name}: its tokenizer has {tokenizer.vocab_size} tokens and its embeddings {len(table)}: "
            "the tokenizer is another model's"
        )
    context_tokens = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048
    reader = Reader(name, model, tokenizer, table, context_tokens, fingerprint(model), device, dtype)
    check_embeddings(reader)
    return reader


# bytes of a number in a safetensors file. Those of a kind that a model is trained in become the LLM's dtype when loaded
FILE_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def weight_bytes(directory: Path, dtype: torch.dtype) -> tuple[int, int]:
    """(bytes of a model's weights in this dtype, of which are converted) from the headers of its *.safetensors.

    (0, 0) if they cannot be read, or are in a form whose size in memory is not known.
    """
    index, whole = directory / "model.safetensors.index.json", directory / "model.safetensors"
    own_dtype = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    total = converted = 0
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        if config.get("quantization_config", {}).get("quant_method", "bitsandbytes") != "bitsandbytes":
            return 0, 0  # may be unpacked when it is loaded
        if whole.exists():
            files = {whole}
        elif index.exists():
            files = {directory / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        else:
            files = set(directory.glob("*.safetensors"))
        for path in files:
            with safetensors.safe_open(path, "pt") as file:
                for part in map(file.get_slice, file.keys()):
                    kind = part.get_dtype()
                    is_float = kind in ("F64", "F32", "F16", "BF16")
                    size = math.prod(part.get_shape()) * (dtype.itemsize if is_float else FILE_DTYPES[kind])
                    total += size
                    converted += size if is_float and kind != own_dtype else 0
    except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError):
        return 0, 0  # what is wrong with them is said when they are loaded
    return total, converted


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can still have: of the GPU, or of the machine and its container; None if not known."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    found, group, unknown = [], Path("/sys/fs/cgroup"), (OSError, ValueError, IndexError)
    if device.type == "cpu":
        with contextlib.suppress(*unknown):
            found.append(1024 * int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]))
        with contextlib.suppress(*unknown):  # the limit is a word where there is none
            limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
            pages = (group / "memory.stat").read_text()  # of files: given back when needed
            cached = sum(int(pages.split(f"\n{kind}_file ")[1].split()[0]) for kind in ("active", "inactive"))
            found.append(limit - used + cached)
    return min(found, default=None)


def check_memory(what: str, need: float, device: torch.device, remedy: str) -> None:
    """Raises UserError where so many bytes are not free: a machine that runs out of memory ends a process unheard."""
    free = free_memory(device)
    if free is not None and need > free:
        have = f"{free / 1e9:.1f} GB of memory are free ({device.type})"
        raise UserError(
            f"{what} {need / 1e9:.1f} GB, and {have}: {remedy}; stage1_pca_adapter.py --dry-run says what fits where"
        )


def check_weights(name: str, directory: Path, dtype: torch.dtype, device: torch.device, split: bool) -> None:
    """Raises UserError if the weights of a model do not fit on the device, or the host cannot convert them."""
    total, converted = weight_bytes(directory, dtype)
    remedy = "use --dtype bfloat16 or a smaller model" if dtype == torch.float32 else "use a smaller model"
    # every process of a machine converts them for itself; what needs no conversion are pages of one file
    on_host = converted * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.type == "cpu":
        check_memory(f"--model {name}: its weights take", total - converted + on_host, device, remedy)
        return
    if not split:  # over several GPUs accelerate has the say
        check_memory(f"--model {name}: its weights take", total, device, remedy)
    remedy = f"save it in {str(dtype).removeprefix('torch.')} once, with save_pretrained"
    check_memory(f"--model {name}: converting its weights takes", on_host, torch.device("cpu"), remedy)


@torch.inference_mode()
def check_embeddings(reader: Reader) -> None:
    """See that a wire can be put before this LLM. Raises UserError.

    It must read a token's embedding as it reads the token, masked padding as nothing, no token before its turn, and
    also what is no token's embedding. Most causal LMs do; some look up more than one embedding for a token.
    """
    model, kind = reader.model, f"--model {reader.name}: a {type(reader.model).__name__}"
    if reader.prompt_tokens < 16:
        raise UserError(f"{kind} of {reader.context_tokens} tokens has no room for a prompt and an answer")
    ids = torch.tensor(tokenize(reader, as_prompt(reader, PROMPT))[: min(64, reader.prompt_tokens)])
    if int(ids.max()) >= len(reader.table):
        raise UserError(f"{kind} has {len(reader.table)} embeddings and its prompts the token {int(ids.max())}: the "
                        "tokenizer is another model's, or the embeddings were not resized to it")  # fmt: skip
    ids = ids.to(reader.device)  # [L]
    hidden = min(8, len(ids) // 3)  # tokens that the second prompt is shorter
    shorter, columns = len(ids) - hidden, torch.arange(1, len(ids))
    prompts = torch.stack([ids, torch.cat([ids[:shorter], ids[:hidden]])])
    behind, before = torch.ones_like(prompts), torch.ones_like(prompts)
    behind[1, shorter:], before[1, :hidden] = 0, 0
    embeddings = reader.table[prompts]  # [2, L, d]
    padded = torch.cat([embeddings[0].mean(0).expand(hidden, -1), embeddings[1, :shorter]])  # with what is no token
    settings = dict(max_new_tokens=2, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True)

    def attempt(how: str, function: Callable):
        try:
            return function()
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, ImportError, AssertionError) as error:
            if is_out_of_memory(error):
                raise
            line = str(error).strip().split("\n")[0][:160]
            raise UserError(f"{kind} does not run{how}: {line}") from None

    def logits(**inputs) -> Tensor:
        output = model(**inputs, attention_mask=behind, use_cache=False, logits_to_keep=columns)
        return output.logits.float()  # [2, L-1, V]

    def answer() -> Tensor:
        inputs = torch.stack([embeddings[0], padded]).to(reader.dtype)
        found = model.generate(
            inputs_embeds=inputs, attention_mask=before, generation_config=GenerationConfig(**settings)
        )
        return found.logits[0].float()  # [2, V] of the first token

    def alike(a: Tensor, b: Tensor) -> bool:
        return bool((a - b).norm() <= slack * b.norm())

    from_ids = attempt("", lambda: logits(input_ids=prompts))
    found = attempt(" from embeddings alone", lambda: logits(inputs_embeds=embeddings.to(reader.dtype)))
    first = attempt(" from embeddings alone", answer)
    if found.shape[1] != len(columns):
        raise UserError(f"{kind} makes logits at every position, whatever is asked for")
    if not torch.isfinite(from_ids[0]).all():
        raise UserError(f"{kind} makes logits that are not numbers: its weights are damaged, or not for {reader.dtype}")
    # rounding measured: 0.008 in bfloat16, 0.03 in 8 bits; what is wrong: 0.09 and more. A router may waver
    config = model.config.get_text_config()
    has_experts = any((getattr(config, f"{name}_experts", 0) or 0) > 1 for name in ("num", "num_local", "n_routed"))
    exact = reader.dtype == torch.float32 and not getattr(model, "is_quantized", False)
    slack = 0.01 if exact else 0.2 if has_experts else 0.05
    if not alike(found[0], from_ids[0]):
        raise UserError(f"{kind} reads more of a token than its embedding, and a wire carries only that")
    if not alike(found[1, : shorter - 1], found[0, : shorter - 1]):
        raise UserError(f"{kind} looks at tokens that come later: it is no causal LM")
    if not alike(first, found[0, [-1, shorter - 2]]):
        raise UserError(f"{kind} does not pass over masked padding, so prompts cannot be answered in batches")


def checkpoint_layers(model: torch.nn.Module, on: bool = True) -> None:
    """Keep only the input of each of the LLM's layers for the backward pass, which then computes the layer again.

    transformers' own gradient checkpointing needs training mode, and with it the dropout of GPT-2 or OPT. Raises
    UserError if the architecture's layers are not marked for checkpointing.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(f"--gradient-checkpointing: the layers of a {type(model).__name__} cannot be told apart")

    def checkpointed(forward: Callable) -> Callable:
        def twice(*args, **kwargs):
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            return torch.utils.checkpoint.checkpoint(
                forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
            )

        twice.once = forward
        return functools.wraps(forward)(twice)

    for layer in layers:
        layer.forward = getattr(layer.forward, "once", layer.forward)  # as it was before an earlier call
        if on:
            layer.forward = checkpointed(layer.forward)


@torch.no_grad()
def embedding_table(model: torch.nn.Module) -> Tensor:
    """[V, d] float32: for every token id, what the model accepts as `inputs_embeds` in place of that id.

    The embedding *module* is called, not its weight read: Gemma scales by sqrt(d) inside that module (so inputs_embeds
    must be scaled), Granite scales behind it (so they must not be).
    """
    module = model.get_input_embeddings()
    device = next(module.parameters()).device
    ids = torch.arange(module.weight.shape[0], device=device)
    return torch.cat([module(part).float() for part in ids.split(8192)])


def fingerprint(model: torch.nn.Module) -> str:
    """16 hex digits that tell one LLM from another: the token embeddings, and the first 4096 numbers of every tensor.

    Hashed as bfloat16, so that a float32 and a bfloat16 load of the same weights agree.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    parts = [p.flatten()[:4096] for _, p in sorted(model.named_parameters())]
    for tensor in [model.get_input_embeddings().weight, *parts]:
        digest.update(tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def check_fingerprint(reader: Reader, saved_config: dict | None, wire: str | None) -> None:
    """Raises UserError if a trained wire belongs to an LLM other than this one."""
    if saved_config is not None and saved_config["fingerprint"] != reader.fingerprint:
        raise UserError(
            f"{wire} was trained for another LLM: fingerprint {saved_config['fingerprint']}, {reader.name} has "
            f"{reader.fingerprint}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# data: rows {"context", "question", "answers"} for a reader, {"ids"} windows of a text for a plain language model


@dataclass
class Data:
    """Questions about passages (kind "qa") or windows of plain text (kind "text"); disjoint splits."""

    kind: str
    train: Sequence[dict] | None  # None: unlimited, made on the fly by world.py
    validation: list[dict]
    test: list[dict]

    def train_rows(self, seed: int, start: int, count: int) -> list[dict]:
        """Rows start .. start+count-1 of the endless training stream of this seed (a reshuffle at every epoch).

        A function of (seed, position) alone, so that a resumed run reads on where it stopped.
        """
        if self.train is None:
            return [world.make_example("train", seed, i) for i in range(start, start + count)]
        rows = []
        for i in range(start, start + count):
            epoch, offset = divmod(i, len(self.train))
            rows.append(self.train[_epoch_order(seed, epoch, len(self.train))[offset]])
        return rows


_ORDERS: dict[tuple[int, int, int], np.ndarray] = {}


def _epoch_order(seed: int, epoch: int, rows: int) -> np.ndarray:
    key = (seed, epoch, rows)
    if key not in _ORDERS:
        _ORDERS.clear()
        _ORDERS[key] = np.random.default_rng([seed, epoch]).permutation(rows)
    return _ORDERS[key]


def load_data(name: str, reader: Reader, eval_examples: int) -> Data:
    """`tiny`, `squad` (fetched once, checked) or a FILE: SQuAD v1.1 JSON, JSONL rows, or .txt.

    A single file is split by a hash of the passage (90% train, 10% test), so no passage is in both; a text is cut into
    windows whose last fifth is the test set. At most `eval_examples` test rows, chosen by a fixed shuffle.
    Raises UserError with file and line.
    """
    if name == "tiny":
        return Data("qa", None, world.make_examples("validation", 100), world.make_examples("test", eval_examples))
    if name == "squad":
        train, test = (read_squad(path) for path in fetch_squad())
        return _qa_data(train, test, eval_examples)
    path = Path(name)
    if not path.is_file():
        raise UserError(f"--data {name}: no such file; give tiny, squad, or a .json, .jsonl or .txt file")
    if path.stat().st_size == 0:
        raise UserError(f"--data {name}: the file is empty")
    if path.suffix == ".jsonl":
        return _jsonl_data(name, path, eval_examples)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--data {name}: not UTF-8 (byte {error.start}); convert it first, e.g. with iconv") from None
    if path.suffix == ".txt":
        return _text_data(name, text, reader, eval_examples)
    rows = read_squad(path, text)
    in_test = [hashlib.sha256(row["context"].encode()).digest()[0] < 26 for row in rows]
    test = [row for row, chosen in zip(rows, in_test, strict=True) if chosen]
    train = [row for row, chosen in zip(rows, in_test, strict=True) if not chosen]
    if not train or not test:
        raise UserError(f"--data {name}: {len(rows)} rows are too few passages to split into training and test")
    return _qa_data(train, test, eval_examples)


def _qa_data(train: list[dict], test: list[dict], eval_examples: int) -> Data:
    order = np.random.default_rng(0).permutation(len(test))[:eval_examples]
    passages = sorted({row["context"] for row in train}, key=lambda text: hashlib.sha256(text.encode()).digest())
    held_out = set(passages[: max(1, len(passages) // 50)]) if len(passages) > 1 else set()
    validation = [row for row in train if row["context"] in held_out][:100]
    rest = [row for row in train if row["context"] not in held_out]
    return Data("qa", rest or train, validation or train[:100], [test[i] for i in order])


def _jsonl_data(name: str, path: Path, eval_examples: int) -> Data:
    """A file of any size: every row is checked once, and the training rows stay on the disk."""
    train, validation, test = array("q"), array("q"), array("q")  # where rows begin
    for place, row in read_jsonl(path):
        digest = hashlib.sha256(row["context"].encode()).digest()
        (test if digest[0] < 26 else validation if digest[1] < 5 else train).append(place)
    if not test or not train + validation:
        count = len(train) + len(validation) + len(test)
        raise UserError(f"--data {name}: {count} rows are too few passages to split into training and test")
    if not validation:  # a small file: the first passage is held out
        rows = JsonlRows(path, train)
        is_first = [row["context"] == rows[0]["context"] for row in rows]
        validation = [place for place, chosen in zip(train, is_first, strict=True) if chosen]
        train = [place for place, chosen in zip(train, is_first, strict=True) if not chosen]
    order = np.random.default_rng(0).permutation(len(test))[:eval_examples]
    held_out, tests = JsonlRows(path, validation[:100]), JsonlRows(path, [test[i] for i in order])
    return Data("qa", JsonlRows(path, train or validation), list(held_out), list(tests))


def _text_data(name: str, text: str, reader: Reader, eval_examples: int) -> Data:
    if not text.strip():
        raise UserError(f"--data {name}: the file is empty")
    start = [] if reader.tokenizer.bos_token_id is None else [reader.tokenizer.bos_token_id]
    ids = reader.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    room = min(CHUNK_TOKENS, reader.context_tokens) - len(start)
    rows = [{"ids": start + ids[at : at + room]} for at in range(0, len(ids), room)]
    rows = [row for row in rows if len(row["ids"]) > len(start) + 1]
    if len(rows) < 5:
        raise UserError(f"--data {name}: only {len(ids)} tokens; a text needs at least {5 * room} to train and test on")
    first_test = len(rows) - max(1, len(rows) // 5)
    first_validation = first_test - max(1, len(rows) // 20)
    validation = rows[first_validation:first_test][:100]
    return Data("text", rows[:first_validation], validation, rows[first_test:][:eval_examples])


def encodes(row: dict) -> bool:
    """False where a JSON escape left half a surrogate pair, which is a Python string but no Unicode text."""
    try:
        "".join([row["context"], row["question"], *row["answers"]]).encode()
    except UnicodeEncodeError:
        return False
    return True


def read_squad(path: Path, text: str | None = None) -> list[dict]:
    """Rows of a SQuAD v1.1 JSON file. Raises UserError if it is malformed or has no answered question."""
    text = path.read_text(encoding="utf-8") if text is None else text
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"--data {path}: line {error.lineno}: not JSON ({error.msg})") from None
    except RecursionError:
        raise UserError(f"--data {path}: JSON, but nested too deeply to be SQuAD") from None
    rows = []
    try:
        for article in parsed["data"]:
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    answers = [answer["text"] for answer in qa.get("answers", [])]
                    if answers:
                        row = {"context": paragraph["context"], "question": qa["question"], "answers": answers}
                        if not all(isinstance(part, str) for part in [row["context"], row["question"], *answers]):
                            raise TypeError
                        rows.append(row)
    except (KeyError, TypeError, AttributeError):
        raise UserError(
            f"--data {path}: JSON, but not in the SQuAD v1.1 layout (data/paragraphs/qas/answers)"
        ) from None
    if not rows:
        raise UserError(f"--data {path}: no question has an answer, so there is nothing to score against")
    for row in rows:
        if not encodes(row):
            raise UserError(f"--data {path}: half a surrogate pair in the row of question {row['question']!a:.80}")
    return rows


def parse_row(path: Path, number: int, line: str) -> dict:
    """A row {"context", "question", "answers": [...]} from a line of JSON. Raises UserError with file and line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deeply")
        raise UserError(f"--data {path}: line {number}: not JSON ({reason})") from None
    good = isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("context", "question"))
    answers = row.get("answers") if good else None
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise UserError(
            f'--data {path}: line {number}: want {{"context": str, "question": str, "answers": [str, ...]}}'
        )
    row = {"context": row["context"], "question": row["question"], "answers": answers}
    if not encodes(row):
        raise UserError(f"--data {path}: line {number}: half a surrogate pair, which is no text")
    return row


def read_jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    """(where it begins, row) of each line that is not blank, one at a time. Raises UserError with file and line."""
    place, empty = 0, True
    with open(path, "rb") as file:
        for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
            if len(raw) > MAX_LINE:
                raise UserError(f"--data {path}: line {number} is longer than {MAX_LINE >> 20} MB: no row is")
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                at = place + error.start
                raise UserError(f"--data {path}: not UTF-8 (byte {at}); convert it first, e.g. with iconv") from None
            if line.strip():
                yield place, parse_row(path, number, line)
                empty = False
            place += len(raw)
    if empty:
        raise UserError(f"--data {path}: the file is empty")


class JsonlRows(Sequence):
    """Rows of a JSONL file by where they begin: eight bytes of memory a row, however large the file."""

    def __init__(self, path: Path, places: Sequence[int]):
        self.path, self.places = path, np.array(places, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = int(self.places[index])
        with open(self.path, "rb") as file:
            file.seek(place)
            line = file.readline().decode("utf-8-sig" if place == 0 else "utf-8", errors="replace")
        return parse_row(self.path, f"at byte {place}", line)  # checked before: unless the file has changed since


def fetch_squad() -> list[Path]:
    """Paths of the official train and dev files: fetched once into the user's cache, checked by size and sha256."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latentwire"
    paths = []
    for name, (address, size, sha256) in SQUAD.items():
        path = cache / name
        if not path.exists():
            print(f"fetching {address} ({size / 1e6:.0f} MB)", flush=True)
            try:
                with urllib.request.urlopen(address, timeout=60) as reply:
                    payload = reply.read(size + 1)
            except OSError as error:
                raise UserError(
                    f"--data squad: cannot fetch {address} ({getattr(error, 'reason', error)}); go online once, put "
                    f"the file at {path}, or give a SQuAD JSON file with --data FILE"
                ) from None
            if len(payload) != size or hashlib.sha256(payload).hexdigest() != sha256:
                raise UserError(
                    f"--data squad: {address} is not the official file (size or sha256 differ); nothing was kept"
                )
            cache.mkdir(parents=True, exist_ok=True)
            write_atomically(path, payload)
        elif path.stat().st_size != size or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise UserError(
                f"--data squad: {path} is not the official file (size or sha256 differ); delete it and run again"
            )
        paths.append(path)
    return paths


# ---------------------------------------------------------------------------------------------------------------------
# prompts and batches

PROMPT = "{context}\nQuestion: {question}\nAnswer:"
INSTRUCTION = "Answer the question with a short phrase copied from the text, and nothing else."


def prompt_text(reader: Reader, context: str, question: str) -> str:
    """The prompt as text: the model's chat template where it has one, else passage, question and "Answer:"."""
    return as_prompt(reader, PROMPT.format(context=context, question=question))


def as_prompt(reader: Reader, plain: str) -> str:
    """PROMPT, filled in, as this model wants it."""
    if not reader.tokenizer.chat_template:
        return plain
    chat = [{"role": "user", "content": f"{INSTRUCTION}\n\n{plain.removesuffix(chr(10) + 'Answer:')}"}]
    # some templates write today's date into the prompt: a fixed one keeps runs comparable
    return reader.tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True, enable_thinking=False, date_string="26 Jul 2024"
    )


def tokenize(reader: Reader, prompt: str) -> list[int]:
    """Ids of a prompt, with the start token that the model expects (a chat template writes its own)."""
    return reader.tokenizer(prompt, add_special_tokens=not reader.tokenizer.chat_template, verbose=False)["input_ids"]


@dataclass
class Prompt:
    text: str
    ids: list[int]  # L
    truncated: bool
    context: str = ""  # as far as it fits
    question: str | None = None  # None: a window of text


def make_prompt(reader: Reader, context: str, question: str, max_tokens: int | None = None) -> Prompt:
    """Prompt of at most max_tokens tokens (default: the model's context less the answer).

    Only the context is ever cut, from its end. Raises UserError if the question alone does not fit.
    """
    limit = reader.prompt_tokens if max_tokens is None else max_tokens
    text = prompt_text(reader, context, question)
    ids = tokenize(reader, text)
    if len(ids) <= limit:
        return Prompt(text, ids, False, context, question)
    low, high = 0, len(context)  # the longest prefix of the context that fits, by bisection over characters
    if len(tokenize(reader, prompt_text(reader, "", question))) > limit:
        raise UserError(f"a question of {len(question)} characters does not fit into {limit} tokens: {question[:60]!r}")
    while low < high:
        middle = (low + high + 1) // 2
        fits = len(tokenize(reader, prompt_text(reader, context[:middle], question))) <= limit
        low, high = (middle, high) if fits else (low, middle - 1)
    text = prompt_text(reader, context[:low], question)
    return Prompt(text, tokenize(reader, text), True, context[:low], question)


def truncated_prompt(reader: Reader, row: dict, max_tokens: int) -> Prompt:
    """The prompt of a row in max_tokens tokens, or its question alone where not even that fits."""
    question = make_prompt(reader, "", row["question"])
    if len(question.ids) >= max_tokens:
        return question
    return make_prompt(reader, row["context"], row["question"], max_tokens)


def check_questions(reader: Reader, data: Data) -> None:
    """Print how prompts look. Raises UserError now, not in mid-training, if a question alone does not fit."""
    if data.kind == "qa":
        print(f"prompt of {reader.name}: {as_prompt(reader, PROMPT)!r}")
    for row in itertools.chain(data.train or [], data.validation, data.test):
        if data.kind == "qa" and 2 * len(row["question"].encode()) > reader.prompt_tokens:  # a token is at least a byte
            make_prompt(reader, "", row["question"])


@dataclass
class Spelling:
    """What a tokenizer does to a text before it looks for tokens: all that a sender without it must know."""

    nfc: bool  # Unicode's composed form
    prepend: str  # a space in front: "", "first" (of the text) or "always" (also behind each added token)
    twice: bool  # ... even where there is a space already
    added: list[str]  # tokens that stand for themselves, such as <s>

    @classmethod
    def of(cls, tokenizer: transformers.PreTrainedTokenizerBase) -> "Spelling":
        description = json.loads(tokenizer.backend_tokenizer.to_str())

        def parts(node) -> list[dict]:
            inner = (node or {}).get("normalizers", (node or {}).get("pretokenizers"))
            return [node] if node and inner is None else [p for n in inner or [] for p in parts(n)]

        normalizers, splitters = parts(description["normalizer"]), parts(description["pre_tokenizer"])
        prepend = next((p["prepend_scheme"] for p in splitters if p["type"] == "Metaspace"), "never")
        if any(p["type"] == "ByteLevel" and p["add_prefix_space"] for p in splitters):
            prepend = "always"
        twice = any(p["type"] == "Prepend" for p in normalizers)
        added = sorted((token["content"] for token in description["added_tokens"]), key=len, reverse=True)
        nfc = any(p["type"] == "NFC" for p in normalizers)
        return cls(nfc, "always" if twice else prepend.replace("never", ""), twice, added)

    def spell(self, text: str) -> str:
        """The text that the tokens spell."""
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        if not self.prepend:
            return text
        pieces = re.split("(" + "|".join(map(re.escape, self.added)) + ")", text) if self.added else [text]
        for i in range(0, len(pieces) if self.prepend == "always" else 1, 2):  # the odd ones are added tokens
            if pieces[i] and (self.twice or not pieces[i].startswith(" ")):
                pieces[i] = " " + pieces[i]
        return "".join(pieces)


def token_ends(reader: Reader, text: str) -> tuple[list[int], list[int]]:
    """(ids, ends): the tokens of a text, without `prefix_ids`, and where each ends, in bytes of the text's spelling.

    From the tokens' names: byte-level BPE has one letter for a byte, sentencepiece writes "▁" for a space and
    <0xE2> for a byte without a token. Raises UserError if the names do not spell the text.
    """
    tokenizer = reader.tokenizer
    ids = tokenize(reader, text)[len(prefix_ids(reader)) :]
    byte_level = "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)
    added = set(tokenizer.get_added_vocab())
    ends, end = [], 0
    for name in tokenizer.convert_ids_to_tokens(ids):
        if name in added:
            end += len(name.encode())
        elif byte_level:
            end += len(name)
        else:
            end += 1 if re.fullmatch("<0x[0-9A-F]{2}>", name) else len(name.replace("▁", " ").encode())
        ends.append(end)
    if end != len(reader.spelling.spell(text).encode()):
        raise UserError(f"the tokens of {reader.name} do not spell the bytes of {text[:60]!r}")
    return ids, ends


def to_bytes(texts: list[str], device: torch.device) -> Tensor:
    """[B, N] bytes of UTF-8, padded with 256. Raises UserError for a text that is empty or not text."""
    try:
        raw = [text.encode() for text in texts]
    except UnicodeEncodeError:
        raise UserError("the prompt holds half a surrogate pair, which is no text") from None
    if not all(raw):
        raise UserError("the prompt is empty: there are no bytes to send")
    padded = np.full((len(raw), max(map(len, raw))), 256)
    for row, data in zip(padded, raw, strict=True):
        row[: len(data)] = np.frombuffer(data, np.uint8)
    return torch.from_numpy(padded).to(device)


def prefix_ids(reader: Reader) -> list[int]:
    """The tokens before any text that start every prompt (a start token, or none)."""
    return [] if reader.tokenizer.chat_template else reader.tokenizer("", add_special_tokens=True)["input_ids"]


def answer_ids(reader: Reader, prompt: Prompt, answer: str) -> list[int]:
    """Ids of the answer as it continues this prompt, and EOS. Never a second start token."""
    glue = "" if reader.tokenizer.chat_template else " "
    joint = tokenize(reader, prompt.text + glue + answer)
    if joint[: len(prompt.ids)] == prompt.ids:
        ids = joint[len(prompt.ids) :]
    else:  # the tokenizer merges across the joint
        ids = reader.tokenizer(glue + answer, add_special_tokens=False)["input_ids"]
    return ids + ([] if reader.tokenizer.eos_token_id is None else [reader.tokenizer.eos_token_id])


@dataclass
class Batch:
    """Sequences for teacher forcing, padded on the right so that positions have no gaps."""

    ids: Tensor  # [B, T]
    attention: Tensor  # [B, T] 1 on real tokens
    sent: Tensor  # [B, T] bool: the tokens that travel as a message (the prompt); the rest is the answer
    labels: Tensor  # [B, T] the next token where it counts (answer and EOS, or a whole text), else IGNORE


def make_batch(reader: Reader, rows: list[dict]) -> Batch:
    """Teacher-forcing batch of data rows: prompt + first answer + EOS, or a window of text."""
    sequences = []
    for row in rows:
        if "sent" in row:  # a window of text whose start travels and whose rest is predicted
            sequences.append((row["ids"], row["sent"], row["sent"]))
        elif "ids" in row:
            sequences.append((row["ids"], len(row["ids"]), 1))
        else:
            prompt = make_prompt(reader, row["context"], row["question"])
            answer = answer_ids(reader, prompt, row["answers"][0])[:MAX_NEW_TOKENS]
            sequences.append((prompt.ids + answer, len(prompt.ids), len(prompt.ids)))
    width = max(len(ids) for ids, _, _ in sequences)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    attention, sent, labels = (
        torch.zeros_like(ids),
        torch.zeros_like(ids, dtype=torch.bool),
        torch.full_like(ids, IGNORE),
    )
    for i, (row, sent_tokens, first_target) in enumerate(sequences):
        row = torch.tensor(row)
        ids[i, : len(row)], attention[i, : len(row)], sent[i, :sent_tokens] = row, 1, True
        labels[i, first_target - 1 : len(row) - 1] = row[first_target:]
    return Batch(*(tensor.to(reader.device) for tensor in (ids, attention, sent, labels)))


def answer_logits(reader: Reader, batch: Batch, embeddings: Tensor, states: bool = False) -> Tensor | tuple:
    """Logits [targets, V] in float32 at the labelled positions of a batch, from inputs_embeds [B, T, d].

    Only columns with a label meet the output matrix: at V = 128k the others would be most of the memory.
    With `states`, (logits, what each layer of the LLM makes of the batch: [B, T, d] each).
    """
    labelled = batch.labels != IGNORE  # [B, T]
    columns = labelled.any(0).nonzero()[:, 0]
    output = reader.model(
        inputs_embeds=embeddings.to(reader.dtype),
        attention_mask=batch.attention,
        use_cache=False,
        logits_to_keep=columns.cpu(),  # an index on the CPU meets a last layer on any device
        output_hidden_states=states,
    )
    logits = output.logits[labelled[:, columns]].float()  # of [B, columns, V]
    return (logits, output.hidden_states[1:]) if states else logits


Send = Callable[[Prompt], bytes]  # prompt -> message
Receive = Callable[[bytes], Tensor]  # message -> [positions, d] embeddings


@torch.inference_mode()
def generate(
    reader: Reader, prompts: list[list[int]] | list[bytes], batch_size: int, receive: Receive | None = None
) -> list[str]:
    """Greedy answers to prompts given as token ids, or as messages and a receiver; in the order of the prompts.

    Padded on the left and masked, so that every prompt ends where its answer begins; transformers derives positions
    from the mask, and returns only the new tokens when it is given inputs_embeds.
    """
    fill = reader.tokenizer.pad_token_id
    fill = fill if fill is not None else (reader.eos_ids or [0])[0]
    settings = GenerationConfig(
        max_new_tokens=MAX_NEW_TOKENS, do_sample=False, pad_token_id=fill, eos_token_id=reader.eos_ids or None
    )
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # like lengths together; the largest first

    def answers_of(chosen: list[int]) -> list[str]:
        parts = [prompts[i] if receive is None else receive(prompts[i]) for i in chosen]
        width = max(map(len, parts))
        mask = torch.tensor([[0] * (width - len(part)) + [1] * len(part) for part in parts], device=reader.device)
        if receive is None:
            padded = [[fill] * (width - len(part)) + part for part in parts]
            inputs = {"input_ids": torch.tensor(padded, device=reader.device)}  # [B, T]
        else:
            padded = [F.pad(part, (0, 0, width - len(part), 0)) for part in parts]
            inputs = {"inputs_embeds": torch.stack(padded).to(reader.dtype)}  # [B, T, d]
        new = reader.model.generate(**inputs, attention_mask=mask, generation_config=settings)
        new = new[:, width:] if receive is None else new
        answers = []
        for ids in new.tolist():
            end = next((place for place, token in enumerate(ids) if token in reader.eos_ids), len(ids))
            # a base model that does not stop goes on with the next question: its answer ends with the line
            answer = reader.tokenizer.decode(ids[:end], skip_special_tokens=True)
            answers.append(answer.strip().split("\n")[0].strip())
        return answers

    batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    found = [answer for answers in spread(answers_of, batches) for answer in answers]
    return [answer for _, answer in sorted(zip(order, found, strict=True))]


# ---------------------------------------------------------------------------------------------------------------------
# SQuAD v1.1 scorer, as in the official evaluate-v1.1.py (Rajpurkar et al. 2016)


PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, single spaces."""
    text = text.lower().translate(PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answer: str, golds: list[str]) -> float:
    """1.0 if the normalised answer equals any normalised gold, else 0.0."""
    return float(any(normalize_answer(answer) == normalize_answer(gold) for gold in golds))


def f1_score(answer: str, golds: list[str]) -> float:
    """Best F1 over the golds of the bags of normalised words; 0.0 where nothing is shared, two empty bags included."""
    best = 0.0
    words = normalize_answer(answer).split()
    for gold in golds:
        gold_words = normalize_answer(gold).split()
        shared = sum((Counter(words) & Counter(gold_words)).values())
        if shared:
            precision, recall = shared / len(words), shared / len(gold_words)
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


def score(answers: list[str], rows: list[dict]) -> tuple[float, float]:
    """(F1, EM) in percent."""
    pairs = list(zip(answers, rows, strict=True))
    f1 = 100 * sum(f1_score(answer, row["answers"]) for answer, row in pairs) / len(pairs)
    return f1, 100 * sum(exact_match(answer, row["answers"]) for answer, row in pairs) / len(pairs)


# ---------------------------------------------------------------------------------------------------------------------
# PCA of the frozen embeddings


@dataclass
class PCA:
    mean: Tensor  # [d] float32
    components: Tensor  # [d, k] float32, orthonormal columns, by falling variance
    variances: Tensor  # [d] float64, of all d components, falling

    def first(self, k: int) -> "PCA":
        return PCA(self.mean, self.components[:, :k].contiguous(), self.variances)

    @property
    def explained(self) -> float:
        """Share of the variance that the k components hold."""
        return (self.variances[: self.components.shape[1]].sum() / self.variances.sum()).item()


def fit_pca(table: Tensor, counts: Tensor) -> PCA:
    """Exact PCA (all d components) of the embeddings of a corpus, from its token counts: one weighted pass over V rows.

    table: [V, d]; counts: [V] occurrences in the training split. Equal to the PCA of the [corpus, d] matrix of all its
    embeddings, at a cost that does not grow with the corpus. float64 on the CPU; the sign of a component makes its
    largest entry positive. Returned on the table's device.
    """
    weights = counts.cpu().double() / counts.sum().item()
    used = weights.nonzero()[:, 0]  # tokens that never occur weigh nothing
    mean = torch.zeros(table.shape[1], dtype=torch.float64)
    covariance = torch.zeros(table.shape[1], table.shape[1], dtype=torch.float64)
    for rows in used.split(8192):
        mean += weights[rows] @ table[rows.to(table.device)].cpu().double()
    for rows in used.split(8192):
        centred = table[rows.to(table.device)].cpu().double() - mean
        covariance += (centred * weights[rows, None]).T @ centred
    variances, vectors = torch.linalg.eigh(covariance)  # ascending
    variances, vectors = variances.flip(0).clamp_min(0), vectors.flip(1)
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    return PCA(mean.float().to(table.device), vectors.float().to(table.device), variances)


def token_counts(reader: Reader, data: Data, seed: int, passages: int = 2000) -> Tensor:
    """[V] occurrences of each token in the prompts of the training split.

    In `passages` of them if it is unlimited, in 100,000 evenly spread ones if it is larger than that.
    """
    rows = data.train if data.train is not None else data.train_rows(seed, 0, passages)
    chosen = range(len(rows)) if len(rows) <= 100_000 else np.linspace(0, len(rows) - 1, 100_000).astype(int)
    counts, cut = torch.zeros(len(reader.table), dtype=torch.long), 0
    for at in range(0, len(chosen), 1000):
        part = [rows[int(i)] for i in chosen[at : at + 1000]]
        if data.kind == "text":
            lists = [row["ids"] for row in part]
        else:
            prompts = [prompt_text(reader, row["context"], row["question"]) for row in part]
            special = not reader.tokenizer.chat_template
            lists = reader.tokenizer(prompts, add_special_tokens=special, verbose=False)["input_ids"]
            cut += sum(len(ids) > reader.prompt_tokens for ids in lists)
        flat = torch.tensor([token for ids in lists for token in ids], dtype=torch.long)
        counts += torch.bincount(flat, minlength=len(counts))
    if cut:
        print(f"note: {cut} of {len(chosen)} training prompts exceed {reader.prompt_tokens} tokens: context cut")
    return counts


# ---------------------------------------------------------------------------------------------------------------------
# evaluation: the score through the wire, and every control beside it

RESULT_KEYS = (
    "stage model data seed steps examples text_f1 text_em f1 em retention no_context_f1 shuffled_f1 "
    "truncated_f1 nll_text nll_wire cosine wire_bytes text_bytes zlib_bytes packed_token_bytes positions "
    "text_positions unique_answers train_seconds eval_seconds device dtype versions commit"
).split()


def sent_prompt(reader: Reader, row: dict) -> Prompt:
    """What of a data row travels: the prompt, or a window of text (its start, in a stage that says where it stops)."""
    if "ids" not in row:
        return make_prompt(reader, row["context"], row["question"])
    ids = row["ids"][: row.get("sent")]
    return Prompt(reader.tokenizer.decode(ids, skip_special_tokens=True), ids, False)


def splice(reader: Reader, batch: Batch, received: list[Tensor]) -> tuple[Batch, Tensor]:
    """(batch, embeddings [B, T', d]) with the sent tokens of row i replaced by received[i] [positions, d].

    Where these are as many as the tokens, labels among them stay; else only those after them do.
    """
    parts, rows = [], []
    for i, part in enumerate(received):
        sent, length = int(batch.sent[i].sum()), int(batch.attention[i].sum())
        parts.append(torch.cat([part, reader.table[batch.ids[i, sent:length]]]))
        head = batch.labels[i, : sent - 1]
        if len(part) != sent:
            head = head.new_full((len(part) - 1,), IGNORE)
        rows.append(torch.cat([head, batch.labels[i, sent - 1 : length]]))
    lengths = torch.tensor([len(part) for part in parts], device=batch.ids.device)
    attention = (torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]).long()
    labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORE)
    spliced = Batch(attention, attention, attention.bool(), labels)  # ids mean nothing any more
    return spliced, torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)


@torch.inference_mode()
def mean_nll(reader: Reader, rows: list[dict], batch_size: int, send: Send | None, receive: Receive | None) -> float:
    """Mean NLL in nats per target token: from the real embeddings, or with the prompt through the wire."""

    def sum_and_count(part: list[dict]) -> tuple[float, int]:
        batch = make_batch(reader, part)
        embeddings = reader.table[batch.ids]  # [B, T, d]
        if send is not None:
            received = [receive(send(sent_prompt(reader, row))) for row in part]  # [positions, d] each
            batch, embeddings = splice(reader, batch, received)
        logits = answer_logits(reader, batch, embeddings)
        labels = batch.labels[batch.labels != IGNORE]
        return F.cross_entropy(logits, labels, reduction="sum").item(), len(labels)

    found = spread(sum_and_count, [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)])
    return sum(total for total, _ in found) / sum(count for _, count in found)


def byte_baselines(reader: Reader, texts: list[str], id_lists: list[list[int]]) -> dict[str, float]:
    """Mean bytes per prompt of the text itself, of zlib -9, and of token ids packed at ceil(log2 V) bits."""
    bits = math.ceil(math.log2(len(reader.table)))
    raw = [text.encode() for text in texts]
    return {
        "text_bytes": sum(map(len, raw)) / len(raw),
        "zlib_bytes": sum(len(zlib.compress(text, 9)) for text in raw) / len(raw),
        "packed_token_bytes": sum(math.ceil(len(ids) * bits / 8) for ids in id_lists) / len(raw),
    }


@torch.inference_mode()
def evaluate(reader: Reader, data: Data, batch_size: int, send: Send, receive: Receive) -> tuple[dict, list[dict]]:
    """(metrics named as in RESULT_KEYS, one record per test row for samples.md).

    Every prompt really becomes a message of bytes and is rebuilt from those bytes alone: wire_bytes is their length.
    """
    rows = data.test
    prompts = [sent_prompt(reader, row) for row in rows]
    id_lists, texts = [prompt.ids for prompt in prompts], [prompt.text for prompt in prompts]
    if data.kind == "qa":
        cut = sum(prompt.truncated for prompt in prompts)
        if cut:
            print(
                f"note: {cut} of {len(rows)} test prompts exceed {reader.prompt_tokens} tokens: context cut at its end"
            )

    def received(message: bytes, ids: list[int]) -> tuple[int, list[float]]:
        embeddings = receive(message).float()  # [positions, d]
        alike = len(embeddings) == len(ids)
        return len(embeddings), F.cosine_similarity(embeddings, reader.table[ids], dim=-1).tolist() if alike else []

    messages = spread(send, prompts)
    found = spread(lambda pair: received(*pair), list(zip(messages, id_lists, strict=True)))
    positions, cosines = [count for count, _ in found], [cosine for _, part in found for cosine in part]
    metrics = dict.fromkeys(RESULT_KEYS)
    metrics |= byte_baselines(reader, texts, id_lists)
    metrics["examples"] = len(rows)
    metrics["wire_bytes"] = sum(map(len, messages)) / len(rows)
    metrics["positions"] = sum(positions) / len(rows)
    metrics["text_positions"] = sum(map(len, id_lists)) / len(rows)
    metrics["cosine"] = sum(cosines) / len(cosines) if positions == list(map(len, id_lists)) else None
    print("  NLL from text and through the wire", flush=True)
    metrics["nll_text"] = mean_nll(reader, rows, batch_size, None, None)
    metrics["nll_wire"] = mean_nll(reader, rows, batch_size, send, receive)
    if data.kind == "text":
        return metrics, [{"question": text, "answers": [], "text": "", "wire": ""} for text in texts]

    print("  answers through the wire", flush=True)
    answers = generate(reader, messages, batch_size, receive)
    print("  answers from text", flush=True)
    text_answers = generate(reader, id_lists, batch_size)
    print("  answers without context", flush=True)
    blind = generate(reader, [make_prompt(reader, "", row["question"]).ids for row in rows], batch_size)
    metrics["f1"], metrics["em"] = score(answers, rows)
    metrics["text_f1"], metrics["text_em"] = score(text_answers, rows)
    metrics["retention"] = 100 * metrics["f1"] / metrics["text_f1"] if metrics["text_f1"] > 0 else None
    metrics["no_context_f1"] = score(blind, rows)[0]
    # another prompt's message answers that other prompt: the receiver sees nothing of this one, so no new run is needed
    metrics["shuffled_f1"] = score(answers[1:] + answers[:1], rows)[0] if len(rows) > 1 else None
    # text cut to as many positions as the message takes; where nothing is cut, that is the text itself
    cut_rows = [i for i, ids in enumerate(id_lists) if positions[i] < len(ids)]
    shorter = [truncated_prompt(reader, rows[i], positions[i]).ids for i in cut_rows]
    truncated = dict(zip(cut_rows, generate(reader, shorter, batch_size), strict=True)) if cut_rows else {}
    metrics["truncated_f1"] = score([truncated.get(i, text_answers[i]) for i in range(len(rows))], rows)[0]
    metrics["unique_answers"] = len(set(answers))
    records = [
        {"question": row["question"], "context": row["context"], "answers": row["answers"], "text": text, "wire": wire}
        for row, text, wire in zip(rows, text_answers, answers, strict=True)
    ]
    return metrics, records


# ---------------------------------------------------------------------------------------------------------------------
# run directories


def write_atomically(path: Path, payload: bytes) -> None:
    """Write to a temporary name, then rename: a full disk or an interruption leaves the old file whole.

    Of several processes the first writes.
    """
    if rank():
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # a full disk is reported without a name
        raise


_locks = []  # open files; the kernel frees them when the process ends, however it ends


def open_out(name: str) -> Path:
    """Make the output directory, see that it can be written, and keep other runs out. Raises UserError."""
    path = Path(name)
    if rank():
        return path
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / ".lock", "w")  # it stays open
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _locks.append(lock)
    except BlockingIOError:
        raise UserError(f"--out {name}: another run is writing there; give another directory, or wait for it") from None
    except OSError as error:
        raise UserError(f"--out {name}: cannot write there ({error.strerror}); give another directory") from None
    return path


def digest_of(tensors: dict[str, Tensor], text: str) -> str:
    """sha256 of tensors, their names, dtypes and shapes, and a text."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_checkpoint(path: Path, payload: dict) -> None:
    """Write tensors and plain values, in dicts and lists, as one safetensors file: nothing that is ever unpickled."""
    tensors = {}

    def plain(value):
        if isinstance(value, Tensor):
            tensors[str(len(tensors))] = value.detach().cpu().contiguous().clone()
            return {"tensor": str(len(tensors) - 1)}
        if isinstance(value, dict):  # as pairs, since an optimizer's keys are numbers
            return {"dict": [[key, plain(inner)] for key, inner in value.items()]}
        if isinstance(value, (list, tuple)):
            return {"list": [plain(inner) for inner in value]}
        return {"value": value}

    text = json.dumps(plain(payload))
    metadata = {"checkpoint": text, "sha256": digest_of(tensors, text)}
    write_atomically(path, safetensors.torch.save(tensors, metadata))


def read_checkpoint(path: Path) -> dict:
    """What save_checkpoint wrote. Raises ValueError, SafetensorError and the like for any other file."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # it is no dict
    text = metadata.get("checkpoint", "")
    if metadata.get("sha256") != digest_of(tensors, text):
        raise ValueError("damaged")
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise ValueError("it holds something that is not a number")

    def restored(value):
        ((kind, inner),) = value.items()
        if kind == "tensor":
            return tensors[inner]
        if kind == "dict":
            return {key: restored(part) for key, part in inner}
        return [restored(part) for part in inner] if kind == "list" else inner

    return restored(json.loads(text))


def load_checkpoint(path: Path, arguments: dict, llm_fingerprint: str) -> dict:
    """The checkpoint of an interrupted run with the same arguments on the same LLM. Raises UserError.

    What does not change the result may differ: where it runs, how much fits into memory, how much is evaluated.
    """
    if not path.exists():
        raise UserError(f"--resume: {path} does not exist; start without --resume")
    try:
        saved = read_checkpoint(path)
        made_with, made_for = saved["arguments"], saved["fingerprint"]
    except Exception as error:
        reason = str(error) if type(error) is ValueError else type(error).__name__
        raise UserError(
            f"--resume: {path} is not a whole checkpoint of this program ({reason}); start without --resume"
        ) from None
    if made_with.keys() != arguments.keys():
        raise UserError(f"--resume: {path} was made by another stage, or another version of it; start without --resume")
    for key, value in arguments.items():
        elsewhere = ("device", "micro_batch_size", "gradient_checkpointing", "eval_examples")
        if key not in elsewhere and made_with.get(key) != value:
            flag = "--" + key.replace("_", "-")
            raise UserError(f"--resume: {path} was made with {flag} {made_with.get(key)}, not {value}")
    if made_for != llm_fingerprint:
        raise UserError(f"--resume: {path} was made with another LLM (fingerprint {made_for}, not {llm_fingerprint})")
    return saved


class Guard:
    """Watches over a training loop: signals, steps that went wrong, and when to write a checkpoint.

    Ctrl-C and SIGTERM end the run after the step under way, with a checkpoint; a second Ctrl-C ends it at once. A step
    whose loss or gradient is no number, or whose gradient is SPIKE times the median of the last 100, is skipped: the
    weights stay as they were. After TOO_MANY in a row the run stops.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)
    SPIKE, TOO_MANY, SECONDS = 1000.0, 5, 600.0

    def __init__(self, steps: int, resumed: dict | None):
        state = resumed["guard"] if resumed else {"norms": [], "skipped": 0, "in_a_row": 0}
        self.norms, self.skipped, self.in_a_row = list(state["norms"]), state["skipped"], state["in_a_row"]
        self.steps, self.saved_step, self.saved_at = steps, resumed["step"] if resumed else 0, time.monotonic()
        self.signal: int | None = None
        self.watching = threading.current_thread() is threading.main_thread()  # where Python handles signals
        self.handlers = {number: signal.signal(number, self.stop) for number in self.SIGNALS if self.watching}

    def stop(self, number: int, frame) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def state(self) -> dict:
        """For the checkpoint."""
        return {"norms": self.norms, "skipped": self.skipped, "in_a_row": self.in_a_row}

    def accepts(self, loss: float, norm: float, step: int) -> bool:
        """Whether to take this step (the first is 1), from its loss and the norm of its gradient. Raises UserError."""
        # what is clipped to 1 anyway is no spike below that
        spike = len(self.norms) == 100 and norm > max(1.0, self.SPIKE * statistics.median(self.norms))
        if math.isfinite(loss) and math.isfinite(norm) and not spike:
            self.norms, self.in_a_row = [*self.norms[-99:], norm], 0
            return True
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        print(f"note: step {step} is skipped: its loss is {loss:.3g}, the norm of its gradient {norm:.3g}", flush=True)
        if self.in_a_row == self.TOO_MANY:
            kept = f"the checkpoint of step {self.saved_step} is kept" if self.saved_step else "there is no checkpoint"
            raise UserError(
                f"loss or gradient is not a number, or far above all others, for {self.TOO_MANY} steps up to {step}: "
                f"stopped, {kept}; try a smaller --lr"
            )
        return False

    def due(self, step: int) -> bool:
        """Whether to write a checkpoint after this step: at every quarter, every ten minutes, and when told to stop."""
        waited = time.monotonic() - self.saved_at > self.SECONDS
        if process_count() > 1:  # all at once: what one was told holds for all, and the first looks at the clock
            news = torch.tensor([self.signal or 0, waited and not rank()], dtype=torch.int64)
            torch.distributed.all_reduce(news, torch.distributed.ReduceOp.MAX)
            self.signal, waited = news[0].item() or None, bool(news[1])
        return step % max(1, self.steps // 4) == 0 or step == self.steps or waited or self.signal is not None

    def saved(self, step: int) -> None:
        """A checkpoint was written: ends the run if it was told to."""
        self.saved_step, self.saved_at = step, time.monotonic()
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is not None:
            print(f"terminated after step {step}; --resume goes on from there", file=sys.stderr)
            sys.exit(128 + self.signal)

    def close(self) -> None:
        """Training is over: signals do what they did before."""
        if self.skipped:
            print(f"note: {self.skipped} of {self.steps} steps were skipped", flush=True)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def save_wire(out: Path, tensors: dict[str, Tensor], config: dict) -> None:
    """wire.safetensors and config.json: what --eval-only and the later stages start from."""
    kept = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    config = config | {"wire_sha256": digest_of(kept, "")}
    write_atomically(out / "wire.safetensors", safetensors.torch.save(kept))
    write_atomically(out / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def load_wire(name: str, stage: str, config_keys: tuple[str, ...], tensor_keys: tuple[str, ...]) -> tuple[dict, dict]:
    """(tensors, config) of a trained wire. Raises UserError if the directory holds none, or one of another stage.

    config_keys may name what lies inside: "metrics.train_seconds".
    """
    path = Path(name)

    def lacks(config, key: str) -> bool:
        for part in key.split("."):
            if not isinstance(config, dict) or part not in config:
                return True
            config = config[part]
        return False

    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        tensors = safetensors.torch.load_file(path / "wire.safetensors")
        required = ("model", "fingerprint", "arguments.seed", "arguments.steps", *config_keys)
        missing = [key for key in required if lacks(config, key)]
        missing += [key for key in tensor_keys if key not in tensors]
    except FileNotFoundError as error:
        raise UserError(f"{name} is not a trained wire: no {Path(error.filename or 'wire.safetensors').name}") from None
    except (OSError, ValueError, TypeError, AttributeError, safetensors.SafetensorError) as error:
        raise UserError(f"{name}: config.json or wire.safetensors cannot be read ({type(error).__name__})") from None
    if config.get("stage") != stage:
        raise UserError(f"{name} is a wire of {config.get('stage')}, not of {stage}")
    if missing:
        raise UserError(f"{name}: config.json or wire.safetensors lacks {missing[0]}")
    if config.get("wire_sha256", "") not in ("", digest_of(tensors, "")):
        raise UserError(f"{name}: wire.safetensors is damaged, or not the one its config.json was written with")
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{name}: {key} in wire.safetensors holds something that is not a number")
    return tensors, config


def load_module(module: torch.nn.Module, prefix: str, tensors: dict[str, Tensor], wire: str) -> None:
    """Load the tensors of a wire whose names start with `prefix`. Raises UserError naming one that does not fit."""

    def described(tensor: Tensor | None) -> str:
        return "not there" if tensor is None else f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"

    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    expected = module.state_dict()
    for name in [*expected, *sorted(found.keys() - expected.keys())]:
        is_, should_be = described(found.get(name)), described(expected.get(name))
        if is_ != should_be:
            raise UserError(
                f"{wire}: {prefix}{name} in wire.safetensors is {is_}, and with its config.json should be {should_be}"
            )
    module.load_state_dict(found)


def write_jsonl(path: Path, rows: list[dict]) -> None:
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def append_jsonl(path: Path, row: dict) -> None:
    if rank():
        return
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def rounded(value):
    """Floats to six significant digits, through dicts and lists, so that JSON is readable; not finite is null."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return value


def write_samples(path: Path, records: list[dict], count: int = 20) -> None:
    """samples.md: question, gold, the answer from text, the answer through the wire."""
    lines = ["# Samples", "", "| question | gold | from text | through the wire |", "|---|---|---|---|"]
    for record in records[:count]:
        cells = [record["question"], " / ".join(dict.fromkeys(record["answers"])), record["text"], record["wire"]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def draw_report(
    path: Path, history: list[dict], title: str, bars: dict[str, float], unit: str, byte_bars: dict
) -> None:
    """report.png: the training curves, the score beside its controls, and the bytes beside theirs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curves, scores, sizes) = plt.subplots(1, 3, figsize=(15, 4.2), constrained_layout=True)
    for key in sorted({key for row in history for key in row if key.startswith("loss_")}):
        points = [(row["step"], row[key]) for row in history if row.get(key) is not None]
        curves.plot(*zip(*points, strict=True), label=key.removeprefix("loss_"))
    curves.set(title="training" if history else "no training in this run", xlabel="step", ylabel="loss")
    if history:
        curves.set_yscale("log")
        curves.legend()
    for axis, values, label in ((scores, bars, unit), (sizes, byte_bars, "bytes per prompt")):
        drawn = axis.barh(
            list(values), list(values.values()), color=["#c44e52" if "wire" in k else "#8c8c8c" for k in values]
        )
        axis.bar_label(drawn, [f"{v:,.0f}" if v >= 1000 else f"{v:.4g}" for v in values.values()], padding=2)
        axis.invert_yaxis()
        axis.margins(x=0.2)
        axis.set_xlabel(label)
    scores.set_title("answers")
    sizes.set_title("size of one prompt")
    figure.suptitle(title)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    plt.close(figure)
    write_atomically(path, buffer.getvalue())


class Progress:
    """Training progress with an ETA: a bar on a terminal, one line per interval in a pipe."""

    def __init__(self, total: int, start: int):
        self.total, self.start, self.began = total, start, time.perf_counter()
        self.interval, self.shown = max(1, total // 10), time.perf_counter()

    def show(self, step: int, text: str) -> None:
        elapsed = time.perf_counter() - self.began
        eta = elapsed / max(1, step - self.start) * (self.total - step)
        line = f"step {step}/{self.total}  {text}  {elapsed:.0f} s, {eta:.0f} s left"
        if sys.stdout.isatty():
            done = 24 * step // self.total
            print(
                f"\r[{'=' * done}{' ' * (24 - done)}] {line}", end="\n" if step == self.total else "\x1b[K", flush=True
            )
        elif step % self.interval == 0 or step in (1, self.total) or time.perf_counter() - self.shown > 30:
            self.shown = time.perf_counter()
            print(line, flush=True)


def print_table(title: str, rows: list[tuple[str, str, str]]) -> None:
    """A table of (what, value, note)."""
    width, value_width = max(len(row[0]) for row in rows), max(len(row[1]) for row in rows)
    print(f"\n{title}")
    for what, value, note in rows:
        print(f"  {what:<{width}}  {value:>{value_width}}  {note}".rstrip())
    print(flush=True)


@torch.inference_mode()
def print_samples(reader: Reader, data: Data, send: Send, receive: Receive) -> None:
    """The same three validation questions at every call: gold, answer from text, answer through the wire."""
    rows = data.validation[:3]
    if data.kind == "text":
        return
    prompts = [sent_prompt(reader, row) for row in rows]
    from_text = generate(reader, [prompt.ids for prompt in prompts], len(rows))
    from_wire = generate(reader, [send(prompt) for prompt in prompts], len(rows), receive)
    for row, text, wire in zip(rows, from_text, from_wire, strict=True):
        print(f"    {row['question']}  gold: {row['answers'][0]} | text: {text} | wire: {wire}")


def finish_run(
    out: Path, tensors: dict | None, config: dict, history: list[dict], records: list[dict], extra: list[tuple],
    title: str, more_bars: dict[str, float] | None = None,
) -> None:  # fmt: skip
    """Write the run directory, then print the table and, as the last line, the JSON object.

    tensors: of the wire, or None if it is saved elsewhere; config["metrics"] holds RESULT_KEYS; extra: rows (what,
    value, note) of the stage's own controls; more_bars: what report.png shows beside the scores.
    """
    metrics = config["metrics"]
    result = {key: metrics[key] for key in RESULT_KEYS}

    def show(key: str, digits: int = 1) -> str:
        return "n/a" if result[key] is None else f"{result[key]:.{digits}f}"

    if result["f1"] is None:
        rows = [
            ("NLL from text", show("nll_text", 4), "nats per token"),
            ("NLL through the wire", show("nll_wire", 4), ""),
        ]
        bars = {"text": result["nll_text"], "wire": result["nll_wire"]}
        unit = "NLL, nats per token"
    else:
        rows = [
            ("F1 from text", show("text_f1"), f"EM {show('text_em')}, {result['examples']} test rows"),
            ("F1 through the wire", show("f1"), f"EM {show('em')}, {result['unique_answers']} different answers"),
            ("retention", show("retention"), "% of the F1 from text"),
            ("no context: F1", show("no_context_f1"), "the question alone"),
            ("shuffled: F1", show("shuffled_f1"), "another prompt's message"),
            ("truncated text: F1", show("truncated_f1"), f"cut to the wire's {show('positions')} positions"),
            ("NLL of the answer", show("nll_wire", 4), f"from text {show('nll_text', 4)}, nats per token"),
        ]
        bars = {
            "text": result["text_f1"], "wire": result["f1"], "no context": result["no_context_f1"],
            "shuffled": result["shuffled_f1"] or 0.0, "truncated": result["truncated_f1"],
        }  # fmt: skip
        unit = "F1, %"
        if result["text_f1"] < 10:
            rows.append(
                ("note", "", "this LLM does not answer these questions from the text either: retention says little")
            )
    rows += extra
    rows += [
        ("cosine to the real embeddings", show("cosine", 4), ""),
        ("bytes on the wire", show("wire_bytes", 0), f"text {show('text_bytes', 0)}, zlib -9 {show('zlib_bytes', 0)}, "
         f"packed token ids {show('packed_token_bytes', 0)}"),
        ("positions", show("positions"), f"text {show('text_positions')}"),
    ]  # fmt: skip
    if result["wire_bytes"] > result["text_bytes"]:
        rows.append(
            ("", "", f"in bytes the wire is {result['wire_bytes'] / result['text_bytes']:.1f}x LARGER than the text")
        )
    if tensors is not None:
        save_wire(out, tensors, config)
    write_samples(out / "samples.md", records)
    byte_bars = {
        "text": result["text_bytes"],
        "zlib -9": result["zlib_bytes"],
        "packed ids": result["packed_token_bytes"],
    }
    draw_report(
        out / "report.png",
        history,
        f"{title} ({result['model']})",
        bars | (more_bars or {}),
        unit,
        byte_bars | {"wire": result["wire_bytes"]},
    )
    print_table(f"{title}: {result['model']} on {result['data']}, seed {result['seed']}; files in {out}", rows)
    print(json.dumps(result), flush=True)
