"""Compile every shipped kernel for real GPUs with no GPU at hand, and read off what the compiler made of it.

Each launch below is recorded from the launchers of fused.py, with the arguments that a GPU would get, and compiled
for sm_90 (H100, H200), sm_80 (A100) and sm_89 (consumer cards with 99 KB of shared memory). Registers, stack and
spills come from cuobjdump, which the triton wheel brings along. test_kernels.py holds the gate: no stack, no spills,
shared memory within the limit, wgmma in halves on sm_90.

    python kernels/aot.py [--arch 90] > results/kernels/aot.json        # takes minutes on two cores; Linux only
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "0"  # define the kernels, even where there is no GPU

import argparse
import concurrent.futures
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `python kernels/aot.py` puts kernels/ there instead

from kernels import adapter
from kernels.adapter import EPS

if adapter.HAVE_TRITON:
    from kernels import fused

# of a block (bytes), and of a multiprocessor: CUDA programming guide, table of compute capabilities
LIMITS = {
    80: {"shared": 163 * 1024, "shared_all": 164 * 1024, "registers": 65536, "threads": 2048},
    89: {"shared": 99 * 1024, "shared_all": 100 * 1024, "registers": 65536, "threads": 1536},
    90: {"shared": 227 * 1024, "shared_all": 228 * 1024, "registers": 65536, "threads": 2048},
}
TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


def record(arch: int, dtype: torch.dtype, N: int = 65536) -> list[tuple[str, object, list, dict]]:
    """(label, kernel, arguments, launch options) of every launch, at the shapes that the stages have."""
    launches = []

    class Recorder:
        def __init__(self, name: str):
            self.kernel = getattr(fused, name)

        def __getitem__(self, grid):
            return lambda *args, **options: launches.append((label, self.kernel, list(args), options))

    names = [name for name in vars(fused) if name.startswith("_") and name.endswith("_kernel")]
    kept = {name: getattr(fused, name) for name in (*names, "_shared_bytes")}
    for name in names:
        setattr(fused, name, Recorder(name))
    fused._shared_bytes = lambda tensor: LIMITS[arch]["shared"]

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    one = empty(1, dtype=torch.float32)
    try:
        for d, k in ((192, 24), (192, 60), (4096, 100), (4096, 512)):  # small readers, --code-dim 100, a 7B model
            x, codes, mean, components, weight = empty(N, d), empty(N, k), empty(d), empty(d, k), empty(k, d)
            ids, code_scale = empty(N, dtype=torch.int64), empty(dtype=torch.float32)
            if k > adapter.WIDEST[dtype.itemsize]:
                continue
            label = f"project d {d} k {k}"
            fused.fused(x, None, None, mean, components, None, None, None, EPS)
            label = f"fused x d {d} k {k}"
            fused.fused(x, None, None, mean, components, weight, mean, one, EPS)
            label = f"fused ids d {d} k {k}"
            fused.fused(codes, ids, code_scale, None, None, weight, mean, one, EPS)
        for d in (192, 4096):
            y, scale = empty(N, d), empty(N, 1, dtype=torch.float32)
            label = f"match_rms d {d}"
            fused.match_rms_(y, one, EPS)
            label = f"unmatch_rms d {d}"
            fused.unmatch_rms(y, y, one, scale)
    finally:
        for name, value in kept.items():
            setattr(fused, name, value)
    return launches


def specialise(kernel, values: dict) -> tuple[dict, dict, dict]:
    """(signature, constants, attributes) of a launch, as triton's own just-in-time path makes them."""
    signature, constants, attributes = {}, {}, {}
    for position, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value, special = values[name], not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(position,)] = "*" + TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if value < 2**31 else "i64"
            if special and value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return signature, constants, attributes


def compile_one(arch: int, dtype: torch.dtype, index: int) -> dict:
    """Compile one recorded launch as triton's own just-in-time path specialises it, and measure the result."""
    import triton
    from triton.backends.compiler import GPUTarget

    label, kernel, args, options = record(arch, dtype)[index]
    values = dict(zip(kernel.arg_names, args, strict=False)) | options
    launch = {name: values.pop(name) for name in ("num_warps", "num_stages")}
    signature, constants, attributes = specialise(kernel, values)
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    # fused multiply-add is what a launch gets by default up to triton 3.9; stated, because that changes in 3.10
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch | {"enable_fp_fusion": True})

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    fields = dict(part.split(":") for part in usage.split() if part.count(":") == 1 and part.split(":")[1].isdigit())
    registers, shared, limits = int(fields["REG"]), compiled.metadata.shared, LIMITS[arch]
    threads = 32 * launch["num_warps"]
    blocks = min(
        limits["registers"] // (-(-registers // 8) * 8 * threads),
        limits["shared_all"] // (shared + 1024),  # the system takes 1 KB a block
        limits["threads"] // threads,
    )
    return {
        "arch": f"sm_{arch}", "dtype": str(dtype).removeprefix("torch."), "launch": label, "registers": registers,
        "stack_bytes": int(fields["STACK"]), "spill_stores": sass.count("STL"), "shared_bytes": shared,
        "shared_limit": limits["shared"], "blocks_per_multiprocessor": blocks,
        "occupancy": round(blocks * threads / limits["threads"], 3), "wgmma": "wgmma" in compiled.asm["ptx"],
        "tiles": {name: options[name] for name in options if name.isupper() and len(name) == 2} | launch,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--arch", type=int, choices=sorted(LIMITS), action="append", help="default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes; default: one per core")
    args = parser.parse_args()
    if not adapter.HAVE_TRITON:
        sys.exit("error: triton is not installed (it is for Linux): pip install -r requirements.txt")
    jobs = [
        (arch, dtype, index)
        for arch in args.arch or sorted(LIMITS)
        for dtype in adapter.DTYPES
        for index in range(len(record(arch, dtype)))
    ]
    with concurrent.futures.ProcessPoolExecutor(args.jobs) as pool:
        rows = list(pool.map(compile_one, *zip(*jobs, strict=True)))
    import triton

    print(json.dumps({"triton": triton.__version__, "kernels": rows}, indent=1))


if __name__ == "__main__":
    main()
