"""Random numbers of a training step that depend on its number alone."""

import random

import numpy as np
import torch

__all__ = ["seed_step"]


def seed_step(seed: int, iteration: int, rank: int = 0) -> None:
    """Seeds Python's, numpy's and torch's generators for one step of one process.

    A run that is interrupted and resumed thus draws what it would have drawn anyway, and what hooks draw
    between two steps, as evaluations do, changes nothing.

    Args:
        seed: of the whole run.
        iteration: the step's number.
        rank: the process's.
    """
    low, high = np.random.SeedSequence([seed, iteration, rank]).generate_state(2, np.uint64)
    random.seed(int(low))
    np.random.seed(int(low) % 2**32)
    # torch.manual_seed looks for every sort of device there might be, which takes half a millisecond.
    torch.default_generator.manual_seed(int(high) % 2**63)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(int(high) % 2**63)
    elif torch.backends.mps.is_available():
        torch.mps.manual_seed(int(high) % 2**63)
