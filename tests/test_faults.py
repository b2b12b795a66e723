"""Faults of machines and files: a run is killed, started twice, out of disk or memory; bits of its files flip."""

import ast
import errno
import functools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import CPU, HERE, LADDER, QUICK, ladder_flags, run_stage, stage0, stage2, stage3, succeed

import common
import plumbing.models
import stage1_pca_adapter as stage1
from plumbing.checkpoints import load_checkpoint, read_checkpoint, restore, save_checkpoint
from plumbing.data import load_data
from plumbing.launch import Output, UserError, launch
from plumbing.models import check_weights, free_memory, weight_bytes
from plumbing.report import RESULT_KEYS
from plumbing.training import Run
from plumbing.wires import load_module

FLAGS = ("--steps", "80", "--batch-size", "2", "--eval-examples", "2", "--code-dim", "8")
SHIPPED = HERE / "tiny" / "wires" / "stage1"


def train_slowly(out: str, flags: tuple[str, ...]) -> None:
    """In a process of its own: stage 1, with a checkpoint and samples after every step. Takes seconds."""
    torch.set_num_threads(1)
    Run.SECONDS = 0.0
    Path(out).mkdir(exist_ok=True)
    sys.stdout, sys.stderr = open(Path(out) / "stdout", "w"), open(Path(out) / "stderr", "w")
    sys.argv = ["stage1_pca_adapter.py", *flags, "--out", out]
    launch(stage1.main)


def train(out: str, flags: tuple[str, ...]) -> None:
    """The same run without the samples, which change no number."""
    stage1.show_samples = lambda wire, data: None
    train_slowly(out, flags)


def train_with_little_room(out: str, flags: tuple[str, ...]) -> None:
    """The same run, where no file gets larger than 40 kB: a write fails half-way, as on a full disk."""
    import resource  # not on Windows

    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
    train(out, flags)


# where a process kills itself: at a certain call of a function
MOMENTS = {
    "in a step": (stage1, "token_loss", 7),
    "before a file is on the disk": (os, "fsync", 9),
    "before a file has its name": (os, "replace", 8),
}


def train_until(moment: str, out: str, flags: tuple[str, ...]) -> None:
    """The same run, killed at this moment."""
    place, name, count = MOMENTS[moment]
    original, made = getattr(place, name), []

    def function(*args, **kwargs):
        made.append(1)
        if len(made) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(place, name, function)
    train(out, flags)


@pytest.fixture(scope="module")
def start():
    """start(out, *flags, target=train) starts a process that need not import torch first."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["stage1_pca_adapter"])

    def start(out: Path, *flags: str, target: Callable = train):
        process = context.Process(target=target, args=(str(out), tuple(map(str, flags))))
        process.start()
        return process

    return start


@pytest.fixture(scope="module")
def unbroken(start, random_llm, tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbs."""
    out = tmp_path_factory.mktemp("unbroken")
    finish(start(out, "--model", random_llm, *FLAGS), out)
    return out


def finish(process, out: Path, code: int = 0) -> str:
    """Wait for the process, which must end with this exit code. Returns its stderr."""
    process.join()
    stderr = (out / "stderr").read_text()
    assert process.exitcode == code, stderr
    return stderr


@pytest.fixture(scope="module", params=((signal.SIGTERM, 143), (signal.SIGINT, 130)), ids=("SIGTERM", "Ctrl-C"))
def stopped(request, start, random_llm, tmp_path_factory) -> Path:
    """The folder of a run that a signal stopped."""
    (number, code), out = request.param, tmp_path_factory.mktemp("stopped")
    process = start(out, "--model", random_llm, *FLAGS, target=train_slowly)
    wait_for_checkpoint(out, process)
    os.kill(process.pid, number)
    line = finish(process, out, code)
    assert line.count("\n") == 1 and "--resume goes on" in line
    return out


def assert_same_run(out: Path, unbroken: Path) -> None:
    assert (out / "wire.safetensors").read_bytes() == (unbroken / "wire.safetensors").read_bytes()
    mine, theirs = (json.loads((folder / "config.json").read_text())["metrics"] for folder in (out, unbroken))
    for key in RESULT_KEYS:
        assert key.endswith("_seconds") or mine[key] == theirs[key], key
    mine, theirs = ([json.loads(row) for row in (folder / "metrics.jsonl").open()] for folder in (out, unbroken))
    assert [row | {"seconds": 0} for row in mine] == [row | {"seconds": 0} for row in theirs]
    assert not list(out.glob("*.tmp"))


def wait_for_checkpoint(out: Path, process) -> None:
    for _ in range(600):
        if (out / "checkpoint.safetensors").exists() or not process.is_alive():
            return
        time.sleep(0.05)


def test_a_run_killed_at_three_chosen_moments_ends_in_the_same_weights(start, random_llm, unbroken, tmp_path):
    out, flags, steps = tmp_path / "out", ("--model", random_llm, *FLAGS), []
    for moment in MOMENTS:
        resume = ("--resume",) if steps else ()
        finish(start(out, *flags, *resume, target=functools.partial(train_until, moment)), out, -signal.SIGKILL)
        steps.append(read_checkpoint(out / "checkpoint.safetensors")[1]["step"])
    assert steps == [6, 6 + 7, 6 + 7 + 6]  # each file is the last whole one; metrics.jsonl is a run's first
    finish(start(out, *flags, "--resume"), out)
    assert_same_run(out, unbroken)


@pytest.mark.slow
def test_a_run_killed_at_20_random_moments_ends_in_the_same_weights(start, random_llm, unbroken, tmp_path):
    rng, kills, out = random.Random(0), 0, tmp_path / "out"
    while True:
        resume = ("--resume",) if (out / "checkpoint.safetensors").exists() else ()
        process = start(out, "--model", random_llm, *FLAGS, *resume, target=train_slowly)
        if kills == 20:
            break
        if not resume:
            wait_for_checkpoint(out, process)
            process.join(rng.uniform(0, 0.2))
        else:
            process.join(rng.uniform(0.2, 2.0))
        if process.is_alive():
            process.kill()
            kills += 1
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), (out / "stderr").read_text()
        if process.exitcode == 0:  # it was faster than its killer: once more from the start
            assert_same_run(out, unbroken)
            shutil.rmtree(out)
    finish(process, out)
    assert_same_run(out, unbroken)


def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(start, random_llm, unbroken, stopped, tmp_path):
    out = shutil.copytree(stopped, tmp_path / "out")
    assert 0 < read_checkpoint(out / "checkpoint.safetensors")[1]["step"] < 80
    finish(start(out, "--model", random_llm, *FLAGS, "--resume"), out)
    assert_same_run(out, unbroken)


@pytest.mark.parametrize("stopped", ((signal.SIGTERM, 143),), ids=("SIGTERM",), indirect=True)
def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_last_one(start, random_llm, unbroken, stopped, tmp_path):
    out, flags = shutil.copytree(stopped, tmp_path / "out"), ("--model", random_llm, *FLAGS, "--resume")
    last = (out / "checkpoint.safetensors").read_bytes()
    assert len(last) > 40_000  # so that the next one does not fit
    line = finish(start(out, *flags, target=train_with_little_room), out, 2)
    assert line.count("\n") == 1 and f"{out / 'checkpoint.safetensors'}" in line, line
    assert (out / "checkpoint.safetensors").read_bytes() == last and not list(out.glob("*.tmp"))
    finish(start(out, *flags), out)
    assert_same_run(out, unbroken)


def test_a_second_run_in_the_same_directory_is_refused(start, random_llm, tmp_path):
    out = tmp_path / "out"
    process = start(out, "--model", random_llm, *FLAGS, target=train_slowly)
    wait_for_checkpoint(out, process)
    second = run_stage(stage1, "--model", random_llm, *FLAGS, "--out", out)
    assert process.is_alive(), "the first run was over too soon for this test"
    assert second.code == 2 and "another run is writing there" in second.stderr
    process.kill()
    process.join()
    succeed(stage1, "--model", random_llm, *QUICK, "--out", out, "--overwrite")  # a killed run locks nobody out
    assert not (out / ".lock").exists()


# --- steps that go wrong


def make_losses_nan(monkeypatch, steps: range) -> None:
    """The loss is NaN in these steps of stage 1, numbered from 1."""
    original, made = stage1.token_loss, []

    def token_loss(*args):
        made.append(1)
        return original(*args) * (float("nan") if len(made) in steps else 1)

    monkeypatch.setattr(stage1, "token_loss", token_loss)


def test_a_step_whose_loss_is_nan_is_skipped(tmp_path, random_llm, monkeypatch):
    make_losses_nan(monkeypatch, range(4, 6))
    flags = ("--steps", "8", "--batch-size", "2", "--eval-examples", "2")
    run = succeed(stage1, "--model", random_llm, *flags, "--out", tmp_path)
    assert [step for step in range(1, 9) if f"note: step {step} is skipped" in run.stdout] == [4, 5]
    assert "note: 2 of 8 steps were skipped" in run.stdout
    tensors, state = read_checkpoint(tmp_path / "checkpoint.safetensors")
    assert state["skipped"] == 2 and state["in_a_row"] == 0 and len(state["norms"]) == 6
    adapter = [tensor for name, tensor in tensors.items() if name.startswith("adapter.")]
    assert adapter and all(torch.isfinite(tensor).all() for tensor in adapter)


# --- not enough memory


def test_weights_that_do_not_fit_into_memory_are_not_loaded(tmp_path, random_llm, monkeypatch):
    need, converted = weight_bytes(random_llm, torch.float32)
    loaded = common.load_reader(str(random_llm), CPU, torch.float32)
    assert need == sum(4 * p.numel() for p in loaded.model.parameters()) and converted == 0
    assert weight_bytes(random_llm, torch.bfloat16) == (need // 2, need // 2)
    monkeypatch.setattr(plumbing.models, "free_memory", lambda device: need - 1)
    run = run_stage(stage1, "--model", random_llm, "--smoke", "--dtype", "float32", "--out", tmp_path / "out")
    assert run.code == 2 and "its weights take" in run.stderr and "use --dtype bfloat16" in run.stderr
    assert run.stderr.count("\n") == 1 and not (tmp_path / "out").exists()
    half = ("--dtype", "bfloat16")  # of the bytes
    succeed(stage1, "--model", random_llm, *QUICK, *half, "--out", tmp_path / "out")
    run = run_stage(stage1, "--model", random_llm, "--random-weights", "--steps", "1")
    assert run.code == 2 and "a step takes" in run.stderr and "--random-weights LAYERS" in run.stderr


def test_a_host_that_cannot_convert_weights_for_a_gpu_is_told_so(random_llm, monkeypatch):
    cuda, checked = torch.device("cuda"), []
    monkeypatch.setattr(
        plumbing.models, "check_memory", lambda what, need, device, remedy: checked.append((need, device.type))
    )
    half = weight_bytes(random_llm, torch.bfloat16)[0]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    check_weights("m", random_llm, torch.bfloat16, cuda, split=False)
    check_weights("m", random_llm, torch.float32, cuda, split=True)
    check_weights("m", random_llm, torch.float32, CPU, split=False)
    assert checked == [(half, "cuda"), (4 * half, "cpu"), (0, "cpu"), (2 * half, "cpu")]


def test_weights_that_cannot_be_counted_are_left_to_the_loader(tmp_path):
    def counted(dtype: torch.dtype = torch.float32) -> tuple[int, int]:
        return weight_bytes(tmp_path, dtype)

    (tmp_path / "config.json").write_text("{}")
    assert counted() == (0, 0)  # no weights
    numbers = {"x": torch.zeros(8, dtype=torch.bool), "y": torch.zeros(8, dtype=torch.float16)}
    safetensors.torch.save_file(numbers, tmp_path / "one.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    for text in ("[]", '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "gone.safetensors"}}', "{"):
        index.write_text(text)
        assert counted() == (0, 0)
    safetensors.torch.save_file({"z": torch.zeros(4, dtype=torch.int64)}, tmp_path / "two.safetensors")
    shards = {"x": "one.safetensors", "y": "one.safetensors", "z": "two.safetensors"}
    index.write_text(json.dumps({"weight_map": shards}))
    assert counted() == (8 + 32 + 32, 32) and counted(torch.float16) == (8 + 16 + 32, 0)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "one.safetensors").read_bytes())
    assert counted() == (8 + 32, 32)  # before any index, as transformers has it
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "mxfp4"}}')
    assert counted() == (0, 0)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "bitsandbytes"}}')
    assert counted() == (8 + 32, 32)
    safetensors.torch.save_file({"x": torch.zeros(8).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    assert counted() == (0, 0)  # a kind of number that this code does not know
    for data in (b"", b"not safetensors", (tmp_path / "one.safetensors").read_bytes()[:20]):
        (tmp_path / "model.safetensors").write_bytes(data)
        assert counted() == (0, 0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and /sys")
def test_free_memory_is_the_machine_s_or_its_container_s(monkeypatch):
    files = {}
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < free_memory(CPU) < total
    monkeypatch.setattr(Path, "read_text", lambda path, *args, **kwargs: files[str(path)])
    files |= {"/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    5000 kB\n", "/sys/fs/cgroup/memory.max": "max\n"}
    pages = "anon 1\nfile 9\ninactive_file 400000\nactive_file 600000\nx 1\n"
    files |= {"/sys/fs/cgroup/memory.current": "3000000\n", "/sys/fs/cgroup/memory.stat": pages}
    assert free_memory(CPU) == 5000 * 1024
    files["/sys/fs/cgroup/memory.max"] = "4000000\n"
    assert free_memory(CPU) == 4_000_000 - 3_000_000 + 1_000_000
    monkeypatch.setattr(Path, "read_text", lambda path, *args, **kwargs: open(str(path) + "-gone").read())
    assert free_memory(CPU) is None  # macOS, Windows


# --- files that are not what they were


class Trained(torch.nn.Module):
    """Tensors of every kind that a checkpoint must hold: half precision, empty, two that share memory."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)
        self.register_buffer("halves", torch.ones(2).half())
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("shared", self.weight.detach())
        self.register_buffer("row", self.weight.detach()[0])
        self.register_buffer("column", self.weight.detach()[:, 1])  # not contiguous


IDENTITY = {"--lr": 0.1, "--stage2": ["a", "b"], "--code-dim": None}


@pytest.fixture
def saved_checkpoint(tmp_path):
    """(path, module, optimiser) of a checkpoint after one step of training."""
    path, module = tmp_path / "checkpoint.safetensors", Trained(torch.randn(3, 4))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, betas=(0.9, 0.98))
    module.weight.sum().backward()
    optimizer.step()
    state = {"step": 3, "history": [{"loss": 0.1 + 0.2}, {}], "nothing": None, "must_match": IDENTITY}
    save_checkpoint(path, {"adapter": module, "other": torch.nn.Linear(1, 1)}, optimizer, state)
    return path, module, optimizer


def test_a_checkpoint_comes_back_as_it_was(saved_checkpoint):
    path, module, optimizer = saved_checkpoint
    tensors, state = load_checkpoint(path, IDENTITY)
    assert state == {"step": 3, "history": [{"loss": 0.1 + 0.2}, {}], "nothing": None}
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensors[f"adapter.{name}"], tensor) and tensors[f"adapter.{name}"].dtype == tensor.dtype
    other = Trained(torch.zeros(3, 4))
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.5)
    restore(tensors, {"adapter": other, "other": torch.nn.Linear(1, 1)}, other_optimizer)
    assert torch.equal(other.weight, module.weight)
    mine, theirs = other_optimizer.state_dict()["state"][0], optimizer.state_dict()["state"][0]
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)
    for each in (module, other):  # and the next step is the same; its rate is the loop's to set
        each.weight.grad = torch.ones(3, 4)
    other_optimizer.param_groups[0] |= {"lr": 0.1, "betas": (0.9, 0.98)}
    optimizer.step()
    other_optimizer.step()
    assert torch.equal(other.weight, module.weight)


def damages(whole: bytes, flips: int) -> Iterator[bytes]:
    """A file cut short, or with one bit flipped."""
    rng = random.Random(0)
    for length in (0, 7, 9, 100, len(whole) // 2, len(whole) - 1):
        yield whole[:length]
    for _ in range(flips):
        place = rng.randrange(len(whole))
        yield whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :]


def test_a_damaged_checkpoint_is_refused(saved_checkpoint):
    path, *_ = saved_checkpoint
    foreign = [b"not a checkpoint", random.Random(0).randbytes(1000), (SHIPPED / "wire.safetensors").read_bytes()]
    for data in [*damages(path.read_bytes(), 500), *foreign]:
        path.write_bytes(data)
        with pytest.raises(UserError, match="is not a whole checkpoint"):
            load_checkpoint(path, IDENTITY)
    torch.save({"step": 3, "must_match": IDENTITY}, path)  # of the kind that can run code when it is loaded
    with pytest.raises(UserError, match="is not a whole checkpoint"):
        load_checkpoint(path, IDENTITY)


def test_a_checkpoint_with_nan_is_refused(saved_checkpoint):
    path, module, optimizer = saved_checkpoint
    for number in (float("nan"), float("inf")):
        with torch.no_grad():
            module.weight[1, 1] = number
        save_checkpoint(path, {"adapter": module}, optimizer, {"must_match": IDENTITY})
        with pytest.raises(UserError, match="is not a whole checkpoint .it holds NaN or infinity."):
            load_checkpoint(path, IDENTITY)


def test_a_tensor_that_a_wire_does_not_know_is_named(tmp_path):
    with pytest.raises(UserError, match=r"x\.more in wire.safetensors is \[2\] int64, .* should be not there"):
        tensors = {"x.weight": torch.zeros(1, 1), "x.bias": torch.zeros(1), "x.more": torch.arange(2)}
        load_module(torch.nn.Linear(1, 1), "x.", tensors, "wire")


# --- streams and disks that are not there


POSIX = pytest.mark.skipif(os.name != "posix", reason="needs a shell of POSIX")


def in_shell(command: str, module, *flags) -> subprocess.CompletedProcess:
    """A stage in a process of its own; `command` is a line for the shell, in which "$@" starts it."""
    whole = ["sh", "-c", command, "sh", sys.executable, module.__file__, *map(str, flags)]
    return subprocess.run(whole, cwd=HERE, capture_output=True, text=True)


@POSIX
@pytest.mark.parametrize("command", ('"$@" >&-', '"$@" | head -1', '"$@" > /dev/full', '"$@" <&- >&- 2>&-'))
def test_a_run_goes_on_without_standard_output(command, random_llm, tmp_path):
    done = in_shell(command, stage1, "--model", random_llm, *QUICK, "--out", tmp_path)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.count("\n") <= 1, done
    assert json.loads((tmp_path / "config.json").read_text())["metrics"]["examples"] == 8


@POSIX
@pytest.mark.parametrize(
    ("command", "flag", "words"),
    (
        ('"$@" >&-', "--send", "standard output is closed"),
        ('"$@" > /dev/full', "--send", "No space left"),
        ('"$@" <&-', "--receive", "standard input is closed"),
    ),
)
def test_a_message_that_cannot_be_written_or_read_is_one_line(command, flag, words, ladder):
    flags = {"--send": ("--send", "Ada.", "--question", "Who?"), "--receive": ("--receive", "-")}[flag]
    done = in_shell(command, stage3, *flags, "--wire", ladder / "stage3")
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done


def test_output_outlives_its_reader():
    read, write = os.pipe()
    output = Output(open(write, "w"))
    print("read", file=output, flush=True)
    os.close(read)
    for _ in range(3):
        print("not read", file=output, flush=True)
    output.close()


@POSIX
def test_ctrl_c_during_the_imports_is_one_line():
    code = "import plumbing.early, os, signal; os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(9)"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT and done.stderr == "interrupted before the run began\n"


@pytest.mark.parametrize("module", (stage0, stage1, stage2, stage3))
def test_a_stage_imports_first_what_tells_of_ctrl_c(module):
    statements = ast.parse(Path(module.__file__).read_text()).body
    first = next(part for part in statements if isinstance(part, (ast.Import, ast.ImportFrom)))
    assert ast.unparse(first) == "import plumbing.early"


@pytest.mark.parametrize("fault", ("full", "not a directory"))
@pytest.mark.parametrize("stage", LADDER)
def test_where_nothing_can_be_written_every_stage_ends_in_one_line(
    stage, fault, random_llm, ladder, tmp_path, monkeypatch
):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    module, flags = ladder_flags(random_llm, ladder)[stage]
    if fault == "full":
        monkeypatch.setattr(os, "fsync", full)
    else:
        (tmp_path / "out").write_text("a file")
    run = run_stage(module, *flags, *QUICK, "--out", tmp_path / "out")
    assert run.code == 2 and run.stderr.count("\n") == 1 and str(tmp_path / "out") in run.stderr, run.stderr
    assert fault != "full" or list((tmp_path / "out").iterdir()) == []


# --- data files


def squad_of(rows: list[dict]) -> str:
    paragraphs = [
        {"context": row["context"], "qas": [{"question": row["question"], "answers": [{"text": row["answers"][0]}]}]}
        for row in rows
    ]
    return json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]})


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Bytes flipped, cut, doubled, or replaced by what means something in JSON."""
    for _ in range(rng.choice((1, 1, 2, 8))):
        place, kind = rng.randrange(len(data) + 1), rng.randrange(5)
        end = min(len(data), place + rng.choice((1, 2, 30)))
        if kind == 0:
            data = data[:place] + rng.randbytes(end - place) + data[end:]
        elif kind == 1:
            data = data[:place] + data[end:]
        elif kind == 2:
            data = data[:place]
        elif kind == 3:
            data = data[:place] + data[place:end] * rng.choice((2, 100)) + data[end:]
        else:
            pieces = b'{ } [ ] " , : null 1e999 -0 [[[[ {"a": \\ud800 \\u0000 \xef\xbb\xbf \n'.split(b" ")
            data = data[:place] + rng.choice(pieces) + data[end:]
    return data


@pytest.mark.parametrize("count", (2000, pytest.param(100_000, marks=pytest.mark.slow)))
def test_mutated_files_are_read_or_refused_in_one_line(count, tmp_path):
    rows = [{"context": f"Émile {i} sells oil.", "question": "What is sold?", "answers": ["oil"]} for i in range(6)]
    whole = {
        "a.json": squad_of(rows).encode(),
        "a.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
    }
    rng, outcomes = random.Random(0), {"read": 0, "refused": 0}
    memory = Path("/dev/shm")  # a disk takes milliseconds to truncate a file
    folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else tmp_path))
    paths = {name: folder / name for name in whole}
    for number in range(count):
        name = ("a.json", "a.jsonl")[number % 2]
        paths[name].write_bytes(mutated(rng, whole[name]) if number % 50 else rng.randbytes(rng.randrange(1, 300)))
        try:
            data = load_data(str(paths[name]), None, 10)  # a reader is needed for plain text alone
            for row in (*data.train, *data.validation, *data.test):
                assert isinstance(row["context"], str) and isinstance(row["question"], str) and row["answers"]
            outcomes["read"] += 1
        except UserError as error:
            assert "\n" not in str(error) and str(paths[name]) in str(error)
            outcomes["refused"] += 1
    shutil.rmtree(folder)
    assert min(outcomes.values()) > count // 100, outcomes


def large_jsonl(path: Path, rows: int) -> Path:
    """A file of so many rows of 20 kB each."""
    context = "word " * 4000
    with path.open("w") as file:
        for i in range(rows):
            file.write(json.dumps({"context": f"{i} {context}", "question": "What?", "answers": ["word"]}) + "\n")
    return path


def test_only_the_rows_in_use_are_in_memory(tmp_path):
    path = large_jsonl(tmp_path / "large.jsonl", 500)
    tracemalloc.start()
    data = load_data(str(path), None, 10)
    assert len(data.train) > 400 and data.train_rows(0, 0, 4)[0]["answers"]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < path.stat().st_size / 10  # 10 test rows, about 10 of validation, and the row being read


def peak_of_reading(path: str, queue) -> None:
    import resource  # not on Windows

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data = load_data(path, None, 100)
    assert data.train_rows(0, 0, 4)[0]["answers"]
    queue.put((len(data.train), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


@pytest.mark.slow
def test_200_mb_of_rows_take_a_few_mb_of_memory(start, tmp_path):
    path = large_jsonl(tmp_path / "large.jsonl", 10_000)
    assert path.stat().st_size > 200e6
    context = multiprocessing.get_context("forkserver")
    queue = context.Queue()
    process = context.Process(target=peak_of_reading, args=(str(path), queue))
    process.start()
    rows, kilobytes = queue.get(timeout=300)
    process.join()
    assert rows > 8000 and kilobytes < 40_000


def test_rows_from_the_disk_are_the_rows_of_the_file(tmp_path):
    rows = [{"context": f"Émile {i}", "question": "Who?", "answers": ["É"]} for i in range(300)]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "".join(json.dumps(row, ensure_ascii=False) + "\r\n\n" for row in rows).encode())
    data = load_data(str(path), None, 1000)
    parts = [list(data.train), data.validation, data.test]
    assert sorted(row["context"] for part in parts for row in part) == sorted(row["context"] for row in rows)
    assert all(parts) and data.train[-1] == data.train[len(data.train) - 1]
    assert data.train[:2] == [data.train[0], data.train[1]]
    path.write_text("something else")
    with pytest.raises(UserError, match="at byte"):
        data.train[0]


LONG = json.dumps({"context": "A firm sells olive oil. " * 100_000, "question": "What?", "answers": ["oil"]})
SHORT = [json.dumps({"context": f"{i} sells oil.", "question": "What?", "answers": ["oil"]}) for i in range(40)]
DATA_FILES = {  # name -> (content, whether questions or text are in it)
    "a.json": (squad_of([json.loads(row) for row in SHORT]), "qa"),
    "A.JSONL": ("\n".join(SHORT), "qa"),
    "long.jsonl": ("\n".join([*SHORT, *[LONG.replace("A firm", f"{i} firms", 1) for i in range(4)]]), "qa"),
    "a.txt": ("Ada lives in Paris, and her aunt in Rome. " * 400, "text"),
    "special.txt": ("<s></s>" * 4000, None),
    "digits.json": ('{"data": ' + "9" * 5000 + "}", None),
    "digits.jsonl": ("9" * 5000, None),
    "question.jsonl": ("\n".join([*SHORT, json.dumps(json.loads(SHORT[0]) | {"question": "What? " * 9999})]), None),
    "null.json": ("null", None),
    "table.csv": ("a,b", None),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DATA_FILES)
@pytest.mark.parametrize("stage", LADDER)
def test_every_kind_of_data_file_in_every_stage(stage, name, random_llm, ladder, tmp_path, no_picture):
    content, kind = DATA_FILES[name]
    (tmp_path / name).write_text(content)
    module, flags = ladder_flags(random_llm, ladder)[stage]
    started = time.monotonic()
    run = run_stage(module, *flags, *QUICK, "--data", tmp_path / name, "--out", tmp_path / "out")
    assert time.monotonic() - started < 60
    reads = kind == "qa" or kind == "text" and stage not in ("stage0", "slots")  # which need questions
    assert run.code == (0 if reads else 2), run.stderr
    assert reads or run.stderr.count("\n") == 1 and not (tmp_path / "out" / "wire.safetensors").exists()
