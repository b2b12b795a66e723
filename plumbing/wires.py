"""Run directories and trained wires: the lock of --out, and wire.safetensors with its config.json."""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

import filelock
import safetensors.torch
import torch
from torch import Tensor, nn

from plumbing.checkpoints import sha256_of, write_atomically
from plumbing.launch import ROOT, UserError, at_exit
from plumbing.processes import rank


def open_out(name: str) -> Path:
    """Make the output directory, see that it can be written, and keep other runs out. Raises UserError."""
    path = Path(name)
    if rank():
        return path
    lock = filelock.FileLock(path / ".lock", timeout=0)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise UserError(f"--out {name}: another run is writing there; give another directory, or wait for it") from None
    except OSError as error:
        raise UserError(f"--out {name}: cannot write there ({error.strerror}); give another directory") from None
    at_exit.callback(unlock, lock)
    return path


def unlock(lock: filelock.BaseFileLock) -> None:
    """Remove the file while the lock is held, so that it is not the next run's; Windows removes it by itself."""
    with contextlib.suppress(OSError):
        Path(lock.lock_file).unlink()
    lock.release()


@dataclass
class SavedWire:
    """A trained wire that was loaded."""

    name: str  # as the user gave it
    tensors: dict[str, Tensor]
    config: dict
    sha256: str  # of the tensors


def save_wire(out: Path, tensors: dict[str, Tensor], config: dict) -> None:
    """Write wire.safetensors and config.json, which --eval-only and the later stages start from."""
    kept = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    config = config | {"wire_sha256": sha256_of(kept)}
    write_atomically(out / "wire.safetensors", safetensors.torch.save(kept))
    write_atomically(out / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def load_wire(name: str, stage: str, config_keys: tuple[str, ...], tensor_keys: tuple[str, ...]) -> SavedWire:
    """A trained wire from its directory; the shipped ones are found from any directory.

    config_keys may name an inner key: "metrics.train_seconds". Raises UserError if the directory holds no wire, or one
    of another stage, or if the wire is damaged or lacks a key.
    """
    path = Path(name)
    if not path.exists() and (ROOT / name).exists():
        path = ROOT / name
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
    sha256 = sha256_of(tensors)
    if config.get("wire_sha256", "") not in ("", sha256):
        raise UserError(f"{name}: wire.safetensors is damaged, or not the one its config.json was written with")
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{name}: {key} in wire.safetensors holds NaN or infinity")
    return SavedWire(name, tensors, config, sha256)


def lacks(config, key: str) -> bool:
    """Whether a key such as "metrics.train_seconds" is missing."""
    for part in key.split("."):
        if not isinstance(config, dict) or part not in config:
            return True
        config = config[part]
    return False


def load_module(module: nn.Module, prefix: str, tensors: dict[str, Tensor], wire: str) -> None:
    """Load the tensors of a wire whose names start with `prefix`. Raises UserError naming one that does not fit."""
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    expected = module.state_dict()
    for name in [*expected, *sorted(found.keys() - expected.keys())]:
        is_, should_be = described(found.get(name)), described(expected.get(name))
        if is_ != should_be:
            raise UserError(
                f"{wire}: {prefix}{name} in wire.safetensors is {is_}, and with its config.json should be {should_be}"
            )
    module.load_state_dict(found)


def described(tensor: Tensor | None) -> str:
    """Shape and dtype, such as "[1024, 24] float32"; "not there" for None."""
    return "not there" if tensor is None else f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
