"""Files that are whole or not there, and checkpoints: one safetensors file with a sha256. Nothing is ever unpickled."""

import hashlib
import json
import os
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from plumbing.launch import UserError
from plumbing.processes import rank

CHECKPOINT = "checkpoint.safetensors"  # in a run's directory


def write_atomically(path: Path, payload: bytes) -> None:
    """Write beside the file, then rename: a crash or a full disk leaves the old file intact. Only rank 0 writes."""
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
            error.filename = str(path)  # the error of a full disk names no file
        raise


def module_tensors(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """{"adapter": module} -> {"adapter.weight": tensor, ...}: the names that wires and checkpoints use."""
    return {f"{name}.{key}": tensor for name, part in modules.items() for key, tensor in part.state_dict().items()}


def sha256_of(tensors: dict[str, Tensor], text: str = "") -> str:
    """Of tensors, their names, dtypes and shapes, and a text."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_checkpoint(path: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Write the modules' and the optimiser's tensors as one safetensors file; state: whatever JSON can hold."""
    tensors = module_tensors(modules)
    for number, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{key}": tensor for key, tensor in moments.items()}
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(state)
    write_atomically(path, safetensors.torch.save(tensors, {"state": text, "sha256": sha256_of(tensors, text)}))


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict]:
    """(tensors, state). Raises ValueError, SafetensorError and the like for a file that is not a whole checkpoint."""
    with safetensors.safe_open(path, "pt") as file:
        metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    text = metadata.get("state", "")
    if metadata.get("sha256") != sha256_of(tensors, text):
        raise ValueError("damaged")
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise ValueError("it holds NaN or infinity")
    return tensors, json.loads(text)


def load_checkpoint(path: Path, must_match: dict) -> tuple[dict[str, Tensor], dict]:
    """(tensors, state) of an interrupted run with the same flags, LLM and wires (`must_match`). Raises UserError."""
    try:
        tensors, state = read_checkpoint(path)
        saved = state.pop("must_match")
    except Exception as error:
        reason = str(error) if type(error) is ValueError else type(error).__name__
        raise UserError(f"--resume: {path} is not a whole checkpoint ({reason}); start without --resume") from None
    if saved.keys() != must_match.keys():
        raise UserError(f"--resume: {path} was made by another stage, or another version of it; start without --resume")
    for name, value in must_match.items():
        if saved[name] != value:
            raise UserError(f"--resume: {path} was made with {name} {saved[name]}, and this run has {value}")
    return tensors, state


def restore(tensors: dict[str, Tensor], modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
    """Load what save_checkpoint wrote back into modules and optimiser."""
    for name, module in modules.items():
        module.load_state_dict({k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")})
    moments: dict[int, dict] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".")
            moments.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
