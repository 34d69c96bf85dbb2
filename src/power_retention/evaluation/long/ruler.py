"""Five of RULER's tasks (Hsieh et al. 2024, arXiv 2404.06654), by their published definitions; wording and words are ours.

- needle: one key with a seven-digit number in other text, at a given depth.
- multi-key needle: the same with a key at every depth; all of them are asked, each by itself, of one reading.
- variable tracking: a chain of five variables, each assigned the one before, the first a number; all five are wanted.
- common words: ten words thirty times and others three times each (6 and 1 below 4,096 tokens), numbered and shuffled.
- frequent words: coded words of six letters whose counts follow a zeta distribution with exponent 2; the most frequent
  is noise, and the next three are wanted.
"""

from __future__ import annotations

import math
import random
import string
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate

from power_retention.evaluation.long.context import (
    Context,
    Encoder,
    Haystack,
    Question,
    TooShortError,
    finish,
    flat,
    plant,
    room_for,
)

HOPS = 4
COMMON = 10
ZETA_OF_2 = math.pi**2 / 6
TOKENS_A_CODED_WORD = 50
"""Tokens of context for every coded word of the vocabulary."""

_DECOYS = 3
_PLAIN = " The door is open. The lamp is lit. The road is long. We walk on. Then we come home."


def needles(haystack: Haystack, length: int, depths: Sequence[float], seed: int) -> list[Context]:
    """A context for each depth, with one needle; see the module."""
    return [
        _with_needles("needle", haystack, length, [depth], random.Random(f"needle {length} {seed} {depth}"), seed)
        for depth in depths
    ]


def multi_key_needles(haystack: Haystack, length: int, depths: Sequence[float], seed: int) -> list[Context]:
    """One context with a needle at every depth; see the module."""
    rng = random.Random(f"multi-key {length} {seed}")
    return [_with_needles("multi-key needle", haystack, length, depths, rng, seed)]


def _with_needles(
    task: str, haystack: Haystack, length: int, depths: Sequence[float], rng: random.Random, seed: int
) -> Context:
    encoder = haystack.encoder
    keys = [haystack.compound(rng) for _ in depths]
    numbers = [str(n) for n in rng.sample(range(10**6, 10**7), max(len(keys), 1 + _DECOYS))]
    head = encoder("Keys and their secret numbers are hidden in the text below. Remember them.\n\n")
    planted = [
        (depth, encoder(f" The secret number of {key} is {number}."))
        for depth, key, number in zip(depths, keys, numbers, strict=False)
    ]
    questions = [
        Question(
            f"\n\nQuestion: What is the secret number of {key}?\nAnswer: The secret number of {key} is",
            (numbers[i],),
            tuple(f" {number}" for number in (numbers[i], *numbers[:i], *numbers[i + 1 :])),
            depth=depth,
        )
        for i, (depth, key) in enumerate(zip(depths, keys, strict=True))
    ]
    room = room_for(encoder, length, questions, head, *(ids for _, ids in planted))
    return finish(task, length, seed, encoder, head + plant(haystack.fill(room, rng), planted), questions)


def variable_tracking(haystack: Haystack, length: int, depths: Sequence[float], seed: int) -> list[Context]:
    """One context with a chain of assignments at random depths, in their order; see the module."""
    rng = random.Random(f"variables {length} {seed}")
    encoder = haystack.encoder
    names = _names(rng, (HOPS + 1) * (1 + _DECOYS))
    chain, decoys = names[: HOPS + 1], names[HOPS + 1 :]
    head, shown = _chain_example(rng, encoder), encoder(_TRACK)
    statements, question = _chain(rng, chain, decoys)
    planted = [encoder(statement) for statement in statements]
    room = room_for(encoder, length, [question], shown, *planted)
    if len(head) * 3 > room:
        head = []
    filler = _repeated(encoder(_PLAIN), room - len(head))
    depths_drawn = sorted(rng.random() for _ in statements)
    ids = head + shown + plant(filler, list(zip(depths_drawn, planted, strict=True)))
    return [finish("variable tracking", length, seed, encoder, ids, [question])]


_TRACK = "Assignments of variables are hidden in the text below. Follow them from variable to variable.\n\n"


def _chain(rng: random.Random, chain: Sequence[str], decoys: Sequence[str]) -> tuple[list[str], Question]:
    """(assignments in order, the question)."""
    value = str(rng.randrange(10000, 100000))
    statements = [
        f" VAR {name} = {value}." if i == 0 else f" VAR {name} = VAR {chain[i - 1]}." for i, name in enumerate(chain)
    ]
    lists = [chain, *(decoys[i : i + len(chain)] for i in range(0, len(decoys), len(chain)))]
    question = Question(
        f"\n\nQuestion: Which variables have the value {value}?\nAnswer: The {len(chain)} variables with the value {value} are",
        tuple(chain),
        tuple(" " + ", ".join(f"VAR {name}" for name in names) for names in lists),
    )
    return statements, question


def _chain_example(rng: random.Random, encoder: Encoder) -> list[int]:
    """A short context with its question and answer, which shows what is wanted."""
    statements, question = _chain(rng, _names(rng, HOPS + 1, letters=3), [])
    text = " The door is open.".join(statements)
    return encoder(f"{_TRACK}{text}{question.text}{question.candidates[0]}\n\n")


def _names(rng: random.Random, count: int, letters: int = 5) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    return list(names)


def _repeated(piece: list[int], tokens: int) -> list[list[int]]:
    """A sentence over and over, so many tokens of it; the first is cut at its front."""
    whole, part = divmod(tokens, len(piece))
    return ([piece[-part:]] if part else []) + [piece] * whole


def common_words(haystack: Haystack, length: int, depths: Sequence[float], seed: int) -> list[Context]:
    """One context: a numbered list of words, of which ten come more often; see the module."""
    rng = random.Random(f"common words {length} {seed}")
    encoder = haystack.encoder
    often, seldom = (30, 3) if length >= 4096 else (6, 1)
    pool = rng.sample(haystack.words, len(haystack.words))
    common, others = pool[:COMMON], pool[COMMON:]
    decoys = [others[i * COMMON : (i + 1) * COMMON] for i in range(_DECOYS)]
    head = encoder(_LIST)
    room = room_for(encoder, length, [_words_question(common, decoys)], head)
    example = _list_example(rng, pool[-40:], encoder)
    if len(example) * 4 > room:
        example = []
    words = _list_words(rng, encoder, common, others[:-40], (often, seldom), room - len(example))
    different = len(set(words))
    if different < 2 * COMMON:
        raise TooShortError(f"{different} different words fit")
    common.sort(key=words.index)
    listed = _numbered(encoder, words)
    question = _words_question(common, decoys, COMMON / different)
    ids = flat(haystack.fill(room - len(example) - len(listed), rng)) + example + head + listed
    return [finish("common words", length, seed, encoder, ids, [question])]


_LIST = "\nBelow is a numbered list of words. Some words come more often than others; remember those.\n\n"


def _words_question(common: Sequence[str], decoys: Sequence[Sequence[str]], guess: float = 0.0) -> Question:
    return Question(
        f"\n\nQuestion: Which {len(common)} words come most often in the list above?\n"
        f"Answer: The {len(common)} words that come most often are:",
        tuple(common),
        tuple(" " + " ".join(f"{i}. {word}" for i, word in enumerate(words, 1)) for words in (common, *decoys)),
        guess,
    )


def _numbered(encoder: Encoder, words: Sequence[str]) -> list[int]:
    return encoder.joined([f"{i}. {word}" for i, word in enumerate(words, 1)])


def _list_words(
    rng: random.Random,
    encoder: Encoder,
    common: Sequence[str],
    others: Sequence[str],
    times: tuple[int, int],
    room: int,
) -> list[str]:
    """Common words and as many others as fit when all are numbered, shuffled.

    Raises:
        TooShortError: not even the common ones fit, or there are too few others to come near the length.
    """
    often, seldom = times
    others = others[: room // seldom]
    order = rng.random()
    numbers = _sizes(encoder, [f" {i}." for i in range(1, often * len(common) + seldom * len(others) + 1)])
    of_common, of_others = (
        _sizes(encoder, [f" {word}" for word in common])[-1],
        _sizes(encoder, [f" {w}" for w in others]),
    )

    def size(count: int) -> int:
        return numbers[often * len(common) + seldom * count] + often * of_common + seldom * of_others[count]

    def draw(count: int) -> list[str]:
        words = [*common] * often + [word for word in others[:count] for _ in range(seldom)]
        random.Random(order).shuffle(words)
        return words

    return draw(_most_that_fits(size, lambda count: len(_numbered(encoder, draw(count))), room, len(others)))


def _sizes(encoder: Encoder, words: Sequence[str]) -> list[int]:
    """Tokens of the first 0, 1, 2, … words."""
    return [0, *accumulate(len(ids) for ids in encoder.many(words))]


def _most_that_fits(estimate: Callable[[int], int], size: Callable[[int], int], room: int, most: int) -> int:
    """The largest count whose tokens fit: by a quick estimate, of which what merges across words is taken back.

    Raises:
        TooShortError: none fits, or the largest count leaves more than a tenth of the room empty.
    """
    count = bisect_right(range(most + 1), room, key=estimate) - 1
    while count >= 0 and size(count) > room:
        count -= 1 + count // 50
    if count < 0:
        raise TooShortError(f"what comes often alone takes {estimate(0):,} of {room:,} tokens")
    if count == most and size(count) < 0.9 * room:
        raise TooShortError(f"{most:,} words fill {size(count):,} of {room:,} tokens")
    return count


def _list_example(rng: random.Random, words: Sequence[str], encoder: Encoder) -> list[int]:
    """A short list with its question and answer."""
    common = list(words[:COMMON])
    listed = common * 3 + list(words[COMMON:20])
    rng.shuffle(listed)
    question = _words_question(common, [])
    numbered = " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
    return encoder(f"{_LIST}{numbered}{question.text}{question.candidates[0]}\n\n")


def frequent_words(haystack: Haystack, length: int, depths: Sequence[float], seed: int) -> list[Context]:
    """One context of coded words; see the module."""
    rng = random.Random(f"frequent words {length} {seed}")
    encoder = haystack.encoder
    size = max(8, length // TOKENS_A_CODED_WORD)
    coded = list(dict.fromkeys(_coded(rng) for _ in range(size + 3 * _DECOYS)))
    words, spare = ["...", *coded[: size - 1]], coded[size - 1 :]
    order = rng.random()

    def draw(count: int) -> list[str]:
        row = [word for word, times in zip(words, _zeta_counts(count, len(words)), strict=True) for _ in range(times)]
        random.Random(order).shuffle(row)
        return row

    head = encoder("\nBelow is a text of coded words. Count how often each of them comes.\n\n")
    sizes = [len(ids) for ids in encoder.many([f" {word}" for word in (*words, *spare)])]
    possible = [*words[1 : 4 + 3 * _DECOYS], *spare]
    widest = max(possible, key=lambda word: len(encoder(f" {word}")))
    room = room_for(encoder, length, [_coded_question([widest] * 3, [], 1.0)], head)
    count = _most_that_fits(
        lambda count: sum(times * size for times, size in zip(_zeta_counts(count, len(words)), sizes, strict=False)),
        lambda count: len(encoder.joined(draw(count))),
        room,
        room,
    )
    row = draw(count)
    text = encoder.joined(row)
    drawn = set(row)
    present = [word for word in words[1:] if word in drawn]
    if len(present) < 5:
        raise TooShortError(f"{len(present)} different coded words fit")
    rest = [*present[3:], *spare]
    decoys = [rest[i * 3 : i * 3 + 3] for i in range(_DECOYS)]
    question = _coded_question(present[:3], decoys, 3 / len(present))
    ids = flat(haystack.fill(room - len(text), rng)) + head + text
    return [finish("frequent words", length, seed, encoder, ids, [question])]


def _zeta_counts(total: int, words: int) -> list[int]:
    """How often each of so many words comes among so many, the most frequent first."""
    return [int(total / (rank**2 * ZETA_OF_2)) for rank in range(1, words + 1)]


def _coded_question(wanted: Sequence[str], decoys: Sequence[Sequence[str]], guess: float) -> Question:
    return Question(
        "\n\nQuestion: Which three coded words come most often in the text above, the dots left out?\n"
        "Answer: The three coded words that come most often are:",
        tuple(wanted),
        tuple(" " + " ".join(words) for words in (wanted, *decoys)),
        guess=guess,
    )


def _coded(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=6))
