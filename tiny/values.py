"""What fills a slot of the world's sentences: names, words, numbers, dates.

Names are invented, or come from the lists of first names, surnames and towns in words.txt. A hash gives every name to
one split, so a name of a test passage occurs in no training or validation passage. All other words are shared.

A choice between forms, as in `clock`, draws the numbers of every form first and then picks one of them.
"""

import functools
import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

WORDS = Path(__file__).with_name("words.txt")
SPLITS = ("train", "validation", "test")
INVENTED = 0.4  # of the names of people; the rest are listed
LISTED_TOWN = 0.6  # of the towns; the rest have an invented name
LONG_NAME = 0.6  # of the invented names have a middle
DESCRIBED = 0.25  # of the things have an adjective


# ---------------------------------------------------------------------------------------------------------------------
# lists, and the split of a name


def bucket(text: str) -> int:
    """A number from 0 to 9, the same on every machine."""
    return hashlib.sha256(text.encode()).digest()[0] % 10


def split_of_name(name: str) -> str:
    """The one split whose passages may use this name (8/10 train, 1/10 validation, 1/10 test)."""
    return {0: "test", 1: "validation"}.get(bucket(name), "train")


def held_out(key: str) -> bool:
    """Whether a relation or a scene never occurs in training (2/10 of them)."""
    return bucket("held out: " + key) < 2


@functools.cache
def words() -> dict[str, list[str]]:
    """The lists of words.txt: kind -> items, in the order of the file."""
    kinds: dict[str, list[str]] = {}
    for line in WORDS.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            kind, items = line.split(": ", 1)
            kinds.setdefault(kind, []).extend(items.rstrip(", ").split(", "))
    return kinds


@functools.cache
def names_of(kind: str, split: str) -> list[str]:
    """The listed names of a kind ("woman", "man", "surname", "town") that this split may use."""
    return [name for name in words()[kind] if split_of_name(name) == split]


# ---------------------------------------------------------------------------------------------------------------------
# invented words: names from start (+ middle) + end, 72 * 65 = 4,680 short ones and 72 * 48 * 65 = 224,640 long ones

STARTS = (
    "Al Ar Bar Bel Bor Bra Bri Cal Car Cor Da Del Dor Dra El Em Er Fal Fen Fro Gal Gar Gil Gor Har Hel Hol Il Is Ja "
    "Jor Kal Kel Kor La Len Lor Lu Mal Mar Mel Mor Na Nel Nor Ol Or Os Pal Per Pol Quin Ral Ren Ro Sal Sel Sor Stel "
    "Ta Tel Tor Tra Ul Ur Val Vel Vor Wel Wil Yar Zan"
).split()
MIDDLES = (
    "a an ar be bi da de den di do e en er ga ge go i in ka ke ko la le li lo ma mi mo na ne no o on or pa ra re ri "
    "ro sa se si ta te ti to va vi"
).split()
ENDS = (
    "bert bin by cas ch cia ck da dan del den dil dra dric fa fin ford gan gar gen grim ka kin la lan len lia lin lo "
    "low man mar med mer min mond na nak nel nis nor phy ra ran rick rin ris ro rus sa sen sha son sta tan ter thor "
    "tin ton va ven vik wen win wyn"
).split()

ONSETS = "bl d dr f fl g gl gr k kr l m n p pl sn t tr v z".split()
VOWELS = "a e i o u".split()
CODAS = "b ck d ft g lb lk m mp nd nk p rb rk rp sk st t zz".split()


def nonce(rng: random.Random) -> str:
    """A word that does not exist: "grimp", "snolanzz", "corvimond"."""
    if rng.random() < 0.5:
        onset, vowel = rng.choice(ONSETS), rng.choice(VOWELS)
        middle = rng.choice("lnr") + rng.choice(VOWELS)
        return onset + vowel + rng.choice(("", middle)) + rng.choice(CODAS)
    return (rng.choice(STARTS) + rng.choice(("", rng.choice(MIDDLES))) + rng.choice(ENDS)).lower()


# ---------------------------------------------------------------------------------------------------------------------
# articles and adjectives

ADJECTIVES = "old new small large heavy broken expensive cheap wet".split()


def an(word: str) -> str:
    """The indefinite article of a word."""
    return "an" if word[0] in "aeiou" and not word.startswith(("eu", "uni", "usu")) else "a"


def described(text: str, rng: random.Random) -> str:
    """With an adjective where there is room for one: "a ring" is "a silver ring"."""
    article, _, noun = text.partition(" ")
    if article not in ("a", "an") or " " in noun:
        return text
    adjective = rng.choice([*ADJECTIVES, *words()["colour"], *words()["material"]])
    return f"{an(adjective)} {adjective} {noun}"


# ---------------------------------------------------------------------------------------------------------------------
# numbers, dates and times

MONTHS = "January February March April May June July August September October November December".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
HOURS = "one two three four five six seven eight nine ten eleven twelve".split()
SMALL_NUMBERS = "two three four five six seven eight nine ten eleven twelve fifteen twenty thirty forty fifty".split()


def small_number(rng: random.Random) -> str:
    """47, or seven."""
    return rng.choice((str(rng.randint(2, 99)), rng.choice(SMALL_NUMBERS)))


def amount(rng: random.Random) -> str:
    """12, 345, seven or 6.7."""
    small, large = str(rng.randint(2, 20)), str(rng.randint(21, 999))
    return rng.choice((small, large, rng.choice(SMALL_NUMBERS), f"{rng.randint(1, 9)}.{rng.randint(1, 9)}"))


def measure(rng: random.Random, unit: str) -> str:
    """12 metres, seven weeks or 3.4 kilos; `unit` is a list of words.txt."""
    return f"{amount(rng)} {rng.choice(words()[unit])}"


def money(rng: random.Random) -> str:
    """12 pounds, $345, $6.78, £90 or €1.23."""
    written = measure(rng, "unit_money")
    dollars, cents = f"${rng.randint(1, 900)}", f"${rng.randint(1, 40)}.{rng.randint(10, 99)}"
    pounds, euros = f"£{rng.randint(1, 300)}", f"€{rng.randint(1, 90)}.{rng.randint(10, 99)}"
    return rng.choice((written, dollars, cents, pounds, euros))


def clock(rng: random.Random) -> str:
    """14:35, 2:35 pm, 2 pm, half past two, quarter to two, two o'clock or noon."""
    minutes = rng.choice((*range(0, 60, 5), rng.randint(0, 59)))
    forms = (
        f"{rng.randint(0, 23)}:{minutes:02}",
        f"{rng.randint(1, 12)}:{minutes:02} {rng.choice(('am', 'pm'))}",
        f"{rng.randint(1, 12)} {rng.choice(('am', 'pm'))}",
        f"half past {rng.choice(HOURS)}",
        f"quarter {rng.choice(('past', 'to'))} {rng.choice(HOURS)}",
        f"{rng.choice(HOURS)} o'clock",
        "noon",
    )
    return rng.choice(forms)


def date(rng: random.Random) -> str:
    """3 May, May 3, the 3rd of May or 3 May 1987."""
    day, month = rng.randint(1, 28), rng.choice(MONTHS)
    ending = "th" if 11 <= day <= 13 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    year = rng.randint(1850, 2030)
    return rng.choice((f"{day} {month}", f"{month} {day}", f"the {day}{ending} of {month}", f"{day} {month} {year}"))


def email(rng: random.Random) -> str:
    """calwin@post.org"""
    user = rng.choice(STARTS).lower() + rng.choice(ENDS)
    return f"{user}@{rng.choice(('mail', 'post', 'home'))}.{rng.choice(('com', 'org', 'net'))}"


COMPUTED: dict[str, Callable[[random.Random], str]] = {
    "number": lambda rng: str(rng.choice((rng.randint(2, 99), rng.randint(100, 9999)))),
    "small": lambda rng: str(rng.randint(2, 12)),
    "numberword": lambda rng: rng.choice(SMALL_NUMBERS),
    "count": lambda rng: f"{small_number(rng)} {rng.choice(words()['countable'])}",  # seven green apples
    "length": lambda rng: measure(rng, "unit_length"),
    "weight": lambda rng: measure(rng, "unit_weight"),
    "duration": lambda rng: measure(rng, "unit_time"),
    "years": lambda rng: f"{small_number(rng)} years",
    "money": money,
    "clock": clock,
    "date": date,
    "day": lambda rng: rng.choice(DAYS),
    "month": lambda rng: rng.choice(MONTHS),
    "year": lambda rng: str(rng.randint(1500, 2030)),
    "temperature": lambda rng: f"{rng.choice(('', '', 'minus '))}{rng.randint(1, 35)} degrees",
    "percent": lambda rng: f"{rng.randint(1, 99)}{rng.choice(('%', ' percent'))}",
    "code": lambda rng: f"{rng.choice('ABCDEFGHK')}{rng.randint(1, 99)}",  # B12, as of a room
    "phone": lambda rng: f"{rng.randint(200, 999)} {rng.randint(0, 9999):04}",
    "email": email,
}


# ---------------------------------------------------------------------------------------------------------------------
# values of every kind

# a quarter of the invented towns and of the firms have one of these
TOWN_PREFIXES = ("Port ", "New ", "East ", "Lake ", *[""] * 12)
FIRM_SUFFIXES = (" & Sons", " Stores", " Ltd", " Motors", *[""] * 12)


@dataclass
class Maker:
    """Draws the values of one passage, each at most once."""

    rng: random.Random
    split: str
    blended: float = 0.0  # share of the listed names that are made of two: "Rosa" and "Ingrid" give "Rogrid"
    taken: set[str] = field(default_factory=set)

    def value(self, kind: str) -> str:
        """A value of this kind, unlike any other in the passage."""
        for _ in range(1000):
            text = self.draw(kind)
            bare = re.sub("^(an?|the) ", "", text.lower())  # "a mill" and "the mill" are one
            if bare not in self.taken:
                self.taken.add(bare)
                return text
        raise ValueError(f"words.txt has too few of {kind}")

    def draw(self, kind: str) -> str:
        """Any value of this kind: a name ("Selnor"), something computed ("3 pm"), or an item of words.txt."""
        rng = self.rng
        match kind:
            case "woman" | "man" | "surname":
                return self.invented() if rng.random() < INVENTED else self.listed(kind)
            case "person":
                return self.draw(rng.choice(("woman", "man")))
            case "fullname":
                return f"{self.draw('person')} {self.draw('surname')}"
            case "town":
                if rng.random() < LISTED_TOWN:
                    return self.listed(kind)
                return rng.choice(TOWN_PREFIXES) + self.invented()
            case "ship" | "dog":
                return self.draw("person")
            case "firm":
                return self.draw("surname") + rng.choice(FIRM_SUFFIXES)
            case "thing":
                with_adjective = rng.random() < DESCRIBED
                thing = rng.choice(words()[kind])
                return described(thing, rng) if with_adjective else thing
        return COMPUTED[kind](rng) if kind in COMPUTED else rng.choice(words()[kind])

    def listed(self, kind: str) -> str:
        """A name of the lists, or a blend of two."""
        rng, names = self.rng, names_of(kind, self.split)
        if not self.blended or rng.random() >= self.blended:  # without blends, nothing is drawn: old passages stay
            return rng.choice(names)
        while True:
            first, last = rng.sample(names, 2)
            name = first[: rng.randint(2, len(first) - 1)] + last[rng.randint(1, len(last) - 2) :]
            if split_of_name(name) == self.split:
                return name

    def invented(self) -> str:
        """A name of this split: "Selnor", "Raltofa"."""
        while True:
            middle = self.rng.choice(MIDDLES) if self.rng.random() < LONG_NAME else ""
            name = self.rng.choice(STARTS) + middle + self.rng.choice(ENDS)
            if split_of_name(name) == self.split:
                return name
