"""Train an embedded reader from scratch: tokenizer, then a small causal LM that answers questions about world.py.

    python -m tiny.pretrain tiny-llama --squad train-v1.1.json --stories stories.txt
    python -m tiny.pretrain tiny-qwen  --squad train-v1.1.json --stories stories.txt
    ... --resume                                     # after an interruption; ends where one run would have ended
    ... --device cuda --workers 7 --batch-tokens 28672 --minutes 5

The recipe:
1. Copying. Short rows of frequent tokens stand twice, and the second time every token must be predicted.
2. Reading. A row is a passage of up to two facts and up to six questions about it, so that one passage gives several
   answers to learn from. Passages grow to eight facts. Until then, a tenth of the rows still copy.
3. Real text. From passages of four facts on, 10% of the rows are SQuAD passages with their questions; from three on,
   another 15% are pieces of SQuAD or of stories with cloze questions ("The what was built in 1850?").

The tokenizers learn from the same mix. The weights are trained in float32, under autocast, and saved in bfloat16. The
rows of a pool are made together and sorted by length, so that a batch has little padding. Every batch has about the
same number of tokens.

What was measured on the way:
- Copying mixed with the rest from the start was not learned in 500 steps of 32 rows. Short rows of the 512 most
  frequent tokens alone taught it in 350.
- With Muon on the matrices of the layers, instead of AdamW on everything, tiny-qwen answered more validation questions
  after 950 steps than before after 3,840.
- A compiled step takes half the time on a CPU. It needs a C++ compiler and, once, two minutes.

Letters: B sequences, T tokens of a sequence.
"""

import argparse
import functools
import itertools
import json
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from tiny import world
from tiny.facts import Questions
from tiny.values import Maker

HERE = Path(__file__).resolve().parent
PROMPT = "{context}\nQuestion: {question}\nAnswer:"  # as common.py's PROMPT; tests/test_world.py compares the two
CONTEXT_TOKENS = 512
VOCABULARY = 4096
LAYERS = 6
ANSWER_WEIGHT, COPY_WEIGHT, PASSAGE_WEIGHT, REAL_WEIGHT = 1.0, 0.5, 0.1, 0.2  # of a token as a target
TARGETS = 0.25  # of the tokens of passages and questions are targets
SQUAD_SHARE, CLOZE_SHARE = 0.1, 0.15  # of the rows; the rest are passages of the world
STYLED = 0.35  # of the passages of the world; more than in its test sets, because they are hard to learn
STYLES = ("upper", "upper", "lower", "digits", "accents", "accents", "emoji")  # the hardest ones twice
QUESTIONS = 6  # about a passage, at most
MOST_FACTS = 8  # of a passage
POOL = 256  # rows that are made together, for each SMALL_BATCH tokens of a batch
SMALL_BATCH = 7168
COPY_POOLS, FACT_POOLS = 40, 16  # pools that copy (480 steps), and pools until passages grow by a fact
WIDTHS = (32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)  # columns of a batch: few shapes, little memory
TARGET_UNIT = 128  # targets of a batch come in multiples of it: the CPU's matmul library keeps every shape
SAVE_EVERY = 30  # pools


# ---------------------------------------------------------------------------------------------------------------------
# real text: passages with the questions that people asked about them, and stories

WINDOW = (80, 500)  # characters: least and most, to the end of a sentence
TOO_LONG = 1200  # characters; a single sentence may be that long
CLOZES = 4  # of a window at most, in twelve attempts
DULL = set(
    "a an the of to in on at by for with and or but is was were are be been it its he she they his her their that this "
    "which who as from had has have not did do so then than when there".split()
)  # no answer to a cloze question begins or ends with one


class RealText:
    """Windows of a few sentences, with questions, from SQuAD passages and from a text file of stories."""

    def __init__(self, squad: Path, stories: Path):
        articles = json.loads(squad.read_text(encoding="utf-8"))["data"]
        self.passages = [passage for article in articles for passage in article["paragraphs"]]
        self.stories = stories.read_text(encoding="utf-8").split("\n\n")

    def everything(self) -> list[str]:
        """All passages, questions and stories."""
        asked = [row["question"] for passage in self.passages for row in passage["qas"]]
        return [passage["context"] for passage in self.passages] + asked + self.stories

    def questions(self, rng: random.Random) -> tuple[str, Questions]:
        """A window around an answer, and all questions whose answers are in it."""
        while True:
            passage = rng.choice(self.passages)
            if not passage["qas"]:
                continue
            text = passage["context"]
            start, end = window(rng, text, rng.choice(passage["qas"])["answers"][0]["answer_start"])
            asked = []
            for row in rng.sample(passage["qas"], len(passage["qas"])):
                answer, at = row["answers"][0]["text"], row["answers"][0]["answer_start"]
                if start <= at and at + len(answer) <= end:
                    asked.append((row["question"].strip(), answer))
            if asked and end - start < TOO_LONG:
                return text[start:end].strip(), asked

    def cloze(self, rng: random.Random) -> tuple[str, Questions]:
        """A window of any text; a question repeats a few of its words, with "what" for those that answer it."""
        while True:
            text = rng.choice(self.passages)["context"] if rng.random() < 0.7 else rng.choice(self.stories)
            start, end = window(rng, text, rng.randrange(max(1, len(text))))
            text = text[start:end].strip()
            if len(text) > TOO_LONG:
                continue
            words = [match.span() for match in re.finditer(r"[\w'’-]+", text)]
            asked = []
            for _ in range(12):
                gap = draw_gap(rng, text, words)
                if gap and len(asked) < CLOZES:
                    before, answer, after = gap
                    what = "who" if answer[0].isupper() and rng.random() < 0.3 else "what"
                    question = before + what + after + "?"
                    asked.append((question[0].upper() + question[1:], answer))
            if asked:
                return text, asked


def window(rng: random.Random, text: str, place: int) -> tuple[int, int]:
    """(start, end) of some whole sentences around a place in a text, of WINDOW characters where it is long enough."""
    borders = [0] + [match.end() for match in re.finditer(r"[.?!]['\"]? +", text)] + [len(text)]  # of its sentences
    first = max(i for i, border in enumerate(borders[:-1]) if border <= place)
    last, size = first + 1, rng.randint(*WINDOW)
    while borders[last] - borders[first] < size and (first > 0 or last < len(borders) - 1):
        if last == len(borders) - 1 or (first > 0 and rng.random() < 0.5):
            first -= 1
        else:
            last += 1
    return borders[first], borders[last]


def draw_gap(rng: random.Random, text: str, words: list[tuple[int, int]]) -> tuple[str, str, str] | None:
    """(before, answer, after): one to three words of a text, and a few more on either side; None if they do not suit.

    words: (start, end) of each. They suit if they are inside a sentence, and the answer is in the text only once and
    not dull.
    """
    size, at = rng.randint(1, 3), rng.randrange(max(1, len(words)))
    if at + size > len(words):
        return None
    left = max(0, at - rng.randint(2, 7))
    right = min(len(words), at + size + rng.randint(2, 6))
    start, end = words[at][0], words[at + size - 1][1]
    before, answer, after = text[words[left][0] : start], text[start:end], text[end : words[right - 1][1]]
    edges = {answer.split()[0].lower(), answer.split()[-1].lower()}
    inside = not re.search(r"[.?!\n\"]", before + answer + after)
    suits = inside and right - left - size >= 4 and text.count(answer) == 1 and not edges & DULL
    return (before, answer, after) if suits else None


# ---------------------------------------------------------------------------------------------------------------------
# two families: SentencePiece-style BPE with byte fallback and <s>, and byte-level BPE without a start token


def training_text(real: RealText) -> list[str]:
    """What the tokenizers learn from: passages of the world with twice as much real text."""
    rng = random.Random("tokenizer")
    texts = []
    for _ in range(3_000):
        context, questions = world.make_passage(rng, "train", rng.randint(3, 8))
        texts.append("\n".join([context] + [f"Question: {q}\nAnswer: {a}" for q, a in questions]))
    return texts + real.everything()


def llama_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Llama-2 style: words carry their space as U+2581, one token per digit, unseen characters fall back to bytes."""
    specials = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex(r"[?.,:'’-]"), "isolated"),
            pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="never"),
        ]
    )
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = split
    # printable ASCII is always in the vocabulary, so that only foreign characters need bytes
    alphabet = [chr(code) for code in range(33, 127)] + ["\n", "\u2581"]
    room = vocab_size - len(byte_tokens)
    learner.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=room, special_tokens=specials, initial_alphabet=alphabet, show_progress=False),
    )
    learned = json.loads(learner.to_str())["model"]
    names = [token for token, _ in sorted(learned["vocab"].items(), key=lambda pair: pair[1])]
    vocab = {token: i for i, token in enumerate(specials + byte_tokens + names[len(specials) :])}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=[tuple(m) for m in learned["merges"]], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def qwen_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Qwen style: byte-level BPE, Unicode NFC, digits in runs of up to three, no start token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


@dataclass
class Family:
    """What differs between the two readers."""

    tokenizer: Callable[[list[str], int], PreTrainedTokenizerFast]  # from (texts, size of the vocabulary)
    config: type
    sizes: dict
    start_and_end: dict  # token ids


FAMILIES = {
    "tiny-llama": Family(
        tokenizer=llama_tokenizer,
        config=LlamaConfig,
        sizes=dict(hidden_size=192, intermediate_size=512, num_attention_heads=3, num_key_value_heads=3),
        start_and_end=dict(bos_token_id=1, eos_token_id=2),
    ),
    "tiny-qwen": Family(
        tokenizer=qwen_tokenizer,
        config=Qwen3Config,
        sizes=dict(hidden_size=160, intermediate_size=448, num_attention_heads=5, num_key_value_heads=5, head_dim=32),
        start_and_end=dict(bos_token_id=None, eos_token_id=0),
    ),
}


def build(name: str, real: RealText, trained: Path | None) -> tuple[PreTrainedTokenizerFast, PreTrainedModel]:
    """(tokenizer, untrained model) of a family; deterministic. trained: where its tokenizer is, if it is made."""
    family = FAMILIES[name]
    if trained:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(trained)
    else:
        tokenizer = family.tokenizer(training_text(real), VOCABULARY)
    config = family.config(
        vocab_size=VOCABULARY,
        num_hidden_layers=LAYERS,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        pad_token_id=None,
        dtype="float32",
        use_cache=True,
        **family.sizes,
        **family.start_and_end,
    )
    AttentionInterface.register("causal", attend)
    torch.manual_seed(0)
    return tokenizer, AutoModelForCausalLM.from_config(config, attn_implementation="causal")


def attend(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
    """Causal attention as the library calls it: ([B,T,heads,head_dim], None) from [B,heads,T,head_dim] each.

    On a CPU, plain products, which the compiler fuses: the backward pass of torch's own is slow there in bfloat16. Rows
    are padded on the right, so no mask but the causal one is needed.
    """
    if query.is_cuda:
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return mixed.transpose(1, 2).contiguous(), None
    place = torch.arange(query.shape[2], device=query.device)
    scores = (query @ key.transpose(2, 3) * scaling).float()  # [B,heads,T,T]
    mixed = scores.masked_fill(place[None, :] > place[:, None], float("-inf")).softmax(-1).to(value.dtype) @ value
    return mixed.transpose(1, 2).contiguous(), None


# ---------------------------------------------------------------------------------------------------------------------
# batches: everything follows from (seed, step), so that a resumed run sees the data an unbroken one would have seen

Row = tuple[list[int], list[float]]  # token ids, and the weight of each as a target


def make_rows(tokenizer, real: RealText, rng: random.Random, facts: int, count: int) -> list[Row]:
    """`count` rows, each a passage of up to `facts` facts, or real text, with up to six of its questions."""
    texts = [draw_text(tokenizer.eos_token, real, rng, facts) for _ in range(count)]
    encoded = iter(tokenizer([piece for pieces in texts for piece, _ in pieces], add_special_tokens=False)["input_ids"])
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows = []
    for pieces in texts:
        ids, weights = list(start), [0.0] * len(start)
        for _, weight in pieces:
            piece = next(encoded)
            ids += piece
            if weight == ANSWER_WEIGHT:
                weights += [weight] * len(piece)
            else:  # a quarter of the tokens are targets, at four times the weight: fewer logits to compute
                weights += [weight / TARGETS * (rng.random() < TARGETS) for _ in piece]
        rows.append((ids[:CONTEXT_TOKENS], weights[:CONTEXT_TOKENS]))
    return rows


def draw_text(end: str, real: RealText, rng: random.Random, facts: int) -> list[tuple[str, float]]:
    """Pieces of a row, (text, weight of its tokens): a passage, then questions and answers with the `end` token."""
    kind = rng.random()
    if kind < SQUAD_SHARE and facts > 3:
        (context, asked), weight = real.questions(rng), REAL_WEIGHT
    elif SQUAD_SHARE < kind < SQUAD_SHARE + CLOZE_SHARE and facts > 2:
        (context, asked), weight = real.cloze(rng), REAL_WEIGHT
    else:
        number, weight = rng.randint(max(1, min(3, facts - 2)), facts), PASSAGE_WEIGHT
        if facts > 3:
            style = rng.choice(STYLES) if rng.random() < STYLED else "plain"
            context, asked = world.make_passage(rng, "train", number, style=style)
        else:  # no everyday texts, which are long
            context, asked = world.make_facts(Maker(rng, "train"), False, number)
    pieces = [(context, weight)]
    for question, answer in asked[:QUESTIONS]:
        pieces.append((f"\nQuestion: {question}\nAnswer:", weight))
        pieces += [(f" {answer}", ANSWER_WEIGHT), (end, ANSWER_WEIGHT)]
    return pieces


def padded(rows: list[Row], count: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids [count,width], weights [count,width] of each token as a target) of at most `count` rows.

    Padding, on the right and below, has id 0 and weight 0.
    """
    ids, weights = torch.zeros(count, width, dtype=torch.long), torch.zeros(count, width)
    for i, (row, weight) in enumerate(rows):
        ids[i, : len(row)], weights[i, : len(row)] = torch.tensor(row), torch.tensor(weight)
    return ids, weights


def copied(rng: random.Random, tokens: list[int], length: int) -> Row:
    """A row of different tokens, twice; the second time they are targets, except the first of them."""
    text = rng.sample(tokens, min(length, len(tokens)))
    return text + text, [0.0] * (len(text) + 1) + [COPY_WEIGHT] * (len(text) - 1)


def frequent_tokens(tokenizer, real: RealText) -> list[int]:
    """The 512 tokens that are most frequent in the rows of training."""
    rows = make_rows(tokenizer, real, random.Random("frequent"), 4, 2000)
    return [token for token, _ in Counter(token for ids, _ in rows for token in ids).most_common(512)]


@dataclass
class Pools:
    """Batches for a DataLoader: Pools(...)[i] is the list of those of the i-th pool, (ids [B,T], weights [B,T]) each.

    The rows of a pool are sorted by length before they are cut into batches: little padding.
    """

    tokenizer: PreTrainedTokenizerFast
    real: RealText
    frequent: list[int]
    seed: int
    batch_tokens: int  # of a batch at most, padding included

    def __getitem__(self, pool: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        rng, facts = random.Random(f"pretrain/{self.seed}/{pool}"), facts_of(pool)
        rows = self.rows(rng, facts)
        rows.sort(key=lambda row: len(row[0]), reverse=True)
        tokens = self.batch_tokens if facts else self.batch_tokens // 4
        batches, at = [], 0
        while at < len(rows):
            width = next(width for width in WIDTHS if width >= len(rows[at][0]))
            count = max(1, tokens // width)
            batches.append(padded(rows[at : at + count], count, width))
            at += count
        rng.shuffle(batches)
        return batches

    def rows(self, rng: random.Random, facts: int) -> list[Row]:
        """Until passages have eight facts, every tenth row copies its own tokens."""
        count = POOL * self.batch_tokens // SMALL_BATCH
        if facts == 0:
            return [copied(rng, self.frequent, rng.randint(4, 20)) for _ in range(2 * count)]
        rows = make_rows(self.tokenizer, self.real, rng, facts, count)
        if facts < MOST_FACTS:
            for at in range(0, count, 10):
                rows[at] = copied(rng, sorted(set(rows[at][0])), rng.randint(8, max(9, len(rows[at][0]) // 2)))
        return rows


def facts_of(pool: int) -> int:
    """The facts of a passage at most; 0 while rows only copy."""
    return 0 if pool < COPY_POOLS else min(MOST_FACTS, 2 + (pool - COPY_POOLS) // FACT_POOLS)


# ---------------------------------------------------------------------------------------------------------------------
# training


def answer_exact(model, tokenizer, examples: list[dict]) -> float:
    """Percentage of examples whose every answer token is the argmax given the ones before it (teacher forced)."""
    right = 0
    model.eval()
    with torch.inference_mode():
        for at in range(0, len(examples), 100):
            rows, starts = [], []
            for example in examples[at : at + 100]:
                prompt = tokenizer(PROMPT.format(**example))["input_ids"]
                answer = tokenizer(" " + example["answers"][0], add_special_tokens=False)["input_ids"]
                rows.append(prompt + answer + [tokenizer.eos_token_id])
                starts.append(len(prompt))
            batch = pad_sequence([torch.tensor(ids) for ids in rows], batch_first=True)  # [B,T]
            guesses = model(input_ids=batch.to(model.device), use_cache=False).logits.argmax(-1).tolist()
            for ids, start, guess in zip(rows, starts, guesses, strict=True):
                right += guess[start - 1 : len(ids) - 1] == ids[start:]
    model.train()
    return 100 * right / len(examples)


def learning_rate(peak: float, step: int, done: float) -> float:
    """Warm-up over 100 steps, constant, then linearly to zero over the last 60%; done: the share of the training."""
    return peak * min(1.0, (step + 1) / 100, (1 - done) / 0.6)


def make_optimizers(model, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in model.parameters() if all(parameter is not matrix for matrix in matrices)]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def answer_loss(model, ids: torch.Tensor, places: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor):
    """(weighted mean loss, guesses [targets]) for ids [B,T]; places [targets] count through its B*T tokens."""
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        states = model.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)[places]
        logits = model.lm_head(states).float()  # [targets, VOCABULARY]
    losses = F.cross_entropy(logits, targets, reduction="none")
    return (losses * weights).sum() / weights.sum(), logits.argmax(-1)


def backward(
    loss_of: Callable, device: str, ids: torch.Tensor, weights: torch.Tensor, counted: float
) -> tuple[float, float | None]:
    """Gradients of a batch [B,T], which is on the CPU.

    Returns (loss, share of right tokens among the targets whose weight is `counted`, None if there are none).
    Logits are computed for targets alone, and for as many others, of no weight, as make a multiple of TARGET_UNIT.
    """
    ahead = F.pad(weights[:, 1:], (0, 1)).flatten()  # [B*T], of the token that each one predicts
    places = (ahead > 0).nonzero()[:, 0]
    others = (ahead == 0).nonzero()[:, 0]
    places = torch.cat([places, others[: -len(places) % TARGET_UNIT]])
    targets, weights = ids.flatten().roll(-1)[places], ahead[places]
    loss, guesses = loss_of(*(tensor.to(device) for tensor in (ids, places, targets, weights)))
    loss.backward()
    right = (guesses.to("cpu") == targets)[weights == counted]
    return loss.item(), right.float().mean().item() if len(right) else None


def save_atomically(payload: dict, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(payload, temporary)
    os.replace(temporary, path)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("name", choices=FAMILIES)
    parser.add_argument("--out", type=Path, help="default: the reader's own directory, tiny/<name>")
    parser.add_argument("--squad", type=Path, required=True, help="SQuAD v1.1 JSON, training questions")
    parser.add_argument("--stories", type=Path, required=True, help="a text file of short stories")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--minutes", type=float, help="train for so long, instead of a number of steps")
    parser.add_argument("--batch-tokens", type=int, default=SMALL_BATCH, help="of a batch, padding included, at most")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that make batches; 0: this one does")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's own choice")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=False)
    args = parser.parse_args()
    if args.steps < 1 or args.lr <= 0 or args.workers < 0 or (args.minutes is not None and args.minutes <= 0):
        parser.error("--steps, --minutes and --lr must be above 0, and --workers not below")
    if args.batch_tokens < CONTEXT_TOKENS:
        parser.error(f"--batch-tokens must be {CONTEXT_TOKENS} or more: a row has that many")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU here")
    args.checkpoint = HERE.parent / "out" / "pretrain" / args.name / "checkpoint.pt"
    if args.out:
        args.checkpoint = args.out / "checkpoint.pt"
    else:
        args.out = HERE / args.name
    if args.resume and not args.checkpoint.exists():
        parser.error(f"--resume: {args.checkpoint} does not exist; start without --resume")
    return args


def main() -> None:
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.checkpoint.parent.mkdir(parents=True, exist_ok=True)

    torch.set_flush_denormal(True)
    real = RealText(args.squad, args.stories)
    tokenizer, model = build(args.name, real, args.checkpoint.parent if args.resume else None)
    model.to(args.device)
    tokenizer.save_pretrained(args.checkpoint.parent)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.name}: {parameters:,} parameters, {len(tokenizer)} tokens", flush=True)
    optimizers = make_optimizers(model, args.lr)
    loss_of = functools.partial(answer_loss, model)
    if args.device == "cpu":  # on an H200 the compiler took more than two minutes
        loss_of = torch.compile(loss_of, dynamic=True)
    pools = Pools(tokenizer, real, frequent_tokens(tokenizer, real), args.seed, args.batch_tokens)
    pool, step, accuracy, seconds = 0, 0, 0.0, 0.0
    if args.resume:
        state = torch.load(args.checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, its_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(its_state)
        pool, step, accuracy, seconds = (state[key] for key in ("pool", "step", "accuracy", "seconds"))
        print(f"resumed at step {step}", flush=True)

    validation = {
        "seen": world.make_examples("validation", 200),
        "unseen": world.make_examples("validation", 200, unseen=True),
    }
    model.train()
    started = time.perf_counter() - seconds
    done = 0.0  # share of the training
    loader = DataLoader(pools, batch_size=None, sampler=itertools.count(pool), num_workers=args.workers)
    for batches in loader:
        facts = facts_of(pool)
        for ids, weights in batches:  # [B,T] [B,T]
            seconds = time.perf_counter() - started
            done = seconds / (60 * args.minutes) if args.minutes else step / args.steps
            if done >= 1:
                break
            loss, right = backward(loss_of, args.device, ids, weights, ANSWER_WEIGHT if facts else COPY_WEIGHT)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(args.lr, step, done)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if right is not None:
                accuracy = 0.95 * accuracy + 0.05 * right
            step += 1
            if step % 100 == 0 or step == args.steps:
                print(
                    f"step {step} loss {loss:.3f} answer tokens {100 * accuracy:.1f}% facts {facts} "
                    f"grad {norm:.2f} T {ids.shape[1]} {seconds:.0f} s",
                    flush=True,
                )
        pool += 1
        if pool % SAVE_EVERY == 0:
            scores = {name: f"{answer_exact(model, tokenizer, rows):.1f}%" for name, rows in validation.items()}
            print(f"step {step}: validation answers exact {scores}", flush=True)
            state = dict(pool=pool, step=step, accuracy=accuracy, seconds=seconds)
            state |= dict(model=model.state_dict(), optimizers=[optimizer.state_dict() for optimizer in optimizers])
            save_atomically(state, args.checkpoint)
        if done >= 1:
            break
    args.out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
