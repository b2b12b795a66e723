"""Facts of the world, the sentences that state them and the questions that ask for them.

A fact is a relation (a verb, noun or adjective of relations.txt) about a subject, with its slots filled (values.py). A
sentence states it in one of many forms, and there is a question for every slot. Most examples in the comments are of
one fact: Ann gave a cup to Ben.
"""

import dataclasses
import functools
import random
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tiny.values import Maker, an, held_out, nonce, words

RELATIONS = Path(__file__).with_name("relations.txt")
Questions = list[tuple[str, str]]  # (question, answer)


# ---------------------------------------------------------------------------------------------------------------------
# relations


@dataclass(frozen=True)
class Relation:
    """A line of relations.txt, such as: person | give gave given | {thing} to {person}"""

    kind: str  # "verb", "noun" or "adjective"
    subject: str  # kind of subject: "person"
    words: tuple[str, ...]  # (base, past, participle or "-"), (noun,) or (adjective, dimension)
    slots: tuple[tuple[str, str], ...]  # (preposition, kind of value): ("", "thing"), ("to", "person")


@functools.cache
def relations(unseen: bool) -> list[Relation]:
    """The relations that training uses, or those it never sees."""
    found, section = [], ""
    for line in RELATIONS.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section = line.strip("[]").removesuffix("s")
        elif line and not line.startswith("#"):
            subject, said, slots, *dimension = [part.strip() for part in line.split("|")]
            if section == "verb":
                parsed = re.findall(r"(?:(\w+) )?\{(\w+)\}", slots)
                found.append(Relation("verb", subject, tuple(said.split()), tuple(parsed)))
            else:
                found.append(Relation(section, subject, (said, *dimension), (("", slots),)))
    return [relation for relation in found if held_out(f"{relation.kind} {relation.words[0]}") == unseen]


@functools.cache
def relations_of(subject: str, unseen: bool) -> list[Relation]:
    """Those of `relations` that a kind of subject can have."""
    return [relation for relation in relations(unseen) if relation.subject == subject]


# ---------------------------------------------------------------------------------------------------------------------
# facts: a relation about a subject, with its slots filled

TENSES = {"past": 60, "present": 28, "future": 12}  # per cent of the verbs and adjectives
PAST_NOUNS = 0.15  # of the nouns; the rest are in the present
ADDITIONS = {0: 50, 1: 38, 2: 12}  # how many additions a verb has: per cent


@dataclass
class Subject:
    """Who or what a fact is about."""

    kind: str
    name: str
    pronoun: str
    known: bool = False  # whether a sentence has named it: "a mill", then "the mill"

    def mention(self, rng: random.Random, asked: bool = False) -> str:
        """The subject as a sentence names it, or as a question does, where a first name may be enough."""
        if asked and self.kind == "person" and rng.random() < 0.4:
            return self.name.split(" ")[0]
        if self.kind == "building":
            known, self.known = self.known or asked, self.known or not asked
            return definite(self.name) if known else self.name
        if self.kind == "dog" or (self.kind == "ship" and rng.random() < 0.6):
            return f"the {self.kind} {self.name}"
        if self.kind == "firm" and rng.random() < 0.3:
            return f"the firm {self.name}"
        return f"the {self.name}" if self.kind == "ship" else self.name

    @property
    def is_person(self) -> bool:
        return self.kind == "person"


def make_subject(maker: Maker, kind: str) -> Subject:
    """A subject of this kind with a new name. A quarter of the people have a surname."""
    if kind != "person":
        return Subject(kind, maker.value(kind), "it")
    gender = maker.rng.choice(("woman", "man"))
    name = maker.value(gender)
    if maker.rng.random() < 0.25:
        name += " " + maker.value("surname")
    return Subject(kind, name, "she" if gender == "woman" else "he")


class Slot(NamedTuple):
    """An argument of a relation, or an addition: "to Ben", "a cup", "on Monday"."""

    preposition: str  # or ""
    kind: str
    text: str

    @property
    def says_why(self) -> bool:
        return self.kind in ("reason", "purpose")

    def phrase(self, retold: bool = False) -> str:
        """With its preposition; `retold`: as a question repeats it."""
        text = definite(self.text) if retold and self.kind not in ("timephrase", "job") else self.text
        return f"{self.preposition} {text}".strip()

    @property
    def is_plural(self) -> bool:
        return self.kind in MAY_BE_PLURAL and bool(re.search(r"[^su]s$", self.text)) and self.text[:2] != "a "


MAY_BE_PLURAL = ("food", "goods", "count", "part", "plant", "thing", "clothes")


@dataclass
class Fact:
    """A relation about a subject: what is said, and asked."""

    relation: Relation
    subject: Subject
    slots: list[Slot]  # arguments, then additions
    tense: str  # "past", "present" or "future"

    @property
    def value(self) -> str:
        """What fills the first slot, which is the only one of a noun or an adjective."""
        return self.slots[0].text

    @property
    def has_object(self) -> bool:
        """Whether the first slot of a verb is its direct object."""
        return self.slots[0].preposition == ""

    @property
    def has_passive(self) -> bool:
        return self.relation.words[2] != "-"

    def verb(self) -> str:
        base, past, _ = self.relation.words
        return {"past": past, "present": third_person(base), "future": f"will {base}"}[self.tense]

    def do(self) -> str:
        return {"past": "did", "present": "does", "future": "will"}[self.tense]

    def be(self, plural: bool = False) -> str:
        past, present = ("were", "are") if plural else ("was", "is")
        return {"past": past, "present": present, "future": "will be"}[self.tense]

    def copula(self) -> str:
        """Of a noun, an adjective or a cleft: these are never in the future."""
        return "was" if self.tense == "past" else "is"

    def have(self) -> str:
        return "had" if self.tense == "past" else "has"

    def rest(self, without: Collection[int] = (), retold: bool = False) -> str:
        """The slots in their order; `without`: indices of some to leave out; `retold`: as a question repeats them."""
        return " ".join(slot.phrase(retold) for i, slot in enumerate(self.slots) if i not in without)

    def predicate(self) -> str:
        """All but the subject, of a verb or an adjective: "gave a cup to Ben", "is 3 metres tall"."""
        if self.relation.kind == "verb":
            return f"{self.verb()} {self.rest()}"
        return f"{self.copula()} {self.value} {self.relation.words[0]}"


def third_person(base: str) -> str:
    """Of a verb: "gives", "washes", "carries"."""
    if re.search(r"[^aeiou]y$", base):
        return base[:-1] + "ies"
    return base + ("es" if re.search(r"(s|x|z|ch|sh|o)$", base) else "s")


def definite(text: str) -> str:
    """As a question repeats it: "a silver ring" is "the silver ring"."""
    return re.sub(r"^an? ", "the ", text)


def make_fact(maker: Maker, relation: Relation, subject: Subject, fresh: bool) -> Fact:
    """The relation about this subject; `fresh`: with a verb or noun that does not exist."""
    rng = maker.rng
    tense = rng.choices(list(TENSES), list(TENSES.values()))[0]
    if relation.kind == "noun":
        tense = "past" if rng.random() < PAST_NOUNS else "present"
    if fresh and relation.kind != "adjective":
        relation = dataclasses.replace(relation, words=nonce_words(relation, rng))
    slots = [fill(maker, preposition, kind, tense) for preposition, kind in relation.slots]
    if relation.kind == "verb":
        slots += additions(maker, relation, tense)
    return Fact(relation, subject, slots, tense)


def nonce_words(relation: Relation, rng: random.Random) -> tuple[str, ...]:
    """The words of a relation that does not exist: ("grimp", "grimped", "grimped"), or ("kettle",) of a person."""
    word = nonce(rng) if rng.random() < 0.6 else rng.choice(ordinary_words())
    if relation.kind == "noun":
        return (word,)
    past = word + ("d" if word.endswith("e") else "ed")
    return (word, past, "-" if relation.words[2] == "-" else past)


@functools.cache
def ordinary_words() -> list[str]:
    """Lower-case words of words.txt that no relation has, in the order of the file."""
    text = " ".join(item for items in words().values() for item in items)
    taken = {word for unseen in (False, True) for relation in relations(unseen) for word in relation.words}
    taken = {word for said in taken for word in said.split()}
    return [word for word in dict.fromkeys(re.findall(r"\b[a-z]{3,}\b", text)) if word not in taken]


def fill(maker: Maker, preposition: str, kind: str, tense: str) -> Slot:
    """A slot with a value: "to Ben", or "by train", without an article. Only the past has years."""
    text = maker.value(kind)
    if kind == "date" and tense != "past":
        text = re.sub(r" \d{4}$", "", text)
    if (preposition, kind) == ("by", "vehicle"):
        text = re.sub("^an? ", "", text)
    return Slot(preposition, kind, text)


# a sentence has at most one addition of a theme; a kind that is not here is its own theme
THEMES = {
    **dict.fromkeys(("date", "day", "clock", "year", "timephrase"), "time"),
    **dict.fromkeys(("town", "place"), "where"),
    **dict.fromkeys(("reason", "purpose"), "why"),
}


def additions(maker: Maker, relation: Relation, tense: str) -> list[Slot]:
    """Up to two additions to a verb: a time, a place, company, a manner, a reason or a purpose."""
    rng, has = maker.rng, {kind for _, kind in relation.slots}
    choices = []
    if not has & {"date", "clock", "year", "duration"}:
        choices += [("on", "date"), ("on", "day"), ("at", "clock")]
        choices += [("", "timephrase")] if tense == "past" else [("on", "day")]
        choices += [("in", "year")] if tense == "past" else []
    if relation.subject in ("person", "dog") and not has & {"town", "place", "room", "country"}:
        choices += [("in", "town"), ("at", "place")]
    if relation.subject == "person":
        choices += [("with", "person")] if "person" not in has else []
        choices += [("", "manner"), ("to", "purpose")]
        choices += [("because", "reason")] * 2 if tense == "past" else []
    count = rng.choices(list(ADDITIONS), list(ADDITIONS.values()))[0]
    slots: list[Slot] = []
    for preposition, kind in rng.sample(choices, min(count, len(choices))):
        if THEMES.get(kind, kind) not in {THEMES.get(slot.kind, slot.kind) for slot in slots}:
            slots.append(fill(maker, preposition, kind, tense))
    return sorted(slots, key=lambda slot: slot.says_why)  # reasons stand last


# ---------------------------------------------------------------------------------------------------------------------
# sentences. A form stands in its list as often as it is drawn, and training never uses one with a star.

VERB_FORMS = "active active active front passive cleft_subject cleft_argument dative *pseudo_cleft *one_who".split()
NOUN_FORMS = "of of genitive genitive inverse cleft as_for *has_as".split()
ADJECTIVE_FORMS = "plain plain of has *with".split()
PAIR_FORMS = "alone alone alone coordination relative whose *then *when".split()  # of two facts about one subject

DATIVES = "give lend send show hand offer promise sell teach bring owe tell".split()
FRONTED = "date day clock timephrase year town place reason".split()  # additions that can stand in front
STARRED = 0.6  # of the unseen sentences that can have a form with a star are drawn from those alone


def forms(listed: list[str], unseen: bool) -> list[str]:
    """Forms to draw from. Unseen passages have those with a star, too."""
    return [form.lstrip("*") for form in listed if unseen or not form.startswith("*")]


def starred(listed: list[str], possible: list[str]) -> list[str]:
    """Those of the possible forms that have a star."""
    return [form for form in possible if "*" + form in listed]


def capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def sentence(text: str, end: str = ".") -> str:
    """With single spaces, a capital and a full stop."""
    return capitalised(re.sub(" +", " ", text).strip()) + end


def say(fact: Fact, unseen: bool, rng: random.Random) -> str:
    """One fact in one of its forms, without capital and full stop."""
    listed, speak = {
        "verb": (VERB_FORMS, verb_sentence),
        "noun": (NOUN_FORMS, noun_sentence),
        "adjective": (ADJECTIVE_FORMS, adjective_sentence),
    }[fact.relation.kind]
    possible = verb_forms(fact, unseen) if fact.relation.kind == "verb" else forms(listed, unseen)
    held_out = starred(listed, possible)
    if held_out and rng.random() < STARRED:
        possible = held_out
    return speak(fact, rng.choice(possible), rng)


def verb_forms(fact: Fact, unseen: bool) -> list[str]:
    """The forms that this fact can take."""
    short = not any(slot.says_why for slot in fact.slots)
    may_be_what = fact.has_object and fact.slots[0].kind not in ("person", "town", "ship", "firm", "group")
    to_person = fact.has_object and fact.relation.slots[1:2] == (("to", "person"),)
    fits = {
        "front": fronted(fact) is not None,
        "passive": fact.has_passive and short,
        "cleft_argument": short,
        "dative": to_person and fact.relation.words[0] in DATIVES,
        "pseudo_cleft": may_be_what and short,
        "one_who": fact.subject.kind in ("person", "dog"),
    }
    return [form for form in forms(VERB_FORMS, unseen) if fits.get(form, True)]


def fronted(fact: Fact) -> int | None:
    """The index of the first addition that can stand in front."""
    arguments = len(fact.relation.slots)
    return next((i for i, slot in enumerate(fact.slots) if i >= arguments and slot.kind in FRONTED), None)


def verb_sentence(fact: Fact, form: str, rng: random.Random) -> str:
    """A verb in one of VERB_FORMS."""
    subject, verb, slots = fact.subject.mention(rng), fact.verb(), fact.slots
    that = "who" if fact.subject.is_person else "that"
    match form:
        case "active":  # Ann gave a cup to Ben on Monday
            return f"{subject} {fact.predicate()}"
        case "front":  # on Monday Ann gave a cup to Ben; the bus was late, so Ann gave a cup to Ben
            i = fronted(fact)
            clause = f"{subject} {verb} {fact.rest(without=[i])}"
            if slots[i].kind == "reason":
                return f"{slots[i].text}, so {clause}" if rng.random() < 0.5 else f"{slots[i].phrase()}, {clause}"
            return f"{slots[i].phrase()}{rng.choice((',', ''))} {clause}"
        case "passive":  # a cup was given by Ann to Ben; a cup was given to Ben by Ann
            rest = fact.rest(without=[0])
            agent = rng.choice((f"by {subject} {rest}", f"{rest} by {subject}"))
            return f"{fact.value} {fact.be(slots[0].is_plural)} {fact.relation.words[2]} {agent}"
        case "cleft_subject":  # it was Ann who gave a cup to Ben
            return f"it {fact.copula()} {subject} {that} {fact.predicate()}"
        case "cleft_argument":  # it was to Ben that Ann gave a cup
            i = rng.randrange(len(fact.relation.slots))
            return f"it {fact.copula()} {slots[i].phrase()} that {subject} {verb} {fact.rest(without=[i])}"
        case "dative":  # Ann gave Ben a cup
            return f"{subject} {verb} {slots[1].text} {fact.value} {fact.rest(without=[0, 1])}"
        case "pseudo_cleft":  # what Ann gave to Ben was a cup
            return f"what {subject} {verb} {fact.rest(without=[0])} {fact.copula()} {fact.value}"
        case "one_who":  # Ann was the one who gave a cup to Ben
            return f"{subject} {fact.copula()} the one {that} {fact.predicate()}"
    raise ValueError(form)


def genitive(name: str) -> str:
    return name + ("'" if name.endswith("s") else "'s")


def noun_sentence(fact: Fact, form: str, rng: random.Random) -> str:
    """A noun in one of NOUN_FORMS."""
    subject, (noun,), value, be = fact.subject.mention(rng), fact.relation.words, fact.value, fact.copula()
    are = {"was": "were", "is": "are"}[be] if fact.slots[0].is_plural else be
    article = rng.choice(("the", an(noun)))
    return {
        "of": f"the {noun} of {subject} {be} {value}",  # the boss of Ann is Ben
        "genitive": f"{genitive(subject)} {noun} {be} {value}",  # Ann's boss is Ben
        "inverse": f"{value} {are} the {noun} of {subject}",  # Ben is the boss of Ann
        "cleft": f"it {be} {value} that {be} the {noun} of {subject}",  # it is Ben that is the boss of Ann
        "as_for": f"as for {subject}, the {noun} {be} {value}",  # as for Ann, the boss is Ben
        "has_as": f"{subject} {fact.have()} {value} as {article} {noun}",  # Ann has Ben as a boss
    }[form]


def adjective_sentence(fact: Fact, form: str, rng: random.Random) -> str:
    """An adjective in one of ADJECTIVE_FORMS."""
    subject, (adjective, dimension), value = fact.subject.mention(rng), fact.relation.words, fact.value
    a_dimension = f"{an(dimension)} {dimension}"
    return {
        "plain": f"{subject} {fact.copula()} {value} {adjective}",  # the ship Elka is 80 metres long
        "of": f"the {dimension} of {subject} {fact.copula()} {value}",  # the length of the ship Elka is 80 metres
        "has": f"{subject} {fact.have()} {a_dimension} of {value}",  # the ship Elka has a length of 80 metres
        "with": f"with {a_dimension} of {value}, {subject} {'stood' if fact.tense == 'past' else 'stands'} out",
    }[form]


def say_two(pair: str, name: str, subject: Subject, one: str, two: str) -> str:
    """Two predicates about one subject in one sentence."""
    if pair == "when" and "because" in one:
        pair = "coordination"  # one subordinate clause is enough
    match pair:
        case "relative":  # Ann, who is 4 feet tall, gave a cup to Ben
            return f"{name}, {'who' if subject.is_person else 'which'} {one}, {two}"
        case "then":  # first Ann met Ben, then gave a cup to Carl
            return f"first {name} {one}, then {two}"
        case "when":  # when Ann met Ben, she gave a cup to Carl
            return f"when {name} {one}, {subject.pronoun} {two}"
        case "coordination":  # Ann met Ben and gave a cup to Carl
            return f"{name} {one} and {two}"
    raise ValueError(pair)


# ---------------------------------------------------------------------------------------------------------------------
# questions: for every slot of a fact, and for its subject

# kinds that can follow "which"; the others, such as "thing" and "part", would sound odd there
NAMED = (
    "vehicle drink animal instrument sport subject material colour town country room place goods event plant language "
    "illness clothes document building group firm ship prize"
).split()
CLASSES = {kind: kind for kind in NAMED} | {"food": "dish"}
WHERE = ("town", "country", "place", "room", "building")
WHEN = {
    "clock": "at what time",
    "year": "in which year",
    "date": "on what date",
    "day": "on which day",
    "timephrase": "when",
}
LEFT_OUT = 0.55  # of the slots that a question need not repeat


def asked_of(fact: Fact, rng: random.Random) -> Questions:
    """All questions about a fact, with their answers."""
    ask = {"verb": verb_questions, "noun": noun_questions, "adjective": adjective_questions}[fact.relation.kind]
    return [(sentence(question, "?"), answer) for question, answer in ask(fact, rng)]


def verb_questions(fact: Fact, rng: random.Random) -> Questions:
    asked = [ask_for_slot(fact, i, rng) for i in range(len(fact.slots))]
    return [*asked, ask_for_subject(fact, rng)]


def ask_for_slot(fact: Fact, i: int, rng: random.Random) -> tuple[str, str]:
    """What Ann gave to Ben, or when, or to whom: (question, answer)."""
    base, _, participle = fact.relation.words
    preposition, kind, answer = fact.slots[i]
    is_object = i == 0 and fact.has_object
    front, end = rng.choice(question_words(preposition, kind))
    if kind in WHEN and sum(slot.kind in WHEN for slot in fact.slots) > 1:
        front = WHEN[kind]  # "when" would ask for both
    if kind == "purpose":
        answer = fact.slots[i].phrase()
    without = left_out(fact, rng, asked=i)
    if end:  # who did Ann give a cup to, and not: a cup on Monday to
        without += range(len(fact.relation.slots), len(fact.slots))
    rest = fact.rest(without, retold=True)
    if kind == "count" and is_object:  # how many cups did Ann give to Ben
        number, _, things = answer.partition(" ")
        return f"how many {things} {fact.do()} {fact.subject.mention(rng, asked=True)} {base} {rest}", number
    if is_object and fact.has_passive and rng.random() < 0.25:  # what was given to Ben by Ann
        front, plural = front.replace("whom", "who"), front == "which goods" or kind == "count"
        return f"{front} {fact.be(plural)} {participle} {rest} by {fact.subject.mention(rng, asked=True)}", answer
    if (
        not is_object and fact.has_passive and fact.tense != "future" and rng.random() < 0.2
    ):  # to whom was the cup given
        rest = fact.rest([0, *without], retold=True)
        be = fact.be(fact.slots[0].is_plural)
        return f"{front} {be} {definite(fact.value)} {participle} {rest} {end}", answer
    # who did Ann give a cup to
    return f"{front} {fact.do()} {fact.subject.mention(rng, asked=True)} {base} {rest} {end}", answer


def ask_for_subject(fact: Fact, rng: random.Random) -> tuple[str, str]:
    """Who gave a cup to Ben, or by whom it was given: (question, answer)."""
    _, _, participle = fact.relation.words
    kind, without = fact.subject.kind, left_out(fact, rng)
    if kind == "group":
        who = rng.choice(("who", "which group"))
    else:
        who = "who" if kind == "person" else f"which {kind}"
    if fact.has_passive and fact.tense != "future" and rng.random() < 0.25:  # who was a cup given to Ben by
        rest = fact.rest([0, *left_out(fact, rng)], retold=True)
        given = f"{fact.be(fact.slots[0].is_plural)} {definite(fact.value)} {participle} {rest}"
        question = rng.choice((f"by {who.replace('who', 'whom')} {given}", f"{who} {given} by"))
    else:  # who gave a cup to Ben
        question = f"{who} {fact.verb()} {fact.rest(without, retold=True)}"
    return question, fact.subject.name


def left_out(fact: Fact, rng: random.Random, asked: int | None = None) -> list[int]:
    """Indices of the slots that a question for slot `asked` (None: the subject) does not repeat.

    A question repeats the direct object always, a reason or purpose never, and other slots sometimes. One for the
    subject repeats the first slot always.
    """
    repeats_first = fact.has_object or asked is None
    return [
        i
        for i, slot in enumerate(fact.slots)
        if i == asked or (not (i == 0 and repeats_first) and (slot.says_why or rng.random() < LEFT_OUT))
    ]


def question_words(preposition: str, kind: str) -> list[tuple[str, str]]:
    """How to ask for a slot of a verb: (words in front, preposition left at the end), as often as drawn."""
    if kind == "person":  # who did Ann give a cup to; to whom did Ann give a cup
        return [("who", preposition), ("who", preposition), (f"{preposition} whom".strip(), "")]
    if kind in ("firm", "group", "ship"):
        return [(f"which {kind}", preposition), (f"{preposition} which {kind}".strip(), "")]
    if kind in WHEN:
        return [("when", ""), ("when", ""), (WHEN[kind], "")]
    if kind in WHERE and preposition in ("in", "at", "near", "to", "into"):
        end = "to" if preposition == "to" else ""  # where did Ann go to
        return [("where", end), ("where", ""), (f"{preposition} which {CLASSES[kind]}", "")]
    if kind in WHERE and preposition == "from":
        return [("where", "from"), (f"from which {CLASSES[kind]}", "")]
    if kind == "reason":
        return [("why", ""), ("for what reason", "")]
    if kind == "purpose":
        return [("why", ""), ("for what purpose", "")]
    if kind == "manner" or (preposition, kind) == ("by", "vehicle"):
        return [("how", "")]
    if kind == "duration":
        return [("how long", ""), ("for how long", "")]
    if kind == "money":
        return [("how much", preposition)]
    general = [("what", preposition), ("what", preposition), (f"{preposition} what".strip(), "")]
    return general + ([(f"which {CLASSES[kind]}", preposition)] if kind in CLASSES else [])


def noun_questions(fact: Fact, rng: random.Random) -> Questions:
    """Who is Ann's boss, or what her salary; whose boss is Ben, or of which town he is the mayor."""
    (noun,), (_, kind, value), be = fact.relation.words, fact.slots[0], fact.copula()
    subject = fact.subject.mention(rng, asked=True)
    noun_of_subject = rng.choice((f"the {noun} of {subject}", f"{genitive(subject)} {noun}"))
    how_much, when = rng.choice(("how much", "what")), rng.choice(("when", "what"))
    front = {"person": "who", "money": how_much, "date": when}.get(kind, "what")
    if kind in WHERE and rng.random() < 0.2:
        front = rng.choice(("where", f"which {CLASSES[kind]}"))
    asked = [(f"{front} {be} {noun_of_subject}", value)]
    if fact.subject.is_person:
        asked.append((f"whose {noun} {be} {definite(value)}", fact.subject.name))
    elif rng.random() < 0.5:
        asked.append((f"{definite(value)} {be} the {noun} of which {fact.subject.kind}", fact.subject.name))
    return asked


def adjective_questions(fact: Fact, rng: random.Random) -> Questions:
    """How long is the ship Elka, or what is its length."""
    adjective, dimension = fact.relation.words
    subject, be = definite(fact.subject.mention(rng, asked=True)), fact.copula()
    question = rng.choice((f"how {adjective} {be} {subject}", f"what {be} the {dimension} of {subject}"))
    return [(question, fact.value)]
