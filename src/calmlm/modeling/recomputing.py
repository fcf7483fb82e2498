"""Which activations of a checkpointed layer are kept for backward, and which are computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as partitioning  # where torch.compile is told what to keep; it has no public name
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.flop_counter import flop_registry

from calmlm.errors import ConfigError

__all__ = ["KEEP", "MATMULS", "keeping_compiled", "with_kept"]

KEEP = "keep"
"""The key of ``activation_checkpointing_kwargs`` that says what is kept; without it, nothing is."""
MATMULS = "matmuls"
# PyTorch counts no operations of these.
_UNCOUNTED = {
    getattr(torch.ops.aten, name)
    for name in ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math", "_grouped_mm")
    if hasattr(torch.ops.aten, name)
}


def _is_dear(op: Any) -> bool:
    """Whether an operation is a matrix product or attention; all else is cheap to compute again."""
    packet = getattr(op, "overloadpacket", op)
    return packet in flop_registry or packet in _UNCOUNTED


def _policy(context: Any, op: Any, *args: Any, **named: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _is_dear(op) else CheckpointPolicy.PREFER_RECOMPUTE


class _Watching(TorchDispatchMode):
    """Raises where a kept result is written over: the layer would be computed again from something else."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: set[int] = set()  # PyTorch holds these storages, so that no other takes their place

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for place, argument in enumerate(func._schema.arguments):
            written = argument.alias_info is not None and argument.alias_info.is_write
            given = args[place] if place < len(args) else (kwargs or {}).get(argument.name)
            if written and isinstance(given, Tensor) and given.untyped_storage()._cdata in self.kept:
                raise ConfigError(
                    f"activation_checkpointing_kwargs: expected a model for keep: {MATMULS} that leaves its matrix "
                    f"products as they are, but this anchor writes over them; leave keep out."
                )
        made = func(*args, **(kwargs or {}))
        if _is_dear(func):
            self.kept |= {t.untyped_storage()._cdata for t in tree_leaves(made) if isinstance(t, Tensor)}
        return made


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Those of a layer that runs, and of one that runs again."""
    keeping, again = create_selective_checkpoint_contexts(_policy)

    @contextmanager
    def watched() -> Iterator[None]:
        with keeping, _Watching():
            yield

    return watched(), again


def with_kept(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """A checkpointing function in which ``keep="matmuls"`` has its meaning; others come back as they are.

    Results of matrix products and attention are kept, and everything between them is computed again, which takes no
    products at all.

    Args:
        checkpoint: ``partial(torch.utils.checkpoint.checkpoint, **kwargs)``, as transformers makes it.

    Raises:
        ConfigError: for another value of ``keep``, or with ``use_reentrant``, which keeps nothing.
    """
    options = dict(getattr(checkpoint, "keywords", {}))
    if KEEP not in options:
        return checkpoint
    wanted = options.pop(KEEP)
    if wanted != MATMULS or options.get("use_reentrant"):
        raise ConfigError(
            f"activation_checkpointing_kwargs: expected keep: {MATMULS} without use_reentrant, but got keep: {wanted}"
            f"{' with use_reentrant: true' if options.get('use_reentrant') else ''}; leave one of them out."
        )
    options["use_reentrant"] = False
    function: Any = checkpoint
    keeping = partial(function.func, **options, context_fn=_contexts)

    def layer_of(run: Callable[..., Any], *args: Any) -> Any:
        # torch's compiler looks at all layers at once, and cannot look into a checkpointed one that writes states down.
        return run(*args) if torch.compiler.is_compiling() else keeping(run, *args)

    return layer_of


def keeping_compiled() -> AbstractContextManager[None]:
    """While torch compiles a model, give ``keep="matmuls"`` its meaning there.

    By itself the compiler keeps whatever is the fastest. Here it computes again all that takes no matrix product and no
    attention.
    """
    manager: AbstractContextManager[None] = partitioning.patch(aggressive_recomputation=True)
    return manager
