import pytest
import torch
from conftest import write_images

from data import load_dataset
from errors import UserError
from maps.draw import cut_into_patches
from maps.images import chosen_images, find_class
from models import build_model


def test_an_image_is_cut_into_patches_and_put_back_together():
    pixels = torch.randint(255, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    apart, together = cut_into_patches(build_model("vit", embed_dim=16, depth=1, num_heads=2), pixels)
    assert torch.equal(together, pixels) and apart.shape == (3, 39, 39)  # 8 patches of 4 pixels, 7 gaps of one
    assert (apart[:, 4::5] == 255).all() and (apart[:, :, 4::5] == 255).all()
    assert torch.equal(apart[:, 5:9, 10:14], pixels[:, 4:8, 8:12])
    padded = build_model("vit", patch_size=6, pad=True, embed_dim=16, depth=1, num_heads=2)
    _, together = cut_into_patches(padded, pixels)
    assert torch.equal(together[:, :32, :32], pixels) and (together[:, 32:] == 128).all()
    with pytest.raises(UserError, match="--patches: CompactTransformer does not cut an image into patches"):
        cut_into_patches(build_model("cct_2_3x2"), pixels)


def test_classes_are_found_by_name_index_beginning_and_end():
    classes = ["airplane", "automobile", "bird", "cat", "caterpillar", "3", "crane", "crane"]
    found = {"plane": 0, "auto": 1, "bird": 2, "cat": 3, "cater": 4, "3": 5, "2": 2, "7": 7}
    assert {text: find_class(text, classes) for text in found} == found
    for text, problem in {
        "a": "--class a fits 2 of them: the",
        "dog": "--class dog: the",
        "crane": "fits 2",
        "": "",
    }.items():
        with pytest.raises(UserError, match=f"{problem}.* classes are airplane, automobile, .* or 0 to 7"):
            find_class(text, classes, flag="--class")


def test_large_training_images_are_cropped_as_test_images_are(tmp_path):
    for split in ("train", "test"):
        write_images(tmp_path / split, classes=("bee", "cat"), count=3, size=(150, 100))  # the same in both
    dataset = load_dataset("folder", data_dir=tmp_path, image_size=72, cache_dir=tmp_path / "cache")
    train, test = (chosen_images(dataset, split, class_name="cat", count=2) for split in ("train", "test"))
    assert [image.name for image in train] == ["train-3", "train-4"] and [image.name for image in test] == ["3", "4"]
    for one, other in zip(train, test, strict=True):
        assert torch.equal(one.pixels, other.pixels) and one.label == 1
    dataset.test.labels.zero_()
    with pytest.raises(UserError, match="--class cat: the test images have none of this class"):
        chosen_images(dataset, class_name="cat")
