"""How an augmenting model will speak: through a map of its last state, or a table of its tokens, into the anchor's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from calmlm.bases.families import Backbone, text_config
from calmlm.bases.heads import output_matrix
from calmlm.bases.placement import execution_device
from calmlm.config import WORDS
from calmlm.connectors.pointer import NOTHING
from calmlm.connectors.word_map import fit_map
from calmlm.errors import ConfigError, ModelError
from calmlm.readers.inputs import base_arguments
from calmlm.tokens.alignment import Alignment
from calmlm.tokens.retokenization import Rewriting
from calmlm.tokens.vocabularies import first_tokens, frequencies, shared_pieces

WORDS_BIAS = -2.0  # of a gate beside connections, which come first
WRITTEN = (48, 40)  # texts and tokens that the anchor writes, to find out which tokens are frequent
SMOOTHING = 0.1
FEWEST = 16  # tokens that two vocabularies have to share


def check_words(words: str, reads: str, role: str) -> None:
    """Raise unless an augmenting model can speak.

    Raises:
        ConfigError: for another kind of words, or a model that does not read the text as it grows.
    """
    if words not in WORDS:
        raise ConfigError(f"words must be one of {', '.join(WORDS)}, or None, but got {words!r}: use one of these.")
    check_grows(reads, role, "words need", "no words for it")


def check_grows(reads: str, role: str, need: str, instead: str) -> None:
    """Raise unless an augmenting model has a state beside each of the anchor's positions.

    Raises:
        ConfigError: for a model that does not read the text as it grows.
    """
    if reads not in ("tokens", "text"):
        raise ConfigError(
            f"{need} an augmenting model that reads the text as it grows, but the {role} reads its "
            f"{'inputs' if reads == 'inputs' else 'prompt'} alone: use {instead}."
        )


@torch.no_grad()
def expected_tokens(model: PreTrainedModel, backbone: Backbone) -> Tensor:
    """How often a model expects each token in text that it writes itself, (V,) float32; always the same.

    Args:
        model: a causal language model.
        backbone: its decoder.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(backbone.vocab_size, (WRITTEN[0], 1), generator=generator)
    ids = ids.to(execution_device(backbone.decoder))
    training = model.training
    model.eval()
    total = torch.zeros(0)
    try:
        cache = None if backbone.cache_argument is None else DynamicCache(config=text_config(model))
        new = ids
        for _ in range(WRITTEN[1]):
            read = ids if cache is None else new
            given = base_arguments(backbone, input_ids=read, attention_mask=None, position_ids=None, cache=cache)
            output = model(**given)
            likely = output.logits[:, -1].float().softmax(-1).cpu()
            total = likely.sum(0) if not total.numel() else total + likely.sum(0)
            new = torch.multinomial(likely, 1, generator=generator).to(ids)
            ids = torch.cat((ids, new), dim=1)
    finally:
        model.train(training)
    return total + SMOOTHING * total.mean()


class AnchorWords:
    """What all maps into one anchor begin with, found out when the first of them asks.

    Args:
        model: the anchor.
        backbone: its decoder.
        tokenizer: its own, or None.
        texts: in which its tokens are counted; None for what it writes itself.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        backbone: Backbone,
        tokenizer: PreTrainedTokenizerBase | None,
        texts: Sequence[str] | None,
    ) -> None:
        self.model, self.backbone, self.tokenizer, self.texts = model, backbone, tokenizer, texts

    @cached_property
    def head(self) -> tuple[Tensor, Tensor | None]:
        """Its output embeddings and their bias, see ``output_matrix``."""
        return output_matrix(self.model, self.backbone, "anchor")

    @cached_property
    def weights(self) -> Tensor:
        """How much each of its tokens counts, (V_B,).

        Raises:
            ConfigError: for texts without a tokenizer.
        """
        if self.texts is None:
            return expected_tokens(self.model, self.backbone)
        if self.tokenizer is None:
            raise ConfigError("plain_text needs the anchor's tokenizer, but there is none: pass tokenizer.")
        return frequencies(len(self.head[0]), self.tokenizer, self.texts)


def word_map(
    anchor: AnchorWords,
    model: PreTrainedModel,
    backbone: Backbone,
    alignment: Alignment | Rewriting | None,
    role: str,
) -> tuple[Tensor, Tensor]:
    """The matrix W (D_B, D_A) and the offset w (D_B,) of a ``WordMap``, in float32.

    Args:
        anchor: into whose words.
        model, backbone: the augmenting model and its decoder.
        alignment: of their tokenizers; None where they share ids.
        role: what to call the augmenting model in messages.

    Raises:
        ConfigError: for texts to count tokens in, without a tokenizer.
        ModelError: for heads that are no matrix, or vocabularies that share next to nothing.
    """
    (ours, our_bias), (theirs, their_bias) = anchor.head, output_matrix(model, backbone, role)
    own, other = shared_pieces(alignment, len(ours), len(theirs))
    _check_shared(len(own), role)
    weights = anchor.weights[own]
    matrix = fit_map(ours[own], theirs[other], weights)
    if our_bias is None and their_bias is None:
        return matrix, torch.zeros(len(matrix))
    # What the biases say beyond the states is a state as well: the one whose words differ as the biases do.
    bias = torch.zeros(len(own))
    bias = bias + (0 if their_bias is None else their_bias[other]) - (0 if our_bias is None else our_bias[own])
    return matrix, fit_map(ours[own], bias[:, None], weights)[:, 0]


def check_pointer(alignment: Alignment | Rewriting, sizes: tuple[int, int], role: str) -> None:
    """Raise unless a ``Pointer`` has something to point at.

    Args:
        alignment: from ``with_firsts``.
        sizes: how many tokens the anchor and the augmenting model have.
        role: what to call the augmenting model in messages.

    Raises:
        ModelError: for vocabularies that share next to nothing.
    """
    _check_shared(int((first_tokens(alignment, *sizes) != NOTHING).sum()), role)


def _check_shared(count: int, role: str) -> None:
    if count < FEWEST:
        raise ModelError(
            f"words need vocabularies that share tokens, but those of the anchor and the {role} share {count}: leave "
            f"words out."
        )
