"""Model families that differ from the rest in how they count, save or scale: right, or refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

import calmlm
from compositions import assert_close, assert_helpful, awaken, greedy_without_cache, logits_of, pad, tiny_composition
from decoding.test_cache_generation import GREEDY
from tiny import VOCAB_SIZE, tiny_model, tiny_tokens

TEXT = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
PICTURES = {
    "depth": 2, "embed_dim": 32, "hidden_size": 48, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4, "in_channels": 3,
    "spatial_merge_size": 2,
}  # fmt: skip
BERT = {"is_decoder": True, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "pad_token_id": 1}
BART = {"d_model": 48, "decoder_layers": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}


MINIMAX = {  # attention first, then a state
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "block_size": 4, "num_local_experts": 4, "layer_types": ["full_attention", "linear_attention"] * 2,
}  # fmt: skip


def other(family: str, *, seed: int = 0, **options: object) -> PreTrainedModel:
    """A tiny random model of a family that the other tests have not."""
    given = {"vocab_size": VOCAB_SIZE, "intermediate_size": 64, "max_position_embeddings": 128, **options}
    config = AutoConfig.for_model(family, **given)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    return model.eval()


def seeing() -> PreTrainedModel:
    """A tiny vision-language model."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
    places = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    config = Qwen2VLConfig(text_config=TEXT | {"rope_parameters": rope}, vision_config=PICTURES, **places)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen2VLForConditionalGeneration(config).eval()


def reloaded(anchor: PreTrainedModel, augmenting: PreTrainedModel, folder: Path) -> float:
    """How far the logits of a composition of folders, saved and loaded again, lie from its own."""
    anchor.save_pretrained(folder / "anchor")
    augmenting.save_pretrained(folder / "augmenting")
    model = awaken(calmlm.compose(folder / "anchor", folder / "augmenting", connections=2))
    model.save_pretrained(folder / "composition")
    again, ids = calmlm.CalmForCausalLM.from_pretrained(folder / "composition"), tiny_tokens(2, 9)
    assert type(again.anchor) is type(model.anchor)
    return float((logits_of(model, ids) - logits_of(again, ids)).abs().max())


RELOADED: dict[str, Callable[[], PreTrainedModel]] = {
    "mamba2, with an infinity in its configuration": lambda: other(
        "mamba2", hidden_size=32, num_heads=4, head_dim=16, n_groups=1, num_hidden_layers=3
    ),
    "rwkv, which scales its weights when it runs": lambda: other(
        "rwkv", hidden_size=32, num_hidden_layers=4, rescale_every=2, context_length=64, attention_hidden_size=32
    ),
    "a vision-language model": seeing,
}


@pytest.mark.parametrize("role", ["anchor", "augmenting"])
@pytest.mark.parametrize("name", RELOADED)
def test_a_saved_composition_loads(name: str, role: str, tmp_path: Path) -> None:
    models = [RELOADED[name](), tiny_model("llama")]
    assert reloaded(*(models if role == "anchor" else reversed(models)), tmp_path) == 0


def assert_rows_as_alone(model: calmlm.CalmForCausalLM, rows: list[Tensor], side: str) -> None:
    """Rows padded on one side have the logits that each of them has alone."""
    ids, mask = pad(rows, side)
    found = logits_of(model, ids, mask)
    for row, text in enumerate(rows):
        assert_close(found[row][mask[row].bool()], logits_of(model, text[None])[0], 1e-4)


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta", "data2vec-text"])
class TestPositionsBehindThePadding:
    """RoBERTa's first token stands at position ``padding_idx + 1``."""

    def test_the_untrained_composition_is_the_anchor(self, family: str) -> None:
        anchor, ids = other(family, **BERT), tiny_tokens(2, 9)
        everything = torch.ones_like(ids)
        expected = logits_of(anchor, ids, everything)
        assert torch.equal(logits_of(calmlm.compose(anchor, tiny_model("llama"), 2), ids, everything), expected)

    @pytest.mark.parametrize("role", ["anchor", "augmenting"])
    def test_padding_changes_nothing(self, family: str, role: str) -> None:
        models = [other(family, **BERT), tiny_model("llama", seed=2)]
        model = awaken(calmlm.compose(*(models if role == "anchor" else reversed(models)), 2))
        rows = [tiny_tokens(1, length, seed=length)[0] for length in (9, 4)]
        for side in ("left", "right"):
            assert_rows_as_alone(model, rows, side)
        ids, mask = pad(rows, "left")
        written = model.generate(ids, attention_mask=mask, max_new_tokens=5, **GREEDY)
        assert torch.equal(written, greedy_without_cache(model, ids, 5, mask))

    def test_its_positions_end_sooner(self, family: str) -> None:
        model = calmlm.compose(tiny_model("llama"), other(family, **BERT), 2)
        model(tiny_tokens(1, 126))
        with pytest.raises(calmlm.DataError, match="at most 126 tokens"):
            model(tiny_tokens(1, 127))


@pytest.mark.parametrize("role", ["anchor", "augmenting"])
@pytest.mark.parametrize("family", ["bart", "rwkv"])
def test_padding_that_a_model_counts_is_refused_on_the_left_alone(family: str, role: str) -> None:
    sizes = BART if family == "bart" else {"hidden_size": 32, "num_hidden_layers": 4, "attention_hidden_size": 32}
    models = [other(family, **sizes), tiny_model("llama", seed=2)]
    model = awaken(calmlm.compose(*(models if role == "anchor" else reversed(models)), 2))
    rows = [tiny_tokens(1, length, seed=length)[0] for length in (9, 4)]
    assert_rows_as_alone(model, rows, "right")
    ids, mask = pad(rows, "left")
    with pytest.raises(calmlm.DataError) as error:
        logits_of(model, ids, mask)
    assert_helpful(error.value, "left", role)


@pytest.mark.parametrize("role", ["anchor", "augmenting"])
def test_positions_are_counted_for_models_to_which_more_than_distances_matter(role: str) -> None:
    """HunYuan scales queries and keys after they are turned, so that padding on the left would count."""
    options = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    odd, usual = other("hunyuan_v1_dense", head_dim=12, **options), tiny_model()
    with torch.no_grad():
        for name, weight in odd.named_parameters():  # which are all one before a training
            if "layernorm" in name:
                weight.add_(torch.linspace(-0.5, 0.5, len(weight)))
    model = awaken(calmlm.compose(*((odd, usual) if role == "anchor" else (usual, odd)), connections=2))
    rows, mask = pad([tiny_tokens(1, length, seed=length)[0] for length in (9, 3, 6)], "left")
    first, second = logits_of(model, rows, mask), logits_of(model, rows, mask)
    assert torch.equal(first, second), "trying padding out, in the first call, settles who counts"
    alone = logits_of(model, rows[1:2, -3:], None)
    assert_close(first[1:2, -3:], alone, 1e-4)
    found = model.generate(rows, attention_mask=mask, max_new_tokens=5, **GREEDY)
    assert found.tolist() == greedy_without_cache(model, rows, 5, mask).tolist()


@pytest.mark.parametrize("role", ["anchor", "augmenting"])
def test_models_that_bring_their_own_code(role: str, tmp_path: Path) -> None:
    mine = tmp_path / role
    tiny_model("llama", seed=3).save_pretrained(mine)
    tiny_model("llama", seed=4).save_pretrained(tmp_path / ({"anchor", "augmenting"} - {role}).pop())
    (mine / "modeling_mine.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
        "class MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n"
    )
    config = json.loads((mine / "config.json").read_text())
    names = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    config |= {"model_type": "mine", "architectures": ["MineForCausalLM"], "auto_map": names}
    (mine / "config.json").write_text(json.dumps(config))
    options = {"trust_remote_code": True}
    model = awaken(calmlm.compose(tmp_path / "anchor", tmp_path / "augmenting", connections=2, **options))
    model.save_pretrained(tmp_path / "composition")
    again, ids = calmlm.CalmForCausalLM.from_pretrained(tmp_path / "composition", **options), tiny_tokens(1, 7)
    assert torch.equal(logits_of(model, ids), logits_of(again, ids))
    with pytest.raises(calmlm.CalmError):  # nothing of it runs unasked
        calmlm.CalmForCausalLM.from_pretrained(tmp_path / "composition")


def test_pictures_for_the_anchor_are_read_but_not_generated_from() -> None:
    anchor = seeing()
    model = calmlm.compose(anchor, tiny_model("llama"), 2)
    ids = torch.tensor([[5, 6, 92, 90, 90, 90, 90, 93, 7, 8, 9]])
    pixels = torch.randn(16, 96, generator=torch.Generator().manual_seed(0))
    given = {
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == 90).int(),
    }
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False, **given).logits, anchor(ids, use_cache=False, **given).logits)
    with pytest.raises(calmlm.ConfigError) as error:
        model.generate(ids, max_new_tokens=2, **given)
    assert_helpful(error.value, "pixel_values")


def test_recurrent_models_take_no_lookup_and_cacheless_ones_no_chunks() -> None:
    ids = tiny_tokens(1, 6)
    recurrent = calmlm.compose(tiny_model("llama"), other("mamba", hidden_size=32, num_hidden_layers=3), 2)
    with pytest.raises(calmlm.ConfigError) as error:
        recurrent.generate(ids, max_new_tokens=2, prompt_lookup_num_tokens=3)
    assert_helpful(error.value, "recurrent")
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "attention_hidden_size": 32}
    with pytest.raises(calmlm.ConfigError) as error:
        calmlm.compose(tiny_model("llama"), other("rwkv", **sizes), 2).generate(
            ids, max_new_tokens=2, prefill_chunk_size=2
        )
    assert_helpful(error.value, "prefill_chunk_size")


def test_half_precision_is_no_padding() -> None:
    """What rounding and experts do to a padded row is not taken for a model that counts padding."""
    experts = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 32}
    for family, options in (("qwen3_moe", experts), ("llama", {}), ("gpt2", {}), ("bloom", {})):
        small = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
        model = tiny_composition(family, "mixtral", anchor_options=options, augmenting_options=small)
        for base in model.model.bases():
            base.to(torch.bfloat16)
        ids, mask = pad([tiny_tokens(1, 9)[0], tiny_tokens(1, 4)[0]], "left")
        logits_of(model, ids, mask)


def test_trying_out_padding_leaves_checkpointing_on() -> None:
    model = tiny_composition().train()
    model.gradient_checkpointing_enable()
    model.train()
    layers = model.model.backbone().layers
    before = [layer.training for layer in layers]
    ids = tiny_tokens(1, 6)
    model(ids, attention_mask=torch.ones_like(ids))
    assert any(before)
    assert [layer.training for layer in layers] == before


def test_autocast_is_no_padding() -> None:
    model, (ids, mask) = tiny_composition(), pad([tiny_tokens(1, 9)[0], tiny_tokens(1, 4)[0]], "left")
    with torch.autocast("cpu", torch.bfloat16):
        logits_of(model, ids, mask)
    logits_of(model, ids, mask)


def test_settings_of_the_anchors_forward_reach_it_in_generation() -> None:
    model = tiny_composition("mixtral")
    model.generate(tiny_tokens(1, 5), max_new_tokens=2, output_router_logits=False, **GREEDY)


def packed() -> tuple[Tensor, Tensor, list[Tensor]]:
    """Two texts in one row, their positions, and each of them alone."""
    texts = [tiny_tokens(1, length, seed=length) for length in (5, 7)]
    places = [torch.arange(text.shape[1])[None] for text in texts]
    return torch.cat(texts, dim=1), torch.cat(places, dim=1), texts


@pytest.mark.parametrize("role", ["anchor", "augmenting"])
@pytest.mark.parametrize("family", ["bloom", "falcon", "mpt", "opt", "biogpt", "xglm", "minimax"])
def test_models_that_mix_packed_texts_are_given_none(family: str, role: str) -> None:
    options = {"alibi": True} if family == "falcon" else {}
    odd = other(family, **MINIMAX) if family == "minimax" else tiny_model(family, **options)
    models = [odd, tiny_model("llama", seed=2)]
    model = awaken(calmlm.compose(*(models if role == "anchor" else reversed(models)), 2))
    ids, positions, texts = packed()
    try:
        found = logits_of(model, ids, position_ids=positions)
    except calmlm.DataError as error:
        assert_helpful(error, role, "packing")
    else:  # then it keeps them apart
        assert_close(found, torch.cat([logits_of(model, text) for text in texts], dim=1), 1e-4)
    logits_of(model, ids, position_ids=torch.arange(ids.shape[1])[None])  # one text may come with positions


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma3_text", "qwen3", "gpt_neox", "phi", "gptj"])
def test_models_that_keep_packed_texts_apart_are_given_them(family: str) -> None:
    model = tiny_composition(family, "gpt2")
    ids, positions, texts = packed()
    found = logits_of(model, ids, position_ids=positions)
    assert_close(found, torch.cat([logits_of(model, text) for text in texts], dim=1), 1e-4)


GEMMA4 = {
    "hidden_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12,
    "global_head_dim": 12, "sliding_window": 6, "num_kv_shared_layers": 3, "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size_per_layer_input": 8, "pad_token_id": 0,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"] * 2,
}  # fmt: skip


@pytest.mark.parametrize("kept", [1, 3])
def test_decoders_that_drop_positions_between_their_layers(kept: int) -> None:
    """Gemma 4's last layers share keys: told how many logits are wanted, they run on those positions alone."""
    model = awaken(calmlm.compose(other("gemma4_text", **GEMMA4), tiny_model(), connections=[(1, 1), (3, 4)]))
    ids = tiny_tokens(2, 9)
    assert_close(logits_of(model, ids, logits_to_keep=kept), logits_of(model, ids)[:, -kept:], 1e-5)
    rows, mask = pad([tiny_tokens(1, 4)[0], tiny_tokens(1, 9)[0]], "left")
    found = model.generate(rows, attention_mask=mask, max_new_tokens=5, **GREEDY)
    assert found.tolist() == greedy_without_cache(model, rows, 5, mask).tolist()


def test_such_a_decoder_drafts() -> None:
    anchor = tiny_model(num_hidden_layers=4)
    model = awaken(calmlm.compose(anchor, other("gemma4_text", **GEMMA4), connections=[(4, 1), (5, 3)]))
    ids = tiny_tokens(1, 9)
    found = model.generate(ids, drafting=True, max_new_tokens=8, **GREEDY)
    assert found.tolist() == greedy_without_cache(model, ids, 8).tolist()


def test_layers_that_see_padding_of_their_own_are_refused() -> None:
    """Reformer pads a text to whole chunks before its layers."""
    sizes = {
        "is_decoder": True, "hidden_size": 32, "attn_layers": ["local"] * 2, "attention_head_size": 8,
        "feed_forward_size": 48, "num_attention_heads": 4, "axial_pos_embds": False,
    }  # fmt: skip
    with pytest.raises(calmlm.ModelError) as error:
        calmlm.compose(other("reformer", **sizes), tiny_model(), 1)
    assert_helpful(error.value, "anchor", "ReformerModel")
