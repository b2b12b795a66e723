"""Train an embedded reader from scratch: tokenizer, then a small causal LM that answers questions about world.py.

    python tiny/pretrain.py tiny-llama      # about 50 minutes on one CPU core; the log is in tiny/README.md
    python tiny/pretrain.py tiny-qwen
    python tiny/pretrain.py tiny-llama --resume    # after an interruption; ends where one run would have ended

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
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

import world

HERE = Path(__file__).resolve().parent
PROMPT = "{context}\nQuestion: {question}\nAnswer:"  # as common.py's PROMPT; tests/test_world.py compares the two
CONTEXT_TOKENS = 512
ANSWER_WEIGHT, COPY_WEIGHT, PASSAGE_WEIGHT = 1.0, 0.5, 0.1  # of a token as a target


# ---------------------------------------------------------------------------------------------------------------------
# two families: SentencePiece-style BPE with byte fallback and <s>, and byte-level BPE without a start token


def world_text(documents: int) -> list[str]:
    rng = random.Random("tokenizer")
    texts = []
    for _ in range(documents):
        context, questions = world.make_passage(rng, "train", rng.randint(3, 8))
        texts.append("\n".join([context] + [f"Question: {q}\nAnswer: {a}" for q, a in questions]))
    return texts


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


def build(name: str):
    """(tokenizer, untrained model) of a family; deterministic."""
    texts = world_text(20_000)
    torch.manual_seed(0)
    shared = dict(max_position_embeddings=CONTEXT_TOKENS, tie_word_embeddings=True, dtype="float32", use_cache=True)
    if name == "tiny-llama":
        tokenizer = llama_tokenizer(texts, vocab_size=1024)
        config = LlamaConfig(
            vocab_size=1024, hidden_size=192, intermediate_size=512, num_hidden_layers=5, num_attention_heads=6,
            num_key_value_heads=6, bos_token_id=1, eos_token_id=2, pad_token_id=None, **shared,
        )  # fmt: skip
    else:
        tokenizer = qwen_tokenizer(texts, vocab_size=1536)
        config = Qwen3Config(
            vocab_size=1536, hidden_size=160, intermediate_size=448, num_hidden_layers=5, num_attention_heads=5,
            num_key_value_heads=5, head_dim=32, bos_token_id=None, eos_token_id=0, pad_token_id=None, **shared,
        )  # fmt: skip
    return tokenizer, AutoModelForCausalLM.from_config(config)


# ---------------------------------------------------------------------------------------------------------------------
# batches: everything follows from (seed, step), so that a resumed run sees the data an unbroken one would have seen


def make_batch(tokenizer, seed: int, step: int, batch_size: int, facts: int, copying: float):
    """(ids [B,T], weights [B,T] of each token as a target); padding has id 0 and weight 0, on the right."""
    rng = random.Random(f"pretrain/{seed}/{step}")
    texts, copies = [], round(copying * batch_size)
    facts = rng.randint(max(1, min(3, facts - 2)), facts)  # the same for the whole batch: little padding
    for _ in range(batch_size - copies):
        context, questions = world.make_passage(rng, "train", facts)
        pieces = [(context, False)]
        for question, answer in questions[:6]:
            pieces += [(f"\nQuestion: {question}\nAnswer:", False), (f" {answer}", True), (tokenizer.eos_token, True)]
        texts.append(pieces)
    flat = [piece for pieces in texts for piece, _ in pieces]
    encoded = iter(tokenizer(flat, add_special_tokens=False)["input_ids"])
    rows = []
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for pieces in texts:
        ids, weights = list(start), [0.0] * len(start)
        for _, is_answer in pieces:
            piece = next(encoded)
            ids += piece
            weights += [ANSWER_WEIGHT if is_answer else PASSAGE_WEIGHT] * len(piece)
        rows.append((ids, weights))
    width = max((len(ids) for ids, _ in rows), default=96)
    for _ in range(copies):
        length = rng.randint(8, max(9, width // 2))
        text = [rng.randrange(3, len(tokenizer)) for _ in range(length)]
        rows.append((text + text, [0.0] * (length + 1) + [COPY_WEIGHT] * (length - 1)))
    width = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(batch_size, width, dtype=torch.long)
    weights = torch.zeros(batch_size, width)
    for i, (row, weight) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        weights[i, : len(row)] = torch.tensor(weight)
    return ids, weights


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
    parser.add_argument("--steps", type=int, default=3000)
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

    tokenizer, model = build(args.name)
    print(
        f"{args.name}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    step, facts, accuracy, seconds = 0, 2, 0.0, 0.0
    if args.resume:
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, facts, accuracy, seconds = state["step"], state["facts"], state["accuracy"], state["seconds"]
        print(f"resumed at step {step}", flush=True)

    validation = world.make_examples("validation", 200)
    model.train()
    started = time.perf_counter() - seconds
    while step < args.steps:
        copying = 0.5 if step < 300 else 0.1 if facts < 8 else 0.0
        # warm-up over 100 steps, constant, then linearly to zero over the last 40%
        scale = min(1.0, (step + 1) / 100, (args.steps - step) / (0.4 * args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * scale
        ids, weights = make_batch(tokenizer, args.seed, step, args.batch_size, facts, copying)  # [B,T] [B,T]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]  # [B,T-1,V]
        targets, weights = ids[:, 1:], weights[:, 1:]
        kept = weights > 0
        logits, targets, weights = logits[kept].float(), targets[kept], weights[kept]
        loss = (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        answers = weights == ANSWER_WEIGHT
        right = (logits.argmax(-1) == targets)[answers].float().mean().item()
        accuracy = 0.95 * accuracy + 0.05 * right
        step += 1
        if accuracy > 0.8 and facts < 8:
            facts, accuracy = facts + 1, accuracy - 0.1
        if step % 100 == 0 or step == args.steps:
            seconds = time.perf_counter() - started
            eta = seconds / step * (args.steps - step)
            print(
                f"step {step}/{args.steps} loss {loss.item():.3f} answer tokens {100 * accuracy:.1f}% facts {facts} "
                f"grad {norm:.2f} T {ids.shape[1]} {seconds:.0f} s, {eta:.0f} s left",
                flush=True,
            )
        if step % max(1, args.steps // 6) == 0 or step == args.steps:
            print(
                f"step {step}: validation answers exact {answer_exact(model, tokenizer, validation):.1f}%", flush=True
            )
            save_atomically(
                {
                    "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                    "step": step, "facts": facts, "accuracy": accuracy, "seconds": seconds,
                },
                checkpoint,
            )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
