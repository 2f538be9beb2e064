"""A page in the browser: drop a photograph, and see what a model takes it for, and where it looks.

    python demo.py checkpoints/vit
    python demo.py checkpoints/vit checkpoints/cct_2_3x2 --device cpu

Only this computer can open the page; docs/demo.md says how to see it on Colab. It needs gradio:
pip install -r requirements-demo.txt
"""

import html
import os
from functools import cached_property, lru_cache
from pathlib import Path
from threading import Lock

import torch

from errors import UserError, import_optional, run_script
from maps.commands import checkpoint_parser
from maps.draw import panel_figure
from maps.images import caption_of, checkpoint_dataset, chosen_images, normalised, photographs
from maps.methods import METHODS, attention_matrices, maps_of_layers, model_maps
from models import build_model
from training.checkpoint import image_shape, load_checkpoint, rebuild_model
from training.device import pick_device
from training.values import is_own_class

ONE_AT_A_TIME = Lock()  # the recorder replaces a function of torch's for the whole process


def demo_parser():
    help_text = "runs' folders or checkpoint files, to choose from"
    return checkpoint_parser(__doc__, "checkpoints", nargs="+", metavar="RUN", help=help_text)


class ShownRun:
    """A run on the page: checkpoint, model, number of layers and heads, dataset. Raises UserError without attention."""

    def __init__(self, path, args):
        self.device, self.places = pick_device(args.device), {"data_dir": args.data_dir, "cache_dir": args.cache_dir}
        self.checkpoint = load_checkpoint(path, which=args.which, device=self.device)
        own = args.attention if is_own_class(self.checkpoint["model_args"].get("attention")) else None
        self.model = rebuild_model(self.checkpoint, build_model, attention=own).to(self.device)
        blank = torch.zeros(
            1, *image_shape(len(self.checkpoint["mean"]), self.checkpoint["image_size"]), device=self.device
        )
        try:
            recorder = attention_matrices(self.model, blank, ["raw"])[2]
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        self.layers, self.heads = len(recorder.attentions), min(layer.shape[1] for layer in recorder.attentions)

    @cached_property
    def dataset(self):
        return checkpoint_dataset(self.checkpoint, **self.places)  # only if one of its images is asked for


@lru_cache(maxsize=8)
def decoded_photograph(path, run):
    return photographs([Path(path)], run.checkpoint)[0]


def look(run, photo, number, method="rollout", layer=0, head=0):
    """({class: probability}, figure of the map) of a photograph's file, or of the test image of this number.

    With a layer, counted from 1, the map is that of its attention alone, of one head or (0) of the mean over its heads;
    with layer 0 the method joins all of them. Raises UserError.
    """
    if head and not layer:
        raise UserError(f"head {head}: choose a layer, too; heads of different layers have no relation")
    explained = decoded_photograph(photo, run) if photo else chosen_images(run.dataset, indices=[number])[0]
    inputs = normalised(explained.pixels[None], run.checkpoint, run.device)  # (1, C, H, W)
    method = "raw" if layer else method
    with ONE_AT_A_TIME:
        matrices, logits, recorder = attention_matrices(run.model, inputs, [method])
    drawn = {method: model_maps(run.model, matrices[method], recorder.pooling)[0].cpu().numpy()}
    if layer:
        heads = maps_of_layers(run.model, recorder, 0)[layer - 1]  # (heads, h, w)
        drawn = {f"layer {layer}, head {head}": heads[head - 1]} if head else {f"layer {layer}": heads.mean(0)}
    probabilities, classes = logits.softmax(1)[0].cpu(), run.checkpoint["classes"]
    figure = panel_figure([explained.shown], [caption_of(explained, probabilities, classes)], [drawn])
    return dict(zip(classes, probabilities.tolist(), strict=True)), figure


def import_gradio():
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported, too
    return import_optional("gradio", "-r requirements-demo.txt")


def make_page(runs):
    """The page, a gradio.Blocks, for runs {name: ShownRun}."""
    gr = import_gradio()
    names = list(runs)

    def answer(name, photo, number, method, layer, head):
        if not photo and number is None:
            return None, None
        try:
            return look(runs[name], photo, number, method, layer, head)
        except UserError as error:
            message = str(error).replace(photo, Path(photo).name) if photo else str(error).removeprefix("--index ")
            raise gr.Error(html.escape(message, quote=False), duration=None, print_exception=False) from error

    def layers_and_heads(name):
        counts = {"all, joined by the method": runs[name].layers, "all, their mean": runs[name].heads}
        numbers = [[(everything, 0)] + [(str(n), n) for n in range(1, last + 1)] for everything, last in counts.items()]
        return [gr.Dropdown(choices, value=0, label=label) for choices, label in zip(numbers, ("layer", "head"))]

    with gr.Blocks(title="Where does it look?", analytics_enabled=False, delete_cache=(3600, 3600)) as page, gr.Row():
        with gr.Column(scale=1):
            photo = gr.File(label="Drop a photograph", file_types=["image"], height=120)
            number = gr.Number(label="or a test image, by its number", value=None, precision=0, minimum=0)
            name = gr.Dropdown(names, value=names[0], label="model", visible=len(names) > 1)
            method = gr.Dropdown(METHODS, value="rollout", label="method")
            layer, head = layers_and_heads(names[0])
        with gr.Column(scale=3):
            figure = gr.Plot(show_label=False)
            label = gr.Label(label="what it sees", num_top_classes=5)
        asked = {"fn": answer, "inputs": [name, photo, number, method, layer, head], "outputs": [label, figure]}
        private = {"api_visibility": "private", "queue": False}
        gr.on([method.input, layer.input, head.input], **asked, api_name="look", trigger_mode="always_last")
        photo.upload(lambda: None, None, number, **private).then(**asked, api_visibility="private")
        number.input(lambda: None, None, photo, **private).then(**asked, api_visibility="private")
        name.input(layers_and_heads, name, [layer, head], **private).then(**asked, api_visibility="private")
    return page


def main(argv=None):
    """Open the page as the command line (or argv) says; returns when it is closed, in a notebook at once."""
    args = demo_parser().parse_args(argv)
    import_gradio()
    page = make_page({str(path): ShownRun(path, args) for path in args.checkpoints})
    page.launch(server_name="127.0.0.1", share=False, max_file_size="100mb", footer_links=["gradio"])


if __name__ == "__main__":
    run_script(main)
