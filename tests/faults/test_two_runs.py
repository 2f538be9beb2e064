"""Two runs on one folder: the second says who holds it, and takes over when that one has died."""

import re
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY

import train_vit
from errors import UserError
from training.folder import lock, unlock

pytest.importorskip("fcntl")  # Windows has no such locks


def test_a_folder_belongs_to_one_run_until_that_dies(folder_flags, tmp_path, capsys, tried):
    flags = [*folder_flags, "--run-name", "mine", "--epochs", "5000", "--save-minutes", "0.001"]
    folder = tmp_path / "runs" / "mine"
    first = subprocess.Popen([sys.executable, "train_vit.py", *flags], cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    try:
        while first.poll() is None and not (folder / "last.pt").exists():
            time.sleep(0.05)
        for again in (["--resume", "auto"], ["--overwrite"]):
            with pytest.raises(UserError, match=rf"mine: another run writes to it \(process {first.pid} on .*\)"):
                train_vit.main([*flags, *again])
            tried("a second run on one folder")
        assert first.poll() is None and (folder / "last.pt").exists()
    finally:
        first.kill()
        first.wait()
    capsys.readouterr()
    train_vit.main([*flags, "--resume", "auto", "--minutes", "0.001"])
    assert re.search(r"last(.prev)?.pt: vit .*\n(.*\n)*stopped ", capsys.readouterr().out)


def test_a_process_keeps_a_folder_through_several_runs(tmp_path):
    """As in a notebook, which also goes on with a run of its own that ended in an exception."""
    from_elsewhere = f"from training.folder import lock; lock({str(tmp_path / 'run')!r})"

    def refused():
        command = [sys.executable, "-c", from_elsewhere]
        return (
            "another run writes to it" in subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True).stderr
        )

    for _ in range(2):
        lock(tmp_path / "run")
        assert refused()
    unlock(tmp_path / "run")
    assert not refused()
