"""Compose two models and train the composition with the stock Trainer; no download, a few seconds on a CPU.

    python examples/two_tiny_models.py

Both models are random here, so the text that they write means nothing. Replace them by the ids of two pretrained models
with one tokenizer, and replace the rows by your own.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import calmlm


def random_llama(width: int, layers: int) -> LlamaForCausalLM:
    """A random model in the place of a pretrained one."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
        )
    )


def main() -> None:
    torch.manual_seed(0)
    model = calmlm.compose(random_llama(64, 6), random_llama(32, 4), connections="every-4")
    model.print_trainable_parameters()

    tokens = torch.randint(3, 64, (64, 12))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    before = model.anchor.state_dict()["model.embed_tokens.weight"].clone()
    arguments = TrainingArguments(
        output_dir="runs/two-tiny-models",
        max_steps=20,
        learning_rate=1e-2,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert torch.equal(model.anchor.state_dict()["model.embed_tokens.weight"], before), "the anchor changed"

    model.eval()
    prompt = tokens[:1, :4]
    print("composition:", model.generate(prompt, max_new_tokens=8, do_sample=False).tolist())
    with model.disable_composition():
        print("anchor:     ", model.generate(prompt, max_new_tokens=8, do_sample=False).tolist())


if __name__ == "__main__":
    main()
