"""Bases in low precision: half precision, and weights of 8 and 4 bits through transformers' own quantisers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import calmlm
from compositions import assert_close, awaken, greedy_without_cache, logits_of, tiny_composition
from tiny import tiny_model, tiny_tokens

GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
SIZES: dict[str, dict[str, Any]] = {
    # Widths that groups of 32 weights divide.
    "llama": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128},
    "qwen2": {"hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128},
    "gpt2": {"n_embd": 64, "n_head": 4},
    "opt": {"hidden_size": 64, "num_attention_heads": 4, "ffn_dim": 96, "word_embed_proj_dim": 64},
}


@pytest.mark.parametrize("composition_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("families", [("llama", "gpt2"), ("gemma3_text", "qwen3"), ("gpt_neox", "opt")], ids="+".join)
def test_half_precision(families: tuple[str, str], dtype: torch.dtype, composition_dtype: torch.dtype) -> None:
    halves = {"anchor_options": {"dtype": dtype}, "augmenting_options": {"dtype": dtype}}
    model = tiny_composition(*families, composition_dtype=composition_dtype, gate=True, null_key=True, **halves)
    ids = tiny_tokens(2, 6)
    found = model.generate(ids, max_new_tokens=8, output_logits=True, return_dict_in_generate=True, **GREEDY)
    assert found.logits[0].dtype in (dtype, torch.float32)
    # Rounding differs with the shape of a call, so logits are compared, not tokens; and with the same numbers in fp32.
    again = logits_of(model, found.sequences)[:, 5:-1].float()
    scale = float(again.abs().max())
    torch.testing.assert_close(torch.stack(found.logits, 1).float(), again, atol=0.05 * scale, rtol=0.05)
    exact = logits_of(model.float(), found.sequences)[:, 5:-1]
    torch.testing.assert_close(again, exact, atol=0.06 * scale, rtol=0.06)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for seed, (family, sizes) in enumerate(SIZES.items()):
        tiny_model(family, seed=seed, **sizes).save_pretrained(folder / family)
    return folder


def quantiser(bits: int) -> Any:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup
    from transformers import TorchAoConfig

    if bits == 8:
        return TorchAoConfig(Int8WeightOnlyConfig())
    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("families", [("llama", "gpt2"), ("qwen2", "llama"), ("llama", "opt")], ids="+".join)
def test_quantised_bases_train_generate_save_and_load(
    folders: Path, families: tuple[str, str], bits: int, tmp_path: Path
) -> None:
    options = {"quantization_config": quantiser(bits), "dtype": torch.float32}
    model = calmlm.compose(folders / families[0], folders / families[1], 2, **options)
    plain = calmlm.compose(folders / families[0], folders / families[1], 2)
    for each in (model, plain):
        awaken(each, scale=0.3)
    assert "Int" in type(model.anchor.get_decoder().layers[0].self_attn.q_proj.weight).__name__
    ids = tiny_tokens(2, 6)

    # Generation: with the cache and drafts as without; close to the bases in full precision.
    expected = greedy_without_cache(model, ids, 8)
    assert torch.equal(model.generate(ids, max_new_tokens=8, **GREEDY), expected)
    one = greedy_without_cache(model, ids[:1], 8)
    assert torch.equal(model.generate(ids[:1], max_new_tokens=8, drafting=True, **GREEDY), one)
    exact, found = logits_of(plain, ids), logits_of(model, ids)
    error = float((found - exact).norm() / exact.norm())
    assert 0 < error < (0.05 if bits == 8 else 0.5)

    # Training: gradients in the connections and nowhere else, and the loss falls.
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in model.model.connectors.parameters()}
    optimizer = torch.optim.AdamW(trainable, lr=5e-3)
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    model.eval()

    # Files: the composition's tensors alone, joined with bases that are quantised again.
    model.save_pretrained(tmp_path / "composition")
    again = calmlm.CalmForCausalLM.from_pretrained(tmp_path / "composition", **options)
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))


def test_lora_around_a_quantised_anchor_is_merged(folders: Path) -> None:
    options = {"quantization_config": quantiser(8), "dtype": torch.float32}
    model, ids = awaken(calmlm.compose(folders / "llama", folders / "gpt2", 2, **options)), tiny_tokens(2, 6)
    settings = LoraConfig(target_modules=r".*anchor\..*(q_proj|v_proj)", r=4, init_lora_weights=False)
    wrapped = get_peft_model(model, settings).eval()
    before = logits_of(wrapped, ids)
    merged = wrapped.merge_and_unload()
    assert_close(logits_of(merged, ids), before, 0.1)  # what was merged is quantised anew
    assert not hasattr(calmlm.compose(folders / "llama", folders / "gpt2", 2), "hf_quantizer")


@pytest.mark.parametrize("which", ["anchor", "augmenting", "both"])
def test_bases_that_torchao_has_quantised_in_memory(which: str, tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    anchor, augmenting = tiny_model("llama", seed=1, **SIZES["llama"]), tiny_model("qwen2", seed=2, **SIZES["qwen2"])
    for base in [anchor] * (which != "augmenting") + [augmenting] * (which != "anchor"):
        quantization.quantize_(base, quantization.Int8WeightOnlyConfig())
    model, ids = awaken(calmlm.compose(anchor, augmenting, 2)), tiny_tokens(2, 6)
    assert torch.equal(model.generate(ids, max_new_tokens=8, **GREEDY), greedy_without_cache(model, ids, 8))
    model.train()(ids, labels=ids, use_cache=False).loss.backward()
    model.eval().save_pretrained(tmp_path)
    again = calmlm.CalmForCausalLM.from_pretrained(tmp_path, anchor=anchor, augmenting=augmenting)
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="bitsandbytes needs a GPU")
@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes(folders: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    options = {"quantization_config": config, "device_map": {"": 0}, "dtype": torch.bfloat16}
    model = calmlm.compose(folders / "llama", folders / "qwen2", 2, **options)
    ids = tiny_tokens(2, 6).cuda()
    found = model.generate(ids, max_new_tokens=4, **GREEDY)
    assert found.shape == (2, 10)
    model.train()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert all(p.grad is not None for name, p in model.model.connectors.named_parameters() if "o_proj" in name)
