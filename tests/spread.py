"""What a process does with a composition that is spread over several; see ``test_spread`` and ``test_equal_losses``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from transformers import AutoModelForCausalLM, TrainerCallback, set_seed

import calmlm
from calmlm import CalmForCausalLM, ConfigError
from calmlm.bases.fingerprint import fingerprint, has_changed
from calmlm.training import pipeline
from calmlm.training.backends import make_arguments
from calmlm.training.pipeline import save_result
from calmlm.training.run_folder import RunFolder
from calmlm.training.schema import parse_config
from readers.test_items import vision
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


# Runs


class Shards(TrainerCallback):
    """Keeps what a process holds of the trained tensors before the first step, and which of them get a gradient."""

    def __init__(self) -> None:
        self.before: dict[str, torch.Tensor] = {}
        self.learns: dict[str, bool] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.before = {name: _local(p).detach().clone() for name, p in _trained(model)}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for name, p in _trained(model):
            found = None if p.grad is None else _local(p.grad)
            self.learns[name] = self.learns.get(name, False) or (
                found is not None and bool(found.isfinite().all()) and (not found.numel() or bool(found.any()))
            )


def _trained(model: Any) -> list[tuple[str, torch.Tensor]]:
    return [(name.removeprefix("module."), p) for name, p in model.named_parameters() if p.requires_grad]


def _local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def take_cpus_for_gpus() -> None:
    """Let accelerate use FSDP in processes without GPUs, which it never does by itself."""
    begin = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init  # type: ignore[method-assign]


def run(values: dict[str, Any], *, resume: bool = False) -> dict[str, Any]:
    """One training in this process, or its part of one; its losses, its ``Shards`` and the trainer's kind."""
    seen, made = Shards(), []
    make = pipeline.make_trainer

    def watched(*args: Any) -> Any:
        if os.environ.get("EMPTY_BUT_IN_THE_FIRST") and os.environ["RANK"] != "0":
            with torch.no_grad():
                for parameter in args[1].model.connectors.parameters():
                    parameter.fill_(torch.nan)
        made.append(make(*args))
        made[-1].add_callback(seen)
        return made[-1]

    pipeline.make_trainer = watched
    try:
        train = train_encoder if values.get("encoder") else pipeline.train
        config = values if values.get("encoder") else parse_config(values)
        train(config, resume=resume, report=lambda line: None)
    finally:
        pipeline.make_trainer = make
        AcceleratorState._reset_state(reset_partial_state=True)
        if dist.is_initialized():
            dist.destroy_process_group()
    losses = [entry["loss"] for entry in made[-1].state.log_history if "loss" in entry]
    return {"losses": losses, "before": seen.before, "learns": seen.learns, "kind": type(made[-1].model).__name__}


class WithPixels:
    """A collator that gives each row an image, which its first token decides on."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def __call__(self, rows: Any) -> dict[str, Any]:
        batch = dict(self.collate(rows))
        items = [torch.full((1, 8, 8), (row["input_ids"][0] % 7) / 7).tril() for row in rows]
        return batch | {"augmenting_inputs": {"eyes": {"pixel_values": torch.stack(items)}}}


def train_encoder(values: dict[str, Any], *, resume: bool, report: Any) -> None:
    """What ``calmlm train`` does, for an encoder, which it refuses: there is no data for it."""
    folder = RunFolder(Path(values["output"]))
    arguments = make_arguments("trainer", values["trainer"], folder, evaluates=False)
    set_seed(arguments.seed)
    anchor = AutoModelForCausalLM.from_pretrained(values["model"]["anchor"])
    model = calmlm.compose(anchor, {"eyes": vision()}, 2)
    ids = tiny_tokens(12, 7, seed=5).tolist()
    rows = [{"input_ids": row[: 4 + index % 4], "labels": row[: 4 + index % 4]} for index, row in enumerate(ids)]
    trainer = pipeline.make_trainer("trainer", model, arguments, tiny_tokenizer(), rows, None, folder)
    trainer.data_collator = WithPixels(trainer.data_collator)
    trainer.train()


def part(rank: int, world: int, folder: str, runs: dict[str, dict[str, Any]], environment: dict[str, str]) -> None:
    """One process of several, which go through all of these trainings; writes down what it has seen of each."""
    torch.set_num_threads(1)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {name: str(number) for name, number in numbers.items()} | environment
    os.environ |= {"MASTER_ADDR": "localhost", "HF_HUB_OFFLINE": "1"}
    take_cpus_for_gpus()
    for place, (name, values) in enumerate(runs.items()):
        os.environ["MASTER_PORT"] = str(int(environment["PORT"]) + place)
        torch.save(run(values, resume=values.pop("resume", False)), Path(folder) / f"{name}-{rank}.pt")
