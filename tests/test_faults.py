"""What machines do to a run: kill it, fill its disk, flip its bits, start it twice."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import HERE, run_stage

import common
import stage1_pca_adapter as stage1

FLAGS = ("--steps", "80", "--batch-size", "2", "--eval-examples", "2", "--code-dim", "8")
SHIPPED = HERE / "tiny" / "wires" / "stage1"


def train(out: str, flags: tuple[str, ...]) -> None:
    """In a process of its own: stage 1, with a checkpoint after every step."""
    torch.set_num_threads(1)
    common.Guard.SECONDS = 0.0
    Path(out).mkdir(exist_ok=True)
    sys.stdout, sys.stderr = open(Path(out) / "stdout", "w"), open(Path(out) / "stderr", "w")
    sys.argv = ["stage1_pca_adapter.py", *flags, "--out", out]
    common.run(stage1.main)


def train_with_little_room(out: str, flags: tuple[str, ...]) -> None:
    """The same, where no file gets larger than 40 kB: a write fails half-way, as on a full disk."""
    import resource  # not on Windows

    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
    train(out, flags)


@pytest.fixture(scope="module")
def start():
    """Start `train` in a process that need not import torch first."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["stage1_pca_adapter"])

    def start(out: Path, *flags: str, target=train):
        process = context.Process(target=target, args=(str(out), tuple(map(str, flags))))
        process.start()
        return process

    return start


@pytest.fixture(scope="module")
def unbroken(start, random_llm, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    process = start(out, "--model", random_llm, *FLAGS)
    process.join()
    assert process.exitcode == 0, (out / "stderr").read_text()
    return out


def assert_same_run(out: Path, unbroken: Path) -> None:
    assert (out / "wire.safetensors").read_bytes() == (unbroken / "wire.safetensors").read_bytes()
    mine, theirs = (json.loads((folder / "config.json").read_text())["metrics"] for folder in (out, unbroken))
    for key in common.RESULT_KEYS:
        assert key.endswith("_seconds") or mine[key] == theirs[key], key
    mine, theirs = ([json.loads(row) for row in (folder / "metrics.jsonl").open()] for folder in (out, unbroken))
    assert [row | {"seconds": 0} for row in mine] == [row | {"seconds": 0} for row in theirs]


def wait_for_checkpoint(out: Path, process) -> None:
    for _ in range(600):
        if (out / "checkpoint.safetensors").exists() or not process.is_alive():
            return
        time.sleep(0.05)


def test_a_run_killed_at_20_random_moments_ends_in_the_same_weights(start, random_llm, unbroken, tmp_path):
    rng, kills, out = random.Random(0), 0, tmp_path / "out"
    while True:
        resume = ("--resume",) if (out / "checkpoint.safetensors").exists() else ()
        process = start(out, "--model", random_llm, *FLAGS, *resume)
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
    process.join()
    assert process.exitcode == 0, (out / "stderr").read_text()
    assert_same_run(out, unbroken)
    assert not list(out.glob("*.tmp"))


@pytest.mark.parametrize("number,code", ((signal.SIGTERM, 143), (signal.SIGINT, 130)))
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(start, random_llm, unbroken, tmp_path, number, code):
    out = tmp_path / "out"
    process = start(out, "--model", random_llm, *FLAGS)
    wait_for_checkpoint(out, process)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == code, (out / "stderr").read_text()
    line = (out / "stderr").read_text()
    assert line.count("\n") == 1 and "--resume goes on" in line
    assert 0 < common.read_checkpoint(out / "checkpoint.safetensors")["step"] < 80
    process = start(out, "--model", random_llm, *FLAGS, "--resume")
    process.join()
    assert process.exitcode == 0
    assert_same_run(out, unbroken)


def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_last_one(start, random_llm, unbroken, tmp_path):
    out, flags = tmp_path / "out", ("--model", random_llm, *FLAGS)
    process = start(out, *flags)
    wait_for_checkpoint(out, process)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 143, (out / "stderr").read_text()
    last = (out / "checkpoint.safetensors").read_bytes()
    assert len(last) > 40_000  # so that the next one does not fit
    process = start(out, *flags, "--resume", target=train_with_little_room)
    process.join()
    line = (out / "stderr").read_text()
    assert process.exitcode == 2 and line.count("\n") == 1 and f"{out / 'checkpoint.safetensors'}" in line, line
    assert (out / "checkpoint.safetensors").read_bytes() == last and not list(out.glob("*.tmp"))
    process = start(out, *flags, "--resume")
    process.join()
    assert process.exitcode == 0, (out / "stderr").read_text()
    assert_same_run(out, unbroken)


def test_a_second_run_in_the_same_directory_is_refused(start, random_llm, tmp_path):
    out = tmp_path / "out"
    process = start(out, "--model", random_llm, *FLAGS)
    wait_for_checkpoint(out, process)
    second = run_stage(stage1, "--model", random_llm, *FLAGS, "--out", out)
    assert process.is_alive(), "the first run was over too soon for this test"
    assert second.code == 2 and "another run is writing there" in second.stderr
    process.kill()
    process.join()
    assert run_stage(stage1, "--model", random_llm, "--smoke", "--out", out).code == 0  # a killed run locks nobody out
    assert not (out / ".lock").exists()


# --- steps that go wrong


def losses_that_are_no_number(monkeypatch, calls: range) -> None:
    original, made = common.answer_logits, []

    def answer_logits(*args, **kwargs):
        made.append(1)
        return original(*args, **kwargs) * (float("nan") if len(made) in calls else 1)

    monkeypatch.setattr(common, "answer_logits", answer_logits)


def test_a_step_whose_loss_is_no_number_is_skipped(tmp_path, random_llm, monkeypatch):
    losses_that_are_no_number(monkeypatch, range(4, 6))
    flags = ("--steps", "8", "--batch-size", "2", "--eval-examples", "2")
    run = run_stage(stage1, "--model", random_llm, *flags, "--out", tmp_path)
    assert run.code == 0, run.stderr
    assert [step for step in range(1, 9) if f"note: step {step} is skipped" in run.stdout] == [4, 5]
    assert "note: 2 of 8 steps were skipped" in run.stdout
    saved = common.read_checkpoint(tmp_path / "checkpoint.safetensors")
    assert saved["guard"]["skipped"] == 2 and saved["guard"]["in_a_row"] == 0 and len(saved["guard"]["norms"]) == 6
    assert all(torch.isfinite(tensor).all() for tensor in saved["adapter"].values())


def test_five_such_steps_end_the_run_and_keep_the_checkpoint(tmp_path, random_llm, monkeypatch):
    losses_that_are_no_number(monkeypatch, range(4, 100))
    flags = ("--steps", "12", "--batch-size", "2", "--eval-examples", "2")
    run = run_stage(stage1, "--model", random_llm, *flags, "--out", tmp_path)
    assert run.code == 2 and run.stderr.count("\n") == 1
    assert "not a number" in run.stderr and "for 5 steps up to 8" in run.stderr
    assert "checkpoint of step 6 is kept" in run.stderr and not (tmp_path / "wire.safetensors").exists()
    saved = common.read_checkpoint(tmp_path / "checkpoint.safetensors")
    assert saved["step"] == 6 and saved["guard"]["in_a_row"] == 3
    assert all(torch.isfinite(tensor).all() for tensor in saved["adapter"].values())


def test_a_gradient_far_above_all_others_is_skipped():
    guard = common.Guard(1000, None)
    try:
        assert all(guard.accepts(1.0, 0.01 + step / 1e4, step) for step in range(1, 101))
        assert guard.accepts(1.0, 10.0, 101)  # clipping is enough
        assert not guard.accepts(1.0, 30.0, 102) and guard.skipped == 1
        again = common.Guard(1000, {"guard": json.loads(json.dumps(guard.state())), "step": 102})
        again.close()
        assert again.state() == guard.state() and not again.accepts(1.0, 30.0, 103) and again.accepts(9.9, 1.0, 104)
    finally:
        guard.close()


# --- not enough memory


def test_weights_that_do_not_fit_into_memory_are_not_loaded(tmp_path, random_llm, monkeypatch):
    need, converted = common.weight_bytes(random_llm, torch.float32)
    loaded = common.load_reader(str(random_llm), torch.device("cpu"), torch.float32)
    assert need == sum(4 * p.numel() for p in loaded.model.parameters()) and converted == 0
    assert common.weight_bytes(random_llm, torch.bfloat16) == (need // 2, need // 2)
    monkeypatch.setattr(common, "free_memory", lambda device: need - 1)
    run = run_stage(stage1, "--model", random_llm, "--smoke", "--dtype", "float32", "--out", tmp_path / "out")
    assert run.code == 2 and "its weights take" in run.stderr and "use --dtype bfloat16" in run.stderr
    assert run.stderr.count("\n") == 1 and not (tmp_path / "out").exists()
    run = run_stage(stage1, "--model", random_llm, "--smoke", "--dtype", "bfloat16", "--out", tmp_path / "out")
    assert run.code == 0, run.stderr  # half the bytes
    run = run_stage(stage1, "--model", random_llm, "--random-weights", "--steps", "1")
    assert run.code == 2 and "a step takes" in run.stderr and "--random-weights LAYERS" in run.stderr


def test_a_host_that_cannot_convert_weights_for_a_gpu_is_told_so(random_llm, monkeypatch):
    cuda, checked = torch.device("cuda"), []
    monkeypatch.setattr(common, "check_memory", lambda what, need, device, remedy: checked.append((need, device.type)))
    half = common.weight_bytes(random_llm, torch.bfloat16)[0]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    common.check_weights("m", random_llm, torch.bfloat16, cuda, split=False)
    common.check_weights("m", random_llm, torch.float32, cuda, split=True)
    common.check_weights("m", random_llm, torch.float32, torch.device("cpu"), split=False)
    assert checked == [(half, "cuda"), (4 * half, "cpu"), (0, "cpu"), (2 * half, "cpu")]


def test_weights_that_cannot_be_counted_are_left_to_the_loader(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    bits = {"x": torch.zeros(8, dtype=torch.bool), "y": torch.zeros(8, dtype=torch.float16)}
    safetensors.torch.save_file(bits, tmp_path / "one.safetensors")
    assert common.weight_bytes(tmp_path, torch.float32) == (8 + 32, 32)
    safetensors.torch.save_file({"x": torch.zeros(8).to(torch.float8_e4m3fn)}, tmp_path / "two.safetensors")
    assert common.weight_bytes(tmp_path, torch.float32) == (0, 0)
    for index in ("[]", '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "gone.safetensors"}}', "{"):
        (tmp_path / "model.safetensors.index.json").write_text(index)
        assert common.weight_bytes(tmp_path, torch.float32) == (0, 0)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "one.safetensors").read_bytes())
    assert common.weight_bytes(tmp_path, torch.float32) == (8 + 32, 32)  # before any index, as transformers has it
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "mxfp4"}}')
    assert common.weight_bytes(tmp_path, torch.float32) == (0, 0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and /sys")
def test_free_memory_is_the_machine_s_or_its_container_s(monkeypatch):
    cpu, files = torch.device("cpu"), {}
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < common.free_memory(cpu) < total
    monkeypatch.setattr(Path, "read_text", lambda path, *args, **kwargs: files[str(path)])
    files |= {"/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    5000 kB\n", "/sys/fs/cgroup/memory.max": "max\n"}
    pages = "anon 1\nfile 9\ninactive_file 400000\nactive_file 600000\nx 1\n"
    files |= {"/sys/fs/cgroup/memory.current": "3000000\n", "/sys/fs/cgroup/memory.stat": pages}
    assert common.free_memory(cpu) == 5000 * 1024
    files["/sys/fs/cgroup/memory.max"] = "4000000\n"
    assert common.free_memory(cpu) == 4_000_000 - 3_000_000 + 1_000_000
    monkeypatch.setattr(Path, "read_text", lambda path, *args, **kwargs: open(str(path) + "-gone").read())
    assert common.free_memory(cpu) is None  # macOS, Windows


# --- files that are not what they were


def test_a_checkpoint_comes_back_as_it_was_or_not_at_all(tmp_path):
    path, flags = tmp_path / "checkpoint.safetensors", {"lr": 0.1, "stage2": ["a", "b"]}
    parameter = torch.nn.Parameter(torch.randn(3, 4))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, betas=(0.9, 0.98))
    parameter.sum().backward()
    optimizer.step()
    payload = {
        "adapter": {"weight": parameter.detach(), "half": torch.ones(2).half(), "empty": torch.zeros(0, 3)},
        "optimizer": optimizer.state_dict(), "step": 3, "history": [{"loss": 0.1 + 0.2}, {}], "arguments": flags,
        "fingerprint": "abc", "nothing": None, "shared": [parameter.detach(), parameter.detach()[0]],
    }  # fmt: skip
    common.save_checkpoint(path, payload)
    saved = common.load_checkpoint(path, flags, "abc")
    other = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3, 4))], lr=0.5)
    other.load_state_dict(saved["optimizer"])
    state, was = other.state_dict()["state"][0], optimizer.state_dict()["state"][0]
    assert all(torch.equal(state[name], was[name]) for name in was) and other.param_groups[0]["lr"] == 0.1
    assert torch.equal(saved["adapter"]["weight"], parameter) and saved["adapter"]["half"].dtype == torch.float16
    assert saved["history"] == [{"loss": 0.1 + 0.2}, {}] and saved["nothing"] is None and saved["step"] == 3
    whole, rng = path.read_bytes(), random.Random(0)
    damaged = [whole[:length] for length in (0, 7, 100, len(whole) // 2, len(whole) - 1)]
    for _ in range(500):
        place = rng.randrange(len(whole))
        damaged.append(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
    damaged += [b"not a checkpoint", rng.randbytes(1000), (SHIPPED / "wire.safetensors").read_bytes()]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(common.UserError, match="is not a whole checkpoint"):
            common.load_checkpoint(path, flags, "abc")
    torch.save(payload, path)  # of the kind that can run code when it is loaded
    with pytest.raises(common.UserError, match="is not a whole checkpoint"):
        common.load_checkpoint(path, flags, "abc")


def test_a_checkpoint_of_another_stage_or_with_something_that_is_no_number_is_refused(tmp_path):
    path, flags = tmp_path / "checkpoint.safetensors", {"lr": 0.1}
    payload = {"adapter": {"weight": torch.ones(3)}, "arguments": flags, "fingerprint": "abc"}
    common.save_checkpoint(path, payload)
    assert torch.equal(common.load_checkpoint(path, flags, "abc")["adapter"]["weight"], torch.ones(3))
    with pytest.raises(common.UserError, match="another stage"):
        common.load_checkpoint(path, flags | {"llm_steps": None}, "abc")
    payload["adapter"]["weight"][1] = float("nan")
    common.save_checkpoint(path, payload)
    with pytest.raises(common.UserError, match="holds something that is not a number"):
        common.load_checkpoint(path, flags, "abc")


@pytest.mark.parametrize("wire", sorted(path.name for path in (HERE / "tiny" / "wires").iterdir()))
def test_a_damaged_wire_is_refused(wire, tmp_path):
    stage = wire.split("-")[0]
    folder = shutil.copytree(HERE / "tiny" / "wires" / wire, tmp_path / "wire")
    whole, rng = (folder / "wire.safetensors").read_bytes(), random.Random(0)
    common.load_wire(str(folder), stage, (), ())
    for length in (0, 9, len(whole) // 2, len(whole) - 1):
        (folder / "wire.safetensors").write_bytes(whole[:length])
        with pytest.raises(common.UserError):
            common.load_wire(str(folder), stage, (), ())
    for _ in range(20):
        place = rng.randrange(len(whole))
        flipped = whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :]
        (folder / "wire.safetensors").write_bytes(flipped)
        with pytest.raises(common.UserError):
            common.load_wire(str(folder), stage, (), ())


@pytest.mark.parametrize(
    ("change", "is_"),
    (
        (lambda tensors, name: tensors.update({name: tensors[name].double()}), "[1024, 24] float64"),
        (lambda tensors, name: tensors.update({name: tensors[name][:, 1:].contiguous()}), "[1024, 23] float32"),
        (lambda tensors, name: tensors.pop(name), "not there"),
    ),
)
def test_a_tensor_of_a_wire_that_does_not_fit_is_named(change, is_, tmp_path):
    tensors = safetensors.torch.load_file(SHIPPED / "wire.safetensors")
    config = json.loads((SHIPPED / "config.json").read_text())
    change(tensors, "adapter.keys")
    common.save_wire(tmp_path, tensors, config)
    run = run_stage(stage1, "--eval-only", tmp_path, "--smoke", "--out", tmp_path / "out")
    expected = f"adapter.keys in wire.safetensors is {is_}, and with its config.json should be [1024, 24] float32"
    assert run.code == 2 and expected in run.stderr and run.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_a_wire_does_not_know_is_named(tmp_path):
    with pytest.raises(common.UserError, match=r"x\.more in wire.safetensors is \[2\] int64, .* should be not there"):
        tensors = {"x.weight": torch.zeros(1, 1), "x.bias": torch.zeros(1), "x.more": torch.arange(2)}
        common.load_module(torch.nn.Linear(1, 1), "x.", tensors, "wire")


def test_a_wire_with_something_that_is_no_number_is_refused(tmp_path):
    tensors = safetensors.torch.load_file(SHIPPED / "wire.safetensors")
    config = json.loads((SHIPPED / "config.json").read_text())
    tensors["mean"][3] = float("nan")
    common.save_wire(tmp_path, tensors, config)
    with pytest.raises(common.UserError, match="mean in wire.safetensors holds something that is not a number"):
        common.load_wire(str(tmp_path), "stage1", (), ())


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


def test_100000_mutated_files_are_read_or_refused_in_one_line(tmp_path):
    rows = [{"context": f"Émile {i} sells oil.", "question": "What is sold?", "answers": ["oil"]} for i in range(6)]
    whole = {
        "a.json": squad_of(rows).encode(),
        "a.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
    }
    rng, outcomes = random.Random(0), {"read": 0, "refused": 0}
    memory = Path("/dev/shm")  # a disk takes milliseconds to truncate a file
    folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else tmp_path))
    paths = {name: folder / name for name in whole}
    for number in range(100_000):
        name = ("a.json", "a.jsonl")[number % 2]
        paths[name].write_bytes(mutated(rng, whole[name]) if number % 50 else rng.randbytes(rng.randrange(1, 300)))
        try:
            data = common.load_data(str(paths[name]), None, 10)  # a reader is needed for plain text alone
            for row in (*data.train, *data.validation, *data.test):
                assert isinstance(row["context"], str) and isinstance(row["question"], str) and row["answers"]
            outcomes["read"] += 1
        except common.UserError as error:
            assert "\n" not in str(error) and str(paths[name]) in str(error)
            outcomes["refused"] += 1
    shutil.rmtree(folder)
    assert min(outcomes.values()) > 1000, outcomes


def peak_of_reading(path: str, queue) -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data = common.load_data(path, None, 100)
    assert data.train_rows(0, 0, 4)[0]["answers"]
    queue.put((len(data.train), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


def test_a_large_jsonl_file_stays_on_the_disk(start, tmp_path):
    """Rows are read as they are needed: 200 MB of them take a few MB of memory."""
    path, context = tmp_path / "large.jsonl", "word " * 4000
    with path.open("w") as file:
        for i in range(10_000):
            file.write(json.dumps({"context": f"{i} {context}", "question": "What?", "answers": ["word"]}) + "\n")
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
    data = common.load_data(str(path), None, 1000)
    parts = [list(data.train), data.validation, data.test]
    assert sorted(row["context"] for part in parts for row in part) == sorted(row["context"] for row in rows)
    assert all(parts) and data.train[-1] == data.train[len(data.train) - 1]
    assert data.train[:2] == [data.train[0], data.train[1]]
    path.write_text("something else")
    with pytest.raises(common.UserError, match="at byte"):
        data.train[0]
