"""Measure what other ways make of the texts that stage 3 sends, as JSON in results/rivals/: the columns beside it.

    pip install zstandard brotli pyppmd          # nothing else here needs them
    python results/run_rivals.py                 # minutes: PPMd reads 2 MB before each text
    python results/make.py                       # the table in results/README.md

All know what the sender's training knows: prompts of the world, passages and stories of --corpus. Sizes are those of
the bare output, without a frame; the message has its frame of six bytes. SQuAD paragraphs need --shared.
"""

import argparse
import json
import random
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common import PROMPT, load_reader  # noqa: E402
from plumbing.data import everyday, read_squad  # noqa: E402
from plumbing.launch import commit, versions  # noqa: E402
from plumbing.report import rounded  # noqa: E402
from plumbing.wires import load_wire  # noqa: E402
from stage3.sender import Sender  # noqa: E402
from stage3_full import SHIPPED, STAGE, WIRE, read_corpus  # noqa: E402
from tiny import world  # noqa: E402

PRIMED = 2_000_000  # bytes that PPMd reads first
ZSTD_DICTIONARY = 112_640  # bytes, what zstd's own command line makes


def rivals(known: list[bytes]) -> dict[str, Callable[[bytes], int]]:
    """name -> bytes of a text, for each rival that knows these texts."""
    import brotli
    import pyppmd
    import zstandard

    start = b"\n".join(known)[:PRIMED]
    dictionary = zstandard.train_dictionary(ZSTD_DICTIONARY, known, level=19)
    zstd = zstandard.ZstdCompressor(
        level=19, dict_data=dictionary, write_checksum=False, write_content_size=False, write_dict_id=False
    )

    def zlib_with_dictionary(text: bytes) -> int:
        deflate = zlib.compressobj(9, zdict=start[-32768:])
        return len(deflate.compress(text) + deflate.flush())

    def ppmd_primed(text: bytes) -> int:
        encoder = pyppmd.Ppmd7Encoder(max_order=6, mem_size=64 << 20)
        before = len(encoder.encode(start))
        return before + len(encoder.encode(text) + encoder.flush()) - primed

    encoder = pyppmd.Ppmd7Encoder(max_order=6, mem_size=64 << 20)
    primed = len(encoder.encode(start) + encoder.flush())
    return {
        "zlib -9": lambda text: len(zlib.compress(text, 9)),
        "zlib -9, dictionary": zlib_with_dictionary,
        "brotli -q 11": lambda text: len(brotli.compress(text, quality=11)),
        "zstd -19, trained dictionary": lambda text: len(zstd.compress(text)),
        "PPMd, primed": ppmd_primed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--shared", default="../shared", help="directory with data/squad and data/text")
    parser.add_argument("--count", type=int, default=300, help="texts of each kind")
    args = parser.parse_args()
    squad, stories = Path(args.shared, "data", "squad"), Path(args.shared, "data", "text")
    corpus = [str(squad / "train-subset.json"), str(stories / "tinystories_sample.txt")]
    known = read_corpus(corpus) + [PROMPT.format(**world.make_example("train", 0, i)) for i in range(10_000)]
    random.Random(0).shuffle(known)
    paragraphs = sorted({row["context"] for row in read_squad(squad / "dev-v1.1.json")})
    kinds = {
        "the world's prompts": [PROMPT.format(**row) for row in world.make_examples("test", args.count)],
        "SQuAD dev paragraphs": random.Random(0).sample(paragraphs, min(args.count, len(paragraphs))),
        "everyday passages": list(dict.fromkeys(row["context"] for row in everyday(1000))),
    }
    wire, reader = load_wire(SHIPPED, STAGE, WIRE), load_reader("tiny", torch.device("cpu"), torch.float32)
    sender = Sender(wire.tensors)
    ways = rivals([text.encode() for text in known]) | {
        "packed token ids": lambda text: -(-len(reader.tokenizer(text.decode(), verbose=False)["input_ids"]) * 12 // 8),
        "message": lambda text: len(sender.send(text.decode(), "context")),
    }
    row = {"command": "python results/run_rivals.py", "versions": versions(), "commit": commit(), "primed": PRIMED}
    row |= {"wire_sha256": wire.sha256, "known_bytes": sum(len(text.encode()) for text in known), "kinds": {}}
    for kind, texts in kinds.items():
        raw = [text.encode() for text in texts]
        found = {"texts": len(raw), "text": sum(map(len, raw)) / len(raw)}
        for name, size in ways.items():
            started = time.perf_counter()
            found[name] = sum(map(size, raw)) / len(raw)
            print(kind, name, f"{found[name]:.1f} of {found['text']:.1f}", f"{time.perf_counter() - started:.0f} s")
        row["kinds"][kind] = found
    (HERE / "rivals").mkdir(exist_ok=True)
    (HERE / "rivals" / "rivals.json").write_text(json.dumps(rounded(row), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
