"""How processes that torchrun has started anew tell this start from the ones before."""

import json
import os
import time

import torch.distributed as dist

__all__ = ["agree_on_round"]


def agree_on_round(store: dist.Store, rank: int, world_size: int, timeout: float) -> dist.Store:
    """Returns a part of the store that only the processes of this start use. All of them call it.

    torchrun's store outlives restarts, with all that was written into it, and its counter of restarts may
    differ between machines. So rank 0 draws a name, every process answers with one of its own, and rank 0
    confirms these. Who has answered to the name of an earlier start is not confirmed, and asks again.

    Args:
        store: the store that all starts share.
        rank: of this process.
        world_size: number of processes.
        timeout: seconds to wait for the others.

    Raises:
        RuntimeError: if some do not come, naming them in rank 0.
    """
    end = time.monotonic() + timeout
    own = os.urandom(8).hex()
    if rank == 0:
        store.set("detlib_round", own)
        answers = {f"detlib_answer/{own}/{r}": r for r in range(1, world_size)}
        while missing := [r for key, r in answers.items() if not store.check([key])]:
            _pause(end, f"processes {missing} of {world_size} have not come")
        store.set(f"detlib_confirmed/{own}", json.dumps([store.get(key).decode() for key in answers]))
        return dist.PrefixStore(own, store)
    name = ""
    while True:
        if store.check(["detlib_round"]) and (latest := store.get("detlib_round").decode()) != name:
            name = latest
            store.set(f"detlib_answer/{name}/{rank}", own)
        confirmed = f"detlib_confirmed/{name}"
        if name and store.check([confirmed]) and own in json.loads(store.get(confirmed)):
            return dist.PrefixStore(name, store)
        _pause(end, "process 0 has not confirmed that all have come")


def _pause(end: float, waiting_for: str) -> None:
    if time.monotonic() > end:
        raise RuntimeError(f"{waiting_for} in time (TRAIN.TIMEOUT)")
    time.sleep(0.02)
