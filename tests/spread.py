"""What a process does with a composition that is spread over several; see ``test_spread``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from calmlm import CalmForCausalLM, ConfigError
from calmlm.bases.fingerprint import fingerprint, has_changed
from calmlm.training.pipeline import save_result
from tiny import tiny_tokenizer, tiny_tokens

IDS = tiny_tokens(4, 7)


def train_one_step(model: Any) -> None:
    """On the same rows in all processes, so that the result is that of one process."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    model.eval()


def sharded(model: CalmForCausalLM) -> Any:
    """Under FSDP2, as accelerate does it; it never does so by itself on CPUs."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[type(model.model.backbone().layers[0]).__name__],
        cpu_ram_efficient_loading=False,
    )
    state = SimpleNamespace(fsdp_plugin=plugin)
    accelerator = SimpleNamespace(state=state, mixed_precision="no", device=torch.device("cpu"), is_main_process=True)
    return fsdp2_prepare_model(accelerator, model)


KINDS: dict[str, Callable[[CalmForCausalLM], Any]] = {
    "fsdp2": sharded,
    "ddp": torch.nn.parallel.DistributedDataParallel,
}


def refusal(call: Callable[[], object]) -> str:
    """The sentence with which a call is refused, or nothing."""
    try:
        call()
    except ConfigError as error:
        return str(error)
    return ""


def work(rank: int, world: int, kind: str, folder: str) -> None:
    """Train the composition in ``start`` one step, save it as ``calmlm train`` does, and write down what was seen."""
    torch.set_num_threads(1)
    here = Path(folder)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    try:
        model = CalmForCausalLM.from_pretrained(here / "start")
        mark, counts = fingerprint(model.anchor), model.get_nb_trainable_parameters()
        wrapped = KINDS[kind](model)
        train_one_step(wrapped)
        trainer = SimpleNamespace(
            model_wrapped=wrapped,
            is_world_process_zero=lambda: rank == 0,
            accelerator=SimpleNamespace(wait_for_everyone=dist.barrier),
        )
        save_result(trainer, model, tiny_tokenizer(), here / "result")
        own, alone = model.state_dict(), here / f"alone-{rank}"
        refused = {
            "save_pretrained": refusal(lambda: model.save_pretrained(alone)),
            "state_dict": refusal(lambda: model.save_pretrained(alone, state_dict=own)),
            "composition_tensors": refusal(model.composition_tensors),
        }
        seen = {
            "refused": refused,
            "written": alone.exists(),
            "changed": has_changed(model.anchor, mark),
            "same shapes": fingerprint(model.anchor)["shapes"] == mark["shapes"],
            "same counts": model.get_nb_trainable_parameters() == counts,
        }
        (here / f"seen-{rank}.json").write_text(json.dumps(seen))
    finally:
        dist.destroy_process_group()
