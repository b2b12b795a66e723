"""What a message is measured beside: the text cut short, zlib with a dictionary, and the LLM's own prediction."""

import math
import zlib

import torch

from common import Prompt, Reader, generate, mean_nll, score, truncated_prompt
from plumbing.data import Data


def truncation_curve(reader: Reader, data: Data, prompts: list[Prompt], batch_size: int) -> list[dict]:
    """F1 where a quarter, a half or three quarters of the text are sent: the baseline that is always there."""
    curve = []
    for share in (0.25, 0.5, 0.75):
        pairs = zip(data.test, prompts, strict=True)
        cut = [truncated_prompt(reader, row, math.ceil(share * len(prompt.ids))) for row, prompt in pairs]
        f1, _ = score(generate(reader, [prompt.ids for prompt in cut], batch_size), data.test)
        mean_bytes = sum(len(prompt.text.encode()) for prompt in cut) / len(cut)
        positions = sum(len(prompt.ids) for prompt in cut) / len(cut)
        curve.append({"share": share, "bytes": mean_bytes, "positions": positions, "f1": f1})
    return curve


def zlib_with_dictionary(texts: list[str], known: bytes) -> float:
    """Mean bytes of texts by zlib -9 when both sides know the last 32 KB of `known`."""
    total = 0
    for text in texts:
        deflate = zlib.compressobj(9, zdict=known[-32768:])
        total += len(deflate.compress(text.encode()) + deflate.flush())
    return total / len(texts)


@torch.inference_mode()
def bytes_of_nll(reader: Reader, id_lists: list[list[int]], batch_size: int) -> float:
    """Mean bytes that an arithmetic coder would need with this LLM's own prediction of its tokens."""
    rows = [{"ids": ids} for ids in id_lists]
    nats = mean_nll(reader, rows, batch_size) * sum(len(ids) - 1 for ids in id_lists)
    return nats / math.log(2) / 8 / len(rows)
