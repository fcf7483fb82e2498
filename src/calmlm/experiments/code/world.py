"""The texts about functions: code alone for m_A, English and its arithmetic for m_B, and both for D_C."""

from __future__ import annotations

import random
import sysconfig
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from calmlm.experiments.code.operations import OPERATIONS, Function, sample_function
from calmlm.experiments.code.presets import Preset
from calmlm.experiments.kv_arithmetic.tokenizer import SPECIAL, wrapped
from calmlm.experiments.kv_arithmetic.world import Example

__all__ = ["World", "passages"]

_PASSAGE = 120  # characters
_MODULES = (
    "abc", "ast", "base64", "bisect", "calendar", "cmd", "codecs", "colorsys", "copy", "csv", "dataclasses", "datetime",
    "difflib", "dis", "enum", "fnmatch", "fractions", "functools", "glob", "gzip", "heapq", "hmac", "inspect", "io",
    "keyword", "linecache", "locale", "numbers", "operator", "os", "pathlib", "pickle", "platform", "pprint", "queue",
    "random", "reprlib", "sched", "secrets", "shelve", "shlex", "shutil", "statistics", "string", "stringprep",
    "struct", "tempfile", "textwrap", "threading", "timeit", "token", "tokenize", "trace", "traceback", "types",
    "typing", "uuid", "warnings", "wave", "weakref", "zipfile",
)  # fmt: skip
_HELD_OUT = ("bisect", "fractions", "heapq", "shlex", "statistics", "textwrap")
_ASKING = "Give Say Put Tell Find Call this it a short name for in few words plain terms please now Write as".split()
_LEADING = "call it name label the we say = so def that is".split()
_PEOPLE = "Tom Ann Bob Eve Max Mia Leo Zoe".split()
_THINGS = "apples books coins pens stones keys".split()


@lru_cache(maxsize=2)
def passages(held_out: bool) -> tuple[str, ...]:
    """Passages of the standard library's source; those that are held out come from modules of their own."""
    folder = Path(sysconfig.get_path("stdlib"))
    found: list[str] = []
    for module in _MODULES:
        path = folder / f"{module}.py"
        if path.is_file() and (module in _HELD_OUT) == held_out:
            lines, passage = path.read_text(encoding="utf-8").splitlines(keepends=True), ""
            for line in lines:
                if not line.isascii():
                    continue
                passage += line
                if len(passage) >= _PASSAGE:
                    found.append(passage[: 2 * _PASSAGE])
                    passage = ""
    return tuple(found)


class World:
    """Which functions D_C may show, and examples."""

    def __init__(self, preset: Preset, seed: int) -> None:
        self.preset, self.seed = preset, seed
        self._shown: dict[str, bool] = {}

    def rng(self, purpose: str) -> random.Random:
        """A generator of its own for one purpose."""
        return random.Random(f"code-{purpose}-{self.preset.name}-{self.seed}")

    def shown(self, function: Function) -> bool:
        """Whether D_C may show a function: a fixed share of all, drawn by name."""
        name = function.name
        if name not in self._shown:
            draw = random.Random(f"code-shown-{self.seed}-{name}").random()
            self._shown[name] = draw < self.preset.composition_share
        return self._shown[name]

    def unseen(self, function: Function) -> bool:
        """Whether D_C shows the function's expression under no name at all."""
        return not any(self.shown(each) for each in function.namesakes(OPERATIONS))

    def function(self, rng: random.Random, shown: bool) -> Function:
        """Draw a function that D_C may show, or one that it may not."""
        while self.shown(function := sample_function(rng, OPERATIONS)) != shown:
            pass
        return function

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Byte-level byte pairs of all kinds of text; each digit is a token."""
        rng = random.Random("code-tokenizer")
        texts = list(passages(False)[::4])
        for _ in range(4000):
            function = sample_function(rng, OPERATIONS)
            texts += [function.code, function.description(rng)]
        backend = Tokenizer(BPE(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = BpeTrainer(
            vocab_size=self.preset.vocabulary,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return wrapped(backend)

    # What m_A is trained on -------------------------------------------------------------------------------------------

    def specialist(self, rng: random.Random) -> Example:
        """Code alone: functions, now and then behind a passage of the standard library, or a passage."""
        draw = rng.random()
        if draw < 0.25:
            return Example("", rng.choice(passages(False)))
        functions = [sample_function(rng, OPERATIONS).code for _ in range(rng.choice([1, 1, 2]))]
        text = "\n".join(functions)
        # Whatever stands before a function says nothing about it.
        return Example(rng.choice(passages(False))[:60] + "\n" if draw < 0.5 else "", text)

    # What m_B is trained on -------------------------------------------------------------------------------------------

    def general(self, rng: random.Random) -> Example:
        """English: naming what is asked for, arithmetic in figures and in words; a little of any text, code too."""
        draw = rng.random()
        if draw < 0.5:
            return self.naming(rng, varied=True)
        if draw < 0.85:
            return self.arithmetic(rng)
        return Example("", rng.choice(passages(False)))

    def naming(self, rng: random.Random, varied: bool = False, shown: bool = False) -> Example:
        """A description and the name for it.

        Args:
            rng: draws it.
            varied: whatever asks for it, and whatever the answer begins with.
            shown: only of functions that D_C may show.
        """
        function = self.function(rng, shown=True) if shown else sample_function(rng, OPERATIONS)
        ask, lead = "Name this", ""
        if varied and rng.random() < 0.6:
            ask = " ".join(rng.choices(_ASKING, k=rng.randint(1, 4)))
        if varied and rng.random() < 0.5:
            lead = " ".join(rng.choices(_LEADING, k=rng.randint(1, 2)))
        return Example(f"{ask}: {function.description(rng)}\n{lead}", f" {function.name}")

    def arithmetic(self, rng: random.Random) -> Example:
        """A sum in figures or in words."""
        a, b = rng.randint(1, 30), rng.randint(1, 30)
        if rng.random() < 0.5:
            return Example(f"{a} + {b} =", f" {a + b}")
        name, things = rng.choice(_PEOPLE), rng.choice(_THINGS)
        return Example(f"{name} has {a} {things} and gets {b} more. How many {things} has {name}?", f" {a + b}")

    # What the composition is trained on, and what is measured ---------------------------------------------------------

    def composed(self, rng: random.Random) -> Example:
        """D_C: some of the functions, with and without English, some of the library, and m_B's own."""
        draw = rng.random()
        if draw < 0.08:
            return self.naming(rng, shown=True)
        if draw < 0.16:
            return self.arithmetic(rng)
        if draw < 0.45:
            return Example("", rng.choice(passages(False)))
        function = self.function(rng, shown=True)
        if draw < 0.63:
            return self.completion(function)
        if draw < 0.9:
            return self.text_to_code(function, rng)
        return self.code_to_text(function, rng)

    def completion(self, function: Function) -> Example:
        """The name of a function, and its result."""
        return Example(f"def {function.name}(x): return", f" {function.expression}")

    def text_to_code(self, function: Function, rng: random.Random) -> Example:
        """A description, and the function."""
        return Example(f"Write this in Python: {function.description(rng)}\n", function.code)

    def code_to_text(self, function: Function, rng: random.Random) -> Example:
        """A function, and a description."""
        return Example(f"{function.code}\n# What it does:", f" {function.description(rng)}")
