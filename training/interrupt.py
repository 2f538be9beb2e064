"""What happens between two steps: the progress bar, saving by the clock, and stopping when asked to."""

import signal
import sys
import threading
import time

from tqdm.auto import tqdm

from errors import UserError
from training.loop import means


class Interrupted(KeyboardInterrupt):
    """A run that was stopped by a signal and has saved; `exit_code` is 128 + the signal's number."""

    def __init__(self, signum):
        super().__init__()
        self.exit_code = 128 + signum


class StopRequests:
    """Ctrl-C, SIGTERM and a limit in minutes, as a context manager: `wanted()` says whether to stop after this step.

    A second signal acts as if this were not here. Leaving puts the signal handlers back.
    """

    def __init__(self, minutes=None):
        self.deadline = time.monotonic() + 60 * minutes if minutes else None
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

    def end(self, message):
        """Say why the run ends here; raise Interrupted where a signal was the reason, else return None."""
        print(message)
        if self.signum is not None:
            raise Interrupted(self.signum)

    def wanted(self):
        return self.signum is not None or (self.deadline is not None and time.monotonic() > self.deadline)


class Watch:
    """What train_one_epoch calls after each step of one epoch: `watch(steps_done, sums)`; True asks it to stop.

    A few times a second it reads the sums from the device and shows them in a bar; every save_minutes it calls
    save(steps_done, sums). Raises UserError, with the epoch, the step and the learning rate, when the loss was not
    finite: at the next refresh, at the latest when the epoch ends, and before anything is saved over a good checkpoint.
    """

    REFRESH_SECONDS = 0.4

    def __init__(self, epoch, epochs, start_step, steps_per_epoch, stop, save, save_minutes):
        self.epoch, self.stop, self.save, self.save_seconds = epoch, stop, save, 60 * save_minutes
        self.last_step = self.last_refresh = self.last_save = time.monotonic()
        self.sums = None
        self.bar = tqdm(
            total=steps_per_epoch,
            initial=start_step,
            desc=f"epoch {epoch + 1}/{epochs}",
            leave=False,
            disable=None if "ipykernel" not in sys.modules else False,  # None: no bar where stderr is no terminal
        )

    def __enter__(self):
        return self

    def __exit__(self, kind, value, traceback):
        self.bar.close()
        if kind is None and self.sums:
            self.refresh(self.bar.n, time.monotonic())

    def __call__(self, steps_done, sums):
        self.sums = sums
        now = time.monotonic()
        sums["seconds"] += now - self.last_step
        self.last_step = now
        if now - self.last_refresh > self.REFRESH_SECONDS:
            self.refresh(steps_done, now)
        if now - self.last_save > self.save_seconds:
            self.refresh(steps_done, now)
            self.save(steps_done, sums)
            self.last_save = time.monotonic()
        return self.stop.wanted()

    def refresh(self, steps_done, now):
        """Wait for the device, and show or raise what it says."""
        self.last_refresh = now
        bad_step = self.sums["bad_step"].item()
        if bad_step >= 0:
            raise UserError(
                f"the loss is not finite: epoch {self.epoch + 1}, step {bad_step + 1}, learning rate "
                f"{self.sums['bad_lr'].item():.3g}; the last checkpoint was saved before; a lower --lr or --clip-grad 1 may help"
            )
        loss, accuracy = means(self.sums)
        self.bar.set_postfix_str(f"loss {loss:.4f}, {accuracy:.1%}", refresh=False)
        self.bar.update(steps_done - self.bar.n)
