"""What a picture's thing is called in a sentence: from the labels of emoji and the titles of clip art."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Collection
from functools import cache
from pathlib import Path

import daco_rt

# Signs and letters, and what differs in a detail that 64 pixels do not show.
_UNSPOKEN = frozenset(
    [
        "keycap",
        "alphanum",
        "arrow",
        "av symbol",
        "punctuation",
        "math",
        "zodiac",
        "skin tone",
        "gender",
        "time",
        "currency",
        "other symbol",
        "warning",
        "transport sign",
        "family",
        "person symbol",
    ]
)
_MASS = frozenset(
    [
        "archery",
        "bacon",
        "badminton",
        "bowling",
        "bread",
        "butter",
        "camping",
        "chess",
        "confetti",
        "cooking",
        "cricket",
        "curry",
        "custard",
        "dango",
        "dna",
        "fencing",
        "fishing",
        "football",
        "garlic",
        "ginger",
        "golf",
        "hockey",
        "honey",
        "ice",
        "lacrosse",
        "luggage",
        "milk",
        "money",
        "music",
        "oden",
        "popcorn",
        "racing",
        "rain",
        "rice",
        "rugby",
        "sake",
        "salt",
        "smoke",
        "snow",
        "spaghetti",
        "sushi",
        "tea",
        "tennis",
        "thread",
        "water",
        "wine",
        "wood",
        "wrestling",
        "yarn",
    ]
)
_VOWEL = re.compile(r"(?!uni|use|us[bk]|eu|one|ut|ukulele)[aeiou]", re.I)
_BETWEEN = re.compile(r" (?:with|without|of|in|on|at|over|under|for|showing|facing|and|to|from|by) ")
_TOPICS = frozenset(
    [
        "animal",
        "artifact",
        "body",
        "communication",
        "food",
        "object",
        "person",
        "phenomenon",
        "plant",
        "shape",
        "substance",
    ]
)
# Folders of the clip art that hold things; icons, shapes, patterns, cards and flags are named for their use.
_FOLDERS = frozenset(
    [
        "animals",
        "buildings",
        "clothing",
        "containers",
        "decorations",
        "education",
        "electronics",
        "food",
        "music",
        "office",
        "people",
        "plants",
        "science",
        "tools",
        "toys",
        "transportation",
        "vehicles",
        "weapons",
        "weather",
        "clocks",
        "hardware",
        "recreation",
    ]
)
_OTHER = frozenset(["cards", "stickmen", "roadsigns", "boating", "pantyhose", "astronomy", "chess"])
# Of how or by whom it was drawn.
_STYLE = re.compile(r"\b(?:arch|benji park|contour|illustration|outline|silhouette|simple|sketch|another)\b")
_LATIN = re.compile(r"[a-z]+(?:['’][a-z]+)?(?:[ -][a-z]+(?:['’][a-z]+)?){0,2}")


def with_article(name: str) -> str:
    """Return a noun phrase with its indefinite article, where it takes one.

    Example
    -------
    >>> [with_article(name) for name in ("apple", "clinking beer mugs", "glass of milk", "bread")]
    ['an apple', 'clinking beer mugs', 'a glass of milk', 'bread']
    """
    words = name.split()
    head = _BETWEEN.split(name)[0].split()[-1]
    plural = head.endswith("s") and not head.endswith(("ss", "us", "is"))
    proper = all(word[0].isupper() for word in words) and not words[0].isupper()
    if plural or proper or head in _MASS:
        return name
    return f"{'an' if _VOWEL.match(name) else 'a'} {name}"


def emoji_phrase(label: str, subgroup: str) -> str | None:
    """Return how a sentence names the emoji ``label``, or None where none does it well.

    Example
    -------
    >>> emoji_phrase("flag: Greece", "country flag"), emoji_phrase("man: bald", "person")
    ('the flag of Greece', None)
    """
    if label.startswith("flag: "):
        return f"the flag of {label[6:]}"
    if subgroup in _UNSPOKEN or ":" in label or len(label.split()) > 6:
        return None
    return with_article(label)


def is_drawn_thing(caption: str) -> bool:
    """Whether clip art lies in a folder of things: its caption ends with the folders, innermost first.

    Example
    -------
    >>> is_drawn_thing("Teapot (beverages, food)"), is_drawn_thing("tab new (action, icons, computer)")
    (True, False)
    """
    found = re.search(r"\(([^()]*)\)$", caption)
    folders = set(found[1].split(", ")) if found else set()
    return bool(folders & _FOLDERS) and not folders & _OTHER


def clip_name(title: str, stem: str, known: Collection[str]) -> str | None:
    """Return the short name of a clip-art picture: of its title, else of its file; None where neither is one.

    A name has one to three words in Latin letters, and its last is a noun in ``known``.

    Example
    -------
    >>> clip_name("Stylized Wolf Head", "x", {"head"}), clip_name("gramastar", "04-teapot_2", {"teapot"})
    ('stylized wolf head', 'teapot')
    """
    for text in (title.split(" - ")[-1], re.sub(r"^\d+-", "", stem)):
        words = _STYLE.sub(" ", re.sub(r"[\d_().,]+", " ", text.lower())).split()
        name = " ".join(words)
        short = min(map(len, words), default=0) < 3
        if not short and _LATIN.fullmatch(name) and re.split("[ -]", name)[-1] in known:
            return name
    return None


@cache
def known_nouns() -> frozenset[str]:
    """Nouns of the package's concepts that can be seen: one word each, lower case."""
    file = Path(daco_rt.__file__).parent / "data" / "wordnet-concepts.jsonl.gz"
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return frozenset(
        word
        for row in rows
        if row["topic"] in _TOPICS
        for word in row["words"]
        if word.isalpha() and word.islower()
    )
