"""Slurm jobs with submitit: submitted from the command line, requeued at their time limit.

    tools/train_net.py --slurm --slurm-partition gpu --num-gpus 8 --num-machines 2 --config-file ...
    python -m detlib.engine.distributed.slurm --slurm-partition gpu --num-gpus 8 my_script.py ARGUMENTS

Each GPU gets one task. Shortly before the job's time limit, or when it is preempted, Slurm sends a signal.
The training run then saves a checkpoint after the current step and the job is requeued; when it starts again,
it resumes. This needs the package submitit (``pip install detlib[slurm]``).
"""

import argparse
import logging
import os
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from detlib.engine.distributed.environment import job_port
from detlib.engine.distributed.interrupt import StopTraining, request_stop

__all__ = ["SlurmJob", "add_slurm_arguments", "submit", "submit_script"]

logger = logging.getLogger(__name__)

# Seconds from the signal to the end of the job, and how many of them the step and its checkpoint may take.
_SIGNAL_DELAY = 120
_TIME_TO_SAVE = 90


def _import_submitit():
    try:
        import submitit
    except ImportError as e:
        raise ImportError("Slurm jobs need the package submitit: pip install detlib[slurm]") from e
    return submitit


class SlurmJob:
    """A callable that runs a script in each task of a job; submitit pickles it and calls it there."""

    def __init__(self, script: str, argv: Sequence[str], restarts: int = 0):
        """
        Args:
            script: path of the script, which calls `detlib.engine.launch`.
            argv: arguments of the script.
            restarts: how often the job was requeued.
        """
        self.script = os.path.abspath(script)
        self.argv = list(argv)
        self.restarts = restarts
        self._requeue: Any = None
        self._pid = 0

    def __call__(self) -> None:
        """Run the script.

        Raises:
            RuntimeError: if the script exits with a code other than 0.
        """
        self._set_environment()
        signum = self._take_over_signals()
        sys.argv = [self.script, *self.argv]
        sys.path.insert(0, os.path.dirname(self.script))
        try:
            runpy.run_path(self.script, run_name="__main__")
        except StopTraining as stop:
            if stop.signum != signum:
                raise
            self._requeue(signum, None)
            # Only the first task requeues the job, and exits in doing so. An error code of another task could
            # end the job before that.
            sys.exit(0)
        except SystemExit as end:
            if end.code not in (None, 0):
                raise RuntimeError(f"{self.script} exited with code {end.code}, see the log above") from end
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def checkpoint(self) -> Any:
        """Return the submission that submitit runs when the job starts again."""
        again = SlurmJob(self.script, self.argv, self.restarts + 1)
        return _import_submitit().helpers.DelayedSubmission(again)

    def _set_environment(self) -> None:
        """Set the environment variables from which `launch` reads the rank of this process."""
        job = _import_submitit().JobEnvironment()
        host = job.hostnames[0] if job.num_nodes > 1 else "127.0.0.1"
        os.environ.update(
            RANK=str(job.global_rank),
            WORLD_SIZE=str(job.num_tasks),
            LOCAL_RANK=str(job.local_rank),
            LOCAL_WORLD_SIZE=str(job.num_tasks // job.num_nodes),
            MASTER_ADDR=host,
            MASTER_PORT=str(job_port(int(job.raw_job_id))),
            DETLIB_RESTART_COUNT=str(self.restarts),
        )

    def _take_over_signals(self) -> int:
        """Handle submitit's signal ourselves; submitit would requeue the job without a checkpoint."""
        signum = getattr(signal, "SIG" + os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2"))
        self._requeue = signal.getsignal(signum)
        self._pid = os.getpid()

        def on_signal(signum: int, frame) -> None:
            if os.getpid() != self._pid:
                return  # a data-loader worker, forked with this handler
            logger.warning("The job is close to its time limit: stopping after this step to requeue the job")
            request_stop(signum)
            signal.setitimer(signal.ITIMER_REAL, _TIME_TO_SAVE)

        def on_alarm(_: int, frame) -> None:
            logger.warning("The step did not end in time: the job will resume from its last checkpoint")
            self._requeue(signum, frame)

        signal.signal(signum, on_signal)
        signal.signal(signal.SIGALRM, on_alarm)
        # submitit ignores SIGTERM. Here it ends the job, with a checkpoint and without a requeue.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return signum


def add_slurm_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments ``--slurm...``; ``--num-gpus`` and ``--num-machines`` set the size of the job."""
    group = parser.add_argument_group(
        "Slurm", "run as a Slurm job that is requeued and resumes (needs submitit)"
    )
    group.add_argument("--slurm", action="store_true", help="submit a Slurm job that runs this command")
    group.add_argument("--slurm-partition", metavar="NAME", help="partition of the job")
    group.add_argument(
        "--slurm-timeout-min",
        type=int,
        default=1440,
        metavar="MINUTES",
        help="time limit of the job, after which it is requeued",
    )
    group.add_argument(
        "--slurm-max-requeues", type=int, default=20, metavar="N", help="maximum number of requeues"
    )
    group.add_argument("--slurm-cpus-per-gpu", type=int, default=8, metavar="N", help="CPU cores per process")
    group.add_argument("--slurm-mem-gb", type=float, metavar="GB", help="memory per machine")
    group.add_argument(
        "--slurm-folder", metavar="FOLDER", help="folder of the logs; default OUTPUT_DIR/slurm"
    )
    group.add_argument(
        "--slurm-arg",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="further option of sbatch, such as account=vision; can be repeated",
    )
    group.add_argument(
        "--slurm-cluster",
        choices=("slurm", "local"),
        default="slurm",
        help="local runs the job on this machine without Slurm, to try it out",
    )


def _parse_extra(pairs: Sequence[str]) -> dict[str, str]:
    extra = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise ValueError(f"--slurm-arg must be KEY=VALUE, such as account=vision; got {pair!r}")
        extra[key.lstrip("-").replace("-", "_")] = value
    return extra


def submit(script: str, argv: Sequence[str], args: argparse.Namespace, *, folder: str, use_gpus: bool = True):
    """Submit a job that runs a script with one process per GPU.

    Args:
        script: path of the script, which calls `detlib.engine.launch`.
        argv: arguments of the script.
        args: parsed arguments of `add_slurm_arguments`, with ``num_gpus`` and ``num_machines``.
        folder: folder of the logs, unless ``args.slurm_folder`` is set. All machines must have access to it.
        use_gpus: False requests CPUs only.

    Returns:
        submitit's job.

    Raises:
        ImportError: if submitit is not installed.
        ValueError: if an argument is invalid.
        RuntimeError: if Slurm is not available.
    """
    submitit = _import_submitit()
    extra = _parse_extra(args.slurm_arg)
    executor = submitit.AutoExecutor(
        folder=args.slurm_folder or folder,
        cluster=args.slurm_cluster,
        slurm_max_num_timeout=args.slurm_max_requeues,
        local_max_num_timeout=args.slurm_max_requeues,
    )
    parameters: Mapping[str, Any] = dict(
        name="detlib",
        nodes=args.num_machines,
        tasks_per_node=args.num_gpus,
        gpus_per_node=args.num_gpus if use_gpus else 0,
        cpus_per_task=args.slurm_cpus_per_gpu,
        mem_gb=args.slurm_mem_gb,
        timeout_min=args.slurm_timeout_min,
        slurm_partition=args.slurm_partition,
        slurm_signal_delay_s=_SIGNAL_DELAY,
        slurm_additional_parameters=extra or None,
    )
    executor.update_parameters(**{key: value for key, value in parameters.items() if value is not None})
    return executor.submit(SlurmJob(script, argv))


def submit_script(argv: Sequence[str] | None = None):
    """Run the command line ``python -m detlib.engine.distributed.slurm [--slurm-...] SCRIPT ARGUMENTS``."""
    parser = argparse.ArgumentParser(
        prog="python -m detlib.engine.distributed.slurm",
        description="Run a training script as a Slurm job.",
    )
    parser.add_argument("--num-gpus", type=int, default=1, help="GPUs, and thus processes, per machine")
    parser.add_argument("--num-machines", type=int, default=1, help="number of machines")
    parser.add_argument("--cpu", action="store_true", help="request no GPUs: --num-gpus counts processes")
    add_slurm_arguments(parser)
    parser.add_argument("script", help="a script that calls detlib.engine.launch")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the script")
    args = parser.parse_args(argv)
    try:
        if not os.path.isfile(args.script):
            raise FileNotFoundError(f"Script not found: {args.script}")
        job = submit(args.script, args.arguments, args, folder="slurm", use_gpus=not args.cpu)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(f"Submitted job {job.job_id}; its logs go to {job.paths.folder}")
    return job


if __name__ == "__main__":
    # By its full name: the job is pickled, and definitions of __main__ could not be unpickled.
    from detlib.engine.distributed.slurm import submit_script as _submit_script

    _submit_script()
