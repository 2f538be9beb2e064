"""What --log and --log-steps write beside log.csv: steps.csv, and the logs of TensorBoard, W&B and trackio."""

import os
import re
import secrets
import sys

import torch

from errors import UserError, import_optional
from files import write_atomically

MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}  # of --log


class TensorBoard:
    """A TensorBoard log of a run, with the methods of W&B's and trackio's: log(values, step=...) and finish()."""

    def __init__(self, module, run):
        done = run.schedule.last_epoch  # steps; what a killed process wrote after them comes again, and is purged
        self.writer = module.SummaryWriter(run.folder / "tensorboard", purge_step=done + 1, flush_secs=1)
        self.writer.add_text("arguments", "".join(f"    {name}: {v}\n" for name, v in vars(run.args).items()), done)
        self.finish = self.writer.close

    def log(self, values, step):
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)


def open_logger(name, module, run):
    """The log of a run, new or resumed, in one of MODULES: an object with log(values, step=...) and finish()."""
    if name == "tensorboard":
        return TensorBoard(module, run)
    # trackio resumes by the name, W&B by the id; embed would show trackio's page in a notebook, on Colab publicly
    own = {"wandb": {"id": run.log_id, "dir": run.folder}, "trackio": {"embed": False}}[name]
    title = f"{run.folder.name}-{run.log_id}"
    return module.init(project=run.dataset.name, name=title, config=dict(vars(run.args)), resume="allow", **own)


class RunLog:
    """The loggers of --log, and steps.csv of --log-steps, of one run (see training/run.py).

    The loggers get what is saved, whenever a checkpoint is: so a resumed run continues their logs and repeats nothing.
    steps.csv grows meanwhile, and is cut if the run is resumed. A logger that fails is left out, with one warning.
    Raises UserError if a package is missing, or if trackio would write to another machine.
    """

    def __init__(self, run):
        self.run, self.noted, self.unsent, self.loggers = run, [], [], {}
        self.modules = {name: import_optional(MODULES[name], name) for name in run.args.log}
        elsewhere = [name for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL") if name in os.environ]
        if "trackio" in self.modules and elsewhere:
            raise UserError(f"--log trackio logs on this machine alone: unset {elsewhere[0]}")

    def start(self):
        """Begin or continue the logs. Raises UserError if a logger does not start."""
        self.run.log_id = self.run.log_id or secrets.token_hex(4)
        for name, module in self.modules.items():
            try:
                self.loggers[name] = open_logger(name, module, self.run)
            except Exception as error:
                raise UserError(f"--log {name} does not start: {' '.join(str(error).split())}") from error

    def cut_steps(self):
        """Make steps.csv, or cut it to where the run is."""
        path, position = self.run.folder / "steps.csv", (self.run.epoch, self.run.sums["step"])
        rows = re.findall(r"^((\d+),(\d+),.*,.*\n)", path.read_text(), re.M) if path.exists() else []
        kept = [line for line, epoch, step in rows if (int(epoch) - 1, int(step)) <= position]
        write_atomically(path, lambda file: file.write("".join(["epoch,step,lr,loss\n", *kept]).encode()))

    def note(self, sums):
        """Keep what --log-steps says of a step, its loss on the device."""
        if self.run.args.log_steps:
            self.noted.append((self.run.schedule.last_epoch, sums["step"], sums["lr"], sums["last_loss"]))

    def fetch(self):
        """Wait for the device; append the noted steps to steps.csv."""
        if not self.noted:
            return
        path, epoch, lines = self.run.folder / "steps.csv", self.run.epoch + 1, []
        losses = torch.stack([loss for *_, loss in self.noted]).tolist()
        for (done, step, lr, _), loss in zip(self.noted, losses, strict=True):
            lines.append(f"{epoch},{step},{lr},{loss}\n")
            self.unsent.append((done, {"epoch": epoch, "step_lr": lr, "step_loss": loss}))
        self.noted = []
        try:
            with open(path, "a") as file:
                file.writelines(lines)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror})") from error

    def add(self, row):
        """Keep a row of log.csv for the loggers."""
        self.unsent.append((self.run.schedule.last_epoch, {name: v for name, v in row.items() if v is not None}))

    def send(self):
        """Give the loggers what has been kept."""
        rows, self.unsent = self.unsent, []
        for done, values in rows:
            self.call("log", values, step=done)

    def close(self, values=None):
        """End the logs, after a last row of values."""
        if values:
            self.call("log", values, step=self.run.schedule.last_epoch)
        self.call("finish")

    def call(self, method, *arguments, **options):
        for name, logger in list(self.loggers.items()):
            try:
                getattr(logger, method)(*arguments, **options)
            except Exception as error:
                del self.loggers[name]
                print(f"warning: --log {name}: {error}; the run continues without it", file=sys.stderr)
