"""A grammar of short stories set in a small coherent world.

A story has a hero, a friend, a home and one of ten plots. Whatever is named once keeps its name, its kind and
its pronouns to the end, which is what a small model can learn to carry through.
"""

# ruff: noqa: SIM905 (a word list reads best as words)

from __future__ import annotations

from random import Random

from adkit.models.demo.tasks import COLOURS, NAMES_HE, NAMES_SHE
from scripts.demo_model import plots

KINDS = (
    "girl boy fox rabbit owl bear mouse goat frog otter hedgehog squirrel duck badger deer kitten baker "
    "sailor farmer painter miller weaver"
).split()
TRAITS = "small brave quiet kind curious clever gentle cheerful shy young patient careful".split()
HOMES = (
    "in {} forest,in {} valley,on {} island,on {} hill,in {} village,in {} meadow,by {} harbour,by {} river,"
    "by {} lake,near {} mountain"
).split(",")
HOME_TRAITS = "quiet green sunny windy distant tiny wide misty little snowy".split()
TREASURES = (
    "kite drum lantern bell scarf flute map compass whistle ring feather shell button ribbon marble mirror "
    "locket crown basket notebook"
).split()
SPOTS = (
    "under the old oak,behind the mill,in the tall grass,beside the well,under the bridge,inside the barn,"
    "near the garden gate,behind the bakery,on the windowsill,at the foot of the tower,"
    "under a pile of leaves,next to the pond"
).split(",")
HOUSES = "mill tower barn chapel school bakery stable library".split()
FOODS = "pumpkins carrots berries apples beans pears cherries turnips plums tomatoes".split()
MEALS = "warm soup,fresh bread,apple pie,honey cake,hot tea,berry jam,sweet porridge".split(",")
SKILLS = "swim,whistle,paint,dance,skate,bake bread,climb trees,play the flute,sail,juggle,sing,knit".split(
    ","
)
FEELINGS = "happy proud glad cheerful thankful calm".split()
TROUBLES = (
    ("rope", "in a deep hole"),
    ("ladder", "on the roof of the barn"),
    ("boat", "on a rock in the river"),
    ("ladder", "high up in a tree"),
    ("rope", "at the bottom of a dry well"),
)


def _parse(plot: str) -> tuple[tuple[str, ...], ...]:
    """The sentences of a plot, each with all the ways to say it."""
    sentences: list[list[str]] = []
    for line in plot.strip().splitlines():
        if line.startswith("| "):
            sentences[-1].append(line[2:])
        elif line == "@friend":
            sentences.extend([list(way) for way in _parse(plots.FRIEND)])
        else:
            sentences.append([line])
    return tuple(tuple(ways) for ways in sentences)


_OPENING, _ENDING = _parse(plots.OPENING), _parse(plots.ENDING)
_PLOTS = {name: _parse(plot) for name, plot in plots.PLOTS.items()}


def with_article(word: str) -> str:
    """The word with its indefinite article: `a fox`, `an owl`."""
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _person(rng: Random, kinds: list[str], name: str | None = None) -> tuple[str, str, bool]:
    """Draw (name, kind, is she); a given name decides whether the person is a she."""
    kind = rng.choice(kinds)
    if name is not None:
        she = name in NAMES_SHE
        if kind in ("girl", "boy"):
            kind = "girl" if she else "boy"
        return name, kind, she
    she = kind == "girl" or (kind != "boy" and rng.random() < 0.5)
    return rng.choice(NAMES_SHE if she else NAMES_HE), kind, she


def draw_fields(
    rng: Random, hero: str | None = None, kind: str | None = None, treasure: str | None = None
) -> dict[str, str]:
    """Draw everything the templates name; a given hero name, kind of hero or treasure is kept."""
    name, own_kind, she = _person(rng, [kind] if kind else KINDS, hero)
    friend, friend_kind, friend_she = _person(rng, KINDS)
    while friend == name or friend_kind == own_kind:
        friend, friend_kind, friend_she = _person(rng, KINDS)
    they, them, their = ("she", "her", "her") if she else ("he", "him", "his")
    treasure = treasure or rng.choice(TREASURES)
    other = rng.choice([word for word in TREASURES if word != treasure])
    trait, colour, meal = rng.choice(TRAITS), rng.choice(COLOURS), rng.choice(MEALS)
    home = rng.choice(HOMES).format("a " + rng.choice(HOME_TRAITS))
    tool, place = rng.choice(TROUBLES)
    spot, spot2 = rng.sample(SPOTS, 2)
    house, house2, house3 = rng.sample(HOUSES, 3)
    return {
        "hero": name, "kind": own_kind, "they": they, "them": them, "their": their, "They": they.capitalize(),
        "Their": their.capitalize(), "who": f"{with_article(trait)} {own_kind} named {name}", "home": home,
        "a_trait": with_article(trait), "friend": friend, "fkind": friend_kind,
        "a_fkind": with_article(friend_kind), "fthey": "she" if friend_she else "he",
        "ftheir": "her" if friend_she else "his", "treasure": treasure, "a_treasure": with_article(treasure),
        "colour": colour, "a_colour": with_article(colour), "other": other, "a_other": with_article(other),
        "meal": meal, "meal_noun": meal.split()[-1], "tool": tool, "place": place, "spot": spot,
        "spot2": spot2, "house": house, "house2": house2, "house3": house3, "food": rng.choice(FOODS),
        "skill": rng.choice(SKILLS), "feeling": rng.choice(FEELINGS),
    }  # fmt: skip


def story(rng: Random, **fixed: str) -> str:
    """A story of about 60 to 110 words; `fixed` may fix `hero` (a name), `kind` (of hero) or `treasure`.

    With a fixed treasure only plots that are about a treasure are drawn.
    """
    fields = draw_fields(rng, **fixed)
    plot = _PLOTS[rng.choice(plots.TREASURE_PLOTS if "treasure" in fixed else tuple(_PLOTS))]
    return " ".join(rng.choice(ways).format_map(fields) for ways in (*_OPENING, *plot, *_ENDING))
