"""Measure the embedded readers from text alone, as JSON in results/readers/: what every wire starts from.

    python results/run_readers.py
    python results/make.py           # the table in results/README.md

F1 on each kind of test passages, the bytes of a token, and how deep the reading is: the answers that are still right
when question and answer cannot look at the passage in one layer, or in all layers but one.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common import IGNORE, Batch, Reader, generate, load_reader, make_batch, make_prompt, score  # noqa: E402
from plumbing.data import TINY, load_data, read_squad  # noqa: E402
from plumbing.launch import commit, versions  # noqa: E402
from plumbing.report import rounded  # noqa: E402

MODELS = ("tiny", "tiny-qwen")


@contextlib.contextmanager
def attending(reader: Reader, masks: list[Tensor]):
    """Each layer attends where its mask [B,1,T,T] says."""

    def use(mask: Tensor):
        return lambda module, args, kwargs: (args, kwargs | {"attention_mask": mask})

    layers = reader.model.model.layers
    hooks = [
        layer.self_attn.register_forward_pre_hook(use(mask), with_kwargs=True)
        for layer, mask in zip(layers, masks, strict=True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def hiding(reader: Reader, rows: list[dict], batch: Batch, hidden: set[int]) -> list[Tensor]:
    """The mask [B,1,T,T] of each layer: causal, and in `hidden` layers, question and answer do not see the passage."""
    place = torch.arange(batch.ids.shape[1])
    sees = (place[:, None] >= place) & batch.attention[:, None, :].bool()  # [B, T, T] query, key
    ends = torch.tensor([len(reader.tokenizer(row["context"])["input_ids"]) for row in rows])[:, None]
    first = 0 if reader.tokenizer.bos_token_id is None else 1
    passage = (place >= first) & (place < ends)  # [B, T]
    blind = sees & ~((place >= ends)[:, :, None] & passage[:, None, :])
    return [(blind if layer in hidden else sees)[:, None] for layer in range(reader.model.config.num_hidden_layers)]


@torch.inference_mode()
def exact_answers(reader: Reader, rows: list[dict], hidden: set[int]) -> float:
    """Percentage of rows whose every answer token is the likeliest, with the passage hidden in these layers."""
    right = 0
    for at in range(0, len(rows), 50):
        part = rows[at : at + 50]
        batch = make_batch(reader, part)
        with attending(reader, hiding(reader, part, batch, hidden)):
            guess = reader.model(input_ids=batch.ids, use_cache=False).logits.argmax(-1)
        right += ((guess == batch.labels) | (batch.labels == IGNORE)).all(1).sum().item()
    return 100 * right / len(rows)


def measure(model: str, examples: int, squad: str | None) -> dict:
    reader = load_reader(model, torch.device("cpu"), torch.float32)
    found = {"model": model, "fingerprint": reader.fingerprint, "versions": versions(), "commit": commit()}
    found |= {
        "command": " ".join(["python results/run_readers.py", *sys.argv[1:]]),
        "parameters": sum(p.numel() for p in reader.model.parameters()),
    }
    found |= {"vocabulary": len(reader.table), "layers": reader.model.config.num_hidden_layers, "scores": {}}
    tests = {name: load_data(name, reader, examples).test for name in TINY}
    if squad:
        tests["squad"] = read_squad(Path(squad))[:: 10570 // examples][:examples]
        passages = list(dict.fromkeys(row["context"] for row in read_squad(Path(squad))))
        tokens = sum(map(len, reader.tokenizer(passages, add_special_tokens=False, verbose=False)["input_ids"]))
        found["squad_bytes_per_token"] = sum(len(passage.encode()) for passage in passages) / tokens
    for name, rows in tests.items():
        answers = generate(reader, [make_prompt(reader, row["context"], row["question"]).ids for row in rows], 32)
        blind = generate(reader, [make_prompt(reader, "", row["question"]).ids for row in rows], 32)
        f1, em = score(answers, rows)
        found["scores"][name] = {"examples": len(rows), "f1": f1, "em": em, "no_context_f1": score(blind, rows)[0]}
        print(model, name, found["scores"][name], flush=True)
    rows, layers = tests["tiny"][:400], set(range(found["layers"]))
    found["exact"] = exact_answers(reader, rows, set())
    found["exact_hidden_in"] = [exact_answers(reader, rows, {layer}) for layer in sorted(layers)]
    found["exact_hidden_but_in"] = [exact_answers(reader, rows, layers - {layer}) for layer in sorted(layers)]
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--squad", help="dev-v1.1.json; without it, SQuAD is left out")
    parser.add_argument("--only", choices=MODELS)
    args = parser.parse_args()
    (HERE / "readers").mkdir(exist_ok=True)
    for model in MODELS if args.only is None else [args.only]:
        row = rounded(measure(model, args.examples, args.squad))
        (HERE / "readers" / f"{model}.json").write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")
