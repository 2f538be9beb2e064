"""campaign.py --engine: the order of runs, mistakes, and clusters of this machine, whose runs end as if alone."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from test_campaign import PLAN, calls, names, workplace  # noqa: F401
from test_campaigning import three_plans  # noqa: F401

import campaign
from errors import UserError
from experiments import engines
from experiments.dry import write_noise
from experiments.engines import do_on_worker, key_values
from experiments.jobs import open_lock
from experiments.scripts import is_locked, run_command
from files import make_folder

INSTALLED = {name: importlib.util.find_spec(name) is not None for name in ("submitit", "ray")}
with_submitit = pytest.mark.skipif(not INSTALLED["submitit"], reason="submitit is not installed")
with_ray = pytest.mark.skipif(not INSTALLED["ray"], reason="ray is not installed")
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")


# The order of runs, on an engine that does them in this process


@pytest.fixture
def fake_engine(workplace, monkeypatch):  # noqa: F811
    """What the engine named ray was given: the names of the jobs that came together. Runs named `lost` are."""
    submitted = []

    def start(folder, options):
        submitted.append(options)

        def submit(arguments):
            submitted.append([job.name for job, *_ in arguments])
            futures = [Future() for _ in arguments]
            for future, (job, args, place) in zip(futures, arguments):
                if options.get("lost") == job.row.name:
                    future.set_exception(RuntimeError("the machine died"))
                else:
                    future.set_result(do_on_worker(job, args, place))
            return futures

        return submit, None

    monkeypatch.setitem(engines.ENGINES, "ray", start)
    monkeypatch.setattr(engines.time, "sleep", lambda seconds: None)
    return submitted


def test_a_run_waits_for_the_one_that_it_starts_from(fake_engine, capfd):
    Path("p.toml").write_text(PLAN + 'init_from = "plain"\n')
    campaign.main(["p.toml", "--engine", "ray"])
    trunks, others = ([f"p/{row}, seed {seed}" for seed in (0, 1)] for row in ("plain", "other"))
    assert fake_engine == [{}, trunks, others] and len(names("results/p")) == 8
    assert ["--init-from" in call for call in calls()] == [False, False, True, True]
    said = capfd.readouterr().out
    assert "--- done: p/other, seed 1; runs to do: 0" in said and "other - plain  unpaired   +0.00" in said
    campaign.main(["p.toml", "--engine", "ray"])
    assert fake_engine[3:] == [{}]  # nothing is left to do


def test_a_run_that_was_lost_or_failed_is_named_and_the_others_go_on(fake_engine, capfd):
    Path("p.toml").write_text(PLAN.replace("--lr 0.1", "--lr 0.1 --fail 0"))
    with pytest.raises(UserError, match="3 of 4 runs failed: p/plain, seed 0; p/other, seed 0; p/other, seed 1"):
        campaign.main(["p.toml", "--engine", "ray", "--engine-options", "lost=other"])
    said = capfd.readouterr()
    assert "--- failed, exit code 1: p/plain, seed 0; runs to do: 3" in said.out
    assert said.err.count("the machine died") == 2 and "plain-seed-1.json" in names("results/p")


def test_measurements_are_left_to_a_plain_campaign(three_plans, fake_engine, capfd):  # noqa: F811
    campaign.main(["q.toml", "m.toml", "--engine", "ray", "--device", "cpu"])
    assert fake_engine == [{}, ["q/two, seed 0"]] and not Path("results/m").exists()
    assert "2 measurements are left to a campaign without --engine" in capfd.readouterr().out


def test_a_worker_waits_for_a_process_that_trains_the_same_run(fake_engine):
    """Here for half a second; a plain campaign would refuse the run."""
    with open_lock(Path("checkpoints/p/plain-seed-0")) as lock:
        assert not is_locked(lock)
        began = time.monotonic()
        threading.Timer(0.5, lock.close).start()
        campaign.main(["p.toml", "--seeds", "1", "--engine", "ray"])
    assert time.monotonic() - began > 0.5 and len(calls()) == 2


def test_runs_that_start_together_try_their_folder_at_the_same_time(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(make_folder, [tmp_path / "p"] * 400)) == {tmp_path / "p"}
    assert not names(tmp_path / "p")


def test_the_first_signal_alone_is_passed_on(tmp_path, monkeypatch):
    """A cluster sends several; a second one would end the script before it has saved."""
    code = (
        "import signal, sys, time, pathlib\n"
        "def save(*_):\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_DFL)\n"
        "    time.sleep(1)\n"
        "    sys.exit(pathlib.Path('saved').touch())\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "pathlib.Path('begun').touch()\n"
        "time.sleep(20)\n"
    )
    (tmp_path / "saves.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def stop_twice():
        while not Path("begun").exists():
            time.sleep(0.05)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)

    threading.Thread(target=stop_twice).start()
    with pytest.raises(KeyboardInterrupt):
        run_command("saves.py", [], stop_once=True)
    assert Path("saved").exists()


# Mistakes, and what is sent to a cluster


def test_options_are_strings_and_numbers():
    text = "slurm_partition=gpu timeout_min=240 num_gpus=0.5 'slurm_comment=a = b'"
    options = {"slurm_partition": "gpu", "timeout_min": 240, "num_gpus": 0.5, "slurm_comment": "a = b"}
    assert key_values(text) == options and key_values("") == {}


MISTAKES = {
    "--list and --engine exclude each other": ("ray", "--list"),
    "--dry and --engine exclude each other": ("submitit", "--dry"),
    "argument --engine: invalid choice: 'slurm'": ("slurm",),
    "argument --engine-options: must be key=value, as num_gpus=1, not gpu": ("ray", "--engine-options", "gpu"),
    "this needs a package that is not installed: pip install submitit": ("submitit",),
    "this needs a package that is not installed: pip install ray": ("ray",),
}


@pytest.mark.parametrize("said", MISTAKES)
def test_mistakes_are_one_line(workplace, monkeypatch, said):  # noqa: F811
    monkeypatch.setitem(sys.modules, "submitit", None)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError) as error:
        campaign.main(["p.toml", "--engine", *MISTAKES[said]])
    assert said in str(error.value) and "\n" not in str(error.value) and not Path("calls.txt").exists()
    with pytest.raises(UserError, match="--engine-options needs --engine submitit or ray"):
        campaign.main(["p.toml", "--engine-options", "num_gpus=1"])


def test_no_engine_is_imported_unless_it_is_asked_for():
    code = "import sys, campaign; sys.exit(bool({'ray', 'submitit'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True)


@with_submitit
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("cluster=slurm", 'Could not detect "srun"'),
        ("cluster=local nonsense=1", "need to be prefixed by an executor name"),
        ("cluster=local timeout_min=4h", 'Parameter "timeout_min" expected type'),
    ],
)
def test_options_that_submitit_refuses_are_one_line(workplace, monkeypatch, options, said):  # noqa: F811
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=f"--engine submitit: .*({said})") as error:
        campaign.main(["p.toml", "--engine", "submitit", "--engine-options", options])
    assert "\n" not in str(error.value)


@with_submitit
def test_slurm_gets_one_array_with_the_options(workplace, monkeypatch):  # noqa: F811
    """By an sbatch of our own, which notes what it was given, and then one that refuses it."""
    fake = Path("bin")
    fake.mkdir()
    for name, body in {
        "srun": "",
        "sbatch": 'cp "$1" sent.sh; env > sent.env; echo Submitted batch job 12',
        "sacct": "echo 'JobID|State'; for k in 0 1 2 3; do echo \"12_$k|FAILED\"; done",
    }.items():
        (fake / name).write_text(f"#!/bin/sh\n{body}\n")
        (fake / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(fake.resolve()), prepend=os.pathsep)
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr(submitit.SlurmJob, "_results_timeout_s", 0)
    options = "slurm_partition=gpu timeout_min=240 gpus_per_node=1 slurm_array_parallelism=2"
    with pytest.raises(UserError, match="4 of 4 runs failed"):
        campaign.main(["p.toml", "--engine", "submitit", "--engine-options", options])
    sent = Path("sent.sh").read_text()
    for line in ("partition=gpu", "time=240", "gpus-per-node=1", "array=0-3%2", "signal=USR2@90"):
        assert f"#SBATCH --{line}\n" in sent
    assert f"PYTHONPATH={REPOSITORY}" in Path("sent.env").read_text() and "PYTHONSAFEPATH" not in os.environ
    (fake / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: gpu' >&2; exit 1\n")
    with pytest.raises(UserError, match="--engine submitit: sbatch: error: invalid partition specified: gpu"):
        campaign.main(["p.toml", "--engine", "submitit", "--engine-options", options])


# Clusters of this machine

REAL_PLAN = """
title = "Two rows"
baseline = "report"
seeds = 2
[[rows]]
name = "report"
script = "train_vit.py"
arguments = "{arguments}"
[[rows]]
name = "faster"
script = "train_vit.py"
arguments = "{arguments} --lr 0.002"
"""
SMALL = "--dataset folder --epochs 80 --batch-size 8 --embed-dim 16 --depth 1 --num-heads 2 --workers 0"
RUNS = [f"{row}-seed-{seed}" for seed in (0, 1) for row in ("report", "faster")]
CODE = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored below nohup\n"
    "import campaign, errors; errors.run_script(campaign.main)"
)


def start_campaign(folder, *flags):
    """campaign.py p.toml in a process of its own, the first of a process group, as in a terminal."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CODE, "p.toml", "--data-dir", "images", "--device", "cpu", *flags]
    with open(folder / "output.txt", "w") as output:
        return subprocess.Popen(
            command, cwd=folder, env=environment, start_new_session=True, stdout=output, stderr=subprocess.STDOUT
        )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder with the plan, its images and what a plain campaign makes of them."""
    folder = tmp_path_factory.mktemp("alone")
    write_noise(folder / "images")
    (folder / "p.toml").write_text(REAL_PLAN.format(arguments=f"{SMALL} --save-minutes 0.01 --cache-dir cache"))
    assert start_campaign(folder).wait() == 0
    return folder


@pytest.fixture
def place(alone, tmp_path):
    """A folder as that of the plain campaign before it began."""
    shutil.copytree(alone / "images", tmp_path / "images")
    shutil.copy(alone / "p.toml", tmp_path)
    return tmp_path


def wait_until(met, process, seconds=180):
    """What met() returns as soon as that is true; the process must be alive until then."""
    began = time.monotonic()
    while not (found := met()):
        assert process.poll() is None and time.monotonic() - began < seconds
        time.sleep(0.05)
    return found


def half_done(folder, run, since=0.0):
    """Whether a run is under way, and has saved since then, a value of time.time()."""
    last = folder / "checkpoints/p" / run / "last.pt"
    return last.exists() and last.stat().st_mtime > since and not (last.parent / "result.json").exists()


def descendants(pid):
    """{pid: command} of the processes that a process has started, and these, and so on."""
    parents, commands = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            commands[int(path.name)] = (path / "cmdline").read_text().replace("\0", " ")
        except OSError:
            pass  # it has ended
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return {child: commands[child] for child in found - {pid}}


def press_ctrl_c(folder, process):
    """As soon as the first run is under way; once campaign.py has ended, nobody trains any more."""
    wait_until(lambda: half_done(folder, "report-seed-0"), process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=120) == 130
    assert "stopped, 4 runs are missing; to resume: " in (folder / "output.txt").read_text()
    for run in RUNS:
        with open_lock(folder / "checkpoints/p" / run) as lock:
            assert not is_locked(lock)


def assert_as_if_alone(folder, alone):
    """Weights and all that follows from them, bit for bit; log.csv also shows the time."""
    for run in RUNS:
        weights, expected = (torch.load(f / "checkpoints/p" / run / "last.pt")["weights"] for f in (folder, alone))
        assert weights.keys() == expected.keys() and all(torch.equal(weights[k], expected[k]) for k in weights)
        logs = ((f / "results/p" / f"{run}.csv").read_text().splitlines() for f in (folder, alone))
        assert [line.split(",")[:5] for line in next(logs)] == [line.split(",")[:5] for line in next(logs)]
    table = (alone / "output.txt").read_text().partition("Two rows (p)")[2].strip()
    assert "faster - report" in table and table in (folder / "output.txt").read_text()


@with_submitit
@needs_proc
@pytest.mark.slow
def test_submitit_saves_at_ctrl_c_and_requeues_at_its_signal(alone, place):
    """With a limit of five minutes, submitit takes its signal for a time-out."""
    engine = ["--engine", "submitit", "--engine-options", "cluster=local timeout_min=5"]
    press_ctrl_c(place, start_campaign(place, *engine))
    logs = [path.read_text() for path in (place / "checkpoints/submitit").glob("*_log.out")]
    begun = [log for log in logs if "epoch  1/80" in log]
    assert begun and all("to resume: python train_vit.py" in log for log in begun)

    shutil.rmtree(place / "checkpoints/submitit")
    began, process = time.time(), start_campaign(place, *engine)

    def job_of(run):
        """The process of submitit whose training of this run is under way."""
        for pid, command in descendants(process.pid).items():
            if "submitit.core._submit" in command:
                below = " ".join(descendants(pid).values())
                if f"--run-name {run}" in below and half_done(place, run, began):
                    return pid

    os.kill(wait_until(lambda: job_of("report-seed-1"), process), signal.SIGUSR2)
    preempted = wait_until(lambda: job_of("faster-seed-1"), process)
    os.kill(preempted, signal.SIGTERM)  # as SLURM may do before a preemption
    time.sleep(0.5)
    os.kill(preempted, signal.SIGUSR2)
    assert process.wait(timeout=300) == 0
    logs = "\n".join(path.read_text() for path in (place / "checkpoints/submitit").glob("*_log.*"))
    assert logs.count("(49 remaining timeouts)") == 2 and "this job is timed-out" in logs and "stopped" in logs
    assert_as_if_alone(place, alone)


@pytest.fixture
def ray_cluster(monkeypatch):
    """Two nodes of Ray with a core each, as two machines; monkeypatch's environment leads campaign.py to them."""
    folder = tempfile.mkdtemp(prefix="ray")  # not tmp_path: the names of sockets must be short
    environment = {"RAY_TMPDIR": folder, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    from ray.cluster_utils import Cluster

    each = {"num_cpus": 1, "object_store_memory": 80_000_000}
    cluster = Cluster(initialize_head=True, head_node_args=each | {"include_dashboard": False})
    try:
        cluster.add_node(**each)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        yield cluster
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@with_ray
@needs_proc
@pytest.mark.slow
def test_ray_saves_at_ctrl_c_and_finishes_the_run_of_a_dead_machine(alone, place, ray_cluster):
    press_ctrl_c(place, start_campaign(place, "--engine", "ray"))
    assert "to resume: python train_vit.py --resume" in (place / "output.txt").read_text()
    began, process = time.time(), start_campaign(place, "--engine", "ray")
    [node] = ray_cluster.worker_nodes
    raylet = node.all_processes["raylet"][0].process.pid

    def its_run():
        for command in descendants(raylet).values():
            for run in re.findall(r"--run-name (\S+)", command):
                if half_done(place, run, began):
                    return run

    run = wait_until(its_run, process)
    for pid in [raylet, *descendants(raylet)]:
        os.kill(pid, signal.SIGKILL)
    assert not (place / "results/p" / f"{run}.json").exists()
    assert process.wait(timeout=300) == 0
    assert f"--- done: p/{run.replace('-seed-', ', seed ')}" in (place / "output.txt").read_text()
    assert_as_if_alone(place, alone)
