"""Synthetic film reviews in the aclImdb format: long, seeded, balanced, and decided by a few sentences only.

Most of a review is plot and small talk. The reviewer's own verdict stands in a few sentences, anywhere in the text.
The same adjectives also appear in what other people say and about other things, as many positive as negative ones per
text, so they carry no label. A verdict may be negated ("never dull"): counting adjectives is right most of the time,
reading the whole sentence is right always. :func:`verdict` is the rule written out.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

from .tasks.files import new_folder

ADJECTIVES = {
    0: "awful boring clumsy dreadful dull feeble hollow lifeless messy painful shallow tedious".split(),
    1: "brilliant charming clever delightful gripping lovely moving superb tender thrilling vivid wonderful".split(),
}
POLARITY = {word: label for label, words in ADJECTIVES.items() for word in words}
WORDS_PER_VERDICT = 80  # one sentence in nine
WORDS_PER_DISTRACTION = 200  # a pair of sentences
NEGATED = 0.2  # chance that a verdict is a negated opposite
TRAIN, TEST = 3200, 400  # reviews

LONGEST_PLOT = 15  # tokens

Review = tuple[str, int]  # text, label

OWN = ("in my honest opinion this film is", "for me personally this film was", "i myself found this film to be")
NEGATIONS = ("not", "never", "hardly")
DEGREES = ("very", "rather", "quite", "simply")
OTHERS = (
    "my neighbour calls everything", "the newspaper had promised something", "the soup before the show was",
    "the seats in the hall looked", "her last novel was", "the weather that evening was", "his brother finds football",
    "the couple behind us thought the trailer was", "the old theatre next door is", "the critics said the book was",
)  # fmt: skip
PEOPLE = "a detective,the captain,an old painter,the young widow,a farmer,the pianist,two sisters,the mayor".split(",")
ACTIONS = "arrives at,looks for,remembers,walks around,writes about,returns to,waits near,draws a map of".split(",")
PLACES = "the harbour,a small village,the railway station,an island,the library,a hotel,a market,the bridge".split(",")
TIMES = "in the first act,after the war,at night,before the wedding,in winter,one morning,years later".split(",")


def review(rng: random.Random, label: int, length: int) -> str:
    """A raw review of at most ``length`` words and punctuation marks, and at least about 3/4 of it."""
    verdicts = length // WORDS_PER_VERDICT | 1  # odd, so that their adjectives never tie
    sentences = [_verdict(rng, label) for _ in range(verdicts)]
    for _ in range(length // WORDS_PER_DISTRACTION):
        sentences += [_distraction(rng, 0), _distraction(rng, 1)]
    count = sum(len(tokens(sentence)) for sentence in sentences)
    target = rng.uniform(0.75, 1.0) * length - LONGEST_PLOT
    while count < target:
        sentences.append(_plot(rng))
        count += len(tokens(sentences[-1]))
    rng.shuffle(sentences)
    for i in range(6, len(sentences), 7):
        sentences[i] += "<br /><br />"
    return " ".join(sentences)


def tokens(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]+", text)


def verdict(text: str) -> int:
    """The label, read from the reviewer's own sentences; all of them must agree."""
    found = set()
    for sentence in text.replace("<br />", " ").split("."):
        if "this film" in sentence:
            words = tokens(sentence)
            label = next(POLARITY[w] for w in words if w in POLARITY)
            found.add(1 - label if any(w in NEGATIONS for w in words) else label)
    (label,) = found
    return label


def generate(length: int, seed: int, train: int | None = None, test: int | None = None) -> dict[str, list[Review]]:
    """Raw reviews of each split, labels alternating; the same arguments give the same reviews."""
    splits = {}
    for split, count in (("train", train or TRAIN), ("test", test or TEST)):
        rng = random.Random(f"{seed} {split}")
        splits[split] = [(review(rng, i % 2, length), i % 2) for i in range(count)]
    return splits


def write(folder: Path, splits: dict[str, list[Review]]) -> None:
    """Write as an aclImdb folder, complete or not at all."""
    with new_folder(folder) as root:
        for split, reviews in splits.items():
            for name in ("neg", "pos"):
                (root / split / name).mkdir(parents=True)
            for i, (text, label) in enumerate(reviews):
                rating = (1 + i // 2 % 4) + 6 * label  # 1 to 4, 7 to 10
                (root / split / ("neg", "pos")[label] / f"{i:06}_{rating}.txt").write_text(text, encoding="utf-8")


def _verdict(rng: random.Random, label: int) -> str:
    negate = rng.random() < NEGATED
    adjective = rng.choice(ADJECTIVES[1 - label if negate else label])
    return f"{rng.choice(OWN)} {rng.choice(NEGATIONS if negate else DEGREES)} {adjective}."


def _distraction(rng: random.Random, label: int) -> str:
    return f"{rng.choice(OTHERS)} {rng.choice(NEGATIONS + DEGREES)} {rng.choice(ADJECTIVES[label])}."


def _plot(rng: random.Random) -> str:
    return f"{rng.choice(TIMES)} {rng.choice(PEOPLE)} {rng.choice(ACTIONS)} {rng.choice(PLACES)}."
