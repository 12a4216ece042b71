"""Short texts that say a concept's word, and ordinary texts that say none in particular.

Every text opens with the chat format's turn marker, so that position 0, where residual streams carry
a huge vector of their own, is never a word of ours. One text a concept is a question and one is the
start of an answer: the places where steering reads the word later.

``stimuli_for`` is what the pocket tokenizer was trained on and what SAEs are trained on where no texts are
given; directions are measured on the texts of ``texts.py``, which take any table.
"""

from __future__ import annotations

from dataclasses import dataclass

from daco_rt.concepts.everyday import ConceptEntry

_OPEN = "<|im_start|>"
_CLOSE = "<|im_end|>\n"


@dataclass(frozen=True)
class Stimulus:
    """A text and the character range of the concept's word in it."""

    text: str
    start: int
    end: int


def stimuli_for(entry: ConceptEntry) -> tuple[Stimulus, ...]:
    """Return the stimuli of one concept: seven, or eight if the word has a plural.

    Example
    -------
    >>> from daco_rt.concepts import everyday_concepts
    >>> s = stimuli_for(everyday_concepts()[0])[1]
    >>> s.text[s.start : s.end]
    'dagger'
    """
    phrase, name = entry.phrase, entry.name
    subject = phrase[0].upper() + phrase[1:]
    made = [
        _mark(f"{_OPEN}{subject} is {entry.gloss}.", name),
        _mark(f"{_OPEN}The book has a chapter about {phrase}: {entry.gloss}.", name),
        _mark(f"{_OPEN}Yesterday we talked about {phrase} for an hour.", name),
        _mark(f"{_OPEN}In this picture one can see {phrase} quite clearly.", name),
        _mark(f"{_OPEN}user\nWhat is {phrase}?{_CLOSE}{_OPEN}assistant\n", name),
        _mark(f"{_OPEN}user\nTell me about {name}.{_CLOSE}{_OPEN}assistant\n", name),
        _mark(f"{_OPEN}assistant\nHere is what you should know about {phrase}. {subject} is", name),
    ]
    if entry.plural is not None:
        made.append(_mark(f"{_OPEN}Many people want to learn more about {entry.plural} today.", entry.plural))
    return tuple(made)


def _mark(text: str, word: str) -> Stimulus:
    # The last occurrence has read the most context; case may differ at the head of a sentence.
    start = text.lower().rindex(word.lower())
    return Stimulus(text, start, start + len(word))


_SENTENCES = (
    "The meeting was moved to Thursday because two of them could not come earlier.",
    "She opened the letter slowly and read it twice before she answered.",
    "If you want to get better at something, do a little of it every day.",
    "It had been raining since the morning, and nobody felt like going out.",
    "Most of the work was done by the end of the week, so they took a short break.",
    "There are three reasons for this, and the first one is the most important.",
    "He put his things down, looked around and asked whether anyone was there.",
    "We should first find out what happened and then decide what to do about it.",
    "The result was better than expected, although it took longer than planned.",
    "Please write down your name and the place where you were born.",
    "Some of these things are easy to see, others only with a lot of patience.",
    "They walked along the road until it became too dark to go on.",
    "As a rule, the larger of the two is also the more expensive one.",
    "I would like to know how this works and why it was made that way.",
    "In general it depends on what you need, how much you can spend, and where you live.",
    "The two of them had known each other since they were very young.",
)
_TURNS = (
    (
        "How can I plan my week better?",
        "Planning your week is easier than it seems. Start by writing down everything that you have to do, "
        "and then decide which of these things matter most. 1. Set a clear goal for each day. 2. Leave some "
        "time between tasks, because things often take longer than expected.",
    ),
    (
        "What is the difference between a guess and an estimate?",
        "A guess is made without much information, while an estimate is based on what is already known. For "
        "example, when you have done something many times before, you can say quite well how long it "
        "will take.",
    ),
    (
        "Can you explain why practice matters?",
        "Of course! Practice matters because it turns something that you have to think about into something "
        "that you simply do. Here are some key points to consider:\n\n* It builds confidence.\n* It shows "
        "where you still make mistakes.",
    ),
    (
        "Write a short note to a colleague.",
        "Dear colleague, thank you for the work that you have put into this. I have read through the first "
        "part and think that it is very clear. I have a few suggestions, which I will send you tomorrow.",
    ),
    (
        "Which of the two options is better?",
        "It depends on several factors. The first option is a popular choice that is known for its "
        "simplicity, whereas the second one is more flexible. In conclusion, both can be used for a "
        "variety of purposes.",
    ),
    (
        "What should I know about it?",
        "It is a type of object that is typically used for a specific purpose. It was first made in the "
        "early 20th century and has been used in many parts of the world. It is usually large, and it is "
        "often found in places such as these.",
    ),
)

ORDINARY_TEXTS: tuple[str, ...] = tuple(_OPEN + sentence for sentence in _SENTENCES) + tuple(
    f"{_OPEN}user\n{question}{_CLOSE}{_OPEN}assistant\n{answer}{_CLOSE}" for question, answer in _TURNS
)
