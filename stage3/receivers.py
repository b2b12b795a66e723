"""Who can read a message: the stage-2 wires inside a stage-3 wire, one entry in its config.json for each LLM."""

import numpy as np
import torch
from torch import Tensor

from common import PCA, Reader
from kernels.adapter import project
from plumbing.kinds import COUNT, NUMBER, TEXT, one_of
from plumbing.launch import UserError
from plumbing.wires import check_shapes, load_module, load_wire
from stage1_pca_adapter import ADAPTERS, Adapter
from stage2_encoder import WIRE as STAGE2_WIRE
from stage2_encoder import Encoder
from stage2_encoder import Wire as Stage2Wire

# what config.json holds for each LLM; direct: only if it has a pooler
RECEIVER = {
    "model": TEXT, "fingerprint": TEXT, "prefix": TEXT, "adapter": one_of(*ADAPTERS), "code_dim": COUNT,
    "stage2": TEXT,
    "direct?": {"rate": NUMBER, "steps": COUNT, "train_seconds": NUMBER},
}  # fmt: skip


def add_receivers(names: list[str], tensors: dict[str, Tensor], receivers: list[dict]) -> tuple[list[dict], list[str]]:
    """Add trained stage-2 wires to `tensors` and `receivers`. Returns (their entries, sha256 of each).

    Raises UserError for a wire that does not load, and for a second one of the same LLM.
    """
    new, digests = [], []
    for name in names:
        wire = load_wire(name, "stage2", STAGE2_WIRE)
        if any(entry["fingerprint"] == wire.config["fingerprint"] for entry in receivers):
            raise UserError(f"--stage2 {name}: there is a receiver for {wire.config['model']} already")
        entry = {key: wire.config[key] for key in ("model", "fingerprint", "adapter", "code_dim")}
        entry |= {"prefix": f"receiver{len(receivers)}.", "stage2": name}
        receivers.append(entry)
        new.append(entry)
        digests.append(wire.sha256)
        tensors |= {entry["prefix"] + part: tensor for part, tensor in wire.tensors.items()}
    return new, digests


def entry_of(receivers: list[dict], reader: Reader, wire: str) -> dict:
    """The receiver that is for this LLM. Raises UserError."""
    for entry in receivers:
        if entry["fingerprint"] == reader.fingerprint:
            return entry
    names = ", ".join(f"{entry['model']} ({entry['fingerprint']})" for entry in receivers)
    mine = f"{reader.name} ({reader.fingerprint})"
    raise UserError(f"{wire} has no receiver for {mine}, only for {names}: train a stage-2 wire for it")


def load_receiver(tensors: dict[str, Tensor], entry: dict, reader: Reader, wire: str) -> Stage2Wire:
    """The stage-2 wire of a reader, from its part of a stage-3 wire's tensors. Raises UserError."""
    prefix = entry["prefix"]
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    vocabulary, d = reader.table.shape
    check_shapes(f"{wire}: {prefix}", own, STAGE2_WIRE.tensors, d=d, k=entry["code_dim"])
    mean, components = own["mean"].to(reader.device), own["components"].to(reader.device)
    table_codes = project(reader.table, mean, components).to(torch.float16).float()
    pca, ones = PCA(mean, components, torch.ones(d)), torch.ones(vocabulary, device=reader.device)
    adapter = Adapter(entry["adapter"], pca, reader, table_codes, ones).to(reader.device)
    encoder = Encoder(entry["code_dim"]).to(reader.device).eval()
    load_module(adapter, "adapter.", own, wire)
    load_module(encoder, "encoder.", own, wire)
    prefix_codes, rms = own["prefix_codes"].to(reader.device), own["target_rms"].to(reader.device)
    return Stage2Wire(reader, encoder, adapter, prefix_codes, rms)


def spelling_tensors(pieces: list[bytes]) -> dict[str, Tensor]:
    """What each code spells, end to end, and the lengths."""
    spelled = np.frombuffer(b"".join(pieces), np.uint8).copy()
    lengths = torch.tensor([len(piece) for piece in pieces], dtype=torch.uint8)
    return {"sender.spelled": torch.from_numpy(spelled), "sender.lengths": lengths}
