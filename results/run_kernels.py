"""Test and measure the kernels on this machine, within ten minutes on a GPU; rows in results/kernels/.

    python results/run_kernels.py             # on a CUDA GPU natively, else on the CPU, where nothing hurries it
    python results/make.py                    # tables in results/README.md and roofline.png from the JSON

Parts, in the order of what one wants to know first: is it right (test_kernels.py; then its largest tests), which form
is fastest where (kernels/bench.py), what is its share of a training step of llama-7b, does it read outside its
tensors (compute-sanitizer). A part that fails or runs out of its time is recorded, and the next one runs. All of it
goes line by line into NAME-parts.jsonl; what a benchmark has measured is kept, also if it did not come to its end.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))  # `python results/run_kernels.py` puts results/ there instead

GPU_SECONDS = 600  # of all parts together, on a GPU
LARGE = "two_to_the_31 or cuda_graph or opcheck or compile_fullgraph"


class Part(NamedTuple):
    name: str
    seconds: float  # it is stopped then
    command: list[str]
    into: str | None = None  # the file in results/kernels/ that its output becomes, if it is a benchmark
    environment: dict[str, str] = {}


def parts_on_a_gpu(gpu: str, sizes: list[str], no_compile: bool) -> list[Part]:
    python, parts = sys.executable, []
    tests = [python, "-m", "pytest", "-q", "-m", "", "test_kernels.py", "-k"]
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    parts.append(Part("tests", 100, [*tests, f"not ({LARGE} or compiled)", *workers]))
    parts.append(Part("large tests", 45, [*tests, LARGE]))
    for dtype, d, k in (("float32", 192, 24), ("bfloat16", 4096, 512), ("float32", 4096, 512)):
        bench = [python, "kernels/bench.py", "--dtype", dtype, "--width", str(d), "--code-dim", str(k)]
        bench += ["--repeats", "20", "--sizes", *sizes, "--no-compile"]
        parts.append(Part(f"forms {dtype} {d} {k}", 40, bench, f"{gpu}-{dtype}-{d}-{k}.json"))
    for kind in ("linear", "mlp", "codebook"):
        step = [python, "stage1_pca_adapter.py", "--model", "llama-7b", "--random-weights", "--steps", "10"]
        parts.append(Part(f"step {kind}", 55, [*step, "--adapter", kind]))
    if not no_compile:  # its autotuning takes 70 s for one size
        bench = [python, "kernels/bench.py", "--repeats", "20", "--sizes", *sizes]
        parts.append(Part("forms compiled", 100, bench, f"{gpu}-compiled.json"))
    check = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", *tests, "strided"]
    # torch's allocator hands out parts of large blocks: a read behind the end of a tensor would stay inside its block
    parts.append(Part("memcheck", 70, check, environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}))
    return parts


def parts_on_the_cpu(sizes: list[str], no_compile: bool, out: Path) -> list[Part]:
    python, hour = sys.executable, 3600
    parts = [Part("tests", hour, [python, "-m", "pytest", "-q", "-m", "", "test_kernels.py"])]
    if sys.platform == "linux" and compiles_here(out / "aot.json"):
        parts.append(Part("compiled", hour, [python, "kernels/aot.py"], "aot.json"))
    bench = [python, "kernels/bench.py", "--sizes", *sizes] + ["--no-compile"] * no_compile
    return [*parts, Part("forms", hour, bench, "cpu.json")]


def compiles_here(path: Path) -> bool:
    """The table of compiled kernels is of one triton: another one's report does not replace it."""
    if importlib.util.find_spec("triton") is None:
        return False
    ours = importlib.metadata.version("triton")
    if path.exists() and json.loads(path.read_text())["triton"] != ours:
        print(f"{path.name} is of another triton than {ours}, and stays")
        return False
    return True


def execute(part: Part, seconds: float) -> tuple[str, str]:
    """(how it ended, stdout) of a part that is stopped after these seconds."""
    if shutil.which(part.command[0]) is None:
        return f"{part.command[0]} is not installed", ""
    print("$", *part.command, flush=True)
    environment = os.environ | part.environment
    process = subprocess.Popen(
        part.command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    ended = None
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        ended = f"stopped after {seconds:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and its workers, which would disturb the next part
    if ended:
        output, _ = process.communicate()
    return ended or ("ok" if process.returncode == 0 else f"exit code {process.returncode}"), output


def run_parts(
    parts: list[Part],
    log: Path,
    total: float = float("inf"),
    execute: Callable[[Part, float], tuple[str, str]] = execute,
    clock: Callable[[], float] = time.monotonic,
) -> list[dict]:
    """Run the parts one after another, `total` seconds at most. Returns what is logged: a row for each of them."""
    started, rows = clock(), []
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        for part in parts:
            begin, output = clock(), ""
            left = total - (begin - started)
            if left < 10:
                ended = "not started: no time left"
            else:
                ended, output = execute(part, min(part.seconds, left))
            if part.into and output.strip():
                keep(output, log.parent / part.into, whole=ended == "ok")
            last = output.strip().split("\n")[-1][-4000:]
            row = {"part": part.name, "ended": ended, "seconds": round(clock() - begin, 1), "last_line": last}
            rows.append(row)
            print(json.dumps(row), file=file, flush=True)
            print(f"{part.name}: {ended} ({row['seconds']} s)", flush=True)
    return rows


def keep(output: str, path: Path, whole: bool) -> None:
    """Write a part's output: the lines of a benchmark as one object, anything else as it is, if it is whole."""
    from kernels.bench import collect

    if path.name != "aot.json":
        bench = collect(output.split("\n"))
        whole = bool(bench["operator"])
        output = json.dumps(bench, indent=1) + "\n"
    if not whole:
        return
    partial = path.with_suffix(".partial")
    partial.write_text(output)
    os.replace(partial, path)


def main() -> None:
    import torch

    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=HERE / "kernels", help="folder for the rows")
    sizes = "512 2048 8192 65536" if cuda else "1 16 64 512 4096"
    parser.add_argument("--sizes", nargs="+", default=sizes.split(), help=f"tokens; default: {sizes}")
    parser.add_argument("--no-compile", action="store_true", help="without the column of torch.compile")
    args = parser.parse_args()
    if cuda:
        gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())
        rows = run_parts(parts_on_a_gpu(gpu, args.sizes, args.no_compile), args.out / f"{gpu}-parts.jsonl", GPU_SECONDS)
    else:
        rows = run_parts(parts_on_the_cpu(args.sizes, args.no_compile, args.out), args.out / "cpu-parts.jsonl")
    if any(row["ended"] != "ok" for row in rows):
        sys.exit("error: not every part ended well")


if __name__ == "__main__":
    main()
