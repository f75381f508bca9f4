"""Distributed training: rendezvous, failures and restarts of processes, DDP, FSDP and Slurm.

`detlib.engine.launch` starts or joins the processes.
"""
