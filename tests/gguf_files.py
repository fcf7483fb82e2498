"""Tiny GGUF files, written by the gguf package: a Llama in float32 or in blocks of eight bits, with its tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

LAYERS, WIDTH, HEADS = 4, 32, 4
WORDS = ("the", "and", "on", "cat", "mat", "sat")


def byte_tokens() -> list[str]:
    """All bytes, as byte-level BPE spells them."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in shown]
    spelled = {byte: chr(byte) for byte in shown} | {byte: chr(256 + place) for place, byte in enumerate(rest)}
    return [spelled[byte] for byte in range(256)]


def merged() -> tuple[list[str], list[str]]:
    """Tokens and merges of a few words, with and without a space before them."""
    tokens, merges = [], []
    for word in (*WORDS, *(f"Ġ{word}" for word in WORDS)):
        for end in range(2, len(word) + 1):
            pair = f"{word[: end - 1]} {word[end - 1]}"
            if word[:end] not in tokens:
                tokens.append(word[:end])
                merges.append(pair)
    return tokens, merges


def write_gguf(path: Path, *, seed: int, blocks: bool = False) -> Path:
    """Write a tiny Llama with a byte-level tokenizer.

    Args:
        path: of the file.
        seed: of its weights.
        blocks: whether its matrices are quantised to eight bits.
    """
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    rng = np.random.default_rng(seed)
    words, merges = merged()
    tokens = ["<|endoftext|>", *byte_tokens(), *words]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(merges)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)

    def add(name: str, *shape: int) -> None:
        values = (rng.standard_normal(shape) * 0.2).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values + 1)
        elif blocks:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)

    add("token_embd.weight", len(tokens), WIDTH)
    add("output_norm.weight", WIDTH)
    add("output.weight", len(tokens), WIDTH)
    for layer in range(LAYERS):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{part}.weight", WIDTH, WIDTH)
        add(f"blk.{layer}.ffn_gate.weight", 2 * WIDTH, WIDTH)
        add(f"blk.{layer}.ffn_up.weight", 2 * WIDTH, WIDTH)
        add(f"blk.{layer}.ffn_down.weight", WIDTH, 2 * WIDTH)
        add(f"blk.{layer}.attn_norm.weight", WIDTH)
        add(f"blk.{layer}.ffn_norm.weight", WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
