"""What a composition records of its bases leads back to them, or it is refused or warned of with a way out."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

import calmlm
from calmlm import CalmForCausalLM, CheckpointError, ConfigError, ModelError
from calmlm.bases.origins import class_named
from calmlm.exporting import export
from compositions import assert_helpful, awaken, logits_of
from tiny import VOCAB_SIZE, tiny_config, tiny_model, tiny_tokens

IDS = tiny_tokens(2, 7)
ROLES = ("anchor", "augmenting")


@pytest.fixture
def bases(tmp_path: Path) -> Path:
    """A folder with two base models, ``anchor`` and ``augmenting``."""
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "anchor")
    tiny_model("mistral", seed=2).save_pretrained(tmp_path / "augmenting")
    return tmp_path


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def with_role(bases: Path, role: str, model: Any) -> dict[str, Any]:
    return {"anchor": bases / "anchor", "augmenting": bases / "augmenting", role: model}


# Adapters


def adapted(folder: Path) -> Any:
    """A model within PEFT, with an adapter that changes it."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    return peft.get_peft_model(load(folder), settings)


def adapter_folder(bases: Path, role: str) -> Path:
    adapted(bases / role).save_pretrained(bases / "adapter")
    return bases / "adapter"


def adapter_beside_its_model(bases: Path, role: str) -> Path:
    folder = adapter_folder(bases, role)
    load(bases / role).save_pretrained(folder)
    return folder


def loaded_from_an_adapter(bases: Path, role: str) -> Any:
    return load(adapter_folder(bases, role))


def with_an_adapter_loaded(bases: Path, role: str) -> Any:
    model = load(bases / role)
    model.load_adapter(str(adapter_folder(bases, role)))
    return model


ADAPTED: dict[str, Callable[[Path, str], Any]] = {
    "an adapter's folder": adapter_folder,
    "its path": lambda bases, role: str(adapter_folder(bases, role)),
    "an adapter beside its model": adapter_beside_its_model,
    "loaded from an adapter": loaded_from_an_adapter,
    "an adapter that was loaded": with_an_adapter_loaded,
    "PeftModel": lambda bases, role: adapted(bases / role),
    "what is in a PeftModel": lambda bases, role: adapted(bases / role).base_model.model,
}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("kind", ADAPTED)
def test_adapters_are_to_be_merged_first(bases: Path, kind: str, role: str) -> None:
    calmlm.compose(bases / "anchor", bases / "augmenting", 2).save_pretrained(bases / "composition")
    model = ADAPTED[kind](bases, role)
    with pytest.raises(ModelError) as error:
        calmlm.compose(**with_role(bases, role, model), connections=2)
    assert_helpful(error.value, role, "merge_and_unload()", "save")
    with pytest.raises(ModelError) as error:
        CalmForCausalLM.from_pretrained(bases / "composition", **{role: model})
    assert_helpful(error.value, role, "merge_and_unload()")


def test_adapters_beside_a_base_that_came_later(bases: Path) -> None:
    calmlm.compose(bases / "anchor", bases / "augmenting", 2).save_pretrained(bases / "composition")
    adapted(bases / "anchor").save_pretrained(bases / "anchor")
    with pytest.raises(ModelError) as error:
        CalmForCausalLM.from_pretrained(bases / "composition")
    assert_helpful(error.value, "anchor", "merge_and_unload()")


@pytest.mark.parametrize("role", ROLES)
def test_the_way_out_leads_out(bases: Path, role: str) -> None:
    adapted(bases / role).merge_and_unload().save_pretrained(bases / "merged")
    model = awaken(calmlm.compose(**with_role(bases, role, bases / "merged"), connections=2))
    model.save_pretrained(bases / "composition")
    again = CalmForCausalLM.from_pretrained(bases / "composition")
    assert torch.equal(logits_of(again, IDS), logits_of(model, IDS))


# Compositions


def test_a_composition_is_no_base(bases: Path) -> None:
    model = calmlm.compose(bases / "anchor", bases / "augmenting", 2)
    model.save_pretrained(bases / "composition")
    for role in ROLES:
        for given in (model, bases / "composition"):
            with pytest.raises(ModelError) as error:
                calmlm.compose(**with_role(bases, role, given))
            assert_helpful(error.value, role, "is a composition", "add_augmenting")


# Models in memory that are not what lies at their name


def fine_tuned(folder: Path) -> Any:
    model = load(folder)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    return model


def resized(folder: Path) -> Any:
    model = load(folder)
    model.resize_token_embeddings(VOCAB_SIZE + 3)
    return model


def cut(folder: Path) -> Any:
    model = load(folder)
    model.model.layers = model.model.layers[:-1]
    model.config.num_hidden_layers -= 1
    return model


def turned(folder: Path) -> Any:
    config = AutoConfig.from_pretrained(folder)
    config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    return load(folder, config=config)


def headless(folder: Path) -> Any:
    load(folder).model.save_pretrained(folder)  # its head is drawn at random when it is loaded
    return load(folder)


def elsewhere(folder: Path) -> Any:
    load(folder).save_pretrained(folder.parent / "top" / "sub")
    return load(folder.parent / "top", subfolder="sub")


def variant(folder: Path) -> Any:
    load(folder).save_pretrained(folder.parent / "top", variant="other")
    return load(folder.parent / "top", variant="other")


def pickled(folder: Path) -> Any:
    model = load(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return load(folder)


NOT_THERE: dict[str, Callable[[Path], Any]] = {
    "fine-tuned": fine_tuned,
    "resized": resized,
    "merged": lambda folder: adapted(folder).merge_and_unload(),
    "cut": cut,
    "made anew": lambda folder: AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval(),
    "other positions": turned,
    "without a head": headless,
    "a subfolder": elsewhere,
    "a variant": variant,
    "weights as a pickle": pickled,
}


@pytest.mark.filterwarnings("ignore:.*lm_head.*")
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("kind", NOT_THERE)
def test_a_model_in_memory_that_is_not_what_lies_at_its_name(bases: Path, kind: str, role: str) -> None:
    base = NOT_THERE[kind](bases / role)
    other = {r: load(bases / r) for r in ROLES if r != role}
    if kind == "resized":  # both, since they share token ids
        other = {r: resized(bases / r) for r in ROLES if r != role}
    model = awaken(calmlm.compose(**{role: base, **other}, connections=2))
    entries = {"anchor": model.config.anchor, **model.config.augmenting}
    assert entries[role]["id"] == ""
    with pytest.warns(UserWarning, match="was given in memory and is not what lies at") as caught:
        model.save_pretrained(bases / "composition")
    assert len(caught) == (2 if kind == "resized" else 1)
    assert any(f"The model {role!r} was given" in str(warning.message) for warning in caught)
    with pytest.raises(CheckpointError) as error:
        CalmForCausalLM.from_pretrained(bases / "composition")
    assert_helpful(error.value, *([role, f"{role}=model"] if kind != "resized" else ["=model"]))
    # Both ways out.
    given = {role: base, **(other if kind == "resized" else {})}
    again = CalmForCausalLM.from_pretrained(bases / "composition", **given)
    assert torch.equal(logits_of(again, IDS), logits_of(model, IDS))
    for name, part in given.items():
        part.save_pretrained(bases / f"own-{name}")
    given = {name: bases / f"own-{name}" for name in given}
    if kind != "other positions":  # these are settings, which a fingerprint does not hold
        again = CalmForCausalLM.from_pretrained(bases / "composition", **given)
        assert torch.equal(logits_of(again, IDS), logits_of(model, IDS))
        again.save_pretrained(bases / "second")  # which knows it by its place
        assert torch.equal(logits_of(CalmForCausalLM.from_pretrained(bases / "second"), IDS), logits_of(model, IDS))


FAMILIES = ["llama", "gpt2", "qwen3_moe", "gemma3_text", "opt", "bloom", "phi"]
PAIRS = [(family, torch.float32) for family in FAMILIES] + [("llama", torch.bfloat16), ("llama", torch.float16)]


@pytest.mark.parametrize(("family", "dtype"), PAIRS, ids=str)
def test_a_model_in_memory_that_lies_at_its_name(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    """In any family and dtype, sharded too, and after it ran: nobody is warned, and the composition comes back."""
    options = {"tie_word_embeddings": True} if family == "llama" else {}
    tiny_model(family, seed=1, **options).save_pretrained(tmp_path / "anchor", max_shard_size="20KB")
    tiny_model("gpt2", seed=2).save_pretrained(tmp_path / "augmenting")
    anchor, augmenting = load(tmp_path / "anchor", dtype=dtype), load(tmp_path / "augmenting", dtype=dtype)
    logits_of(anchor, IDS)
    model = calmlm.compose(anchor, augmenting, connections=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "composition")
    assert model.config.anchor["id"] == str(tmp_path / "anchor")
    assert model.config.augmenting["augmenting"]["id"] == str(tmp_path / "augmenting")
    again = CalmForCausalLM.from_pretrained(tmp_path / "composition", dtype=dtype)
    assert torch.equal(logits_of(again, IDS), logits_of(model, IDS))


@pytest.mark.filterwarnings("ignore")
def test_encoders_and_models_that_scale_their_weights(tmp_path: Path) -> None:
    small = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "num_hidden_layers": 2}
    bert = transformers.BertConfig(**small, num_attention_heads=2, intermediate_size=32, max_position_embeddings=32)
    transformers.BertModel(bert).save_pretrained(tmp_path / "bert")
    rwkv = transformers.RwkvForCausalLM(transformers.RwkvConfig(**small, attention_hidden_size=16, rescale_every=1))
    rwkv.save_pretrained(tmp_path / "rwkv")
    anchor, eyes = load(tmp_path / "rwkv"), transformers.BertModel.from_pretrained(tmp_path / "bert")
    logits_of(anchor.eval(), IDS)
    model = calmlm.compose(anchor, {"eyes": eyes}, 1)
    assert model.config.anchor["id"] == str(tmp_path / "rwkv")
    assert model.config.augmenting["eyes"]["id"] == str(tmp_path / "bert")


SIZE: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
IMAGES: dict[str, Any] = {"image_size": 8, "patch_size": 4, **SIZE}
SIDES = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in
         {"layers": 2, "attention_heads": 4, "ffn_dim": 40}.items()}  # fmt: skip
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def joint(kind: str) -> Any:
    """A model of texts and images."""
    config = getattr(transformers, f"{kind}Config")
    model = getattr(transformers, f"{kind}Model")
    return model(config(text_config={"vocab_size": 50, **SIZE}, vision_config=IMAGES))


def ctc() -> Any:
    shape = {"conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (8, 3)}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    return transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(vocab_size=20, **SIZE, **shape, **positions))


def gemma() -> Any:
    text = {"vocab_size": VOCAB_SIZE, "num_key_value_heads": 2, "head_dim": 8, **SIZE}
    tokens = {"mm_tokens_per_image": 4, "image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92}
    config = transformers.Gemma3Config(text_config=text, vision_config=IMAGES, **tokens)
    return transformers.Gemma3ForConditionalGeneration(config)


def whisper() -> Any:
    config = transformers.WhisperConfig(
        vocab_size=60, d_model=24, num_mel_bins=8, max_source_positions=10, **SIDES, **SPECIAL
    )
    return transformers.WhisperForConditionalGeneration(config)


def translator() -> Any:
    config = transformers.T5Config(vocab_size=50, d_model=24, d_ff=40, num_layers=2, num_heads=4, d_kv=6)
    return transformers.T5ForConditionalGeneration(config)


PARTS: dict[str, tuple[Callable[[], Any], str]] = {
    "clip": (lambda: joint("CLIP"), "CLIPVisionModel"),
    "siglip": (lambda: joint("Siglip"), "SiglipVisionModel"),
    "wav2vec2": (ctc, "Wav2Vec2Model"),
    "bert": (lambda: transformers.BertForPreTraining(transformers.BertConfig(vocab_size=50, **SIZE)), "BertModel"),
    "whisper": (whisper, "WhisperModel"),
    "t5": (translator, "T5EncoderModel"),
}
"""Checkpoints, and a class by which a part of each is loaded."""


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("kind", PARTS)
def test_a_part_of_a_checkpoint_is_loaded_as_that_part(bases: Path, kind: str, exported: bool) -> None:
    make, name = PARTS[kind]
    make().save_pretrained(bases / "whole")
    part = getattr(transformers, name).from_pretrained(bases / "whole")
    model = awaken(calmlm.compose(bases / "anchor", {"part": part}, 1))
    assert model.config.augmenting["part"]["id"] == str(bases / "whole")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(bases / "composition")
    place = export(bases / "composition", bases / "export") if exported else bases / "composition"
    again = CalmForCausalLM.from_pretrained(place)
    assert type(again.augmenting["part"]) is type(part)
    for found, expected in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(found, expected)
    # From another place, too.
    shutil.copytree(bases / "whole", bases / "elsewhere")
    again = CalmForCausalLM.from_pretrained(place, augmenting={"part": bases / "elsewhere"})
    assert type(again.augmenting["part"]) is type(part)


RANDOM: dict[str, tuple[Callable[[], Any], str]] = {
    "bert": (lambda: transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=50, **SIZE)), "BertModel"),
    "vit": (lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGES)), "ViTModel"),
    "gemma": (gemma, "Gemma3ForCausalLM"),
}
"""Checkpoints, and a class of which they lack tensors."""


@pytest.mark.parametrize("kind", RANDOM)
def test_a_part_that_a_checkpoint_lacks_is_warned_of(bases: Path, kind: str) -> None:
    make, name = RANDOM[kind]
    make().save_pretrained(bases / "whole")
    part = getattr(transformers, name).from_pretrained(bases / "whole")
    model = calmlm.compose(bases / "anchor", {"part": part}, 1)
    assert model.config.augmenting["part"]["id"] == ""
    with pytest.warns(UserWarning, match="The model 'part' was given in memory and is not what lies at"):
        model.save_pretrained(bases / "composition")
    part.save_pretrained(bases / "own")
    CalmForCausalLM.from_pretrained(bases / "composition", augmenting=bases / "own")


@pytest.mark.parametrize("own", [False, True])
def test_a_class_that_transformers_does_not_export_is_warned_of(bases: Path, own: bool) -> None:
    whisper().save_pretrained(bases / "whole")
    part = transformers.WhisperModel.from_pretrained(bases / "whole").get_encoder()
    if own:
        part.save_pretrained(bases / "own")
        part = type(part).from_pretrained(bases / "own")
    assert part.name_or_path
    model = calmlm.compose(bases / "anchor", {"part": part}, 1)
    assert model.config.augmenting["part"]["id"] == ""
    with pytest.warns(UserWarning, match="in memory as a WhisperEncoder, which transformers does not load by name"):
        model.save_pretrained(bases / "composition")
    with pytest.raises(CheckpointError) as error:
        CalmForCausalLM.from_pretrained(bases / "composition")
    assert_helpful(error.value, "augmenting=model")
    CalmForCausalLM.from_pretrained(bases / "composition", augmenting=part)


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_a_model_of_several_by_name(bases: Path, kind: str) -> None:
    joint(kind).save_pretrained(bases / "whole")
    with pytest.raises(ModelError) as error:
        calmlm.compose(bases / "anchor", {"part": bases / "whole"}, 1)
    assert_helpful(error.value, f"{kind}VisionModel.from_pretrained({str(bases / 'whole')!r})", "pass it")


@pytest.mark.parametrize("name", ["PreTrainedModel", "AutoModel", "pipeline", "models", "none", "", None])
def test_only_models_are_looked_up_by_name(name: str | None) -> None:
    assert class_named(name) is None


def test_a_name_that_leads_nowhere_is_warned_of(bases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a folder that was named from another working directory: it reads like an id of the hub."""
    monkeypatch.chdir(bases)
    model = load(Path("anchor"))
    monkeypatch.chdir("/")
    with pytest.warns(UserWarning, match="The anchor in memory is called 'anchor', which is neither a folder here nor"):
        calmlm.compose(model, bases / "augmenting", 2)
    # Another folder of this name is not taken for it.
    (bases / "other").mkdir()
    tiny_model("llama", seed=7).save_pretrained(bases / "other" / "anchor")
    monkeypatch.chdir(bases / "other")
    assert calmlm.compose(model, bases / "augmenting", 2).config.anchor["id"] == ""


def test_links_lead_to_what_they_led_to(bases: Path) -> None:
    (bases / "latest").symlink_to(bases / "anchor")
    tiny_model("llama", seed=7).save_pretrained(bases / "newer")
    for given in (bases / "latest", load(bases / "latest")):
        model = awaken(calmlm.compose(given, bases / "augmenting", 2))
        assert model.config.anchor["id"] == str(bases / "anchor")
    (bases / "latest").unlink()
    (bases / "latest").symlink_to(bases / "newer")
    model.save_pretrained(bases / "composition")
    assert torch.equal(logits_of(CalmForCausalLM.from_pretrained(bases / "composition"), IDS), logits_of(model, IDS))


# What changes meanwhile


def test_a_folder_that_holds_another_model_by_now(bases: Path) -> None:
    model = calmlm.compose(bases / "anchor", bases / "augmenting", 2)
    tiny_model("mistral", seed=7).save_pretrained(bases / "augmenting")
    with pytest.warns(
        UserWarning, match=r"augmenting' is no longer the model 'augmenting' .*\(its weights are others\)"
    ):
        model.save_pretrained(bases / "composition")
    with pytest.raises(CheckpointError) as error:
        CalmForCausalLM.from_pretrained(bases / "composition")
    assert_helpful(error.value, "augmenting", "has changed since", "with other weights")
    assert str(error.value).count(str(bases / "augmenting")) == 1, "it must not be X but X"
    shutil.rmtree(bases / "augmenting")
    with pytest.warns(UserWarning, match="no weights in safetensors lie there"):
        model.save_pretrained(bases / "composition")


@pytest.mark.parametrize("in_memory", [False, True])
def test_what_differs_is_said_where_the_names_are_equal(bases: Path, in_memory: bool) -> None:
    calmlm.compose(bases / "anchor", bases / "augmenting", 2).save_pretrained(bases / "composition")
    others = {
        "with other weights": tiny_model("llama", seed=7),
        "with tensors of other names or shapes": tiny_model("llama", seed=1, intermediate_size=72),
        "of another architecture": tiny_model("qwen2", seed=1),
    }
    for difference, other in others.items():
        shutil.rmtree(bases / "anchor")
        other.save_pretrained(bases / "anchor")
        given = {"anchor": load(bases / "anchor")} if in_memory else {}
        with pytest.raises(CheckpointError) as error:
            CalmForCausalLM.from_pretrained(bases / "composition", **given)
        assert_helpful(error.value, "anchor", difference, *(["(in memory)"] if in_memory else ["has changed since"]))


def test_a_folder_that_has_moved_is_known_by_its_new_place(bases: Path, tmp_path_factory: Any) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    model = awaken(calmlm.compose(bases / "anchor", bases / "augmenting", 2))
    model.save_pretrained(elsewhere / "composition")
    (bases / "anchor").rename(bases / "moved")
    for given in (bases / "moved", load(bases / "moved")):
        again = CalmForCausalLM.from_pretrained(elsewhere / "composition", anchor=given)
        again.save_pretrained(elsewhere / "second")
        found = CalmForCausalLM.from_pretrained(elsewhere / "second")
        assert torch.equal(logits_of(found, IDS), logits_of(model, IDS))
        assert found.config.anchor["id"] == str(bases / "moved")


# Options that make another model of what lies at an id


OPTIONS: dict[str, dict[str, Any]] = {
    "variant": {"variant": "fp16"},
    "config": {"config": tiny_config("llama")},
    "key_mapping": {"key_mapping": {"a": "b"}},
    "ignore_mismatched_sizes": {"ignore_mismatched_sizes": True},
    "num_hidden_layers": {"num_hidden_layers": 3},
    "rope_parameters": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("option", OPTIONS)
def test_options_that_nobody_would_know_of_are_refused(bases: Path, option: str) -> None:
    with pytest.raises(ConfigError) as error:
        calmlm.compose(bases / "anchor", bases / "augmenting", 2, **OPTIONS[option])
    assert_helpful(error.value, option, "save_pretrained")


# The hub


@pytest.fixture
def hub(bases: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with two commits of a repository: ``v1``, and ``main`` with other weights."""
    from huggingface_hub import constants

    root = bases / "hub" / "models--someone--anchor"
    (root / "refs").mkdir(parents=True)
    for ref, seed, commit in (("v1", 1, "1" * 40), ("main", 7, "2" * 40)):
        tiny_model("llama", seed=seed).save_pretrained(root / "snapshots" / commit)
        (root / "refs" / ref).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(bases / "hub"))
    return root


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize(("revision", "commit"), [("v1", "1" * 40), (None, "2" * 40)])
def test_the_commit_is_recorded(bases: Path, hub: Path, revision: str | None, commit: str, in_memory: bool) -> None:
    if in_memory:
        given: Any = AutoModelForCausalLM.from_pretrained("someone/anchor", revision=revision)
        model = awaken(calmlm.compose(given, bases / "augmenting", 2))
    else:
        model = awaken(calmlm.compose("someone/anchor", bases / "augmenting", 2, revision=revision))
    assert (model.config.anchor["id"], model.config.anchor["revision"]) == ("someone/anchor", commit)
    model.save_pretrained(bases / "composition")
    # The repository moves on.
    tiny_model("llama", seed=9).save_pretrained(hub / "snapshots" / ("3" * 40))
    (hub / "refs" / "main").write_text("3" * 40)
    again = CalmForCausalLM.from_pretrained(bases / "composition")
    assert torch.equal(logits_of(again, IDS), logits_of(model, IDS))


def test_a_model_of_the_hub_that_was_changed(bases: Path, hub: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained("someone/anchor")
    with torch.no_grad():
        base.lm_head.weight.mul_(2)
    assert calmlm.compose(base, bases / "augmenting", 2).config.anchor["id"] == ""


def test_a_folder_of_the_same_name_is_not_the_repository(
    bases: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = AutoModelForCausalLM.from_pretrained("someone/anchor")
    tiny_model("llama", seed=9).save_pretrained(bases / "someone" / "anchor")
    monkeypatch.chdir(bases)
    origin = calmlm.compose(base, bases / "augmenting", 2).config.anchor
    assert (origin["id"], origin["revision"]) == ("someone/anchor", "2" * 40)


def test_a_config_that_names_another_place(bases: Path) -> None:
    """Names of this kind stand in configurations that were copied."""
    model = tiny_model("llama", seed=7)
    model.name_or_path = model.config.name_or_path = str(bases / "anchor")
    assert calmlm.compose(model, bases / "augmenting", 2).config.anchor["id"] == ""
    config = json.loads((bases / "anchor" / "config.json").read_text())
    (bases / "anchor" / "config.json").write_text(json.dumps(config | {"_name_or_path": "someone/else"}))
    assert calmlm.compose(bases / "anchor", bases / "augmenting", 2).config.anchor["id"] == str(bases / "anchor")


def test_two_compositions_on_anchors_of_one_name(bases: Path) -> None:
    first = calmlm.compose(bases / "anchor", bases / "augmenting", 2)
    tiny_model("llama", seed=7).save_pretrained(bases / "anchor")
    second = calmlm.compose(bases / "anchor", bases / "augmenting", 2)
    with pytest.raises(CheckpointError) as error:
        first.add_augmenting("more", second)
    assert_helpful(error.value, "of the other composition", "of this one", "with other weights")
