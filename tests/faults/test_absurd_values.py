"""Every flag of every script with absurd values: one line that says what is wrong, or a sensible run, in seconds."""

import importlib
import signal
from contextlib import contextmanager

import pytest
from conftest import REPOSITORY, TINY, write_images

import train_generator
import train_vit
from errors import UserError, is_memory_error
from models import build_model
from training.run import Run

SECONDS = 10  # of the CPU, which other processes may share
VALUES = [
    *(
        "--",
        "",
        " ",
        "-1",
        "0",
        "1",
        "2",
        "0.5",
        "1.5",
        "banana",
        "none",
        "ünï🎈",
        "a\nb",
        "a\0b",
        "a\rb",
        "caf\udce9",
        "x" * 5000,
    ),
    *("nan", "inf", "-inf", "1e308", "1e-308", "1e-45", "2147483648", "99999999999999999999", "1e400", "0x10", "1_0"),
    *("/dev/zero", "..", "a/b", "-", "*", "%s", "{}"),
]
SMALL = {  # what makes a run of a second of a training script; {script: flags}
    "train_vit": [*TINY, "--patch-size", "8"],
    "train_cct": ["--model", "cct_2_3x2", "--device", "cpu"],
    "train_resnet_attn": ["--width", "8", "--device", "cpu"],
    "train_generator": ["--width", "8", "--depth", "1", "--noise-steps", "10", "--device", "cpu"],
}
OTHERS = {  # {script: (what it is called with, flags that may be given again)}
    "rollout": (["runs/vit"], ["--num-images", "2", "--device", "cpu"]),
    "attribute": (["runs/vit"], ["--num-images", "2", "--device", "cpu"]),
    "predict": (["runs/vit", "pets/ant"], ["--device", "cpu"]),
    "generate": (["runs/ddpm"], ["--per-class", "1", "--steps", "2", "--device", "cpu", "--out", "made"]),
    "export": (["runs/vit"], []),
    "compare": (["runs/vit"], []),
    "demo": (["runs/vit"], ["--device", "cpu"]),
    "campaign": ([str(REPOSITORY / "plans/tricks.toml")], ["--list"]),
}
DATA = ["--dataset", "folder", "--data-dir", "pets", "--image-size", "16", "--epochs", "1", "--batch-size", "8"]
DATA += ["--cache-dir", "cache", "--out-dir", "runs"]


class Trained(Exception):
    """An epoch has come to its end."""


@contextmanager
def time_limit():
    def end(*_):
        raise TimeoutError

    timers = {signal.ITIMER_PROF: (signal.SIGPROF, SECONDS), signal.ITIMER_REAL: (signal.SIGALRM, 6 * SECONDS)}
    before = {signum: signal.signal(signum, end) for signum, _ in timers.values()}
    for timer, (_, seconds) in timers.items():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer, (signum, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(signum, before[signum])


def outcome(main, argv):
    """ "refused" in one line, "ran", or what is wrong with the call."""
    try:
        with time_limit():
            main(argv)
    except Trained:
        return "ran"
    except UserError as error:
        return "refused" if str(error).isprintable() and len(str(error)) < 1200 else f"not one line: {error}"
    except (Exception, SystemExit) as error:
        return "refused" if is_memory_error(error) else repr(error)
    return "ran"


def without(flags, flag):
    """Flags, each with one value, without one of them."""
    pairs = [flags[i : i + 2] for i in range(0, len(flags), 2)]
    return [part for pair in pairs if pair[0] != flag for part in pair]


def command_lines(script, values):
    """Calls of a script, each with one absurd value; values(n) are those of the n-th flag."""
    module = importlib.import_module(script)
    maker = next(
        f for f in vars(module).values() if getattr(f, "__name__", "").endswith("_parser") and f.__module__ == script
    )
    named, flags = OTHERS.get(script, ([], []))
    more = [*SMALL[script], *DATA[:-1], "elsewhere"] if script in SMALL else flags  # what `folder` has remains
    yield [*named, *more, *["--overwrite"] * (script in SMALL)]
    for number, action in enumerate(maker()._actions):
        for value in values(number):
            if action.nargs == 0:
                continue
            elif action.option_strings:
                flag, count = action.option_strings[0], action.nargs if isinstance(action.nargs, int) else 1
                absurd = [f"{flag}={value}"] if count == 1 else [flag, *[value] * count]
                plain = without(more, flag)
                yield [*named, *plain, *absurd, *["--overwrite"] * (script in SMALL and flag != "--resume")]
            else:
                yield [value, *named[1:], *flags]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with images, a ViT and a diffusion model."""
    folder = tmp_path_factory.mktemp("absurd")
    write_images(folder / "pets", classes=("ant", "bee", "cat"), count=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train_vit.main([*DATA, *SMALL["train_vit"]])
        train_generator.main([*DATA, *SMALL["train_generator"]])
    return folder


def check(script, values, folder, monkeypatch, tried):
    monkeypatch.chdir(folder)
    if script == "demo":
        gradio = pytest.importorskip("gradio")
        monkeypatch.setattr(gradio.Blocks, "launch", lambda page, **options: None)
    if script in SMALL:

        def end_epoch(*_):
            raise Trained

        monkeypatch.setattr(Run, "end_epoch", end_epoch)
    found = {}  # of the first one, which is sensible, and of those with an absurd value
    for argv in command_lines(script, values):
        found[" ".join(argv)] = outcome(importlib.import_module(script).main, argv)
    assert {argv: said for argv, said in found.items() if said not in ("refused", "ran")} == {}
    assert next(iter(found.values())) == "ran"
    tried("an absurd value on a command line", len(found))


@pytest.mark.parametrize("script", [*SMALL, *OTHERS])
def test_an_absurd_value_of_each_flag_is_one_line_or_runs(script, folder, monkeypatch, tried):
    check(script, lambda number: [VALUES[number % len(VALUES)]], folder, monkeypatch, tried)


@pytest.mark.slow
@pytest.mark.parametrize("script", [*SMALL, *OTHERS])
def test_all_absurd_values_are_one_line_or_run(script, folder, monkeypatch, tried):
    check(script, lambda number: VALUES, folder, monkeypatch, tried)


def test_a_model_that_no_memory_holds_is_refused_before_it_is_allocated(monkeypatch):
    with pytest.raises(UserError, match="vit: half of the memory, .* GiB, cannot hold its weights"):
        build_model("vit", embed_dim=1_000_000, num_heads=1)
    build_model("vit", embed_dim=96, depth=4)
    monkeypatch.setattr("models.os.sysconf", lambda name: 1024)  # a MiB; each layer takes less
    with pytest.raises(UserError, match="vit: half of the memory"):
        build_model("vit", embed_dim=96, depth=4)
