import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from detlib.utils import comm

pytestmark = pytest.mark.distributed


def test_single_process():
    assert (comm.get_world_size(), comm.get_rank(), comm.get_local_rank(), comm.get_local_size()) == (
        1,
        0,
        0,
        1,
    )
    assert comm.is_main_process()
    assert comm.all_gather("a") == comm.gather("a") == ["a"]
    values = {"loss": torch.tensor(2.0)}
    assert comm.reduce_dict(values) is values
    comm.synchronize()
    assert comm.agree_on_max(5) == 5
    np.random.seed(3)
    first = comm.shared_random_seed()
    np.random.seed(3)
    assert comm.shared_random_seed() == first and 0 <= first < 2**31
    model = torch.nn.Linear(1, 1)
    assert comm.unwrap(model) is comm.unwrap(torch.nn.DataParallel(model)) is model
    with pytest.raises(RuntimeError, match="create_local_process_group"):
        comm.get_local_process_group()


def _work(rank, rendezvous_file, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous_file}", rank=rank, world_size=2)
    comm.create_local_process_group(1)
    np.random.seed(rank)
    losses = {"b": torch.tensor(float(rank)), "a": torch.tensor(10.0 * rank)}
    reduced = comm.reduce_dict(losses if rank == 0 else dict(reversed(losses.items())))
    summed = comm.reduce_dict(losses, average=False)
    comm.synchronize()
    model = torch.nn.Linear(1, 1)
    result = {
        "unwrapped": comm.unwrap(torch.nn.parallel.DistributedDataParallel(model)) is model,
        "rank": (comm.get_rank(), comm.get_world_size(), comm.is_main_process()),
        "local": (comm.get_local_rank(), comm.get_local_size()),
        "all_gather": comm.all_gather({"rank": rank, "text": "x" * rank}),
        "local_gather": comm.all_gather(rank, group=comm.get_local_process_group()),
        "gather": comm.gather([rank], dst=1),
        "seed": comm.shared_random_seed(),
        "max": comm.agree_on_max(10 - rank),
        "reduced": {k: v.item() for k, v in reduced.items()},
        "summed": {k: v.item() for k, v in summed.items()},
    }
    try:
        comm.create_local_process_group(1)
    except RuntimeError as error:
        result["twice"] = str(error)
    queue.put((rank, result))
    comm.synchronize()
    comm.shutdown()


def test_two_processes(tmp_path):
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    mp.start_processes(_work, args=(str(tmp_path / "rendezvous"), queue), nprocs=2, start_method="spawn")
    results = dict(queue.get() for _ in range(2))
    assert [results[r]["rank"] for r in (0, 1)] == [(0, 2, True), (1, 2, False)]
    assert [results[r]["local"] for r in (0, 1)] == [(0, 1), (0, 1)]  # one process on each "machine"
    gathered = [{"rank": 0, "text": ""}, {"rank": 1, "text": "x"}]
    assert results[0]["all_gather"] == results[1]["all_gather"] == gathered
    assert [results[r]["local_gather"] for r in (0, 1)] == [[0], [1]]
    assert [results[r]["gather"] for r in (0, 1)] == [[], [[0], [1]]]
    np.random.seed(0)
    assert results[0]["seed"] == results[1]["seed"] == np.random.randint(2**31)
    assert results[0]["reduced"] == {"a": 5.0, "b": 0.5}
    assert results[0]["summed"] == {"a": 10.0, "b": 1.0}
    assert results[0]["max"] == results[1]["max"] == 10
    assert results[0]["unwrapped"] and results[1]["unwrapped"]
    assert "twice" in results[0] and "twice" in results[1]
