"""Evaluation tasks of the demo model: held-out additions and key-value recall.

A compiler pass is only as good as the answers it leaves intact. These tasks have exact answers that the demo
model gets right, so the share it still gets right after a pass measures what the pass did to the model. Every
function here is deterministic in its seed, and the module needs neither torch nor transformers:

    from adkit.models.demo.tasks import addition_tasks, is_correct, recall_tasks

    tasks = addition_tasks(200) + recall_tasks(200)
    right = sum(is_correct(task, complete(task.prompt)) for task in tasks)   # complete: your engine, greedy

`MAX_NEW_TOKENS` tokens are enough for every answer. A prompt is plain text that ends with its question mark;
it can also be sent as the user message of a chat, and `is_correct` grades both kinds of reply.

The split rule: an addition whose two operands both have two digits is held out of training when a checksum of
the *unordered* pair says so, hence a + b is held out exactly when b + a is. Recall problems are random
combinations from a space far too large to memorise, so they need no split.
"""

# ruff: noqa: SIM905 (a word list reads best as words)

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from random import Random

MAX_NEW_TOKENS = 40
"""Tokens that suffice for any answer to a task of this module, the end token included."""

NAMES_SHE = tuple(
    (
        "Mara Lina Tess Nora Ivy Anya Ruth Wren Opal Dora Elsa Hana Juna Kira Maple Pia Rosa Sana Vera Zoe"
    ).split()
)
NAMES_HE = tuple(
    (
        "Tobin Oskar Finn Hugo Ravi Milo Jonas Pip Bram Otto Emil Felix Gus Ivan Karl Leo Nils Sami Theo Wim"
    ).split()
)
NAMES = NAMES_SHE + NAMES_HE
OBJECTS = tuple(
    (
        "kite drum lamp spoon scarf bell basket flute map rope lantern ladder coin button ribbon mirror "
        "hammer candle teapot blanket compass whistle puzzle marble brush pencil bottle clock crown feather "
        "helmet jar kettle locket mitten needle notebook paddle pillow quilt ring saddle shell sled stool "
        "trumpet umbrella violin wagon"
    ).split()
)
ROOMS = tuple(
    (
        "attic barn cellar chapel cottage garden hall harbour kitchen library mill office pantry school "
        "shed stable studio tower tunnel workshop"
    ).split()
)
COLOURS = tuple("red blue green yellow white black brown orange purple pink grey golden silver".split())


@dataclass(frozen=True)
class Task:
    """One problem: `prompt` is the text to complete, `answer` the word or number the completion must give."""

    name: str
    prompt: str
    answer: str


# --- addition ---------------------------------------------------------------------------


def is_held_out(a: int, b: int) -> bool:
    """Whether a + b is kept out of training (about one pair in ten); the order of a and b does not matter."""
    low, high = min(a, b), max(a, b)
    if low < 10 or high > 99:
        return False
    return zlib.crc32(f"{low}+{high}".encode()) % 10 == 0


@cache
def held_out_pairs() -> tuple[tuple[int, int], ...]:
    """All held-out ordered pairs (a, b), both orders of each, sorted."""
    return tuple((a, b) for a in range(10, 100) for b in range(10, 100) if is_held_out(a, b))


def addition_tasks(count: int | None = None, seed: int = 0) -> list[Task]:
    """Held-out two-digit additions, no problem twice.

    `count` problems drawn by `seed`, or with None every held-out ordered pair. Raises ValueError if more are
    asked for than there are.
    """
    pairs = list(held_out_pairs())
    if count is not None:
        if not 0 <= count <= len(pairs):
            raise ValueError(
                f"count must be between 0 and {len(pairs)} (the held-out ordered pairs), got {count}"
            )
        pairs = Random(f"addition-{seed}").sample(pairs, count)
    return [Task(f"add/{a}+{b}", f"What is {a} + {b}?", str(a + b)) for a, b in pairs]


# --- recall -----------------------------------------------------------------------------


def made_up_word(rng: Random) -> str:
    """A random pronounceable word of two or three syllables, such as `belo` or `tarimu`."""
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.choice((2, 2, 3))))


def digit_string(rng: Random) -> str:
    """A random string of two to five digits without a leading zero."""
    return str(rng.randint(1, 9)) + "".join(rng.choice("0123456789") for _ in range(rng.randint(1, 4)))


def _name(rng: Random) -> str:
    return rng.choice(NAMES) if rng.random() < 0.8 else made_up_word(rng).capitalize()


def _object(rng: Random) -> str:
    return rng.choice(OBJECTS) if rng.random() < 0.8 else made_up_word(rng)


def _room(rng: Random) -> str:
    return rng.choice(ROOMS)


def _any(rng: Random) -> str:
    kind = rng.random()
    if kind < 0.4:
        return digit_string(rng)
    return made_up_word(rng) if kind < 0.7 else rng.choice(OBJECTS)


@dataclass(frozen=True)
class RecallKind:
    """A way to state pairs and to ask for one: format strings over `{k}` (key) and `{v}` (value)."""

    name: str
    key: Callable[[Random], str]
    value: Callable[[Random], str]
    fact: str
    question: str
    reply: str
    asks_for: str = "v"
    separator: str = " "


RECALL_KINDS = (
    RecallKind("has", _name, _object, "{k} has the {v}.", "What does {k} have?", "{k} has the {v}."),
    RecallKind("who", _name, _object, "{k} has the {v}.", "Who has the {v}?", "The {v} is with {k}.", "k"),
    RecallKind(
        "lives", _name, _room, "{k} lives in the {v}.", "Where does {k} live?", "{k} lives in the {v}."
    ),
    RecallKind(
        "box",
        digit_string,
        _object,
        "Box {k} holds the {v}.",
        "What does box {k} hold?",
        "Box {k} holds the {v}.",
    ),
    RecallKind(
        "code",
        _room,
        digit_string,
        "The code for the {k} is {v}.",
        "What is the code for the {k}?",
        "The code for the {k} is {v}.",
    ),
    RecallKind(
        "value",
        _any,
        _any,
        "{k}: {v}",
        "What is the value of {k}?",
        "The value of {k} is {v}.",
        separator="\n",
    ),
)


@dataclass(frozen=True)
class RecallProblem:
    """A drawn recall problem: the text of the facts, the question, the full reply and the graded answer."""

    kind: str
    facts: str
    question: str
    reply: str
    answer: str
    separator: str

    @property
    def prompt(self) -> str:
        """Facts and question as one text."""
        return self.facts + self.separator + self.question


def draw_facts(rng: Random, pairs: int, kind: RecallKind) -> list[tuple[str, str]]:
    """Draw `pairs` key-value pairs; no key or value occurs twice in them."""
    used: set[str] = set()
    facts: list[tuple[str, str]] = []
    while len(facts) < pairs:
        key, value = kind.key(rng), kind.value(rng)
        if key != value and not used & {key, value}:
            used |= {key, value}
            facts.append((key, value))
    return facts


def ask(kind: RecallKind, facts: list[tuple[str, str]], about: tuple[str, str]) -> RecallProblem:
    """The recall problem that states `facts` and asks for one of them, `about`."""
    key, value = about
    return RecallProblem(
        kind.name,
        kind.separator.join(kind.fact.format(k=k, v=v) for k, v in facts),
        kind.question.format(k=key, v=value),
        kind.reply.format(k=key, v=value),
        value if kind.asks_for == "v" else key,
        kind.separator,
    )


def draw_recall(rng: Random, pairs: int, kind: RecallKind) -> RecallProblem:
    """Draw a recall problem of a kind with `pairs` key-value pairs."""
    facts = draw_facts(rng, pairs, kind)
    return ask(kind, facts, rng.choice(facts))


def recall_tasks(count: int, seed: int = 0, pairs: tuple[int, int] = (3, 8)) -> list[Task]:
    """`count` recall problems, each with a number of pairs drawn from the inclusive range `pairs`.

    The kinds take turns, so every kind has its equal share.
    """
    if count < 0 or not 1 <= pairs[0] <= pairs[1] <= 16:
        raise ValueError(f"need count >= 0 and 1 <= pairs[0] <= pairs[1] <= 16, got {count=} {pairs=}")
    rng = Random(f"recall-{seed}")
    tasks = []
    for index in range(count):
        problem = draw_recall(rng, rng.randint(*pairs), RECALL_KINDS[index % len(RECALL_KINDS)])
        tasks.append(Task(f"recall/{problem.kind}/{index}", problem.prompt, problem.answer))
    return tasks


# --- grading ----------------------------------------------------------------------------


def first_statement(completion: str) -> str:
    """The part of a completion that is graded: up to the first full stop, line break or special token."""
    return re.split(r"[.\n]|<\|", completion.lstrip(), maxsplit=1)[0].strip()


def is_correct(task: Task, completion: str) -> bool:
    """Whether `completion` (the generated text alone, without the prompt) gives the task's exact answer.

    Only the first statement counts, and it must end with the answer as a whole word or number: of
    ` 27 + 45 = 72.` that is 72. Text generated after the first statement neither helps nor hurts.
    """
    return re.search(rf"(?<!\w){re.escape(task.answer)}$", first_statement(completion)) is not None
