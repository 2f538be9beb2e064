"""What happens between two steps: the progress bar, saving by the clock, and stopping when asked to."""

import signal
import sys
import threading
import time

from tqdm.auto import tqdm

from errors import UserError
from training.loop import means
from training.profiling import StepProfiler


class Interrupted(KeyboardInterrupt):
    """A run that was stopped by a signal and has saved; `exit_code` is 128 + the signal's number."""

    def __init__(self, signum):
        super().__init__()
        self.exit_code = 128 + signum


class StopRequests:
    """Ctrl-C, SIGTERM and a limit in minutes, as a context manager: `wanted()` says whether to stop after this step.

    The minutes count from now, or from `since`, a time of time.monotonic(). A second signal acts as if this were not
    here. Leaving puts the signal handlers back.
    """

    def __init__(self, minutes=None, *, since=None):
        self.deadline = (time.monotonic() if since is None else since) + 60 * minutes if minutes else None
        self.signum = None
        self.handlers = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for signum in (signal.SIGINT, signal.SIGTERM):
                self.handlers[signum] = signal.signal(signum, self.note)
        return self

    def __exit__(self, *exception):
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)

    def note(self, signum, frame):
        self.signum = signum
        self.__exit__()

    def end(self):
        """Raises Interrupted where a signal asked for the stop."""
        if self.signum is not None:
            raise Interrupted(self.signum)

    def wanted(self):
        return self.signum is not None or (self.deadline is not None and time.monotonic() > self.deadline)


class Watch:
    """What train_one_epoch calls after each step of one epoch: `watch(steps_done, sums)`; True asks it to stop.

    It keeps the run's place and time; a few times a second it reads the sums from the device and shows them in a bar;
    every --save-minutes it saves; with --profile it profiles the first epoch. Raises UserError, with the epoch, the
    step and the learning rate, when the loss was not finite: at the next refresh, at the latest when the epoch ends,
    and before anything is saved.
    """

    REFRESH_SECONDS = 0.4

    def __init__(self, run, steps_per_epoch, stop):
        self.run, self.stop = run, stop
        profiled = run.args.profile and run.epoch == run.first_epoch
        self.profiler = StepProfiler(run.folder, run.device) if profiled else None
        self.last_step = self.last_refresh = self.last_save = time.monotonic()
        self.bar = tqdm(
            total=steps_per_epoch,
            initial=run.step,
            desc=f"epoch {run.epoch + 1}/{run.args.epochs}",
            leave=False,
            disable=None if "ipykernel" not in sys.modules else False,  # None: no bar where stderr is no terminal
        )

    def __enter__(self):
        return self

    def __exit__(self, kind, value, traceback):
        self.bar.close()
        if self.profiler:
            self.profiler.close()
        if kind is None and self.run.step:
            self.refresh(self.run.sums)
            self.run.sums["seconds"] += time.monotonic() - self.last_step

    def __call__(self, steps_done, sums):
        now = time.monotonic()
        sums["seconds"] += now - self.last_step
        self.run.step, self.last_step = steps_done, now
        if self.profiler:
            self.profiler.step()
        if now - self.last_refresh > self.REFRESH_SECONDS:
            self.refresh(sums)
            self.last_refresh = now
        if now - self.last_save > 60 * self.run.args.save_minutes:
            self.refresh(sums)
            self.run.write()
            self.last_save = time.monotonic()
        return self.stop.wanted()

    def refresh(self, sums):
        """Wait for the device, and show or raise what it says."""
        bad_step = sums["bad_step"].item()
        if bad_step >= 0:
            raise UserError(
                f"the loss is not finite: epoch {self.run.epoch + 1}, step {bad_step + 1}, learning rate "
                f"{sums['bad_lr'].item():.3g}; the checkpoints are from before; a lower --lr or --clip-grad 1 may help"
            )
        loss, accuracy = means(sums)
        self.bar.set_postfix_str(f"loss {loss:.4f}, {accuracy:.1%}", refresh=False)
        self.bar.update(self.run.step - self.bar.n)
