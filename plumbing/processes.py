"""Data parallelism under torchrun. With one process, every function here does nothing of note."""

import os
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def join_processes() -> bool:
    """Join the processes that torchrun started. True if this call did it, False for one process alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return False
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()  # NCCL for tensors on GPUs, gloo for the others
    return True


def rank() -> int:
    """The number of this process. Only rank 0 prints and writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def my_share(items: Sequence) -> list:
    """The items (the micro-batches of a step, say) that this process works on; all of them if it is alone."""
    return list(items)[rank() :: world_size()]


def map_over_processes(work: Callable, items: Sequence) -> list:
    """[work(item) for item in items], divided among the processes; every process gets all the results."""
    mine = [work(item) for item in my_share(items)]
    if world_size() == 1:
        return mine
    shares: list = [None] * world_size()
    dist.all_gather_object(shares, mine)  # pickled, but only between the processes of one run
    return [shares[i % len(shares)][i // len(shares)] for i in range(len(items))]


def sum_over_processes(parameters: Iterable[Tensor], values: list[float]) -> list[float]:
    """Sum gradients (in place) and values over all processes, bit for bit the same in each of them.

    A gradient that is None in every process stays None, so that the optimiser skips its parameter.
    """
    if world_size() == 1:
        return values
    parameters = list(parameters)
    numbers = torch.tensor([float(p.grad is not None) for p in parameters] + values, dtype=torch.float64)
    dist.all_reduce(numbers)
    for p, count in zip(parameters, numbers.tolist(), strict=False):
        if count:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
    return numbers[len(parameters) :].tolist()
