"""How a script ends, and what a notebook shows."""

import subprocess
import sys

import numpy as np
import pytest

import train_vit
from errors import UserError, command_line, is_memory_error, run_script
from training.arguments import given_arguments


def test_in_a_notebook_the_arguments_of_the_kernel_are_not_ours(monkeypatch):
    assert command_line() == sys.argv[1:]
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    for kernel in ("packages/ipykernel_launcher.py", "packages/colab_kernel_launcher.py", "ipykernel/__main__.py"):
        monkeypatch.setattr(sys, "argv", [f"/usr/lib/{kernel}", "-f", "/root/kernel-1.json"])
        assert given_arguments(train_vit.vit_parser(), None) == {}
    monkeypatch.setattr(sys, "argv", ["kernels/train_vit.py", "--lr", "0.1"])  # %run train_vit.py --lr 0.1
    assert given_arguments(train_vit.vit_parser(), None) == {"lr": 0.1}


def test_used_up_memory_is_known_whoever_says_so():
    with pytest.raises(MemoryError) as caught:
        np.empty(2**60, np.uint8)
    for error in (caught.value, MemoryError(), RuntimeError("CUDA error: out of memory")):
        assert is_memory_error(error)
    assert not is_memory_error(RuntimeError("shape mismatch"))


def test_a_mistake_in_a_notebook_is_one_line():
    with pytest.raises(UserError) as caught:
        train_vit.main(["--lr", "0"])
    assert caught.value._render_traceback_() == ["error: argument --lr: must be above 0, not 0"]  # IPython calls it


def test_a_reader_that_has_had_enough_is_no_error():
    """As of `compare.py | head`."""
    code = "from errors import run_script; run_script(lambda: print('line\\n' * 100_000))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"line\n"
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 141


def test_memory_used_up_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: np.empty(2**60, np.uint8))
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: the memory is used up: ")
