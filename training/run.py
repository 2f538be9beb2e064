"""A run: what it is made of, how far it has come, and its folder."""

import copy
import datetime
import math
import time

from errors import UserError
from files import is_first_rank
from training.averaging import make_average
from training.checkpoint import (
    check_same_images,
    evaluated_weights,
    load_weights,
    make_checkpoint,
    open_checkpoint,
    position,
    restore_training,
    save_checkpoint,
)
from training.device import peak_memory_bytes
from training.folder import prepare_folder, unlock
from training.loop import batches_per_step, loss_and_accuracy, new_sums, validate
from training.outputs import (
    COLUMNS,
    NAN_COUNTS,
    accuracy_text,
    balanced_accuracy,
    draw_curves,
    epoch_line,
    warn_if_constant,
    write_log,
    write_predictions,
    write_result,
    write_split,
)
from training.ranks import any_rank, from_first_rank, leave_ranks, sums_of_all_ranks
from training.values import is_own_class

WRITING_SHARE = 0.04  # at most this share of the time goes into writing what epochs leave behind
WITHOUT_MAPS = ("none", "identity", "depthwise", "simple")  # --attention that rollout.py cannot draw


class Run:
    """One run in training: what is trained, and how far it has come.

    start is a Start of training/arguments.py. `epoch` counts finished epochs, `sums` is what the epoch in progress has
    added up (see new_sums), and `history` has one row of log.csv for each finished epoch.
    """

    def __init__(self, start, model, dataset, *, optimizer, schedule, precision):
        self.folder, self.script, self.args = start.folder, start.script, start.args
        self.model, self.model_args = model, start.model_args(len(dataset.classes), plain=True)
        own = getattr(self.args, "attention", None)
        self.attention_again = f" --attention {own}" if is_own_class(own) else ""
        self.dataset, self.optimizer, self.schedule = dataset, optimizer, schedule
        self.average = make_average(model, self.args)
        self.precision, self.device = precision, precision.device
        self.data_hashes = {split: images.hash() for split, images in dataset.splits().items()}
        self.extra_record = None  # with --extra-data, where its images are from
        if dataset.extra:
            from training.generating import generator_record  # only if it is asked for

            self.extra_record = generator_record(self.args.extra_data, self.data_hashes)
        self.epoch, self.first_epoch, self.sums, self.history = 0, 0, new_sums(self.device), []
        self.log, self.log_id = None, None  # with --log or --log-steps a RunLog, and what the loggers know the run by
        self.unwritten, self.warnings = {}, set()  # checkpoints by the names of their files; what was warned of
        self.last_writing, self.writing_seconds = time.monotonic(), 0.0
        self.trained_at = time.monotonic()  # when the last step ended

    @property
    def evaluated_model(self):
        """The model that is validated, and that is the result: with averaged weights as soon as there are any."""
        averaged = self.average.model if self.average else None
        return self.model if averaged is None else averaged

    def model_to_evaluate(self, batches):
        """The evaluated_model at the end of an epoch of these training batches, whose weights it averages."""
        if self.average:
            options = {"epoch": self.epoch, "seed": self.args.seed, "precision": self.precision}
            self.average.after_epoch(self.model, batches, **options)
        return self.evaluated_model

    def begin(self, checkpoint=None):
        """Restore a checkpoint, or clear the folder for a new run.

        Raises UserError if the images are not those of the run to resume, if the folder cannot be written, and for
        --patience and --skip-test without validation images.
        """
        needing = "--skip-test" if self.args.skip_test else f"--patience {self.args.patience}"
        if (self.args.skip_test or self.args.patience) and not self.dataset.val:
            how = "shards with val in their names" if self.args.dataset == "webdataset" else "--val-fraction 0.1"
            raise UserError(f"{needing} needs validation images: {how}")
        if checkpoint:
            check_same_images(checkpoint, self)
            restore_training(checkpoint, self)
            self.first_epoch = self.epoch
        if self.args.on_nan == "skip":
            from training.numerics import SkippingScaler  # only if it is asked for

            self.precision.scaler = SkippingScaler(self)
        if (self.args.log or self.args.log_steps) and is_first_rank():
            from training.loggers import RunLog  # only if it is asked for

            self.log = RunLog(self)
        prepare_folder(self.folder, resuming=checkpoint is not None, start_log=self.log and self.log.start)
        if self.args.log_steps and self.log:
            self.log.cut_steps()
        if self.args.dataset == "folder" or self.args.val_fraction:
            write_split(self.folder / "split.csv", self.dataset)

    def remaining_epochs(self):
        """The numbers of the epochs to train, from 0, until all are done or --patience is used up."""
        while self.epoch < self.args.epochs and not self.out_of_patience():
            yield self.epoch

    def write(self):
        """Write what the epochs have left behind and where the run is now."""
        started = time.monotonic()
        for name, checkpoint in self.unwritten.items():
            save_checkpoint(self.folder / name, checkpoint)
        self.unwritten = {}
        if self.history:
            write_log(self.folder / "log.csv", self.history)
            draw_curves(self.folder / "curves.png", self.history, self.args)
        if self.log:
            self.log.send()
        # last: a run killed before this line resumes from the previous last.pt and writes the files above again
        save_checkpoint(self.folder / "last.pt", make_checkpoint(self))
        self.last_writing = time.monotonic()
        self.writing_seconds = self.last_writing - started

    def stop(self, stop):
        """Save, and print how to resume; raises Interrupted if a signal was the reason, else returns None."""
        self.write()
        command = f"python {self.script} --resume {self.folder}{self.attention_again}"
        print(f"stopped {position(self.epoch, self.sums['step'])}; to resume: {command}")
        self.close()
        stop.end()

    def close(self, last=None):
        """Let go of the loggers, with `last` values for them, of the folder and of the other ranks."""
        if self.log:
            self.log.close(last)
        unlock(self.folder)
        leave_ranks()

    def out_of_patience(self):
        """Whether the last --patience epochs brought no better validation accuracy."""
        accuracies = [row["val_accuracy"] for row in self.history]
        patience = self.args.patience
        return bool(patience and accuracies) and len(accuracies) - 1 - accuracies.index(max(accuracies)) >= patience

    def end_epoch(self, scores):
        """Print and write what an epoch leaves behind: the checkpoints that it earns, log.csv and curves.png.

        If epochs are short, several are written together (see WRITING_SHARE). scores is {"val" or "test": (loss,
        accuracy, logits)}, as from validate. Raises UserError, and writes nothing, if a loss is not finite.
        """
        sums = sums_of_all_ranks(self.sums)
        row = dict.fromkeys(COLUMNS) | {
            "epoch": self.epoch + 1,
            "lr": sums["lr"],
            "seconds": sums["seconds"] + time.monotonic() - self.trained_at,
            "images_per_second": sums["images"] / sums["seconds"],
            "peak_memory_bytes": peak_memory_bytes(self.device),
        }
        row |= {name: sums[name] for name in NAN_COUNTS if name in sums}
        for split, (loss, accuracy, *logits) in {"train": loss_and_accuracy(sums), **scores}.items():
            if not math.isfinite(loss):
                raise UserError(f"the {split} loss of epoch {row['epoch']} is not finite: lower --lr, or --clip-grad 1")
            row[f"{split}_loss"], row[f"{split}_accuracy"] = loss, accuracy
            warn_if_constant(self, split, *logits)
        self.history.append(row)
        if self.log:
            self.log.add(row)
        self.epoch, self.sums = self.epoch + 1, new_sums(self.device)

        names = ["best.pt"] if is_best(self.history, "val_accuracy") else []
        if row["val_accuracy"] is None and is_best(self.history, "test_accuracy"):
            names.append("best_on_test.pt")  # the report's choice, which is no result
        if self.epoch in self.args.save_epochs:
            names.append(f"epoch-{self.epoch}.pt")
        waited = time.monotonic() - self.last_writing
        always = self.epoch == self.args.epochs or self.args.on_nan == "rollback"
        due = any_rank(always or self.writing_seconds < WRITING_SHARE * waited)[0]
        if names:
            checkpoint = make_checkpoint(self)
            self.unwritten |= dict.fromkeys(names, checkpoint if due else copy.deepcopy(checkpoint))
        if due:
            self.write()
        print(epoch_line(row, self.args.epochs))
        if self.epoch == self.first_epoch + 1 < self.args.epochs:
            left = datetime.timedelta(seconds=round(row["seconds"] * (self.args.epochs - self.epoch)))
            print(f"expected end: {datetime.datetime.now() + left:%Y-%m-%d %H:%M}, in {left}")

    def finish(self, test):
        """Evaluate the last epoch's weights on the test batches; write predictions.npz and result.json.

        Prints what the folder holds, and returns what result.json holds. With --skip-test, there is no test in it.
        """
        if self.epoch < self.args.epochs:
            print(f"no better validation accuracy in --patience {self.args.patience} epochs: stopped early")
            self.write()
        folder, model = self.folder, self.evaluated_model
        if self.args.skip_test:
            result = write_result(self, test_accuracy=None)
            print(accuracy_text(result))
            print(f"open the test set: python {self.script} --resume {folder}{self.attention_again}")
            self.close()
            return result
        _, test_accuracy, logits = validate(model=model, batches=test, precision=self.precision)
        write_predictions(folder / "predictions.npz", logits, self.dataset)
        averaged = model is not self.model
        raw = validate(model=self.model, batches=test, precision=self.precision)[1] if averaged else None
        at_best_val = None
        if from_first_rank((folder / "best.pt").exists):
            best = open_checkpoint(folder / "best.pt", self.device)
            load_weights(model, evaluated_weights(best), sharded=self.args.fsdp)
            _, at_best_val, _ = validate(model=model, batches=test, precision=self.precision)
        on_test = [row["test_accuracy"] for row in self.history if row["test_accuracy"] is not None]
        result = write_result(
            self,
            test_accuracy=test_accuracy,
            test_balanced_accuracy=balanced_accuracy(logits, self.dataset.test.labels),
            test_accuracy_at_best_val=at_best_val,
            best_on_test=max(on_test, default=None),
            raw_test_accuracy=raw,
        )
        print(accuracy_text(result))
        if raw is not None:
            print(f"test accuracy {raw:.2%} of the last weights, without averaging")
            updates = self.schedule.last_epoch / batches_per_step(self.args.accumulate, 0)
            if (initial := self.args.model_ema_decay**updates) > 0.01:
                print(f"warning: the average still has {initial:.0%} of the first weights: lower --model-ema-decay")
        if at_best_val is not None:
            print(f"test accuracy {at_best_val:.2%} at the best validation accuracy")
        if result["best_on_test"] is not None and not self.args.overfit:
            print(f"best_on_test {result['best_on_test']:.2%} (chosen by looking at the test images: no result)")
        print(*(f"  {path}" for path in sorted(folder.iterdir())), sep="\n")
        drawn = self.args.attention not in WITHOUT_MAPS
        where = "its attention maps: python rollout.py" if drawn else "which pixels it looks at: python attribute.py"
        print(f"draw {where} {folder}{self.attention_again}")
        self.close({"final_test_accuracy": test_accuracy})
        return result


def is_best(history, key):
    values = [row[key] for row in history]
    return values[-1] is not None and values[-1] > max(values[:-1], default=-1)
