"""What every stage promises: its files, its seed, resuming, micro-batches, a frozen LLM, and the order of imports."""

import ast
import hashlib
import json
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType

import pytest
import safetensors.torch
import torch
from conftest import HERE, LADDER, QUICK, assert_same_gradients, ladder_flags, run_stage, succeed

import plumbing.training
from plumbing.data import Data
from plumbing.report import RESULT_KEYS

RUN_FILES = {"wire.safetensors", "config.json", "metrics.jsonl", "samples.md", "report.png", "checkpoint.safetensors"}
# name -> (which part of the ladder, more flags)
CASES = {name: (name, ()) for name in LADDER} | {
    "stage1-mlp": ("stage1", ("--adapter", "mlp")),
    "stage1-linear": ("stage1", ("--adapter", "linear")),
}


def trained(*left_out: str):
    """Run a test on every case but these."""
    return pytest.mark.parametrize("case", [name for name in CASES if name not in left_out], indirect=True)


@dataclass
class Case:
    """A way to train, and what a run of it left behind."""

    module: ModuleType
    flags: tuple
    kind: tuple  # those of the flags that --eval-only needs, too
    out: Path
    stdout: str

    def run(self, *flags, code: int = 0):
        run = run_stage(self.module, *self.flags, *flags)
        assert run.code == code, run.stderr
        return run


@pytest.fixture(scope="module")
def case(request, random_llm, ladder, tmp_path_factory) -> Case:
    name, more = CASES[request.param]
    module, flags = ladder_flags(random_llm, ladder)[name]
    out, stdout, flags = ladder / name, (ladder / f"{name}.txt").read_text(), (*flags, *more, *QUICK)
    if more:
        out = tmp_path_factory.mktemp(request.param)
        stdout = succeed(module, *flags, "--out", out).stdout
    return Case(module, flags, ("--smoke",) if name == "stage0" else (), out, stdout)


def without_times(result: dict) -> dict:
    return {key: value for key, value in result.items() if not key.endswith("_seconds")}


def history(out: Path) -> list[dict]:
    """The rows of metrics.jsonl, less the clock."""
    return [json.loads(row) | {"seconds": None} for row in (out / "metrics.jsonl").read_text().splitlines()]


def wire_of(out: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(out / "wire.safetensors")


def result_in(stdout: str) -> dict:
    return json.loads(stdout.strip().split("\n")[-1])


# --- what a run leaves behind


@trained()
def test_a_run_leaves_its_files_and_ends_with_the_json_line(case):
    more = {"message.png"} if case.module.STAGE == "stage3" else set()
    assert {path.name for path in case.out.iterdir()} == RUN_FILES | more
    result = result_in(case.stdout)
    assert list(result) == RESULT_KEYS
    assert (result["stage"], result["seed"], result["steps"], result["examples"]) == (case.module.STAGE, 0, 4, 8)
    assert {key: json.loads((case.out / "config.json").read_text())["metrics"][key] for key in RESULT_KEYS} == result
    assert [row["step"] for row in history(case.out)] == [1, 2, 3, 4]
    assert (case.out / "samples.md").read_text(encoding="utf-8").count("\n| ") == 1 + 8  # a heading and the test rows
    assert (case.out / "report.png").read_bytes().startswith(b"\x89PNG")


@trained()
def test_eval_only_gives_the_metrics_that_training_reported(case, tmp_path, no_picture):
    flags = (*case.kind, "--eval-only", case.out, "--eval-examples", "8", "--out", tmp_path)
    again = succeed(case.module, *flags)
    metrics = result_in(case.stdout)
    assert without_times(again.result) == without_times(metrics)
    assert again.result["train_seconds"] == metrics["train_seconds"]
    assert (tmp_path / "samples.md").read_bytes() == (case.out / "samples.md").read_bytes()  # every answer
    mine, theirs = wire_of(tmp_path), wire_of(case.out)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)


# --- the seed, and the frozen LLM


def digest(model: torch.nn.Module) -> str:
    tensors = sorted(model.state_dict().items())
    return hashlib.sha256(b"".join(name.encode() + tensor.numpy().tobytes() for name, tensor in tensors)).hexdigest()


@trained()
def test_the_same_seed_gives_the_same_wire_and_the_llm_stays(case, tmp_path, monkeypatch, no_picture):
    readers, load = [], case.module.load_reader

    def load_and_look(*args, **kwargs):
        reader = load(*args, **kwargs)
        readers.append((reader, digest(reader.model), reader.table.clone()))
        return reader

    monkeypatch.setattr(case.module, "load_reader", load_and_look)
    torch.use_deterministic_algorithms(False)  # as in a new process
    again = case.run("--out", tmp_path)
    assert torch.are_deterministic_algorithms_enabled()  # no atomic adds: two threads would sum in any order
    assert without_times(again.result) == without_times(result_in(case.stdout))
    assert (tmp_path / "wire.safetensors").read_bytes() == (case.out / "wire.safetensors").read_bytes()
    assert history(tmp_path) == history(case.out)
    ((reader, before, table),) = readers
    assert digest(reader.model) == before and torch.equal(reader.table, table)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in reader.model.parameters())


@trained()
def test_another_seed_gives_other_rows_and_another_wire(case, tmp_path, monkeypatch, no_picture):
    asked, reads = [], "train_passages" if case.module.STAGE == "slots" else "train_rows"
    train_rows = getattr(Data, reads)

    def remember(data, seed, start, count, *more):
        asked.append((seed, start, count))
        return train_rows(data, seed, start, count, *more)

    monkeypatch.setattr(Data, reads, remember)
    case.run("--seed", "6", "--out", tmp_path)
    mine, theirs = wire_of(tmp_path), wire_of(case.out)
    assert mine.keys() == theirs.keys() and not all(torch.equal(mine[name], theirs[name]) for name in theirs)
    # stage 1 reads in its steps through the LLM, slots behind the passages that they are fitted on, after their scorers
    starts = {"stage1": (8, 12), "slots": (20, 24, 28, 32)}.get(case.module.STAGE, (0, 4, 8, 12))
    steps = [(6, start, 4) for start in starts]
    assert [rows for rows in asked if rows in steps][
        -len(steps) :
    ] == steps  # every step reads on where the last one stopped
    assert {seed for seed, _, _ in asked} == {6}


# --- the same weights, whatever happens on the way


@trained("stage1-linear")
def test_a_resumed_run_equals_an_unbroken_one(case, tmp_path, monkeypatch, no_picture):
    """It is stopped after step 2 and again after step 3: in stage 2 before and after the LLM comes in."""
    save, last = plumbing.training.save_checkpoint, []

    def save_and_stop(path, modules, optimizer, state):
        save(path, modules, optimizer, state)
        if state["step"] == last[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(plumbing.training, "save_checkpoint", save_and_stop)
    for last[:], resume in (([2], ()), ([3], ("--resume",))):
        run = case.run("--out", tmp_path, *resume, code=130)
    assert "resumed at step 2" in run.stdout
    monkeypatch.setattr(plumbing.training, "save_checkpoint", save)
    refused = case.run("--out", tmp_path, "--resume", "--lr", "0.1", code=2)
    assert f"made with --lr {case.module.CONFIG['lr']}, and this run has 0.1" in refused.stderr
    resumed = case.run("--out", tmp_path, "--resume")
    assert "resumed at step 3" in resumed.stdout
    assert (tmp_path / "wire.safetensors").read_bytes() == (case.out / "wire.safetensors").read_bytes()
    assert history(tmp_path) == history(case.out)
    assert without_times(resumed.result) == without_times(result_in(case.stdout))


@trained("stage1-mlp")
def test_micro_batches_change_nothing(case, tmp_path, no_picture):
    case.run("--micro-batch-size", "1", "--out", tmp_path)
    for mine, theirs in zip(history(tmp_path), history(case.out), strict=True):
        assert mine.keys() == theirs.keys()
        for key in (key for key in theirs if key.startswith("loss_")):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4, abs=5e-7), key
    assert_same_gradients(tmp_path, case.out)


@trained("stage1-mlp", "stage1-linear")
def test_gradients_are_clipped_after_they_are_summed_over_the_processes(case, tmp_path, monkeypatch):
    norms = []

    def sum_with_large_ones(parameters, values):
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad *= 1e9
        return values

    def accepts(run, norm):
        clipped = [p.grad for group in run.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append((norm.item(), torch.cat([gradient.flatten() for gradient in clipped]).norm().item()))
        raise KeyboardInterrupt  # the rest of the run is not of interest

    monkeypatch.setattr(plumbing.training, "sum_over_processes", sum_with_large_ones)
    monkeypatch.setattr(plumbing.training.Run, "accepts", accepts)
    case.run("--out", tmp_path, code=130)
    ((before, after),) = norms
    assert before > 1000 and after == pytest.approx(1, rel=1e-3)


# --- the order of the modules

# which modules of the project a file may import when it runs; the first that fits counts
MAY_IMPORT = {
    "plumbing/scale.py": "plumbing common kernels",  # it measures stage 1, which is handed to it
    "plumbing/*": "plumbing tiny",
    "common.py": "plumbing",
    "stage0_broken.py": "plumbing common",
    "stage1_pca_adapter.py": "plumbing common kernels",
    "stage2_encoder.py": "plumbing common kernels stage1_pca_adapter",
    "stage3_full.py": "plumbing common stage3",
    "stage3/sender.py": "plumbing stage3",
    "stage3/message.py": "plumbing",
    "stage3/*": "plumbing common stage3",
    "kernels/adapter.py": "kernels",
    "kernels/fused.py": "",
}
FILES = [path.relative_to(HERE).as_posix() for path in (*HERE.glob("*.py"), *HERE.glob("*/*.py"))]
FILES = sorted(file for file in FILES if any(fnmatch(file, pattern) for pattern in MAY_IMPORT))
OURS = {Path(file).parts[0].removesuffix(".py") for file in FILES} | {"tiny", "world", "tests", "conftest"}


def parsed(file: str) -> ast.Module:
    return ast.parse((HERE / file).read_text(encoding="utf-8"))


def imported(tree: ast.Module) -> set[str]:
    """What a file imports when it runs, within its functions, too; not what it imports for type checkers."""
    found, nodes = set(), [tree]
    for node in nodes:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            nodes += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno} is a relative import"
            found.add(node.module)
        nodes += ast.iter_child_nodes(node)
    return {name.split(".")[0] for name in found}


@pytest.mark.parametrize("file", FILES)
def test_a_module_imports_only_what_stands_below_it(file):
    allowed = next(names for pattern, names in MAY_IMPORT.items() if fnmatch(file, pattern))
    assert imported(parsed(file)) & OURS <= set(allowed.split())


@pytest.mark.parametrize("file", [*HERE.glob("stage*.py")], ids=lambda path: path.name)
def test_the_main_of_a_stage_holds_no_other_function(file):
    (main,) = [node for node in parsed(file).body if getattr(node, "name", "") == "main"]
    inner = [node for node in ast.walk(main) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    assert inner == [main]
