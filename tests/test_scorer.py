"""The scorer against a second implementation, written from the text of the paper and not from the official script.

Rajpurkar et al. 2016, section 6: exact match and F1 "both ignoring punctuations and articles"; F1 treats prediction and
ground truth as bags of tokens, and takes the maximum over all ground truths.
"""

import random
import unicodedata

import pytest

import common


def words_of_paper(text: str) -> list[str]:
    kept = [c for c in text.lower() if not (c.isascii() and unicodedata.category(c)[0] in "PS")]
    words, word = [], ""
    # an article is a maximal run of word characters, as a regular expression's \b sees it
    for c in [*kept, " "]:
        if c.isalnum() or c == "_":
            word += c
        else:
            words.append(" " if word in ("a", "an", "the") else word)
            words.append(c)
            word = ""
    return "".join(words).split()


def f1_of_paper(answer: str, golds: list[str]) -> float:
    best = 0.0
    for gold in golds:
        left, right = words_of_paper(answer), words_of_paper(gold)
        shared, rest = 0, list(right)
        for word in left:
            if word in rest:
                rest.remove(word)
                shared += 1
        if shared:
            best = max(best, 2 * shared / (len(left) + len(right)))
    return best


def adversarial() -> list[tuple[str, list[str]]]:
    pairs = [
        ("", [""]), ("", ["the"]), ("the", ["a"]), ("The Cat", ["cat"]), ("cat.", ["the cat!"]), ("a b a b", ["b b b"]),
        ("theatre", ["the atre"]), ("an apple", ["apple", "pear"]), ("Ünïted  Stätes", ["ünïted stätes"]),
        ("1,000", ["1000"]), ("the-end", ["end"]), ("—dash—", ["dash"]), ("“quoted”", ["quoted"]), ("é", ["e\u0301"]),
        ("🎉 party", ["party 🎉"]), ("x" * 500, ["x" * 500]), ("one two", ["three"]), ("a.an.the", [""]), ("$5", ["5"]),
        ("don't", ["dont"]), ("İstanbul", ["i̇stanbul"]), ("ﬁre", ["fire"]), ("a_b", ["b"]), ("a\u00a0man", ["man"]),
        ("THE THE", ["x", ""]), ("I.B.M.", ["IBM"]),
    ]  # fmt: skip
    rng = random.Random(0)
    pool = "the a an The AN cat dog cats don't U.S. 1,000 . , - -- $ é ü 東京 🎉 “x” _a a_ _ \t \n  x y z".split(
        " "
    ) + [" "]
    while len(pairs) < 1000:
        answer = rng.choice(["", " ", " "]).join(rng.choices(pool, k=rng.randint(0, 7)))
        golds = [
            rng.choice(["", " ", " "]).join(rng.choices(pool, k=rng.randint(0, 7))) for _ in range(rng.randint(1, 4))
        ]
        pairs.append((answer, golds if rng.random() < 0.8 else [*golds, answer.upper() + "."]))
    return pairs


def test_scorer_equals_the_paper_on_1000_pairs():
    pairs = adversarial()
    assert len(pairs) == 1000
    scores = []
    for answer, golds in pairs:
        assert common.f1_score(answer, golds) == pytest.approx(f1_of_paper(answer, golds), abs=1e-12), (answer, golds)
        exact = any(words_of_paper(answer) == words_of_paper(gold) for gold in golds)
        assert common.exact_match(answer, golds) == exact, (answer, golds)
        scores.append(common.f1_score(answer, golds))
    assert 0.2 < sum(scores) / len(scores) < 0.9 and sum(0 < s < 1 for s in scores) > 100  # the pairs are no formality


def test_empty_bags_score_as_the_official_script_does():
    # evaluate-v1.1.py returns 0 when no word is shared, even if both are empty; exact match compares the strings
    assert common.f1_score("the", ["a"]) == 0.0 and common.exact_match("the", ["a"]) == 1.0


def test_score_is_the_mean_of_the_best_gold_in_percent():
    rows = [{"answers": ["red", "dark red"]}, {"answers": ["blue"]}]
    assert common.score(["dark red", "pale blue"], rows) == (pytest.approx(100 * (1 + 2 / 3) / 2), 50.0)
