"""Data: rows {"context", "question", "answers"} for a reader, windows {"ids"} of a text for a plain language model."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import stat
import urllib.request
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from plumbing.checkpoints import write_atomically
from plumbing.kinds import ANYTHING, TEXT, Many, parse
from plumbing.launch import UserError
from plumbing.spelling import tokenize
from plumbing.wires import mark_as_read
from tiny import world

if TYPE_CHECKING:
    from common import Reader

MAX_LINE = 64 << 20  # bytes of a JSONL row
ENDINGS = (".json", ".jsonl", ".txt")
ROW = {"context": TEXT, "question": TEXT, "answers": Many(TEXT, 1), "*": ANYTHING}  # of a JSONL file
SQUAD_ROW = {"question": TEXT, "answers?": Many({"text": TEXT, "*": ANYTHING}), "*": ANYTHING}
SQUAD_PARAGRAPHS = Many({"context": TEXT, "qas": Many(SQUAD_ROW), "*": ANYTHING})
SQUAD_LAYOUT = {"data": Many({"paragraphs": SQUAD_PARAGRAPHS, "*": ANYTHING}), "*": ANYTHING}
WINDOW = 256  # tokens: a .txt file is cut into windows of this length
BLENDED = 0.75  # of the listed names in `train_passages`: latents would learn a short list by heart

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


EVERYDAY = Path(world.__file__).with_name("everyday.jsonl")


def everyday(count: int) -> list[dict]:
    """The first rows of everyday.jsonl, which was written by hand; no reader was trained on it."""
    return [row for _, row in itertools.islice(read_jsonl(EVERYDAY), count)]


# name -> its test set, a function of the number of rows; everything else is that of `tiny`
TINY = {
    "tiny": functools.partial(world.make_examples, "test"),
    "tiny-unseen": functools.partial(world.make_examples, "test", unseen=True),
    "tiny-everyday": everyday,
} | {f"tiny-{style}": functools.partial(world.make_examples, "test", style=style) for style in world.STYLES}


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

    def train_passages(self, seed: int, start: int, count: int, most: int) -> list[list[dict]]:
        """Rows start .. start+count-1 of the stream, each with up to `most` - 1 others about the same passage.

        In a file, those are looked for next to it.
        """
        if self.train is None:
            made = (world.make_questions("train", seed, i, blended=BLENDED) for i in range(start, start + count))
            return [rows[:most] for rows in made]
        passages = []
        for i in range(start, start + count):
            epoch, offset = divmod(i, len(self.train))
            place = int(epoch_order(seed, epoch, len(self.train))[offset])
            rows = [self.train[place]]
            for step in (1, -1):
                other = place + step
                while len(rows) < most and 0 <= other < len(self.train):
                    row = self.train[other]
                    if row["context"] != rows[0]["context"]:
                        break
                    rows.append(row)
                    other += step
            passages.append(rows)
        return passages


@functools.lru_cache(maxsize=1)
def epoch_order(seed: int, epoch: int, rows: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(rows)


def load_data(name: str, reader: Reader, eval_examples: int) -> Data:
    """`tiny`, `squad` (downloaded once, checked) or a FILE: SQuAD v1.1 JSON, JSONL rows, or .txt.

    `tiny-unseen` and the others of TINY differ from `tiny` in their test rows alone. A file of questions is split by a
    hash of the passage (`split_of`), so no passage is in two splits. A text is cut into windows, and the last fifth of
    them is the test set. At most `eval_examples` test rows, chosen by a fixed shuffle. Raises UserError with file and
    line.
    """
    if name in TINY:
        return Data("qa", None, world.make_examples("validation", 100), TINY[name](eval_examples))
    if name == "squad":
        rows, test = (read_squad(path) for path in fetch_squad())
        return split_rows(name, enumerate(rows), lambda places: [rows[i] for i in places], eval_examples, test)
    path, problem = Path(name), what_is_wrong(Path(name))
    if problem:
        raise UserError(
            f"--data {name}: {problem}; give tiny, squad, or a file whose name ends in {', '.join(ENDINGS)} "
            f"(also: {', '.join(list(TINY)[1:])})"
        )
    mark_as_read(path.parent)
    if path.suffix.lower() == ".jsonl":
        return split_rows(name, read_jsonl(path), functools.partial(JsonlRows, path), eval_examples)
    if path.suffix.lower() == ".txt":
        return text_data(name, read_text(path), reader, eval_examples)
    rows = read_squad(path)
    return split_rows(name, enumerate(rows), lambda places: [rows[i] for i in places], eval_examples)


def what_is_wrong(path: Path) -> str | None:
    """Why a path is not a data file, or None."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return "no such file"
    except (OSError, ValueError) as error:  # a loop of links, a name that is too long, a zero byte in it
        return f"not a file ({getattr(error, 'strerror', None) or error})"
    if not stat.S_ISREG(status.st_mode):
        return "a directory" if stat.S_ISDIR(status.st_mode) else "a pipe or device, which cannot be read twice"
    if path.suffix.lower() not in ENDINGS:
        return f"a file of an unknown kind ({path.suffix or 'its name has no ending'})"
    return None if status.st_size else "the file is empty"


def split_of(passage: str) -> str:
    """The split of a passage of a file that has none: 10% test, 2% of the rest validation."""
    digest = hashlib.sha256(passage.encode()).digest()
    return "test" if digest[0] < 26 else "validation" if digest[1] < 5 else "train"


def split_rows(
    name: str, found: Iterable[tuple[int, dict]], rows_at: Callable, eval_examples: int, test: list | None = None
) -> Data:
    """Data from (place, row) pairs, of which only the places are kept; rows_at(places) -> rows. test: if known."""
    places = {split: array("q") for split in world.SPLITS}
    for place, row in found:
        places[split_of(row["context"])].append(place)
    train, validation = places["train"], places["validation"]
    if test is None:
        test = rows_at(places["test"])
    else:
        train += places["test"]
    if not test or not train + validation:
        count = len(train) + len(validation) + len(test)
        raise UserError(f"--data {name}: {count} rows are too few passages to split into training and test")
    if not validation:  # a small file: the first passage is held out
        rows = rows_at(train)
        is_first = [row["context"] == rows[0]["context"] for row in rows]
        validation = [place for place, chosen in zip(train, is_first, strict=True) if chosen]
        train = [place for place, chosen in zip(train, is_first, strict=True) if not chosen]
    order = np.random.default_rng(0).permutation(len(test))[:eval_examples]
    return Data("qa", rows_at(train or validation), list(rows_at(validation[:100])), [test[i] for i in order])


def text_data(name: str, text: str, reader: Reader, eval_examples: int) -> Data:
    if not text.strip():
        raise UserError(f"--data {name}: the file is empty")
    print(f"data {name}: {len(text):,} characters", flush=True)  # millions of them take a while
    start = [] if reader.tokenizer.bos_token_id is None else [reader.tokenizer.bos_token_id]
    ids = reader.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    width = min(WINDOW, reader.context_tokens) - len(start)
    rows = [{"ids": start + ids[at : at + width]} for at in range(0, len(ids), width)]
    rows = [row for row in rows if len(row["ids"]) > len(start) + 1]
    special = set(reader.tokenizer.all_special_ids)
    rows = [row for row in rows if not special.issuperset(row["ids"])]  # those hold no text
    if len(rows) < 5:
        raise UserError(
            f"--data {name}: its {len(ids)} tokens make {len(rows)} windows of {width} with text in them; to train and "
            "test, it needs at least 5"
        )
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


def read_text(path: Path) -> str:
    """The text of a file, with or without a byte order mark. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}); convert it first, e.g. with iconv") from None
    if "\0" in text:  # UTF-16 without its mark, or no text at all
        raise UserError(f"{path}: not UTF-8 text (byte 0 occurs in it); convert it first, e.g. with iconv")
    return text


def read_squad(path: Path) -> list[dict]:
    """Rows of a SQuAD v1.1 JSON file. Raises UserError if it is malformed or has no answered question."""
    rows = []
    for article in parse(read_text(path), SQUAD_LAYOUT, f"{path}, read in the SQuAD v1.1 layout")["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                answers = [answer["text"] for answer in qa.get("answers", [])]
                if answers:
                    rows.append({"context": paragraph["context"], "question": qa["question"], "answers": answers})
    if not rows:
        raise UserError(f"{path}: no question has an answer, so there is nothing to score against")
    return rows


def parse_row(path: Path, number: int | str, line: str) -> dict:
    """A row {"context", "question", "answers": [...]} from a line of JSON. Raises UserError with file and line."""
    row = parse(line, ROW, f"{path}: line {number}")
    return {key: row[key] for key in ("context", "question", "answers")}


def read_jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    """(where it begins, row) of each line that is not blank, one at a time. Raises UserError with file and line."""
    place, empty = 0, True
    with open(path, "rb") as file:
        for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
            if len(raw) > MAX_LINE:
                raise UserError(f"{path}: line {number} is longer than {MAX_LINE >> 20} MB: no row is")
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                at = place + error.start
                raise UserError(f"{path}: not UTF-8 (byte {at}); convert it first, e.g. with iconv") from None
            if line.strip():
                yield place, parse_row(path, number, line)
                empty = False
            place += len(raw)
    if empty:
        raise UserError(f"{path}: the file is empty")


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


def read_texts(name: str, prompt: str) -> list[str]:
    """The texts of a corpus: rows of questions about passages (`squad`, .json, .jsonl) as prompts, the lines of a .txt.

    prompt: with {context} and {question}. Raises UserError.
    """
    problem = None if name == "squad" else what_is_wrong(Path(name))
    if problem:
        raise UserError(f"--corpus {name}: {problem}; give squad, or a file whose name ends in {', '.join(ENDINGS)}")
    path = fetch_squad()[0] if name == "squad" else Path(name)
    mark_as_read(path.parent)
    if path.suffix.lower() == ".txt":
        texts = read_text(path).splitlines()
    else:
        rows = [row for _, row in read_jsonl(path)] if path.suffix.lower() == ".jsonl" else read_squad(path)
        texts = [prompt.format(**row) for row in rows]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise UserError(f"--corpus {name}: there is no text in it")
    return texts


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
