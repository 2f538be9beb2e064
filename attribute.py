"""Draw which pixels a model's decision depends on, by Captum's attributions, or measure how good these are.

    python attribute.py checkpoints/vit --index 3
    python attribute.py checkpoints/vit --image photo.jpg --method integrated_gradients --target cat ship
    python attribute.py checkpoints/vit --compare
    python attribute.py checkpoints/vit --evaluate

Unlike rollout.py it needs no attention in the model. --compare draws the maps of both commands.
"""

import re

import torch

from errors import UserError, run_script
from maps.attributions import ATTRIBUTIONS
from maps.commands import chosen_methods, evaluate_checkpoint, maps_parser, open_for_maps, output_folder, read_table
from maps.draw import draw_attributions, draw_comparison, save_map
from maps.images import caption_of, find_class, normalised
from maps.methods import METHODS, attention_maps


def attribute_parser():
    parser = maps_parser(__doc__, tuple(ATTRIBUTIONS), default="integrated_gradients")
    help_text = "the classes to explain, one row each (default: the predicted one)"
    parser.add_argument("--target", nargs="+", metavar="CLASS", help=help_text)
    help_text = "draw all methods for the same image instead, those of rollout.py too; after --evaluate, the best first"
    parser.add_argument("--compare", action="store_true", help=help_text)
    return parser


def compare_methods(args, model, checkpoint, chosen, out):
    """Write one figure per image with the maps of all methods; returns the paths.

    The methods are ordered by pointing, or else by saco, in the folder's evaluation.json. Those that the model does not
    support are named.
    """
    device = next(model.parameters()).device
    inputs = normalised(torch.stack([explained.pixels for explained in chosen]), checkpoint, device)  # (B, 3, S, S)
    with torch.no_grad():
        probabilities = model(inputs).softmax(1)
    classes = probabilities.argmax(1)
    if args.target:
        classes = torch.full_like(classes, find_class(args.target[0], checkpoint["classes"]))
    ways = [lambda: attention_maps(model, inputs, METHODS, targets=classes)[0]]
    ways += [lambda name=name: {name: ATTRIBUTIONS[name](model, inputs, classes)[0]} for name in ATTRIBUTIONS]
    found = {}
    for way in ways:
        try:
            found |= way()
        except UserError as error:
            print(f"left out: {error}")
    scores = (read_table(out / "evaluation.json") or {}).get("scores", {})
    measure = next((m for m in ("pointing", "saco") if any(m in row for row in scores.values())), None)
    order = sorted(found, key=lambda name: -scores.get(name, {}).get(measure, (-2,))[0])
    written = []
    for i, explained in enumerate(chosen):
        written.append(out / f"{explained.name}-compare.{args.format}")
        maps = {name: found[name][i].cpu().numpy() for name in order}
        caption = caption_of(explained, probabilities[i].cpu(), checkpoint["classes"])
        draw_comparison(written[-1], explained.shown, caption, maps, interpolation=args.interpolation, dpi=args.dpi)
    return written


def draw_image_attributions(args, model, checkpoint, chosen, out):
    """Write one figure per image, with a row per method and class, and the raw maps; returns the paths."""
    classes = checkpoint["classes"]
    targets = [find_class(name, classes) for name in args.target or ()]
    methods = chosen_methods(args, ATTRIBUTIONS, default="integrated_gradients")
    label = methods[0] if len(methods) == 1 else "attribution-all"
    device = next(model.parameters()).device
    written = []
    for explained in chosen:
        inputs = normalised(explained.pixels[None], checkpoint, device)  # (1, 3, S, S)
        with torch.no_grad():
            probabilities = model(inputs)[0].softmax(0).cpu()  # (classes,)
        rows = []
        for method in methods:
            for target in targets or [int(probabilities.argmax())]:
                maps, delta = ATTRIBUTIONS[method](model, inputs, torch.tensor([target], device=device))
                title = f"{method.replace('_', ' ')}\n{classes[target]} ({probabilities[target]:.0%})"
                if delta is not None:
                    title += f", delta {delta.item():+.3f}"
                rows.append((title, maps[0].cpu().numpy()))
                # by index too: names may be alike, or become so
                safe = re.sub(r"[^\w.-]+", "_", classes[target])
                written.append(out / f"{explained.name}-{method}-{target}-{safe}.npy")
                save_map(written[-1], rows[-1][1])
        written.append(out / f"{explained.name}-{label}.{args.format}")
        caption = caption_of(explained, probabilities, classes)
        look = {"interpolation": args.interpolation, "dpi": args.dpi}
        draw_attributions(written[-1], explained.shown, caption, rows, **look)
    return written


def main(argv=None):
    """Draw or evaluate as the command line (or argv) says; returns the paths of the files written."""
    args = attribute_parser().parse_args(argv)
    if args.compare and (args.evaluate or args.method or len(args.target or ()) > 1):
        raise UserError("--compare draws all methods for one class: without --evaluate, --method or a second --target")
    checkpoint, model, chosen, dataset = open_for_maps(args)
    out = output_folder(args)
    torch.manual_seed(0)  # for methods with random numbers
    if args.evaluate:
        explainers = {
            name: lambda images, classes, name=name: ATTRIBUTIONS[name](model, images, classes)[0]
            for name in chosen_methods(args, ATTRIBUTIONS, default="integrated_gradients")
        }
        written = evaluate_checkpoint(args, checkpoint, model, dataset, explainers, out)
    else:
        written = (compare_methods if args.compare else draw_image_attributions)(args, model, checkpoint, chosen, out)
    for path in written:
        print(f"  {path}")
    return written


if __name__ == "__main__":
    run_script(main)
