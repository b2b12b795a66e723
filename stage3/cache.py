"""What a frozen LLM keeps of the tokens it has read, as rows of numbers that can be chosen, changed and put back.

A *row* holds the keys and values of one token in every layer. Keys are taken as they were before RoPE turned them by
their position, so that the same content has the same numbers wherever it stands; a row goes back into a cache at the
position where its token stood. Between the rows that stay there are gaps, so every position is given explicitly.

Letters: B batch, T padded length, S rows that stay, n numbers of a row, H heads, h numbers of a head, V vocabulary.
"""

import inspect
import math
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from common import MAX_NEW_TOKENS, PROMPT, Reader, answer_ids, as_prompt, make_prompt
from plumbing import hub
from plumbing.launch import UserError
from plumbing.spelling import tokenize

PLAIN = {"DynamicLayer", "DynamicSlidingWindowLayer"}  # layers of a cache with keys and values of every token


class Passage:
    """The tokens of a context, and of each question behind it with its answer."""

    def __init__(self, reader: Reader, rows: list[dict]):
        """rows: questions about one context, with or without answers."""
        longest = max((row["question"] for row in rows), key=lambda question: len(tokenize(reader, question)))
        prompt = make_prompt(reader, rows[0]["context"], longest)
        context, self.truncated = prompt.context, prompt.truncated  # its end is cut if it must be
        prompts = [make_prompt(reader, context, row["question"]) for row in rows]
        whole = as_prompt(reader, PROMPT.format(context=context, question=longest))
        end = whole.rindex(f"\nQuestion: {longest}".rstrip())  # a chat's template may strip the end
        ids = tokenize(reader, whole[:end])
        split = min(shared(ids, prompt.ids) for prompt in prompts)
        self.ids = ids[:split]
        self.opening = shared(self.ids, opening_ids(reader))  # tokens before the context; they always stay
        self.tails = [prompt.ids[split:] for prompt in prompts]
        golds = [row["answers"][0] if "answers" in row else None for row in rows]
        pairs = zip(prompts, golds, strict=True)
        self.answers = [[] if gold is None else answer_ids(reader, prompt, gold) for prompt, gold in pairs]

    def count(self, rate: float) -> int:
        """Slots for the context at so many tokens a slot."""
        return math.ceil((len(self.ids) - self.opening) / rate)


def opening_ids(reader: Reader) -> list[int]:
    """The tokens in front of every context: a start token, a chat's instruction, or none."""
    whole = as_prompt(reader, PROMPT.format(context="", question="?"))
    return tokenize(reader, whole[: whole.rindex("\nQuestion: ?")])


def shared(a: list[int], b: list[int]) -> int:
    """How many tokens two lists begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def padded(lists: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids [B,T], mask [B,T]) of lists of tokens, padded on the right."""
    length = max(map(len, lists))
    ids = torch.tensor([tokens + [0] * (length - len(tokens)) for tokens in lists])
    real = torch.tensor([[1] * len(tokens) + [0] * (length - len(tokens)) for tokens in lists])
    return ids.to(device), real.to(device)


@dataclass
class Memory:
    """What an LLM has of B contexts when it begins to read their questions."""

    rows: Tensor  # [B, S, n]
    at: Tensor  # [B, S] where each row's token stood
    real: Tensor  # [B, S] 1, or 0 for padding, which is on the left
    lengths: Tensor  # [B] tokens of the whole context: where a question begins

    def of(self, contexts: list[int]) -> "Memory":
        """Of some of the contexts, in any order; of one several times, if it is asked several times."""
        return Memory(self.rows[contexts], self.at[contexts], self.real[contexts], self.lengths[contexts])


class Layout:
    """How the cache of one LLM becomes rows, and rows its cache."""

    def __init__(self, reader: Reader):
        """Raises UserError for an LLM that keeps no keys and values of every token, or takes no positions."""
        self.reader, kind = reader, f"--model {reader.name}: a {type(reader.model).__name__}"
        if "position_ids" not in inspect.signature(reader.model.forward).parameters:
            raise UserError(f"{kind} takes no positions, and slots have gaps between them")
        if getattr(reader.model.config, "alibi", False):
            raise UserError(f"{kind} attends by distance (ALiBi), not by positions, and slots have gaps between them")
        with torch.no_grad():
            token = torch.zeros(1, 1, dtype=torch.long, device=reader.device)
            cache = getattr(reader.model(input_ids=token, use_cache=True), "past_key_values", None)
        layers = getattr(cache, "layers", [cache])
        other = sorted({type(layer).__name__ for layer in layers} - PLAIN)
        if other:
            raise UserError(f"{kind} keeps a {other[0]} of its context, and slots are keys and values")
        parts = [part for layer in layers for part in (layer.keys, layer.values)]
        self.shapes = [(part.shape[1], part.shape[3]) for part in parts]  # (H, h)
        self.n = sum(heads * width for heads, width in self.shapes)
        # heads that keep keys and values, in all layers; the head [n] of each number of a row, counted through them
        self.layers = [heads for heads, _ in self.shapes[::2]]
        self.heads, owners, first = sum(self.layers), [], 0
        for i, (heads, width) in enumerate(self.shapes):
            owners.append(first + torch.arange(heads).repeat_interleave(width))
            first += heads * (i % 2)  # keys and values of a layer have the same heads
        self.owners = torch.cat(owners).to(reader.device)
        # RoPE: it is known, and `turned` turns back, if a token's first key is then the same at three positions
        self.rotary = next((m for name, m in reader.model.named_modules() if name.endswith("rotary_emb")), None)
        self.rotate = getattr(sys.modules[type(reader.model).__module__], "apply_rotary_pos_emb", None)
        with torch.no_grad():
            keys = reader.model(input_ids=token.expand(1, 3), use_cache=True).past_key_values.layers[0].keys
        for self.width in (1, 2):  # some LLMs give a cosine for each number of a key, others one for each two
            back = self.attempt(keys)
            if back is not None and (back[:, :, 2] - back[:, :, 0]).norm() < 0.05 * back[:, :, 0].norm():
                return
        self.rotary = None  # keys stay as they lie in the cache

    def attempt(self, keys: Tensor) -> Tensor | None:
        """Keys of positions 0, 1, ... turned back; None where this LLM's RoPE has another form."""
        try:
            return self.turned(keys, torch.arange(keys.shape[2], device=keys.device)[None], back=True)
        except (RuntimeError, TypeError, ValueError):
            return None

    def turned(self, keys: Tensor, at: Tensor, back: bool = False) -> Tensor:
        """Keys [B,H,S,h] turned by their positions [B,S], or turned back."""
        if self.rotary is None:
            return keys
        cos, sin = self.rotary(keys, at)
        if back:
            scale = cos.square() + sin.square()  # not 1 in some LLMs for long contexts
            cos, sin = cos / scale, -sin / scale
        width = self.width * cos.shape[-1]  # of a key, some LLMs turn only the first numbers
        turned, _ = self.rotate(keys[..., :width], keys[..., :width], cos, sin)
        return torch.cat([turned, keys[..., width:]], -1)

    def rows(self, cache, at: Tensor) -> Tensor:
        """[B,T,n] float32: what a cache of transformers holds of T tokens at the positions `at` [B,T]."""
        parts = [(self.turned(layer.keys, at, back=True), layer.values) for layer in cache.layers]
        return torch.cat([part.transpose(1, 2).flatten(2).float() for pair in parts for part in pair], -1)

    def read(self, real: Tensor, **inputs: Tensor) -> Tensor:
        """[B,T,n]: what the LLM keeps of tokens that it reads; inputs: input_ids or inputs_embeds; real: mask [B,T]."""
        output = self.reader.model(**inputs, attention_mask=real, past_key_values=hub.DynamicCache(), logits_to_keep=1)
        return self.rows(output.past_key_values, torch.arange(real.shape[1], device=real.device).expand_as(real))

    def contexts(self, passages: list[Passage]) -> Tensor:
        """[B,T,n] of contexts, read by the LLM as it is."""
        ids, real = padded([passage.ids for passage in passages], self.reader.device)
        return self.read(real, input_ids=ids)

    def cache(self, memory: Memory, of: list[int] | None = None):
        """A cache of transformers with these rows, from which the frozen LLM reads on. Differentiable.

        of: which context each row of the cache holds; without it, each context has one row.
        """
        parts = memory.rows.split([heads * width for heads, width in self.shapes], -1)
        parts = [part.unflatten(-1, shape).transpose(1, 2) for part, shape in zip(parts, self.shapes, strict=True)]
        cache, dtype = hub.DynamicCache(), self.reader.dtype
        for layer, (keys, values) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
            keys, values = self.turned(keys, memory.at).to(dtype), values.to(dtype)
            if of is not None:
                keys, values = keys[of], values[of]
            cache.update(keys, values, layer)
        return cache


def stacked(openings: list[Tensor], rows: list[Tensor], at: list[Tensor], lengths: list[int]) -> Memory:
    """Memory of contexts from the rows [S,n] at the positions [S] of each, behind the rows of its opening."""
    device = rows[0].device
    rows = [torch.cat(pair) for pair in zip(openings, rows, strict=True)]
    pairs = zip(openings, at, strict=True)
    at = [torch.cat([torch.arange(len(opening), device=device), part]) for opening, part in pairs]
    padded_rows, places, real = (
        pad_sequence(parts, batch_first=True, padding_side="left")
        for parts in (rows, at, [torch.ones_like(part) for part in at])
    )
    return Memory(padded_rows, places, real, torch.tensor(lengths, device=device))


def whole(layout: Layout, passages: list[Passage]) -> Memory:
    """Memory of contexts with the rows of all their tokens."""
    pairs = zip(layout.contexts(passages), passages, strict=True)
    rows = [row[: len(passage.ids)] for row, passage in pairs]
    at, nothing = [torch.arange(len(row), device=row.device) for row in rows], [row[:0] for row in rows]
    return stacked(nothing, rows, at, [len(row) for row in rows])


def logits_behind(layout: Layout, memory: Memory, of: list[int], tails: list[list[int]], first: list[int]) -> Tensor:
    """[targets,V] float32: what the frozen LLM predicts for the tokens of each tail from its `first` one on.

    Tail i is read behind context of[i] of the memory.
    """
    reader = layout.reader
    ids = pad_sequence([torch.tensor(tail) for tail in tails], batch_first=True)  # [B, T]
    place = torch.arange(ids.shape[1])
    ends = torch.tensor([len(tail) for tail in tails])[:, None]
    labelled = (place >= torch.tensor(first)[:, None] - 1) & (place < ends - 1)
    columns = labelled.any(0).nonzero()[:, 0]
    real = (place < ends).long().to(reader.device)
    output = reader.model(
        input_ids=ids.to(reader.device),
        past_key_values=layout.cache(memory, of),
        attention_mask=torch.cat([memory.real[of], real], 1),
        position_ids=memory.lengths[of][:, None] + place.to(reader.device),
        logits_to_keep=columns,
    )
    return output.logits[labelled[:, columns].to(reader.device)].float()


def nll_behind(layout: Layout, memory: Memory, passages: list[Passage]) -> Tensor:
    """Sum of the NLL (scalar, nats) of the answers to all questions about the passages that the memory holds."""
    of = [i for i, passage in enumerate(passages) for _ in passage.tails]
    pairs = [pair for passage in passages for pair in zip(passage.tails, passage.answers, strict=True)]
    logits = logits_behind(layout, memory, of, [t + a for t, a in pairs], [len(t) for t, _ in pairs])
    labels = torch.tensor([token for _, answer in pairs for token in answer], device=logits.device)
    return F.cross_entropy(logits, labels, reduction="sum")


@torch.inference_mode()
def answers_behind(layout: Layout, memory: Memory, tails: list[list[int]]) -> list[str]:
    """Greedy answers to questions (their tokens); question i is read behind context i of the memory.

    Questions of one length are read together: padding inside a sequence would push tokens out of a sliding window.
    """
    answers = {}
    for length in {len(tail) for tail in tails}:
        chosen = [i for i, tail in enumerate(tails) if len(tail) == length]
        found = greedy(layout, memory.of(chosen), torch.tensor([tails[i] for i in chosen]))
        answers |= zip(chosen, found, strict=True)
    return [answers[i] for i in range(len(tails))]


def greedy(layout: Layout, memory: Memory, ids: Tensor) -> list[str]:
    """Greedy answers to questions [B,T] of one length."""
    reader, device = layout.reader, layout.reader.device
    ids, cache, found = ids.to(device), layout.cache(memory), []
    at = memory.lengths[:, None] + torch.arange(ids.shape[1], device=device)
    mask, ends = F.pad(memory.real, (0, ids.shape[1]), value=1), torch.tensor(reader.eos_ids, device=device)
    done = torch.zeros(len(ids), dtype=torch.bool, device=device)
    while len(found) < MAX_NEW_TOKENS and not done.all():
        output = reader.model(
            input_ids=ids, past_key_values=cache, attention_mask=mask, position_ids=at, logits_to_keep=1
        )
        ids = output.logits[:, -1:].argmax(-1)  # [B, 1]
        found.append(ids)
        done |= torch.isin(ids[:, 0], ends)
        mask, at = F.pad(mask, (0, 1), value=1), at[:, -1:] + 1
    return [reader.answer(row) for row in torch.cat(found, 1).tolist()]
