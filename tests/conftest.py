"""Fixtures for all tests: no network, one thread, a tiny tokenizer and tiny models on disk."""

from __future__ import annotations

import os
from pathlib import Path

# Before anything imports huggingface_hub or datasets, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from tiny import tiny_model, tiny_tokenizer

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """One token per character; see tests/tiny.py."""
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def anchor_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A tiny Llama on disk, with its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "anchor"
    tiny_model("llama", seed=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def augmenting_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mistral on disk, without a tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "augmenting"
    tiny_model("mistral", seed=2).save_pretrained(folder)
    return folder
