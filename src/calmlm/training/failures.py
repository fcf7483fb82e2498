"""What ends a training from outside, in one sentence: a full disk, a lost worker, a lost process."""

from __future__ import annotations

import time
import traceback

import torch

from calmlm.errors import CalmError, is_full
from calmlm.training.run_folder import RunFolder

__all__ = ["reason_outside"]

LOST_PEERS = ("closed by peer", "reset by peer", "Connection refused", "Broken pipe", "Timed out waiting", "NCCL")


SETTLING = 0.5
"""Seconds within which the system tells of a worker whose connection broke."""


def reason_outside(error: BaseException, folder: RunFolder) -> CalmError | None:
    """What to raise in place of an error that has its cause outside of the training; None for any other one.

    Args:
        error: what a trainer raised.
        folder: of the run.
    """
    try:
        if _is_cut_off(error):
            time.sleep(SETTLING)
        return sentence_for(error, folder)
    except RuntimeError as late:  # PyTorch tells of a lost worker in whatever runs when the system does
        return sentence_for(late, folder)


def sentence_for(error: BaseException, folder: RunFolder) -> CalmError | None:
    """The sentence alone; None for an error of the training's own."""
    then = folder.way_on()
    reason = " ".join(str(error).split())[:200].rstrip(". ")
    if is_full(error):
        return CalmError(f"Expected room for the run in {folder.path}, but the disk is full: free some, then {then}.")
    if "DataLoader worker (pid" in reason or _is_cut_off(error):
        return CalmError(
            f"Expected the workers that load data to last, but one is lost ({reason}): lower "
            f"trainer.dataloader_num_workers or give the machine more memory, then {then}."
        )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        kinds = (torch.distributed.DistBackendError, torch.distributed.DistNetworkError)
        peers = isinstance(error, RuntimeError) and any(sign in reason for sign in LOST_PEERS)
        if isinstance(error, kinds) or peers:
            return CalmError(
                f"Expected all processes to last, but the connection to another one is lost ({reason}): look at what "
                f"that one said last, then {then}."
            )
    return None


def _is_cut_off(error: BaseException) -> bool:
    """Whether a worker was lost while it was handing over a batch."""
    cut = isinstance(error, (ConnectionError, EOFError, FileNotFoundError))
    frames = traceback.extract_tb(error.__traceback__)
    return cut and any(frame.filename.endswith("torch/utils/data/dataloader.py") for frame in frames)
