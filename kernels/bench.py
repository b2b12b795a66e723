"""Benchmark of the operator, and of the codebook's parts. A JSON object a line on stdout, a table on stderr.

    python kernels/bench.py                                  # about 6 minutes on two cores
    python results/run_kernels.py                            # tests, this, and where the rows go

A whole training step is timed by `stage1_pca_adapter.py --random-weights`.

Columns, all in one run: naive (the equation in eager torch), strong (addmm, F.rms_norm, times target), compiled
(torch.compile of the strong one; max-autotune on CUDA), fused and library (our two forms; CUDA only), ours (the form
that `choose_form` takes). "x, ours by ids" is the operator as stages use it, from a table of codes, against the naive
one from x. `floor_us` is the larger of bytes and FLOPs that the equation cannot do without, over the two ceilings,
which are measured first and in the same run. Times are medians with their 20th and 80th percentile; on CUDA, replays of
a graph that walks through copies of the inputs larger than the L2 cache. There, `eager_us` is a call without a graph,
as stages make it: where that is longer, Python and not the GPU is what takes the time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `python kernels/bench.py` puts kernels/ there instead

from kernels import adapter
from kernels.adapter import EPS, adapt, reconstruct, reference
from plumbing.launch import commit, name_of, versions
from plumbing.report import rounded

WIDTH, CODE_WIDTH, VOCABULARY = 4096, 512, 32000  # a 7B model's
# linear and mlp run in float32, a codebook in the LLM's
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# ---------------------------------------------------------------------------------------------------------------------
# timing


def cpu_times(functions: dict, repeats: int) -> dict[str, list[float]]:
    """Seconds of each function, taken in turns, so that what disturbs the machine disturbs all of them."""
    times = {name: [] for name in functions}
    for function in functions.values():
        function(0)
    for repeat in range(repeats):
        for name, function in functions.items():
            started = time.perf_counter()
            function(repeat)
            times[name].append(time.perf_counter() - started)
    return times


def cuda_times(functions: dict, repeats: int, copies: int) -> dict[str, list[float]]:
    """Seconds a call: a graph of `copies` calls on cold inputs, replayed; taken in turns."""
    graphs, times = {}, {name: [] for name in functions}
    for name, function in functions.items():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for copy in range(3):
                function(copy % copies)
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for copy in range(copies):
                function(copy)
    for _ in range(repeats):
        for name, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / 1e3 / copies)
    return times


def microseconds(times: list[float]) -> dict[str, float]:
    fifths = statistics.quantiles(times, n=5)
    return {"p50_us": statistics.median(times) * 1e6, "p20_us": fifths[0] * 1e6, "p80_us": fifths[3] * 1e6}


def ceilings(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Bytes a second of a large copy, read and write counted, and FLOPs a second of a large matmul."""
    cuda = device == "cuda"
    source = torch.randn(2**29 if cuda else 2**26, device=device)
    target = torch.empty_like(source)
    side = 8192 if cuda else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    # in a CUDA graph, copy_ reached 2.7 TB/s on an H200, which has 4.8: a kernel moves the bytes instead
    copy = (lambda _: torch.add(source, 1, out=target)) if cuda else (lambda _: target.copy_(source))
    functions = {"copy": copy, "matmul": lambda _: a @ b}
    times = cuda_times(functions, 20, 1) if cuda else cpu_times(functions, 9)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    return {
        "bytes_per_second": 2 * source.numel() * 4 / seconds["copy"],
        "flops_per_second": 2 * side**3 / seconds["matmul"],
    }


# ---------------------------------------------------------------------------------------------------------------------
# the operator


def inputs(N: int, d: int, k: int, device: str, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape, scale):
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    made = {
        "x": normal(N, d, scale=0.02), "mean": normal(d, scale=0.005), "components": normal(d, k, scale=d**-0.5),
        "weight": normal(k, d, scale=d**-0.5), "bias": normal(d, scale=0.005), "g": normal(N, d, scale=1.0),
        "table": normal(VOCABULARY, k, scale=0.02), "target": torch.tensor(0.02, device=device),
        "ids": torch.randint(VOCABULARY, (N,), generator=generator, device=device),
    }  # fmt: skip
    made["codes"] = made["table"][made["ids"]]
    return made


def strong(codes, weight, bias, target):
    y = torch.addmm(bias, codes, weight)
    return F.rms_norm(y, (y.shape[1],), eps=EPS) * target


compiled = torch.compile(
    strong, mode="max-autotune-no-cudagraphs" if torch.cuda.is_available() else None, dynamic=False
)


def by_form(form: str, function):
    """The function, with this form whatever `choose_form` says."""

    def run(i):
        chosen, adapter.choose_form = adapter.choose_form, lambda *sizes: form
        try:
            return function(i)
        finally:
            adapter.choose_form = chosen

    return run


def naive_codes(i):
    y = i["codes"] @ i["weight"] + i["bias"]
    return y * i["target"] / torch.sqrt(y.square().mean(-1, keepdim=True) + EPS)


def naive_x(i):
    return reference(i["x"], i["mean"], i["components"], i["weight"], i["bias"], i["target"])


def from_codes(function):
    return lambda i: function(i["codes"], i["weight"], i["bias"], i["target"])


def from_x(function):
    return lambda i: function((i["x"] - i["mean"]) @ i["components"], i["weight"], i["bias"], i["target"])


def ours_x(i):
    return reconstruct(i["x"], i["mean"], i["components"], i["weight"], i["bias"], i["target"])


def ours_ids(i):
    return adapt(i["table"], i["weight"], i["bias"], i["target"], ids=i["ids"])


IDS, ADAPTER = "x, ours by ids", ("weight", "bias")


def columns_of(naive, strong_one, compiled_one, ours):
    forms = {form: by_form(form, ours) for form in ("fused", "library")}
    return {"naive": naive, "strong": strong_one, "compiled": compiled_one} | forms | {"ours": ours}


FROM_CODES = columns_of(naive_codes, from_codes(strong), from_codes(compiled), from_codes(adapt))
# what: (column -> function of the inputs, leaves that learn)
CASES = {
    "codes": (FROM_CODES, ()),
    "x": (columns_of(naive_x, from_x(strong), from_x(compiled), ours_x), ()),
    IDS: ({"naive": naive_x, "ours": ours_ids}, ()),
    f"{IDS}, forward + backward": ({"naive": naive_x, "ours": ours_ids}, ADAPTER),
    "codes, forward + backward": (FROM_CODES, ADAPTER),
    "codes, forward + backward to codes": (FROM_CODES, ("codes", *ADAPTER)),
}


def on_sets(function, sets: list[dict], learned: tuple[str, ...]):
    """copy -> function of that copy of the inputs; forward and backward if anything learns."""
    if not learned:
        return lambda copy: function(sets[copy % len(sets)])
    leaves = [{name: i[name].clone().requires_grad_() for name in learned} for i in sets]

    def step(copy):
        copy %= len(sets)
        return torch.autograd.grad(function(sets[copy] | leaves[copy]), list(leaves[copy].values()), sets[copy]["g"])

    return step


def benchmark_operator(
    device: str, dtype: torch.dtype, d: int, k: int, sizes: list[int], ceiling: dict, repeats: int, without: set[str]
) -> Iterator[dict]:
    """Rows {what, N, column, times, floor, error, ...}, one for every column of every case that is not left out."""
    s, cuda = dtype.itemsize, device == "cuda"
    for N in sizes:
        torch._dynamo.reset()
        copies = 1
        if cuda:  # an H200 has 50 MB of L2
            copies = min(16, max(2, 300 * 2**20 // (2 * N * d * s + 2 * d * k * s)))
        sets = [inputs(N, d, k, device, dtype, seed) for seed in range(copies)]
        for what, (columns, learned) in CASES.items():
            group, place = {}, {"what": what, "N": N, "d": d, "k": k, "dtype": name_of(dtype)}
            for column in (column for column in columns if column not in without):
                group[column] = on_sets(columns[column], sets, learned)
                try:
                    group[column](0)
                except Exception as error:  # a form need not fit everywhere
                    del group[column]
                    yield place | {"column": column, "failed": f"{type(error).__name__}: {error}"[:300]}
            times = cuda_times(group, repeats, copies) if cuda else cpu_times(group, repeats)
            projects = what == "x"
            flops = 2 * N * d * k * (1 + projects + bool(learned) + ("codes" in learned))
            moved = N * k * s + d * k * s + N * d * s
            moved += (N * d * s + d * k * s) * projects + (2 * N * d * s + d * k * s) * bool(learned)
            floor = 1e6 * max(flops / ceiling["flops_per_second"], moved / ceiling["bytes_per_second"])
            for column, values in times.items():
                row = place | {"column": column} | microseconds(values)
                row |= {"floor_us": floor, "tflops": flops / row["p50_us"] / 1e6, "flops": flops, "bytes": moved}
                if cuda:
                    row |= footprint(group[column])
                if not learned:
                    exact_from_x = what == "x" or (what == IDS and column == "naive")
                    row["error"] = relative_error(group[column](0), sets[0], exact_from_x)
                share = f"{100 * floor / row['p50_us']:6.1f}% of the floor"
                print(f"{what:38} N {N:6} {column:9} {row['p50_us']:12.1f} us {share}", file=sys.stderr, flush=True)
                yield row


def footprint(function) -> dict[str, float]:
    """Of a call: peak device memory above what was there, kernel launches, and time with the host's, of 20 calls."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(20):
        function(0)
    torch.cuda.synchronize()
    eager = (time.perf_counter() - started) / 20
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = function(0)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function(0)
        torch.cuda.synchronize()
    launches = sum(event.device_type.name == "CUDA" for event in profile.events())
    return {"eager_us": eager * 1e6, "peak_mib": peak / 2**20, "launches": launches}


def relative_error(out, i, from_x: bool) -> float:
    """RMS error of the first 64 rows against float64, relative to the RMS of the result."""
    double = {name: i[name].double() for name in ("mean", "components", "weight", "bias", "target")}
    codes = i["codes"][:64].double()
    if from_x:
        codes = (i["x"][:64].double() - double["mean"]) @ double["components"]
    y = codes @ double["weight"] + double["bias"]
    exact = y * double["target"] / (y.square().mean(-1, keepdim=True) + EPS).sqrt()
    return ((out[:64].double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()).item()


# ---------------------------------------------------------------------------------------------------------------------
# the codebook: what would a kernel of its own save?


def benchmark_codebook(device: str, dtype: torch.dtype, repeats: int) -> list[dict]:
    """softmax(z keys^T) @ table of 512 tokens, part by part, beside the library's attention on the same operands."""
    rows = []
    for V, d, k in ((1024, 192, 24), (VOCABULARY if device == "cuda" else 8000, WIDTH, CODE_WIDTH)):
        z, keys, table = (torch.randn(shape, device=device).to(dtype) for shape in ((512, k), (V, k), (V, d)))
        blend, bias, target = torch.softmax(z @ keys.T, -1), table.new_zeros(d), torch.tensor(0.02, device=device)
        functions = {
            "scores": lambda _: z @ keys.T,  # noqa: B023
            "softmax": lambda _: torch.softmax(blend, -1),  # noqa: B023
            "values and RMS": lambda _: adapt(blend, table, bias, target),  # noqa: B023
            "all": lambda _: adapt(torch.softmax(z @ keys.T, -1), table, bias, target),  # noqa: B023
            "attention": lambda _: F.scaled_dot_product_attention(z[None, None], keys[None, None], table[None, None]),  # noqa: B023
        }
        times = cuda_times(functions, repeats, 1) if device == "cuda" else cpu_times(functions, repeats)
        rows += [{"V": V, "d": d, "k": k, "part": part} | microseconds(values) for part, values in times.items()]
    return rows


def collect(lines: list[str]) -> dict:
    """One object of the lines that `main` prints. A last one that is cut off is left out."""
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    header, *rows = rows or [{}]
    lists = {"operator": "tflops", "codebook": "part", "failed": "failed"}
    return header | {name: [row for row in rows if key in row] for name, key in lists.items()}


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--sizes", type=int, nargs="+", default=[512, 2048, 8192, 65536] if cuda else [1, 16, 64, 512, 4096])
    add("--width", type=int, default=WIDTH, help="d")
    add("--code-dim", type=int, default=CODE_WIDTH, help="k")
    add("--dtype", choices=DTYPES, default="bfloat16" if cuda else "float32")
    add("--repeats", type=int, default=50 if cuda else 9, help="timings a row")
    add("--no-compile", action="store_true", help="without torch.compile, whose autotuning takes minutes")
    add("--smoke", action="store_true", help="small sizes, to see that everything runs")
    args = parser.parse_args()
    if args.smoke:
        args.sizes, args.repeats = [16], 3
    device, dtype = "cuda" if cuda else "cpu", DTYPES[args.dtype]
    without = {"compiled"} if args.no_compile else set()
    if not cuda:
        without |= {"fused", "library"}
    elif args.code_dim > adapter.WIDEST[dtype.itemsize]:
        without |= {"fused"}
    torch.manual_seed(0)

    def emit(row: dict) -> None:
        print(json.dumps(rounded(row)), flush=True)

    ceiling = ceilings(device, dtype)
    header = {
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "dtype": args.dtype, "versions": versions(), "commit": commit(), "repeats": args.repeats, "ceilings": ceiling,
    }  # fmt: skip
    if adapter.HAVE_TRITON:
        header["versions"]["triton"] = adapter.fused.triton.__version__
    emit(header)
    for row in benchmark_operator(device, dtype, args.width, args.code_dim, args.sizes, ceiling, args.repeats, without):
        emit(row)
    if (args.width, args.code_dim) == (WIDTH, CODE_WIDTH) and args.dtype == parser.get_default("dtype"):
        for row in benchmark_codebook(device, dtype, args.repeats):
            emit(row)


if __name__ == "__main__":
    main()
