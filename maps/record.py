"""One evaluation of a checkpoint: the table, its JSON and its curves. Attention maps and attributions share it."""

import json

import torch
from tqdm.auto import tqdm

from errors import UserError
from files import write_atomically
from maps.draw import draw_deletion_curves
from maps.evaluate import baselines, evaluate
from maps.images import normalised, object_masks
from training.device import Precision, is_memory_error

# what must agree for two evaluations to stand in one table
SAME = ("checkpoint", "model", "epoch", "data_hash", "images")


def table_text(table):
    """The table as aligned text, each cell a mean and its standard error."""
    measures = list(dict.fromkeys(measure for row in table.values() for measure in row))
    lines = [["", *measures]]
    for name, row in table.items():
        lines.append([name, *("{:.3f} ± {:.3f}".format(*row[m]) if m in row else "-" for m in measures)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def evaluate_checkpoint(args, checkpoint, model, dataset, explainers, out):
    """Score explainers (see evaluate) and the baselines on --num-images test images, evenly spread over the test set.

    Prints the table, and writes evaluation.json and deletion.png into out, with the rows of an earlier evaluation of
    the same checkpoint on the same images. Returns both paths.
    """
    total = len(dataset.test.labels)
    indices = torch.linspace(0, total - 1, min(args.num_images, total)).round().long()
    masks, outlines = object_masks(checkpoint, dataset, indices)
    device = next(model.parameters()).device

    def batches():
        for chunk in tqdm(indices.split(args.batch_size), "evaluating", disable=None, unit="batch"):
            yield normalised(dataset.test.images[chunk], checkpoint, device)

    torch.manual_seed(0)  # for methods that draw at random
    explainers = explainers | baselines(model.grid)
    precision = Precision("auto", device)
    try:
        table, curves = evaluate(model, batches(), explainers, precision, masks=masks, outlines=outlines)
    except Exception as error:
        if is_memory_error(error):
            raise UserError(f"--batch-size {args.batch_size} does not fit into memory; a smaller one may") from error
        raise
    record = {
        "checkpoint": f"{args.checkpoint.name} {args.which or 'last'}",
        "model": checkpoint["model"],
        "epoch": checkpoint["epoch"],
        "dataset_name": dataset.name,
        "data_hash": dataset.data_hash(),
        "images": len(indices),
        "patches": list(model.grid),
    }
    path = out / "evaluation.json"
    if path.exists():
        before = json.loads(path.read_text())
        if all(before.get(key) == record[key] for key in SAME):
            table, curves = before["scores"] | table, before["curves"] | curves
    record |= {"scores": table, "curves": curves}
    print(table_text(table))
    write_atomically(path, lambda file: file.write((json.dumps(record, indent=1) + "\n").encode()))
    caption = f"{len(indices)} test images of {dataset.name}, epoch {checkpoint['epoch']}"
    draw_deletion_curves(out / "deletion.png", curves, caption, dpi=args.dpi)
    return [path, out / "deletion.png"]
