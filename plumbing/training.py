"""Everything around a training step: resume, bad steps, log, checkpoint, signals, several processes."""

import argparse
import json
import math
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from plumbing.arguments import saved_arguments
from plumbing.checkpoints import CHECKPOINT, load_checkpoint, restore, save_checkpoint, write_atomically
from plumbing.launch import SIGNALS, UserError
from plumbing.processes import rank, sum_over_processes, world_size
from plumbing.report import rounded

# flags that a resumed run may change: where it runs, how much fits into memory, how much is evaluated
MAY_CHANGE = ("device", "micro_batch_size", "gradient_checkpointing", "eval_examples")


def micro_batches(rows: Sequence, size: int) -> list:
    """The rows of a step in parts of this size, which are in memory one at a time."""
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def must_match(args: argparse.Namespace, fingerprint: str, below: str | None = None) -> dict:
    """What must be equal for a checkpoint to fit a run: flags, LLM, and the sha256 of the wires it starts from."""
    flags = {key: value for key, value in saved_arguments(args).items() if key not in MAY_CHANGE}
    flags = {"--" + key.replace("_", "-"): value for key, value in flags.items()}
    return flags | {"the LLM of fingerprint": fingerprint, "a wire of sha256": below}


class Run:
    """`for step in run.steps():` does everything around the body of a training loop.

    Before the first step: resume from the checkpoint, if --resume asks for it. After each step: log its losses, save a
    checkpoint at every quarter of the run and every ten minutes, and, on Ctrl-C or SIGTERM, stop with a checkpoint. A
    second Ctrl-C stops at once.
    """

    SPIKE, TOO_MANY, SECONDS = 1000.0, 5, 600.0

    def __init__(
        self, args: argparse.Namespace, out: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer,
        must_match: dict, show: Callable[[], None] = lambda: None,
    ):  # fmt: skip
        """modules: what is trained, by name; must_match: see above; show: called after every checkpoint."""
        self.args, self.out, self.modules, self.optimizer = args, out, modules, optimizer
        self.must_match, self.show, self.path = must_match, show, out / CHECKPOINT
        self.total = 0 if args.eval_only else args.steps
        self.state = {"step": 0, "seconds": 0.0, "history": [], "norms": [], "skipped": 0, "in_a_row": 0}
        if args.resume:
            tensors, self.state = load_checkpoint(self.path, must_match)
            restore(tensors, modules, optimizer)
            print(f"resumed at step {self.state['step']}", flush=True)
        elif not rank():
            self.path.unlink(missing_ok=True)  # an older run's, which --resume must not take for this one's
        rows = "".join(json.dumps(row) + "\n" for row in self.state["history"])  # none from after the checkpoint
        write_atomically(out / "metrics.jsonl", rows.encode())
        self.losses: dict[str, float] = {}
        self.notes: dict[str, float] = {}
        self.saved_step, self.saved_at, self.shown_at = self.state["step"], time.monotonic(), time.monotonic()
        self.signal: int | None = None  # the last one that came to this process
        self.ending: int | None = None  # the one that ends the run after this step; all processes agree on it
        self.evaluated_at = time.perf_counter()  # when the evaluation began; `finish` reads it

    @property
    def history(self) -> list[dict]:
        """The rows of metrics.jsonl."""
        return self.state["history"]

    @property
    def seconds(self) -> float:
        """Of training, those before a resumed run included."""
        return self.state["seconds"]

    def steps(self) -> Iterator[int]:
        """The numbers of the steps, from 0; the bookkeeping of a step is done when the next one is asked for."""
        watching = threading.current_thread() is threading.main_thread()  # where Python handles signals
        handlers = {number: signal.signal(number, self.stop) for number in SIGNALS if watching}
        started = time.perf_counter() - self.seconds
        try:
            while self.state["step"] < self.total:
                self.losses, self.notes = {}, {}
                yield self.state["step"]
                self.state["step"] += 1
                self.state["seconds"] = time.perf_counter() - started
                self.log()
                if self.checkpoint_is_due():
                    self.save()
            if self.signal is not None:  # it came while the last samples were shown
                self.ending = self.signal
                self.save()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self.state["skipped"]:
            print(f"note: {self.state['skipped']} of {self.total} steps were skipped", flush=True)
        self.evaluated_at = time.perf_counter()

    def add(self, **losses: Tensor | float) -> None:
        """Add a micro-batch's part of the step's losses."""
        for name, value in losses.items():
            value = value.item() if isinstance(value, Tensor) else value
            self.losses[name] = self.losses.get(name, 0.0) + value

    def note(self, **values: float) -> None:
        """More numbers of this step for metrics.jsonl."""
        self.notes |= values

    def reduce(self) -> None:
        """Sum the gradients and the losses over the processes; nothing to do for one alone."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        summed = sum_over_processes(parameters, list(self.losses.values()))
        self.losses = dict(zip(self.losses, summed, strict=True))

    def accepts(self, norm: Tensor) -> bool:
        """Whether to take this step, from the norm of its gradient before clipping. Raises UserError.

        A step is skipped, and the weights stay as they were, if its loss or norm is NaN or infinite, or if the norm is
        SPIKE times the median of the last 100. After TOO_MANY skipped steps in a row the run ends.
        """
        s, norm, loss, step = self.state, norm.item(), sum(self.losses.values()), self.state["step"] + 1
        # a norm below 1 is never a spike: clipping does not touch it
        spike = len(s["norms"]) == 100 and norm > max(1.0, self.SPIKE * statistics.median(s["norms"]))
        if math.isfinite(loss) and math.isfinite(norm) and not spike:
            s["norms"], s["in_a_row"] = [*s["norms"][-99:], norm], 0
            return True
        s["skipped"], s["in_a_row"] = s["skipped"] + 1, s["in_a_row"] + 1
        print(f"note: step {step} is skipped: its loss is {loss:.3g}, the norm of its gradient {norm:.3g}", flush=True)
        if s["in_a_row"] == self.TOO_MANY:
            kept = f"the checkpoint of step {self.saved_step} is kept" if self.saved_step else "there is no checkpoint"
            raise UserError(
                f"loss or gradient is not a number, or far above all others, for {self.TOO_MANY} steps up to {step}: "
                f"stopped, {kept}; try a smaller --lr"
            )
        return False

    def log(self) -> None:
        """A row of metrics.jsonl at every step; a line on stdout 20 times a run, and after 30 seconds of silence."""
        step, last = self.state["step"], self.state["step"] in (1, self.total)
        lr, losses = self.optimizer.param_groups[0]["lr"], {f"loss_{n}": v for n, v in self.losses.items()}
        self.history.append(rounded({"step": step, "lr": lr} | losses | self.notes))
        if not rank():
            with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(self.history[-1] | {"seconds": round(self.seconds, 1)}) + "\n")
        if step % max(1, self.total // 20) == 0 or last or time.monotonic() - self.shown_at > 30:
            self.shown_at = time.monotonic()
            shown = "  ".join(f"{name} {value:.4g}" for name, value in self.losses.items() if value)
            left = self.seconds / step * (self.total - step)
            print(f"step {step}/{self.total}  {shown}  {self.seconds:.0f} s, {left:.0f} s left", flush=True)

    def stop(self, number: int, frame) -> None:
        """The signal handler: stop after this step, or at once on a second Ctrl-C."""
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def checkpoint_is_due(self) -> bool:
        waited = time.monotonic() - self.saved_at > self.SECONDS
        self.ending = self.signal  # a signal that comes after this line counts after the next step
        if world_size() > 1:  # all save together: at a signal to any of them, and by the clock of rank 0
            news = torch.tensor([self.ending or 0, waited and not rank()], dtype=torch.int64)
            torch.distributed.all_reduce(news, torch.distributed.ReduceOp.MAX)
            self.ending, waited = news[0].item() or None, bool(news[1])
        step = self.state["step"]
        return step % max(1, self.total // 4) == 0 or step == self.total or waited or self.ending is not None

    def save(self) -> None:
        """Write the checkpoint, and end the run if a signal asked for it."""
        save_checkpoint(self.path, self.modules, self.optimizer, self.state | {"must_match": self.must_match})
        self.saved_step, self.saved_at = self.state["step"], time.monotonic()
        if self.ending == signal.SIGINT:
            raise KeyboardInterrupt
        if self.ending is not None:
            print(f"terminated after step {self.saved_step}; --resume goes on from there", file=sys.stderr)
            sys.exit(128 + self.ending)
        self.show()
