"""Facts after bAbI's first two tasks (Weston et al. 2015), scattered in other text as BABILong does (Kuratov et al. 2024).

The facts are ours.  Five people walk between six places, one random person to a random other place at a time, for twelve
steps; three objects are taken by whoever comes by, and stay with them or are put down.  Every sentence stands at a random
depth, in the order in which things happened, so the latest one holds.  Asked are where each person is (one fact) and where
each object is (two: who has it, or where they put it down).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from power_retention.evaluation.long.context import Context, Haystack, Question, finish, plant, room_for

PEOPLE = ("Alma", "Boris", "Clara", "Dmitri", "Edith")
PLACES = ("bakery", "harbour", "library", "garden", "station", "museum")
OBJECTS = ("lantern", "violin", "kettle")
STEPS = 12
ONE_FACT, TWO_FACTS = "one fact", "two facts"


def facts(haystack: Haystack, length: int, depths: Sequence[float], seed: int) -> list[Context]:
    """One context with a story in it, and a question for everyone and everything that it tells about; see the module."""
    rng = random.Random(f"facts {length} {seed}")
    encoder = haystack.encoder
    told, people, objects = tell(rng)
    questions = [
        *(_question(name, f"{name} last went to the", place, ONE_FACT) for name, place in people.items()),
        *(_question(f"the {name}", f"The {name} is in the", place, TWO_FACTS) for name, place in objects.items()),
    ]
    head = encoder(
        "Hidden in the text below is where people go and what they carry. What comes later holds. "
        "What somebody carries is where they are.\n\n"
        "Example: Fiona went to the cellar. Fiona took the hat there. Fiona went to the attic.\n"
        "Question: Where is Fiona?\nAnswer: Fiona last went to the attic.\n"
        "Question: Where is the hat?\nAnswer: The hat is in the attic.\n\n"
    )
    planted = [encoder(f" {sentence}") for sentence in told]
    room = room_for(encoder, length, questions, head, *planted)
    filler = haystack.fill(room, rng)
    at = sorted(rng.random() for _ in told)
    return [
        finish(
            "facts",
            length,
            seed,
            encoder,
            head + plant(filler, list(zip(at, planted, strict=True))),
            questions,
        )
    ]


def _question(subject: str, begun: str, place: str, variant: str) -> Question:
    others = [other for other in PLACES if other != place]
    return Question(
        f"\n\nQuestion: Where is {subject}?\nAnswer: {begun}",
        (place,),
        tuple(f" {name}" for name in (place, *others)),
        guess=1 / len(PLACES),
        variant=variant,
    )


def tell(rng: random.Random) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """(sentences, place of each person that moved, place of each object that was touched)."""
    sentences: list[str] = []
    place: dict[str, str] = {}
    carrier: dict[str, str] = {}
    left: dict[str, str] = {}
    for step in range(STEPS):
        name = PEOPLE[step] if step < len(PEOPLE) else rng.choice(PEOPLE)
        place[name] = rng.choice([other for other in PLACES if other != place.get(name)])
        sentences.append(f"{name} went to the {place[name]}.")
        carried = [thing for thing, by in carrier.items() if by == name]
        free = [t for t in OBJECTS if t not in carrier and left.get(t, place[name]) == place[name]]
        if carried and rng.random() < 0.5:
            thing = rng.choice(carried)
            left[thing] = place[name]
            del carrier[thing]
            sentences.append(f"{name} put down the {thing} there.")
        elif free:
            thing = rng.choice(free)
            carrier[thing] = name
            left.pop(thing, None)
            sentences.append(f"{name} took the {thing} there.")
    return sentences, place, left | {thing: place[name] for thing, name in carrier.items()}
