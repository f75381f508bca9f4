"""Repeatedly kill a process while it saves checkpoints, and resume from its last checkpoint.

    python kill_while_saving.py FOLDER NUMBER_OF_KILLS {sync,async}

Prints the last iteration. Every parameter has the number of its iteration as value, which reveals a mixture
of iterations.
"""

import os
import random
import signal
import sys
import time

import torch
from torch import nn

from detlib.checkpoint import DetectionCheckpointer, PeriodicCheckpointer


class Counter:
    def __init__(self):
        self.iteration = -1

    def state_dict(self):
        return {"iteration": self.iteration}

    def load_state_dict(self, state):
        self.iteration = state["iteration"]


def train_forever(folder: str, async_save: bool, started: int) -> None:
    model, counter = nn.Linear(200, 200), Counter()
    checkpointer = DetectionCheckpointer(model, folder, async_save=async_save, trainer=counter)
    saver = PeriodicCheckpointer(checkpointer, period=1, max_to_keep=2)
    checkpointer.add_checkpointable("saver", saver)
    checkpointer.resume_or_load("", resume=True)
    if counter.iteration >= 0:
        wrong = [p for p in model.parameters() if not (p == counter.iteration).all()]
        if wrong:
            os._exit(3)
    os.write(started, b"x")
    while True:
        counter.iteration += 1
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(counter.iteration)
        saver.step(counter.iteration)


def main(folder: str, kills: int, mode: str) -> None:
    torch.set_num_threads(1)
    rng = random.Random(0)
    for kill in range(kills):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                train_forever(folder, mode == "async", writer)
            finally:
                os._exit(4)
        os.close(writer)
        os.read(reader, 1)  # wait until the child has resumed
        os.close(reader)
        time.sleep(rng.uniform(0, 0.08))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            raise SystemExit(f"after {kill} kills, resuming failed from {os.listdir(folder)}")
    model, counter = nn.Linear(200, 200), Counter()
    DetectionCheckpointer(model, folder, trainer=counter).resume_or_load("", resume=True)
    print(f"{kills} kills, iteration {counter.iteration}, {len(os.listdir(folder))} files")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
