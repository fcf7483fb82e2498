"""Drafting with the augmenting model changes how fast text comes, and nothing of the text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LogitsProcessor, StoppingCriteria

import calmlm
from calmlm.decoding.drafting import DraftLength, DraftStatistics
from calmlm.readers import Inputs
from compositions import Streamer, assert_helpful, greedy_without_cache, logits_of, pad, tiny_composition
from decoding.test_cache_generation import COMPOSITIONS, GREEDY
from tiny import tiny_model, tiny_tokenizer, tiny_tokens


def eager(**options: Any) -> calmlm.DraftConfig:
    """Drafts of a fixed length, whatever is accepted."""
    return calmlm.DraftConfig(**{"adaptive": False, "confidence": 0.0, "num_tokens": 4, **options})


def agreeing(family: str = "llama", **options: Any) -> calmlm.CalmForCausalLM:
    """A composition that writes what its augmenting model writes, as a rule: both are the same model."""
    model = tiny_composition(family, family, **options)
    model.augmenting["augmenting"].load_state_dict(model.anchor.state_dict())
    with torch.no_grad():
        for connector in model.model.connectors["augmenting"]:
            connector.o_proj.weight.mul_(0.02)
    return model


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_greedy_text_is_the_same(name: str) -> None:
    model = tiny_composition(**COMPOSITIONS[name])
    for length in (1, 6):
        ids = tiny_tokens(1, length, seed=length)
        expected = greedy_without_cache(model, ids, 16)
        for drafting in (True, eager(), eager(num_tokens=1), eager(num_tokens=9)):
            found = model.generate(ids, max_new_tokens=16, drafting=drafting, **GREEDY)
            assert torch.equal(found, expected)


def test_drafts_that_are_accepted_give_the_same_text_in_fewer_calls_of_the_anchor() -> None:
    model, drafting = agreeing(), eager()
    ids = tiny_tokens(1, 5)
    calls = {"anchor": 0, "augmenting": 0}
    handles = [
        module.register_forward_hook(lambda *_, which=which: calls.__setitem__(which, calls[which] + 1))
        for which, module in (("anchor", model.anchor.lm_head), ("augmenting", model.augmenting["augmenting"].model))
    ]
    found = model.generate(ids, max_new_tokens=20, drafting=drafting, **GREEDY)
    for handle in handles:
        handle.remove()
    assert torch.equal(found, greedy_without_cache(model, ids, 20))
    statistics = drafting.statistics
    assert statistics.acceptance > 0.8
    assert calls["anchor"] == statistics.passes < 20 / 3
    assert statistics.tokens == 20
    assert statistics.tokens_per_pass == pytest.approx(20 / statistics.passes)
    # Once per drafted token, and once per round for the last of them: nothing that was read is read again.
    assert calls["augmenting"] <= statistics.drafted + statistics.passes


def test_the_states_of_drafted_tokens_are_those_of_reading_them_again() -> None:
    """The cache after drafting is the cache of decoding token by token: all that comes later rests on it."""
    for model in (agreeing(), tiny_composition(gate=True, rotary=True, null_key=True)):
        ids = tiny_tokens(1, 5)
        options = {**GREEDY, "max_new_tokens": 12, "return_dict_in_generate": True}
        plain = model.generate(ids, **options).past_key_values
        drafted = model.generate(ids, drafting=eager(), **options).past_key_values
        assert drafted.get_seq_length() == plain.get_seq_length()
        for one, other in zip(plain.parts(), drafted.parts(), strict=True):
            for left, right in zip(one.layers, other.layers, strict=True):
                torch.testing.assert_close(left.keys, right.keys, atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(left.values, right.values, atol=1e-5, rtol=1e-4)


def test_a_padded_row() -> None:
    model = agreeing()
    ids, mask = pad([tiny_tokens(1, 4)[0], tiny_tokens(1, 7)[0]], "left")
    expected = greedy_without_cache(model, ids[:1], 12, mask[:1])
    found = model.generate(ids[:1], attention_mask=mask[:1], max_new_tokens=12, drafting=eager(), **GREEDY)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("connector", ["flamingo", "legonn"])
def test_other_connectors(connector: str) -> None:
    model = tiny_composition(connector=connector)
    ids = tiny_tokens(1, 5)
    found = model.generate(ids, max_new_tokens=12, drafting=eager(), **GREEDY)
    assert torch.equal(found, greedy_without_cache(model, ids, 12))


@pytest.mark.parametrize("drafting", [None, eager()], ids=["lookup", "drafting"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole text", "new tokens"])
def test_a_conversation_goes_on_with_its_cache(drafting: calmlm.DraftConfig | None, whole: bool) -> None:
    for model in (agreeing(), tiny_composition(gate=True, rotary=True)):
        text, cache = tiny_tokens(1, 5), None
        for turn in range(3):
            expected = greedy_without_cache(model, text, 6)
            start = 0 if whole or cache is None else cache.get_seq_length()
            options = {**GREEDY, "attention_mask": torch.ones_like(text), "return_dict_in_generate": True}
            if drafting is None:
                options["prompt_lookup_num_tokens"] = 3
            output = model.generate(
                text[:, start:], max_new_tokens=6, past_key_values=cache, drafting=drafting, **options
            )
            assert torch.equal(output.sequences, expected[:, start:])
            cache = output.past_key_values
            text = torch.cat((expected, tiny_tokens(1, 3, seed=turn)), dim=1)


class After(StoppingCriteria):
    """Ends when a text ends with this token."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids[:, -1] == self.token


@pytest.mark.parametrize("assisted", ["drafting", "prompt_lookup_num_tokens"])
@pytest.mark.parametrize("how", ["eos", "criterion"])
def test_it_ends_where_decoding_token_by_token_ends(how: str, assisted: str) -> None:
    model = agreeing()
    ids = tiny_tokens(1, 5)
    free = greedy_without_cache(model, ids, 20)[0, 5:].tolist()
    for token in dict.fromkeys(free):
        options: dict[str, Any] = {**GREEDY, "max_new_tokens": 20, "return_dict_in_generate": True}
        options["output_logits"] = True
        if how == "eos":
            options["eos_token_id"] = token
        else:
            options["stopping_criteria"] = [After(token)]
        plain, streamer = model.generate(ids, **options), Streamer()
        options[assisted] = eager() if assisted == "drafting" else 3
        found = model.generate(ids, streamer=streamer, **options)
        assert torch.equal(found.sequences, plain.sequences)
        assert streamer.tokens == [*plain.sequences[0].tolist(), -1]
        assert found.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length()
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(plain.logits), atol=1e-4, rtol=1e-4)


def test_processors_see_drafts_as_they_see_the_text() -> None:
    model, ids = agreeing(), tiny_tokens(1, 5)
    options = {**GREEDY, "max_new_tokens": 14, "repetition_penalty": 1.6, "no_repeat_ngram_size": 2}
    options["eos_token_id"], options["min_new_tokens"] = 2, 8
    drafting = eager()
    found = model.generate(ids, drafting=drafting, **options)
    assert torch.equal(found, model.generate(ids, **options))
    assert drafting.statistics.acceptance > 0.5


@pytest.mark.slow
@pytest.mark.parametrize(("agree", "confidence"), [(True, 0.0), (False, 0.1)], ids=["good drafts", "bad drafts"])
def test_sampling_keeps_the_compositions_distribution(agree: bool, confidence: float) -> None:
    """Counts of the first two sampled tokens against their exact probabilities, by a chi-squared test."""
    options = {"vocab_size": 8}
    model = (
        agreeing(anchor_options=options, augmenting_options=options)
        if agree
        else tiny_composition("llama", "gpt2", anchor_options=options, augmenting_options=options)
    )
    ids = torch.tensor([[3, 5, 6]])
    processed: dict[str, Any] = {"temperature": 0.8, "top_k": 5}

    def distribution(text: torch.Tensor) -> torch.Tensor:
        scores = logits_of(model, text)[0, -1] / processed["temperature"]
        kept = scores.topk(processed["top_k"]).indices
        limited = torch.full_like(scores, float("-inf"))
        limited[kept] = scores[kept]
        return limited.softmax(-1)

    first = distribution(ids)
    pairs = torch.stack(
        [first[token] * distribution(torch.cat((ids, torch.tensor([[token]])), dim=1)) for token in range(8)]
    ).flatten()
    draws, counts = 1500, torch.zeros(64)
    drafting = eager(num_tokens=3, confidence=confidence)
    torch.manual_seed(0)
    for _ in range(draws):
        found = model.generate(
            ids, do_sample=True, max_new_tokens=3, pad_token_id=0, eos_token_id=None, drafting=drafting, **processed
        )
        counts[int(found[0, 3]) * 8 + int(found[0, 4])] += 1
    possible = pairs * draws > 5
    expected = pairs[possible] * draws
    statistic = float(((counts[possible] - expected) ** 2 / expected).sum())
    degrees = int(possible.sum()) - 1
    # Mean and variance of the chi-squared distribution: four standard deviations.
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5
    assert counts[pairs == 0].sum() == 0
    assert (drafting.statistics.acceptance > 0.8) == agree


def test_a_seed_gives_the_same_text_again() -> None:
    model, ids = agreeing(), tiny_tokens(1, 5)
    texts = []
    for _ in range(2):
        torch.manual_seed(7)
        texts.append(
            model.generate(ids, do_sample=True, max_new_tokens=12, pad_token_id=0, eos_token_id=None, drafting=True)
        )
    assert torch.equal(*texts)


@pytest.mark.parametrize(("anchor", "augmenting"), [(104, 97), (97, 104)])
def test_embeddings_may_be_larger_than_the_vocabulary(anchor: int, augmenting: int) -> None:
    model = tiny_composition(
        "llama",
        "llama",
        anchor_options={"vocab_size": anchor},
        augmenting_options={"vocab_size": augmenting},
        tokenizer=tiny_tokenizer(),
        augmenting_tokenizer=tiny_tokenizer(),
    )
    ids = tiny_tokens(1, 5)
    options = {**GREEDY, "max_new_tokens": 8, "suppress_tokens": list(range(97, 104))[: max(0, anchor - 97)] or None}
    found = model.generate(ids, drafting=eager(), **options)
    assert torch.equal(found, model.generate(ids, **options))


def test_one_of_several_drafts() -> None:
    model = agreeing()
    other = tiny_composition("llama", "gpt2")
    other.anchor.load_state_dict(model.anchor.state_dict())
    model.add_augmenting("other", other)
    ids = tiny_tokens(1, 5)
    expected = greedy_without_cache(model, ids, 12)
    for name in ("augmenting", "other"):
        assert torch.equal(model.generate(ids, max_new_tokens=12, drafting=eager(augmenting=name), **GREEDY), expected)
    model.disable_augmenting("augmenting")
    with pytest.raises(calmlm.ConfigError, match="switched on"):
        model.generate(ids, drafting=eager(augmenting="augmenting"))


def test_a_draft_that_was_not_checked_is_forgotten() -> None:
    model, ids = agreeing(), tiny_tokens(1, 6)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
        cache.activate_past_recording()
        reader = model.model.reader("augmenting")
        inputs = Inputs(ids[:, 1:3], None, None, None, None)  # other tokens than those that follow
        reader.draft(inputs, cache.part("augmenting"))
        assert cache.ahead["augmenting"].count == 2
        found = model(input_ids=ids[:, 4:], past_key_values=cache).logits
    torch.testing.assert_close(found, logits_of(model, ids)[:, 4:], atol=1e-4, rtol=1e-4)


class Until(StoppingCriteria):
    """Ends at a length; remembers how many scores it saw at which."""

    def __init__(self, length: int) -> None:
        self.length, self.saw = length, []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.saw.append((input_ids.shape[1], len(scores) if scores else 0))
        return torch.tensor([input_ids.shape[1] >= self.length])


ASSISTED: list[dict[str, Any]] = [{"drafting": eager(num_tokens=6)}, {"prompt_lookup_num_tokens": 6}]


@pytest.mark.parametrize("assisted", ASSISTED, ids=["drafting", "lookup"])
@pytest.mark.parametrize("windowed", [False, True], ids=["full", "windows"])
def test_the_callers_cache_ends_where_the_text_ends(windowed: bool, assisted: dict[str, Any]) -> None:
    """Whatever `generate` returns, and with windows, which forget what they are cropped by twice."""
    sizes = {"sliding_window": 4} if windowed else {}
    model = agreeing(anchor_options=sizes, augmenting_options=sizes, family="mistral" if windowed else "llama")
    ids = tiny_tokens(1, 4).repeat(1, 2)
    for length in range(10, 20):
        cache = model.model.new_cache()
        written = model.generate(
            ids, max_new_tokens=30, past_key_values=cache, stopping_criteria=[Until(length)], **assisted, **GREEDY
        )
        assert torch.equal(written, greedy_without_cache(model, ids, length - 8))
        assert cache.get_seq_length() == length - 1
        assert not cache.recording()
        text = torch.cat((written, tiny_tokens(1, 2, seed=9)), dim=1)
        everything = torch.ones_like(text)  # generate takes a written padding token for padding otherwise
        found = model.generate(text, attention_mask=everything, past_key_values=cache, max_new_tokens=4, **GREEDY)
        assert torch.equal(found, greedy_without_cache(model, text, 4))


@pytest.mark.parametrize("assisted", ASSISTED, ids=["drafting", "lookup"])
@pytest.mark.parametrize("families", [("llama", "llama"), ("gpt2", "llama"), ("bloom", "falcon")], ids="+".join)
def test_a_padded_conversation_goes_on_with_its_new_tokens(families: tuple[str, str], assisted: dict[str, Any]) -> None:
    model = tiny_composition(*families)
    ids, mask = pad([tiny_tokens(1, 4)[0], tiny_tokens(1, 7)[0]], "left")
    ids, mask = ids[:1], mask[:1]
    options = {**GREEDY, "max_new_tokens": 8, "return_dict_in_generate": True}
    first = model.generate(ids, attention_mask=mask, **options)
    text = torch.cat((first.sequences, tiny_tokens(1, 3, seed=9)), dim=1)
    mask = torch.nn.functional.pad(mask, (0, 11), value=1)
    start = first.past_key_values.get_seq_length()
    found = model.generate(
        text[:, start:], attention_mask=mask, past_key_values=first.past_key_values, **options, **assisted
    )
    assert torch.equal(found.sequences, greedy_without_cache(model, text, 8, mask)[:, start:])


def test_criteria_see_the_scores_of_their_own_token() -> None:
    model, ids = agreeing(), tiny_tokens(1, 5)
    options = {**GREEDY, "max_new_tokens": 9, "output_scores": True, "return_dict_in_generate": True}
    plain, drafted = Until(12), Until(12)
    model.generate(ids, stopping_criteria=[plain], **options)
    model.generate(ids, stopping_criteria=[drafted], drafting=eager(), **options)
    assert plain.saw == drafted.saw


@pytest.mark.parametrize("limited", ["anchor", "augmenting"])
@pytest.mark.parametrize("assisted", ASSISTED, ids=["drafting", "lookup"])
def test_drafts_end_with_the_context(assisted: dict[str, Any], limited: str) -> None:
    sizes = {f"{limited}_options": {"n_positions": 24, "max_position_embeddings": 24}}
    families = ("gpt2", "llama") if limited == "anchor" else ("llama", "gpt2")
    model, ids = tiny_composition(*families, **sizes), tiny_tokens(1, 5)
    for length in range(18, 26):
        options = {**GREEDY, "max_new_tokens": 60, "stopping_criteria": [Until(length)]}
        plain = model.generate(ids, **options)
        assert torch.equal(model.generate(ids, **options, **assisted), plain)
        assert plain.shape[1] == length


def test_what_a_draft_cannot_take_back_is_refused() -> None:
    pytest.importorskip("optimum.quanto")
    model, ids = tiny_composition(), tiny_tokens(1, 9)
    config = {"backend": "quanto", "nbits": 4, "q_group_size": 8, "residual_length": 128}
    for assisted in ASSISTED:
        with pytest.raises(calmlm.ConfigError, match="quantised or recurrent"):
            model.generate(ids, max_new_tokens=4, cache_implementation="quantized", cache_config=config, **assisted)
        with pytest.raises(calmlm.ConfigError, match="guidance_scale"):
            model.generate(ids, max_new_tokens=4, guidance_scale=1.5, **assisted)


@pytest.mark.parametrize("family", ["mamba", "lfm2", "qwen3_next"])
def test_recurrent_models_do_not_draft(family: str) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 4, "vocab_size": 97, "intermediate_size": 48}
    attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    linear = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
    linear["linear_value_head_dim"] = 8
    further = {
        "mamba": {"state_size": 4},
        "lfm2": {**attention, "layer_types": ["conv", "full_attention"] * 2},
        "qwen3_next": {**attention, **linear, "num_experts": 0, "mlp_only_layers": [0, 1, 2, 3]},
    }[family]
    config = AutoConfig.for_model(family, **sizes, **further)
    for position in ("augmenting", "anchor"):
        recurrent, other = AutoModelForCausalLM.from_config(config).eval(), tiny_model("llama")
        pair = (other, recurrent) if position == "augmenting" else (recurrent, other)
        model = calmlm.compose(*pair, 1)
        ids = tiny_tokens(1, 6)
        plain = model.generate(ids, max_new_tokens=4, **GREEDY)
        assert torch.equal(plain, greedy_without_cache(model, ids, 4))
        with pytest.raises((calmlm.ConfigError, ValueError), match="recurrent|stateful|form of its own"):
            model.generate(ids, max_new_tokens=4, drafting=True, **GREEDY)
        with pytest.raises((calmlm.ConfigError, ValueError), match="recurrent|stateful"):
            model.generate(ids, max_new_tokens=4, prompt_lookup_num_tokens=3, **GREEDY)


def test_tokens_that_only_the_anchor_has_are_not_drafted() -> None:
    model = tiny_composition(
        "llama",
        "llama",
        anchor_options={"vocab_size": 104},
        augmenting_options={"vocab_size": 97},
        tokenizer=tiny_tokenizer(),
        augmenting_tokenizer=tiny_tokenizer(),
    )

    def allowed(row: int, ids: torch.Tensor) -> list[int]:
        return [5, 6, 7] if ids.shape[0] != 7 else [99]

    options = {**GREEDY, "eos_token_id": 99, "max_new_tokens": 9, "prefix_allowed_tokens_fn": allowed}
    ids = tiny_tokens(1, 5)
    assert torch.equal(model.generate(ids, drafting=eager(), **options), model.generate(ids, **options))


def test_a_cache_of_other_models_is_refused() -> None:
    model = agreeing()
    other = tiny_composition("llama", "gpt2")
    other.anchor.load_state_dict(model.anchor.state_dict())
    model.add_augmenting("other", other)
    model.disable_augmenting("other")
    output = model.generate(tiny_tokens(1, 5), max_new_tokens=4, return_dict_in_generate=True, **GREEDY)
    model.enable_augmenting("other")
    text = torch.cat((output.sequences, tiny_tokens(1, 2)), dim=1)
    with pytest.raises(calmlm.ModelError, match="the same augmenting models"):
        model.generate(
            text,
            past_key_values=output.past_key_values,
            max_new_tokens=2,
            drafting=eager(augmenting="other"),
            **GREEDY,
        )


def test_a_cache_that_holds_all_of_the_text_is_refused() -> None:
    model, ids = tiny_composition(), tiny_tokens(1, 6)
    for assisted in ({}, *ASSISTED):
        with torch.no_grad():
            cache = model(input_ids=ids, use_cache=True).past_key_values
        for text in (ids, ids[:, :2]):
            with pytest.raises(calmlm.DataError, match="fewer tokens than the text"):
                model.generate(text, past_key_values=cache, max_new_tokens=2, **assisted, **GREEDY)


def test_lengths_follow_what_is_accepted() -> None:
    def settle(accepted: int | None, cost: float) -> list[int]:
        length, found = DraftLength(calmlm.DraftConfig(num_tokens=8), cost), []
        for _ in range(60):
            found.append(length.next())
            length.learn(found[-1], found[-1] if accepted is None else min(accepted, found[-1]))
        return found

    assert settle(None, 0.2)[-1] == 8
    poor = settle(0, 0.2)
    assert poor[-1] == 0
    assert 1 in poor[30:], "after a while it has to try again"
    assert settle(None, 3.0)[-1] >= 4, "even a slow model has to read every token anyway"
    assert settle(0, 3.0)[-1] == 0
    assert 1 <= settle(2, 0.2)[-1] <= 5


def test_statistics_start_at_nothing() -> None:
    assert DraftStatistics().acceptance == DraftStatistics().tokens_per_pass == 0.0


def test_bad_requests_are_refused() -> None:
    model, ids = tiny_composition(), tiny_tokens(1, 5)
    for options, what in (
        ({"num_beams": 2}, "beams"),
        ({"num_return_sequences": 2, "do_sample": True}, "2 rows"),
        ({"cache_implementation": "static"}, "static cache"),
        ({"use_cache": False}, "use_cache=False"),
        ({"prompt_lookup_num_tokens": 3}, "prompt lookup"),
        ({"assistant_model": model.anchor}, "another assistant_model"),
        ({"cache_implementation": "offloaded_static"}, "static cache"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"generation_config": GenerationConfig(num_beams=2)}, "beams"),
    ):
        with pytest.raises(calmlm.ConfigError, match=what):
            model.generate(ids, max_new_tokens=2, drafting=True, **options)
    with pytest.raises(calmlm.ConfigError, match="beams"):
        model.generate(ids, GenerationConfig(num_beams=2, max_new_tokens=2), drafting=True)
    model.generation_config.num_beams = 2
    with pytest.raises(calmlm.ConfigError, match="beams"):
        model.generate(ids, generation_config=GenerationConfig(max_new_tokens=2), drafting=True)
    model.generation_config.num_beams = 1
    with pytest.raises(calmlm.ConfigError, match="2 rows"):
        model.generate(ids.repeat(2, 1), max_new_tokens=2, drafting=True)
    with pytest.raises(calmlm.ConfigError, match="DraftConfig"):
        model.generate(ids, max_new_tokens=2, drafting=3)
    with pytest.raises(calmlm.ConfigError, match="name one of these"):
        model.generate(ids, max_new_tokens=2, drafting=calmlm.DraftConfig(augmenting="nobody"))
    for wrong in ({"num_tokens": 0}, {"num_tokens": 1.5}, {"confidence": 2}, {"confidence": "high"}):
        with pytest.raises(calmlm.ConfigError):
            calmlm.DraftConfig(**wrong)


def test_the_switched_off_composition_is_the_anchor() -> None:
    model, ids = agreeing(), tiny_tokens(1, 5)
    with model.disable_composition():
        found = model.generate(ids, max_new_tokens=8, drafting=True, **GREEDY)
    assert torch.equal(found, model.anchor.generate(ids, max_new_tokens=8, **GREEDY))


class Interruption(LogitsProcessor):
    """What an impatient user does after some calls."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls -= 1
        if not self.calls:
            raise KeyboardInterrupt
        return scores


@pytest.mark.parametrize("calls", [4, 5, 7])
@pytest.mark.parametrize("assisted", [{}, *ASSISTED], ids=["plain", "drafting", "lookup"])
def test_an_interrupted_text_goes_on_with_its_cache(assisted: dict[str, Any], calls: int) -> None:
    model, ids = agreeing(), tiny_tokens(1, 4).repeat(1, 2)
    cache, streamer = model.model.new_cache(), Streamer()
    options = {**GREEDY, "past_key_values": cache}
    processors = [Interruption(calls)]
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, max_new_tokens=14, streamer=streamer, logits_processor=processors, **options, **assisted)
    written = [token for token in streamer.tokens if token >= 0]
    assert cache.get_seq_length() <= len(written)
    text = torch.cat((torch.tensor([written]), tiny_tokens(1, 3, seed=calls)), dim=1)
    found = model.generate(text, attention_mask=torch.ones_like(text), max_new_tokens=5, **options)
    assert torch.equal(found, greedy_without_cache(model, text, 5))


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
def test_states_of_assisted_generation_behind_a_cache_are_refused(asked: str) -> None:
    """transformers deals them out as if the whole text had been read."""
    model, ids = tiny_composition(), tiny_tokens(1, 8)
    with torch.no_grad():
        cache = model(ids[:, :5], use_cache=True).past_key_values
    options = {**GREEDY, "max_new_tokens": 4, "return_dict_in_generate": True, asked: True}
    with pytest.raises(calmlm.ConfigError) as error:
        model.generate(ids, past_key_values=cache, prompt_lookup_num_tokens=4, **options)
    assert_helpful(error.value, asked)
