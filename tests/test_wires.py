"""Wires and directories that a stranger gives: what is read is never overwritten, what does not fit is refused."""

import copy
import json
import os
import random
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import LADDER, QUICK, ladder_flags, run_stage, slots, stage0, stage1, stage2, stage3, succeed

from plumbing.launch import UserError
from plumbing.wires import load_wire, save_wire

MODULES = {"stage0": stage0, "stage1": stage1, "stage2": stage2, "stage3": stage3, "slots": slots}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("stage", "flag"),
    (("stage0", "--eval-only"), ("stage1", "--model"), ("stage1", "--eval-only"), ("stage2", "--stage1"),
     ("stage3", "--eval-only")),
)  # fmt: skip
def test_a_directory_that_is_read_is_not_written(stage, flag, random_llm, ladder, tmp_path, no_picture):
    module, flags = ladder_flags(random_llm, ladder)[stage]
    flags = [*map(str, flags)]
    if flag == "--eval-only":
        flags = [flag, str(ladder / stage)]
    read = flags[flags.index(flag) + 1]
    copied = shutil.copytree(read, tmp_path / "read")
    (tmp_path / "link").symlink_to(copied)
    flags = [str(copied) if value == read else value for value in flags]
    before = files(copied)
    for out in (copied, tmp_path / "link"):
        run = run_stage(module, *flags, *QUICK, "--out", out)
        assert run.code == 2 and "this run reads that directory" in run.stderr, run.stderr
        assert run.stderr.count("\n") == 1 and files(copied) == before


@pytest.mark.parametrize("name", ("metrics.jsonl", "config.json"))
def test_a_data_file_is_not_overwritten(name, random_llm, tmp_path):
    rows = [{"context": f"{i} sells oil.", "question": "What?", "answers": ["oil"]} for i in range(40)]
    qas = [{"context": row["context"], "qas": [row | {"answers": [{"text": "oil"}]}]} for row in rows]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / name).write_text(lines if name.endswith("l") else json.dumps({"data": [{"paragraphs": qas}]}))
    before = files(tmp_path)
    run = run_stage(stage1, "--model", random_llm, *QUICK, "--data", tmp_path / name, "--out", tmp_path)
    assert run.code == 2 and "this run reads that directory" in run.stderr and files(tmp_path) == before


def test_a_directory_that_was_read_and_is_gone_bars_no_other(random_llm, tmp_path, monkeypatch, no_picture):
    monkeypatch.setattr("plumbing.wires.IN_USE", {tmp_path / "gone"})
    (tmp_path / "out").mkdir()
    succeed(stage1, "--model", random_llm, *QUICK, "--out", tmp_path / "out")


@pytest.mark.parametrize("stage", ("stage1", "stage3"))
def test_an_unfinished_run_is_not_discarded_without_being_told(stage, random_llm, ladder, tmp_path, no_picture):
    module, flags = ladder_flags(random_llm, ladder)[stage]
    out = shutil.copytree(ladder / stage, tmp_path / "out")
    os.utime(out / "config.json", (0, 0))  # of an older run: the last one was killed before it wrote its own
    before = files(out)
    evaluation = ("--eval-only", ladder / stage)
    for started in (flags, evaluation):
        run = run_stage(module, *started, *QUICK, "--out", out)
        assert run.code == 2 and "the checkpoint of an unfinished run is there" in run.stderr, run.stderr
        assert run.stderr.count("\n") == 1 and files(out) == before
    run = run_stage(module, *flags, "--out", out, "--resume", "--overwrite")
    assert run.code == 2 and "drop one of them" in run.stderr
    succeed(module, *flags, *QUICK, "--out", out, "--overwrite")
    succeed(module, *flags, *QUICK, "--out", out)  # that one ended: nothing is lost


# --- what a wire may hold


def parts_of(wire: Path) -> tuple[dict[str, torch.Tensor], dict]:
    return safetensors.torch.load_file(wire / "wire.safetensors"), json.loads((wire / "config.json").read_text())


def load(wire: Path, stage: str) -> None:
    load_wire(str(wire), MODULES[stage].STAGE, MODULES[stage].WIRE)


def write_config(wire: Path, config: dict) -> None:
    """Without the digest of the new one."""
    (wire / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("stage", "change", "words"),
    (
        ("stage1", {"code_dim": [8]}, "code_dim is a list, and should be a whole number from 1 to"),
        ("stage1", {"code_dim": 8.0}, "code_dim is 8.0, and should be"),
        ("stage1", {"adapter": "banana"}, 'adapter is "banana", and should be "linear" or "mlp" or "codebook"'),
        ("stage1", {"rms": "banana"}, "rms is not known here"),
        ("stage1", {"arguments": {"seed": 0, "steps": [[]]}}, "arguments.steps is a list"),
        ("stage1", {"arguments": {"seed": 0, "steps": 1, "lr": {}}}, "arguments.lr is an object"),
        ("stage1", {"controls": {}}, "controls.explained_variance is missing"),
        ("stage1", {"metrics": {"train_seconds": float("nan")}}, "metrics.train_seconds is NaN"),
        ("stage1", {"metrics": {"train_seconds": 10**400}}, "metrics.train_seconds is 1000"),
        ("stage1", {"model": "\ud800"}, "model is "),
        ("stage2", {"without": {}}, "without is an object"),
        ("stage3", {"corpus": [{}]}, "corpus.0 is an object"),
        ("stage3", {"corpus": None}, "corpus is null"),
        ("stage1", {"stage": "stage9"}, "is a wire of stage9, not of stage1"),
        ("stage1", {"fingerprint": "0"}, "is damaged, or not the one that was written with it"),
    ),
)
def test_a_config_that_does_not_fit_is_named(stage, change, words, ladder, tmp_path):
    wire = shutil.copytree(ladder / stage, tmp_path / "wire")
    load(wire, stage)
    write_config(wire, parts_of(wire)[1] | change)
    with pytest.raises(UserError) as caught:
        load(wire, stage)
    assert words in str(caught.value) and str(wire) in str(caught.value)


@pytest.mark.parametrize("key", ("fingerprint", "arguments.seed", "metrics.train_seconds", "wire_sha256"))
def test_a_config_that_lacks_something_is_refused(key, ladder, tmp_path):
    wire = shutil.copytree(ladder / "stage1", tmp_path / "wire")
    config = inside = parts_of(wire)[1]
    *path, last = key.split(".")
    for part in path:
        inside = inside[part]
    del inside[last]
    write_config(wire, config)
    with pytest.raises(UserError, match=f"{key} is missing"):
        load(wire, "stage1")


def test_the_digest_is_of_tensors_and_config(ladder, tmp_path):
    wire = shutil.copytree(ladder / "stage1", tmp_path / "wire")
    tensors, config = parts_of(wire)
    save_wire(wire, tensors, config)
    config = parts_of(wire)[1]
    write_config(wire, dict(reversed(config.items())))  # the same, otherwise written
    load(wire, "stage1")
    write_config(wire, config | {"controls": config["controls"] | {"explained_variance": 0.5}})
    with pytest.raises(UserError, match="damaged"):
        load(wire, "stage1")


@pytest.mark.parametrize(
    ("stage", "name", "change", "is_"),
    (
        ("stage0", "encoder.layers.1.norm1.weight", lambda t: t * 0 + 1e38, "latents that are no numbers"),
        ("stage1", "mean", lambda t: t[1:], "[31] float32, and with its config.json should be [32] float32"),
        ("stage1", "components", lambda t: t.T, "[8, 32] float32, and with its config.json should be [32, 8]"),
        ("stage1", "target_rms", lambda t: t[None], "[1] float32, and with its config.json should be [] float32"),
        ("stage1", "adapter.keys", lambda t: t.double(), "[4096, 8] float64"),
        ("stage2", "prefix_codes", lambda t: t[:, 1:], "[1, 7] float32, and with its config.json should be [1, 8]"),
        ("stage2", "prefix_codes", lambda t: t.expand(9, -1).clone(), "[9, 8] float32"),
        ("stage2", "encoder.end.bias", lambda t: None, "not there, and with its config.json should be [1] float32"),
        ("stage2", "mean", lambda t: t * float("nan"), "holds NaN or infinity"),
        ("stage2", "encoder.end.bias", lambda t: t.to(torch.float8_e4m3fn), "[1] float8_e4m3fn"),
        ("stage3", "pieces.lengths", lambda t: torch.full_like(t, 255), "do not spell every byte"),
        ("stage3", "pieces.spelled", lambda t: None, "not there, and with its config.json should be"),
        ("stage3", "predictor.group.bias", lambda t: t[1:], "[14] int16, and with its config.json should be [15]"),
        ("stage3", "predictor.exponential", lambda t: t * 0, "is not a table of exp"),
        ("stage2", "prefix_codes", lambda t: t[:0], "should be [1, 8] float32"),
        ("stage0", "more", lambda t: torch.ones(2), "more in wire.safetensors is [2] float32"),
        ("stage1", "encoder.end.bias", lambda t: torch.ones(2), "should be not there"),
        ("stage2", "pooler.out.bias", lambda t: torch.ones(2), "should be not there"),
        ("stage3", "predictor.more", lambda t: torch.ones(2), "should be not there"),
    ),
)  # fmt: skip
def test_a_tensor_that_does_not_fit_is_named(stage, name, change, is_, ladder, tmp_path):
    wire = shutil.copytree(ladder / stage, tmp_path / "wire")
    tensors, config = parts_of(wire)
    tensors[name] = change(tensors.get(name))
    save_wire(wire, {key: tensor for key, tensor in tensors.items() if tensor is not None}, config)
    assert refused(evaluation_of(stage), wire, tmp_path / "out", is_)


@pytest.mark.parametrize("stage", LADDER)
def test_a_damaged_wire_is_refused(stage, ladder, tmp_path):
    wire, rng = shutil.copytree(ladder / stage, tmp_path / "wire"), random.Random(0)
    whole = (wire / "wire.safetensors").read_bytes()
    damaged = [whole[:length] for length in (0, 7, 9, 100, len(whole) // 2, len(whole) - 1)]
    for place in (rng.randrange(len(whole)) for _ in range(20)):
        damaged.append(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
    for data in damaged:
        (wire / "wire.safetensors").write_bytes(data)
        with pytest.raises(UserError):
            load(wire, stage)


# --- mutations: of configs and of tensors, in half of the cases with a digest that fits

ODD = (
    None, True, 0, -1, 5, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "a", "a\nb", "\ud800", "\0",
    "x" * 5000, "é😀", [], {}, [[]], [{}], [None], {"": {}}, ["a", 5], "tiny", "codebook", "prompt", "../..", "~nobody",
)  # fmt: skip
TEXTS = (
    "", "null", "[]", "5", '"a"', "{}", "[" * 100_000, '{"a":' * 100_000, "{" + '"stage": 1' + "9" * 5000 + "}",
    "\ufeff{}",
)  # fmt: skip
ONE_STEP = ("--steps", "1", "--batch-size", "2")


def evaluation_of(stage: str) -> tuple:
    """(module, flags) that evaluate a wire of this stage, whose directory follows."""
    more = ("--smoke",) if stage == "stage0" else ("--model", "tiny") if stage == "stage3" else ()
    return MODULES[stage], (*more, "--eval-examples", "2", "--eval-only")


def readers_of(random_llm: Path) -> dict[str, tuple]:
    """name -> (stage of a wire, module, flags) of every way to read a wire, whose directory follows."""
    on = ("--model", random_llm, "--eval-examples", "2", *ONE_STEP)
    return {stage: (stage, *evaluation_of(stage)) for stage in LADDER} | {
        "stage 2 starts from it": ("stage1", stage2, (*on, "--stage1")),
    }


def places_in(value, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value in a config, its own included."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from places_in(part, (*path, key))


def mutated_config(rng: random.Random, config: dict):
    """A config in which one or two values are replaced, gone, or new."""
    config = copy.deepcopy(config)
    for _ in range(rng.choice((1, 1, 2))):
        places = [place for place in places_in(config) if place and (place[0] not in NOT_READ or len(place) < 2)]
        read = [("metrics", "train_seconds"), ("controls", "explained_variance")]
        places += [place for place in places_in(config) if place in read]
        *path, last = rng.choice(places)
        inside = config
        for key in path:
            inside = inside[key]
        kind = rng.randrange(4)
        if kind == 0:
            del inside[last]
        elif kind == 1 and isinstance(inside, dict):
            inside[rng.choice(("rms", "", "a\nb", "seed", "x" * 300))] = rng.choice(ODD)
        else:
            inside[last] = copy.deepcopy(rng.choice(ODD))
    return config


def mutated_tensors(rng: random.Random, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors = dict(tensors)
    name = rng.choice(sorted(tensors))
    t = tensors[name]
    dtypes = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int16, torch.uint8, torch.bool)
    dtypes += (torch.float8_e4m3fn, torch.complex64, torch.uint16)
    changes = (
        lambda: t.to(rng.choice(dtypes)), lambda: t[:0] if t.dim() else t[None], lambda: t[1:] if t.dim() else -t,
        lambda: t.flatten(), lambda: t.T.contiguous() if t.dim() == 2 else t.new_zeros(0), lambda: t[None],
        lambda: torch.cat([t, t]) if t.dim() else t.expand(3).clone(), lambda: torch.zeros_like(t),
        lambda: torch.full_like(t, 255 if t.dtype == torch.uint8 else 32000), lambda: t * rng.choice((-1, 3, 2**30)),
        lambda: t * float("nan") if t.is_floating_point() else -t, lambda: t.flip(0) if t.dim() else -t,
        lambda: t * 1e38 if t.is_floating_point() else t + 1, lambda: torch.randn(t.shape).to(t.dtype),
    )  # fmt: skip
    tensors[name] = rng.choice(changes)()
    if rng.random() < 0.1:
        del tensors[name]
    if rng.random() < 0.1:
        tensors[rng.choice(("more", "adapter.more", "pieces.more", "predictor.more"))] = t.clone()
    return tensors


def refused(reader: tuple, wire: Path, out: Path, words: str = "") -> bool:
    """Whether a stage refuses a wire. If so in one line, with nothing saved; if not, its run ends well."""
    module, flags = reader
    before = files(wire)
    run = run_stage(module, *flags, wire, "--out", out)
    assert files(wire) == before and run.code in (0, 2), run.stderr
    if run.code == 2:
        assert run.stderr.count("\n") == 1 and words in run.stderr, run.stderr
        assert not (out / "wire.safetensors").exists()
    shutil.rmtree(out, ignore_errors=True)
    return run.code == 2


def count_refusals(reader: tuple, wires: Iterable[Path], out: Path, most: int) -> int:
    """How many wires are refused. Of those that load, so many go through the whole stage, which takes a second each."""
    stage, *reader = reader
    refusals = runs = 0
    for wire in wires:
        try:
            load(wire, stage)
        except UserError as error:
            assert str(wire) in str(error)
            refusals += 1
            if refusals % 20:  # one in twenty also on the command line
                continue
            assert refused(reader, wire, out)
            continue
        runs += 1
        if runs <= most:
            refusals += refused(reader, wire, out)
    return refusals


READERS = (*LADDER, "stage 2 starts from it")
NOT_READ = ("metrics", "controls", "others")  # but for two numbers in them


def wires_of_mutated_configs(wire: Path, count: int) -> Iterator[Path]:
    rng, (tensors, config) = random.Random(0), parts_of(wire)
    for number in range(count):
        mutated = mutated_config(rng, config)
        if number % 2:
            write_config(wire, mutated)
        else:
            save_wire(wire, tensors, mutated)
        if number % 10 == 9:
            (wire / "config.json").write_text(rng.choice(TEXTS))
        yield wire


def wires_of_mutated_tensors(wire: Path, count: int) -> Iterator[Path]:
    rng, (tensors, config) = random.Random(0), parts_of(wire)
    for _ in range(count):
        save_wire(wire, mutated_tensors(rng, tensors), config)
        yield wire


@pytest.mark.parametrize(
    ("mutated_wires", "count", "most"),
    (
        (wires_of_mutated_configs, 20, 1),
        (wires_of_mutated_tensors, 3, 3),
        pytest.param(wires_of_mutated_configs, 1000, 40, marks=pytest.mark.slow),
        pytest.param(wires_of_mutated_tensors, 200, 200, marks=pytest.mark.slow),
    ),
)
@pytest.mark.parametrize("name", READERS)
def test_mutated_wires_are_read_or_refused_in_one_line(
    name, mutated_wires, count, most, random_llm, ladder, tmp_path, monkeypatch, no_picture
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)  # where no name in a config is that of a file
    reader = readers_of(random_llm)[name]
    wire = shutil.copytree(ladder / reader[0], tmp_path / "wire")
    refusals = count_refusals(reader, mutated_wires(wire, count), tmp_path / "out", most)
    assert count < 100 or count / 4 < refusals < count
