"""Which tokens of a context stay: each head of an LLM scores them, and keeps those with its largest scores.

    hidden states of the LLM, frozen -> [scorer] -> a score of each token for each head

The scorers begin as a ridge regression of the attention that heads pay while the LLM writes answers. Then they learn
from the loss of the answers. Each head looks at each token through a gate: a number that is added to the logits of its
attention. The gates of its largest scores are open. A gate that is half open teaches little, since answers can live on
what leaks through. So gates are nearly hard, and noise moves tokens over the edge, now in and now out.

Letters: B batch, T padded length, S slots, n numbers of a row, H heads that keep keys and values, in all layers
together, d LLM embedding width.
"""

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from common import Reader
from plumbing.launch import UserError
from plumbing.processes import my_share, sum_over_processes
from plumbing.training import Run, micro_batches
from stage3.cache import Layout, Passage, nll_behind, padded, whole

STEPS, PASSAGES, LR = 3000, 4, 1e-3  # of the training; passages of a step; peak
SMALL = 0.01  # gates see the asinh of score / SMALL: the logarithm of a larger score, but linear around zero
NOISE, SOFTNESS = 0.3, 0.05  # of gates, on that scale


# ---------------------------------------------------------------------------------------------------------------------
# the choice


@dataclass
class Choice:
    """The tokens of one context that stay."""

    at: Tensor  # [S] where each slot stands
    tokens: Tensor  # [S, H] the token that each head keeps there

    def rows(self, rows: Tensor, owners: Tensor) -> Tensor:
        """Rows [S,n] of slots, from those [T,n] of tokens. owners: the head [n] of each number."""
        return rows.gather(0, self.tokens[:, owners])


def seen(reader: Reader, passages: list[Passage]) -> Tensor:
    """[B,T,6d+1]: what a scorer sees of contexts.

    These are a token's states in four layers of the LLM as it is, and the last states of the two tokens before it.
    """
    ids, real = padded([passage.ids for passage in passages], reader.device)
    states = reader.model(
        input_ids=ids, attention_mask=real, use_cache=False, output_hidden_states=True, logits_to_keep=1
    ).hidden_states
    layers = len(states) - 1
    states = [states[math.ceil(layers * part / 4)].to(ids.device).float() for part in (1, 2, 3, 4)]
    states = [state * state.square().mean(-1, keepdim=True).rsqrt() for state in states]
    before = [F.pad(states[-1], (0, 0, back, 0))[:, :-back] for back in (1, 2)]
    return F.pad(torch.cat([*states, *before], -1), (0, 1), value=1.0)


@torch.no_grad()
def choose(reader: Reader, scorer: Tensor, passages: list[Passage], counts: list[int]) -> list[Choice]:
    """The `counts` slots of each context, in the text's order. scorer: [6d+1,H].

    They stand at the tokens whose scores have the largest sums over all heads. A head keeps its own best tokens: where
    it does not want a slot's token, it keeps another there.
    """
    scores = seen(reader, passages) @ scorer  # [B, T, H]
    scores, chosen = scores.round(decimals=3), []  # so that ties are the same on every machine
    for passage, part, count in zip(passages, scores, counts, strict=True):
        part = part[passage.opening : len(passage.ids)]
        at = best(part.sum(1, keepdim=True), count)[:, 0]
        wanted = torch.zeros_like(part, dtype=torch.bool).scatter(0, best(part, count), True)
        tokens, unwanted = at[:, None].repeat(1, part.shape[1]), ~wanted[at]
        wanted[at] = False
        tokens.T[unwanted.T] = wanted.T.nonzero()[:, 1]  # a head has as many of these as unwanted slots
        chosen.append(Choice(passage.opening + at, passage.opening + tokens))
    return chosen


def best(scores: Tensor, count: int) -> Tensor:
    """Places [count,H] of the largest scores [T,H] of each column, in order."""
    return scores.argsort(dim=0, descending=True, stable=True)[:count].sort(0).values


# ---------------------------------------------------------------------------------------------------------------------
# the scorers: a regression of attention, then the loss of answers


@contextlib.contextmanager
def eager(reader: Reader) -> Iterator[None]:
    """Inside, the LLM attends with "eager" code: the only one that returns attentions, and that always takes a mask."""
    before = reader.model.config._attn_implementation
    reader.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        reader.model.set_attn_implementation(before)


@torch.no_grad()
def fit_scorer(layout: Layout, passages: list[Passage]) -> Tensor:
    """[6d+1,H]: a linear map for each head, by ridge regression. The LLM must attend "eager"ly.

    Its target is the most attention that the head pays a token while the LLM writes the answers to all questions about
    its passage.
    """
    reader, gram, moment = layout.reader, 0.0, 0.0
    for passage in passages:
        n, paid = len(passage.ids), torch.zeros(())
        for part in micro_batches(list(zip(passage.tails, passage.answers, strict=True)), 8):
            ids, real = padded([passage.ids + tail + answer for tail, answer in part], reader.device)
            output = reader.model(input_ids=ids, attention_mask=real, use_cache=False, output_attentions=True)
            # [questions, H, T, T]: of the queries that share a head's keys and values, the one that attends most;
            # layers may be fewer than attentions, where the last ones use keys and values of others
            layers = zip(output.attentions, layout.layers, strict=False)
            attention = [layer.unflatten(1, (heads, -1)).amax(2).to(reader.device) for layer, heads in layers]
            for pays, (tail, answer) in zip(torch.cat(attention, 1), part, strict=True):
                first = n + len(tail) - 1
                paid = pays[:, first : first + len(answer), :n].float().amax(1).maximum(paid.to(pays.device))  # [H, n]
        states = seen(reader, [passage])[0]
        gram, moment = gram + states.T @ states, moment + states.T @ paid.T
    return torch.linalg.solve(gram + 10 * torch.eye(len(gram), device=gram.device), moment)


def gates(scores: Tensor, count: int, drawn: random.Random) -> Tensor:
    """[T,H]: what each gate adds to a logit, from the scores [T,H] of one context.

    It is almost 0 for the `count` largest scores of a head, after the noise, and very negative for the others.
    """
    if count >= len(scores):
        return 0 * scores
    chance = torch.rand(scores.shape, generator=torch.Generator().manual_seed(drawn.getrandbits(62)))
    noise = NOISE * chance.clamp(1e-4, 1 - 1e-4).logit()
    scores = torch.asinh(scores / SMALL) + noise.to(scores.device)
    edge = scores.sort(0, descending=True).values[max(count, 1) - 1 :][:2].mean(0)
    return F.logsigmoid((scores - edge) / SOFTNESS)


@contextlib.contextmanager
def behind_gates(layout: Layout, opened: Tensor) -> Iterator[None]:
    """Inside, the LLM looks at its cache of T tokens through `opened` gates [B,T,H]. It must attend "eager"ly.

    Raises UserError for an LLM whose attention is not found.
    """
    parts, config = opened.split(layout.layers, -1), layout.reader.model.config.get_text_config()

    def look(part: Tensor):
        part = part.transpose(1, 2).repeat_interleave(config.num_attention_heads // part.shape[2], 1)[:, :, None]

        def with_gates(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            mask = kwargs["attention_mask"]  # [B, 1, tokens read, T + tokens read]
            if mask.dtype == torch.bool:
                low = torch.finfo(part.dtype).min
                mask = torch.zeros(mask.shape, dtype=part.dtype, device=mask.device).masked_fill(~mask, low)
            added = F.pad(part, (0, mask.shape[-1] - part.shape[-1])).to(mask)
            return args, kwargs | {"attention_mask": mask + added}

        return with_gates

    attentions = {}  # of each layer, the outermost module
    for module in layout.reader.model.modules():
        if "Attention" in type(module).__name__:
            attentions.setdefault(getattr(module, "layer_idx", getattr(module, "layer_id", None)), module)
    if not attentions.keys() >= set(range(len(parts))):
        kind = type(layout.reader.model).__name__
        raise UserError(f"--model {layout.reader.name}: scorers find no attention in the layers of a {kind}")
    hooks = [
        attentions[layer].register_forward_pre_hook(look(part), with_kwargs=True) for layer, part in enumerate(parts)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def learn_scorer(
    layout: Layout, scorer: Tensor, passages_of: Callable[[int], list[Passage]],
    gates_of: Callable[[Tensor, random.Random], Tensor], steps: int, seed: int, micro_batch_size: int = PASSAGES,
) -> Tensor:  # fmt: skip
    """The scorer [6d+1,H], trained on the loss of answers while each head looks through its gates.

    The LLM must attend "eager"ly. passages_of: what a step learns from; gates_of: `gates` of one context's scores.
    Raises UserError if loss or gradient is not a number for Run.TOO_MANY steps in a row; fewer of these are skipped.
    """
    with torch.no_grad():  # each head learns at the scale of its own scores
        scores = [(seen(layout.reader, [passage])[0] @ scorer)[passage.opening :] for passage in passages_of(0)]
        size = torch.cat(scores).std(0)  # [H]
    learned = torch.zeros_like(scorer, requires_grad=True)
    optimizer, skipped = torch.optim.Adam([learned], betas=(0.9, 0.98)), 0

    def nll_of(passages: list[Passage], drawn: list[random.Random]) -> Tensor:
        with torch.no_grad():
            states, memory = seen(layout.reader, passages), whole(layout, passages)
        parts = []
        for passage, part, chance in zip(passages, states, drawn, strict=True):
            scores = part[passage.opening : len(passage.ids)] @ (scorer + learned * size)
            parts.append(F.pad(gates_of(scores, chance), (0, 0, passage.opening, 0)))  # the opening stays
        of = [i for i, passage in enumerate(passages) for _ in passage.tails]
        with behind_gates(layout, pad_sequence(parts, batch_first=True, padding_side="left")[of]):
            return nll_behind(layout, memory, passages)

    for step in range(steps):
        # warm-up over 2% of the steps, then linearly to zero
        warmth = min(1.0, (step + 1) / (0.02 * steps), (steps - step) / (0.98 * steps))
        optimizer.param_groups[0]["lr"] = LR * warmth
        passages, loss = passages_of(step), 0.0
        drawn = [random.Random(f"{seed}-{step}-{i}") for i in range(len(passages))]
        targets = sum(len(answer) for passage in passages for answer in passage.answers)
        parts = zip(*(micro_batches(items, micro_batch_size) for items in (passages, drawn)), strict=True)
        for part, chances in my_share(list(parts)):
            ce = nll_of(part, chances) / targets
            ce.backward()
            loss += ce.item()
        (loss,) = sum_over_processes([learned], [loss])
        skipped = 0 if math.isfinite(loss) and learned.grad.isfinite().all() else skipped + 1
        if not skipped:
            optimizer.step()
        if skipped == Run.TOO_MANY:
            raise UserError(f"scorers: loss or gradient is not a number for {skipped} steps up to {step + 1}: stopped")
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 100 == 0:
            print(f"scorers: step {step + 1}/{steps}  ce {loss:.4g}", flush=True)
    return (scorer + learned * size).detach()
