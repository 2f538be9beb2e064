"""Files that strangers wrote: read, or refused in one line. Nothing in them runs, nothing is written elsewhere."""

import gzip
import io
import itertools
import json
import os
import pickle
import resource
import shutil
import struct
import tarfile
import time
import zipfile
import zlib
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, TINY, write_images
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import torch as safetensors

import campaign
import compare
import generate
import predict
import rollout
import train_generator
import train_vit
from data import load_dataset
from errors import UserError
from models import build_model
from models.pretrained import load_published
from pipeline.decoding import decode_image
from pipeline.large import centre_crop, upright_size
from pipeline.shards import read_webdataset
from training.checkpoint import load_checkpoint, rebuild_model
from training.generating import read_record
from training.weights import start_from_weights

SECONDS = 10
pytestmark = pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")
OTHERS = [None, True, -1, 0, 2**31, 10**30, 0.5, float("nan"), float("inf"), "", "x", "a\nb\0", "\ud800", "../x"]
OTHERS += [[], [1], ["a"], [[]], {}, {"a": 1}, {"": []}]
TENSORS = [torch.tensor(1.0), torch.zeros(0), torch.zeros(2, 2, dtype=torch.int64), torch.tensor(1).expand(10**12)]
LITERALS = [
    "1",
    "-1",
    "1e400",
    "true",
    '""',
    '"\\u0000"',
    '"x"',
    "[]",
    "[[1]]",
    "{}",
    "2020-01-01",
    "nan",
    "'--x'",
    "[",
]
PLAN = """title = "a"
seeds = 2
baseline = "b"
paired = true
[[rows]]
name = "b"
script = "train_vit.py"
arguments = "--epochs 5"
not_run = "x"
published = "89"
[[measurements]]
name = "m"
script = "rollout.py"
checkpoint = "a/b"
arguments = ["--num-images", "3"]
"""
FORMATS = [("png", "RGB L P RGBA 1 LA I;16"), ("jpeg", "RGB L CMYK"), ("bmp", "RGB L P 1"), ("gif", "P RGB")]
FORMATS += [("tiff", "RGB CMYK I;16 F 1"), ("webp", "RGB RGBA"), ("ppm", "RGB L 1")]


def image_bytes(kind, mode):
    """A small image, turned by an EXIF tag where the format has one."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    image = Image.fromarray(pixels[..., 0].astype({"I;16": np.uint16, "F": np.float32}.get(mode, np.uint8)))
    image = image if mode in ("I;16", "F") else Image.fromarray(pixels).convert(mode)
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    image.save(file, kind, **({"exif": exif} if kind in ("jpeg", "png", "webp") else {}))
    return file.getvalue()


def members(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rezipped(content, pickled):
    """A checkpoint with another data.pkl: with right checksums, and without the digest of the whole file."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as new:
        for name, part in members(content).items():
            new.writestr(name, pickled if name.endswith("data.pkl") else part)
    return file.getvalue()


def tar_bytes(members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


@st.composite
def damaged(draw, contents):
    """One of the contents with bytes changed, cut out, inserted, or cut off."""
    content = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, min(len(content), draw(st.sampled_from([60, 10**9])))))
        new = draw(st.sampled_from([b"\0", b"\xff", b"\x7f\xff\xff\xff", b"\0\0\xc3\x50"]) | st.binary(max_size=8))
        content[place : place + draw(st.sampled_from([0, len(new), len(new), 20, 10**9]))] = new
    return bytes(content)


@st.composite
def replaced(draw, value, others):
    """A value in which one of its parts, at any depth, is another."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    if not keys or not draw(st.integers(0, 3)):
        return draw(st.sampled_from(others))
    key = draw(st.sampled_from(list(keys)))
    copied = value.copy()
    copied[key] = draw(replaced(value[key], others))
    return copied


@st.composite
def other_toml(draw, text):
    lines = text.splitlines()
    number = draw(st.sampled_from([i for i, line in enumerate(lines) if " = " in line]))
    lines[number] = f"{lines[number].partition(' = ')[0]} = {draw(st.sampled_from(LITERALS))}"
    return "\n".join(lines).encode()


def as_json(value):
    deep = st.sampled_from([b"[" * 10**5, b'{"a":' * 10**5, b'"\\ud800"', b"\x1b[2J", b"1" * 5000])
    other = replaced(value, OTHERS).map(lambda new: json.dumps(new).encode())
    return other | damaged([json.dumps(value).encode()]) | deep


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images, and runs of a ViT and a diffusion model on them."""
    place = tmp_path_factory.mktemp("strangers")
    write_images(place / "pets", count=8)
    flags = ["--data-dir", "pets", "--image-size", "16", "--epochs", "1", "--out-dir", "runs", "--cache-dir", "cache"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        train_vit.main([*flags, *TINY, "--patch-size", "8", "--val-fraction", "0.2"])
        train_generator.main([*flags, "--width", "8", "--depth", "1", "--noise-steps", "10", "--device", "cpu"])
        rollout.main(["runs/vit", "--evaluate", "--num-images", "2", "--method", "rollout", "--device", "cpu"])
    return place


@pytest.fixture(scope="module")
def kinds(place):
    """{kind of file: (its name, its damaged contents as a strategy, what reads it)}."""
    file, checkpoint = (place / "runs/vit/last.pt").read_bytes(), load_checkpoint(place / "runs/vit")
    names = ("result.json", "maps/evaluation.json")
    result, evaluation = (json.loads((place / "runs/vit" / name).read_text()) for name in names)
    images = [image_bytes(kind, mode) for kind, modes in FORMATS for mode in modes.split()]
    shard = tar_bytes({f"{name}.{end}": part for name in "ab" for end, part in (("png", images[0]), ("cls", b"1"))})
    arrays = safetensors.save(checkpoint["weights"])
    model = build_model(checkpoint["model"], **checkpoint["model_args"])
    record = {"model": "ddpm", "trained_on": "ab", "seed": 0, "steps": 50}
    pickled = next(part for name, part in members(file).items() if name.endswith("data.pkl"))
    archives = damaged([pickled]).map(lambda new: rezipped(file, new)) | damaged([file])
    values = replaced(checkpoint, [*OTHERS, *TENSORS]).map(saved)

    def read_image(path):
        for read in (upright_size, lambda path: decode_image(path, 16), lambda path: centre_crop(path, 16)):
            read(path)

    def start(path):
        start_from_weights(path, partial(load_published, model), None)

    def read_shard(path):
        (path.parent / "classes.txt").write_text("ant\nbee")
        args = {"data_dir": f"{path}::{path.with_name('test.tar')}", "image_size": 16, "crop_pct": 1.0, "channels": 3}
        shutil.copy(path, path.with_name("test.tar"))
        read_webdataset(SimpleNamespace(**args, epoch_images=4, workers=0))

    def read_cache(path):
        load_dataset("folder", data_dir=place / "pets", image_size=16, cache_dir=path.parent)

    def resume(path):
        for name in ("result.json", "best.pt"):
            (path.parent / name).unlink(missing_ok=True)
        train_vit.main(["--resume", str(path.parent)])

    cache = next((place / "cache").glob("*16px-*"))
    return {
        "images": ("a.jpg", damaged(images), read_image),
        "checkpoints": ("last.pt", archives | values, lambda path: rebuild_model(load_checkpoint(path), build_model)),
        "runs": ("last.pt", values, resume),
        "weights": ("a.pt", archives, start),
        "safetensors": ("a.safetensors", damaged([arrays]), start),
        "results": ("a.json", as_json(result), lambda path: compare.main(["--results", str(path.parent)])),
        "finished runs": ("result.json", as_json(result), lambda path: compare.main([str(path.parent)])),
        "evaluations": ("a.json", as_json(evaluation), lambda path: compare.main(["--maps", str(path)])),
        "records": ("generated.json", as_json(record), lambda path: read_record(path.parent)),
        "plans": (
            "a.toml",
            other_toml(PLAN) | damaged([PLAN.encode()]),
            lambda path: campaign.main([str(path), "--list", "--results", str(path.parent)]),
        ),
        "shards": ("train.tar", damaged([shard, gzip.compress(shard)]), read_shard),
        "caches": (cache.name, damaged([cache.read_bytes()]), read_cache),
    }


MANY = dict.fromkeys(("checkpoints", "weights", "safetensors", "evaluations", "records", "shards", "caches"), 1000)
MANY |= {"images": 4000, "runs": 150, "plans": 1000, "results": 1000, "finished_runs": 500}
FEW = {"runs": 3, "plans": 10}


@pytest.mark.parametrize("kind, count", [
    *((kind, FEW.get(kind, 25)) for kind in MANY),
    *(pytest.param(kind, MANY[kind], marks=pytest.mark.slow) for kind in MANY),
])  # fmt: skip
def test_a_damaged_file_is_read_or_refused(kind, count, kinds, tmp_path, tried):
    name, contents, read = kinds[kind.replace("_", " ")]
    tries = itertools.count()

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=[*HealthCheck])
    @given(contents)
    def attempt(content):
        path = tmp_path / f"{next(tries)}" / name
        path.parent.mkdir()
        path.write_bytes(content)
        began = time.monotonic()
        try:
            read(path)
        except UserError as error:
            assert str(error).isprintable()
        assert time.monotonic() - began < SECONDS
        shutil.rmtree(path.parent)

    attempt()
    assert not [*tmp_path.iterdir()]
    tried(f"damaged or crafted: {kind.replace('_', ' ')}", next(tries))


class Code:
    """What, unpickled, makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_in_a_file_runs(place, tmp_path, tried, monkeypatch):
    monkeypatch.chdir(place)
    ran, code = tmp_path / "ran", Code(tmp_path / "ran")
    whole, old, object_array, plain = io.BytesIO(), io.BytesIO(), io.BytesIO(), pickle.dumps(code)
    torch.save({"weights": code}, whole)
    torch.save({"weights": code}, old, _use_new_zipfile_serialization=False)
    np.save(object_array, np.array([code], dtype=object))
    own = tmp_path / "own.py"
    own.write_text(f"import os\nos.mkdir({str(ran)!r})\nclass Own: pass")
    named = load_checkpoint("runs/vit")
    named["model_args"] |= {"attention": f"{own}:Own"}
    checkpoints = [whole.getvalue(), old.getvalue(), plain, object_array.getvalue(), saved(named)]
    for content, ending in itertools.product(checkpoints, (".pt", ".safetensors", ".png", ".toml")):
        path = tmp_path / f"a{ending}"
        path.write_bytes(content)
        for read in (
            lambda path: rollout.main([str(path), "--device", "cpu"]),
            lambda path: predict.main(["runs/vit", str(path), "--device", "cpu"]),
            lambda path: train_vit.main(["--init-from", str(path), "--dataset", "shapes", "--summary", *TINY]),
            lambda path: campaign.main([str(path), "--list"]),
        ):
            with pytest.raises(UserError):
                read(path)
    for script in (str(own), "own", "os.system"):
        (tmp_path / "a.toml").write_text(f'title = "a"\n[[rows]]\nname = "b"\nscript = {json.dumps(script)}\n')
        with pytest.raises(UserError, match="unknown script"):
            campaign.main([str(tmp_path / "a.toml"), "--list"])
    cache = next((place / "cache").glob("*16px-*"))
    with np.load(cache) as there:
        np.savez(tmp_path / cache.name, listing=there["listing"], array=np.array([code], dtype=object))
    load_dataset("folder", data_dir="pets", image_size=16, cache_dir=tmp_path)
    assert not ran.exists()
    tried("a file that would run code", len(checkpoints) * 4 + 4)


def test_a_class_of_a_checkpoint_is_a_folder_in_the_output_or_nothing(place, tmp_path):
    checkpoint = load_checkpoint(place / "runs/ddpm")
    for name in ("../elsewhere", str(tmp_path / "elsewhere"), "..", "", "a/b", "a\0b", "a\nb"):
        path = tmp_path / "run" / "last.pt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(saved(checkpoint | {"classes": ["cat", name]}))
        with pytest.raises(UserError, match="cannot be the name of a folder"):
            generate.main([str(path), "--per-class", "1", "--steps", "1", "--device", "cpu"])
        assert {*tmp_path.iterdir()} == {path.parent} and not [*tmp_path.rglob("*.png")]


@pytest.fixture
def little_memory():
    """Fails a test in which the process takes 600 MiB more than before."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 * 2**10


def png_of_zeros(width, height):
    """A PNG of a few KB that declares its size, and holds a few MB of zeros."""
    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(2**20))), (b"IEND", b""))
    parts = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("size", [(50_000, 50_000), (1, 10**8), (10**8, 1), (0, 5), (2**31 - 1, 2**31 - 1)])
def test_an_absurd_image_is_refused_before_it_fills_the_memory(size, tmp_path, little_memory):
    (tmp_path / "a.png").write_bytes(png_of_zeros(*size))
    for read in (partial(decode_image, size=32), partial(centre_crop, size=128)):
        with pytest.raises(UserError, match="a.png cannot be decoded as an image"):
            read(tmp_path / "a.png")


def test_a_checkpoint_that_unpacks_to_more_than_it_holds_is_refused(tmp_path, little_memory):
    file = io.BytesIO()
    torch.save({"weights": torch.zeros(2**22)}, file)
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in members(file.getvalue()).items():
            archive.writestr(name, part)
    with pytest.raises(UserError, match="a.pt is damaged .*more than it holds"):
        load_checkpoint(tmp_path / "a.pt")


def endless(folder):
    """Paths of a pipe that nobody writes to and of a device that never ends."""
    os.mkfifo(folder / "pipe")
    (folder / "device").symlink_to("/dev/full")
    return [path for path in (folder / "pipe", folder / "device") if path.exists()]


def test_files_without_an_end_are_refused_at_once(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    began = time.monotonic()
    for path in endless(tmp_path):
        for ending in (".toml", ".safetensors", ".png", ".json"):
            path.with_suffix(ending).unlink(missing_ok=True)
            os.link(path, path.with_suffix(ending), follow_symlinks=False)
        for main, argv in (
            (rollout.main, [path]),
            (train_vit.main, ["--init-from", path, "--dataset", "shapes", "--summary"]),
            (train_vit.main, ["--init-from", path.with_suffix(".safetensors"), "--dataset", "shapes", "--summary"]),
            (predict.main, ["runs/vit", path.with_suffix(".png")]),
            (rollout.main, ["runs/vit", "--image", path.with_suffix(".png")]),
            (campaign.main, [path.with_suffix(".toml"), "--list", "--results", "results"]),
            (compare.main, [path.with_suffix(".toml"), "--results", "results"]),
            (compare.main, ["--readme", path]),
            (compare.main, ["--maps", path.with_suffix(".json")]),
        ):
            (place / "results").mkdir(exist_ok=True)
            with pytest.raises(UserError, match=path.name if main is not compare.main else ""):
                main([*map(str, argv)])
    assert time.monotonic() - began < SECONDS


def test_a_folder_of_odd_names_is_read(tmp_path, tried):
    """Links that leave it or lead back into it, a text named .jpg, names that no keyboard has."""
    root = write_images(tmp_path / "pets", classes=("--epochs", "🐈 $(id)", "a\nb", *map(str, range(300))), count=2)
    for number, name in enumerate(("-rf.png", "new\nline.png", "🦊.png", "…;ls.png")):
        shutil.copy(root / "0" / "000.png", root / str(number) / name)
    (root / "1" / "loop").symlink_to(root)
    (root / "2" / "out").symlink_to("/")
    (root / "3" / "out.png").symlink_to(REPOSITORY / "docs/images/maps.png")
    os.mkfifo(root / "4" / "pipe.png")
    read = partial(load_dataset, "folder", data_dir=root, image_size=8, cache_dir=tmp_path / "cache", test_fraction=0.5)
    assert len(read().classes) == 303
    for content in (b"", b"hello", png_of_zeros(0, 0)):
        (root / "5" / "text\n.jpg").write_bytes(content)
        with pytest.raises(UserError, match=r"text .jpg cannot be decoded") as refused:
            read()
        assert str(refused.value).isprintable()
