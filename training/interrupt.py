"""What happens between two steps: the progress bar, saving by the clock, and stopping when asked to."""

import contextlib
import os
import signal
import sys
import threading
import time

from tqdm.auto import tqdm

from errors import bar_disabled
from files import is_first_rank
from training.loop import loss_and_accuracy
from training.outputs import largest_gradient
from training.ranks import any_rank, rank_and_ranks, warn_of


class Interrupted(KeyboardInterrupt):
    """A run that was stopped by a signal and has saved; `exit_code` is 128 + the signal's number."""

    def __init__(self, signum):
        super().__init__()
        self.exit_code = 128 + signum


class StopRequests:
    """Ctrl-C, SIGTERM, SIGHUP (the terminal was closed; not with nohup) and a limit in minutes, as a context manager.

    `wanted()` tells whether to stop after this step. The minutes count from now, or from `since`, a time of
    time.monotonic(). A second signal acts as it would without this. Leaving restores the signal handlers.
    """

    def __init__(self, minutes=None, *, since=None):
        self.deadline = (time.monotonic() if since is None else since) + 60 * minutes if minutes else None
        self.signum = self.patience = None
        self.handlers = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # Python allows handlers in the main thread only
            hangup = getattr(signal, "SIGHUP", signal.SIGTERM)  # not on Windows
            for signum in {signal.SIGINT, signal.SIGTERM, hangup}:
                if signum != hangup or signal.getsignal(signum) != signal.SIG_IGN:
                    self.handlers[signum] = signal.signal(signum, self.note)
        return self

    def __exit__(self, *exception):
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)

    def note(self, signum, frame):
        self.signum = signum
        self.__exit__()
        if rank_and_ranks()[1] > 1:  # torchrun sends SIGTERM if a rank has died, which the others may wait for
            self.patience = threading.Timer(PATIENCE, os._exit, [128 + signum])
            self.patience.daemon = True
            self.patience.start()
        with contextlib.suppress(OSError, RuntimeError):  # the terminal is gone; the signal came amid another print
            print("\nstopping after this step; once more: at once", file=sys.stderr, flush=True)

    def end(self):
        """Raises Interrupted if a signal asked for the stop."""
        if self.signum is not None:
            raise Interrupted(self.signum)

    def asked(self):
        """Whether this process was asked to stop."""
        return self.signum is not None or (self.deadline is not None and time.monotonic() > self.deadline)

    def wanted(self):
        """Whether any rank was asked to stop; all of them have to call this together."""
        wanted = any_rank(self.asked())[0]
        if self.patience:
            self.patience.cancel()
        return wanted


PATIENCE = 20  # seconds that a rank waits for the others after a signal
AGREEMENT = 8  # steps on GPUs after which ranks agree on whether to stop or save: they wait for each other


class Watch:
    """What train_one_epoch calls after each step of one epoch: `watch(sums)`; True asks it to stop.

    A few times per second it reads the sums from the device and shows them in a bar. Every --save-minutes it saves.
    With --log-steps it notes each step, and reads their losses at these times. With --profile it profiles the first
    epoch. Raises UserError, with the epoch, the step, the learning rate and the parameter whose gradient was largest at
    the last refresh, if the loss was not finite: at the next one, at the latest when the epoch ends, and before
    anything is saved. With --on-nan rollback it looks after each step.
    """

    REFRESH_SECONDS = 0.4

    def __init__(self, run, steps_per_epoch, stop):
        self.run, self.stop = run, stop
        self.profiler, self.largest = None, ""
        if run.args.profile and run.epoch == run.first_epoch and is_first_rank():
            from training.profiling import StepProfiler  # only if it is asked for

            self.profiler = StepProfiler(run.folder, run.device)
        self.last_step = self.last_refresh = time.monotonic()
        self.steps = 0
        self.bar = tqdm(
            total=steps_per_epoch,
            initial=run.sums["step"],
            desc=f"epoch {run.epoch + 1}/{run.args.epochs}",
            leave=False,
            disable=bar_disabled() if is_first_rank() else True,
        )

    def __enter__(self):
        return self

    def __exit__(self, kind, value, traceback):
        self.bar.close()
        if self.profiler:
            self.profiler.close()
        if kind is None and self.run.sums["step"]:
            self.refresh(self.run.sums)
            self.run.trained_at = time.monotonic()
            self.run.sums["seconds"] += self.run.trained_at - self.last_step

    def __call__(self, sums):
        now = time.monotonic()
        sums["seconds"] += now - self.last_step
        self.last_step = now
        if self.profiler:
            self.profiler.step()
        if self.run.log:
            self.run.log.note(sums)
        if self.run.args.on_nan == "rollback" and any_rank(sums["bad_step"].item() >= 0)[0]:
            from training.numerics import roll_back  # only if it is asked for

            roll_back(self.run, self.largest)
        if now - self.last_refresh > self.REFRESH_SECONDS:
            self.refresh(sums)
            self.last_refresh = now
        self.steps += 1
        if rank_and_ranks()[1] > 1 and self.run.device.type == "cuda" and self.steps % AGREEMENT:
            return False
        late = now - self.run.last_writing > 60 * self.run.args.save_minutes
        save, stop = any_rank(late, self.stop.asked())
        if save:
            self.refresh(sums)
            self.run.write()
            self.last_step = time.monotonic()  # writing is no part of a step
        return stop

    def refresh(self, sums):
        """Wait for the device; update the bar, or raise if the loss was not finite."""
        if self.run.log:
            self.run.log.fetch()
        if sums["bad_step"].item() >= 0:
            from training.numerics import not_finite  # only if it is needed

            raise not_finite(self.run, self.largest)
        self.largest = largest_gradient(self.run)
        if self.run.precision.scaler.get_scale() < 1:
            warn_of(self.run, "the loss scale is below 1: float16 overflows in most updates; use --amp bf16 or off")
        loss, accuracy = loss_and_accuracy(sums)
        self.bar.set_postfix_str(f"loss {loss:.4f}" + ("" if accuracy is None else f", {accuracy:.1%}"), refresh=False)
        self.bar.update(sums["step"] - self.bar.n)
