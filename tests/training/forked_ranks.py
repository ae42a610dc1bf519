"""Training by several processes that talk over gloo, forked from the test so that nothing is imported again."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Sequence
from pathlib import Path

import pytest

from musubi_tuner.ltx2_train_network import main as train

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, to be quick")


def train_by_ranks(argv: Sequence[str], world_size: int, log: Path) -> None:
    """Run the training script in ``world_size`` processes of one group; what they print goes to ``log``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = []
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            os.environ |= group | {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
            _train_and_leave(argv, log)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert codes == [0] * world_size, log.read_text(encoding="utf-8")[-3000:]


def _train_and_leave(argv: Sequence[str], log: Path) -> None:
    # os._exit: the child must not run what pytest has planned for the end of its own process.
    from accelerate.state import AcceleratorState

    status = 70
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        AcceleratorState._reset_state(reset_partial_state=True)  # of a run that the test's process had before
        train(list(argv))
        status = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(status)
