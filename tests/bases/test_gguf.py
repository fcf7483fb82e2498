"""Base models in GGUF files: composed, trained, saved, loaded again; and each model in a form of its own."""

from __future__ import annotations

import shutil
from logging import StreamHandler
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging

import calmlm
from calmlm.bases.opening import load_base
from calmlm.config import gguf_name, split_gguf
from calmlm.errors import CheckpointError, ConfigError, ModelError
from calmlm.tokens.lookup import find_tokenizer
from gguf_files import write_gguf

pytest.importorskip("gguf", reason="the package gguf is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:.*tie:UserWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny models in one folder: in float32, and in blocks of eight bits."""
    found = tmp_path_factory.mktemp("gguf")
    write_gguf(found / "anchor.gguf", seed=1)
    write_gguf(found / "small.gguf", seed=2, blocks=True)
    return found


def compose(folder: Path, **options: Any) -> calmlm.CalmForCausalLM:
    return calmlm.compose(folder, folder, 2, gguf_file="anchor.gguf", augmenting_gguf_file="small.gguf", **options)


class TestNames:
    @pytest.mark.parametrize(
        ("name", "parts"),
        [
            ("org/model", ("org/model", None)),
            ("org/model.gguf", ("org/model.gguf", None)),  # an id
            ("org/model/file.gguf", ("org/model", "file.gguf")),
            ("org/model/q4/file.GGUF", ("org/model", "q4/file.GGUF")),
            ("/somewhere/file.gguf", ("/somewhere", "file.gguf")),
        ],
    )
    def test_a_name_and_its_parts(self, name: str, parts: tuple[str, str | None]) -> None:
        assert split_gguf(name) == parts
        assert gguf_name(*parts) == name

    def test_relative_files_that_exist(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(folder)
        assert split_gguf("anchor.gguf") == (".", "anchor.gguf")
        monkeypatch.chdir(folder.parent)
        assert split_gguf(f"{folder.name}/anchor.gguf") == (folder.name, "anchor.gguf")

    @pytest.mark.parametrize("file", ["model.safetensors", "../other.gguf", "/elsewhere/other.gguf", 3])
    def test_what_is_no_such_file_is_refused(self, folder: Path, file: Any) -> None:
        with pytest.raises(ConfigError, match="gguf_file must"):
            calmlm.compose(folder, folder, gguf_file=file)


class TestCompositions:
    @pytest.mark.parametrize("form", ["as it comes", "dequantised", "dequantised, bfloat16"])
    def test_they_train_save_load_and_generate(self, folder: Path, tmp_path: Path, form: str) -> None:
        options: dict[str, Any] = {} if form == "as it comes" else {"quantization_config": GgufConfig(dequantize=True)}
        if "bfloat16" in form:
            options["dtype"] = torch.bfloat16
        model = compose(folder, **options)
        ids = torch.tensor([[5, 80, 33, 260, 261, 100]])
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="anchor.gguf")
        alone = AutoModelForCausalLM.from_pretrained(folder, gguf_file="anchor.gguf", **options)
        assert torch.equal(model(ids).logits, alone(ids).logits)
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        for _ in range(2):  # the projections that start at zero come first
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        assert not torch.equal(model(ids).logits, alone(ids).logits)
        model.save_pretrained(tmp_path / "saved")
        again = calmlm.CalmForCausalLM.from_pretrained(tmp_path / "saved")
        assert again.dtype == model.dtype
        assert [type(p) for p in again.anchor.parameters()] == [type(p) for p in model.anchor.parameters()]
        assert (getattr(again.anchor, "hf_quantizer", None) is None) == (form != "as it comes")
        assert torch.equal(again(ids).logits, model(ids).logits)
        written = [m.generate(ids, max_new_tokens=5, do_sample=False) for m in (model, again)]
        assert torch.equal(*written)
        assert tokenizer.decode(written[0][0])

    def test_a_path_names_the_file_as_well(self, folder: Path) -> None:
        one, other = compose(folder), calmlm.compose(str(folder / "anchor.gguf"), folder / "small.gguf", 2)
        assert one.config.anchor == other.config.anchor
        assert one.config.augmenting == other.config.augmenting
        assert one.config.anchor["id"] == str(folder / "anchor.gguf")

    def test_models_in_memory_are_named_by_their_files(self, folder: Path, tmp_path: Path) -> None:
        anchor, small = (
            AutoModelForCausalLM.from_pretrained(folder, gguf_file=f"{n}.gguf") for n in ("anchor", "small")
        )
        model = calmlm.compose(anchor, small, 2, gguf_file="anchor.gguf", augmenting_gguf_file="small.gguf")
        assert model.config.anchor == compose(folder).config.anchor
        model.save_pretrained(tmp_path / "saved")
        calmlm.CalmForCausalLM.from_pretrained(tmp_path / "saved")

    def test_folder_and_composition_move_together(self, folder: Path, tmp_path: Path) -> None:
        shutil.copytree(folder, tmp_path / "one" / "models")
        compose(tmp_path / "one" / "models").save_pretrained(tmp_path / "one" / "saved")
        (tmp_path / "one").rename(tmp_path / "two")
        model = calmlm.CalmForCausalLM.from_pretrained(tmp_path / "two" / "saved")
        assert model.config.anchor["id"] == str(tmp_path / "two" / "models" / "anchor.gguf")

    def test_tokenizers_are_found_in_the_files(self, folder: Path) -> None:
        found = find_tokenizer(folder / "anchor.gguf")
        assert (
            found("the cat").input_ids
            == AutoTokenizer.from_pretrained(folder, gguf_file="anchor.gguf")("the cat").input_ids
        )

    def test_other_weights_are_refused(self, folder: Path, tmp_path: Path) -> None:
        shutil.copytree(folder, tmp_path / "models")
        compose(tmp_path / "models").save_pretrained(tmp_path / "saved")
        write_gguf(tmp_path / "models" / "anchor.gguf", seed=3)
        with pytest.raises(CheckpointError, match="with other weights"):
            calmlm.CalmForCausalLM.from_pretrained(tmp_path / "saved")


def test_a_file_is_read_once_and_let_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf

    reader, opened = gguf.GGUFReader, []

    class Counting(reader):  # type: ignore[misc, valid-type]
        def __init__(self, path: Any, *options: Any) -> None:
            opened.append(Path(path).name)
            super().__init__(path, *options)

    from transformers import modeling_gguf_pytorch_utils as loader

    load, parsed = loader.load_gguf_checkpoint, []

    def counting(path: Any, return_tensors: bool = False, **options: Any) -> Any:
        parsed.append((Path(path).name, return_tensors))
        return load(path, return_tensors, **options)

    monkeypatch.setattr(gguf, "GGUFReader", Counting)
    monkeypatch.setattr(loader, "load_gguf_checkpoint", counting)
    compose(folder)
    assert sorted(opened) == ["anchor.gguf", "small.gguf"]
    files = ("anchor.gguf", "small.gguf")
    assert sorted(parsed) == [(file, whole) for file in files for whole in (False, True)]
    assert loader.load_gguf_checkpoint is counting
    assert gguf.GGUFReader is Counting
    with pytest.raises(ModelError):
        calmlm.compose(folder, folder, gguf_file="nothing.gguf")
    assert gguf.GGUFReader is Counting


def test_a_warning_of_packed_weights_comes_where_they_are_packed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers warns of it, in bfloat16, whatever it does with the file."""
    from transformers.quantizers import quantizer_gguf

    said: list[str] = []
    handler = StreamHandler()
    monkeypatch.setattr(handler, "emit", lambda record: said.append(record.getMessage()))
    quantizer_gguf.logger.addHandler(handler)
    try:
        load_base(str(folder / "small.gguf"), "anchor", dtype="bfloat16")
        assert said == []

        def after(self: Any, model: Any) -> Any:
            self.packed_modules = {"layer": model}
            return model

        monkeypatch.setattr(quantizer_gguf.GgufHfQuantizer, "_process_model_after_weight_loading", after)
        load_base(str(folder / "small.gguf"), "anchor", dtype="bfloat16")
        assert len(said) == 1 and "weights packed" in said[0]
    finally:
        quantizer_gguf.logger.removeHandler(handler)


class TestFaults:
    def test_a_missing_file(self, folder: Path) -> None:
        with pytest.raises(ModelError, match=r"must be the id or folder .* could not be loaded") as caught:
            calmlm.compose(folder, folder, gguf_file="nothing.gguf", augmenting_gguf_file="small.gguf")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("content", [b"", b"GGUF", b"no such file" * 100])
    def test_a_damaged_file(self, folder: Path, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "bad.gguf").write_bytes(content)
        with pytest.raises(ModelError) as caught:
            calmlm.compose(tmp_path / "bad.gguf", folder / "small.gguf")
        assert "\n" not in str(caught.value)

    def test_a_file_that_is_cut_short(self, folder: Path, tmp_path: Path) -> None:
        whole = (folder / "anchor.gguf").read_bytes()
        (tmp_path / "short.gguf").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ModelError) as caught:
            calmlm.compose(tmp_path / "short.gguf", folder / "small.gguf")
        assert "\n" not in str(caught.value)

    def test_a_file_that_is_gone(self, folder: Path, tmp_path: Path) -> None:
        shutil.copytree(folder, tmp_path / "models")
        compose(tmp_path / "models").save_pretrained(tmp_path / "saved")
        (tmp_path / "models" / "small.gguf").unlink()
        with pytest.raises(ModelError, match=r"small\.gguf"):
            calmlm.CalmForCausalLM.from_pretrained(tmp_path / "saved")

    def test_no_quantisation(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match="quant_method"):
            compose(folder, quantization_config={"bits": 4})


class TestForms:
    def test_each_model_has_its_own_dtype(self, anchor_folder: Path, augmenting_folder: Path) -> None:
        model = calmlm.compose(anchor_folder, augmenting_folder, dtype=torch.bfloat16, augmenting_dtype=torch.float32)
        assert (model.anchor.dtype, model.augmenting["augmenting"].dtype) == (torch.bfloat16, torch.float32)

    def test_augmenting_models_take_the_anchors_by_default(self, anchor_folder: Path, augmenting_folder: Path) -> None:
        model = calmlm.compose(anchor_folder, augmenting_folder, dtype=torch.bfloat16)
        assert model.augmenting["augmenting"].dtype == torch.bfloat16

    def test_several_models_have_their_own_by_name(self, anchor_folder: Path, augmenting_folder: Path) -> None:
        two = {"one": augmenting_folder, "two": augmenting_folder}
        model = calmlm.compose(anchor_folder, two, dtype=torch.float16, augmenting_dtype={"two": torch.bfloat16})
        assert [model.augmenting[name].dtype for name in two] == [torch.float16, torch.bfloat16]

    def test_one_model_alone_is_quantised(self, anchor_folder: Path, augmenting_folder: Path, tmp_path: Path) -> None:
        pytest.importorskip("torchao", reason="torchao is not installed")
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        wanted = TorchAoConfig(Int8WeightOnlyConfig())
        model = calmlm.compose(
            anchor_folder, augmenting_folder, quantization_config=wanted, augmenting_quantization_config=None
        )
        assert model.anchor.hf_quantizer is not None
        assert getattr(model.augmenting["augmenting"], "hf_quantizer", None) is None
        model.save_pretrained(tmp_path / "saved")
        again = calmlm.CalmForCausalLM.from_pretrained(
            tmp_path / "saved", quantization_config=wanted, augmenting_quantization_config=None
        )
        ids = torch.tensor([[3, 4, 5]])
        assert torch.equal(again(ids).logits, model(ids).logits)

    def test_gguf_settings_leave_other_models_alone(self, folder: Path, augmenting_folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="anchor.gguf")
        model = calmlm.compose(
            folder / "anchor.gguf",
            folder / "small.gguf",
            quantization_config=GgufConfig(dequantize=True),
            augmenting_quantization_config=None,
            tokenizer=tokenizer,
        )
        assert getattr(model.anchor, "hf_quantizer", None) is None


def test_its_bar_is_switched_off_with_the_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_gguf(tmp_path / "m_B.gguf", seed=1)
    for switch, shown in ((logging.disable_progress_bar, False), (logging.enable_progress_bar, True)):
        switch()
        calmlm.compose(path, write_gguf(tmp_path / "m_A.gguf", seed=2), quantization_config=GgufConfig(dequantize=True))
        assert ("GGUF tensors" in capfd.readouterr().err) is shown
