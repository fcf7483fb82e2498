"""Encoders with inputs of their own, decoders that read the prompt alone, and several augmenting models at once."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    LayoutLMv3Config,
    LayoutLMv3Model,
    LongformerConfig,
    LongformerModel,
    PreTrainedModel,
    SEWConfig,
    SEWModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SwinConfig,
    SwinModel,
    T5Config,
    T5EncoderModel,
    ViltConfig,
    ViltModel,
    VisualBertConfig,
    VisualBertModel,
    ViTConfig,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperModel,
)
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionConfig, Idefics2VisionTransformer
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionConfig, SmolVLMVisionTransformer

import calmlm
from compositions import assert_close, assert_helpful, awaken, logits_of
from tiny import tiny_model, tiny_tokens

SIZE = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40}
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
Inputs = Callable[[int], dict[str, Tensor]]


def _text(rows: int) -> dict[str, Tensor]:
    mask = torch.ones(rows, 5, dtype=torch.long)
    mask[1:, -1] = 0
    return {"input_ids": torch.randint(1, 50, (rows, 5)), "attention_mask": mask}


def _whisper() -> PreTrainedModel:
    sides = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in
             {"layers": 3, "attention_heads": 4, "ffn_dim": 40}.items()}  # fmt: skip
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return WhisperModel(
        WhisperConfig(vocab_size=60, d_model=24, num_mel_bins=8, max_source_positions=10, **sides, **special)
    )


ENCODERS: dict[str, tuple[Callable[[], PreTrainedModel], Inputs]] = {
    "bert": (lambda: BertModel(BertConfig(vocab_size=50, **SIZE)), _text),
    "t5": (
        lambda: T5EncoderModel(T5Config(vocab_size=50, d_model=24, d_ff=40, num_layers=3, num_heads=4, d_kv=6)),
        _text,
    ),
    "vit": (
        lambda: ViTModel(ViTConfig(image_size=8, patch_size=4, num_channels=1, **SIZE)),
        lambda rows: {"pixel_values": torch.randn(rows, 1, 8, 8)},
    ),
    "clip": (
        lambda: CLIPVisionModel(CLIPVisionConfig(image_size=8, patch_size=4, **SIZE)),
        lambda rows: {"pixel_values": torch.randn(rows, 3, 8, 8)},
    ),
    "whisper": (_whisper, lambda rows: {"input_features": torch.randn(rows, 8, 20)}),
}


@pytest.fixture(params=ENCODERS, scope="module")
def seeing(request: pytest.FixtureRequest) -> tuple[calmlm.CalmForCausalLM, dict[str, dict[str, Tensor]]]:
    torch.manual_seed(0)
    make, inputs = ENCODERS[request.param]
    model = calmlm.compose(tiny_model("llama"), {"senses": make().eval()}, 2)
    ids = tiny_tokens(2, 6)
    with torch.no_grad():  # untrained, it is the anchor
        given = {"senses": inputs(2)}
        assert torch.equal(model(ids, augmenting_inputs=given).logits, model.anchor(ids).logits)
    return awaken(model), given


def test_encoders_reach_every_token(seeing: Any) -> None:
    model, given = seeing
    ids = tiny_tokens(2, 6)
    full = logits_of(model, ids, augmenting_inputs=given)
    other = {name: value.flip(0) for name, value in given["senses"].items()}
    changed = logits_of(model, ids, augmenting_inputs={"senses": other})
    assert float((full - changed).abs().amax(-1).min()) > 1e-4


def test_encoders_leave_the_text_causal(seeing: Any) -> None:
    model, given = seeing
    ids = tiny_tokens(2, 6)
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 5) % 90 + 3
    before, after = (logits_of(model, x, augmenting_inputs=given) for x in (ids, changed))
    assert torch.equal(before[:, :-1], after[:, :-1])


def test_encoders_are_cached(seeing: Any) -> None:
    model, given = seeing
    ids = tiny_tokens(2, 6)
    with torch.no_grad():
        first = model(ids[:, :3], augmenting_inputs=given, use_cache=True)
        second = model(ids[:, 3:], past_key_values=first.past_key_values)
    assert_close(torch.cat((first.logits, second.logits), 1), logits_of(model, ids, augmenting_inputs=given), 1e-4)


@pytest.mark.parametrize(
    "mode", [{}, {"num_beams": 3}, {"assistant_model": tiny_model("llama", seed=7)}], ids=["greedy", "beam", "assisted"]
)
def test_encoders_generate(seeing: Any, mode: dict[str, Any]) -> None:
    model, given = seeing
    ids = tiny_tokens(2, 4)
    if "assistant_model" in mode:  # transformers drafts for one row at a time
        ids, given = ids[:1], {"senses": {key: value[:1] for key, value in given["senses"].items()}}
    reference = {key: value for key, value in mode.items() if key == "num_beams"}
    expected = model.generate(ids, **GREEDY, **reference, augmenting_inputs=given, use_cache=False)
    assert torch.equal(model.generate(ids, **GREEDY, **mode, augmenting_inputs=given), expected)


def test_encoders_save_and_load(seeing: Any, tmp_path: Path) -> None:
    model, given = seeing
    for name, base in (("m_B", model.anchor), ("m_A", model.augmenting["senses"])):
        base.save_pretrained(tmp_path / name)
    fresh = calmlm.compose(tmp_path / "m_B", {"senses": tmp_path / "m_A"}, 2, attn_implementation="eager")
    fresh.load_state_dict(model.composition_tensors(), strict=False)
    fresh.save_pretrained(tmp_path / "composition")
    loaded = calmlm.CalmForCausalLM.from_pretrained(tmp_path / "composition", attn_implementation="eager")
    ids = tiny_tokens(2, 6)
    expected = logits_of(fresh, ids, augmenting_inputs=given)
    assert torch.equal(logits_of(loaded, ids, augmenting_inputs=given), expected)


def test_the_anchor_alone_generates_whatever_its_encoders_are_given(seeing: Any) -> None:
    model, given = seeing
    ids = tiny_tokens(2, 4)
    with model.disable_composition():
        found = model.generate(ids, **GREEDY, augmenting_inputs=given)
    assert torch.equal(found, model.anchor.generate(ids, **GREEDY))


def test_missing_and_unknown_inputs_are_named(seeing: Any) -> None:
    model, given = seeing
    with pytest.raises(calmlm.DataError) as caught:
        model(tiny_tokens(2, 4))
    assert_helpful(caught.value, "augmenting_inputs", "senses")
    with pytest.raises(calmlm.DataError) as caught:
        model(tiny_tokens(2, 4), augmenting_inputs={"ears": given["senses"]})
    assert_helpful(caught.value, "ears")
    with pytest.raises(calmlm.DataError) as caught:
        model(tiny_tokens(3, 4), augmenting_inputs=given)
    assert_helpful(caught.value, "one item per row")


def test_an_image_for_a_text_model_is_refused() -> None:
    model = calmlm.compose(tiny_model("llama"), tiny_model("gpt2"), 2)
    with pytest.raises(calmlm.DataError) as caught:
        model(tiny_tokens(1, 4), augmenting_inputs={"augmenting": {"pixel_values": torch.zeros(1, 3, 8, 8)}})
    assert_helpful(caught.value, "augmenting")


def test_a_prompt_reader_is_not_refreshed() -> None:
    model = awaken(calmlm.compose(tiny_model("llama"), tiny_model("gpt2"), 2, refresh=False))
    prompt = tiny_tokens(2, 6)
    generated = model.generate(prompt, **GREEDY)
    mask = torch.zeros_like(generated, dtype=torch.bool)
    mask[:, :6] = True
    forced = logits_of(model, generated, prompt_mask=mask)
    assert torch.equal(forced[:, 5:-1].argmax(-1), generated[:, 6:])
    # Labels tell the prompt too: what is not learned before the first label.
    labels = generated.masked_fill(mask, -100)
    with torch.no_grad():
        assert torch.equal(model(generated, labels=labels, use_cache=False).logits, forced)
    # The last prompt token reaches the first position: that is what reading the prompt at once means.
    changed = prompt.clone()
    changed[:, -1] = (changed[:, -1] + 5) % 90 + 3
    before, after = logits_of(model, prompt), logits_of(model, changed)
    assert not torch.allclose(before[:, 0], after[:, 0], atol=1e-4)


def test_a_prompt_reader_reads_no_drafts_and_no_generated_tokens() -> None:
    model = awaken(calmlm.compose(tiny_model("llama"), tiny_model("gpt2"), 2, refresh=False))
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    seen: list[Tensor] = []
    model.model.try_padding()  # which runs the models once
    handle = model.augmenting["augmenting"].base_model.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["attention_mask"].sum()), with_kwargs=True
    )
    expected = model.generate(ids, **GREEDY)
    modes: list[dict[str, Any]] = [{"use_cache": False}, {"prompt_lookup_num_tokens": 3}, {"num_beams": 2}]
    modes.append({"assistant_model": tiny_model("llama", seed=7)})
    for mode in modes:
        found = model.generate(ids, **GREEDY, **mode)
        if "num_beams" not in mode:
            assert torch.equal(found, expected)
    handle.remove()
    assert {int(count) for count in seen} <= {8, 16}
    with pytest.raises(calmlm.DataError) as caught:
        model.generate(ids, **GREEDY, prefill_chunk_size=3)
    assert_helpful(caught.value, "prefill_chunk_size")


# Several augmenting models


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for name, family, seed in (("m_B", "llama", 1), ("one", "gpt2", 2), ("two", "qwen3", 3)):
        tiny_model(family, seed=seed).save_pretrained(tmp_path / name)
    for index, name in enumerate(("one", "two")):
        model = calmlm.compose(tmp_path / "m_B", {name: tmp_path / name}, index + 1, attn_implementation="eager")
        awaken(model, seed=index).save_pretrained(tmp_path / f"with-{name}")
    return tmp_path


def load(folder: Path) -> calmlm.CalmForCausalLM:
    return calmlm.CalmForCausalLM.from_pretrained(folder, attn_implementation="eager")


@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}], ids=["greedy", "beam"])
def test_two_models_generate_with_caches(mode: dict[str, Any]) -> None:
    parts = {"a": tiny_model("gpt2", seed=2), "b": tiny_model("qwen3", seed=3)}
    model = awaken(calmlm.compose(tiny_model("llama"), parts, {"a": 1, "b": 2}))
    ids = tiny_tokens(2, 5)
    expected = model.generate(ids, **GREEDY, **mode, use_cache=False)
    assert torch.equal(model.generate(ids, **GREEDY, **mode), expected)


@pytest.mark.parametrize("loaded", [True, False], ids=["from a model", "from a folder"])
def test_add_disable_save_and_remove(folders: Path, loaded: bool) -> None:
    model, other = load(folders / "with-one"), load(folders / "with-two")
    ids = tiny_tokens(2, 7)
    alone, others = logits_of(model, ids), logits_of(other, ids)
    hooks = [len(module._forward_hooks) for module in model.anchor.modules()]

    model.add_augmenting("law", other if loaded else folders / "with-two", attn_implementation="eager")
    both = logits_of(model, ids)
    assert not torch.allclose(both, alone, atol=1e-3)
    assert torch.equal(model.generate(ids, **GREEDY), model.generate(ids, **GREEDY, use_cache=False))

    model.disable_augmenting("law")
    assert torch.equal(logits_of(model, ids), alone)
    model.enable_augmenting("law")
    model.disable_augmenting("one")
    assert torch.equal(logits_of(model, ids), others)
    assert torch.equal(model.generate(ids, **GREEDY), model.generate(ids, **GREEDY, use_cache=False))
    model.enable_augmenting("one")

    model.save_pretrained(folders / "both")
    assert torch.equal(logits_of(load(folders / "both"), ids), both)
    model.remove_augmenting("law")
    assert torch.equal(logits_of(model, ids), alone)
    assert [len(module._forward_hooks) for module in model.anchor.modules()] == hooks
    assert torch.equal(logits_of(other, ids), others)


def test_faults_are_named(folders: Path) -> None:
    model = load(folders / "with-one")
    with pytest.raises(calmlm.ConfigError) as caught:
        model.add_augmenting("one", folders / "with-two")
    assert_helpful(caught.value, "'one'")
    with pytest.raises(calmlm.ConfigError) as caught:
        model.add_augmenting("my.law", folders / "with-two")
    assert_helpful(caught.value, "my.law")
    with pytest.raises(calmlm.ConfigError) as caught:
        model.remove_augmenting("two")
    assert_helpful(caught.value, "two")
    with pytest.raises(calmlm.ConfigError) as caught:
        model.remove_augmenting("one")
    assert_helpful(caught.value, "last")
    narrow = calmlm.compose(tiny_model("llama", seed=1, dtype=torch.bfloat16), {"two": tiny_model("qwen3")}, 1)
    load(folders / "with-one").add_augmenting("two", narrow)  # the same anchor in fewer bits
    foreign = calmlm.compose(tiny_model("llama", seed=9), {"two": tiny_model("qwen3")}, 1)
    with pytest.raises(calmlm.CheckpointError) as caught:
        model.add_augmenting("law", foreign)
    assert_helpful(caught.value, "anchor")
    cache = model(tiny_tokens(1, 3), use_cache=True).past_key_values
    model.add_augmenting("law", folders / "with-two")
    with pytest.raises(calmlm.ModelError) as caught:
        model(tiny_tokens(1, 1), past_key_values=cache)
    assert_helpful(caught.value, "past_key_values")


def test_a_composition_saved_before_there_were_readers_loads(folders: Path) -> None:
    path = folders / "with-one" / "config.json"
    ids = tiny_tokens(2, 7)
    expected = logits_of(load(folders / "with-one"), ids)
    data = json.loads(path.read_text())
    for entry in data["augmenting"].values():
        del entry["reads"], entry["connector"]["kind"], entry["connector"]["rank"]
    del data["order"]
    path.write_text(json.dumps(data))
    assert torch.equal(logits_of(load(folders / "with-one"), ids), expected)


def test_a_static_cache_leaves_the_disabled_out() -> None:
    parts = {"a": tiny_model("gpt2", seed=2), "b": tiny_model("qwen3", seed=3)}
    model = awaken(calmlm.compose(tiny_model("llama"), parts, 1))
    model.disable_augmenting("b")
    ids = tiny_tokens(2, 5)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(ids, **GREEDY, **static), model.generate(ids, **GREEDY, use_cache=False))


# Connectors


def test_an_encoder_has_no_distribution_for_legonn() -> None:
    with pytest.raises(calmlm.ConfigError) as caught:
        calmlm.compose(tiny_model("llama"), {"senses": ENCODERS["bert"][0]()}, 2, connector="legonn")
    assert_helpful(caught.value, "legonn", "encoder")


@pytest.mark.parametrize("kind", ["flamingo", "legonn"])
@pytest.mark.parametrize("rank", [None, 4])
def test_other_connectors_behave(kind: str, rank: int | None, tmp_path: Path) -> None:
    anchor, augmenting = tiny_model("llama", seed=1), tiny_model("gpt2", seed=2)
    model = calmlm.compose(anchor, augmenting, 2, connector=kind, rank=rank)
    ids = tiny_tokens(2, 8)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, anchor(ids).logits)
    awaken(model)
    full = logits_of(model, ids)
    with model.disable_composition():
        assert not torch.allclose(logits_of(model, ids), full, atol=1e-3)
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 5) % 90 + 3
    assert torch.equal(logits_of(model, changed)[:, :-1], full[:, :-1])
    with torch.no_grad():
        first = model(ids[:, :3], use_cache=True)
        second = model(ids[:, 3:], past_key_values=first.past_key_values)
    assert_close(torch.cat((first.logits, second.logits), 1), full, 1e-4)
    expected = model.generate(ids, **GREEDY, num_beams=2, use_cache=False)
    assert torch.equal(model.generate(ids, **GREEDY, num_beams=2), expected)
    model.save_pretrained(tmp_path)
    loaded = calmlm.CalmForCausalLM.from_pretrained(tmp_path, anchor=anchor, augmenting=augmenting)
    assert torch.equal(logits_of(loaded, ids), full)


def test_a_flamingo_gate_by_hand() -> None:
    from calmlm.connectors.flamingo import Flamingo

    torch.manual_seed(0)
    module = Flamingo(3, 4, 2, norm=False)
    with torch.no_grad():
        module.attention.gate.fill_(0.5)
        module.feed_forward_gate.fill_(-0.25)
        anchor, augmenting = torch.randn(1, 2, 4), torch.randn(1, 2, 3)
        keys, values = module.keys_values(augmenting, None)
        found = module(anchor, keys, values, None)
        projected = augmenting @ module.attention.f_proj.weight.T
        q, k, v = (
            (x @ getattr(module.attention, f"{name}_proj").weight.T).view(1, 2, 2, 2).transpose(1, 2)
            for name, x in (("q", anchor), ("k", projected), ("v", projected))
        )
        read = ((q @ k.transpose(-1, -2) / 2**0.5).softmax(-1) @ v).transpose(1, 2).reshape(1, 2, 4)
        state = anchor + torch.tanh(torch.tensor(0.5)) * read @ module.attention.o_proj.weight.T
        expected = state + torch.tanh(torch.tensor(-0.25)) * module.feed_forward(state)
    assert torch.allclose(found, expected, atol=1e-6)


def test_legonn_sees_the_distribution_and_nothing_else() -> None:
    model = awaken(calmlm.compose(tiny_model("llama"), tiny_model("gpt2"), 2, connector="legonn"))
    ids = tiny_tokens(1, 6)
    before = logits_of(model, ids)
    head = model.augmenting["augmenting"].get_output_embeddings()
    with torch.no_grad():
        head.weight.zero_()  # every distribution is now uniform, whatever the states are
    uniform = logits_of(model, ids)
    assert not torch.allclose(before, uniform, atol=1e-3)
    layer = model.model.backbone("augmenting").layers[-1]
    handle = layer.register_forward_hook(
        lambda _m, _a, out: (out[0] + 1, *out[1:]) if isinstance(out, tuple) else out + 1
    )
    assert torch.equal(logits_of(model, ids), uniform)
    handle.remove()


def test_guidance_reads_the_same_item_beside_another_text(seeing: Any) -> None:
    """By hand: the text's own scores, led away from those of a text without the prompt, all beside the item."""
    model, given = seeing
    given = {"senses": {key: value[:1] for key, value in given["senses"].items()}}
    text = tiny_tokens(1, 6)
    found = model.generate(text, **GREEDY, guidance_scale=2.0, augmenting_inputs=given)
    other = text[:, -1:]
    for _ in range(5):
        wanted, against = (
            logits_of(model, one, augmenting_inputs=given)[:, -1].log_softmax(-1) for one in (text, other)
        )
        token = (2.0 * (wanted - against) + against).argmax(-1, keepdim=True)
        text, other = torch.cat((text, token), dim=1), torch.cat((other, token), dim=1)
    assert torch.equal(found, text)


def _wav2vec(kind: type[PreTrainedModel] = Wav2Vec2Model, **more: Any) -> PreTrainedModel:
    shape = {"conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (8, 3), "feat_extract_norm": "layer"}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "do_stable_layer_norm": True}
    return kind(Wav2Vec2Config(vocab_size=20, initializer_range=0.3, **(SIZE | shape | positions | more)))


@pytest.mark.parametrize("head", [Wav2Vec2Model, Wav2Vec2ForCTC])
def test_layers_are_not_taken_for_as_many_convolutions(head: type[PreTrainedModel]) -> None:
    ears = _wav2vec(head, num_hidden_layers=2).eval()
    model = awaken(calmlm.compose(tiny_model("llama"), {"ears": ears}, 1))
    assert model.model.backbone("ears").layers is getattr(ears, "wav2vec2", ears).encoder.layers
    sound = torch.randn(2, 1, 320)
    one, other = (logits_of(model, tiny_tokens(2, 6), augmenting_inputs={"ears": {"input_values": s}}) for s in
                  (sound[:, 0], sound.flip(0)[:, 0]))  # fmt: skip
    assert not torch.allclose(one, other, atol=1e-4)


def _sew() -> PreTrainedModel:
    shape = {"conv_dim": (8, 8), "conv_stride": (3, 2), "conv_kernel": (5, 3), "feat_extract_norm": "layer"}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "squeeze_factor": 2}
    return SEWModel(SEWConfig(**SIZE, **shape, **positions))


def _longformer() -> PreTrainedModel:
    return LongformerModel(
        LongformerConfig(vocab_size=50, attention_window=[8] * 3, max_position_embeddings=64, **SIZE)
    )


def _siglip() -> PreTrainedModel:
    return Siglip2VisionModel(Siglip2VisionConfig(**SIZE, patch_size=4, num_patches=16, num_channels=1))


def _padded(name: str, tensor: Tensor, mask: str, length: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The first row of two cut to its length, and both with what stands behind it masked."""
    real = torch.ones(2, tensor.shape[1], dtype=torch.long)
    real[0, length:] = 0
    filled = tensor.clone()
    filled[0, length:] = 0
    return {name: tensor[:1, :length], mask: real[:1, :length]}, {name: filled, mask: real}


@pytest.mark.parametrize("kind", ["wav2vec2", "adapter", "sew", "longformer", "siglip2"])
def test_padding_of_an_encoder_changes_nothing(kind: str) -> None:
    """Whatever its mask is called, and however long its states are."""
    torch.manual_seed(0)
    if kind in ("wav2vec2", "adapter"):
        encoder = _wav2vec(add_adapter=kind == "adapter")
        alone, beside = _padded("input_values", torch.randn(2, 160), "attention_mask", 80)
    elif kind == "sew":
        encoder, (alone, beside) = _sew(), _padded("input_values", torch.randn(2, 400), "attention_mask", 250)
    elif kind == "longformer":
        ids = torch.randint(3, 50, (2, 12))
        encoder, (alone, beside) = _longformer(), _padded("input_ids", ids, "attention_mask", 8)
    else:
        encoder = _siglip()
        alone, beside = _padded("pixel_values", torch.randn(2, 9, 16), "pixel_attention_mask", 4)
        sizes = torch.tensor([[2, 2], [3, 3]])
        alone, beside = alone | {"spatial_shapes": sizes[:1]}, beside | {"spatial_shapes": sizes}
    model = awaken(calmlm.compose(tiny_model("llama"), {"senses": encoder.eval()}, 2))
    ids = tiny_tokens(2, 6)
    found = logits_of(model, ids, augmenting_inputs={"senses": beside})
    assert_close(found[:1], logits_of(model, ids[:1], augmenting_inputs={"senses": alone}), 1e-4)


@pytest.mark.parametrize("connector", ["cross_attention", "legonn"])
def test_a_mask_of_ones_hides_no_sound_before_or_behind_an_adapter(connector: str) -> None:
    """Connected layers lie before the adapter, the head behind it."""
    torch.manual_seed(0)
    kind = Wav2Vec2ForCTC if connector == "legonn" else Wav2Vec2Model
    ears = _wav2vec(kind, add_adapter=True).eval()
    model = awaken(calmlm.compose(tiny_model("llama"), {"ears": ears}, 2, connector=connector))
    ids, sound = tiny_tokens(2, 6), torch.randn(2, 320)
    mask = torch.ones(2, 320, dtype=torch.long)
    whole = logits_of(model, ids, augmenting_inputs={"ears": {"input_values": sound}})
    found = logits_of(model, ids, augmenting_inputs={"ears": {"input_values": sound, "attention_mask": mask}})
    assert_close(found, whole, 1e-5)


def test_what_an_encoder_fills_a_text_up_with_is_not_seen() -> None:
    """Also where it is given without a mask: Longformer reads whole windows."""
    torch.manual_seed(0)
    model = awaken(calmlm.compose(tiny_model("llama"), {"senses": _longformer().eval()}, 2))
    ids, text = tiny_tokens(2, 6), torch.randint(3, 50, (2, 5))
    found = logits_of(model, ids, augmenting_inputs={"senses": {"input_ids": text}})
    given = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    assert_close(found, logits_of(model, ids, augmenting_inputs={"senses": given}), 1e-5)


def _text_and_picture(kind: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """An encoder of both, and a text of five tokens with a picture, of which four states are patches."""
    text, pixels = {"input_ids": torch.randint(5, 45, (2, 5))}, {"pixel_values": torch.randn(2, 3, 8, 8)}
    image = {"image_size": 8, "patch_size": 4}
    if kind == "layoutlmv3":
        places = {"coordinate_size": 4, "shape_size": 4, "max_2d_position_embeddings": 64}
        config = LayoutLMv3Config(vocab_size=50, input_size=8, patch_size=4, **places, **SIZE)
        return LayoutLMv3Model(config), text | pixels | {"bbox": torch.zeros(2, 5, 4, dtype=torch.long)}
    if kind == "vilt":
        return ViltModel(ViltConfig(vocab_size=50, **image, **SIZE)), text | pixels
    seen = {"visual_embeds": torch.randn(2, 4, 8)}
    return VisualBertModel(VisualBertConfig(vocab_size=50, visual_embedding_dim=8, **SIZE)), text | seen


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["layoutlmv3", "vilt", "visual_bert"])
def test_a_picture_behind_a_text_is_seen(kind: str, masked: bool) -> None:
    """All of its states, and none of the text's padding, with a mask of the text or without."""
    torch.manual_seed(0)
    eyes, given = _text_and_picture(kind)
    text = torch.ones(2, 5, dtype=torch.long)
    if masked:
        text[1, 3:] = 0
        given["attention_mask"] = text
    if kind == "visual_bert":
        given["visual_attention_mask"] = torch.ones(2, 4)
        given["visual_attention_mask"][0, 3:] = 0
    model = calmlm.compose(tiny_model("llama"), {"eyes": eyes.eval()}, 2)
    with torch.no_grad():
        cache = model(tiny_tokens(2, 6), augmenting_inputs={"eyes": given}, use_cache=True).past_key_values
    seen = cache.frontiers["eyes"].owner >= 0
    picture = given.get("visual_attention_mask", torch.ones(2, seen.shape[1] - 5))
    assert seen.shape[1] > 8 and torch.equal(seen, torch.cat((text, picture), 1).bool())


def test_layers_of_another_width_are_refused() -> None:
    """Swin's grow from stage to stage: a connection has the width of the last."""
    shape = {"image_size": 64, "patch_size": 4, "embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4}
    model = calmlm.compose(tiny_model("llama"), {"eyes": SwinModel(SwinConfig(window_size=2, **shape)).eval()}, 2)
    with pytest.raises(calmlm.ModelError) as caught:
        model(tiny_tokens(2, 5), augmenting_inputs={"eyes": {"pixel_values": torch.randn(2, 3, 64, 64)}})
    assert_helpful(caught.value, "'eyes'", "64", "32", "augmenting_layers_path")


def test_a_mask_that_does_not_fit_is_refused() -> None:
    model = calmlm.compose(tiny_model("llama"), {"senses": ENCODERS["vit"][0]().eval()}, 2)

    def given(mask: Tensor) -> dict[str, dict[str, Tensor]]:
        return {"senses": {"pixel_values": torch.randn(2, 1, 8, 8), "attention_mask": mask}}

    with pytest.raises(calmlm.DataError) as caught:
        model(tiny_tokens(2, 6), augmenting_inputs=given(torch.tensor([[1, 0, 1], [1, 1, 1]])))
    assert_helpful(caught.value, "'senses'")


@pytest.mark.parametrize("kind", [Idefics2VisionTransformer, SmolVLMVisionTransformer])
def test_a_mask_of_patches_is_heeded(kind: type[PreTrainedModel]) -> None:
    """What it calls padding changes nothing; what it does not, does."""
    torch.manual_seed(0)
    config = {Idefics2VisionTransformer: Idefics2VisionConfig, SmolVLMVisionTransformer: SmolVLMVisionConfig}[kind]
    eyes = kind(config(image_size=8, patch_size=4, initializer_range=0.3, **SIZE)).eval()
    model = awaken(calmlm.compose(tiny_model("llama"), {"eyes": eyes}, 2))
    ids, pixels = tiny_tokens(2, 6), torch.randn(2, 3, 8, 8)
    mask = torch.tensor([[[1, 1], [0, 0]], [[1, 1], [1, 1]]]).bool()
    changed = pixels.clone()
    changed[:, :, 4:] = 7
    before, after = (
        logits_of(model, ids, augmenting_inputs={"eyes": {"pixel_values": given, "patch_attention_mask": mask}})
        for given in (pixels, changed)
    )
    assert_close(after[0], before[0], 1e-5)
    assert float((after[1] - before[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("hidden", [0, 1, 32])
def test_a_mask_that_nobody_reads_is_refused_where_it_hides_something(hidden: int) -> None:
    """ViLT's mask of pixels; where it hides nothing it is as good as none."""
    torch.manual_seed(0)
    eyes, given = _text_and_picture("vilt")
    given["pixel_mask"] = torch.ones(2, 8, 8, dtype=torch.long)
    given["pixel_mask"][0].view(-1)[64 - hidden :] = 0
    model = calmlm.compose(tiny_model("llama"), {"eyes": eyes.eval()}, 2)
    if not hidden:
        model(tiny_tokens(2, 6), augmenting_inputs={"eyes": given})
        return
    with pytest.raises(calmlm.DataError) as caught:
        model(tiny_tokens(2, 6), augmenting_inputs={"eyes": given})
    assert_helpful(caught.value, "pixel_mask", "(2, 8, 8)")


def test_in_training_each_row_has_an_item_of_its_own() -> None:
    """In generation, beams share their row's."""
    model = awaken(calmlm.compose(tiny_model("llama"), {"senses": ENCODERS["vit"][0]().eval()}, 2))
    ids, given = tiny_tokens(4, 6), {"senses": {"pixel_values": torch.randn(2, 1, 8, 8)}}
    with pytest.raises(calmlm.DataError) as caught:
        model.train()(ids, labels=ids, augmenting_inputs=given)
    assert_helpful(caught.value, "2 for 4 rows")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_an_added_models_connections_keep_their_dtype(dtype: torch.dtype) -> None:
    anchor = tiny_model("llama", seed=1)
    other = awaken(calmlm.compose(copy.deepcopy(anchor), tiny_model("gpt2", seed=2), 2, composition_dtype=dtype))
    model = calmlm.compose(anchor, {"first": tiny_model("qwen2", seed=3)}, 2)
    model.add_augmenting("law", other)
    assert {p.dtype for p in model.model.connectors["law"].parameters()} == {dtype}
    model.remove_augmenting("first")
    ids = tiny_tokens(2, 6)
    assert torch.equal(logits_of(model, ids), logits_of(other, ids))


def test_an_encoder_saved_with_a_head_of_words_is_one(tmp_path: Path) -> None:
    BertForMaskedLM(BertConfig(vocab_size=50, **SIZE)).save_pretrained(tmp_path)
    model = calmlm.compose(tiny_model("llama"), {"senses": tmp_path}, 2)
    assert model.config.augmenting["senses"]["reads"] == "inputs"
    model(tiny_tokens(2, 6), augmenting_inputs={"senses": _text(2)})


def test_a_cache_does_not_go_on_with_another_model_of_the_same_name() -> None:
    anchor = tiny_model("llama", seed=1)
    other = awaken(calmlm.compose(copy.deepcopy(anchor), {"b": tiny_model("qwen2", seed=5)}, 2))
    model = awaken(calmlm.compose(anchor, {"a": tiny_model("gpt2", seed=2), "b": tiny_model("qwen2", seed=3)}, 2))
    ids = tiny_tokens(1, 6)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        model.remove_augmenting("b")
        model.add_augmenting("b", other)
        with pytest.raises(calmlm.ModelError) as caught:
            model(ids[:, :1], past_key_values=cache)
    assert_helpful(caught.value, "begin a new one")


def test_an_encoder_of_several_widths_is_refused() -> None:
    encoder = ConvNextModel(ConvNextConfig(num_channels=1, hidden_sizes=[8, 8], depths=[1, 1], num_stages=2))
    with pytest.raises(calmlm.ModelError) as caught:
        calmlm.compose(tiny_model("llama"), {"eyes": encoder}, 1)
    assert_helpful(caught.value, "ConvNextModel")
