"""Run directories and trained wires: the lock of --out, and wire.safetensors with its config.json."""

import argparse
import contextlib
import fnmatch
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import filelock
import safetensors.torch
import torch
from torch import Tensor, nn

from plumbing.checkpoints import CHECKPOINT, sha256_of, write_atomically
from plumbing.kinds import ANYTHING, COUNT, FLAG, NUMBER, SEED, TEXT, check, parse
from plumbing.launch import ROOT, UserError, at_exit
from plumbing.processes import rank

IN_USE: set[Path] = set()  # directories that this run reads


def mark_as_read(path: Path) -> None:
    """This run reads a directory, so --out may not be that one."""
    IN_USE.add(path)
    at_exit.callback(IN_USE.discard, path)


def open_out(args: argparse.Namespace, folder: str = "") -> Path:
    """Make --out (or a folder in it), see that it can be written, and keep other runs out.

    Raises UserError also where something would be lost: a wire or an LLM that this run reads, or an unfinished run.
    """
    path = Path(args.out, folder)
    if rank():
        return path
    if path.exists() and any(other.exists() and path.samefile(other) for other in IN_USE):
        raise UserError(f"--out {path}: this run reads that directory, and would overwrite it; give another directory")
    lock = filelock.FileLock(path / ".lock", timeout=0)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise UserError(f"--out {path}: another run is writing there; give another directory, or wait for it") from None
    except OSError as error:
        raise UserError(f"--out {path}: cannot write there ({error.strerror}); give another directory") from None
    at_exit.callback(unlock, lock)
    if is_unfinished(path) and not (args.resume or args.overwrite):
        raise UserError(
            f"--out {path}: the checkpoint of an unfinished run is there; go on with --resume, discard it with "
            "--overwrite, or give another directory"
        )
    return path


def is_unfinished(path: Path) -> bool:
    """Whether the last run in a directory did not end: its checkpoint is newer than config.json, a wire's last file."""
    config, checkpoint = path / "config.json", path / CHECKPOINT
    return checkpoint.exists() and not (config.exists() and config.stat().st_mtime_ns >= checkpoint.stat().st_mtime_ns)


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
    sha256: str  # of tensors and config


class Contents(NamedTuple):
    """What a stage's wire holds: the description of its part of config.json, and the shapes of tensors."""

    config: dict
    tensors: dict[str, str]  # name -> "d k float32": embedding_width, code_dim; any other letter is free. See MODULE


MODULE = "a module's"  # of names such as "adapter.*": load_module compares them with the module

# what config.json of every wire holds; the rest is said by the stages
EVERY_WIRE = {
    "stage": TEXT, "model": TEXT, "fingerprint": TEXT, "data": TEXT, "wire_sha256": TEXT,
    "arguments": {"seed": SEED, "steps": COUNT, "*": FLAG},
    "metrics": {"train_seconds": NUMBER, "*": ANYTHING},
    "controls": {"*": ANYTHING},
}  # fmt: skip


def save_wire(out: Path, tensors: dict[str, Tensor], config: dict) -> None:
    """Write wire.safetensors and config.json, which --eval-only and the later stages start from."""
    kept = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    config = config | {"wire_sha256": digest(kept, config)}
    write_atomically(out / "wire.safetensors", safetensors.torch.save(kept))
    write_atomically(out / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def digest(tensors: dict[str, Tensor], config: dict) -> str:
    """Of a wire: its tensors, and what its config says."""
    said = {key: value for key, value in config.items() if key != "wire_sha256"}
    return sha256_of(tensors, json.dumps(said, sort_keys=True))


def load_wire(name: str, stage: str, contents: Contents) -> SavedWire:
    """A trained wire from its directory; the shipped ones are found from any directory.

    Raises UserError if the directory holds no wire, one of another stage, or a damaged one, and names what is not as
    `contents` has it.
    """
    path = Path(name)
    if not path.exists() and (ROOT / name).exists():
        path = ROOT / name
    mark_as_read(path)
    source = f"{name}: config.json"
    try:
        config = parse((path / "config.json").read_text(encoding="utf-8"), {"stage": TEXT, "*": ANYTHING}, source)
        tensors = safetensors.torch.load_file(path / "wire.safetensors")
    except FileNotFoundError as error:
        raise UserError(f"{name} is not a trained wire: no {Path(error.filename or 'wire.safetensors').name}") from None
    except (OSError, ValueError, TypeError, AttributeError, safetensors.SafetensorError) as error:
        raise UserError(f"{name}: config.json or wire.safetensors cannot be read ({type(error).__name__})") from None
    if config["stage"] != stage:
        raise UserError(f"{name} is a wire of {config['stage']}, not of {stage}")
    check(config, EVERY_WIRE | contents.config, source)
    check_shapes(name, tensors, contents.tensors, d=config.get("embedding_width"), k=config.get("code_dim"))
    sha256 = digest(tensors, config)
    if config["wire_sha256"] != sha256:
        raise UserError(f"{name}: wire.safetensors or config.json is damaged, or not the one that was written with it")
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise UserError(f"{name}: {key} in wire.safetensors holds NaN or infinity")
    return SavedWire(name, tensors, config, sha256)


def check_shapes(wire: str, tensors: dict[str, Tensor], shapes: dict[str, str], **sizes: int | None) -> None:
    """Raises UserError naming a tensor that is not as "d k float32" says. sizes: of the letters; others are free."""
    for name in tensors:
        if not any(fnmatch.fnmatchcase(name, known) for known in shapes):
            compare(wire, name, described(tensors[name]), described(None))
    sizes = {letter: size for letter, size in sizes.items() if size is not None}
    for name, words in shapes.items():
        if words == MODULE:
            continue
        *letters, dtype = words.split()
        for letter, size in zip(letters, tensors[name].shape if name in tensors else (), strict=False):
            sizes.setdefault(letter, size)  # from here on it is known
        should_be = f"[{', '.join(str(sizes.get(letter, letter)) for letter in letters)}] {dtype}"
        compare(wire, name, described(tensors.get(name)), should_be)


def compare(wire: str, name: str, is_: str, should_be: str) -> None:
    if is_ != should_be:
        raise UserError(f"{wire}: {name} in wire.safetensors is {is_}, and with its config.json should be {should_be}")


def load_module(module: nn.Module, prefix: str, tensors: dict[str, Tensor], wire: str) -> None:
    """Load the tensors of a wire whose names start with `prefix`. Raises UserError naming one that does not fit."""
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    expected = module.state_dict()
    for name in [*expected, *sorted(found.keys() - expected.keys())]:
        compare(wire, prefix + name, described(found.get(name)), described(expected.get(name)))
    module.load_state_dict(found)


def described(tensor: Tensor | None) -> str:
    """Shape and dtype, such as "[1024, 24] float32"; "not there" for None."""
    return "not there" if tensor is None else f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
