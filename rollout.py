"""Draw where a model's attention looks, or measure how well its maps point at the object.

    python rollout.py checkpoints/vit --index 3 17 42
    python rollout.py checkpoints/vit --image photo.jpg --method all
    python rollout.py checkpoints/vit --evaluate

As a library, on any model whose attention is torch's scaled_dot_product_attention or nn.MultiheadAttention:

    with AttentionRecorder(model) as recorder:
        model(images)
    matrices = rollout(recorder.attentions)  # (B, N, N)
"""

import numpy as np
import torch

from errors import run_script
from files import write_atomically
from maps.arguments import chosen_methods, explaining_parser, open_for_explaining, output_folder
from maps.draw import draw_layers, draw_matrix, draw_panel
from maps.images import caption_of, find_class, normalised
from maps.methods import (
    METHODS,
    attention_maps,
    gradient_rollout,
    maps_as_reported,
    model_maps,
    raw,
    relevance,
    report,
    rollout,
)
from maps.record import evaluate_checkpoint
from maps.recorder import AttentionRecorder
from training.arguments import fraction

__all__ = ["AttentionRecorder", "attention_maps", "gradient_rollout", "raw", "relevance", "report", "rollout"]


def rollout_parser():
    parser = explaining_parser(__doc__, METHODS, default="rollout")
    ways = parser.add_argument_group("the map")
    ways.add_argument("--head-fusion", choices=("mean", "max", "min"), default="mean", help="over the heads (mean)")
    ways.add_argument("--discard-ratio", type=fraction, default=0.0, metavar="F", help="of each row, the lowest (0)")
    ways.add_argument("--target", metavar="CLASS", help="the class that gradients explain (the predicted one)")
    ways.add_argument("--layers", action="store_true", help="draw every layer and head by itself, too")
    ways.add_argument("--matrix", action="store_true", help="draw the whole matrix from tokens to tokens, too")
    return parser


def draw_maps(args, model, checkpoint, chosen, out):
    """Write the maps of the chosen images, each by itself and all in one panel; returns the paths."""
    classes = checkpoint["classes"]
    methods = chosen_methods(args, METHODS, default="rollout")
    label = methods[0] if len(methods) == 1 else "all"
    options = {"head_fusion": args.head_fusion, "discard_ratio": args.discard_ratio}
    device = next(model.parameters()).device
    inputs = normalised(torch.stack([explained.pixels for explained in chosen]), checkpoint, device)
    targets = None
    if args.target is not None:
        targets = torch.full((len(chosen),), find_class(args.target, classes), device=device)
    found, logits = attention_maps(model, inputs, methods, targets=targets, **options)
    found = [{method: maps[i].cpu().numpy() for method, maps in found.items()} for i in range(len(chosen))]
    captions = [caption_of(*pair, classes) for pair in zip(chosen, logits.softmax(1).cpu(), strict=True)]

    look = {"interpolation": args.interpolation, "dpi": args.dpi}
    written = []

    def path_of(*parts):
        written.append(out / f"{'-'.join(parts)}.{args.format}")
        return written[-1]

    for explained, caption, maps in zip(chosen, captions, found, strict=True):
        draw_panel(path_of(explained.name, label), [explained.shown], [caption], [maps], **look)
        for method, one_map in maps.items():
            path = out / f"{explained.name}-{method}.npy"
            write_atomically(path, lambda file, one_map=one_map: np.save(file, one_map))
            written.append(path)
    if len(chosen) > 1:
        draw_panel(path_of("panel", label), [e.shown for e in chosen], captions, found, **look)
    if args.layers or args.matrix:
        with torch.no_grad(), AttentionRecorder(model) as recorder:
            model(inputs)
        for i, (explained, caption) in enumerate(zip(chosen, captions, strict=True)):
            if args.layers:
                heads = [model_maps(model, a[i], pooled(recorder, i, a.shape[1])) for a in recorder.attentions]
                maps = torch.stack(heads).cpu().numpy()
                draw_layers(path_of(explained.name, "layers"), explained.shown, caption, maps, **look)
            if args.matrix:
                matrix = rollout(recorder.attentions, **options, class_token=recorder.pooling is None)[i]
                draw_matrix(path_of(explained.name, "matrix"), matrix.cpu().numpy(), caption, dpi=args.dpi)
    return written


def pooled(recorder, index, heads):
    """One image's pooling weights once a head, where the model pools."""
    return None if recorder.pooling is None else recorder.pooling[index].expand(heads, -1)


def explainers(model, args):
    """The chosen methods, and the report's own way of running: {name: function of (images, classes)}.

    The names say which options were not the default, so that several evaluations fill one table.
    """
    options = {"head_fusion": args.head_fusion, "discard_ratio": args.discard_ratio}
    suffix = f" ({args.head_fusion}, discard {args.discard_ratio:g})" if tuple(options.values()) != ("mean", 0) else ""

    def way(method):
        return lambda inputs, classes: attention_maps(model, inputs, [method], targets=classes, **options)[0][method]

    found = {method + suffix: way(method) for method in chosen_methods(args, METHODS, default="rollout")}
    if "report" in found:
        found["report, as it was run"] = lambda inputs, classes: maps_as_reported(model, inputs, join=report)
    if "rollout" in found:
        found["rollout, run that way"] = lambda inputs, classes: maps_as_reported(model, inputs, join=rollout)
    return found


def main(argv=None):
    """Draw or evaluate as argv (or the command line) says; returns the paths of what was written."""
    args = rollout_parser().parse_args(argv)
    checkpoint, model, chosen, dataset = open_for_explaining(args)
    out = output_folder(args)
    if args.evaluate:
        written = evaluate_checkpoint(args, checkpoint, model, dataset, explainers(model, args), out)
    else:
        written = draw_maps(args, model, checkpoint, chosen, out)
    for path in written:
        print(f"  {path}")
    return written


if __name__ == "__main__":
    run_script(main)
