"""Traffic whose subject changes: requests by phase, made from templates by seed.

The first phase is like what the shipped drafter was trained on; the others are not.
"""

from collections.abc import Iterator
from itertools import islice
from random import Random

from kvarn.core.errors import ConfigError, nearest
from kvarn.speculate.train.corpus import HELD_OUT_TOPICS, QUESTIONS, items

DEEDS = """
counts the vowels in {}; reverses {}; removes duplicates from {}; finds the longest element of {};
prints every second element of {}; sorts {} by length; merges two copies of {}; checks whether {} is
a palindrome; returns the sum of the digits in {}; splits {} into pairs; converts {} to upper case;
rotates {} by n places; counts how often each element occurs in {}; filters the even numbers out of
{}; computes the mean and the median of {}; writes {} to a CSV file; reads {} from a JSON file;
validates {} and raises ValueError; caches {} in a dictionary; compares {} with another one
""".replace("\n", " ")
THINGS = """
a list of integers; a string; a dictionary of prices; a nested list; a tuple of names; a sentence; a
matrix; a list of dates; a text file; a set of words; a binary number; a queue; a list of tuples; a
phone number; an email address; a linked list; a row of scores; a list of floats
""".replace("\n", " ")
FORMAS = """
Escribe un cuento corto sobre {}.; Explica a un niño qué es {}.; ¿Por qué es importante {}?; Dame
cinco consejos sobre {}.; Escribe una carta a un amigo sobre {}.; Describe {} en tres frases.;
Resume la historia de {}.; ¿Cuáles son las ventajas de {}?; Escribe un poema sobre {}.; ¿Cómo
funciona {}?; Haz una lista de diez palabras sobre {}.; Escribe un diálogo sobre {}.
""".replace("\n", " ")
TEMAS = """
el mar; la amistad; el tren; la cocina mexicana; el sol; la música; el fútbol; los libros; el agua;
la escuela; el café; los volcanes; la luna; el invierno; los perros; la ciudad; el teatro; el pan;
la familia; las montañas; el dinero; la lluvia; los mapas; el tiempo
""".replace("\n", " ")

#: by phase: forms, and what is put into them
PHASES: dict[str, tuple[str, str]] = {
    "talk": (QUESTIONS, HELD_OUT_TOPICS),
    "code": (
        ";".join(f"Write a Python function that {deed}." for deed in items(DEEDS)),
        THINGS,
    ),
    "spanish": (FORMAS, TEMAS),
}


def prompts(phase: str, count: int, seed: int = 0) -> list[str]:
    """The first `count` prompts of a phase: no two alike, in an order of the seed.

    Raises `ConfigError` where the phase is unknown, or has not so many.
    """
    if phase not in PHASES:
        raise ConfigError(f"unknown phase {phase!r}{nearest(phase, PHASES)}")
    found = list(islice(_shuffled(phase, seed), count))
    if len(found) < count:
        raise ConfigError(f"phase {phase!r} has {len(found)} prompts, not {count}")
    return found


def _shuffled(phase: str, seed: int) -> Iterator[str]:
    forms, things = (items(text) for text in PHASES[phase])
    made = [form.replace("{}", thing) for form in forms for thing in things]
    Random(f"{phase} {seed}").shuffle(made)
    yield from (text[0].upper() + text[1:] for text in made)
