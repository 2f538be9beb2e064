"""Images per second of an exported model in onnxruntime beside the same model in torch, both in float32.

python -m benchmarks.export --out results/speed/export-cpu.json
"""

import torch

from benchmarks.peers import installed
from benchmarks.turns import print_machine, print_speeds, speed_parser, take_turns, write_speeds
from errors import run_script
from models import build_model
from models.portable import PORTABLE
from training.device import Precision

MODELS = ("vit", "cct_2_3x2")
BATCH_SIZES = (1, 64)


def main(argv=None):
    args = speed_parser(__doc__.splitlines()[0]).parse_args(argv)
    precision = Precision("off", torch.device("cpu"))  # ours as it is evaluated
    speeds = {}
    print_machine(precision.device, f"torch {torch.__version__}")
    for name in MODELS if installed("onnxruntime", "onnxscript") else ():
        model = build_model(name).eval()
        _, convert, runner = PORTABLE["onnx"]
        exported = runner(model, convert(model, torch.zeros(2, 3, 32, 32), {}))
        for count in BATCH_SIZES:
            images, job = torch.randn(count, 3, 32, 32), f"{name}, batches of {count}"

            def counted_logits(run, images=images):
                return lambda: len(run(images))

            ways = {"torch": counted_logits(model), "onnxruntime": counted_logits(exported)}
            with torch.inference_mode():
                speeds[job] = take_turns(ways, precision.device, rounds=args.rounds, seconds=args.seconds)
            print_speeds(job, speeds[job])
    if args.out and speeds:
        write_speeds(args.out, precision.device, {"images_per_second": speeds})


if __name__ == "__main__":
    run_script(main)
