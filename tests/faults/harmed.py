"""The scripts in processes of their own, which something happens to: they are killed, or a write of theirs fails."""

import builtins
import importlib
import io
import multiprocessing
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

from errors import run_script

PROCESSES = multiprocessing.get_context("forkserver")  # torch is imported once, and each process forked from there
PROCESSES.set_forkserver_preload(["harmed", "train_vit", "train_generator", "torch._dynamo"])


class Fault(NamedTuple):
    """What happens to the operations that write below a folder: open, write, fsync, rename, and so on.

    Before operation number `at`, counted from 0, the process kills itself with -9, or if `error` is given (an errno),
    this operation raises it, and if `lasting` so does each one after it. All are noted in the file `log`, one per line,
    and each fsync takes so many seconds.
    """

    folder: str
    at: int | None = None
    error: int | None = None
    lasting: bool = False
    log: str | None = None
    seconds: float = 0

    def install(self):
        count = 0

        def before(name, path):
            nonlocal count
            if not os.path.abspath(os.fspath(path)).startswith(self.folder):
                return
            number, count = count, count + 1
            if self.log:
                with real_open(self.log, "a") as file:
                    print(name, os.path.basename(path), file=file)
            if self.at is not None and (number == self.at or number > self.at and self.lasting):
                if self.error is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(self.error, os.strerror(self.error), path)

        class Raw(io.FileIO):
            def write(self, data):
                before("write", self.name)
                return super().write(data)

        def open_harmed(path, mode="r", buffering=-1, *args, **options):
            if isinstance(path, int) or not set(mode) & set("wax+"):
                return real_open(path, mode, buffering, *args, **options)
            before("open", path)
            raw = Raw(path, mode.replace("b", "").replace("t", ""))
            if buffering == 0:
                return raw
            file = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
            return file if "b" in mode else io.TextIOWrapper(file, *args, **options)

        def harm(name, function):
            def harmed(path, *args, **options):
                before(name, path)
                return function(path, *args, **options)

            return harmed

        real_open, real_fsync = builtins.open, os.fsync
        builtins.open = open_harmed
        for name in ("replace", "mkdir", "unlink"):
            setattr(os, name, harm(name, getattr(os, name)))

        def fsync(file):
            before("fsync", os.readlink(f"/proc/self/fd/{file}"))
            time.sleep(self.seconds)
            return real_fsync(file)

        os.fsync = fsync


def call(script, argv, output, fault):
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    multiprocessing.set_start_method(None, force=True)  # the system's own, as for a user, not that of this process
    if fault:
        fault.install()
    run_script(partial(importlib.import_module(script).main, list(map(str, argv))))


def started(script, argv, output, fault=None):
    """A process that runs a script, its output appended to a file."""
    process = PROCESSES.Process(target=call, args=(script, argv, str(output), fault))
    process.start()
    return process


def children(pid):
    """The ids of the processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
