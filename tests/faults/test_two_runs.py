"""Two runs on one folder: the second says who holds it, and takes over when that one has died."""

import re
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY

import train_vit
from errors import UserError


def test_a_folder_belongs_to_one_run_until_that_dies(folder_flags, tmp_path, capsys):
    flags = [*folder_flags, "--run-name", "mine", "--epochs", "5000", "--save-minutes", "0.001"]
    folder = tmp_path / "runs" / "mine"
    first = subprocess.Popen([sys.executable, "train_vit.py", *flags], cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    try:
        while first.poll() is None and not (folder / "last.pt").exists():
            time.sleep(0.05)
        for again in (["--resume", "auto"], ["--overwrite"]):
            with pytest.raises(UserError, match=rf"mine: another run writes to it \(process {first.pid} on .*\)"):
                train_vit.main([*flags, *again])
        assert first.poll() is None and (folder / "last.pt").exists()
    finally:
        first.kill()
        first.wait()
    capsys.readouterr()
    for _ in range(2):  # the second time this process has the lock, as in a notebook
        train_vit.main([*flags, "--resume", "auto", "--minutes", "0.001"])
        assert re.search(r"last(.prev)?.pt: vit .*\n(.*\n)*stopped ", capsys.readouterr().out)
