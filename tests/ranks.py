"""Processes that serve as the ranks of process groups, for tests of several ranks on one machine."""
import os
import socket
import traceback
from multiprocessing import get_context

import torch

from kilonb.core.errors import KiloError
from kilonb.training.parallel import World, join

QUIET = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def free_port() -> int:
    with socket.socket() as endpoint:
        endpoint.bind(("127.0.0.1", 0))
        return endpoint.getsockname()[1]


def serve(pipe):
    torch.set_num_threads(1)
    while (job := pipe.recv()) is not None:
        function, world, arguments = job
        try:
            with join(world): answer = function(world, *arguments)
        except (KiloError, KeyboardInterrupt) as error: answer = f"{type(error).__name__}: {error}"
        except BaseException: answer = traceback.format_exc()
        pipe.send(answer)


class Ranks:
    """Spawned processes (numba's threads do not survive a fork) that take jobs; a killed one is started again."""

    def __init__(self, count: int):
        self.pipes, self.processes = [None] * count, [None] * count
        before = {name: os.environ.get(name) for name in QUIET}
        os.environ.update(QUIET)
        try:
            for rank in range(count): self.start(rank)
        finally:
            for name, value in before.items():
                if value is None: del os.environ[name]
                else: os.environ[name] = value

    def start(self, rank: int) -> None:
        context = get_context("spawn")
        self.pipes[rank], theirs = context.Pipe()
        self.processes[rank] = context.Process(target=serve, args=(theirs,), daemon=True)
        self.processes[rank].start()
        theirs.close()

    def run(self, function, size: int, *arguments, timeout_s: float = 120.0, patience_s: float = 240.0) -> list:
        """What `function(world, *arguments)` returns on each of `size` ranks; its error as text; None where it was
        killed."""
        port, answers = free_port(), []
        for rank in range(size):
            self.pipes[rank].send((function, World(rank, size, rank, port=port, timeout_s=timeout_s), arguments))
        for rank in range(size):
            try:
                assert self.pipes[rank].poll(patience_s), f"rank {rank} of {size} has not answered in {patience_s} s"
                answers.append(self.pipes[rank].recv())
            except EOFError:
                answers.append(None)
                self.start(rank)
        return answers

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes):
            pipe.send(None)
            process.join(10)
