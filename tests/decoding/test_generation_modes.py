"""The rest of transformers' generation: processors, stopping, caches of other kinds, compilation, memory."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from transformers import CompileConfig, PreTrainedTokenizerBase, WatermarkingConfig

import calmlm
from compositions import assert_helpful, greedy_without_cache, pad, tiny_composition
from decoding.test_cache_generation import COMPOSITIONS, GREEDY, ROWS
from tiny import tiny_model, tiny_tokens

FOUR = ["llama+gpt2, all options", "gpt2+mistral", "gemma3+llama", "qwen3+opt"]
SAMPLED: dict[str, Any] = {"do_sample": True}
PROCESSORS: dict[str, dict[str, Any]] = {
    "min_p": {**SAMPLED, "min_p": 0.02},
    "typical_p": {**SAMPLED, "typical_p": 0.9},
    "top_h": {**SAMPLED, "top_h": 0.5},
    "epsilon_cutoff": {**SAMPLED, "epsilon_cutoff": 0.01},
    "eta_cutoff": {**SAMPLED, "eta_cutoff": 0.01},
    "bad_words": {"bad_words_ids": [[5], [7, 8], [74]]},
    "suppress": {"suppress_tokens": [5, 9, 74], "begin_suppress_tokens": [37]},
    "forced": {"forced_eos_token_id": 2, "eos_token_id": 2},
    "length": {"eos_token_id": 2, "exponential_decay_length_penalty": (3, 1.7)},
    "sequence_bias": {"sequence_bias": [[[5], 4.0], [[6, 7], -3.0]]},
    "repetition": {"encoder_repetition_penalty": 1.3, "encoder_no_repeat_ngram_size": 2, "renormalize_logits": True},
    "guidance": {"guidance_scale": 1.5},
    "watermark": {**SAMPLED, "watermarking_config": WatermarkingConfig(bias=2.0)},
    "remove_invalid": {"remove_invalid_values": True},
    "allowed": {"prefix_allowed_tokens_fn": lambda row, ids: list(range(10, 40))},
    "beams": {"num_beams": 3, "early_stopping": "never", "length_penalty": -0.5, "eos_token_id": 2},
}


@pytest.fixture(params=FOUR, scope="module")
def model(request: pytest.FixtureRequest) -> calmlm.CalmForCausalLM:
    return tiny_composition(**COMPOSITIONS[request.param])


@pytest.mark.parametrize("name", PROCESSORS)
def test_every_processor_sees_the_same_scores_with_a_cache(model: calmlm.CalmForCausalLM, name: str) -> None:
    ids, mask = pad(ROWS, "left")
    options = {**GREEDY, "max_new_tokens": 8, **PROCESSORS[name]}
    if name == "guidance":  # its second stream of the prompt's last token alone takes no padding
        ids, mask = ids[:1], mask[:1]
    texts = []
    for use_cache in (True, False):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            texts.append(model.generate(ids, attention_mask=mask, use_cache=use_cache, **options))
    assert torch.equal(*texts)


def test_guidance_and_beams_are_refused(model: calmlm.CalmForCausalLM) -> None:
    """The text that transformers moves away from does not follow its beams."""
    with pytest.raises(calmlm.ConfigError, match="guidance_scale must come with one beam, .* but got num_beams=2"):
        model.generate(tiny_tokens(1, 5), max_new_tokens=3, guidance_scale=1.5, num_beams=2)


def test_stop_strings(model: calmlm.CalmForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tiny_tokens(1, 5)
    free = greedy_without_cache(model, ids, 12)
    written = tokenizer.decode(free[0, 5:])
    stop = written[4:6]
    options = {**GREEDY, "stop_strings": [stop], "tokenizer": tokenizer, "max_new_tokens": 12}
    plain = model.generate(ids, **options)
    assert torch.equal(plain, free[:, : 5 + written.index(stop) + 2])
    for assisted in ({"drafting": True}, {"prompt_lookup_num_tokens": 3}):
        assert torch.equal(model.generate(ids, **options, **assisted), plain)


@pytest.mark.slow
def test_a_quantised_cache(model: calmlm.CalmForCausalLM) -> None:
    """The anchor's keys and values in 4 bits, the others' as they are: the first token is exact, the next nearly."""
    pytest.importorskip("optimum.quanto")
    ids, mask = pad(ROWS, "left")
    if any(getattr(layer, "is_sliding", False) for layer in model.model.new_cache().layers):
        pytest.skip("transformers quantises no cache of sliding windows")
    width = model.anchor.config.hidden_size // model.anchor.config.num_attention_heads
    options = {**GREEDY, "attention_mask": mask, "max_new_tokens": 2, "output_logits": True}
    options["return_dict_in_generate"] = True
    config = {"backend": "quanto", "nbits": 4, "q_group_size": width, "residual_length": 2}
    found = model.generate(ids, cache_implementation="quantized", cache_config=config, **options)
    assert type(found.past_key_values.anchor).__name__ == "QuantizedCache"
    exact = model.generate(ids, **options)
    assert torch.equal(found.logits[0], exact.logits[0])
    error = (found.logits[1] - exact.logits[1]).norm() / exact.logits[1].norm()
    assert 0 < float(error) < 0.3
    with torch.no_grad():
        for connector in model.model.connectors["augmenting"]:
            kept = connector.o_proj.weight.clone()
            connector.o_proj.weight.zero_()
            deaf = model.generate(ids, cache_implementation="quantized", cache_config=config, **options)
            connector.o_proj.weight.copy_(kept)
    assert float((deaf.logits[1] - exact.logits[1]).norm() / exact.logits[1].norm()) > 2 * float(error)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers offloads from GPUs only")
@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_offloaded_caches(kind: str) -> None:
    model = tiny_composition(rotary=True, null_key=True).cuda()
    ids = tiny_tokens(2, 6).cuda()
    found = model.generate(ids, max_new_tokens=8, cache_implementation=kind, disable_compile=True, **GREEDY)
    assert torch.equal(found, greedy_without_cache(model, ids, 8))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama+gpt2, all options", "gemma3+llama"])
def test_a_compiled_step_is_compiled_once(name: str) -> None:
    """Fullgraph, by inductor, through generate's own switch; step after step, and in the next call, nothing anew.

    transformers' static layers with windows count on the host, so that they take a second graph where lengths move: the
    composition takes no more graphs than its anchor alone.
    """
    model = tiny_composition(attn_implementation="sdpa", **COMPOSITIONS[name])
    ids, mask = pad(ROWS, "left")
    config = CompileConfig(fullgraph=True, mode="default")
    config._compile_all_devices = True
    options = {**GREEDY, "cache_implementation": "static", "compile_config": config, "max_new_tokens": 10}
    expected = greedy_without_cache(model, ids, 10, mask)

    def graphs() -> int:
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with model.disable_composition():
        model.generate(ids, attention_mask=mask, **options)
    alone = graphs()
    assert alone == (2 if "gemma" in name else 1)
    with torch._dynamo.config.patch(recompile_limit=alone):  # with fullgraph, one more compilation is an error
        found = model.generate(ids, attention_mask=mask, **options)
        again = model.generate(ids.flip(0), attention_mask=mask.flip(0), **options)
    assert torch.equal(found, expected)
    assert torch.equal(again, expected.flip(0))
    assert graphs() == 2 * alone


# What cannot be done is said


def test_embeddings_instead_of_tokens_are_refused() -> None:
    model = tiny_composition()
    embedded = model.get_input_embeddings()(tiny_tokens(1, 4))
    with pytest.raises(calmlm.DataError, match="the augmenting model reads the same tokens"):
        model.generate(inputs_embeds=embedded, max_new_tokens=2)
    with pytest.raises(calmlm.DataError, match="the augmenting model reads the same tokens"):
        model(inputs_embeds=embedded)
    with model.disable_composition():
        assert model.generate(inputs_embeds=embedded, max_new_tokens=2, **GREEDY).shape == (1, 2)


def test_continuous_batching_is_refused() -> None:
    """Its one paged cache would hold the anchor's past alone."""
    model, ids = tiny_composition(), tiny_tokens(2, 4)
    with pytest.raises(calmlm.ConfigError) as caught:
        model.generate(ids, max_new_tokens=2, pad_token_id=0, cache_implementation="paged")
    assert_helpful(caught.value, "paged")
    with pytest.raises(calmlm.ConfigError, match="Continuous batching"):
        model.generate_batch(ids.tolist())


def test_early_exit_is_refused() -> None:
    with pytest.raises(calmlm.ConfigError, match="assistant_early_exit"):
        tiny_composition().generate(tiny_tokens(1, 4), assistant_early_exit=2)


# Memory


def live_bytes() -> int:
    """Bytes in all tensors that the garbage collector knows, each storage once."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if type(found) in (torch.Tensor, torch.nn.Parameter):
            storage = found.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("options", [{}, {"drafting": True}, {"num_beams": 3}, {"use_cache": False}], ids=str)
def test_nothing_is_kept_after_a_call(options: dict[str, Any]) -> None:
    model = tiny_composition(**COMPOSITIONS["llama+gpt2, all options"])

    def call(index: int) -> None:
        ids = tiny_tokens(1, 5 + index % 3)
        model.generate(ids, max_new_tokens=4, **GREEDY, **options)
        model(input_ids=ids, labels=ids).loss.item()

    call(0)
    before = live_bytes()
    for index in range(50):
        call(index)
    assert live_bytes() == before


def test_a_failed_call_keeps_nothing_either() -> None:
    model = tiny_composition()
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[3, 10_000]]))
    before = live_bytes()
    for _ in range(5):
        with pytest.raises(IndexError):
            model(input_ids=torch.tensor([[3, 10_000]]))
    assert live_bytes() == before
    assert model.model.slot.call is None


@pytest.mark.parametrize("drafting", [False, True])
def test_logits_are_computed_where_they_are_needed(drafting: bool) -> None:
    """The anchor's head sees one position per row in prefill, m_A's none at all unless it drafts, then one per step."""
    model = tiny_composition("llama", "qwen3")
    seen: dict[str, list[int]] = {"anchor": [], "augmenting": []}
    for which, base in (("anchor", model.anchor), ("augmenting", model.augmenting["augmenting"])):
        head = base.get_output_embeddings()
        head.register_forward_pre_hook(lambda _, args, which=which: seen[which].append(args[0].shape[1]))
    settings = calmlm.DraftConfig(adaptive=False, confidence=0.0, num_tokens=3) if drafting else None
    model.generate(tiny_tokens(1, 20), max_new_tokens=8, drafting=settings, **GREEDY)
    if drafting:
        assert max(seen["anchor"]) == 4
        assert set(seen["augmenting"]) == {1}
    else:
        assert seen == {"anchor": [1] * 8, "augmenting": []}


def test_the_anchor_alone_is_no_slower_for_having_been_composed() -> None:
    """Switched off, not one module of the composition runs."""
    model = tiny_composition()
    ran: list[str] = []
    for module in (*model.model.connectors.modules(), *model.augmenting["augmenting"].modules()):
        module.register_forward_hook(lambda module, *_: ran.append(type(module).__name__))
    with model.disable_composition():
        model.generate(tiny_tokens(1, 4), max_new_tokens=3, **GREEDY)
    assert not ran
    assert tiny_model("llama", seed=1).generate(tiny_tokens(1, 4), max_new_tokens=3, **GREEDY).shape == (1, 7)
