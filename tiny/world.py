"""A small world to read about: short English passages whose questions can only be answered by reading them.

A passage tells facts (facts.py) about a few subjects: active, passive, two facts in one sentence, a pronoun in the
next, ... Three in ten passages are everyday texts instead (scenes.txt). values.py fills both with names and words.

No name is in two splits. So an answer is read or it is wrong; it cannot be recalled. Passages of three facts or more
have distractors: another subject with the same relation, and another fact about the same subject.

A fifth of the relations and scenes are held out by a hash, and a fifth of the forms by a star (facts.py): training uses
none of them. Unseen passages have only such relations and scenes, and mostly such forms.

    python -m tiny.world --split test --seed 0 --examples 3     # look at some
    python -m tiny.world --unseen                               # held-out relations, forms and scenes

Everything follows from (split, seed, index): the i-th example is the same on every machine, in any order of asking.
"""

import argparse
import functools
import hashlib
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

from tiny.facts import (
    PAIR_FORMS,
    Fact,
    Questions,
    Relation,
    Subject,
    asked_of,
    capitalised,
    forms,
    make_fact,
    make_subject,
    relations_of,
    say,
    say_two,
    sentence,
    starred,
)
from tiny.values import SPLITS, Maker, held_out

TEMPLATES = Path(__file__).with_name("scenes.txt")
SCENES = 0.3  # of the passages are everyday texts
STYLED = 0.1  # of the passages are written in one of STYLES
NONCE = 0.3  # of the training relations are words that do not exist, or mean something else: only matching helps
SUBJECTS = "person person person person town ship firm dog group building place".split()  # as often as drawn


# ---------------------------------------------------------------------------------------------------------------------
# passages of facts


def make_facts(maker: Maker, unseen: bool, facts: int) -> tuple[str, Questions]:
    """A passage of about `facts` facts: (text, its questions), both in random order.

    Two or three subjects of one kind share a relation, so that subject and relation must both be matched. Each of them
    may have other facts, too. This repeats with another kind of subject until there are enough facts.
    """
    rng = maker.rng
    blocks, asked, count = [], [], 0
    while count < facts:
        kind = rng.choice(SUBJECTS)
        if not relations_of(kind, unseen):
            continue
        room = facts - count
        subjects = [make_subject(maker, kind) for _ in range(rng.randint(2, 3) if room > 1 else 1)]
        most = 1 + max(1, room // len(subjects))
        each = rng.randint(min(2, most) if room > 2 else 1, most)  # facts of a subject
        shared, *others = pick_relations(maker, kind, unseen, 1 + each * len(subjects))
        for subject in subjects:
            if count >= facts:
                break
            own = [shared]
            for _ in range(min(each - 1, facts - count - 1, len(others))):
                # half of the other relations stay for the next subject
                other = others[0] if rng.random() < 0.5 else others.pop(0)
                if other not in own:
                    own.append(other)
            made = [make_fact(maker, relation, subject, fresh) for relation, fresh in own]
            rng.shuffle(made)
            count += len(made)
            said, questions = tell(maker, subject, made, unseen)
            blocks.append(said)
            asked += questions
    rng.shuffle(blocks)
    rng.shuffle(asked)
    return join_blocks(blocks, rng), asked


def pick_relations(maker: Maker, kind: str, unseen: bool, count: int) -> list[tuple[Relation, bool]]:
    """Up to `count` relations of different words for a kind of subject, each with whether its words are made up."""
    rng, known = maker.rng, relations_of(kind, unseen)
    may_be_nonce = maker.split == "train" and not unseen
    picked, words = [], set()
    for relation in rng.sample(known, len(known)):
        if relation.words[0] not in words:
            words.add(relation.words[0])
            picked.append((relation, may_be_nonce and rng.random() < NONCE))
        if len(picked) == count:
            break
    return picked


def tell(maker: Maker, subject: Subject, facts: list[Fact], unseen: bool) -> tuple[list[str], Questions]:
    """Clauses about one subject, which stay in this order, and the questions about them."""
    rng, said, left = maker.rng, [], list(facts)
    asked = [question for fact in facts for question in asked_of(fact, rng)]
    by_pronoun = False  # whether the sentence begins with "she", "he" or "it"; never two in a row
    while left:
        fact, after_pronoun, by_pronoun = left.pop(0), by_pronoun, False
        is_noun = fact.relation.kind == "noun"
        pair = pair_form(subject, unseen, rng) if left else "alone"
        nouns = [other for other in left if other.relation.kind == "noun"]
        name = subject.mention(rng)
        speakable = bool(left) and not is_noun and left[0].relation.kind != "noun" and left[0].tense == fact.tense
        if pair not in ("alone", "whose") and speakable:
            text = say_two(pair, name, subject, fact.predicate(), left.pop(0).predicate())
        elif pair == "whose" and nouns and subject.is_person and not is_noun:
            noun = nouns[0]
            left.remove(noun)
            aside = f"whose {noun.relation.words[0]} {noun.copula()} {noun.value}"
            text = f"{name}, {aside}, {fact.predicate()}"  # Ann, whose boss is Ben, met Carl
        elif said and not after_pronoun and not is_noun and rng.random() < 0.5:
            by_pronoun = True
            predicate = fact.predicate()
            first, _, others = predicate.partition(" ")
            if rng.random() < 1 / 3 and first not in ("was", "is"):  # she also met Carl; she will also meet Carl
                predicate = f"will also {others}" if first == "will" else f"also {predicate}"
            text = f"{subject.pronoun} {predicate}"
        elif said and is_noun and rng.random() < 0.4:
            possessive = {"she": "her", "he": "his", "it": "its"}[subject.pronoun]
            text = f"{possessive} {fact.relation.words[0]} {fact.copula()} {fact.value}"  # her boss is Ben
        elif not said and subject.is_person and fact.relation.kind == "verb" and rng.random() < 0.25:
            apposition, questions = introduce(maker, subject)
            text = f"{name}{apposition} {fact.predicate()}"  # Ann, a baker from York, met Carl
            asked += questions
        else:
            text = say(fact, unseen, rng)
        said.append(re.sub(" +", " ", text).strip())
    return said, asked


def pair_form(subject: Subject, unseen: bool, rng: random.Random) -> str:
    """One of PAIR_FORMS. Half of the unseen pairs are drawn from those with a star alone."""
    if subject.kind in ("building", "place"):
        return "alone"
    possible = forms(PAIR_FORMS, unseen)
    pair = rng.choice(possible)
    if unseen and pair != "alone" and rng.random() < 0.5:
        pair = rng.choice(starred(PAIR_FORMS, possible))
    return pair


def introduce(maker: Maker, subject: Subject) -> tuple[str, Questions]:
    """An apposition for a person, such as ", a baker from York,", with its questions."""
    rng, name = maker.rng, subject.name
    match rng.randrange(3):
        case 0:
            job, town = maker.value("job"), maker.value("town")
            what = rng.choice(
                (f"What is {name}'s job?", f"What does {name} do for a living?", f"What is the job of {name}?")
            )
            where = rng.choice(
                (f"Where does {name} come from?", f"Where is {name} from?", f"Which town is {name} from?")
            )
            return f", {job} from {town},", [(what, job), (where, town)]
        case 1:
            age = str(rng.randint(4, 98))
            return f", {age},", [(rng.choice((f"How old is {name}?", f"What is the age of {name}?")), age)]
    roles = "captain ship, owner firm, director firm, mayor town, leader group, founder town, owner dog"
    role, kind = rng.choice(roles.split(", ")).split()
    other = make_subject(maker, kind).mention(rng)
    return f", the {role} of {other},", [(f"Who is the {role} of {other}?", name)]


def join_blocks(blocks: list[list[str]], rng: random.Random) -> str:
    """One text. A fifth of the blocks begin inside the sentence before: "Ann met Ben, while Carl saw a fox." """
    clauses: list[str] = []
    for first, *others in blocks:
        long = clauses and re.search(r", (while|but|and) ", clauses[-1])
        if clauses and rng.random() < 0.2 and not long and not first.startswith(("as for", "first", "because", "when")):
            clauses[-1] += f", {rng.choice(('while', 'but', 'and'))} {first}"
        else:
            clauses.append(first)
        clauses += others
    return " ".join(sentence(clause) for clause in clauses)


# ---------------------------------------------------------------------------------------------------------------------
# everyday texts, from templates

SLOT = re.compile(r"\{([^}]+)\}")


@functools.cache
def scenes(unseen: bool) -> list[tuple[list[str], list[tuple[str, str]]]]:
    """The scenes that training uses, or those it never sees: (lines of text, (questions, answer) lines) of each.

    In scenes.txt, " / " is between wordings, of which one is drawn, and "~ " before a line of text that may be left
    out. A slot {thing:1} has the same value wherever it stands; {thing:1!} is that value without its article.

        I left {thing:1} in {room:1}. / You will find {thing:1} in {room:1}.
        ~ Sorry for the mess. / Hope you slept well.
        ? Where is the {thing:1!}? / In which room is the {thing:1!}? | {room:1}
    """
    found = []
    for part in re.split(r"\n\s*\n", TEMPLATES.read_text(encoding="utf-8")):
        lines = [line for line in part.splitlines() if line and not line.startswith("#")]
        text = [line for line in lines if not line.startswith("? ")]
        asked = [line.removeprefix("? ").rsplit(" | ", 1) for line in lines if line.startswith("? ")]
        if text and asked and held_out(text[0]) == unseen:
            found.append((text, asked))
    return found


def make_scene(maker: Maker, unseen: bool) -> tuple[str, Questions]:
    """An everyday text, and those of its questions that the drawn wordings answer."""
    rng = maker.rng
    text, asked = rng.choice(scenes(unseen))
    values: dict[str, str] = {}  # "thing:1" -> "a ring"

    def value_of(match: re.Match) -> str:
        slot = match[1].removesuffix("!")
        if slot not in values:
            values[slot] = maker.value(slot.split(":")[0])
        return re.sub("^(an?|the) ", "", values[slot]) if match[1].endswith("!") else values[slot]

    said = []
    for line in text:
        if not line.startswith("~ ") or rng.random() < 0.5:
            wording = rng.choice(line.removeprefix("~ ").split(" / "))
            said.append(capitalised(SLOT.sub(value_of, wording)))
    context = rng.choice((" ", " ", " ", "\n")).join(said)
    questions = []
    for wordings, answer in asked:
        question = rng.choice(wordings.split(" / "))
        slots = {slot.removesuffix("!") for slot in SLOT.findall(question + answer)}
        if slots <= values.keys() and SLOT.sub(value_of, answer) in context:
            questions.append((capitalised(SLOT.sub(value_of, question)), SLOT.sub(value_of, answer)))
    rng.shuffle(questions)
    return context, questions


# ---------------------------------------------------------------------------------------------------------------------
# styles: the same passage as nobody wrote it in the templates

ACCENTS = str.maketrans("aeioucnAEIOUCN", "áéíöüçñÁÉÍÖÜÇÑ")
EMOJI = "😀🚀🌍🎉🐟🍞"


def with_digits(text: str) -> str:
    """Names get a number, the same one wherever they stand: "Anna" is "Anna87"."""
    return re.sub(r"\b[A-Z][a-z]{3,}\b", lambda name: f"{name[0]}{hashlib.sha256(name[0].encode()).digest()[1]}", text)


def with_emoji(text: str) -> str:
    """An emoji after every sentence."""
    return re.sub(r"[.?](\s|$)", lambda end: f"{end[0].strip()} {EMOJI[end.start() % len(EMOJI)]} ", text).strip()


STYLES: dict[str, Callable[[str], str]] = {
    "plain": str,
    "upper": str.upper,
    "lower": str.lower,
    "digits": with_digits,
    "accents": lambda text: text.translate(ACCENTS),
    "emoji": with_emoji,
}


# ---------------------------------------------------------------------------------------------------------------------
# passages and examples


def make_passage(
    rng: random.Random, split: str, facts: int, unseen: bool = False, style: str | None = None, blended: float = 0.0
) -> tuple[str, Questions]:
    """A passage of about `facts` facts, or an everyday text, and its questions in random order.

    unseen: only relations and scenes that training never uses, and such forms, too. style: one of STYLES, or drawn.
    blended: the share of the listed names that are made of two.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    maker = Maker(rng, split, blended)
    context, asked = make_scene(maker, unseen) if rng.random() < SCENES else make_facts(maker, unseen, facts)
    if style is None:
        style = rng.choice(list(STYLES)[1:]) if rng.random() < STYLED else "plain"
    write = STYLES[style]
    return write(context), [(write(question), write(answer)) for question, answer in asked]


def make_questions(
    split: str, seed: int, index: int, unseen: bool = False, style: str | None = None, blended: float = 0.0
) -> list[dict]:
    """The index-th passage of a split, 3-8 facts: a row {"context", "question", "answers": [one]} for each question."""
    rng = random.Random(f"{split}/{seed}/{index}" + "/unseen" * unseen)  # a str seed: the same on every platform
    context, questions = make_passage(rng, split, rng.randint(3, 8), unseen, style, blended)
    return [{"context": context, "question": question, "answers": [answer]} for question, answer in questions]


def make_example(split: str, seed: int, index: int, unseen: bool = False, style: str | None = None) -> dict:
    """The index-th example of a split: a passage with the first of its questions."""
    return make_questions(split, seed, index, unseen, style)[0]


def make_examples(split: str, count: int, seed: int = 0, unseen: bool = False, style: str | None = None) -> list[dict]:
    """The first `count` examples of a split. Training is unlimited; test sets are fixed by their seed (0)."""
    return [make_example(split, seed, index, unseen, style) for index in range(count)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="print examples as JSON lines", allow_abbrev=False)
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples", type=int, default=3)
    parser.add_argument("--unseen", action=argparse.BooleanOptionalAction, default=False)
    args = parser.parse_args()
    for row in make_examples(args.split, args.examples, args.seed, args.unseen):
        print(json.dumps(row, ensure_ascii=False))
