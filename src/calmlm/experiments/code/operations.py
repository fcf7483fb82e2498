"""A restricted but real Python: one-line functions over integers, strings and lists, and what they are in English."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["OPERATIONS", "Function", "Operation", "sample_function"]

Kind = str
"""int, str or list (of integers)."""


@dataclass(frozen=True)
class Operation:
    """One step of a function.

    Attributes:
        name: as it stands in the name of a function; ``{k}`` is its number or letter.
        takes, gives: kinds of its operand and its result.
        code: an expression over ``{x}``, which stands in brackets where it has to.
        phrases: ways to ask for it.
        parameter: what ``{k}`` is: a number, a letter, or nothing.
        atomic: whether the expression binds as closely as a name.
    """

    name: str
    takes: Kind
    gives: Kind
    code: str
    phrases: tuple[str, ...]
    parameter: str = ""
    atomic: bool = True


def _operation(line: str) -> Operation:
    name, kinds, code, phrases, *rest = (part.strip() for part in line.split("|"))
    takes, gives = kinds.split(">")
    parameter = "number" if "{k}" in name else "letter" if "{c}" in name else ""
    return Operation(name, takes, gives, code, tuple(p.strip() for p in phrases.split(";")), parameter, not rest)


# name | kinds | code | phrases | "loose" where the expression needs brackets inside another one
_TABLE = """
add_{k} | int>int | {x} + {k} | add {k}; increase it by {k}; make it {k} larger | loose
subtract_{k} | int>int | {x} - {k} | subtract {k}; decrease it by {k}; take {k} away | loose
multiply_{k} | int>int | {x} * {k} | multiply it by {k}; take it {k} times; scale it by {k} | loose
square | int>int | {x} ** 2 | square it; raise it to the second power; multiply it by itself | loose
negate | int>int | -{x} | negate it; change its sign; flip the sign | loose
absolute | int>int | abs({x}) | drop the sign; take the absolute value; find its distance from zero
remainder_{k} | int>int | {x} % {k} | find the remainder after division by {k}; take it modulo {k} | loose
divide_{k} | int>int | {x} // {k} | divide it by {k} and round down; find how often {k} goes into it | loose
at_least_{k} | int>int | max({x}, {k}) | make it at least {k}; raise it to {k} if it is smaller
at_most_{k} | int>int | min({x}, {k}) | make it at most {k}; lower it to {k} if it is larger
to_text | int>str | str({x}) | turn it into text; write it as a string
reverse | str>str | {x}[::-1] | reverse the text; write it backwards; flip the order of its letters
upper | str>str | {x}.upper() | change it to capital letters; make it upper case; write it in capitals
lower | str>str | {x}.lower() | change it to small letters; make it lower case
title | str>str | {x}.title() | capitalise every word; give each word a capital letter
swap_case | str>str | {x}.swapcase() | swap capital and small letters; turn capitals small and small letters large
repeat_{k} | str>str | {x} * {k} | repeat it {k} times; write it {k} times in a row | loose
first_{k} | str>str | {x}[:{k}] | keep the first {k} letters; cut it after {k} letters
last_{k} | str>str | {x}[-{k}:] | keep the last {k} letters; keep only {k} letters at the end
skip_{k} | str>str | {x}[{k}:] | leave out the first {k} letters; skip {k} letters at the beginning
append_{c} | str>str | {x} + '{c}' | put the letter {c} behind it; add the letter {c} at the end | loose
prepend_{c} | str>str | '{c}' + {x} | put the letter {c} before it; begin it with the letter {c} | loose
remove_{c} | str>str | {x}.replace('{c}', '') | remove every letter {c}; delete all the letters {c}
length | str>int | len({x}) | count its letters; find how long the text is; measure the text
count_{c} | str>int | {x}.count('{c}') | count how often the letter {c} occurs; find the number of letters {c}
find_{c} | str>int | {x}.find('{c}') | find where the letter {c} stands; give the place of the letter {c}
words | str>int | len({x}.split()) | count its words; find how many words it has
sort | list>list | sorted({x}) | sort the list; put the list in order; arrange it from small to large
sort_down | list>list | sorted({x}, reverse=True) | sort it from large to small; put the largest first
reverse_list | list>list | {x}[::-1] | turn the list around; put the last item first; reverse the list
take_{k} | list>list | {x}[:{k}] | take the first {k} items; keep {k} items at the front
drop_{k} | list>list | {x}[{k}:] | drop the first {k} items; leave {k} items out at the front
every_{k} | list>list | {x}[::{k}] | take every item of {k}; keep one item in {k}
add_each_{k} | list>list | [n + {k} for n in {x}] | add {k} to each item; make all items {k} larger
multiply_each_{k} | list>list | [n * {k} for n in {x}] | multiply each item by {k}; scale all items by {k}
square_each | list>list | [n ** 2 for n in {x}] | square each item; replace all items by their squares
keep_even | list>list | [n for n in {x} if n % 2 == 0] | keep the even items; remove the odd items
keep_over_{k} | list>list | [n for n in {x} if n > {k}] | keep the items above {k}; remove what is not above {k}
distinct | list>list | sorted(set({x})) | remove repeated items and sort; keep each value once, in order
total | list>int | sum({x}) | add all items up; find the sum; find the total of the list
largest | list>int | max({x}, default=0) | find the largest item; pick the greatest item
smallest | list>int | min({x}, default=0) | find the smallest item; pick the least item
size | list>int | len({x}) | count the items; find how many items there are
join | list>str | ' '.join(map(str, {x})) | write the items with spaces between; join the items by spaces
"""
OPERATIONS: tuple[Operation, ...] = tuple(_operation(line) for line in _TABLE.strip().splitlines())

_LETTERS = "aeinorst"


@dataclass(frozen=True)
class Function:
    """One or two operations in a row, with their parameters."""

    steps: tuple[tuple[Operation, str], ...]

    @property
    def takes(self) -> Kind:
        """What the function is given."""
        return self.steps[0][0].takes

    @property
    def name(self) -> str:
        """Its name: ``sort_then_take_2``."""
        return "_then_".join(_filled(operation.name, value) for operation, value in self.steps)

    @property
    def expression(self) -> str:
        """Its result, over ``x``."""
        text, atomic = "x", True
        for operation, value in self.steps:
            alone = "({x})" in operation.code or "({x}," in operation.code  # an argument needs no brackets of its own
            inner = text if atomic or alone else f"({text})"
            text, atomic = _filled(operation.code, value).replace("{x}", inner), operation.atomic
        return text

    @property
    def code(self) -> str:
        """The whole function."""
        return f"def {self.name}(x): return {self.expression}"

    def namesakes(self, operations: Sequence[Operation]) -> Iterator[Function]:
        """All functions with this expression, under whatever name; this one among them."""
        choices = [
            [each for each in operations if (each.code, each.atomic) == (operation.code, operation.atomic)]
            for operation, _ in self.steps
        ]
        for chosen in itertools.product(*choices):
            if all(before.gives == after.takes for before, after in itertools.pairwise(chosen)):
                values = [value for _, value in self.steps]
                yield Function(tuple(zip(chosen, values, strict=True)))

    def description(self, rng: random.Random) -> str:
        """One way to ask for it in English."""
        return ", then ".join(_filled(rng.choice(operation.phrases), value) for operation, value in self.steps)


def _filled(text: str, value: str) -> str:
    return text.replace("{k}", value).replace("{c}", value)


def sample_function(rng: random.Random, operations: Sequence[Operation], wanted: Sequence[Operation] = ()) -> Function:
    """Draw a function of one or two of ``operations``; with ``wanted``, one of these is among them."""
    first = rng.choice(wanted or operations)
    steps = [first]
    if rng.random() < 0.6:
        if rng.random() < 0.5:
            following = [operation for operation in operations if operation.takes == first.gives]
            steps = [first, rng.choice(following)] if following else steps
        else:
            before = [operation for operation in operations if operation.gives == first.takes]
            steps = [rng.choice(before), first] if before else steps
    return Function(tuple((operation, _parameter(rng, operation)) for operation in steps))


def _parameter(rng: random.Random, operation: Operation) -> str:
    if operation.parameter == "letter":
        return rng.choice(_LETTERS)
    return str(rng.randint(2, 9)) if operation.parameter == "number" else ""
