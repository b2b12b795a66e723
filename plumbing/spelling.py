"""What a tokenizer does to text: its tokens, where each ends in bytes, what each spells, and odd text to train on."""

from __future__ import annotations

import json
import random
import re
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

from plumbing.launch import UserError

if TYPE_CHECKING:
    import transformers

    from common import Reader


def tokenize(reader: Reader, prompt: str) -> list[int]:
    """Ids of a prompt, with the start token that the model expects (a chat template writes its own)."""
    return reader.tokenizer(prompt, add_special_tokens=not reader.tokenizer.chat_template, verbose=False)["input_ids"]


def prefix_ids(reader: Reader) -> list[int]:
    """The tokens before any text that start every prompt: a start token, or none."""
    return [] if reader.tokenizer.chat_template else reader.tokenizer("", add_special_tokens=True)["input_ids"]


@dataclass
class Spelling:
    """How a tokenizer changes a text before it looks for tokens: all that a sender without a tokenizer must know."""

    nfc: bool  # Unicode's composed form
    prepend: str  # a space in front: "", "first" (of the text) or "always" (also behind each added token)
    twice: bool  # ... even where there is a space already
    added: list[str]  # tokens that stand for themselves, such as <s>

    @classmethod
    def of(cls, tokenizer: transformers.PreTrainedTokenizerBase) -> Spelling:
        description = json.loads(tokenizer.backend_tokenizer.to_str())
        normalizers, splitters = parts_of(description["normalizer"]), parts_of(description["pre_tokenizer"])
        prepend = next((p["prepend_scheme"] for p in splitters if p["type"] == "Metaspace"), "never")
        if any(p["type"] == "ByteLevel" and p["add_prefix_space"] for p in splitters):
            prepend = "always"
        twice = any(p["type"] == "Prepend" for p in normalizers)
        added = sorted((token["content"] for token in description["added_tokens"]), key=len, reverse=True)
        nfc = any(p["type"] == "NFC" for p in normalizers)
        return cls(nfc, "always" if twice else prepend.replace("never", ""), twice, added)

    def spell(self, text: str) -> str:
        """The text that the tokens spell."""
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        if not self.prepend:
            return text
        pieces = re.split("(" + "|".join(map(re.escape, self.added)) + ")", text) if self.added else [text]
        for i in range(0, len(pieces) if self.prepend == "always" else 1, 2):  # the odd ones are added tokens
            if pieces[i] and (self.twice or not pieces[i].startswith(" ")):
                pieces[i] = " " + pieces[i]
        return "".join(pieces)


def parts_of(node: dict | None) -> list[dict]:
    """The leaves of a normalizer or a pre-tokenizer as tokenizer.json nests them."""
    inner = (node or {}).get("normalizers", (node or {}).get("pretokenizers"))
    return [node] if node and inner is None else [part for child in inner or [] for part in parts_of(child)]


def token_ends(reader: Reader, text: str) -> tuple[list[int], list[int]]:
    """(ids, ends): the tokens of a text, without `prefix_ids`, and where each ends, in bytes of the text's spelling.

    Read off the tokens' names: byte-level BPE has one letter for a byte, sentencepiece writes "▁" for a space and
    <0xE2> for a byte without a token. Raises UserError if the names do not spell the text.
    """
    tokenizer = reader.tokenizer
    ids = tokenize(reader, text)[len(prefix_ids(reader)) :]
    byte_level = "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)
    added = set(tokenizer.get_added_vocab())
    ends, end = [], 0
    for name in tokenizer.convert_ids_to_tokens(ids):
        if name in added:
            end += len(name.encode())
        elif byte_level:
            end += len(name)
        else:
            end += 1 if re.fullmatch("<0x[0-9A-F]{2}>", name) else len(name.replace("▁", " ").encode())
        ends.append(end)
    if end != len(reader.spelling.spell(text).encode()):
        raise UserError(f"the tokens of {reader.name} do not spell the bytes of {text[:60]!r}")
    return ids, ends


def spells(reader: Reader, text: str) -> bool:
    """Whether the names of a text's tokens spell it, so that its token ends are known."""
    try:
        token_ends(reader, text)
    except UserError:
        return False
    return True


def learn_pieces(texts: list[str], count: int) -> list[bytes]:
    """Pieces of text for a sender, by byte-pair encoding, in alphabetical order: every byte, and what is frequent."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=count, initial_alphabet=alphabet, max_token_length=LONGEST_PIECE, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    byte_of = {letter: byte for byte, letter in byte_letters().items()}
    return sorted(bytes(byte_of[letter] for letter in name) for name in tokenizer.get_vocab())


def byte_letters() -> dict[int, str]:
    """byte -> the letter that stands for it in the tokens of a byte-level BPE (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


LONGEST_PIECE = 16  # letters
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
ODD = (
    "àâäåçéèêëíîïñóôöøœßúùûüýÿ" "ÀÉÖØŁŽ" "αβγδλπΩ" "жиляюДЖ" "אבג" "عرب" "中文字日本語" "ひらカナ" "한국어"
    "😀😂🚀🌍👍🏽🇫🇷❤️✨" "“”‘’–—…€£¥°±×÷→≤≥" "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~" "\t\n  "
)  # fmt: skip


def words_of(texts: list[str]) -> list[str]:
    """The different words of texts, in a fixed order."""
    return sorted({word for text in texts for word in text.split(" ")})


def joined(rng: random.Random, word: str, other: str) -> str:
    """The start of one word and the end of another; one time in five, or if one is too short, the word itself."""
    if len(word) < 3 or len(other) < 3 or rng.random() < 0.2:
        return word
    return word[: rng.randint(1, len(word) - 1)] + other[rng.randint(1, len(other) - 1) :]


def odd_text(rng: random.Random, prompt: str, words: list[str], reader: Reader | None = None) -> str:
    """Random tokens of a reader; words, each with the end of another; or a part of the prompt with other casing, ...

    The first two teach where the tokens of an unknown name end.
    """
    kind = rng.random()
    if kind < 0.4 and reader is not None:
        ids = [rng.randrange(len(reader.tokenizer)) for _ in range(rng.randint(1, 80))]
        return reader.tokenizer.decode(ids, skip_special_tokens=True) or "?"
    if kind < 0.8:
        return " ".join(joined(rng, rng.choice(words), rng.choice(words)) for _ in range(25)) or "?"
    start = rng.randrange(len(prompt))
    words = prompt[start : start + rng.randint(1, 130)].split(" ")
    rate = rng.choice((0.1, 0.5, 1.0))
    for i, word in enumerate(words):
        if rng.random() > rate:
            continue
        kind = rng.randrange(7)
        if kind == 0:
            words[i] = word.upper()
        elif kind == 1:
            words[i] = word.lower() if rng.random() < 0.5 else word.title()
        elif kind == 2:
            words[i] = str(rng.randrange(10 ** rng.randint(1, 9)))
        elif kind == 3:
            words[i] = "".join(rng.choice(LETTERS) for _ in range(rng.randint(1, 12)))
        elif kind == 4:
            words[i] = "".join(rng.choice(ODD) if rng.random() < 0.3 else letter for letter in word)
        elif kind == 5:
            words[i] = "".join(rng.choice(ODD) for _ in range(rng.randint(1, 6)))
        else:
            words[i] = word + rng.choice(ODD) * rng.randint(1, 3)
    return " ".join(words) or "?"
