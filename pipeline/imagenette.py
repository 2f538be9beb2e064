"""fastai's Imagenette and Imagewoof: ten classes of ImageNet each, easy ones and dog breeds."""

import os
import sys
from pathlib import Path

from torchvision.datasets.utils import download_and_extract_archive

from errors import UserError

IMAGENETTES = ("imagenette", "imagewoof")
URL = "https://s3.amazonaws.com/fast-ai-imageclas"
MD5_SUMS = {  # Imagenette's from torchvision; Imagewoof's from catalyst, whose sums of Imagenette are the same
    "imagenette2-160": "e793b78cc4c9e9a4ccc0c1155377a412",
    "imagenette2-320": "3df6f0d01a2c9592104656642f5e78a3",
    "imagenette2": "fe2fc210e6bb7c5664d602c3cd71e612",
    "imagewoof2-160": "3d200a7be99704a0d7509be2a9fbfe15",
    "imagewoof2-320": "0f46d997ec2264e97609196c95897a44",
    "imagewoof2": "9aafe18bcdb1632c4249a76c458465ba",
}
READABLE = {
    **{"n01440764": "tench", "n02102040": "English springer", "n02979186": "cassette player", "n03000684": "chain saw"},
    **{"n03028079": "church", "n03394916": "French horn", "n03417042": "garbage truck", "n03425413": "gas pump"},
    **{"n03445777": "golf ball", "n03888257": "parachute", "n02086240": "Shih-Tzu", "n02087394": "Rhodesian ridgeback"},
    **{"n02088364": "beagle", "n02089973": "English foxhound", "n02093754": "Border terrier"},
    **{"n02096294": "Australian terrier", "n02099601": "golden retriever", "n02105641": "Old English sheepdog"},
    **{"n02111889": "Samoyed", "n02115641": "dingo"},
}


def find_imagenette(name, data_dir, image_size):
    """The folder of imagenette or imagewoof, with train/ and val/: data_dir/imagewoof, or that of fastai's archive.

    The archive has 160 pixels up to --image-size 128, 320 up to 224, else the images' own sizes, as in fastai. If it is
    missing, it is downloaded, and its MD5 sum is checked. Raises UserError if that fails.
    """
    archive = f"{name}2" + ("-160" if image_size <= 128 else "-320" if image_size <= 224 else "")
    folder = Path(data_dir, archive)
    for found in (Path(data_dir, name), folder):
        if (found / "train").is_dir():
            return found
    partial_folder = Path(data_dir, f".{archive}.part")  # renamed when complete
    try:
        download_and_extract_archive(f"{URL}/{archive}.tgz", data_dir, partial_folder, md5=MD5_SUMS[archive])
        os.replace(partial_folder / archive, folder)
        partial_folder.rmdir()
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{name} is not in {data_dir} and cannot be downloaded ({error}): "
            f"put {archive}.tgz or its folder {archive} there, or set --data-dir to its folder"
        ) from error
    return folder


def warn_of_seen_images(name):
    """Warn on stderr if weights trained on ImageNet have seen the test images of the dataset `name`."""
    if name in IMAGENETTES:
        seen = f"most test images of {name} are training images of ImageNet, which the weights have seen"
        print(f"warning: --pretrained: {seen}", file=sys.stderr)
