"""The handwritten digits that scikit-learn ships: 1,797 pictures of 8 x 8 pixels (Alpaydin and Kaynak, 1998)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calmlm.errors import MissingExtraError

__all__ = ["SIZE", "Digits"]

SIZE = 8  # pixels on a side
_BRIGHTEST = 16.0


@dataclass(frozen=True)
class Digits:
    """Pictures, what they show, and who may see which.

    Attributes:
        pixels: (N, 1, 8, 8) float32, 0 to 1.
        shown: the digit in each picture.
        training: pictures that the encoder is trained on.
        composition: those of them that D_C uses.
        unseen: pictures that nothing is trained on.
    """

    pixels: Tensor
    shown: list[int]
    training: list[int]
    composition: list[int]
    unseen: list[int]

    @classmethod
    def load(cls, rng: random.Random, training_share: float, composition_share: float) -> Digits:
        """Load and divide the pictures; ``composition_share`` is that of the training pictures.

        Raises:
            MissingExtraError: without scikit-learn.
        """
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise MissingExtraError("scikit-learn", "repro", "The pictures of visual arithmetic") from error
        data: Any = load_digits()
        order = list(range(len(data.target)))
        rng.shuffle(order)
        cut = round(training_share * len(order))
        training = order[:cut]
        return cls(
            pixels=torch.tensor(data.images, dtype=torch.float32)[:, None] / _BRIGHTEST,
            shown=[int(digit) for digit in data.target],
            training=training,
            composition=training[: round(composition_share * cut)],
            unseen=order[cut:],
        )

    def of(self, digit: int, among: list[int], rng: random.Random) -> int:
        """Draw a picture of ``digit``."""
        return rng.choice([index for index in among if self.shown[index] == digit])
