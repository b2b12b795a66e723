"""Measure what other ways make of the texts that stage 3 sends, and its speed, as JSON in results/rivals/.

    pip install zstandard brotli pyppmd          # nothing else here needs them
    OMP_NUM_THREADS=1 python results/run_rivals.py    # minutes: PPMd reads 2 MB before each text
    python results/make.py                       # the table in results/README.md

Those with a dictionary, and PPMd, know what the sender's training knows: prompts of the world, passages and stories of
--corpus. Their sizes have no frame (no magic number, no checksum); a message has one of six or seven bytes. SQuAD
paragraphs need --shared.
"""

import argparse
import json
import random
import re
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common import PROMPT, load_reader  # noqa: E402
from plumbing.data import everyday, read_squad, read_texts  # noqa: E402
from plumbing.launch import commit, versions  # noqa: E402
from plumbing.report import rounded  # noqa: E402
from plumbing.wires import load_wire  # noqa: E402
from stage3.message import deflate  # noqa: E402
from stage3.sender import Sender  # noqa: E402
from stage3_full import SHIPPED, STAGE, WIRE, load_sender  # noqa: E402
from tiny import world  # noqa: E402

PRIMED = 2_000_000  # bytes that PPMd reads first
ZSTD_DICTIONARY = 112_640  # bytes, what zstd's own command line makes


def rivals(known: list[bytes]) -> dict[str, Callable[[bytes], int]]:
    """name -> bytes of a text, for each rival; some know these texts."""
    import brotli
    import pyppmd
    import zstandard

    start = b"\n".join(known)[:PRIMED]
    dictionary = zstandard.train_dictionary(ZSTD_DICTIONARY, known, level=19)
    bare = dict(format=zstandard.FORMAT_ZSTD1_MAGICLESS, write_checksum=0, write_content_size=0, write_dict_id=0)
    parameters = zstandard.ZstdCompressionParameters.from_level(19, **bare)
    zstd = zstandard.ZstdCompressor(dict_data=dictionary, compression_params=parameters)

    def deflate_with_dictionary(text: bytes) -> int:
        deflater = zlib.compressobj(9, wbits=-15, zdict=start[-32768:])
        return len(deflater.compress(text) + deflater.flush())

    def ppmd_primed(text: bytes) -> int:
        encoder = pyppmd.Ppmd7Encoder(max_order=6, mem_size=64 << 20)
        before = len(encoder.encode(start))
        return before + len(encoder.encode(text) + encoder.flush()) - primed

    encoder = pyppmd.Ppmd7Encoder(max_order=6, mem_size=64 << 20)
    primed = len(encoder.encode(start) + encoder.flush())
    return {
        "deflate -9": lambda text: len(deflate(text)),
        "deflate -9, dictionary": deflate_with_dictionary,
        "brotli -q 11": lambda text: len(brotli.compress(text, quality=11)),
        "zstd -19, trained dictionary": lambda text: len(zstd.compress(text)),
        "PPMd, primed": ppmd_primed,
    }


def speed(sender: Sender, texts: list[str], repeats: int = 5) -> dict[str, float]:
    """Milliseconds of CPU to send and to read a text, the best of some rounds, and bytes and latents of one."""
    best = {"send_ms": float("inf"), "read_ms": float("inf")}
    for _ in range(repeats):
        sender.send.cache_clear(), sender.text.cache_clear()
        started = time.process_time()
        messages = [sender.send(text, "prompt") for text in texts]
        sent = time.process_time()
        if [sender.text(message)[0] for message in messages] != texts:
            sys.exit("error: a text did not arrive")
        read = time.process_time()
        for name, seconds in (("send_ms", sent - started), ("read_ms", read - sent)):
            best[name] = min(best[name], 1000 * seconds / len(texts))
    latents = sum(len(sender.split(text.encode())) for text in texts) / len(texts)
    return best | {"text_bytes": sum(len(text.encode()) for text in texts) / len(texts), "latents": latents}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--shared", default="../shared", help="directory with data/squad and data/text")
    parser.add_argument("--count", type=int, default=300, help="texts of each kind")
    args = parser.parse_args()
    squad, stories = Path(args.shared, "data", "squad"), Path(args.shared, "data", "text")
    learned = {row["context"] for row in read_squad(squad / "train-subset.json")}
    known = [*sorted(learned), *read_texts(stories / "tinystories_sample.txt", PROMPT)]
    known += [PROMPT.format(**world.make_example("train", 0, i)) for i in range(10_000)]
    random.Random(0).shuffle(known)
    passages = sorted({row["context"] for row in read_squad(squad / "dev-v1.1.json")})
    short = [part for row in everyday(1000) for part in re.split(r"(?<=[.!?])\s+", row["context"])]
    kinds = {
        "the world's prompts": [PROMPT.format(**row) for row in world.make_examples("test", args.count)],
        "SQuAD dev passages": random.Random(0).sample(passages, min(args.count, len(passages))),
        "everyday sentences": [part for part in dict.fromkeys(short) if 20 <= len(part.encode()) <= 100],
    }
    wire, reader = load_wire(SHIPPED, STAGE, WIRE), load_reader("tiny", torch.device("cpu"), torch.float32)
    sender = load_sender(wire)
    ways = rivals([text.encode() for text in known]) | {
        "packed token ids": lambda text: -(-len(reader.tokenizer(text.decode(), verbose=False)["input_ids"]) * 12 // 8),
        "message": lambda text: len(sender.send(text.decode(), "context")),
    }
    row = {"command": "python results/run_rivals.py", "versions": versions(), "commit": commit(), "primed": PRIMED}
    row |= {"wire_sha256": wire.sha256, "kinds": {}}
    row |= {"known_bytes": sum(len(text.encode()) for text in known)}
    row |= {"threads": torch.get_num_threads(), "speed": speed(sender, kinds["the world's prompts"])}
    print(row["speed"])
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
