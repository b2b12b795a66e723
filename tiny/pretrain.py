"""Train an embedded reader from scratch: tokenizer, then a small causal LM that answers questions about world.py.

    python -m tiny.pretrain tiny-llama      # about 50 minutes on one CPU core; the log is in tiny/README.md
    python -m tiny.pretrain tiny-qwen
    python -m tiny.pretrain tiny-llama --resume    # after an interruption; ends where one run would have ended

What made the reading circuit appear in minutes:
- every sequence is a passage and *several* questions, so that a passage of 80 tokens gives five answers to learn from;
- in the first 300 steps half the sequences are a random string of tokens repeated: copying is learned there, reading on
  top. A copied token weighs 0.5; weighed 0.1 like passage tokens (and from one fact on), it took twice as many steps;
- passages grow from two facts to eight, by one whenever the running accuracy on answer tokens passes 80%.

Letters: B sequences, T tokens of a sequence.
"""

import argparse
import json
import os
import random
import re
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

from tiny import world
from tiny.values import Maker

HERE = Path(__file__).resolve().parent
PROMPT = "{context}\nQuestion: {question}\nAnswer:"  # as common.py's PROMPT; tests/test_world.py compares the two
CONTEXT_TOKENS = 512
VOCABULARY = 4096
ANSWER_WEIGHT, COPY_WEIGHT, PASSAGE_WEIGHT, REAL_WEIGHT = 1.0, 0.5, 0.1, 0.2  # of a token as a target
SQUAD_SHARE, CLOZE_SHARE = 0.15, 0.15  # of the rows; the rest are passages of the world
POOL = 8  # steps whose data are made together
GROW_AT = (0.6, 0.75)  # share of right tokens at which copying gives way to reading, and passages grow by a fact
SAVE_EVERY = 240  # steps: whole pools


# ---------------------------------------------------------------------------------------------------------------------
# two families: SentencePiece-style BPE with byte fallback and <s>, and byte-level BPE without a start token


def training_text(real: "RealText") -> list[str]:
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
            pre_tokenizers.Split(Regex(r"[?.,:]"), "isolated"),
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


def build(name: str, real: "RealText"):
    """(tokenizer, untrained model) of a family; deterministic."""
    texts = training_text(real)
    torch.manual_seed(0)
    shared = dict(max_position_embeddings=CONTEXT_TOKENS, tie_word_embeddings=True, dtype="float32", use_cache=True)
    shared |= dict(vocab_size=VOCABULARY, num_hidden_layers=6)
    if name == "tiny-llama":
        tokenizer = llama_tokenizer(texts, VOCABULARY)
        config = LlamaConfig(
            hidden_size=192, intermediate_size=512, num_attention_heads=6, num_key_value_heads=6,
            bos_token_id=1, eos_token_id=2, pad_token_id=None, **shared,
        )  # fmt: skip
    else:
        tokenizer = qwen_tokenizer(texts, VOCABULARY)
        config = Qwen3Config(
            hidden_size=160, intermediate_size=448, num_attention_heads=5, num_key_value_heads=5, head_dim=32,
            bos_token_id=None, eos_token_id=0, pad_token_id=None, **shared,
        )  # fmt: skip
    AttentionInterface.register("fast", attend)
    return tokenizer, AutoModelForCausalLM.from_config(config, attn_implementation="fast")


def attend(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
    """Causal attention [B,heads,T,head_dim], as fast as two cores compute it: the library's bfloat16 backward is slow.

    Rows are padded on the right, so no mask but the causal one is needed.
    """
    length = query.shape[2]
    if length <= 224:
        scores = query @ key.transpose(2, 3) * scaling
        future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
        mixed = scores.masked_fill(future, float("-inf")).softmax(-1).to(value.dtype) @ value
    else:
        with torch.autocast("cpu", enabled=False):
            mixed = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), is_causal=True)
    return mixed.transpose(1, 2).contiguous(), None


# ---------------------------------------------------------------------------------------------------------------------
# real text: passages with the questions that people asked about them, and stories


class RealText:
    """Windows of a few sentences from SQuAD passages, with their questions, and from a text file of stories."""

    def __init__(self, squad: Path, stories: Path):
        articles = json.loads(squad.read_text(encoding="utf-8"))["data"]
        self.passages = [passage for article in articles for passage in article["paragraphs"]]
        self.stories = stories.read_text(encoding="utf-8").split("\n\n")

    def everything(self) -> list[str]:
        asked = [q["question"] for passage in self.passages for q in passage["qas"]]
        return [passage["context"] for passage in self.passages] + asked + self.stories

    def window(self, rng: random.Random, text: str, around: int = 0) -> tuple[int, int]:
        """(start, end) of up to about 500 characters of whole sentences around a place in a text."""
        starts = [0] + [match.end() for match in re.finditer(r"[.?!]['\"]? +", text)] + [len(text)]
        here = max(i for i, start in enumerate(starts[:-1]) if start <= around)
        first, last, size = here, here + 1, rng.randint(80, 500)
        while starts[last] - starts[first] < size and (first > 0 or last < len(starts) - 1):
            if last == len(starts) - 1 or (first > 0 and rng.random() < 0.5):
                first -= 1
            else:
                last += 1
        return starts[first], starts[last]

    def questions(self, rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
        """A window around an answer, and all questions whose answers are in it."""
        while True:
            passage = rng.choice(self.passages)
            if not passage["qas"]:
                continue
            text = passage["context"]
            start, end = self.window(rng, text, rng.choice(passage["qas"])["answers"][0]["answer_start"])
            asked = []
            for row in rng.sample(passage["qas"], len(passage["qas"])):
                answer = row["answers"][0]
                at = answer["answer_start"]
                if start <= at and at + len(answer["text"]) <= end:
                    asked.append((row["question"].strip(), answer["text"]))
            if asked and end - start < 1200:
                return text[start:end].strip(), asked

    def cloze(self, rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
        """A window of any real text; a question repeats a few of its words, with "what" for those that answer it."""
        while True:
            text = rng.choice(self.passages)["context"] if rng.random() < 0.7 else rng.choice(self.stories)
            start, end = self.window(rng, text, rng.randrange(max(1, len(text))))
            text, asked = text[start:end].strip(), []
            if len(text) > 1200:
                continue
            words = [(match.start(), match.end()) for match in re.finditer(r"[\w'’-]+", text)]
            for _ in range(12):
                size, at = rng.randint(1, 3), rng.randrange(max(1, len(words)))
                if at + size > len(words):
                    continue
                answer = text[words[at][0] : words[at + size - 1][1]]
                left = max(0, at - rng.randint(2, 7))
                right = min(len(words), at + size + rng.randint(2, 6))
                around = text[words[left][0] : words[right - 1][1]]
                plain = not re.search(r"[.?!\n\"]", around)
                edges = {answer.split()[0].lower(), answer.split()[-1].lower()}
                if (
                    plain
                    and right - left - size >= 4
                    and text.count(answer) == 1
                    and not edges & DULL
                    and len(asked) < 4
                ):
                    what = "who" if answer[0].isupper() and rng.random() < 0.3 else "what"
                    asked.append(
                        (
                            text[words[left][0] : words[at][0]]
                            + what
                            + text[words[at + size - 1][1] : words[right - 1][1]]
                            + "?",
                            answer,
                        )
                    )
            if asked:
                return text, [(question[0].upper() + question[1:], answer) for question, answer in asked]


DULL = set("a an the of to in on at by for with and or but is was were are be been it its he she they his her their "
    "that this which who as from had has have not did do so then than when there".split())  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# batches: everything follows from (seed, step), so that a resumed run sees the data an unbroken one would have seen


def make_rows(
    tokenizer, real: RealText, rng: random.Random, facts: int, count: int
) -> list[tuple[list[int], list[float]]]:
    """`count` rows (ids, weight of each id as a target), each a passage and up to six of its questions."""
    texts = []
    for _ in range(count):
        kind = rng.random()
        if kind < SQUAD_SHARE and facts > 3:
            (context, asked), said = real.questions(rng), REAL_WEIGHT
        elif SQUAD_SHARE < kind < SQUAD_SHARE + CLOZE_SHARE and facts > 2:
            (context, asked), said = real.cloze(rng), REAL_WEIGHT
        else:
            number = rng.randint(max(1, min(3, facts - 2)), facts)
            if facts > 3:
                (context, asked), said = world.make_passage(rng, "train", number), PASSAGE_WEIGHT
            else:
                (context, asked), said = world.make_facts(Maker(rng, "train"), False, number), PASSAGE_WEIGHT
        pieces = [(context, said)]
        for question, answer in asked[:6]:
            pieces += [
                (f"\nQuestion: {question}\nAnswer:", said),
                (f" {answer}", ANSWER_WEIGHT),
                (tokenizer.eos_token, ANSWER_WEIGHT),
            ]
        texts.append(pieces)
    encoded = iter(tokenizer([piece for pieces in texts for piece, _ in pieces], add_special_tokens=False)["input_ids"])
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows = []
    for pieces in texts:
        ids, weights = list(start), [0.0] * len(start)
        for _, weight in pieces:
            piece = next(encoded)
            ids += piece
            # a quarter of the passage's tokens are targets, at four times the weight: fewer logits to compute
            weights += [weight if weight == ANSWER_WEIGHT else 4 * weight * (rng.random() < 0.25) for _ in piece]
        rows.append((ids[:CONTEXT_TOKENS], weights[:CONTEXT_TOKENS]))
    return rows


def padded(rows: list[tuple[list[int], list[float]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids [B,T], weights [B,T] of each token as a target); padding on the right has id 0 and weight 0."""
    ids, weights = zip(*rows, strict=True)
    return (
        pad_sequence([torch.tensor(row) for row in ids], batch_first=True),
        pad_sequence([torch.tensor(row) for row in weights], batch_first=True),
    )


def copied(rng: random.Random, tokens: list[int], length: int) -> tuple[list[int], list[float]]:
    """A row of different tokens, twice; the second time they are targets."""
    text = rng.sample(tokens, min(length, len(tokens)))
    return text + text, [0.0] * (len(text) + 1) + [COPY_WEIGHT] * (len(text) - 1)


def copy_batches(tokens: list[int], seed: int, pool: int, batch_size: int):
    """The batches of POOL of the first steps: short rows of frequent tokens, twice as many as later."""
    rng = random.Random(f"copy/{seed}/{pool}")
    return [padded([copied(rng, tokens, rng.randint(4, 20)) for _ in range(2 * batch_size)]) for _ in range(POOL)]


def make_batches(tokenizer, real: RealText, seed: int, pool: int, batch_size: int, facts: int):
    """The batches of POOL steps. Their rows are sorted by length before they are cut into batches: little padding."""
    rng = random.Random(f"pretrain/{seed}/{pool}")
    copies = batch_size // 10 if facts < 8 else 0
    all_rows = make_rows(tokenizer, real, rng, facts, POOL * (batch_size - copies))
    all_rows.sort(key=lambda row: len(row[0]))
    batches = []
    for at in range(0, len(all_rows), batch_size - copies):
        rows = all_rows[at : at + batch_size - copies]
        tokens = sorted({token for ids, _ in rows for token in ids})
        rows += [copied(rng, tokens, rng.randint(8, max(9, len(rows[-1][0]) // 2))) for _ in range(copies)]
        batches.append(padded(rows))
    rng.shuffle(batches)
    return batches


def answer_exact(model, tokenizer, examples: list[dict]) -> float:
    """Percentage of examples whose every answer token is the argmax given the ones before it (teacher forced)."""
    right = 0
    model.eval()
    with torch.inference_mode():
        for at in range(0, len(examples), 100):
            rows = []
            for example in examples[at : at + 100]:
                prompt = tokenizer(PROMPT.format(**example))["input_ids"]
                answer = tokenizer(" " + example["answers"][0], add_special_tokens=False)["input_ids"]
                rows.append((prompt + answer + [tokenizer.eos_token_id], len(prompt)))
            width = max(len(ids) for ids, _ in rows)
            batch = torch.zeros(len(rows), width, dtype=torch.long)
            for i, (ids, _) in enumerate(rows):
                batch[i, : len(ids)] = torch.tensor(ids)
            guess = model(input_ids=batch).logits.argmax(-1)
            for i, (ids, start) in enumerate(rows):
                right += guess[i, start - 1 : len(ids) - 1].tolist() == ids[start:]
    model.train()
    return 100 * right / len(examples)


# ---------------------------------------------------------------------------------------------------------------------
# training


def save_atomically(payload: dict, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(payload, temporary)
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("name", choices=("tiny-llama", "tiny-qwen"))
    parser.add_argument("--out", default=None, help="default: the reader's own directory, tiny/<name>")
    parser.add_argument("--squad", type=Path, required=True, help="SQuAD v1.1 JSON, training questions")
    parser.add_argument("--stories", type=Path, required=True, help="a text file of short stories")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's own choice")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=False)
    args = parser.parse_args()
    if args.steps < 1 or args.batch_size < 1 or args.lr <= 0:
        parser.error("--steps, --batch-size and --lr must be above 0")
    if args.threads:
        torch.set_num_threads(args.threads)
    out = Path(args.out) if args.out else HERE / args.name
    checkpoint = HERE.parent / "out" / "pretrain" / (args.name + ".pt")
    if args.out:
        checkpoint = out / "checkpoint.pt"
    if args.resume and not checkpoint.exists():
        parser.error(f"--resume: {checkpoint} does not exist; start without --resume")
    checkpoint.parent.mkdir(parents=True, exist_ok=True)

    real = RealText(args.squad, args.stories)
    tokenizer, model = build(args.name, real)
    print(
        f"{args.name}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    rows = make_rows(tokenizer, real, random.Random("frequent"), 4, 2000)
    frequent = [token for token, _ in Counter(token for ids, _ in rows for token in ids).most_common(512)]
    step, facts, accuracy, seconds = 0, 0, 0.0, 0.0  # no facts: copying
    if args.resume:
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, facts, accuracy, seconds = state["step"], state["facts"], state["accuracy"], state["seconds"]
        print(f"resumed at step {step}", flush=True)

    validation = {
        "seen": world.make_examples("validation", 200),
        "unseen": world.make_examples("validation", 200, unseen=True),
    }
    model.train()
    started = time.perf_counter() - seconds
    while step < args.steps:
        if step % POOL == 0:
            if accuracy > GROW_AT[min(facts, 1)] and facts < 8:
                facts, accuracy = (facts + 1, accuracy - 0.05) if facts else (2, 0.0)
            if facts:
                batches = make_batches(tokenizer, real, args.seed, step // POOL, args.batch_size, facts)
            else:
                batches = copy_batches(frequent, args.seed, step // POOL, args.batch_size)
        # warm-up over 100 steps, constant, then linearly to zero over the last 30%
        scale = min(1.0, (step + 1) / 100, (args.steps - step) / (0.3 * args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * scale
        ids, weights = batches[step % POOL]  # [B,T] [B,T]
        kept = weights[:, 1:] > 0
        targets, weights = ids[:, 1:][kept], weights[:, 1:][kept]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            states = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][kept]
            logits = model.lm_head(states).float()  # [targets, V]
        loss = (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        answers = weights == (ANSWER_WEIGHT if facts else COPY_WEIGHT)
        right = (logits.argmax(-1) == targets)[answers].float().mean().item()
        accuracy = 0.95 * accuracy + 0.05 * right
        step += 1
        if step % 100 == 0 or step == args.steps:
            seconds = time.perf_counter() - started
            eta = seconds / step * (args.steps - step)
            print(
                f"step {step}/{args.steps} loss {loss.item():.3f} answer tokens {100 * accuracy:.1f}% facts {facts} "
                f"grad {norm:.2f} T {ids.shape[1]} {seconds:.0f} s, {eta:.0f} s left",
                flush=True,
            )
        if step % SAVE_EVERY == 0:
            scores = {name: f"{answer_exact(model, tokenizer, rows):.1f}%" for name, rows in validation.items()}
            print(f"step {step}: validation answers exact {scores}", flush=True)
            save_atomically(
                {
                    "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                    "step": step, "facts": facts, "accuracy": accuracy, "seconds": seconds,
                },
                checkpoint,
            )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
