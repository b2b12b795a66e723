"""The flags that the stages share, and their checks."""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path

from plumbing.checkpoints import CHECKPOINT
from plumbing.hub import MODELS
from plumbing.launch import UserError, one_line
from plumbing.wires import SavedWire

# flags that say where and how a run works, not what it trains
NOT_SAVED = (
    "out resume overwrite eval_only dry_run random_weights send send_lines receive wire question receiver latents rate"
).split()


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line (its own print the whole usage first)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> None:
        self.exit(2, f"error: {one_line(message)} (--help lists the flags)\n")


def whole(least: int, most: float = math.inf) -> Callable[[str], int]:
    """What parses a whole number between these two."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
            limits = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"must be a whole number {limits}, not {text!r}")
        return int(text)

    return parse


positive_int, whole_number, seed_int = whole(1), whole(0), whole(0, 2**32 - 1)


def positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return value


def add_arguments(parser: Parser, stage: str, config: dict) -> None:
    """Add the flags that the four stages share; config: the stage's defaults."""
    add, number = parser.add_argument, "(default: %(default)s)"
    add("--model", help=f"alias, hub id or local directory (default: {config['model']})")
    add("--data", help=f"tiny, squad, or a FILE: .json, .jsonl, .txt (default: {config['data']})")
    add("--out", help=f"run directory (default: out/{stage})")
    add("--steps", type=positive_int, default=config["steps"], help=f"optimiser steps {number}")
    add("--batch-size", type=positive_int, default=config["batch_size"], help=f"rows per optimiser step {number}")
    add("--micro-batch-size", type=positive_int, help="rows in memory at once (default: the batch size)")
    add("--lr", type=positive_float, default=config["lr"], help=f"peak learning rate {number}")
    add("--seed", type=seed_int, default=0, help=f"of everything random in training {number}")
    devices, dtypes = ("auto", "cpu", "cuda", "mps", "split"), ("auto", "float32", "bfloat16")
    add("--device", choices=devices, default="auto", help=f"split: the LLM's layers over all GPUs {number}")
    add("--dtype", choices=dtypes, default="auto", help=f"of the LLM {number}")
    add("--gradient-checkpointing", action="store_true", help="compute the LLM's layers twice, keep less in memory")
    add("--eval-examples", type=positive_int, default=1000, help=f"test rows {number}")
    add("--eval-only", metavar="WIRE_DIR", help="evaluate a trained wire; its config.json names the model")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--overwrite", action="store_true", help="discard the unfinished run in --out")
    add("--smoke", action="store_true", help="run everything on a small scale: a few steps, 40 test rows")
    parser.set_defaults(stage=stage)


def finish_arguments(parser: Parser) -> argparse.Namespace:
    """Parse, apply --smoke, fill in --out and --micro-batch-size, and check combinations of flags."""
    args = parser.parse_args()
    if args.smoke:
        args.steps, args.eval_examples = min(args.steps, 12), min(args.eval_examples, 40)
    if args.out is None:
        args.out = f"out/{args.stage}" + "-smoke" * args.smoke + "-eval" * bool(args.eval_only)
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun
    if args.micro_batch_size is None:  # the largest that gives every process one
        sizes = range(1, args.batch_size // processes + 1)
        args.micro_batch_size = max((size for size in sizes if args.batch_size % size == 0), default=args.batch_size)
    if args.batch_size % args.micro_batch_size:
        parser.error(f"--batch-size {args.batch_size} is not a multiple of --micro-batch-size {args.micro_batch_size}")
    micro_batches = args.batch_size // args.micro_batch_size
    if micro_batches < processes:
        parser.error(
            f"--batch-size {args.batch_size} makes {micro_batches} micro-batches of {args.micro_batch_size}: too few "
            f"for {processes} processes"
        )
    if args.device == "split" and processes > 1:
        parser.error("--device split needs one process that has all GPUs: start it with python, not torchrun")
    if args.lr > 100:
        parser.error(f"argument --lr: {args.lr:g} only diverges; Adam's useful range is about 1e-5 to 1e-2")
    if args.resume and args.eval_only:
        parser.error("--resume continues a training run and --eval-only has none: drop one of them")
    if args.resume and args.overwrite:
        parser.error("--resume goes on from the checkpoint that --overwrite discards: drop one of them")
    return args


def merge_with_saved(args: argparse.Namespace, defaults: dict, saved: SavedWire | None) -> None:
    """Fill in the flags of `defaults` that were not given: from a trained wire if there is one, else the defaults.

    A wire was trained for one model, code width and adapter: UserError if a flag asks for another. --data may differ.
    With --eval-only the seed is the wire's, too. UserError also if --resume has nothing to go on from.
    """
    if args.resume and not (Path(args.out) / CHECKPOINT).exists():
        raise UserError(f"--resume: {Path(args.out) / CHECKPOINT} does not exist; start without --resume")
    for key, default in defaults.items():
        given = getattr(args, key)
        if saved is None:
            setattr(args, key, default if given is None else given)
        elif given is None:
            setattr(args, key, saved.config[key])
        elif key == "model" and (MODELS.get(given) == MODELS.get(saved.config[key], "") or Path(given).is_dir()):
            continue  # another name of the same model, or a directory: the fingerprint decides
        elif given != saved.config[key] and key != "data":
            flag = "--" + key.replace("_", "-")
            raise UserError(f"{flag} {given}: the wire in {saved.name} was trained with {flag} {saved.config[key]}")
    if args.eval_only:
        args.seed = saved.config["arguments"]["seed"]


def saved_arguments(args: argparse.Namespace) -> dict:
    """The arguments that config.json and a checkpoint keep."""
    return {key: value for key, value in vars(args).items() if key not in NOT_SAVED}
