"""The two real models of `scripts/models`, where they lie in models/: what toys hide shows here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GgufConfig

import calmlm
from calmlm.communication import listen
from calmlm.data.formats import read_examples
from calmlm.data.jsonl import Record
from calmlm.data.labels import encode_examples

ROOT = Path(__file__).parent.parent
SMOLLM2 = ROOT / "models" / "smollm2-135m-instruct" / "SmolLM2-135M-Instruct.Q4_1.gguf"
GEMMA = ROOT / "models" / "gemma-3-270m" / "gemma-3-270m-q4_k_m.gguf"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (SMOLLM2.is_file() and GEMMA.is_file()), reason="the real models are not in models/: run scripts/models"
    ),
]
DENSE: dict[str, Any] = {"dtype": torch.bfloat16, "quantization_config": GgufConfig(dequantize=True)}
PAIRS = [
    ("नदी पहाड़ों से निकलती है और तीन बड़े शहरों से बहती है।", "The river rises in mountains and flows through three cities."),
    ("पुराना पुस्तकालय उन्नीसवीं सदी में बना था।", "The old library was built in the nineteenth century."),
    ("القرية فيها ناس كتير بيربوا معيز.", "Many people in the village keep goats."),
    ("في الصيف درجة الحرارة بتعدي أربعين.", "In summer the temperature rises above forty degrees."),
]  # fmt: skip


def rows(tokenizer: Any) -> list[dict[str, list[int]]]:
    fields = [{"prompt": f"{source}\nEnglish:", "completion": f" {english}"} for source, english in PAIRS]
    return encode_examples(
        read_examples(Record(each, str(n)) for n, each in enumerate(fields)), tokenizer, max_length=None
    ).rows


@pytest.mark.parametrize(("anchor", "augmenting"), [(SMOLLM2, GEMMA), (GEMMA, SMOLLM2)], ids=["gemma", "smollm2"])
def test_the_augmenting_model_predicts_inside_as_it_does_alone(anchor: Path, augmenting: Path) -> None:
    model = calmlm.compose(anchor, augmenting, **DENSE)
    tokenizer = AutoTokenizer.from_pretrained(anchor.parent, gguf_file=anchor.name)
    heard = listen(model, tokenizer, rows(tokenizer)).augmenting["augmenting"]
    assert heard.alone is not None and heard.inside is not None
    assert abs(heard.inside / heard.alone - 1) < 0.005


def test_pieces_of_the_anchors_are_warned_of() -> None:
    model = calmlm.compose(SMOLLM2, GEMMA, alignment="transcode", **DENSE)
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2.parent, gguf_file=SMOLLM2.name)
    theirs = AutoTokenizer.from_pretrained(GEMMA.parent, gguf_file=GEMMA.name)
    found = listen(model, tokenizer, rows(tokenizer), augmenting_tokenizers={"augmenting": theirs})
    assert any("inside the composition" in warning for warning in found.warnings())


@pytest.mark.parametrize("form", [DENSE, {}], ids=["dequantised", "as it comes"])
def test_it_trains_saves_loads_and_generates(form: dict[str, Any], tmp_path: Path) -> None:
    model = calmlm.compose(SMOLLM2, GEMMA, 2, **form)
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2.parent, gguf_file=SMOLLM2.name)
    batch = {key: torch.tensor([value]) for key, value in rows(tokenizer)[0].items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "saved")
    again = calmlm.CalmForCausalLM.from_pretrained(tmp_path / "saved")
    prompt = tokenizer("नदी पहाड़ों से निकलती है।\nEnglish:", return_tensors="pt").to(model.device)
    texts = [m.generate(**prompt, max_new_tokens=6, do_sample=False) for m in (model, again)]
    assert torch.equal(*texts)
    steps = model.generate(**prompt, max_new_tokens=6, do_sample=False, use_cache=False)
    assert texts[0].shape == steps.shape
