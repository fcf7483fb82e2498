"""A base model as a composition sees it: its layers and widths, how it counts, what padding and packing do to it.

This file and ``structure`` are the only ones that know model families.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from calmlm.bases.placement import execution_device
from calmlm.bases.structure import (
    accepts,
    find_cache_argument,
    find_encoder_layers,
    find_first_position,
    find_layers,
    find_positions,
    find_state_layers,
    find_turning_length,
    head_classes,
    last_state,
    layers_at,
    state_of,
)
from calmlm.bases.trees import takes_trees, tree_mask
from calmlm.errors import DataError, ModelError, first_line

# Relative. Experts' kernels round differently with other tokens (1e-6 in float32); an untrained encoder leaks 2e-3.
PROBE_TOLERANCE = 1e-4
PROBE_TOLERANCE_HALF = 1e-2
PADDING_TOLERANCE, PADDING_TOLERANCE_HALF = 1e-3, 5e-2

Row = tuple[Tensor, Tensor | None, Tensor | None]
"""Ids, mask and positions of a row that is tried out."""


@dataclass(frozen=True)
class Backbone:
    """The decoder inside a causal language model, as a composition sees it.

    Attributes:
        decoder: the module that maps ids to the last hidden state.
        layers: its layers, in order.
        size: width of the states between layers, D_A or D_B.
        num_heads: its self-attention heads.
        vocab_size: rows of its input embedding; for an encoder, the classes of its head, 0 where it has none.
        takes_positions: whether ``decoder`` accepts ``position_ids``.
        max_positions: how many positions have a learned embedding, or None where positions do not end.
        takes_use_cache: whether ``decoder`` accepts ``use_cache``.
        cache_argument: the name under which it takes a cache of transformers' general form, or None.
        turns_at: the length of a text beyond which all its positions are turned otherwise (LongRoPE), or None.
        first_position: the position that it gives to the first token of a text (RoBERTa begins behind its padding id).
        given_positions: whether its positions are counted for it: where it adds an embedding of the absolute position,
            and where ``pads_left`` finds that it has to be told.
        drops_positions: whether ``decoder`` accepts ``logits_to_keep``, and then leaves out positions between layers.
    """

    decoder: nn.Module
    layers: nn.ModuleList
    size: int
    num_heads: int
    vocab_size: int
    takes_positions: bool
    max_positions: int | None
    takes_use_cache: bool
    cache_argument: str | None
    turns_at: int | None = None
    first_position: int = 0
    given_positions: bool = False
    drops_positions: bool = False

    @classmethod
    def of(cls, model: PreTrainedModel, role: str, layers_path: str | None = None) -> Backbone:
        """Find the decoder and its layers.

        Args:
            model: a causal language model.
            role: ``"anchor"`` or ``"augmenting model"``, for messages.
            layers_path: where the layers are, for a model in which they are not found by themselves.

        Raises:
            ModelError: when ``model`` is no causal language model or its layers are not found.
        """
        name = type(model).__name__
        # A masked language model has output embeddings as well, but only a causal one generates.
        causal = isinstance(model, PreTrainedModel) and isinstance(model, GenerationMixin)
        if not causal or model.get_output_embeddings() is None:
            advice = "" if role == "anchor" else ", or pass an encoder by name"
            raise ModelError(
                f"The {role} must be a causal language model of transformers, but got {name}: "
                f"load it with AutoModelForCausalLM{advice}."
            )
        if model.config.is_encoder_decoder:
            raise ModelError(
                f"The {role} must be a decoder-only model, but {name} is an encoder-decoder: choose a decoder."
            )
        config = text_config(model)
        decoder, layers = find_layers(model, config, role, layers_path)
        embedding = model.get_input_embeddings()
        positions = find_positions(decoder, layers)
        learned = any(isinstance(module, nn.Embedding) for module in positions)
        first = find_first_position(positions)
        most = getattr(config, "max_position_embeddings", None) if learned else None
        return cls(
            decoder=decoder,
            layers=layers,
            size=config.hidden_size,
            num_heads=getattr(config, "num_attention_heads", None) or 1,
            vocab_size=getattr(embedding, "num_embeddings", None) or embedding.weight.shape[0],
            takes_positions=accepts(decoder, "position_ids"),
            max_positions=most if most is None else most - first,
            takes_use_cache=accepts(decoder, "use_cache"),
            cache_argument=find_cache_argument(model, decoder),
            turns_at=find_turning_length(config),
            first_position=first,
            given_positions=bool(positions),
            drops_positions=accepts(decoder, "logits_to_keep"),
        )

    @classmethod
    def of_encoder(cls, model: PreTrainedModel, role: str, layers_path: str | None = None) -> Backbone:
        """Find the layers of a text, image or sound encoder, or of the encoder of an encoder-decoder.

        Raises:
            ModelError: when ``model`` is no model of transformers or its layers are not found.
        """
        if not isinstance(model, PreTrainedModel):
            raise ModelError(
                f"The {role} must be a model of transformers, but got {type(model).__name__}: load it with AutoModel."
            )
        kind = model.config.model_type
        reads_on = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        if reads_on and not model.config.is_encoder_decoder:
            raise ModelError(
                f"The {role} must be an encoder or a causal language model with its head, but got "
                f"{type(model).__name__}: load it with AutoModelForCausalLM."
            )
        encoder = model.get_encoder() if model.config.is_encoder_decoder else model
        config = encoder.config
        if layers_path is not None:
            layers = layers_at(model, role, layers_path)[1]
        else:
            depth = getattr(config, "num_hidden_layers", None)
            found = find_encoder_layers(encoder, depth, getattr(config, "hidden_size", None))
            part = MODEL_MAPPING.get(type(getattr(config, "vision_config", None)), None)
            if found is None and isinstance(part, type):
                raise ModelError(
                    f"The {role} must be a single encoder, but {type(model).__name__} holds several: load one, for "
                    f"example with {part.__name__}.from_pretrained({model.name_or_path!r}), and pass it."
                )
            if found is None:
                raise ModelError(
                    f"The layers of the {role} must be found in a module list, but {type(model).__name__} shows none "
                    f"of length {depth}: name it with augmenting_layers_path."
                )
            layers = found
        size = getattr(config, "hidden_size", None)
        if size is None:
            raise ModelError(
                f"The states between the layers of the {role} must have one width, hidden_size, but "
                f"{type(model).__name__} has several or names none: choose another encoder."
            )
        return cls(
            decoder=encoder,
            layers=layers,
            size=size,
            num_heads=getattr(config, "num_attention_heads", None) or 1,
            vocab_size=head_classes(model),
            takes_positions=False,
            max_positions=None,
            takes_use_cache=False,
            cache_argument=None,
        )

    def kept(self, logits_to_keep: int | Tensor, tokens: Tensor | None) -> int | Tensor:
        """``logits_to_keep`` for a call on ``tokens`` (B, T, ...), in a form that drops no positions between layers.

        A decoder that is told of it as well (Gemma 4, whose last layers share keys) drops them where it is a number.
        """
        if tokens is None or isinstance(logits_to_keep, Tensor) or not self.drops_positions:
            return logits_to_keep
        if logits_to_keep == 0:
            return 0
        length = tokens.shape[1]
        return torch.arange(max(length - logits_to_keep, 0), length, device=tokens.device)

    def check_length(self, role: str, length: int, positions: Tensor | None) -> None:
        """Raise when a call goes beyond the positions that the model has learned.

        Args:
            role: what to call the model in the message.
            length: tokens up to the end of this call, those of earlier calls included.
            positions: (B or 1, T) of this call, or None; packed rows begin again, so that a long call may fit.

        Raises:
            DataError: for a call that does not fit.
        """
        # Positions are looked at last, because that waits for the device.
        if self.max_positions is None or length <= self.max_positions:
            return
        needed = length if positions is None else int(positions.max()) + 1
        if needed > self.max_positions:
            raise DataError(
                f"The {role} must be given at most {self.max_positions} tokens, because it has learned no more "
                f"positions, but got {needed}: shorten the prompt, or generate fewer tokens."
            )

    def check_padding(self, role: str, mask: Any) -> None:
        """Raise where rows are padded on the left and the model would read something else for it.

        Args:
            role: what to call the model in the message.
            mask: of all tokens so far, (B, past + T); others tell nothing.

        Raises:
            DataError: for such rows.
        """
        if not isinstance(mask, Tensor) or mask.ndim != 2 or torch.compiler.is_compiling() or self.pads_left:
            return
        if bool((mask[:, 0] == 0).any()):  # waits for the device, but hardly any model comes here
            raise DataError(
                f"The rows of a batch must not be padded on the left, because the {role} "
                f"({type(self.decoder).__name__}) counts padding there, but some are: give one row at a time."
            )

    @cached_property
    def pads_left(self) -> bool:
        """Whether padding on the left of a text leaves what the model reads in it as it is; tried out once."""
        ids = torch.arange(5, device=execution_device(self.decoder))[None] % self.vocab_size
        everything = torch.ones_like(ids)
        padded, mask = nn.functional.pad(ids, (2, 0)), nn.functional.pad(everything, (2, 0))
        # As it counts by itself, where it does; else, and where that fails, with positions given.
        for counts in dict.fromkeys((self.given_positions, self.takes_positions)):
            places = [counted(*row) if counts else None for row in ((ids, everything), (padded, mask))]
            found = self._differences((ids, everything, places[0]), (padded, mask, places[1]))
            if found is None or _alike(*found):
                object.__setattr__(self, "given_positions", counts)
                return True
        return False

    def check_gaps(self, role: str, mask: Tensor) -> None:
        """Raise where padding stands within rows and the model would read something else for it.

        Args:
            role: what to call the model in the message.
            mask: of all tokens so far, (B, past + T).

        Raises:
            DataError: for such rows.
        """
        if torch.compiler.is_compiling() or self.skips_gaps:
            return
        if bool((mask[:, 1:] > mask[:, :-1]).any()):
            raise DataError(
                f"The rows of a batch must not be padded on the left, because the {role} "
                f"({type(self.decoder).__name__}) counts padding behind its beginning or prefix, but some are: give "
                f"one row at a time."
            )

    @cached_property
    def skips_gaps(self) -> bool:
        """Whether padding within a text leaves what the model reads behind it as it is; tried out once."""
        config: Any = self.decoder.config
        kinds = getattr(config.get_text_config(decoder=True), "layer_types", None) or ()
        # Chunks of attention are counted in columns, and are longer than any trial.
        if not self.pads_left or "chunked_attention" in kinds:
            return False
        ids = torch.arange(5, device=execution_device(self.decoder))[None] % self.vocab_size
        gap = torch.tensor([[1, 1, 0, 0, 1, 1, 1]], device=ids.device)
        apart = torch.zeros_like(gap).masked_scatter_(gap.bool(), ids)
        rows = ((ids, torch.ones_like(ids)), (apart, gap))
        places = [counted(*row) if self.takes_positions else None for row in rows]
        found = self._differences((*rows[0], places[0]), (*rows[1], places[1]), length=3)
        return found is None or _alike(*found)  # where it cannot be tried out, the call itself will say why

    def check_packing(self, role: str, positions: Tensor | None, mask: Any) -> None:
        """Raise where a row holds several texts and the model would read them as one.

        Args:
            role: what to call the model in the message.
            positions: (B or 1, T) of this call, or None; they begin anew with each text.
            mask: of all tokens so far, (B, past + T), or what else tells padding.

        Raises:
            DataError: for such rows.
        """
        if positions is None or positions.ndim != 2 or positions.shape[1] < 2 or torch.compiler.is_compiling():
            return
        if self.packs:
            return
        anew = positions[:, 1:] <= positions[:, :-1]
        if isinstance(mask, Tensor) and mask.ndim == 2:
            real = mask[:, -positions.shape[1] :].bool().to(positions.device)
            anew = anew & real[:, 1:] & real[:, :-1]
        if bool(anew.any()):
            raise DataError(
                f"Each row must hold one text, because the {role} ({type(self.decoder).__name__}) does not keep apart "
                f"texts whose positions begin anew within a row, but some do: switch packing and padding_free off."
            )

    @cached_property
    def packs(self) -> bool:
        """Whether positions that begin anew within a row keep its texts apart; tried out once."""
        ids = torch.arange(4, device=execution_device(self.decoder))[None] % self.vocab_size
        place = torch.tensor([[0, 1, 0, 1]], device=ids.device)
        found = self._differences((ids[:, 2:], None, place[:, 2:]), (ids, None, place))
        if found is None:
            return True
        differences, half = found
        # The first layer of attention tells, and that with a state; they are the ones that rounding reaches least.
        decoder: Any = self.decoder
        telling = [0, *find_state_layers(text_config(decoder))[:1]]
        return bool(differences[telling].max() <= _tolerance(half))

    @cached_property
    def counts_on(self) -> bool:
        """Whether it counts on behind a cache where nothing tells positions, unlike Bamba; tried out once."""
        decoder: Any = self.decoder
        config = text_config(decoder)
        if not (self.takes_positions and self.cache_argument and find_state_layers(config)):
            return True  # only families that keep a state are known to begin anew
        ids = torch.arange(4, device=execution_device(self.decoder))[None] % self.vocab_size
        place, found = torch.full_like(ids[:, :1], 3), []
        for given in ({}, {"position_ids": place}):
            own: dict[str, Any] = {self.cache_argument: DynamicCache(config=config), "use_cache": True}
            with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
                decoder(input_ids=ids[:, :3], **own)
                found.append(last_state(decoder(input_ids=ids[:, 3:], **own, **given)).float())
        far = (found[0] - found[1]).abs().max() / found[1].abs().max().clamp(min=1e-6)
        return bool(far <= _tolerance(_is_half(self.dtype)))

    @property
    def dtype(self) -> torch.dtype:
        """In which the decoder computes; float32 where nothing tells."""
        return next((p.dtype for p in self.decoder.parameters() if p.is_floating_point()), torch.float32)

    @cached_property
    def branches(self) -> bool:
        """Whether several continuations of a text can be read in one call, each as if alone; tried out once."""
        config = self.decoder.config
        if not (self.takes_positions and self.cache_argument is not None and takes_trees(config)):
            return False
        device = execution_device(self.decoder)
        ids = torch.arange(6, device=device)[None] % self.vocab_size
        place = torch.tensor([[0, 1, 2, 2, 3, 3]], device=device)
        parents = [-1, 0, 1, 1, 2, 3]  # two words of two tokens behind one text of two
        seen = torch.eye(6, dtype=torch.bool, device=device)
        for token, parent in enumerate(parents):
            if parent >= 0:
                seen[token] |= seen[parent]
        mask = tree_mask(config, seen[None], place[:, :, None] - place[:, None], self.dtype)
        try:
            together = self._layer_outputs(ids, "model", mask, place)
            for branch in ([0, 1, 2, 4], [0, 1, 3, 5]):
                alone = self._layer_outputs(ids[:, branch], "model", torch.ones_like(ids[:, branch]))
                tolerance = _tolerance(_is_half(alone[0].dtype))
                for a, b in zip(alone, together, strict=True):
                    far = (a.float() - b[:, branch].float()).abs().max() / a.float().abs().max().clamp(min=1e-6)
                    if far > tolerance:
                        return False
        except ModelError:
            return False
        return True

    def _differences(self, alone: Row, beside: Row, length: int | None = None) -> tuple[Tensor, bool] | None:
        """How far a text's states lie from those of the same text at the end of a longer row.

        Args:
            alone, beside: ids (1, T), mask and positions of each.
            length: how many of the last tokens count; all of the text's by default.

        Returns:
            (layers, T), relative to the largest value of a layer, and whether the model computes in half precision;
            None where it cannot be tried out, and the call itself will say why.
        """
        try:
            first, second = (self._layer_outputs(ids, "model", mask, places) for ids, mask, places in (alone, beside))
        except ModelError:
            return None
        length = length or alone[0].shape[1]
        differences = [
            (a[:, -length:].float() - b[:, -length:].float()).abs().amax((0, 2)) / a.float().abs().max().clamp(min=1e-6)
            for a, b in zip(first, second, strict=True)
        ]
        return torch.stack(differences), _is_half(first[0].dtype)

    def positions(self, ids: Tensor, mask: Any) -> Tensor | None:
        """Positions (B, T) that the model has to be given, counted over real tokens; None where it counts by itself.

        A model that adds an embedding of the absolute position would count padding on the left, so that a padded row
        would differ from the same row alone. A model with relative positions counts by itself, as it does alone, unless
        more than distances matters to it (HunYuan), as trying out shows.
        """
        return counted(ids, mask) if self.given_positions else None

    def probe(self, role: str) -> None:
        """Run six tokens through the decoder once and look at what its layers give.

        Raises:
            ModelError: when a layer does not give states of shape (batch, length, size), or when an earlier state
                depends on a later token.
        """
        name = type(self.decoder).__name__
        if hasattr(self.decoder, "_pad_to_mult_of_chunk_length"):  # Reformer, beyond some length
            raise ModelError(
                f"The layers of the {role} must give a state for each token, but {name} pads texts to whole chunks "
                f"before them: this architecture cannot be composed."
            )
        ids = torch.arange(6, device=execution_device(self.decoder)).view(2, 3) % self.vocab_size
        everything = torch.ones_like(ids)
        first = self._layer_outputs(ids, role, everything)
        changed = ids.clone()
        changed[:, -1] = (changed[:, -1] + 1) % self.vocab_size
        second = self._layer_outputs(changed, role, everything)
        for index, (a, b) in enumerate(zip(first, second, strict=True)):
            if not isinstance(a, Tensor) or a.shape != (2, 3, self.size):
                shape = tuple(a.shape) if isinstance(a, Tensor) else type(a).__name__
                raise ModelError(
                    f"Layer {index} of the {role} must give states of shape (batch, length, {self.size}), but in "
                    f"{name} it gives {shape} for a batch of 2 and a length of 3: this architecture cannot be composed."
                )
            tolerance = PROBE_TOLERANCE if a.dtype == torch.float32 else PROBE_TOLERANCE_HALF
            past_a, past_b = a[:, :-1].float(), b[:, :-1].float()
            if (past_a - past_b).abs().max() > tolerance * past_a.abs().max().clamp(min=1e-6):
                raise ModelError(
                    f"The {role} must be a causal decoder, but in {name} an earlier position sees a later token: "
                    f"use a decoder, or set is_decoder=True in its configuration if it has that setting."
                )

    def _layer_outputs(self, ids: Tensor, role: str, mask: Any, positions: Tensor | None = None) -> list[Any]:
        outputs: list[Any] = []
        own = threading.get_ident()

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            if threading.get_ident() == own:  # another thread's call may be under way
                outputs.append(state_of(output))

        handles = [layer.register_forward_hook(keep) for layer in self.layers]
        training = {module: module.training for module in self.decoder.modules()}
        self.decoder.eval()
        given: dict[str, Any] = {} if mask is None else {"attention_mask": mask}
        if self.takes_use_cache:
            given["use_cache"] = False
        if positions is not None and self.takes_positions:
            given["position_ids"] = positions + self.first_position
        try:
            with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
                self.decoder(input_ids=ids, **given)
        except Exception as error:
            raise ModelError(
                f"The {role} must run on token ids alone, but {type(self.decoder).__name__} failed with "
                f"{type(error).__name__} ({first_line(error)}): this architecture cannot be composed."
            ) from error
        finally:
            for module, flag in training.items():
                module.training = flag
            for handle in handles:
                handle.remove()
        if len(outputs) != len(self.layers):
            raise ModelError(
                f"Each of the {len(self.layers)} layers of the {role} must run once per call, but "
                f"{type(self.decoder).__name__} ran {len(outputs)}: this architecture cannot be composed."
            )
        return outputs


def counted(ids: Tensor, mask: Any) -> Tensor | None:
    """Positions (B, T) of the new tokens, counted over the real ones; None where no 2-D mask tells which those are."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    positions = mask.long().cumsum(-1) - 1
    return positions.clamp(min=0)[:, -ids.shape[1] :]


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The configuration of the text decoder in ``model``."""
    return model.config.get_text_config(decoder=True)


def _is_half(dtype: torch.dtype) -> bool:
    return dtype not in (torch.float32, torch.float64)


def _tolerance(half: bool) -> float:
    """How far states may lie apart, relative to the largest, and still count as equal but for rounding."""
    return PADDING_TOLERANCE_HALF if half else PADDING_TOLERANCE


def _alike(differences: Tensor, half: bool) -> bool:
    """Whether a text is read as it is alone, but for rounding."""
    if not half:
        return bool(differences.max() <= PADDING_TOLERANCE)
    # Rounding lets a model with experts choose others for a token; what is wrong shows in the first layer, and in
    # most tokens.
    return bool(differences[0].median() <= PADDING_TOLERANCE_HALF)
