"""A small world to read about: short English passages whose questions can only be answered by reading them.

A fact is a relation (`relations.txt`: 330 verbs, nouns and adjectives) with its arguments filled in (`words.txt`). It is
said in one of many forms: active, passive, cleft, two facts in one sentence, a pronoun in the next, ... Its questions
are made the same way, one for every argument. Three in ten passages are everyday texts instead (`scenes.txt`).

Names are invented, or come from lists of first names, surnames and towns. All are split by a hash: a name of a test
passage occurs in no training or validation passage. So an answer is read or it is wrong; it cannot be recalled. Every
passage of facts has distractors: another subject with the asked relation, and another fact about the asked subject.

A fifth of the relations, scenes and forms are held out by the same hash. Training never uses them, and the unseen
passages use nothing else.

    python tiny/world.py --split test --seed 0 --examples 3     # look at some
    python tiny/world.py --unseen                               # held-out relations, forms and scenes

Everything follows from (split, seed, index): the i-th example is the same on every machine, in any order of asking.
"""

import argparse
import functools
import hashlib
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
SPLITS = ("train", "validation", "test")
SCENES = 0.3  # of the passages are everyday texts
NONCE = 0.06  # of the training relations are words that do not exist: there, only matching helps
STYLED = 0.1  # of the passages are written in one of STYLES


def bucket(text: str) -> int:
    """0..9, the same on every machine."""
    return hashlib.sha256(text.encode()).digest()[0] % 10


def split_of_name(name: str) -> str:
    """The one split whose passages may use this name (8/10 train, 1/10 validation, 1/10 test)."""
    return {0: "test", 1: "validation"}.get(bucket(name), "train")


def held_out(key: str) -> bool:
    """Whether a relation or a scene never occurs in training."""
    return bucket("held out: " + key) < 2


# ---------------------------------------------------------------------------------------------------------------------
# names: from lists, or invented as start (+ middle) + end: 72 * 65 = 4,680 short ones, 72 * 48 * 65 = 224,640 long ones

STARTS = (
    "Al Ar Bar Bel Bor Bra Bri Cal Car Cor Da Del Dor Dra El Em Er Fal Fen Fro Gal Gar Gil Gor Har Hel Hol Il Is Ja Jor "
    "Kal Kel Kor La Len Lor Lu Mal Mar Mel Mor Na Nel Nor Ol Or Os Pal Per Pol Quin Ral Ren Ro Sal Sel Sor Stel Ta Tel "
    "Tor Tra Ul Ur Val Vel Vor Wel Wil Yar Zan"
).split()
MIDDLES = (
    "a an ar be bi da de den di do e en er ga ge go i in ka ke ko la le li lo ma mi mo na ne no o on or pa ra re ri ro sa "
    "se si ta te ti to va vi"
).split()
ENDS = (
    "bert bin by cas ch cia ck da dan del den dil dra dric fa fin ford gan gar gen grim ka kin la lan len lia lin lo low "
    "man mar med mer min mond na nak nel nis nor phy ra ran rick rin ris ro rus sa sen sha son sta tan ter thor tin ton "
    "va ven vik wen win wyn"
).split()
NONCE_PARTS = ("bl d dr f fl g gl gr k kr l m n p pl sn t tr v z".split(), "a e i o u".split(),
    "b ck d ft g lb lk m mp nd nk p rb rk rp sk st t zz".split())  # fmt: skip


@functools.cache
def words() -> dict[str, list[str]]:
    """words.txt: kind -> items, in the order of the file."""
    kinds: dict[str, list[str]] = {}
    for line in (HERE / "words.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            kind, items = line.split(": ", 1)
            kinds.setdefault(kind, []).extend(items.rstrip(", ").split(", "))
    return kinds


@functools.cache
def names_of(kind: str, split: str) -> list[str]:
    return [name for name in words()[kind] if split_of_name(name) == split]


@dataclass
class Maker:
    """Draws the values of one passage, each at most once."""

    rng: random.Random
    split: str
    taken: set[str] = field(default_factory=set)

    def value(self, kind: str) -> str:
        """A value of this kind, unlike any other in the passage."""
        for _ in range(1000):
            text = self.draw(kind)
            if text.lower() not in self.taken:
                self.taken.add(text.lower())
                return text
        raise ValueError(f"words.txt has too few of {kind}")

    def invented(self) -> str:
        while True:
            middle = self.rng.choice(MIDDLES) if self.rng.random() < 0.6 else ""
            name = self.rng.choice(STARTS) + middle + self.rng.choice(ENDS)
            if split_of_name(name) == self.split:
                return name

    def draw(self, kind: str) -> str:
        rng, number = self.rng, self.rng.randint
        if kind in ("woman", "man", "surname"):
            return self.invented() if rng.random() < 0.4 else rng.choice(names_of(kind, self.split))
        if kind in ("person", "firstname"):
            return self.draw(rng.choice(("woman", "man")))
        if kind == "fullname":
            return f"{self.draw('person')} {self.draw('surname')}"
        if kind == "town":
            if rng.random() < 0.6:
                return rng.choice(names_of(kind, self.split))
            return rng.choice(("Port ", "New ", "East ", "Lake ", *[""] * 12)) + self.invented()
        if kind in ("ship", "firm", "dog"):
            name = self.draw("surname") if kind == "firm" else self.draw("person")
            return name + rng.choice((" & Sons", " Stores", " Ltd", " Motors", *[""] * 12)) if kind == "firm" else name
        if kind == "thing" and rng.random() < 0.25:
            return self.with_adjective(rng.choice(words()[kind]))
        if kind in DRAWN:
            return DRAWN[kind](rng, number)
        return rng.choice(words()[kind])

    def with_adjective(self, text: str) -> str:
        article, _, noun = text.partition(" ")
        if article not in ("a", "an") or " " in noun:
            return text
        adjective = self.rng.choice(("old", "new", "small", "large", "heavy", "broken", "expensive", "cheap", "wet",
            *words()["colour"], *words()["material"]))  # fmt: skip
        return f"{an(adjective)} {adjective} {noun}"

    def nonce(self) -> str:
        onset, vowel, coda = NONCE_PARTS
        pick = self.rng.choice
        return pick(onset) + pick(vowel) + pick(("", pick(("l", "n", "r")) + pick(vowel))) + pick(coda)


MONTHS = "January February March April May June July August September October November December".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
SMALL_NUMBERS = "two three four five six seven eight nine ten eleven twelve fifteen twenty thirty forty fifty".split()
HOURS = "one two three four five six seven eight nine ten eleven twelve".split()


def clock(rng, number) -> str:
    minutes = rng.choice((0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, number(0, 59)))
    return rng.choice((
        f"{number(0, 23)}:{minutes:02}", f"{number(1, 12)}:{minutes:02} {rng.choice(('am', 'pm'))}",
        f"{number(1, 12)} {rng.choice(('am', 'pm'))}", f"half past {rng.choice(HOURS)}",
        f"quarter {rng.choice(('past', 'to'))} {rng.choice(HOURS)}", f"{rng.choice(HOURS)} o'clock", "noon",
    ))  # fmt: skip


def amount(rng, number) -> str:
    return rng.choice(
        (str(number(2, 20)), str(number(21, 999)), rng.choice(SMALL_NUMBERS), f"{number(1, 9)}.{number(1, 9)}")
    )


def date(rng, number) -> str:
    day, month = number(1, 28), rng.choice(MONTHS)
    return rng.choice(
        (f"{day} {month}", f"{month} {day}", f"the {ordinal(day)} of {month}", f"{day} {month} {number(1850, 2030)}")
    )


def ordinal(day: int) -> str:
    return f"{day}" + ("th" if day in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th"))


def money(rng, number) -> str:
    return rng.choice((
        f"{amount(rng, number)} {rng.choice(words()['unit_money'])}", f"${number(1, 900)}", f"${number(1, 40)}.{number(10, 99)}",
        f"£{number(1, 300)}", f"€{number(1, 90)}.{number(10, 99)}",
    ))  # fmt: skip


def measure(unit: str) -> Callable:
    return lambda rng, number: f"{amount(rng, number)} {rng.choice(words()[unit])}"


DRAWN: dict[str, Callable] = {
    "number": lambda rng, number: str(rng.choice((number(2, 99), number(100, 9999)))),
    "small": lambda rng, number: str(number(2, 12)),
    "numberword": lambda rng, number: rng.choice(SMALL_NUMBERS),
    "count": lambda rng, number: f"{rng.choice((str(number(2, 99)), rng.choice(SMALL_NUMBERS)))} {rng.choice(words()['countable'])}",
    "year": lambda rng, number: str(number(1500, 2030)),
    "years": lambda rng, number: f"{rng.choice((str(number(2, 99)), rng.choice(SMALL_NUMBERS)))} years",
    "date": date,
    "day": lambda rng, number: rng.choice(DAYS),
    "month": lambda rng, number: rng.choice(MONTHS),
    "clock": clock,
    "money": money,
    "length": measure("unit_length"),
    "weight": measure("unit_weight"),
    "duration": measure("unit_time"),
    "phone": lambda rng, number: f"{number(200, 999)} {number(0, 9999):04}",
    "email": lambda rng, number: f"{rng.choice(STARTS).lower()}{rng.choice(ENDS)}@{rng.choice(('mail', 'post', 'home'))}.{rng.choice(('com', 'org', 'net'))}",
    "percent": lambda rng, number: f"{number(1, 99)}{rng.choice(('%', ' percent'))}",
    "temperature": lambda rng, number: f"{rng.choice(('', '', 'minus '))}{number(1, 35)} degrees",
    "code": lambda rng, number: f"{rng.choice('ABCDEFGHK')}{number(1, 99)}",
    "platform": lambda rng, number: str(number(1, 20)),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# relations


@dataclass(frozen=True)
class Relation:
    """A line of relations.txt; `words`: (base, past, participle), (noun,) or (adjective, dimension)."""

    kind: str  # "verb", "noun" or "adjective"
    subject: str
    words: tuple[str, ...]
    slots: tuple[tuple[str, str], ...]  # (preposition or "", kind of value)


@functools.cache
def relations(unseen: bool) -> list[Relation]:
    """The relations that training uses, or those it never sees."""
    found, section = [], ""
    for line in (HERE / "relations.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section = line.strip("[]").removesuffix("s")
        elif line and not line.startswith("#"):
            subject, said, values, *dimension = [part.strip() for part in line.split("|")]
            if section == "verb":
                slots = [(preposition.strip(), kind) for preposition, kind in re.findall(r"(\w* ?)\{(\w+)\}", values)]
                found.append(Relation(section, subject, tuple(said.split()), tuple(slots)))
            else:
                found.append(Relation(section, subject, (said, *dimension), (("", values),)))
    return [relation for relation in found if held_out(f"{relation.kind} {relation.words[0]}") == unseen]


@functools.cache
def relations_of(subject: str, unseen: bool) -> list[Relation]:
    return [relation for relation in relations(unseen) if relation.subject == subject]


# forms of a sentence. Those with a star are held out.
VERB_FORMS = "active active active front passive cleft_subject cleft_argument dative *pseudo_cleft *one_who".split()
NOUN_FORMS = "of of genitive genitive inverse cleft as_for *has_as".split()
ADJECTIVE_FORMS = "plain plain of has *with".split()
PAIR_FORMS = "alone alone alone coordination relative whose *then *when".split()
DATIVE = "give lend send show hand offer promise sell teach bring owe tell".split()
AMBIENT = ("person", "person", "person", "person", "town", "ship", "firm", "dog", "group", "building", "place")


def forms(listed: list[str], unseen: bool) -> list[str]:
    """Forms to draw from: training leaves out the starred ones, and unseen passages use them wherever they fit."""
    return [form.lstrip("*") for form in listed if unseen or not form.startswith("*")]


def starred(listed: list[str], possible: list[str]) -> list[str]:
    return [form for form in possible if "*" + form in listed]


def third_person(base: str) -> str:
    if re.search(r"[^aeiou]y$", base):
        return base[:-1] + "ies"
    return base + ("es" if re.search(r"(s|x|z|ch|sh|o)$", base) else "s")


def definite(text: str) -> str:
    """As a question repeats it: "a silver ring" is "the silver ring"."""
    return re.sub(r"^an? ", "the ", text)


def an(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def sentence(text: str) -> str:
    text = re.sub(" +", " ", text).strip()
    return text[0].upper() + text[1:] + "."


@dataclass
class Fact:
    """A relation with its arguments: what is said of one subject."""

    relation: Relation
    subject: "Subject"
    slots: list[tuple[str, str, str]]  # (preposition, kind, text): arguments, then what is added (time, place, reason)
    tense: str  # "past", "present" or "future"

    # --- verbs
    def finite(self) -> str:
        base, past, _ = self.relation.words
        return {"past": past, "present": third_person(base), "future": f"will {base}"}[self.tense]

    def be(self) -> str:
        return {"past": "was", "present": "is", "future": "will be"}[self.tense]

    def copula(self) -> str:
        return "was" if self.tense == "past" else "is"

    def do(self) -> str:
        return {"past": "did", "present": "does", "future": "will"}[self.tense]

    def rest(self, without: tuple[int, ...] = (), retold: bool = False) -> str:
        """The arguments in their order; `retold`: as a question repeats them."""
        parts = [
            f"{p} {definite(text) if retold else text}" for i, (p, _, text) in enumerate(self.slots) if i not in without
        ]
        return re.sub(r" +", " ", " ".join(parts)).strip()

    def predicate(self) -> str:
        if self.relation.kind == "verb":
            return f"{self.finite()} {self.rest()}"
        return f"{self.copula()} {self.slots[0][2]} {self.relation.words[0]}"  # an adjective


@dataclass
class Subject:
    kind: str
    name: str
    pronoun: str

    def mention(self, rng: random.Random, asked: bool = False) -> str:
        """The subject in a sentence, or in a question, where a first name may be enough."""
        if asked and self.kind == "person" and rng.random() < 0.4:
            return self.name.split(" ")[0]
        if self.kind == "dog" or (self.kind == "ship" and rng.random() < 0.6):
            return f"the {self.kind} {self.name}"
        if self.kind == "firm" and rng.random() < 0.3:
            return f"the firm {self.name}"
        return f"the {self.name}" if self.kind == "ship" else self.name

    @property
    def who(self) -> str:
        return "which" if self.pronoun == "it" else "who"


def add_ons(maker: Maker, relation: Relation, tense: str) -> list[tuple[str, str, str]]:
    """Up to two free additions: a time, a place, company, a manner, a reason or a purpose."""
    rng, has = maker.rng, {kind for _, kind in relation.slots}
    timed = has & {"date", "clock", "year", "duration"}
    placed = has & {"town", "place", "room", "country"} or relation.subject not in ("person", "dog")
    choices = []
    if not timed:
        choices += [("on", "date"), ("on", "day"), ("at", "clock"), ("", "timephrase" if tense != "future" else "day")]
        choices += [("in", "year")] if tense == "past" else []
    if not placed:
        choices += [("in", "town"), ("at", "place")]
    if relation.subject == "person":
        choices += [("with", "person")] if "person" not in has else []
        choices += [("", "manner"), ("to", "purpose")]
        choices += [("because", "reason"), ("because", "reason")] if tense == "past" else []
    count = rng.choices((0, 1, 2), (50, 38, 12))[0]
    picked = []
    for preposition, kind in rng.sample(choices, min(count, len(choices))):
        kinds = {"date": "time", "day": "time", "clock": "time", "year": "time", "timephrase": "time", "town": "where",
            "place": "where", "purpose": "why", "reason": "why"}  # fmt: skip
        if all(kinds.get(kind, kind) != kinds.get(other, other) for _, other, _ in picked):
            text = maker.value(kind)
            if kind == "day" and not preposition:
                preposition = "on"
            picked.append((preposition, kind, text))
    return sorted(picked, key=lambda slot: slot[1] in ("reason", "purpose"))  # reasons stand last


def make_fact(maker: Maker, relation: Relation, subject: Subject, fresh: bool) -> Fact:
    """The relation about this subject; `fresh`: perhaps in words that do not exist."""
    rng = maker.rng
    tense = rng.choices(("past", "present", "future"), (60, 28, 12))[0]
    if relation.kind == "noun":
        tense = "past" if rng.random() < 0.15 else "present"
    if fresh and relation.kind != "adjective":
        made = maker.nonce()
        if relation.kind == "verb":
            made = (made, made + "ed", made + "ed" if relation.words[2] != "-" else "-")
        relation = Relation(
            relation.kind, relation.subject, made if relation.kind == "verb" else (made,), relation.slots
        )
    slots = [(preposition, kind, maker.value(kind)) for preposition, kind in relation.slots]
    slots = [(p, k, re.sub("^an? ", "", text) if p == "by" and k == "vehicle" else text) for p, k, text in slots]
    if relation.kind == "verb":
        slots += add_ons(maker, relation, tense)
    return Fact(relation, subject, slots, tense)


def verb_sentence(fact: Fact, form: str, rng: random.Random) -> str:
    subject, slots, relation = fact.subject.mention(rng), fact.slots, fact.relation
    if form == "front":
        i = next(i for i, slot in enumerate(slots) if i >= len(relation.slots) and slot[1] in FRONTED)
        if slots[i][1] == "reason" and rng.random() < 0.5:
            return f"{slots[i][2]}, so {subject} {fact.finite()} {fact.rest((i,))}"
        comma = "," if slots[i][1] == "reason" else rng.choice((",", ""))
        return f"{slots[i][0]} {slots[i][2]}{comma} {subject} {fact.finite()} {fact.rest((i,))}"
    if form == "passive":
        return f"{slots[0][2]} {fact.be()} {relation.words[2]} {rng.choice((f'by {subject} {fact.rest((0,))}', f'{fact.rest((0,))} by {subject}'))}"
    if form == "cleft_subject":
        return f"it {fact.copula()} {subject} {fact.subject.who.replace('which', 'that')} {fact.finite()} {fact.rest()}"
    if form == "cleft_argument":
        i = rng.randrange(len(relation.slots))
        return f"it {fact.copula()} {slots[i][0]} {slots[i][2]} that {subject} {fact.finite()} {fact.rest((i,))}"
    if form == "dative":
        return f"{subject} {fact.finite()} {slots[1][2]} {slots[0][2]} {fact.rest((0, 1))}"
    if form == "pseudo_cleft":
        return f"what {subject} {fact.finite()} {fact.rest((0,))} {fact.copula()} {slots[0][2]}"
    if form == "one_who":
        return f"{subject} {fact.copula()} the one {fact.subject.who.replace('which', 'that')} {fact.finite()} {fact.rest()}"
    return f"{subject} {fact.predicate()}"


FRONTED = ("date", "day", "clock", "timephrase", "year", "town", "place", "reason")


def verb_forms(fact: Fact, unseen: bool) -> list[str]:
    """The forms that this fact can take."""
    slots, given = fact.slots, len(fact.relation.slots)
    direct = bool(slots) and slots[0][0] == ""
    long_add = any(slot[1] in ("reason", "purpose") for slot in slots)
    fits = {
        "front": any(slot[1] in FRONTED for slot in slots[given:]),
        "passive": direct and fact.relation.words[2] != "-" and not long_add,
        "cleft_argument": not long_add,
        "dative": direct and fact.relation.words[0] in DATIVE and given > 1 and slots[1][:2] == ("to", "person"),
        "pseudo_cleft": direct and slots[0][1] not in ("person", "town", "ship", "firm", "group") and not long_add,
        "one_who": fact.subject.kind in ("person", "dog"),
    }
    return [form for form in forms(VERB_FORMS, unseen) if fits.get(form, True)]


def noun_sentence(fact: Fact, form: str, rng: random.Random) -> str:
    subject, value, noun, be = fact.subject.mention(rng), fact.slots[0][2], fact.relation.words[0], fact.copula()
    genitive = f"{subject}'{'' if subject.endswith('s') else 's'}"
    return {
        "of": f"the {noun} of {subject} {be} {value}",
        "genitive": f"{genitive} {noun} {be} {value}",
        "inverse": f"{value} {be} the {noun} of {subject}",
        "cleft": f"it {be} {value} that {be} the {noun} of {subject}",
        "as_for": f"as for {subject}, the {noun} {be} {value}",
        "has_as": f"{subject} {'had' if be == 'was' else 'has'} {value} as {rng.choice(('the', an(noun)))} {noun}",
    }[form]


def adjective_sentence(fact: Fact, form: str, rng: random.Random) -> str:
    subject, value, (adjective, dimension) = fact.subject.mention(rng), fact.slots[0][2], fact.relation.words
    return {
        "plain": f"{subject} {fact.copula()} {value} {adjective}",
        "of": f"the {dimension} of {subject} {fact.copula()} {value}",
        "has": f"{subject} {'had' if fact.tense == 'past' else 'has'} {an(dimension)} {dimension} of {value}",
        "with": f"with {an(dimension)} {dimension} of {value}, {subject} stands out",
    }[form]


def say(fact: Fact, unseen: bool, rng: random.Random) -> str:
    """One sentence, without its capital and full stop."""
    if fact.relation.kind == "verb":
        listed, possible, speak = VERB_FORMS, verb_forms(fact, unseen), verb_sentence
    elif fact.relation.kind == "noun":
        listed, possible, speak = NOUN_FORMS, forms(NOUN_FORMS, unseen), noun_sentence
    else:
        listed, possible, speak = ADJECTIVE_FORMS, forms(ADJECTIVE_FORMS, unseen), adjective_sentence
    fresh = starred(listed, possible)
    return speak(fact, rng.choice(fresh if fresh and rng.random() < 0.6 else possible), rng)


# ---------------------------------------------------------------------------------------------------------------------
# questions: one for every argument of a fact

CLASS = {
    "vehicle": "vehicle", "food": "dish", "drink": "drink", "animal": "animal", "instrument": "instrument", "sport": "sport",
    "subject": "subject", "material": "material", "colour": "colour", "town": "town", "country": "country", "room": "room",
    "place": "place", "goods": "goods", "event": "event", "plant": "plant", "language": "language", "illness": "illness",
    "clothes": "clothes", "document": "document", "building": "building", "group": "group", "firm": "firm", "ship": "ship",
    "prize": "prize", "dog": "dog", "year": "year", "day": "day", "number": "number",
}  # fmt: skip
WHERE = ("town", "country", "place", "room", "building")
WHEN = ("date", "day", "clock", "year", "timephrase")


def question_words(preposition: str, kind: str) -> list[tuple[str, str]]:
    """How to ask for such an argument: (question word in front, preposition left at the end)."""
    if kind == "person":
        return [("who", preposition), ("who", preposition), (f"{preposition} whom".strip(), "")]
    if kind in WHEN and (preposition or kind == "timephrase"):
        special = {"clock": "at what time", "year": "in which year", "date": "on what date", "day": "on which day"}
        return [("when", ""), ("when", ""), (special.get(kind, "when"), "")]
    if kind in WHERE and preposition in ("in", "at", "near", "to", "into"):
        return [
            ("where", "to" if preposition == "to" else ""),
            ("where", ""),
            (f"{preposition} which {CLASS[kind]}", ""),
        ]
    if kind in WHERE and preposition == "from":
        return [("where", "from"), (f"from which {CLASS[kind]}", "")]
    if kind == "reason":
        return [("why", ""), ("for what reason", "")]
    if kind == "purpose":
        return [("why", ""), ("for what purpose", "")]
    if kind == "manner" or (kind, preposition) == ("vehicle", "by"):
        return [("how", "")]
    if kind == "duration":
        return [("how long", ""), ("for how long", "")]
    if kind in ("money", "weight"):
        return [("how much", preposition)]
    if kind == "length":
        return [("how far", "")]
    general = [("what", preposition), ("what", preposition), (f"{preposition} what".strip(), "")]
    if kind in CLASS:
        general.append((f"which {CLASS[kind]}", preposition))
    return general


def verb_questions(fact: Fact, rng: random.Random) -> list[tuple[str, str]]:
    slots, relation, asked = fact.slots, fact.relation, []
    direct = 0 if slots and slots[0][0] == "" else None
    passive = relation.words[2] if direct is not None else "-"
    base, subject = relation.words[0], fact.subject

    def left_out(*without: int, keep: int | None = None) -> tuple[int, ...]:
        """Arguments that a question does not repeat: the direct object and `keep` always stay."""
        return tuple(
            i for i in range(len(slots))
            if i in without or (i not in (direct, keep) and (slots[i][1] in ("reason", "purpose") or rng.random() < 0.55))
        )  # fmt: skip

    for i, (preposition, kind, text) in enumerate(slots):
        front, end = rng.choice(question_words(preposition, kind))
        without = left_out(i)
        if kind == "count" and i == direct:
            number, _, things = text.partition(" ")
            asked.append(
                (
                    f"how many {things} {fact.do()} {subject.mention(rng, asked=True)} {base} {fact.rest(without, True)}",
                    number,
                )
            )
        elif i == direct and passive != "-" and rng.random() < 0.25:
            asked.append(
                (
                    f"{front} {fact.be()} {passive} {fact.rest(without, True)} by {subject.mention(rng, asked=True)}",
                    text,
                )
            )
        elif i != direct and passive != "-" and fact.tense != "future" and rng.random() < 0.2:
            rest = fact.rest((*without, direct), True)
            asked.append((f"{front} {fact.be()} {definite(slots[direct][2])} {passive} {rest} {end}", text))
        else:
            rest = fact.rest(without, True)
            asked.append((f"{front} {fact.do()} {subject.mention(rng, asked=True)} {base} {rest} {end}", text))
    keep = direct if direct is not None else 0
    rest = fact.rest(left_out(keep=keep), True)
    which = (
        "who"
        if subject.kind == "person"
        else rng.choice(("who", "which group"))
        if subject.kind == "group"
        else f"which {subject.kind}"
    )
    if passive != "-" and fact.tense != "future" and rng.random() < 0.25:
        rest = fact.rest((direct, *left_out(keep=keep)), True)
        by = rng.choice((("by", ""), ("", "by")))
        which = which.replace("who", "whom") if by[0] else which
        asked.append(
            (f"{by[0]} {which} {fact.be()} {definite(slots[direct][2])} {passive} {rest} {by[1]}", subject.name)
        )
    else:
        asked.append((f"{which} {fact.finite()} {rest}", subject.name))
    return asked


def noun_questions(fact: Fact, rng: random.Random) -> list[tuple[str, str]]:
    (_, kind, value), noun, be = fact.slots[0], fact.relation.words[0], fact.copula()
    subject = fact.subject.mention(rng, asked=True)
    of = rng.choice((f"the {noun} of {subject}", f"{subject}'{'' if subject.endswith('s') else 's'} {noun}"))
    front = {"person": "who", "money": rng.choice(("how much", "what")), "date": rng.choice(("when", "what"))}.get(
        kind, "what"
    )
    if kind in ("town", "place", "room", "country", "building") and rng.random() < 0.2:
        front = rng.choice(("where", f"which {CLASS[kind]}"))
    asked = [(f"{front} {be} {of}", value)]
    if fact.subject.kind == "person":
        asked.append((f"whose {noun} {be} {definite(value)}", fact.subject.name))
    elif rng.random() < 0.5:
        asked.append((f"{definite(value)} {be} the {noun} of which {fact.subject.kind}", fact.subject.name))
    return asked


def adjective_questions(fact: Fact, rng: random.Random) -> list[tuple[str, str]]:
    adjective, dimension = fact.relation.words
    subject = definite(fact.subject.mention(rng, asked=True))
    front = rng.choice(
        (f"how {adjective} {fact.copula()} {subject}", f"what {fact.copula()} the {dimension} of {subject}")
    )
    return [(front, fact.slots[0][2])]


QUESTIONS = {"verb": verb_questions, "noun": noun_questions, "adjective": adjective_questions}


def asked_of(fact: Fact, rng: random.Random) -> list[tuple[str, str]]:
    questions = []
    for question, answer in QUESTIONS[fact.relation.kind](fact, rng):
        question = re.sub(r" +", " ", question).strip()
        questions.append((question[0].upper() + question[1:] + "?", answer))
    return questions


# ---------------------------------------------------------------------------------------------------------------------
# passages


def make_subject(maker: Maker, kind: str) -> Subject:
    if kind == "person":
        gender = maker.rng.choice(("woman", "man"))
        name = maker.value(gender)
        if maker.rng.random() < 0.25:
            name += " " + maker.value("surname")
        return Subject(kind, name, "she" if gender == "woman" else "he")
    return Subject(kind, maker.value(kind), "it")


def introduce(maker: Maker, subject: Subject) -> tuple[str, list[tuple[str, str]]]:
    """An apposition for a person (", a baker from York,"), with its questions."""
    rng, name = maker.rng, subject.name
    pick = rng.randrange(3)
    if pick == 0:
        job, town = maker.value("job"), maker.value("town")
        asks = [(rng.choice((f"What is {name}'s job?", f"What does {name} do for a living?", f"What is the job of {name}?")), job),
            (rng.choice((f"Where does {name} come from?", f"Where is {name} from?", f"Which town is {name} from?")), town)]  # fmt: skip
        return f", {job} from {town},", asks
    if pick == 1:
        age = str(rng.randint(4, 98))
        return f", {age},", [(rng.choice((f"How old is {name}?", f"What is the age of {name}?")), age)]
    noun, kind = rng.choice((("captain", "ship"), ("owner", "firm"), ("director", "firm"), ("mayor", "town"), ("leader", "group"),
        ("founder", "town"), ("owner", "dog")))  # fmt: skip
    other = make_subject(maker, kind).mention(rng)
    return f", the {noun} of {other},", [(f"Who is the {noun} of {other}?", name)]


def block(maker: Maker, subject: Subject, facts: list[Fact], unseen: bool) -> tuple[list[str], list[tuple[str, str]]]:
    """Sentences about one subject, which stay in this order, and the questions about them."""
    rng, said, asked, left = maker.rng, [], [], list(facts)
    for fact in facts:
        asked += asked_of(fact, rng)
    said_with_pronoun = False
    while left:
        fact = left.pop(0)
        pair = rng.choice(forms(PAIR_FORMS, unseen)) if left and subject.kind not in ("building", "place") else "alone"
        if unseen and pair != "alone" and rng.random() < 0.5:
            pair = rng.choice(starred(PAIR_FORMS, forms(PAIR_FORMS, True)))
        second = left[0] if left else None
        nouns = [other for other in left if other.relation.kind == "noun"]
        speakable = "noun" not in (fact.relation.kind, second.relation.kind if second else "")
        name = subject.mention(rng)
        if pair in ("coordination", "relative", "then", "when") and speakable:
            left.pop(0)
            one, two = fact.predicate(), second.predicate()
            if pair == "coordination" or (pair == "when" and "because" in one):
                said.append(sentence(f"{name} {one} and {two}"))
            elif pair == "relative":
                said.append(sentence(f"{name}, {subject.who} {one}, {two}"))
            elif pair == "then":
                said.append(sentence(f"first {name} {one}, then {two}"))
            else:
                said.append(sentence(f"when {name} {one}, {subject.pronoun} {two}"))
        elif pair == "whose" and nouns and subject.pronoun != "it" and fact.relation.kind != "noun":
            noun = nouns[0]
            left.remove(noun)
            aside = f"whose {noun.relation.words[0]} {noun.copula()} {noun.slots[0][2]}"
            said.append(sentence(f"{name}, {aside}, {fact.predicate()}"))
        elif said and not said_with_pronoun and fact.relation.kind != "noun" and rng.random() < 0.5:
            said.append(
                sentence(
                    f"{subject.pronoun} {rng.choice(('', '', 'also '))}{fact.predicate()}".replace(
                        "also was", "was"
                    ).replace("also is", "is")
                )
            )
            said_with_pronoun = True
            continue
        elif said and fact.relation.kind == "noun" and rng.random() < 0.4:
            possessive = {"she": "her", "he": "his", "it": "its"}[subject.pronoun]
            said.append(sentence(f"{possessive} {fact.relation.words[0]} {fact.copula()} {fact.slots[0][2]}"))
        elif subject.kind == "person" and fact.relation.kind == "verb" and not said and rng.random() < 0.25:
            apposition, more = introduce(maker, subject)
            said.append(sentence(f"{name}{apposition} {fact.predicate()}"))
            asked += more
        else:
            said.append(sentence(say(fact, unseen, rng)))
        said_with_pronoun = False
    return said, asked


def make_passage(
    rng: random.Random, split: str, facts: int, unseen: bool = False, style: str | None = None
) -> tuple[str, list[tuple[str, str]]]:
    """A passage of about `facts` facts, or an everyday text, and (question, answer) pairs about it in random order.

    unseen: only relations, forms and scenes that training never uses. style: one of STYLES or "plain"; None: mostly
    plain.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    maker = Maker(rng, split)
    context, asked = (make_scene if rng.random() < SCENES else make_facts)(maker, unseen, facts)
    if style is None:
        style = rng.choice(list(STYLES)[1:]) if rng.random() < STYLED else "plain"
    write = STYLES[style]
    return write(context), [(write(question), write(answer)) for question, answer in asked]


def make_facts(maker: Maker, unseen: bool, facts: int) -> tuple[str, list[tuple[str, str]]]:
    """Two or three subjects of one kind share a relation, so that subject and relation must both be matched; each
    subject has other facts, too."""
    rng, split = maker.rng, maker.split
    blocks, asked, count = [], [], 0
    while count < facts:
        kind = rng.choice(AMBIENT)
        known = relations_of(kind, unseen)
        if not known:
            continue
        left = facts - count
        subjects = [make_subject(maker, kind) for _ in range(rng.randint(2, 3) if left > 1 else 1)]
        each = rng.randint(1, 1 + max(1, left // len(subjects)))
        picked, heads = [], set()  # relations with different words, the first of them for all subjects
        for relation in rng.sample(known, len(known)):
            if relation.words[0] not in heads:
                heads.add(relation.words[0])
                picked.append((relation, not unseen and split == "train" and rng.random() < NONCE))
            if len(picked) > each * len(subjects):
                break
        rest = picked[1:]
        for subject in subjects:
            if count >= facts:
                break
            own = picked[:1]
            for _ in range(min(each - 1, facts - count - 1, len(rest))):
                # half of the other facts are shared with the next subject
                own.append(rest[0] if rng.random() < 0.5 else rest.pop(0))
                if own[-1] in own[:-1]:
                    own.pop()
            made = [make_fact(maker, relation, subject, fresh) for relation, fresh in own]
            rng.shuffle(made)
            count += len(made)
            said, questions = block(maker, subject, made, unseen)
            blocks.append(said)
            asked += questions
    rng.shuffle(blocks)
    rng.shuffle(asked)
    sentences: list[str] = []
    for said in blocks:
        if sentences and rng.random() < 0.2 and not re.search(r", (while|but|and) ", sentences[-1]):
            sentences[-1] = f"{sentences[-1].rstrip('.')}, {rng.choice(('while', 'but', 'and'))} {lowered(said.pop(0))}"
        sentences += said
    return " ".join(sentences), asked


def lowered(text: str) -> str:
    """As it stands inside a sentence."""
    return text[0].lower() + text[1:] if text.split(" ")[0] in OPENERS else text


OPENERS = "The It On At In A An What As First When Because With".split()


# ---------------------------------------------------------------------------------------------------------------------
# everyday texts, from templates


@functools.cache
def scenes(unseen: bool) -> list[tuple[list[str], list[tuple[str, str]]]]:
    """scenes.txt: (text lines, (questions, answer) lines) of each scene; see the head of that file."""
    found = []
    for part in re.split(r"\n\s*\n", (HERE / "scenes.txt").read_text(encoding="utf-8")):
        lines = [line for line in part.splitlines() if line and not line.startswith("#")]
        text = [line for line in lines if not re.match(r"~?\?", line)]
        asked = [re.sub(r"^~?\? ", "", line).rsplit(" | ", 1) for line in lines if re.match(r"~?\?", line)]
        if text and asked and held_out(text[0]) == unseen:
            found.append((text, asked))
    return found


def make_scene(maker: Maker, unseen: bool, facts: int) -> tuple[str, list[tuple[str, str]]]:
    rng = maker.rng
    text, asked = rng.choice(scenes(unseen))
    values: dict[str, str] = {}

    def fill(template: str) -> str:
        def value(match: re.Match) -> str:
            slot = match[1].rstrip("!")
            if slot not in values:
                values[slot] = maker.value(slot.split(":")[0])
            return re.sub("^(an?|the) ", "", values[slot]) if match[1].endswith("!") else values[slot]

        return re.sub(r"\{([^}]+)\}", value, template)

    said = []
    for line in text:
        if not line.startswith("~ ") or rng.random() < 0.5:
            filled = fill(rng.choice(line.removeprefix("~ ").split(" / ")))
            said.append(filled[0].upper() + filled[1:])
    context = rng.choice((" ", " ", " ", "\n")).join(said)
    pairs = []
    for questions, answer in asked:
        question = rng.choice(questions.split(" / "))
        slots = {match.rstrip("!") for match in re.findall(r"\{([^}]+)\}", question + answer)}
        if slots <= values.keys() and fill(answer) in context:
            filled = fill(question)
            pairs.append((filled[0].upper() + filled[1:], fill(answer)))
    rng.shuffle(pairs)
    return context, pairs


# ---------------------------------------------------------------------------------------------------------------------
# styles: the same passage as nobody wrote it in the templates

ACCENTS = str.maketrans("aeioucnAEIOUCN", "áéíöüçñÁÉÍÖÜÇÑ")
EMOJI = "😀🚀🌍🎉🐟🍞"


def with_digits(text: str) -> str:
    """Names get a number, the same one wherever they stand."""
    return re.sub(r"\b[A-Z][a-z]{3,}\b", lambda m: f"{m[0]}{hashlib.sha256(m[0].encode()).digest()[1]}", text)


STYLES: dict[str, Callable[[str], str]] = {
    "plain": str,
    "upper": str.upper,
    "lower": str.lower,
    "digits": with_digits,
    "accents": lambda text: text.translate(ACCENTS),
    "emoji": lambda text: re.sub(
        r"[.?](\s|$)", lambda m: f"{m[0].strip()} {EMOJI[m.start() % len(EMOJI)]} ", text
    ).strip(),
}


def make_example(split: str, seed: int, index: int, unseen: bool = False, style: str | None = None) -> dict:
    """The index-th example of a split: {"context", "question", "answers": [one]}, 3-8 facts."""
    rng = random.Random(f"{split}/{seed}/{index}" + "/unseen" * unseen)  # a str seed: the same on every platform
    context, questions = make_passage(rng, split, rng.randint(3, 8), unseen, style)
    question, answer = questions[0]
    return {"context": context, "question": question, "answers": [answer]}


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
