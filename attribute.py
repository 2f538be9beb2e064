"""Draw which pixels a model's decision rests on, by Captum's attributions, or measure how good these are.

    python attribute.py checkpoints/vit --index 3
    python attribute.py checkpoints/vit --image photo.jpg --method integrated_gradients --target cat ship
    python attribute.py checkpoints/vit --evaluate

Unlike rollout.py it needs no attention in the model.
"""

import numpy as np
import torch

from errors import run_script
from files import write_atomically
from maps.arguments import chosen_methods, explaining_parser, open_for_explaining, output_folder
from maps.attributions import ATTRIBUTIONS
from maps.draw import draw_attributions
from maps.images import caption_of, find_class, normalised
from maps.record import evaluate_checkpoint


def attribute_parser():
    parser = explaining_parser(__doc__, tuple(ATTRIBUTIONS), default="integrated_gradients")
    parser.add_argument("--target", nargs="+", metavar="CLASS", help="the classes to explain (the predicted one)")
    return parser


def attribute_images(args, model, checkpoint, chosen, out):
    """Write an image each: a row for every method and class; and the raw maps. Returns the paths."""
    classes = checkpoint["classes"]
    targets = [find_class(name, classes) for name in args.target or ()]
    methods = chosen_methods(args, ATTRIBUTIONS, default="integrated_gradients")
    label = methods[0] if len(methods) == 1 else "all"
    device = next(model.parameters()).device
    written = []
    for explained in chosen:
        inputs = normalised(explained.pixels[None], checkpoint, device)
        with torch.no_grad():
            probabilities = model(inputs)[0].softmax(0).cpu()
        rows = []
        for method in methods:
            for target in targets or [int(probabilities.argmax())]:
                maps, delta = ATTRIBUTIONS[method](model, inputs, torch.tensor([target], device=device))
                title = f"{method.replace('_', ' ')}\n{classes[target]} ({probabilities[target]:.0%})"
                if delta is not None:
                    title += f", delta {delta.item():+.3f}"
                one_map = maps[0].cpu().numpy()
                rows.append((title, one_map))
                path = out / f"{explained.name}-{method}-{classes[target]}.npy"
                write_atomically(path, lambda file, one_map=one_map: np.save(file, one_map))
                written.append(path)
        path = out / f"{explained.name}-{label}.{args.format}"
        caption = caption_of(explained, probabilities, classes)
        draw_attributions(path, explained.shown, caption, rows, interpolation=args.interpolation, dpi=args.dpi)
        written.append(path)
    return written


def main(argv=None):
    """Draw or evaluate as argv (or the command line) says; returns the paths of what was written."""
    args = attribute_parser().parse_args(argv)
    checkpoint, model, chosen, dataset = open_for_explaining(args)
    out = output_folder(args)
    torch.manual_seed(0)  # of the methods that draw at random
    if args.evaluate:
        explainers = {
            name: lambda inputs, classes, name=name: ATTRIBUTIONS[name](model, inputs, classes)[0]
            for name in chosen_methods(args, ATTRIBUTIONS, default="integrated_gradients")
        }
        written = evaluate_checkpoint(args, checkpoint, model, dataset, explainers, out)
    else:
        written = attribute_images(args, model, checkpoint, chosen, out)
    for path in written:
        print(f"  {path}")
    return written


if __name__ == "__main__":
    run_script(main)
