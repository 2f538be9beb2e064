"""What may happen around a run: its folder goes, its images change, a worker dies, the disk is slow, a cache is cut."""

import os
import re
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import TINY, write_images
from test_damaged_files import damaged_copies

from data import load_dataset
from training.checkpoint import load_checkpoint

pytest.importorskip("fcntl")
from harmed import Fault, children, started  # noqa: E402


class Run:
    """A run of train_vit.py that takes long, in a process of its own."""

    def __init__(self, folder, *more, fault=None):
        self.folder, self.output = folder / "runs" / "run", folder / "output.txt"
        self.images = folder / "pets"
        if not self.images.exists():
            write_images(self.images, classes=("ant", "bee"), count=20, size=(80, 80))
        flags = ["--dataset", "folder", "--data-dir", self.images, "--cache-dir", folder / "cache"]
        flags += ["--out-dir", self.folder.parent, "--run-name", "run", "--epochs", "5000", "--batch-size", "16"]
        flags += ["--save-minutes", "0.001", "--resume", "auto", *TINY, *more]
        self.process = started("train_vit", flags, self.output, fault)

    def wait(self, until):
        """Whether until() came true while the run went on; a minute at most."""
        end = time.monotonic() + 60
        while not until() and self.process.is_alive() and time.monotonic() < end:
            time.sleep(0.02)
        return until() and self.process.is_alive()

    def saved(self):
        return (self.folder / "last.pt").exists()

    def end(self):
        """The exit code, and the last line printed."""
        self.process.join(60)
        code, lines = self.process.exitcode, self.output.read_text().splitlines()
        self.process.kill()
        self.output.unlink()
        return code, lines[-1]


def test_a_folder_that_goes_is_one_line(tmp_path, tried):
    run = Run(tmp_path)
    assert run.wait(run.saved)
    run.folder.rename(tmp_path / "elsewhere")
    code, line = run.end()
    assert code == 2 and re.match(r"error: .*runs/run/.* cannot be written \(No such file or directory\)", line)
    load_checkpoint(tmp_path / "elsewhere")
    tried("the run's folder is removed")


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_worker_that_is_killed_is_one_line(tmp_path, workers, tried):
    run = Run(tmp_path, "--image-size", "72", "--patch-size", "8", "--cache-gib", "0", "--workers", workers)
    assert run.wait(run.saved)
    found = children(run.process.pid)
    assert len(found) == workers
    os.kill(found[0], signal.SIGKILL)
    code, line = run.end()
    assert code == 2 and re.match("error: one of the --workers that decode images was killed", line), line
    load_checkpoint(run.folder)
    tried("a data worker is killed")


@pytest.mark.slow
@pytest.mark.parametrize("change", ["removed", "damaged"])
def test_an_image_that_changes_under_a_run_is_named(tmp_path, change, tried):
    run = Run(tmp_path, "--image-size", "72", "--patch-size", "8", "--cache-gib", "0", "--workers", "1")
    assert run.wait(run.saved)
    for path in run.images.glob("ant/*"):
        path.unlink() if change == "removed" else path.write_bytes(path.read_bytes()[:100])
    code, line = run.end()
    assert code == 2 and re.match(r"error: .*ant/\d+.png cannot be decoded", line), line
    load_checkpoint(run.folder)
    tried("images change during a run")


def test_images_that_change_between_stop_and_resume_are_noticed(tmp_path, tried):
    run = Run(tmp_path)
    assert run.wait(run.saved)
    run.process.terminate()
    assert run.end()[0] == 128 + signal.SIGTERM
    shutil.copy(run.images / "bee" / "001.png", run.images / "bee" / "000.png")
    code, line = Run(tmp_path).end()
    assert code == 2 and "images are not those of the run to resume" in line
    load_checkpoint(run.folder)
    tried("images change between stop and resume")


@pytest.mark.slow
def test_on_a_slow_disk_epochs_are_written_together(tmp_path, tried):
    """Each fsync takes a second, an epoch some hundredths of one: most epochs are not written by themselves."""
    run = Run(tmp_path, "--save-minutes", "10", fault=Fault(str(tmp_path / "runs"), seconds=1))
    assert run.wait(run.saved)
    time.sleep(4)
    assert load_checkpoint(run.folder)["epoch"] == 1
    run.process.terminate()
    assert run.end()[0] == 128 + signal.SIGTERM and load_checkpoint(run.folder)["epoch"] > 4
    tried("a slow disk")


@pytest.mark.slow
def test_a_disk_that_fills_up_is_one_line(tmp_path, tried):
    """Real ones, of memory, from too small for a checkpoint to large enough for all."""
    codes = []
    for kib in (16, 100, 200, 300, 400, 600, 1000):
        disk = tmp_path / "runs"
        disk.mkdir(exist_ok=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", disk]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("needs the rights to mount a disk of memory")
        try:
            run = Run(tmp_path, "--epochs", "3", "--image-size", "16")
            code, line = run.end()
            codes.append(code)
            assert code == 0 or line.endswith("cannot be written (No space left on device)"), line
            if run.saved():
                load_checkpoint(run.folder)
        finally:
            subprocess.run(["umount", disk], check=True)
        tried("a disk that fills up")
    assert codes[0] == 2 and codes[-1] == 0


def images_of(folder):
    return load_dataset("folder", data_dir=folder / "pets", image_size=8, cache_dir=folder / "cache").train.images


def test_a_damaged_cache_is_made_again(tmp_path, tried):
    write_images(tmp_path / "pets")
    images = images_of(tmp_path)
    (cache,) = (tmp_path / "cache").iterdir()
    whole = cache.read_bytes()
    for damaged in damaged_copies(whole, cuts=64, flips=200):
        cache.write_bytes(damaged)
        assert images_of(tmp_path).equal(images)
        tried("a damaged cache")


def test_a_cache_is_written_by_several_at_once(tmp_path, tried):
    write_images(tmp_path / "pets")
    images = images_of(tmp_path)
    for _ in range(20):
        shutil.rmtree(tmp_path / "cache")
        with ThreadPoolExecutor(4) as threads:
            assert all(each.equal(images) for each in threads.map(images_of, [tmp_path] * 4))
        tried("a cache that several write at once")
