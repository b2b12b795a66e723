"""The embedded world and its two readers keep what the README promises of them."""

import functools
import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import common
from tiny import facts, pretrain, values, world

TINY = Path(world.__file__).parent
NAMES = ("woman", "man", "surname", "town")
SMALL = dict(num_hidden_layers=1, layer_types=["full_attention"], hidden_size=32)


def names_in(rows: list[dict]) -> set[str]:
    """Names of the lists, and capitalised words that the grammar of names can produce."""
    text = " ".join(" ".join([row["context"], row["question"], *row["answers"]]) for row in rows)
    listed = {name for kind in NAMES for name in values.words()[kind]}
    found = {name for name in listed if " " in name and name in text}
    for word in set(re.findall(r"[A-Z][a-z]+", text)):
        grammar = word.startswith(tuple(values.STARTS)) and word.endswith(tuple(values.ENDS))
        if (word in listed or grammar) and word not in ordinary_words():  # Miss White, and white pills
            found.add(word)
    return found


@functools.cache
def ordinary_words() -> set[str]:
    """Capitalised words of the templates, and of lists that have no split."""
    kinds = [" ".join(items) for kind, items in values.words().items() if kind not in NAMES]
    text = " ".join([(TINY / "scenes.txt").read_text(), (TINY / "relations.txt").read_text(), *kinds])
    return {word.capitalize() for word in re.findall(r"[A-Za-z]+", text)} | set(values.MONTHS) | set(values.DAYS)


def test_splits_share_no_name():
    names = {split: names_in(world.make_examples(split, 1500, style="plain")) for split in values.SPLITS}
    assert all(len(found) > 500 for found in names.values())
    assert not names["train"] & names["test"]
    assert not names["train"] & names["validation"]
    assert not names["test"] & names["validation"]


def test_blended_names_are_new_and_of_their_split():
    maker = values.Maker(random.Random(0), "train", blended=1.0)
    names = {maker.listed("woman") for _ in range(300)}
    assert len(names - set(values.words()["woman"])) > 250
    assert all(values.split_of_name(name) == "train" for name in names)
    rows = [row for i in range(500) for row in world.make_questions("train", 0, i, blended=1.0)]
    assert not names_in(rows) & names_in(world.make_examples("test", 1500, style="plain"))


def test_passages_are_deterministic_and_say_their_answers():
    assert world.make_examples("test", 50) == world.make_examples("test", 50)
    assert world.make_example("test", 0, 7) == world.make_examples("test", 8)[7]
    assert world.make_example("test", 1, 7) != world.make_example("test", 0, 7)
    for style in (None, *world.STYLES):
        for row in world.make_examples("test", 300, style=style) + world.make_examples("test", 300, unseen=True):
            assert row["answers"][0].lower() in row["context"].lower(), row
            assert row["question"] and "{" not in row["context"] + row["question"] and "  " not in row["question"], row


def relation_words(unseen: bool) -> set[tuple[str, str]]:
    return {(relation.kind, relation.words[0]) for relation in facts.relations(unseen)}


def test_a_fifth_of_relations_forms_and_scenes_is_held_out():
    seen, unseen = relation_words(False), relation_words(True)
    assert not seen & unseen and len(seen | unseen) > 300
    assert len(unseen) / len(seen | unseen) > 1 / 6
    assert len(facts.relations(True)) / (len(facts.relations(True)) + len(facts.relations(False))) > 1 / 6
    assert len(world.scenes(True)) / (len(world.scenes(True)) + len(world.scenes(False))) >= 1 / 5
    listed = [set(forms) for forms in (facts.VERB_FORMS, facts.NOUN_FORMS, facts.ADJECTIVE_FORMS, facts.PAIR_FORMS)]
    held_out = [form for forms in listed for form in forms if form.startswith("*")]
    assert len(held_out) / sum(map(len, listed)) >= 1 / 5


def test_training_uses_nothing_that_is_held_out(monkeypatch):
    drawn = Counter()
    for name in ("verb_sentence", "noun_sentence", "adjective_sentence"):
        speak = getattr(facts, name)

        def spy(fact, form, rng, speak=speak):
            drawn[f"{fact.relation.kind} {fact.relation.words[0]}"] += 1
            drawn[f"form {form}"] += 1
            return speak(fact, form, rng)

        monkeypatch.setattr(facts, name, spy)
    say_two = world.say_two

    def spy_on_pairs(pair, *args):
        drawn[f"form {pair}"] += 1
        return say_two(pair, *args)

    monkeypatch.setattr(world, "say_two", spy_on_pairs)
    rng = random.Random(0)
    for _ in range(1500):
        world.make_facts(values.Maker(rng, "train"), False, 6)
    training = set(drawn)
    drawn.clear()
    for _ in range(500):
        world.make_facts(values.Maker(rng, "test"), True, 6)
    starred = {f"form {form}" for form in "pseudo_cleft one_who has_as with then when".split()}
    assert not training & starred and starred <= set(drawn)
    assert not {f"{kind} {word}" for kind, word in relation_words(True)} & training
    assert {key for key in drawn if not key.startswith("form")} <= {f"{k} {w}" for k, w in relation_words(True)}


def test_passages_hold_distractors():
    """Another subject with the asked relation, and another fact of the asked subject."""
    rng, both, passages = random.Random(0), 0, 400
    for _ in range(passages):
        made = []
        make_fact = world.make_fact

        def spy(maker, relation, subject, fresh, made=made, make_fact=make_fact):
            made.append((relation, subject.name))
            return make_fact(maker, relation, subject, fresh)

        world.make_fact = spy
        try:
            world.make_facts(values.Maker(rng, "test"), False, 6)
        finally:
            world.make_fact = make_fact
        relations, subjects = Counter(r for r, _ in made), Counter(s for _, s in made)
        both += any(relations[r] > 1 and subjects[s] > 1 for r, s in made)
    assert both / passages > 0.95


def test_questions_ask_for_every_argument():
    maker = values.Maker(random.Random(0), "test")
    give = next(r for r in facts.relations(False) if r.kind == "verb" and len(r.slots) == 3 and r.subject == "person")
    fact = facts.make_fact(maker, give, facts.make_subject(maker, "person"), False)
    answers = {answer for _, answer in facts.asked_of(fact, maker.rng)}
    assert fact.subject.name in answers
    for _, kind, text in fact.slots:
        assert (text.split(" ")[0] if kind == "count" else text) in answers


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="train, validation, test"):
        world.make_example("dev", 0, 0)


def test_everyday_rows_are_many_and_answered_by_their_passage():
    rows = [json.loads(line) for line in (TINY / "everyday.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len({row["context"] for row in rows}) >= 100
    assert len({(row["context"], row["question"]) for row in rows}) == len(rows)
    for row in rows:
        assert row.keys() == {"context", "question", "answers"}
        assert row["answers"] and all(answer in row["context"] for answer in row["answers"]), row


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen"])
def test_shipped_reader_is_a_small_plain_hugging_face_directory_that_reads(name):
    directory = TINY / name
    assert sum(path.stat().st_size for path in directory.iterdir()) <= 12_000_000
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    for text in ("The dog Brasen is 71.", "naïve 🎉 東京\n\tTwo  spaces", "", "Question: Who?\nAnswer:"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    rows = world.make_examples("test", 200)
    assert pretrain.answer_exact(model, tokenizer, rows) >= 80  # README has the F1 on 1,000 of them


def test_the_reader_is_trained_on_the_prompt_that_the_stages_use():
    assert pretrain.PROMPT == common.PROMPT


def build_small(name: str, real: pretrain.RealText, trained: Path | None):
    """As `pretrain.build`, but a model of one layer, with the tokenizer of the shipped reader."""
    tokenizer = AutoTokenizer.from_pretrained(TINY / name)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(TINY / name, **SMALL)
    return tokenizer, AutoModelForCausalLM.from_config(config)


@pytest.fixture
def real_text(tmp_path):
    """A small SQuAD file and a small file of stories."""
    context = "The bridge was built in 1850 by Ada Smith. It is 40 metres long. The town paid for it with a loan."
    asked = [("Who built the bridge?", "Ada Smith"), ("How long is the bridge?", "40 metres")]
    qas = [{"question": q, "answers": [{"text": a, "answer_start": context.index(a)}]} for q, a in asked]
    squad, stories = tmp_path / "squad.json", tmp_path / "stories.txt"
    squad.write_text(json.dumps({"data": [{"paragraphs": [{"context": context, "qas": qas}]}]}), encoding="utf-8")
    stories.write_text(
        "Once a fox met a hen in a quiet wood near the river.\n\nThey had soup with onions.", encoding="utf-8"
    )
    return squad, stories


def test_real_text_gives_questions_that_its_window_answers(real_text):
    real, rng = pretrain.RealText(*real_text), random.Random(0)
    for make in (real.questions, real.cloze):
        for _ in range(50):
            window, asked = make(rng)
            assert asked and all(answer in window for _, answer in asked), (window, asked)


@pytest.mark.parametrize("build", (build_small, pytest.param(pretrain.build, marks=pytest.mark.slow)))
def test_interrupted_pretraining_ends_where_an_unbroken_one_does(build, tmp_path, monkeypatch, real_text):
    def pretrain_run(out, *flags):
        sizes = ["--steps", "8", "--batch-tokens", "512", "--out", str(out)]
        files = ["--squad", str(real_text[0]), "--stories", str(real_text[1])]
        monkeypatch.setattr("sys.argv", ["pretrain.py", "tiny-qwen", *sizes, *files, *flags])
        pretrain.main()

    monkeypatch.setattr(pretrain, "build", build)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # a minute and a half a run
    monkeypatch.setattr(pretrain, "POOL", 28)  # two rows for 512 tokens
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 2)  # pools
    monkeypatch.setattr(pretrain, "COPY_POOLS", 1)
    monkeypatch.setattr(pretrain, "FACT_POOLS", 1)  # every pool grows: copying, 2, 3, 4 facts
    pretrain_run(tmp_path / "whole")
    save = pretrain.save_atomically

    def save_once(payload, path):
        save(payload, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "save_atomically", save_once)
    with pytest.raises(KeyboardInterrupt):
        pretrain_run(tmp_path / "broken")
    monkeypatch.setattr(pretrain, "save_atomically", save)
    pretrain_run(tmp_path / "broken", "--resume")
    whole, broken = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "broken"))
    assert whole.keys() == broken.keys() and all(torch.equal(whole[name], broken[name]) for name in whole)


def test_pretraining_for_some_minutes_ends_when_they_are_over(tmp_path, monkeypatch, capsys, real_text):
    monkeypatch.setattr(pretrain, "build", build_small)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    ticks, shares = itertools.count(), []
    monkeypatch.setattr(pretrain, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))  # a second a look
    monkeypatch.setattr(pretrain, "learning_rate", lambda peak, step, done: shares.append(done) or peak)
    files = ["--squad", str(real_text[0]), "--stories", str(real_text[1]), "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["pretrain.py", "tiny-qwen", "--minutes", "0.1", "--batch-tokens", "512", *files])
    pretrain.main()
    assert sorted(set(shares)) == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6])
    assert (tmp_path / "model.safetensors").exists()
    for minutes in ("0", "-1"):
        monkeypatch.setattr("sys.argv", ["pretrain.py", "tiny-qwen", "--minutes", minutes, *files])
        with pytest.raises(SystemExit, match="2"):
            pretrain.main()
        assert "--steps, --minutes and --lr must be above 0" in capsys.readouterr().err
