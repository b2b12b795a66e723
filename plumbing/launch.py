"""Starting and ending a run: exit codes, one-line errors, device, dtype, seed, versions and commit."""

import argparse
import contextlib
import functools
import importlib.metadata
import os
import platform
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from plumbing.processes import join_processes, rank

ROOT = Path(__file__).resolve().parent.parent  # of the project
SIGNALS = (signal.SIGINT, signal.SIGTERM)
at_exit = contextlib.ExitStack()  # what launch() undoes when a run ends, such as the lock of --out


class UserError(Exception):
    """A mistake the user can fix; `str(error)` is one line: what is wrong and what to do."""


def one_line(message: object) -> str:
    """A message without what would break its line: a name that the user gave may hold a newline."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(message))


class Output:
    """Standard output or error. Where nobody reads it any more, or its disk is full, the run goes on without it."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int | None:
        return self.attempt(self.stream.write, text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, work: Callable, *args):
        try:
            return work(*args)
        except OSError:  # what the stream still holds, and all that follows, goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    signs = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)


def launch(main: Callable[[], None]) -> None:
    """Call a stage's main(). A UserError, a full disk or lack of memory ends in one line on stderr and exit code 2."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a Windows pipe cannot hold every answer
    commit()  # asked now and cached: the checkout may have changed when the run ends
    streams, joined = (sys.stdout, sys.stderr), False
    sys.stdout, sys.stderr = (Output(stream or open(os.devnull, "w")) for stream in streams)  # None: it is closed
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        joined = join_processes()
        if rank():  # only rank 0 prints
            sys.stdout = open(os.devnull, "w")
        main()
    except UserError as error:
        if rank():
            time.sleep(3)  # rank 0 has most likely found the same error: let it print before torchrun stops everyone
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        where = error.filename or "while reading or writing"
        print(f"error: {one_line(error.strerror or error)}: {one_line(where)}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        remedy = "use --gradient-checkpointing or a smaller --micro-batch-size"
        print(f"error: out of memory: {remedy}; --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(2)
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = streams
        if joined:
            torch.distributed.destroy_process_group()
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)
        at_exit.close()


def set_up(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Choose device and dtype, print why, and seed every random generator with --seed. Raises UserError."""
    device, device_reason = pick_device(args.device)
    dtype, dtype_reason = pick_dtype(args.dtype, device)
    print(f"device {device.type} ({device_reason}), dtype {name_of(dtype)} ({dtype_reason})", flush=True)
    seed_everything(args.seed, device)
    return device, dtype


def pick_device(name: str) -> tuple[torch.device, str]:
    """(device, why). `auto` takes CUDA, else the CPU; MPS only when asked for, since it has been silently wrong.

    With `split`, the layers of the LLM are on all GPUs; this is the device of codes, adapters, batches and logits.
    """
    if name in ("auto", "split"):
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device()), f"CUDA: {torch.cuda.get_device_name()}"
        return torch.device("cpu"), f"no CUDA device; {torch.get_num_threads()} threads"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this torch sees no CUDA device; use --device cpu or install torch for CUDA")
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


def name_of(dtype: torch.dtype) -> str:
    """torch.float32 -> "float32"."""
    return str(dtype).removeprefix("torch.")


def seed_everything(seed: int, device: torch.device) -> None:
    """Seed every generator. On the CPU, also forbid atomic adds: with them, two threads sum gradients in any order.

    On the CPU, numbers below 1e-38 become 0: GELU makes such numbers, and computing with them is four times slower.
    """
    torch.use_deterministic_algorithms(device.type == "cpu")
    torch.set_flush_denormal(device.type == "cpu")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    return found | {name: importlib.metadata.version(name) for name in ("transformers", "numpy", "safetensors")}


@functools.cache
def commit() -> str | None:
    """The commit of this checkout, with "-dirty" if a tracked file outside results/ was changed; None outside git."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, timeout=10)
        code = [*git, "status", "--porcelain", "-uno", "--", ":/", ":(top,exclude)results"]
        changed = subprocess.run(code, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if head.returncode else head.stdout.strip() + "-dirty" * bool(changed.stdout.strip())
