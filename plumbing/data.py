"""Data: rows {"context", "question", "answers"} for a reader, windows {"ids"} of a text for a plain language model."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import urllib.request
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from plumbing.checkpoints import write_atomically
from plumbing.launch import UserError
from plumbing.spelling import tokenize
from tiny import world

if TYPE_CHECKING:
    from common import Reader

MAX_LINE = 64 << 20  # bytes of a JSONL row
WINDOW = 256  # tokens: a .txt file is cut into windows of this length

# official SQuAD v1.1 files: name -> (address, sha256)
SQUAD = {
    "train-v1.1.json": (
        "https://rajpurkar.github.io/SQuAD-explorer/dataset/train-v1.1.json",
        "3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955",
    ),
    "dev-v1.1.json": (
        "https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v1.1.json",
        "95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9",
    ),
}


@dataclass
class Data:
    """Questions about passages (kind "qa") or windows of plain text (kind "text"). No passage is in two splits."""

    kind: str
    train: Sequence[dict] | None  # None: unlimited, made on the fly by tiny/world.py
    validation: list[dict]
    test: list[dict]

    def train_rows(self, seed: int, start: int, count: int) -> list[dict]:
        """Rows start .. start+count-1 of the endless training stream of this seed (a reshuffle at every epoch).

        A function of (seed, position) alone, so that a resumed run reads on where it stopped.
        """
        if self.train is None:
            return [world.make_example("train", seed, i) for i in range(start, start + count)]
        rows = []
        for i in range(start, start + count):
            epoch, offset = divmod(i, len(self.train))
            rows.append(self.train[epoch_order(seed, epoch, len(self.train))[offset]])
        return rows


@functools.lru_cache(maxsize=1)
def epoch_order(seed: int, epoch: int, rows: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(rows)


def load_data(name: str, reader: Reader, eval_examples: int) -> Data:
    """`tiny`, `squad` (downloaded once, checked) or a FILE: SQuAD v1.1 JSON, JSONL rows, or .txt.

    A single file is split by a hash of the passage (90% train, 10% test), so no passage is in both. A text is cut into
    windows, and the last fifth of them is the test set. At most `eval_examples` test rows, chosen by a fixed shuffle.
    Raises UserError with file and line.
    """
    if name == "tiny":
        return Data("qa", None, world.make_examples("validation", 100), world.make_examples("test", eval_examples))
    if name == "squad":
        train, test = (read_squad(path) for path in fetch_squad())
        return squad_data(train, test, eval_examples)
    path = Path(name)
    if not path.is_file():
        raise UserError(f"--data {name}: no such file; give tiny, squad, or a .json, .jsonl or .txt file")
    if path.stat().st_size == 0:
        raise UserError(f"--data {name}: the file is empty")
    if path.suffix == ".jsonl":
        return jsonl_data(name, path, eval_examples)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--data {name}: not UTF-8 (byte {error.start}); convert it first, e.g. with iconv") from None
    if path.suffix == ".txt":
        return text_data(name, text, reader, eval_examples)
    rows = read_squad(path, text)
    in_test = [hashlib.sha256(row["context"].encode()).digest()[0] < 26 for row in rows]
    test = [row for row, chosen in zip(rows, in_test, strict=True) if chosen]
    train = [row for row, chosen in zip(rows, in_test, strict=True) if not chosen]
    if not train or not test:
        raise UserError(f"--data {name}: {len(rows)} rows are too few passages to split into training and test")
    return squad_data(train, test, eval_examples)


def squad_data(train: list[dict], test: list[dict], eval_examples: int) -> Data:
    order = np.random.default_rng(0).permutation(len(test))[:eval_examples]
    passages = sorted({row["context"] for row in train}, key=lambda text: hashlib.sha256(text.encode()).digest())
    held_out = set(passages[: max(1, len(passages) // 50)]) if len(passages) > 1 else set()
    validation = [row for row in train if row["context"] in held_out][:100]
    rest = [row for row in train if row["context"] not in held_out]
    return Data("qa", rest or train, validation or train[:100], [test[i] for i in order])


def jsonl_data(name: str, path: Path, eval_examples: int) -> Data:
    """A file of any size: every row is checked once, and the training rows stay on the disk."""
    train, validation, test = array("q"), array("q"), array("q")  # where rows begin
    for place, row in read_jsonl(path):
        digest = hashlib.sha256(row["context"].encode()).digest()
        (test if digest[0] < 26 else validation if digest[1] < 5 else train).append(place)
    if not test or not train + validation:
        count = len(train) + len(validation) + len(test)
        raise UserError(f"--data {name}: {count} rows are too few passages to split into training and test")
    if not validation:  # a small file: the first passage is held out
        rows = JsonlRows(path, train)
        is_first = [row["context"] == rows[0]["context"] for row in rows]
        validation = [place for place, chosen in zip(train, is_first, strict=True) if chosen]
        train = [place for place, chosen in zip(train, is_first, strict=True) if not chosen]
    order = np.random.default_rng(0).permutation(len(test))[:eval_examples]
    held_out, tests = JsonlRows(path, validation[:100]), JsonlRows(path, [test[i] for i in order])
    return Data("qa", JsonlRows(path, train or validation), list(held_out), list(tests))


def text_data(name: str, text: str, reader: Reader, eval_examples: int) -> Data:
    if not text.strip():
        raise UserError(f"--data {name}: the file is empty")
    start = [] if reader.tokenizer.bos_token_id is None else [reader.tokenizer.bos_token_id]
    ids = reader.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    width = min(WINDOW, reader.context_tokens) - len(start)
    rows = [{"ids": start + ids[at : at + width]} for at in range(0, len(ids), width)]
    rows = [row for row in rows if len(row["ids"]) > len(start) + 1]
    if len(rows) < 5:
        raise UserError(f"--data {name}: only {len(ids)} tokens; to train and test, a text needs at least {5 * width}")
    first_test = len(rows) - max(1, len(rows) // 5)
    first_validation = first_test - max(1, len(rows) // 20)
    validation = rows[first_validation:first_test][:100]
    return Data("text", rows[:first_validation], validation, rows[first_test:][:eval_examples])


def halve_windows(name: str, data: Data, reader: Reader) -> None:
    """Keep, of a text, the windows whose first half can travel as text, for the LLM to predict the second half.

    Changes `data` in place, and nothing of questions. Raises UserError if no window is left.
    """
    if data.kind != "text":
        return
    windows = len(data.test)
    data.train, data.validation, data.test = (halve(reader, part) for part in (data.train, data.validation, data.test))
    if not data.train or not data.test:
        raise UserError(f"--data {name}: no window's first half is text that can be tokenised again")
    print(f"windows whose first half is text by itself: {len(data.test)} of {windows} test windows")


def halve(reader: Reader, rows: list[dict]) -> list[dict]:
    """Windows of which the first half travels as its text: tokenised again, as whoever receives a text would.

    A half that does not survive that (cut inside a character, say) is left out.
    """
    halves = []
    for row in rows:
        middle = len(row["ids"]) // 2
        text = reader.tokenizer.decode(row["ids"][:middle], skip_special_tokens=True)
        ids = tokenize(reader, text) if text else []
        if text and reader.tokenizer.decode(ids, skip_special_tokens=True) == text:
            halves.append({"ids": (ids + row["ids"][middle:])[: reader.context_tokens], "sent": len(ids)})
    return halves


def encodes(row: dict) -> bool:
    """False where a JSON escape left half a surrogate pair, which is a Python string but no Unicode text."""
    try:
        "".join([row["context"], row["question"], *row["answers"]]).encode()
    except UnicodeEncodeError:
        return False
    return True


def read_squad(path: Path, text: str | None = None) -> list[dict]:
    """Rows of a SQuAD v1.1 JSON file. Raises UserError if it is malformed or has no answered question."""
    text = path.read_text(encoding="utf-8") if text is None else text
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"--data {path}: line {error.lineno}: not JSON ({error.msg})") from None
    except RecursionError:
        raise UserError(f"--data {path}: JSON, but nested too deeply to be SQuAD") from None
    rows = []
    try:
        for article in parsed["data"]:
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    answers = [answer["text"] for answer in qa.get("answers", [])]
                    if answers:
                        row = {"context": paragraph["context"], "question": qa["question"], "answers": answers}
                        if not all(isinstance(part, str) for part in [row["context"], row["question"], *answers]):
                            raise TypeError
                        rows.append(row)
    except (KeyError, TypeError, AttributeError):
        raise UserError(
            f"--data {path}: JSON, but not in the SQuAD v1.1 layout (data/paragraphs/qas/answers)"
        ) from None
    if not rows:
        raise UserError(f"--data {path}: no question has an answer, so there is nothing to score against")
    for row in rows:
        if not encodes(row):
            raise UserError(f"--data {path}: half a surrogate pair in the row of question {row['question']!a:.80}")
    return rows


def parse_row(path: Path, number: int | str, line: str) -> dict:
    """A row {"context", "question", "answers": [...]} from a line of JSON. Raises UserError with file and line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deeply")
        raise UserError(f"--data {path}: line {number}: not JSON ({reason})") from None
    good = isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("context", "question"))
    answers = row.get("answers") if good else None
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        want = '{"context": str, "question": str, "answers": [str, ...]}'
        raise UserError(f"--data {path}: line {number}: want {want}")
    row = {"context": row["context"], "question": row["question"], "answers": answers}
    if not encodes(row):
        raise UserError(f"--data {path}: line {number}: half a surrogate pair is not Unicode text")
    return row


def read_jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    """(where it begins, row) of each line that is not blank, one at a time. Raises UserError with file and line."""
    place, empty = 0, True
    with open(path, "rb") as file:
        for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
            if len(raw) > MAX_LINE:
                raise UserError(f"--data {path}: line {number} is longer than {MAX_LINE >> 20} MB: no row is")
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                at = place + error.start
                raise UserError(f"--data {path}: not UTF-8 (byte {at}); convert it first, e.g. with iconv") from None
            if line.strip():
                yield place, parse_row(path, number, line)
                empty = False
            place += len(raw)
    if empty:
        raise UserError(f"--data {path}: the file is empty")


class JsonlRows(Sequence):
    """Rows of a JSONL file by where they begin: eight bytes of memory a row, however large the file."""

    def __init__(self, path: Path, places: Sequence[int]):
        self.path, self.places = path, np.array(places, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = int(self.places[index])
        with open(self.path, "rb") as file:
            file.seek(place)
            line = file.readline().decode("utf-8-sig" if place == 0 else "utf-8", errors="replace")
        return parse_row(self.path, f"at byte {place}", line)  # refused only if the file has changed since


def fetch_squad() -> list[Path]:
    """Paths of the official train and dev files: downloaded once into the user's cache, checked by their sha256."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latentwire"
    paths = []
    for name, (address, sha256) in SQUAD.items():
        paths.append(cache / name)
        if paths[-1].exists():
            if hashlib.sha256(paths[-1].read_bytes()).hexdigest() != sha256:
                raise UserError(f"--data squad: {paths[-1]} is not the official file (sha256); delete it and run again")
            continue
        print(f"fetching {address}", flush=True)
        try:
            with urllib.request.urlopen(address, timeout=60) as reply:
                payload = reply.read()
        except OSError as error:
            raise UserError(
                f"--data squad: cannot fetch {address} ({getattr(error, 'reason', error)}); go online once, put the "
                f"file at {paths[-1]}, or give a SQuAD JSON file with --data FILE"
            ) from None
        if hashlib.sha256(payload).hexdigest() != sha256:
            raise UserError(f"--data squad: {address} is not the official file (its sha256 differs); nothing was kept")
        cache.mkdir(parents=True, exist_ok=True)
        write_atomically(paths[-1], payload)
    return paths
