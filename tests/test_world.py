"""The embedded world and its two readers keep what the README promises of them."""

import re
from pathlib import Path

import pretrain
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import common
from tiny import world

TINY = Path(world.__file__).parent
SMALL = dict(num_hidden_layers=1, layer_types=["full_attention"], hidden_size=32)


def invented(rows: list[dict]) -> set[str]:
    """Capitalised words of these rows that the name grammar can produce."""
    words = set()
    for row in rows:
        words |= set(re.findall(r"[A-Z][a-z]+", " ".join([row["context"], row["question"], *row["answers"]])))
    ends = tuple(world.ENDS)
    return {word for word in words if word.startswith(tuple(world.STARTS)) and word.endswith(ends)}


def test_splits_share_no_invented_name():
    names = {split: invented(world.make_examples(split, 1500)) for split in world.SPLITS}
    ordinary = {"Every", "For", "Dark"}  # words of the templates
    names = {split: found - ordinary - set(world.MONTHS) for split, found in names.items()}
    assert all(len(found) > 1000 for found in names.values())
    assert not names["train"] & names["test"]
    assert not names["train"] & names["validation"]
    assert not names["test"] & names["validation"]


def test_passages_are_deterministic_and_say_their_answers():
    assert world.make_examples("test", 50) == world.make_examples("test", 50)
    assert world.make_example("test", 0, 7) == world.make_examples("test", 8)[7]
    assert world.make_example("test", 1, 7) != world.make_example("test", 0, 7)
    for row in world.make_examples("test", 500):
        assert 3 <= row["context"].count(".") <= 8
        assert row["answers"][0] in row["context"]


def test_passages_hold_distractors_and_answers_of_several_words():
    rows = world.make_examples("test", 500)
    assert sum(" " in row["answers"][0] for row in rows) > 50
    subject_again, relation_again = 0, 0
    for row in rows:
        for _, _, _, statements, questions in world.RELATIONS:
            patterns = [re.escape(q).replace(r"\{s\}", "(.+)") for q in questions]
            asked = next(filter(None, (re.fullmatch(pattern, row["question"]) for pattern in patterns)), None)
            if asked:
                facts = row["context"].rstrip(".").split(". ")
                subject_again += sum(re.search(rf"\b{asked[1]}\b", fact) is not None for fact in facts) > 1
                forms = [re.escape(s.rstrip(".")).replace(r"\{s\}", ".+").replace(r"\{v\}", ".+") for s in statements]
                relation_again += sum(any(re.fullmatch(form, fact) for form in forms) for fact in facts) > 1
                break
        else:
            raise AssertionError(f"no relation asks {row['question']}")
    # the shares that world.py's docstring states
    assert 0.4 < subject_again / len(rows) < 0.5 and 0.8 < relation_again / len(rows) < 0.9
    assert len(world.RELATIONS) >= 40 and len({r[0] for r in world.RELATIONS}) == len(world.RELATIONS)
    for _, _, _, statements, questions in world.RELATIONS:
        assert len(set(statements)) >= 3 and len(set(questions)) >= 3
        assert all("{s}" in s and "{v}" in s for s in statements) and all("{s}" in q for q in questions)


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="train, validation, test"):
        world.make_example("dev", 0, 0)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen"])
def test_shipped_reader_is_a_small_plain_hugging_face_directory_that_reads(name):
    directory = TINY / name
    assert sum(path.stat().st_size for path in directory.iterdir()) <= 12_000_000
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    for text in ("The dog Brasen is 71.", "naïve 🎉 東京\n\tTwo  spaces", "", "Question: Who?\nAnswer:"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    rows = world.make_examples("test", 200)
    # 95 is the floor on 1,000 test passages (README); on 200 of them, answers exactly right
    assert pretrain.answer_exact(model, tokenizer, rows) >= 92


def test_the_readers_differ():
    readers = [AutoModelForCausalLM.from_pretrained(TINY / name) for name in ("tiny-llama", "tiny-qwen")]
    llama, qwen = (reader.config for reader in readers)
    assert llama.model_type != qwen.model_type
    assert llama.hidden_size != qwen.hidden_size and llama.vocab_size != qwen.vocab_size
    tokenizers = [AutoTokenizer.from_pretrained(TINY / name) for name in ("tiny-llama", "tiny-qwen")]
    text = "The mayor of Selnor is Raltofa, aged 71."
    assert tokenizers[0].tokenize(text) != tokenizers[1].tokenize(text)


def test_the_reader_is_trained_on_the_prompt_that_the_stages_use():
    assert pretrain.PROMPT == common.PROMPT


def build_small(name: str):
    """As `pretrain.build`, but a model of one layer, with the tokenizer of the shipped reader."""
    tokenizer = AutoTokenizer.from_pretrained(TINY / name)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(TINY / name, **SMALL)
    return tokenizer, AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("build", (build_small, pytest.param(pretrain.build, marks=pytest.mark.slow)))
def test_interrupted_pretraining_ends_where_an_unbroken_one_does(build, tmp_path, monkeypatch):
    def pretrain_run(out, *flags):
        monkeypatch.setattr(
            "sys.argv", ["pretrain.py", "tiny-qwen", "--steps", "4", "--batch-size", "2", "--out", str(out), *flags]
        )
        pretrain.main()

    monkeypatch.setattr(pretrain, "build", build)
    pretrain_run(tmp_path / "whole")
    save, saved = pretrain.save_atomically, []

    def save_twice(payload, path):
        save(payload, path)
        saved.append(payload["step"])
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "save_atomically", save_twice)
    with pytest.raises(KeyboardInterrupt):
        pretrain_run(tmp_path / "broken")
    monkeypatch.setattr(pretrain, "save_atomically", save)
    pretrain_run(tmp_path / "broken", "--resume")
    whole, broken = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "broken"))
    assert saved == [1, 2]
    assert whole.keys() == broken.keys() and all(torch.equal(whole[name], broken[name]) for name in whole)
