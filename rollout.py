"""Draw where a model's attention looks, or measure how well its maps point at the object.

    python rollout.py checkpoints/vit --index 3 17 42
    python rollout.py checkpoints/vit --image photo.jpg --method all
    python rollout.py checkpoints/vit --class bird --split train --layer 1 --patches
    python rollout.py checkpoints/vit --evaluate

rollout, raw and report say where information flows, whatever the class; gradient_rollout and relevance, which attention
the class rests on. The methods of attribute.py say which pixels it rests on.

As a library, for any model whose attention is torch's scaled_dot_product_attention or nn.MultiheadAttention:

    with AttentionRecorder(model) as recorder:
        model(images)
    matrices = rollout(recorder.attentions)  # (B, N, N)
"""

import re

import torch

from errors import UserError, run_script
from maps.commands import chosen_methods, evaluate_checkpoint, maps_parser, open_for_maps, output_folder
from maps.draw import draw_layers, draw_matrix, draw_panel, draw_patches, save_map
from maps.images import caption_of, find_class, images_at, normalised
from maps.methods import (
    METHODS,
    attention_maps,
    attention_matrices,
    fuse_heads,
    gradient_rollout,
    maps_in_training_mode,
    maps_of_layers,
    model_maps,
    raw,
    relevance,
    report,
    report_column,
    rollout,
)
from maps.recorder import AttentionRecorder
from training.values import at_least, fraction

__all__ = ["AttentionRecorder", "attention_maps", "gradient_rollout", "raw", "relevance", "report", "rollout"]


def rollout_parser():
    parser = maps_parser(__doc__, METHODS, default="rollout")
    add = parser.add_argument_group("the map").add_argument
    add("--head-fusion", choices=("mean", "max", "min"), default="mean", help="how a layer's heads are joined")
    help_text = "set this share of each row, the lowest weights, to zero, say 0.9 if maps are noisy"
    add("--discard-ratio", type=fraction, default=0.0, metavar="F", help=help_text)
    add("--target", metavar="CLASS", help="the class that methods with gradients explain (default: the predicted one)")
    add("--layers", action="store_true", help="also draw every layer and head by itself")
    add("--matrix", action="store_true", help="also draw the method's whole matrix from tokens to tokens")
    help_text = (
        "also draw the matrix of these layers' attention, numbered from 1; with --evaluate, their heads are rows"
    )
    add("--layer", type=at_least(1), nargs="+", metavar="N", default=[], help=help_text)
    add("--patches", action="store_true", help="also draw the image cut into the patches that a ViT sees")
    return parser


def draw_maps(args, model, checkpoint, chosen, out):
    """Write the maps of each chosen image, and a panel of all images; returns the paths."""
    classes = checkpoint["classes"]
    methods = chosen_methods(args, METHODS, default="rollout")
    label = methods[0] if len(methods) == 1 else "rollout-all"
    options = {"head_fusion": args.head_fusion, "discard_ratio": args.discard_ratio}
    device = next(model.parameters()).device
    inputs = normalised(torch.stack([explained.pixels for explained in chosen]), checkpoint, device)  # (B, 3, S, S)
    targets = None
    if args.target is not None:
        targets = torch.full((len(chosen),), find_class(args.target, classes), device=device)
    matrices, logits, recorder = attention_matrices(model, inputs, methods, targets=targets, **options)
    maps = {method: model_maps(model, matrices[method], recorder.pooling) for method in methods}
    by_image = [{method: maps[method][i].cpu().numpy() for method in methods} for i in range(len(chosen))]
    drawn = {method: matrices[method] for method in methods if args.matrix}  # {title: matrices (B, N, N)}
    check_layers(args, recorder.attentions)
    for layer in args.layer:
        drawn[f"layer-{layer}"] = fuse_heads(recorder.attentions[layer - 1], args.head_fusion)
    captions = [caption_of(*pair, classes) for pair in zip(chosen, logits.softmax(1).cpu(), strict=True)]

    look = {"interpolation": args.interpolation, "dpi": args.dpi}
    written = []

    def new_path(name):
        written.append(out / name)
        return written[-1]

    for explained, caption, found in zip(chosen, captions, by_image, strict=True):
        draw_panel(new_path(f"{explained.name}-{label}.{args.format}"), [explained.shown], [caption], [found], **look)
        for method, one_map in found.items():
            save_map(new_path(f"{explained.name}-{method}.npy"), one_map)
    if len(chosen) > 1:
        shown = [explained.shown for explained in chosen]
        draw_panel(new_path(f"panel-{label}.{args.format}"), shown, captions, by_image, **look)
    for i, (explained, caption) in enumerate(zip(chosen, captions, strict=True)):
        if args.layers:
            layers = maps_of_layers(model, recorder, i)
            draw_layers(new_path(f"{explained.name}-layers.{args.format}"), explained.shown, caption, layers, **look)
        for title, matrix in drawn.items():
            path, words = new_path(f"{explained.name}-{title}-matrix.{args.format}"), re.sub("[_-]", " ", title)
            draw_matrix(path, matrix[i].cpu().numpy(), f"{words}\n{caption}", dpi=args.dpi)
        if args.patches:
            draw_patches(new_path(f"{explained.name}-patches.{args.format}"), model, explained.pixels, dpi=args.dpi)
    return written


def attention_explainers(model, args, image):
    """The chosen methods, the heads of --layer and what the report leaves open, as evaluate takes them.

    The last is the model's mode, and whether the class token's row or its column of the report's matrix is the map.
    A name includes the options that are not the defaults, so that several evaluations share one table. The normalised
    image (1, C, H, W) tells how many heads there are.
    """
    options = {"head_fusion": args.head_fusion, "discard_ratio": args.discard_ratio}
    suffix = f" ({args.head_fusion}, discard {args.discard_ratio:g})" if tuple(options.values()) != ("mean", 0) else ""

    def explainer(method):
        return lambda images, classes: attention_maps(model, images, [method], targets=classes, **options)[0][method]

    def one_head(layer, head):
        def explain(images, classes):
            recorder = attention_matrices(model, images, ())[2]
            return model_maps(model, recorder.attentions[layer - 1][:, head - 1], recorder.pooling)

        return explain

    def in_training_mode(join):
        return lambda images, classes: maps_in_training_mode(model, images, join=join)

    found = {method + suffix: explainer(method) for method in chosen_methods(args, METHODS, default="rollout")}

    if "report" in found:
        found["report, column"] = explainer("report_column")
        found["report, training mode"] = in_training_mode(report)
        found["report, column, training mode"] = in_training_mode(report_column)
    if "rollout" in found:
        found["rollout, training mode"] = in_training_mode(rollout)
    if args.layer:
        attentions = attention_matrices(model, image, ())[2].attentions
        check_layers(args, attentions)
    for layer in args.layer:
        for head in range(1, attentions[layer - 1].shape[1] + 1):
            found[f"layer {layer}, head {head}"] = one_head(layer, head)
    return found


def check_layers(args, attentions):
    """Raises UserError if a layer of --layer does not exist."""
    if args.layer and max(args.layer) > len(attentions):
        raise UserError(f"--layer {max(args.layer)}: the model has {len(attentions)} layers with attention")


def main(argv=None):
    """Draw or evaluate as the command line (or argv) says; returns the paths of the files written."""
    args = rollout_parser().parse_args(argv)
    checkpoint, model, chosen, dataset = open_for_maps(args)
    out = output_folder(args)
    if args.evaluate:
        first = images_at(dataset.test.images, torch.tensor([0]))
        image = normalised(first, checkpoint, next(model.parameters()).device)  # (1, C, H, W)
        written = evaluate_checkpoint(args, checkpoint, model, dataset, attention_explainers(model, args, image), out)
    else:
        written = draw_maps(args, model, checkpoint, chosen, out)
    for path in written:
        print(f"  {path}")
    return written


if __name__ == "__main__":
    run_script(main)
