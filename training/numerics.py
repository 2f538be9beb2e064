"""--on-nan: updates by a gradient that is not finite are skipped, or the run goes back to its last checkpoint."""

import copy

import torch

from errors import UserError
from training.checkpoint import open_checkpoint, position, restore_training
from training.loop import new_sums
from training.outputs import largest_gradient
from training.ranks import warn_of

MOST_IN_A_ROW, MOST_ROLLBACKS = 20, 3
COUNTED = ("loss", "correct", "images", "bad_step", "bad_lr")  # of new_sums: what a skipped step takes back


def not_finite(run, detail, *, what="the loss is not finite"):
    """The UserError that stops a run: at the first step whose loss was not finite, else at the present one."""
    bad_step, bad_lr = run.sums["bad_step"].item(), run.sums["bad_lr"].item()
    step, lr = (bad_step + 1, bad_lr) if bad_step >= 0 else (run.sums["step"], run.sums["lr"])
    where = f"epoch {run.epoch + 1}, step {step}, learning rate {lr:.3g}{detail}"
    return UserError(f"{what}: {where}; what was saved before is kept; try a lower --lr or --clip-grad 1")


class SkippingScaler(torch.amp.GradScaler):
    """The gradient scaler of --on-nan skip, for all precisions: it leaves out updates whose gradient is not finite.

    Weights, optimiser, averages, buffers (BatchNorm's statistics) and the epoch's sums are then as before the step. In
    float16 it scales as torch's does, else by 1, which changes no bit. It waits for the device in each step.
    """

    def __init__(self, run):
        super().__init__(run.device.type, init_scale=1.0)
        if run.precision.scaler.is_enabled():
            self.load_state_dict(run.precision.scaler.state_dict())
        self.run, self.in_a_row = run, 0
        self.sums, self.buffers = None, copy.deepcopy(list(run.model.buffers()))  # before the step

    def scale(self, loss):
        if self.sums is None:  # a step's first batch, which is not yet added to the sums
            self.sums = copy.deepcopy({name: self.run.sums[name] for name in COUNTED})
        return super().scale(loss)

    def update(self):
        """Whether the update was left out. Raises UserError after MOST_IN_A_ROW of them."""
        scale, sums, buffers = self.get_scale(), self.run.sums, list(self.run.model.buffers())
        super().update()
        skipped = self.get_scale() < scale
        if self.run.precision.amp != "fp16":
            super().update(scale)
        if skipped:
            sums.update(self.sums, skipped_updates=sums.get("skipped_updates", 0) + 1)
            for buffer, before in zip(buffers, self.buffers, strict=True):
                buffer.copy_(before)
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if self.in_a_row == MOST_IN_A_ROW:
            what = f"the gradient is not finite in {MOST_IN_A_ROW} updates in a row"
            raise not_finite(self.run, largest_gradient(self.run), what=what)
        self.sums, self.buffers = None, copy.deepcopy(buffers)
        return skipped


def roll_back(run, detail):
    """Take weights, optimiser, averages and sums from last.pt; leave out the batches since then, and save.

    So PaLM continued after a spike of its loss (Chowdhery et al. 2022, section 5.1). The schedule goes on. Raises
    UserError if there is no checkpoint, and after MOST_ROLLBACKS.
    """
    path, sums = run.folder / "last.pt", run.sums
    done = sum(counts.get("rollbacks", 0) for counts in [*run.history, sums])
    if done == MOST_ROLLBACKS or not path.exists():
        raise not_finite(run, f"{detail}; rolled back {done} times" if done else f"; there is no {path} yet")
    checkpoint = open_checkpoint(path, run.device)
    said = f"back to the weights {position(checkpoint['epoch'], checkpoint['step'])}, without the batches since then"
    warn_of(run, f"the loss is not finite: epoch {run.epoch + 1}, step {sums['step']}: {said}")
    kept = {"seconds": sums["seconds"], "rollbacks": sums.get("rollbacks", 0) + 1}
    now = {"sums": checkpoint["sums"] | kept, "step": sums["step"], "schedule": run.schedule.state_dict()}
    rates = [{key: value for key, value in group.items() if key != "params"} for group in run.optimizer.param_groups]
    sums.update(new_sums(run.device))
    restore_training(checkpoint | now, run)
    for group, values in zip(run.optimizer.param_groups, rates, strict=True):
        group.update(values)
    run.write()
