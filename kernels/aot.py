"""Compile every shipped kernel for real GPUs with no GPU at hand, and read off what the compiler made of it.

Each launch below is recorded from the launchers of adapter.py, with the arguments that a GPU would get, and compiled
for sm_90 (H100, H200), sm_80 (A100) and sm_89 (consumer cards with 99 KB of shared memory). Registers, stack and
spills come from cuobjdump, which the triton wheel brings along. test_kernels.py holds the gate: no stack, no spills,
shared memory within the limit, wgmma in the large-N kernels on sm_90.

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

# of a block (bytes), and of a multiprocessor: CUDA programming guide, table of compute capabilities
LIMITS = {
    80: {"shared": 163 * 1024, "shared_all": 164 * 1024, "registers": 65536, "threads": 2048},
    89: {"shared": 99 * 1024, "shared_all": 100 * 1024, "registers": 65536, "threads": 1536},
    90: {"shared": 227 * 1024, "shared_all": 228 * 1024, "registers": 65536, "threads": 2048},
}
TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


def record(arch: int, dtype: torch.dtype) -> list[tuple[str, object, list, dict]]:
    """(label, kernel, arguments, launch options) of every launch at the shapes of a small reader and of a 7B model."""
    launches = []

    class Recorder:
        def __init__(self, name: str):
            self.kernel = getattr(adapter, name)

        def __getitem__(self, grid):
            return lambda *args, **options: launches.append((label, self.kernel, list(args), options))

    names = [name for name in vars(adapter) if name.startswith("_") and name.endswith("_kernel")]
    kept = {name: getattr(adapter, name) for name in (*names, "_shared_bytes")}
    for name in names:
        setattr(adapter, name, Recorder(name))
    adapter._shared_bytes = lambda tensor: LIMITS[arch]["shared"]

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    try:
        for d, k, rows in ((192, 24, 512), (192, 24, 65536), (512, 256 // dtype.itemsize, 65536)):
            target = empty(1, dtype=torch.float32)
            label = f"fused codes d {d} k {k} N {rows}"
            adapter._launch_fused(empty(rows, k), None, None, None, empty(k, d), empty(d), target)
            label = f"fused x d {d} k {k} N {rows}"
            adapter._launch_fused(empty(rows, d), None, empty(d), empty(d, k), empty(k, d), empty(d), target)
        N, d, k = 65536, 4096, 512
        codes, weight, bias, gram = empty(N, k), empty(k, d), empty(d), empty(k + 16, k + 16, dtype=torch.float32)
        target, column, wide = empty(N, dtype=torch.float32), empty(N, 1, dtype=torch.float32), empty(N, d)
        ids = empty(N, dtype=torch.int64)
        label = "code_norm"
        adapter._launch_code_norm(codes, None, gram, weight, bias, target)
        label = "code_norm ids"
        adapter._launch_code_norm(codes, ids, gram, weight, bias, target)
        label = "matmul codes"
        adapter._launch_matmul(codes, None, weight, bias, column)
        label = "matmul codes ids"
        adapter._launch_matmul(codes, ids, weight, bias, column)
        label = "matmul x"
        adapter._launch_matmul(wide, None, empty(d, k), empty(k, dtype=torch.float32), None)
        label = "match_rms"
        adapter._launch_match_rms(wide, target)
        label = "grad_rows"
        adapter._launch_grad_rows(wide, wide, column)
        label = "grad_codes"
        adapter._launch_grad_codes(wide, codes, None, gram, weight, column, column)
    finally:
        for name, value in kept.items():
            setattr(adapter, name, value)
    return launches


def compile_one(arch: int, dtype: torch.dtype, index: int) -> dict:
    """Compile one recorded launch as triton's own just-in-time path specialises it, and measure the result."""
    import triton
    from triton.backends.compiler import GPUTarget

    label, kernel, args, options = record(arch, dtype)[index]
    values = dict(zip(kernel.arg_names, args, strict=False)) | options
    launch = {name: values.pop(name) for name in ("num_warps", "num_stages")}
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        value, aligned = values[name], False
        if kernel.params[position].is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name], aligned = "*" + TYPES[value.dtype], True
        elif isinstance(value, int):
            signature[name], aligned = "i32" if value < 2**31 else "i64", value % 16 == 0
        else:
            signature[name] = "fp32"
        if aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
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
