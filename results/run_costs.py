"""What slots cost and what they save at the shape of a real LLM with random weights, as JSON in results/costs/.

    python results/run_costs.py llama-3.2-1b              # counts, and times on this machine, in minutes
    python results/run_costs.py llama-7b --tokens 4096 --dry-run        # counts bytes and FLOPs, without weights
    python results/make.py                                              # the table in results/README.md

A context is asked QUESTION tokens at a time, and each answer has ANSWER tokens. Three ways:
- text: context and question are read anew for each answer.
- cache: the context is read once, and its keys and values stay.
- slots: the sender reads the context twice (a look for the scorer, then with the update), and sends the latents. The
  receiver makes keys and values of them, which stay.
"""

import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common import Reader  # noqa: E402
from plumbing.arguments import Parser, positive_int  # noqa: E402
from plumbing.checkpoints import write_atomically  # noqa: E402
from plumbing.hub import DynamicCache  # noqa: E402
from plumbing.launch import commit, launch, name_of, versions  # noqa: E402
from plumbing.report import rounded  # noqa: E402
from plumbing.scale import random_reader, synchronize  # noqa: E402
from stage3.slots import LATENT_WIDTH, Slots, Update, stacked  # noqa: E402

QUESTION, ANSWER = 32, 16  # tokens


def read_on(reader: Reader, cache, tokens: int, at: int) -> None:
    """The LLM reads so many tokens behind a cache, at the positions from `at` on, and predicts the next one."""
    ids = torch.ones(1, tokens, dtype=torch.long, device=reader.device)
    place = at + torch.arange(tokens, device=reader.device)[None]
    reader.model(input_ids=ids, past_key_values=cache, position_ids=place, logits_to_keep=1)


def count(name: str, tokens: int, slots: int, dtype: torch.dtype) -> dict[str, dict]:
    """What each way takes, from the LLM's shape alone: positions, bytes, FLOPs."""

    def flops_of(read: int, kept: int) -> int:
        """FLOPs of reading so many tokens behind a cache of `kept` positions."""
        with FakeTensorMode(), torch.no_grad():
            reader, cache = random_reader(name, None, torch.device("cpu"), dtype), DynamicCache()
            for layer in range(layers if kept else 0):
                keys = torch.zeros(1, heads, kept, width, dtype=dtype)
                cache.update(keys, keys, layer)
            with FlopCounterMode(display=False) as counter:
                read_on(reader, cache, read, kept)
        return counter.get_total_flops()

    with FakeTensorMode():
        model = random_reader(name, None, torch.device("cpu"), dtype).model
        updated = sum(parameter.numel() for parameter in Update(model).parameters())
        text, vocabulary = model.config.get_text_config(), model.get_input_embeddings().weight.shape[0]
    layers, heads = text.num_hidden_layers, text.num_key_value_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    n = 2 * layers * heads * width  # numbers of a position
    matrix = 2 * slots * n * LATENT_WIDTH  # FLOPs of the encoder, and of the adapter
    sent = 2 * flops_of(tokens, 0) + 2 * tokens * updated + matrix
    ways = {
        "text": {"once": 0, "each": flops_of(tokens + QUESTION, 0), "kept": 0, "prefilled": tokens + QUESTION},
        "cache": {"once": flops_of(tokens, 0), "each": flops_of(QUESTION, tokens), "kept": tokens},
        "slots": {"once": sent + matrix, "each": flops_of(QUESTION, slots), "kept": slots},
    }
    for way in ways.values():
        way |= {"prefilled": way.get("prefilled", QUESTION), "numbers": way["kept"] * n}
        way |= {"cache_bytes": way["numbers"] * dtype.itemsize}
    token_bytes = tokens * (vocabulary - 1).bit_length() / 8  # packed ids
    sizes = {"text": token_bytes, "cache": token_bytes, "slots": 12 + slots * (4 + 2 * LATENT_WIDTH)}
    return {name: way | {"message_bytes": sizes[name]} for name, way in ways.items()}


@torch.no_grad()
def measure(reader: Reader, tokens: int, count: int, repeats: int) -> dict[str, dict]:
    """Seconds of each way: once for a context, for the first token of an answer, and for each further token."""
    slots = Slots(reader).to(reader.device)
    ids = torch.randint(len(reader.table), (tokens,), generator=torch.Generator().manual_seed(0))
    passage = SimpleNamespace(ids=ids.tolist(), opening=0)
    nothing = torch.zeros(0, slots.layout.n, device=reader.device)

    def read_text():
        cache = DynamicCache()
        read_on(reader, cache, tokens, 0)
        return cache

    def send_and_receive():
        (chosen,) = slots.choose([passage], [count])
        (latents,) = slots.latents([passage], [chosen])
        return slots.layout.cache(stacked([nothing], slots.decoded([latents]), [chosen.at], [tokens]))

    def write(cache) -> None:
        for i in range(ANSWER):
            read_on(reader, cache, 1, tokens + QUESTION + i)

    def seconds(work: Callable) -> tuple[float, object]:
        synchronize(reader.device)
        started = time.perf_counter()
        made = work()
        synchronize(reader.device)
        return time.perf_counter() - started, made

    ways = {"text": (DynamicCache, tokens + QUESTION), "cache": (read_text, QUESTION)}
    ways |= {"slots": (send_and_receive, QUESTION)}
    found = {name: {"once_seconds": [], "first_seconds": [], "next_seconds": []} for name in ways}
    for repeat in range(repeats + 1):  # in turns; the first one is not measured
        for name, (prepare, read) in ways.items():
            once, cache = seconds(prepare)
            at = 0 if name == "text" else tokens
            first, _ = seconds(functools.partial(read_on, reader, cache, read, at))
            after, _ = seconds(functools.partial(write, cache))
            for key, value in zip(found[name], (once, first, after / ANSWER), strict=True):
                found[name][key] += [value] * (repeat > 0)
    return {name: {key: statistics.median(values) for key, values in way.items()} for name, way in found.items()}


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a shape of plumbing/scale.py, or a local directory")
    parser.add_argument("--tokens", type=positive_int, default=1024, help="of the context")
    parser.add_argument("--rate", type=positive_int, default=4, help="tokens of the context for each slot")
    parser.add_argument("--repeats", type=positive_int, default=5)
    parser.add_argument("--dry-run", action="store_true", help="count only")
    args = parser.parse_args()
    slots, dtype = math.ceil(args.tokens / args.rate), torch.bfloat16
    ways = count(args.model, args.tokens, slots, dtype)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not args.dry_run:
        times = measure(random_reader(args.model, None, device, dtype), args.tokens, slots, args.repeats)
        ways = {name: way | times[name] for name, way in ways.items()}
    result = {"model": args.model, "tokens": args.tokens, "rate": args.rate, "ways": ways, "dtype": name_of(dtype)}
    result |= {"device": None if args.dry_run else torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}
    result |= {"threads": torch.get_num_threads(), "versions": versions(), "commit": commit()}
    result["command"] = " ".join(["python results/run_costs.py", *sys.argv[1:]])
    target = HERE / "costs" / f"{Path(args.model).name}-{args.tokens}.json"
    target.parent.mkdir(exist_ok=True)
    write_atomically(target, (json.dumps(rounded(result), indent=2) + "\n").encode())
    print(json.dumps(rounded(result)))


if __name__ == "__main__":
    launch(main)
