"""The plumbing in one process: data files, atomic writes, the config of a wire, and `Run` around a training loop."""

import argparse
import hashlib
import json
import math
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import CPU, SHARED, need

import common
from plumbing import checkpoints, data
from plumbing.data import Data, fetch_squad, load_data
from plumbing.launch import UserError
from plumbing.report import RESULT_KEYS, draw_report, score_rows
from plumbing.training import MAY_CHANGE, Run, must_match
from tiny import world

ROWS = world.make_examples("test", 12)


@pytest.fixture(scope="module")
def reader() -> common.Reader:
    return common.load_reader("tiny", CPU, torch.float32)


# --- data files


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def squad_json(passages: int) -> str:
    """Two questions to each passage."""
    paragraphs = []
    for i, row in enumerate(world.make_examples("train", passages)):
        answers = [{"text": answer} for answer in row["answers"]]
        qas = [{"question": question, "answers": answers} for question in (row["question"], "And again?")]
        paragraphs.append({"context": f"Passage {i}. {row['context']}", "qas": qas})
    return json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}], "version": "1.1"})


def test_squad_and_jsonl_files_give_disjoint_passages(reader, tmp_path):
    squad = load_data(write(tmp_path / "a.json", squad_json(80)), reader, 1000)
    rows = world.make_examples("train", 80)
    lines = [json.dumps(row | {"question": question}) for row in rows for question in (row["question"], "And again?")]
    jsonl = load_data(write(tmp_path / "a.jsonl", "\n".join(lines)), reader, 3)
    for found in (squad, jsonl):
        splits = [{row["context"] for row in rows} for rows in (found.train, found.validation, found.test)]
        assert all(splits) and not (splits[0] & splits[1] or splits[0] & splits[2] or splits[1] & splits[2])
    assert len(jsonl.test) == 3 and len(squad.train) + len(squad.validation) + len(squad.test) == 160


def test_the_training_stream_visits_every_row_once_an_epoch():
    rows = Data("qa", ROWS, [], [])
    stream = rows.train_rows(0, 0, 36)
    assert all(
        sorted(r["question"] for r in stream[e : e + 12]) == sorted(r["question"] for r in ROWS) for e in (0, 12, 24)
    )
    assert stream[:12] != stream[12:24] != stream[24:]
    assert rows.train_rows(0, 17, 9) == stream[17:26]  # a function of the position: resuming replays nothing
    assert rows.train_rows(1, 0, 12) != stream[:12]
    unlimited = Data("qa", None, [], [])
    assert unlimited.train_rows(3, 5, 2) == [world.make_example("train", 3, 5), world.make_example("train", 3, 6)]


def test_a_text_is_cut_into_windows_and_split_by_place(reader, tmp_path):
    text = " ".join(row["context"] for row in world.make_examples("train", 60))
    windows = load_data(write(tmp_path / "a.txt", text), reader, 1000)
    assert windows.kind == "text"
    rows = windows.train + windows.validation + windows.test
    assert all(row["ids"][0] == reader.tokenizer.bos_token_id for row in rows)
    assert "".join(reader.tokenizer.decode(row["ids"], skip_special_tokens=True) for row in rows) == text
    batch = common.make_batch(reader, windows.test[:2])
    assert (batch.sent.sum(1) == batch.attention.sum(1)).all()  # all of a text travels, and each next token is a target
    assert batch.labels[0, 0] == windows.test[0]["ids"][1]


BAD_FILES = {
    "empty.json": (b"", "empty"),
    "blank.txt": (b" \n\n", "empty"),
    "latin1.txt": ("é".encode("latin-1") * 50, "not UTF-8"),
    "utf16.txt": (("hello " * 50).encode("utf-16-le"), "not UTF-8"),
    "broken.json": (b'{"data": [\n {"x": }]}', "line 2"),
    "other.json": (b'{"rows": []}', "SQuAD v1.1 layout"),
    "noanswers.json": (
        b'{"data":[{"paragraphs":[{"context":"c","qas":[{"question":"q","answers":[]}]}]}]}',
        "no question has",
    ),
    "broken.jsonl": (b'{"context":"c","question":"q","answers":["a"]}\n{"context":', "line 2"),
    "fields.jsonl": (b'{"context":"c","question":"q"}\n', "line 1"),
    "single.jsonl": (b'{"context":"c","question":"q","answers":["a"]}\n', "too few"),
    "short.txt": (b"hello", "at least"),
    "deep.json": (b"[" * 100_000, "nested"),
    "deep.jsonl": (b"[" * 100_000, "line 1"),
    "half.jsonl": (b'{"context":"\\ud83d","question":"q","answers":["a"]}\n', "line 1: context is .* Unicode text"),
    "half.json": (
        b'{"data":[{"paragraphs":[{"context":"\\ud83d","qas":[{"question":"q","answers":[{"text":"a"}]}]}]}]}',
        "data.0.paragraphs.0.context is .* Unicode text",
    ),
    "digits.json": (b'{"data": [' + b"9" * 5000 + b"]}", "a number has thousands of digits"),
    "digits.jsonl": (b'{"context":"c","question":"q","answers":[' + b"9" * 5000 + b"]}", "line 1: .* digits"),
    "types.jsonl": (b'{"context":"c","question":"q","answers":["a", 5]}\n', "line 1: answers.1 is 5"),
    "special.txt": (b"<s></s>" * 2000, "0 windows of 255 with text"),
    "table.csv": (b"a,b", "a file of an unknown kind ..csv"),
    "noending": (b"a,b", "its name has no ending"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_clear_line(reader, tmp_path, name):
    content, expected = BAD_FILES[name]
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=expected) as caught:
        load_data(path, reader, 10)
    assert path in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_file_is_called_what_it_is(reader, tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    (tmp_path / "folder.json").mkdir()
    for name, words in (
        ("pipe.jsonl", "a pipe or device"),
        ("loop.txt", "symbolic links"),
        ("folder.json", "a directory"),
        ("nothing.json", "no such file"),
        ("x" * 300, "name too long"),
        ("zero\0byte.txt", "null byte"),
    ):
        with pytest.raises(UserError, match=words):
            load_data(str(tmp_path / name), reader, 10)


def test_a_name_in_upper_case_is_the_same_kind_of_file(reader, tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in world.make_examples("train", 40))
    assert load_data(write(tmp_path / "A.JSONL", lines), reader, 10).kind == "qa"
    assert load_data(write(tmp_path / "A.TXT", lines * 20), reader, 10).kind == "text"


def test_of_a_row_of_megabytes_no_more_is_tokenised_than_a_context_can_hold(reader, monkeypatch):
    tokenized = []
    monkeypatch.setattr(common, "tokenize", lambda reader, text: tokenized.append(len(text)) or [0] * len(text))
    passage = "A firm sells olive oil. " * 500_000
    prompt = common.make_prompt(reader, passage, "What is sold?")
    assert prompt.truncated and passage.startswith(prompt.context) and max(tokenized) < 2 * 16 * reader.context_tokens
    with pytest.raises(UserError, match="a question of 12000000 characters"):
        common.make_prompt(reader, "", passage)
    assert max(tokenized) < 2 * 16 * reader.context_tokens


def test_squad_is_fetched_once_checked_and_never_half_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    payload = squad_json(3).encode()
    source = Path(write(tmp_path / "source.json", payload))
    monkeypatch.setattr(data, "SQUAD", {"dev.json": (source.as_uri(), hashlib.sha256(payload).hexdigest())})
    (path,) = fetch_squad()
    assert path.read_bytes() == payload
    source.unlink()
    assert fetch_squad() == [path]  # from the cache now
    path.write_bytes(payload[:-1])
    with pytest.raises(UserError, match="delete it"):
        fetch_squad()
    path.unlink()
    with pytest.raises(UserError, match="cannot fetch"):
        fetch_squad()
    for other in (payload + b" ", payload[:-1]):
        source.write_bytes(other)
        with pytest.raises(UserError, match="not the official file"):
            fetch_squad()
    assert list(path.parent.iterdir()) == []


def test_the_checksum_of_squad_is_that_of_the_official_dev_file():
    path = need(SHARED / "data" / "squad" / "dev-v1.1.json")
    _, sha256 = data.SQUAD["dev-v1.1.json"]
    assert path.stat().st_size == 4_854_279 and hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    rows = data.read_squad(path)
    assert len(rows) == 10_570 and max(len(row["answers"]) for row in rows) > 1


# --- saved files


@pytest.mark.parametrize("operation", ("fsync", "replace"))
def test_a_failed_write_leaves_the_old_file(operation, tmp_path, monkeypatch):
    path, linear = tmp_path / "config.json", torch.nn.Linear(1, 1)
    checkpoints.write_atomically(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.os, operation, full)
    with pytest.raises(OSError) as caught:
        checkpoints.write_atomically(path, b"new")
    assert caught.value.filename == str(path)  # the user is told which file
    with pytest.raises(OSError):
        checkpoints.save_checkpoint(path, {"linear": linear}, torch.optim.AdamW(linear.parameters()), {"step": 1})
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done, path = [], tmp_path / "config.json"
    for name in ("fsync", "replace"):
        original = getattr(checkpoints.os, name)
        monkeypatch.setattr(checkpoints.os, name, lambda *a, n=name, f=original: (done.append(n), f(*a)))
    checkpoints.write_atomically(path, b"whole")
    assert done == ["fsync", "replace"] and path.read_bytes() == b"whole"


# --- Run: everything around a training step


def start(folder: Path, fingerprint: str = "abc", below: str | None = None, **flags) -> Run:
    """A run that trains two numbers, with the flags of a stage that `Run` and `must_match` look at."""
    args = dict(stage="toy", out="out", steps=60, lr=0.1, batch_size=8, micro_batch_size=8, seed=0, device="cpu")
    args |= dict(gradient_checkpointing=False, eval_examples=10, eval_only=None, resume=False)
    args = argparse.Namespace(**args | flags)
    folder.mkdir(exist_ok=True)
    torch.manual_seed(args.resume)  # a resumed run starts from other numbers, which the checkpoint replaces
    linear = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=args.lr)
    return Run(args, folder, {"linear": linear}, optimizer, must_match(args, fingerprint, below))


def train(run: Run, before: Callable[[int], float | None] = lambda step: None) -> Run:
    """A stage's loop. before: called at the start of each step; may return a factor of the step's loss."""
    linear = run.modules["linear"]
    for step in run.steps():
        factor = before(step)
        for group in run.optimizer.param_groups:
            group["lr"] = run.args.lr * (1 - step / run.args.steps)
        x = torch.rand(8, 1, generator=torch.Generator().manual_seed(step))
        loss = (linear(x) - 3 * x - 1).square().mean() * (1 if factor is None else factor)
        loss.backward()
        run.add(mse=loss)
        run.note(bias=linear.bias.item())
        run.reduce()
        if run.accepts(torch.nn.utils.clip_grad_norm_(linear.parameters(), 1.0)):
            run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
    return run


def tensors_of(run: Run) -> dict[str, torch.Tensor]:
    """Everything that the run has trained: weights, and the optimiser's moments."""
    moments = run.optimizer.state_dict()["state"]
    named = {f"{number}.{key}": tensor for number, part in moments.items() for key, tensor in part.items()}
    return named | {key: tensor.clone() for key, tensor in run.modules["linear"].state_dict().items()}


def metrics_of(run: Run) -> list[dict]:
    """The rows of metrics.jsonl, without the seconds that the steps took."""
    rows = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def assert_same(run: Run, other: Run) -> None:
    mine, theirs = tensors_of(run), tensors_of(other)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert run.state | {"seconds": 0} == other.state | {"seconds": 0}
    assert metrics_of(run) == metrics_of(other) == run.history


class Crash(Exception):
    pass


@pytest.mark.parametrize(
    "end,at,saved", ((signal.SIGTERM, 37, 38), (signal.SIGINT, 37, 38), (Crash, 43, 30), (signal.SIGTERM, 59, 60))
)
def test_an_interrupted_and_resumed_run_ends_where_an_unbroken_one_does(end, at, saved, tmp_path, capsys):
    def interrupt(step: int) -> None:
        if step != at:
            return
        if end is Crash:  # rows 1 to 43 are logged, and the last checkpoint is of step 30
            raise Crash
        signal.raise_signal(end)

    whole, broken = train(start(tmp_path / "whole")), start(tmp_path / "broken")
    expected = {signal.SIGTERM: SystemExit, signal.SIGINT: KeyboardInterrupt, Crash: Crash}[end]
    with pytest.raises(expected) as caught:
        train(broken, interrupt)
    if end == signal.SIGTERM:
        assert caught.value.code == 143
        assert capsys.readouterr().err == f"terminated after step {saved}; --resume goes on from there\n"
    resumed = start(tmp_path / "broken", resume=True)
    assert f"resumed at step {saved}\n" in capsys.readouterr().out and resumed.state["step"] == saved
    assert [row["step"] for row in metrics_of(resumed)] == list(range(1, saved + 1))
    assert_same(train(resumed), whole)
    assert [row["step"] for row in whole.history] == list(range(1, 61))
    assert whole.history[9]["lr"] == pytest.approx(0.1 * 51 / 60) and whole.history[9]["bias"] != 0


def test_a_signal_that_comes_while_processes_agree_counts_after_the_next_step(tmp_path, monkeypatch):
    run, calls = start(tmp_path), []

    def all_reduce(*_):
        calls.append(run.state["step"])
        if len(calls) == 1:  # the numbers of this step have been read, and the others know of no signal
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("plumbing.training.world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    with pytest.raises(SystemExit) as caught:
        train(run)
    assert caught.value.code == 143 and calls == [1, 2] and run.saved_step == 2


def test_a_signal_after_the_last_step_ends_the_run(tmp_path):
    run = start(tmp_path)
    run.show = lambda: signal.raise_signal(signal.SIGTERM) if run.state["step"] == run.total else None
    with pytest.raises(SystemExit) as caught:
        train(run)
    assert caught.value.code == 143 and start(tmp_path, resume=True).state["step"] == run.total


@pytest.mark.parametrize("first", (signal.SIGINT, signal.SIGTERM))
def test_a_second_ctrl_c_stops_at_once(first, tmp_path):
    def interrupt(step: int) -> None:
        if step == 20:
            signal.raise_signal(first)
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("the step goes on")

    run = start(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(run, interrupt)
    assert run.state["step"] == 20 and run.saved_step == 15


@pytest.mark.parametrize("end", ("trained", "NaN", "SIGTERM", "crash"))
def test_signal_handlers_are_restored_however_a_run_ends(end, tmp_path):
    def before(step: int) -> float | None:
        for number in (signal.SIGINT, signal.SIGTERM):
            assert signal.getsignal(number) == run.stop
        if end == "SIGTERM":
            signal.raise_signal(signal.SIGTERM)
        if end == "crash":
            raise Crash
        return math.nan if end == "NaN" else None

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    run = start(tmp_path, steps=8)
    try:
        train(run, before)
        assert end == "trained"
    except (UserError, SystemExit, Crash):
        assert end != "trained"
    assert handlers == {number: signal.getsignal(number) for number in handlers}


def test_a_thread_that_cannot_handle_signals_trains(tmp_path):
    run = start(tmp_path)
    thread = threading.Thread(target=train, args=(run,))
    thread.start()
    thread.join()
    assert run.state["step"] == 60


@pytest.mark.parametrize("factor", (math.nan, math.inf, -math.inf))
def test_a_step_whose_loss_is_nan_or_infinite_is_skipped(factor, tmp_path, capsys):
    weights = []

    def before(step: int) -> float | None:
        weights.append(tensors_of(run))
        return factor if step in (8, 9) else None

    run = start(tmp_path)
    train(run, before)
    for key, tensor in weights[8].items():  # weights and moments alike
        assert torch.equal(weights[9][key], tensor) and torch.equal(weights[10][key], tensor)
    assert not torch.equal(weights[8]["weight"], weights[11]["weight"])
    assert run.state["skipped"] == 2 and run.state["in_a_row"] == 0 and len(run.state["norms"]) == 58
    printed = capsys.readouterr().out
    assert [step for step in range(61) if f"note: step {step} is skipped" in printed] == [9, 10]
    assert "note: 2 of 60 steps were skipped" in printed
    assert [row["step"] for row in metrics_of(run) if row["loss_mse"] is None] == [9, 10]  # JSON has no NaN


def test_one_loss_or_the_norm_alone_is_enough_to_skip_a_step(tmp_path):
    run = start(tmp_path)
    for losses, norm in (({"ce": math.nan, "mse": 1.0}, 1.0), ({"ce": 1.0}, math.nan), ({"ce": 1.0}, math.inf)):
        run.losses = losses
        assert not run.accepts(torch.tensor(norm))
    run.losses = {"ce": 1.0}
    assert run.accepts(torch.tensor(1.0)) and run.state["norms"] == [1.0]


@pytest.mark.parametrize(
    "first,count,kept", ((20, 5, "the checkpoint of step 15 is kept"), (2, 5, "there is no checkpoint"), (20, 4, None))
)
def test_five_skipped_steps_in_a_row_end_the_run(first, count, kept, tmp_path):
    run = start(tmp_path)

    def before(step: int) -> float | None:
        return math.nan if first <= step < first + count or step == first + count + 1 else None

    if kept is None:
        train(run, before)
        assert run.state["skipped"] == 5 and run.state["in_a_row"] == 0
        return
    with pytest.raises(UserError) as caught:
        train(run, before)
    line = str(caught.value)
    assert "\n" not in line and f"for 5 steps up to {first + 5}: stopped, {kept}; try a smaller --lr" in line
    assert (tmp_path / "checkpoint.safetensors").exists() == (first == 20)


def test_a_gradient_far_above_all_others_is_skipped(tmp_path):
    def accepts(run: Run, norm: float, loss: float = 1.0) -> bool:
        run.losses = {"mse": loss}
        return run.accepts(torch.tensor(norm))

    run = start(tmp_path, steps=1000)
    assert accepts(run, 1e6)  # nothing is usual yet
    assert all(accepts(run, 0.01 + step / 1e4) for step in range(1, 101))
    assert accepts(run, 10.0)  # clipping is enough
    norms = run.state["norms"]
    assert not accepts(run, 30.0) and run.state["skipped"] == 1 and run.state["norms"] == norms
    run.state["step"] = 102
    run.save()
    again = start(tmp_path, steps=1000, resume=True)
    assert again.state == run.state and not accepts(again, 30.0) and accepts(again, 1.0, loss=9.9)
    again.state["norms"] = [1e-9] * 100
    assert accepts(again, 0.9)  # a norm below 1 is never a spike


OTHER_RUNS = {
    "--lr 0.1, and this run has 0.2": dict(lr=0.2),
    "--seed 0, and this run has 1": dict(seed=1),
    "--steps 60, and this run has 61": dict(steps=61),
    "--batch-size 8, and this run has 16": dict(batch_size=16),
    "the LLM of fingerprint abc, and this run has def": dict(fingerprint="def"),
    "a wire of sha256 None, and this run has 123": dict(below="123"),
}


@pytest.mark.parametrize("named", OTHER_RUNS)
def test_a_checkpoint_of_another_run_is_refused_and_the_difference_named(named, tmp_path):
    path = train(start(tmp_path)).path
    saved = path.read_bytes()
    with pytest.raises(UserError) as caught:
        start(tmp_path, resume=True, **OTHER_RUNS[named])
    assert str(caught.value) == f"--resume: {path} was made with {named}"
    assert path.read_bytes() == saved


def test_flags_that_change_no_result_may_differ(tmp_path):
    first = start(tmp_path)
    with pytest.raises(SystemExit):
        train(first, lambda step: signal.raise_signal(signal.SIGTERM) if step == 20 else None)
    changed = dict(device="auto", micro_batch_size=4, gradient_checkpointing=True, eval_examples=3)
    assert set(changed) == set(MAY_CHANGE)
    resumed = train(start(tmp_path, resume=True, out="elsewhere", **changed))
    assert_same(resumed, train(start(tmp_path / "whole")))


def test_a_checkpoint_of_another_stage_is_refused(tmp_path):
    train(start(tmp_path))
    with pytest.raises(UserError, match="made by another stage"):
        start(tmp_path, resume=True, code_dim=8)


def test_a_new_run_takes_nothing_over_from_an_older_one(tmp_path):
    older = train(start(tmp_path))
    assert older.path.exists() and metrics_of(older)
    newer = start(tmp_path)
    assert not older.path.exists() and metrics_of(newer) == []
    evaluated = train(start(tmp_path, eval_only="wire"))
    assert evaluated.state["step"] == 0 and not evaluated.path.exists()


@pytest.mark.parametrize("seconds,expected", ((600.0, [15, 30, 45, 60]), (-1.0, list(range(1, 61)))))
def test_checkpoints_are_written_at_every_quarter_and_by_the_clock(seconds, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "SECONDS", seconds)
    run, found = start(tmp_path), []
    run.show = lambda: found.append(checkpoints.read_checkpoint(run.path)[1]["step"])  # what --resume would read
    train(run)
    assert found == expected


# --- report.png


@pytest.mark.parametrize("kind,positions", (("qa", 9), ("qa", 8), ("text", 9)))
def test_the_picture_shows_every_loss_and_the_controls_that_matter(kind, positions, tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    metrics = dict.fromkeys(RESULT_KEYS) | dict(nll_text=1.0, nll_wire=2.0, text_positions=9, positions=positions)
    metrics |= dict(text_bytes=9, zlib_bytes=8, packed_token_bytes=7, wire_bytes=6)
    if kind == "qa":
        metrics |= dict.fromkeys(("text_f1", "f1", "no_context_f1", "truncated_f1"), 50.0)  # and nothing to shuffle
    monkeypatch.setattr(plt, "close", lambda figure: None)
    history = [{"step": step, "lr": 1.0, "loss_ce": 1.0 + step % 2, "loss_mse": 0.0} for step in range(1, 41)]
    _, bars, unit = score_rows(metrics, {"before training": 3.0})
    draw_report(tmp_path / "report.png", history, "a run", bars, unit, metrics)
    figure = plt.gcf()
    monkeypatch.undo()
    plt.close(figure)
    curves, scores, _ = figure.axes
    mean, raw = (line.get_ydata() for line in curves.lines)  # a loss that is 0 throughout is not drawn
    assert list(raw) == [row["loss_ce"] for row in history] and mean[5:-5] == pytest.approx(1.5, abs=0.11)
    expected = ["text", "wire", "before training"] + ["no context"] * (kind == "qa") + ["truncated"] * (positions < 9)
    assert [label.get_text() for label in scores.get_yticklabels()] == expected
    assert ("NLL" in scores.get_title()) == ("NLL" in scores.get_xlabel()) == (kind == "text")
    assert ("answers" in scores.get_title()) == (kind == "qa") and figure.get_suptitle() == "a run"
