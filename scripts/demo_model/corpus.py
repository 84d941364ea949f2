"""The training corpus of the demo model, made up on the fly.

`document(rng)` draws one document: a story, an addition, a recall problem, or a chat about any of these. A
document is a list of segments `(text, counts)`: the segments are tokenised one by one and joined, and
`counts` says whether the training loss counts their tokens (a question's random numbers cannot be
predicted). Every document ends with the end token. Additions never use a held-out pair
(`adkit.models.demo.tasks.is_held_out`).
"""

from __future__ import annotations

from random import Random

from adkit.models.demo.tasks import NAMES, OBJECTS, RECALL_KINDS, ask, draw_facts, is_held_out, made_up_word
from scripts.demo_model import smalltalk
from scripts.demo_model.stories import KINDS, TREASURES, story, with_article

END, USER, ASSISTANT, SYSTEM, PAD = "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|pad|>"
SPECIAL_TOKENS = (PAD, END, USER, ASSISTANT, SYSTEM)

Segment = tuple[str, bool]

# Looking up a key by its value ("who") is much harder to learn than the other way round, hence its weight.
RECALL_WEIGHTS = tuple(6 if kind.asks_for == "k" else 1 for kind in RECALL_KINDS)
COUNTED = tuple(word for word in OBJECTS if word[-1] not in "fhs")
ADD_QUESTIONS = (
    "What is {a} + {b}?", "What is {a} + {b}?", "What is {a} + {b}?", "What is {a} + {b}?",
    "What is {a}+{b}?", "what is {a} + {b}", "What is {a} plus {b}?", "How much is {a} + {b}?",
    "How much is {a} plus {b}?", "Add {a} and {b}.", "What is the sum of {a} and {b}?", "Compute {a} + {b}.",
    "Calculate {a} + {b}.", "Please add {a} and {b}.", "Can you add {a} and {b}?",
    "Q: What is {a} + {b}?\nA:",
)  # fmt: skip


def operands(rng: Random) -> tuple[int, int]:
    """Two numbers from 0 to 99 to add in training: mostly two-digit ones, never a held-out pair."""
    while True:
        kind = rng.random()
        a = rng.randint(0, 9) if kind < 0.12 else rng.randint(10, 99)
        b = rng.randint(0, 9) if kind < 0.06 or 0.12 <= kind < 0.18 else rng.randint(10, 99)
        if not is_held_out(a, b):
            return a, b


def addition(rng: Random) -> tuple[str, str]:
    """A question for a sum and its reply."""
    a, b = operands(rng)
    if rng.random() < 0.12:
        name, thing = rng.choice(NAMES), rng.choice(COUNTED) + "s"
        ask = rng.choice((
            "{n} has {a} {t} and gets {b} more. How many {t} does {n} have now?",
            "{n} found {a} {t} on Monday and {b} {t} on Tuesday. How many {t} did {n} find?",
        ))  # fmt: skip
        end = f"{name} has {a + b} {thing}." if "has" in ask else f"{name} found {a + b} {thing}."
        return ask.format(n=name, t=thing, a=a, b=b), f"{a} + {b} = {a + b}. {end}"
    return rng.choice(ADD_QUESTIONS).format(a=a, b=b), f"{a} + {b} = {a + b}."


def recalls(rng: Random, questions: int) -> list[tuple[str, str]]:
    """Facts with a question about one of them, and the reply; then more questions about the same facts."""
    pairs = rng.randint(1, 9) if rng.random() < 0.8 else rng.randint(10, 16)
    kind = rng.choices(RECALL_KINDS, RECALL_WEIGHTS)[0]
    pool = draw_facts(rng, pairs, kind)
    problems = [ask(kind, pool, about) for about in rng.sample(pool, min(questions, pairs))]
    first = problems[0]
    separator = first.separator if rng.random() < 0.8 else rng.choice((" ", "\n", "\n\n"))
    facts = first.facts if rng.random() < 0.8 else first.facts.replace(". ", ".\n")
    asked = [(problem.question, problem.reply) for problem in problems]
    return [(facts + separator + first.question, first.reply), *asked[1:]]


def recall(rng: Random) -> tuple[str, str]:
    """Facts with a question about one of them, and the reply."""
    return recalls(rng, 1)[0]


def story_request(rng: Random) -> tuple[str, str]:
    """A wish for a story, sometimes about somebody or something, and the story."""
    kind = rng.random()
    if kind < 0.4:
        return rng.choice(smalltalk.STORY_REQUESTS), story(rng)
    ask = rng.choice(smalltalk.STORY_REQUESTS_ABOUT)
    if kind < 0.6:
        name = rng.choice(NAMES)
        return ask.format(name), story(rng, hero=name)
    if kind < 0.8:
        animal = rng.choice(KINDS)
        return ask.format(with_article(animal)), story(rng, kind=animal)
    treasure = rng.choice(TREASURES)
    return ask.format(with_article(treasure)), story(rng, treasure=treasure)


def small_talk(rng: Random) -> tuple[str, str]:
    """A greeting, a question about the model, or one it cannot answer, and the reply."""
    questions, replies = rng.choice(smalltalk.EXCHANGES)
    question = rng.choice(questions)
    if "{" in question:
        topic = rng.choice((*OBJECTS, *NAMES, made_up_word(rng), made_up_word(rng).capitalize()))
        question = question.format(topic)
    return question, rng.choice(replies)


def exchange(rng: Random) -> tuple[str, str]:
    """One question and reply of any sort, for chats."""
    kind = rng.random()
    if kind < 0.02:
        a, b = operands(rng)
        return f"{a} + {b}", f"{a} + {b} = {a + b}."
    if kind < 0.36:
        return addition(rng)
    if kind < 0.72:
        return recall(rng)
    return story_request(rng) if kind < 0.82 else small_talk(rng)


def _plain(rng: Random, question: str, reply: str) -> list[Segment]:
    """A question and its reply as plain text, with the ways in which a prompt may end."""
    counts = rng.random() < 0.1
    kind = rng.random()
    if kind < 0.76:
        return [(question, counts), (" " + reply + END, True)]
    gap = " " if kind < 0.86 else rng.choice(("\n", "\n", "\n\n", " \n"))
    return [(question + gap, counts), (reply + END, True)]


def _equation(rng: Random) -> list[Segment]:
    """A bare equation to complete, `27 + 45` or `27 + 45 =`; at times with the space already typed."""
    a, b = operands(rng)
    left = f"{a} + {b}"
    cuts = ((left, f" = {a + b}."), (f"{left} =", f" {a + b}."), (f"{left} = ", f"{a + b}."))
    question, reply = rng.choice(cuts)
    return [(question, False), (reply + END, True)]


def _chat(rng: Random) -> list[Segment]:
    """A chat of a few exchanges, at times with a system message or more than one question about its facts."""
    turns = rng.choice((1, 1, 1, 1, 2, 2, 3, 4))
    counts = rng.random() < 0.1
    segments: list[Segment] = []
    if rng.random() < 0.2:
        segments.append((SYSTEM + rng.choice(smalltalk.SYSTEM_MESSAGES), counts))
    exchanges = [exchange(rng) for _ in range(turns)]
    if rng.random() < 0.3:
        exchanges = recalls(rng, turns + 1) + exchanges[: turns - 1]
    for question, reply in exchanges:
        segments += [(USER + question + ASSISTANT, counts), (reply + END, True)]
    return segments


def _story(rng: Random) -> list[Segment]:
    """A story on its own; at times cut after a space or a line break, as a prompt may be."""
    text = story(rng) + END
    once = "Once upon a time"
    if text.startswith(once) and rng.random() < 0.1:
        return [(once + rng.choice((" ", "\n")), True), (text[len(once) + 2 :], True)]
    if rng.random() > 0.12:
        return [(text, True)]
    spaces = [index for index, character in enumerate(text) if character == " "]
    cut = rng.choice(spaces[:12])
    gap = " " if rng.random() < 0.7 else "\n"
    return [(text[:cut] + gap, True), (text[cut + 1 :], True)]


def _several(rng: Random) -> list[Segment]:
    """Several questions with their replies: about the same facts, or unrelated ones."""
    count = rng.randint(2, 5)
    if rng.random() < 0.7:
        solved = recalls(rng, count)
    else:
        solve = rng.choice((addition, recall))
        solved = [solve(rng) for _ in range(count)]
    segments: list[Segment] = []
    for question, reply in solved:
        segments += [(question, False), (" " + reply, True), ("\n", False)]
    return [*segments[:-1], (END, True)]


def document(rng: Random) -> list[Segment]:
    """One document of the corpus, drawn by `rng`."""
    kind = rng.random()
    if kind < 0.2:
        return _story(rng)
    if kind < 0.4:
        return _equation(rng) if kind < 0.22 else _plain(rng, *addition(rng))
    if kind < 0.7:
        return _plain(rng, *recall(rng))
    if kind < 0.72:
        return _plain(rng, *story_request(rng))
    if kind < 0.74:
        return _plain(rng, *small_talk(rng))
    return _chat(rng) if kind < 0.9 else _several(rng)


def text_of(segments: list[Segment]) -> str:
    """The text of a document, its special tokens included."""
    return "".join(text for text, _ in segments)
