"""Keys of how a training runs on its processes: TRAIN."""

TRAIN = {
    # Seconds that a process waits for the others, in a collective operation or when they meet, before it
    # gives up and the run ends.
    "TIMEOUT": 1800,
}
