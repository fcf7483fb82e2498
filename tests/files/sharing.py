"""What a user of the hub does, in a process of its own: HF_ENDPOINT is read once. It prints what it sees, as JSON."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResultEntry, HfApi, constants
from transformers import AutoModelForCausalLM, AutoTokenizer

import calmlm
from calmlm.exporting import export
from calmlm.files.leaderboards import write_results
from compositions import awaken, logits_of
from tiny import tiny_model, tiny_tokens
from tokenizers_tiny import tokenizer

IDS = tiny_tokens(2, 7)


def upload(name: str, family: str, seed: int, words: Any, place: Path) -> None:
    model = tiny_model(family, seed=seed, vocab_size=len(words))
    model.save_pretrained(place / name)
    words.save_pretrained(place / name)
    api = HfApi()
    api.create_repo(f"them/{name}", exist_ok=True)
    api.upload_folder(repo_id=f"them/{name}", folder_path=place / name, commit_message=f"seed {seed}")


def forget() -> Any:
    """As on another machine: nothing is in the cache."""
    shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)


def main() -> None:
    place, seen = Path(sys.argv[1]), {}
    ours, theirs = tokenizer("bytes"), tokenizer("bytes-large")
    upload("big", "llama", 1, ours, place)
    upload("small", "mistral", 2, theirs, place)
    model = awaken(calmlm.compose("them/big", {"law": "them/small"}, 2, alignment={"law": "own"}, words="pointer"))
    expected = logits_of(model, IDS)
    seen["revisions"] = [model.config.anchor["revision"], model.config.augmenting["law"]["revision"]]
    score = EvalResultEntry("openai/gsm8k", "gsm8k", 0.4125, notes="5-shot")
    seen["address"] = model.push_to_hub("me/first", datasets=["them/pairs"], results=[score], private=True)
    seen["pull_request"] = model.push_to_hub("me/first", create_pr=True, commit_message="again", results=[score])

    upload("big", "llama", 7, ours, place)  # the anchor's repository moves on
    forget()
    again = calmlm.CalmForCausalLM.from_pretrained("me/first")
    auto = AutoModelForCausalLM.from_pretrained("me/first")
    seen["equal"] = [torch.equal(logits_of(found, IDS), expected) for found in (again, auto)]
    seen["words"] = AutoTokenizer.from_pretrained("me/first").get_vocab() == ours.get_vocab()

    # From a folder, with its tokenizer, its own card and results that were measured later.
    model.save_pretrained(place / "folder")
    ours.save_pretrained(place / "folder")
    card = place / "folder" / "README.md"
    card.write_text(card.read_text() + "\nMade with care.\n")
    write_results(place / "folder", [score, EvalResultEntry("cais/hle", "hle", 2)])
    write_results(place / "folder", [EvalResultEntry("cais/hle", "hle", 3)])
    calmlm.CalmForCausalLM.from_pretrained(place / "folder").push_to_hub("me/second")

    export("me/first", place / "export")
    HfApi().create_repo("me/whole")
    HfApi().upload_folder(repo_id="me/whole", folder_path=place / "export")
    os.rename(place / "export", place / "moved")
    print(json.dumps(seen), flush=True)
    sys.stdin.readline()  # the bases are taken from the hub meanwhile
    forget()
    whole = calmlm.CalmForCausalLM.from_pretrained("me/whole")
    seen["whole"] = [torch.equal(logits_of(whole, IDS), expected)]
    forget()
    moved = export("me/whole", place / "again")  # of an id whose models lie in its own repository
    forget()
    for found in (place / "moved", moved):
        seen["whole"].append(torch.equal(logits_of(calmlm.CalmForCausalLM.from_pretrained(found), IDS), expected))
    seen["errors"] = []
    for what in (
        lambda: calmlm.CalmForCausalLM.from_pretrained("me/first"),
        lambda: forget() or calmlm.CalmForCausalLM.from_pretrained("me/first", token="wrong"),
        lambda: model.push_to_hub("me/third", token="wrong"),
        lambda: model.push_to_hub("not a name"),
        lambda: model.push_to_hub("me/third", results=[EvalResultEntry("gsm8k", "gsm8k", 1)]),
        lambda: model.push_to_hub("me/third", results=[EvalResultEntry("openai/gsm8k", "gsm8k", float("nan"))]),
        lambda: calmlm.compose(tiny_model(), tiny_model("gpt2"), 2).push_to_hub("me/third"),
    ):
        try:
            what()
            seen["errors"].append(["", "nothing was raised"])
        except Exception as error:
            seen["errors"].append([type(error).__name__, str(error)])
    print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    main()
