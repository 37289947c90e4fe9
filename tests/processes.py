"""The command line in processes forked from a server that has imported the package once."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["lightning_fabric", "overfly.adaptation.pipeline", "overfly.training.trainer"])


def _main(arguments: list[str], variables: dict[str, str], module: str, output: Path) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    importlib.import_module("small_network")
    importlib.import_module(module)
    sys.stdout = output.open("w")
    importlib.import_module("overfly.cli").main([*arguments, "--device", "cpu", "--quiet"])


def start(
    *arguments: str | Path, out: Path, world: int = 1, machines: int = 1, module: str = "os"
) -> list[BaseProcess]:
    """Start a command as torchrun does, in ``world`` processes; each writes what it prints to ``out``/RANK.txt.

    Args:
        arguments: of the command line, without device and output folder.
        out: output folder of the command.
        world: number of processes.
        machines: number of machines that the processes believe to run on.
        module: imported first, for the classes that it registers.
    """
    out.mkdir(exist_ok=True)
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = opened.getsockname()[1]
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": world, "TORCHELASTIC_RUN_ID": "test",
                 "LOCAL_WORLD_SIZE": world // machines}  # fmt: skip
    processes: list[BaseProcess] = []
    for rank in range(world):
        group, local = divmod(rank, world // machines)
        ranks = {"RANK": rank, "LOCAL_RANK": local, "GROUP_RANK": group}
        environment = {name: str(value) for name, value in (variables | ranks).items()} if world > 1 else {}
        command = [*map(str, arguments), "--out", str(out)]
        processes.append(SERVER.Process(target=_main, args=(command, environment, module, out / f"{rank}.txt")))
        processes[-1].start()
    return processes


def run(*arguments: str | Path, out: Path, world: int = 1, machines: int = 1, module: str = "os") -> list[str]:
    """Start a command, wait until its processes succeed, and return what each has printed."""
    processes = start(*arguments, out=out, world=world, machines=machines, module=module)
    for process in processes:
        process.join(300)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * world
    return [(out / f"{rank}.txt").read_text() for rank in range(world)]
