"""What cannot work is refused with one sentence: what was expected, what arrived, what to do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache

import calmlm
from compositions import assert_helpful, logits_of, tiny_composition
from tiny import MAX_POSITIONS, VOCAB_SIZE, tiny_model, tiny_tokenizer, tiny_tokens

SMALL = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
ENCODER = {**SMALL, "intermediate_size": 32, "max_position_embeddings": 32}


def bert(**options: Any) -> Any:
    return transformers.BertLMHeadModel(transformers.BertConfig(**ENCODER, **options)).eval()


def t5() -> Any:
    config = transformers.T5Config(vocab_size=VOCAB_SIZE, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


NOT_DECODERS: dict[str, tuple[Callable[[], Any], str]] = {
    "bert-encoder": (lambda: transformers.BertModel(transformers.BertConfig(**ENCODER)), "BertModel"),
    "bert-masked": (lambda: transformers.BertForMaskedLM(transformers.BertConfig(**ENCODER)), "BertForMaskedLM"),
    "bert-with-head-but-bidirectional": (bert, "BertModel"),
    "t5": (t5, "T5"),
    "decoder-without-head": (lambda: tiny_model("llama").model, "LlamaModel"),
    "classifier": (
        lambda: transformers.LlamaForSequenceClassification(tiny_model("llama").config),
        "LlamaForSequenceClassification",
    ),
    "module": (lambda: torch.nn.Linear(3, 4), "Linear"),
    "nothing": (lambda: None, "None"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("role", ["anchor", "augmenting"])
@pytest.mark.parametrize("kind", NOT_DECODERS)
def test_what_is_no_decoder_is_refused(kind: str, role: str) -> None:
    make, mention = NOT_DECODERS[kind]
    models = {"anchor": tiny_model("llama"), "augmenting": tiny_model("gpt2"), role: make()}
    with pytest.raises(calmlm.ModelError) as error:
        calmlm.compose(**models)
    assert_helpful(error.value, mention, "anchor" if role == "anchor" else "augmenting model")


@pytest.mark.filterwarnings("ignore")
def test_bert_as_a_decoder_composes() -> None:
    model = calmlm.compose(tiny_model("llama"), bert(is_decoder=True), connections=1)
    assert logits_of(model, tiny_tokens()).isfinite().all()


@pytest.mark.parametrize(
    ("connections", "mention"),
    [
        ([[5, 0]], "got 5"),
        ([[0, 5]], "got 5"),
        ([[0, -1]], "got -1"),
        ([[1, 1], [1, 1]], "twice"),
        ([], "none"),
        (0, "got 0"),
        (6, "got 6"),
        ("all", "'all'"),
    ],
    ids=str,
)
def test_connections_that_cannot_be(connections: Any, mention: str) -> None:
    with pytest.raises(calmlm.ConfigError) as error:
        calmlm.compose(tiny_model("llama"), tiny_model("gpt2"), connections=connections)
    assert_helpful(error.value, mention)


@pytest.mark.parametrize("options", [{"num_heads": 7}, {"num_heads": 16, "rotary": True}], ids=str)
def test_connector_options_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(calmlm.ConfigError) as error:
        calmlm.compose(tiny_model("llama"), tiny_model("gpt2"), **options)
    assert_helpful(error.value, "48")


@pytest.mark.parametrize("role", ["anchor", "augmenting"])
@pytest.mark.parametrize("source", ["no/such-model", "no-such-model", "./no/such/folder", "", "a b c"])
def test_an_unknown_model(role: str, source: str, anchor_folder: Path) -> None:
    models = {"anchor": str(anchor_folder), "augmenting": str(anchor_folder), role: source}
    with pytest.raises(calmlm.ModelError) as error:
        calmlm.compose(**models)
    assert_helpful(error.value, repr(source), "anchor" if role == "anchor" else "augmenting model")


def test_folders_that_are_no_model(tmp_path: Path, anchor_folder: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken"
    tiny_model("llama").save_pretrained(broken)
    (broken / "config.json").write_text("{")
    cut = tmp_path / "cut"
    tiny_model("llama").save_pretrained(cut)
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    other = tmp_path / "other"
    transformers.BertModel(transformers.BertConfig(**ENCODER)).save_pretrained(other)
    file = tmp_path / "file"
    file.write_text("text")
    for folder in (empty, broken, cut, file):
        for source in (str(folder), folder):
            with pytest.raises(calmlm.ModelError) as error:
                calmlm.compose(anchor_folder, source)
            assert_helpful(error.value, str(folder))


def test_weights_that_are_missing_in_a_base_folder_are_not_made_up(tmp_path: Path, anchor_folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "holes"
    tiny_model("llama").save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(calmlm.ModelError) as error:
        calmlm.compose(anchor_folder, folder)
    assert_helpful(error.value, "model.layers.1.mlp.up_proj.weight", str(folder))


def test_one_model_given_twice() -> None:
    model = tiny_model("llama")
    with pytest.raises(calmlm.ModelError) as error:
        calmlm.compose(model, model)
    assert_helpful(error.value, "twice")


def test_one_model_given_twice_to_a_saved_composition(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    calmlm.compose(tmp_path / "base", tmp_path / "base", 2).save_pretrained(tmp_path / "composition")
    one = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.raises(calmlm.ModelError) as error:
        calmlm.CalmForCausalLM.from_pretrained(tmp_path / "composition", anchor=one, augmenting=one)
    assert_helpful(error.value, "twice")


@pytest.mark.parametrize("name", ["type", "keys", "half", "update", "forward", "training"])
def test_names_that_modules_use(name: str) -> None:
    model = tiny_composition()
    with pytest.raises(calmlm.ConfigError) as error:
        calmlm.compose(tiny_model("llama"), {name: tiny_model("gpt2")}, 2)
    assert_helpful(error.value, repr(name))
    with pytest.raises(calmlm.ConfigError):
        model.add_augmenting(name, tiny_composition())
    assert list(model.config.augmenting) == list(model.augmenting)


def test_a_subfolder_is_named_by_its_path(tmp_path: Path) -> None:
    for role in ("anchor", "augmenting"):
        tiny_model("llama").save_pretrained(tmp_path / role / "sub")
    with pytest.raises(calmlm.ConfigError) as error:
        calmlm.compose(tmp_path / "anchor", tmp_path / "augmenting", 2, subfolder="sub")
    assert_helpful(error.value, "subfolder")


def test_vocabularies_that_do_not_match() -> None:
    with pytest.raises(calmlm.ModelError) as error:
        calmlm.compose(tiny_model("llama"), tiny_model("gpt2", vocab_size=90))
    assert_helpful(error.value, "97", "90")
    ours, theirs = tiny_tokenizer(), tiny_tokenizer()
    theirs.add_tokens(["<new>"])  # a text in its tokens is aligned
    larger = tiny_model("gpt2", vocab_size=98)
    apart = calmlm.compose(tiny_model("llama"), larger, tokenizer=ours, augmenting_tokenizer=theirs)
    assert apart.config.augmenting["augmenting"]["reads"] == "text"
    # One tokenizer and a padded embedding matrix go together.
    options = {"tokenizer": ours, "augmenting_tokenizer": tiny_tokenizer()}
    calmlm.compose(tiny_model("llama", vocab_size=112), tiny_model("gpt2"), **options)


def test_ids_outside_the_augmenting_vocabulary() -> None:
    options = {"tokenizer": tiny_tokenizer(), "augmenting_tokenizer": tiny_tokenizer()}
    model = calmlm.compose(tiny_model("llama", vocab_size=112), tiny_model("gpt2"), **options)
    assert logits_of(model, torch.tensor([[3, VOCAB_SIZE - 1]])).shape == (1, 2, 112)
    with pytest.raises(calmlm.DataError) as error:
        logits_of(model, torch.tensor([[3, VOCAB_SIZE]]))
    assert_helpful(error.value, "97")


def test_embeddings_in_place_of_ids() -> None:
    model = tiny_composition()
    embeddings = model.get_input_embeddings()(tiny_tokens())
    for given in ({"inputs_embeds": embeddings}, {"inputs_embeds": embeddings, "input_ids": tiny_tokens()}, {}):
        with pytest.raises(calmlm.DataError) as error:
            model(**given)
        assert_helpful(error.value, "input_ids")
    with model.disable_composition():
        assert torch.equal(model(inputs_embeds=embeddings).logits, model(tiny_tokens()).logits)


def test_embeddings_stay_the_anchors_own() -> None:
    """What is refused changes nothing, and the size that they have is no change."""
    model = tiny_composition()
    expected, embeddings, head = logits_of(model, tiny_tokens()), model.get_input_embeddings(), model.lm_head
    for ask in (
        lambda: model.resize_token_embeddings(VOCAB_SIZE + 8),
        lambda: model.resize_token_embeddings(pad_to_multiple_of=64),
        lambda: model.model.resize_token_embeddings(VOCAB_SIZE - 8),
        lambda: model.set_input_embeddings(torch.nn.Embedding(VOCAB_SIZE, 48)),
        lambda: model.set_output_embeddings(torch.nn.Linear(48, VOCAB_SIZE)),
    ):
        with pytest.raises(calmlm.ModelError) as error:
            ask()
        assert_helpful(error.value, "the anchor's own", "before composing")
    assert model.get_input_embeddings() is embeddings
    assert embeddings.weight.shape[0] == embeddings.num_embeddings == VOCAB_SIZE
    assert model.lm_head is head and "lm_head" not in dict(model.named_children())
    for size in (None, VOCAB_SIZE):
        assert model.resize_token_embeddings(size) is embeddings
    assert torch.equal(logits_of(model, tiny_tokens()), expected)


def test_a_cache_that_another_model_filled() -> None:
    model = tiny_composition()
    foreign = DynamicCache(config=model.anchor.config)
    model.anchor(tiny_tokens(), past_key_values=foreign)
    with pytest.raises(calmlm.CalmError) as error:
        model(tiny_tokens(), past_key_values=foreign)
    assert_helpful(error.value, "past_key_values")


def test_a_cache_that_a_disabled_composition_carried_on() -> None:
    model = tiny_composition()
    cache = model(tiny_tokens(), use_cache=True).past_key_values
    with model.disable_composition():
        model(tiny_tokens(), past_key_values=cache)
    with pytest.raises(calmlm.CalmError) as error:
        model(tiny_tokens(), past_key_values=cache)
    assert_helpful(error.value, "past_key_values")


@pytest.mark.parametrize(("anchor", "augmenting"), [("gpt2", "llama"), ("llama", "gpt2"), ("llama", "opt")])
def test_more_tokens_than_a_model_has_positions(anchor: str, augmenting: str) -> None:
    model = tiny_composition(anchor, augmenting)
    fits = tiny_tokens(1, MAX_POSITIONS)
    with torch.no_grad():
        cache = model(fits, use_cache=True).past_key_values
    for call in (
        lambda: model(tiny_tokens(1, MAX_POSITIONS + 1)),
        lambda: model(fits[:, :1], past_key_values=copy.deepcopy(cache)),
        lambda: model.generate(fits, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None),
    ):
        with pytest.raises(calmlm.DataError) as error:
            call()
        assert_helpful(error.value, str(MAX_POSITIONS), str(MAX_POSITIONS + 1))


def test_an_error_leaves_the_composition_usable() -> None:
    model = tiny_composition()
    before = logits_of(model, tiny_tokens())
    with pytest.raises(calmlm.DataError):
        model(inputs_embeds=torch.zeros(1, 2, 48))
    assert torch.equal(logits_of(model, tiny_tokens()), before)


def test_a_misspelt_option_is_named(tmp_path: Path) -> None:
    with pytest.raises(calmlm.ConfigError) as error:
        calmlm.compose(tiny_model("llama"), tiny_model("gpt2"), conections=2)
    assert_helpful(error.value, "conections")
    for name, family in (("m_B", "llama"), ("m_A", "gpt2")):
        tiny_model(family).save_pretrained(tmp_path / name)
    with pytest.raises(calmlm.ModelError) as caught:
        calmlm.compose(tmp_path / "m_B", tmp_path / "m_A", conections=2)
    assert_helpful(caught.value, "conections")
