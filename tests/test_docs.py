"""README.md and docs/ are true: commands and code run, links lead somewhere, numbers come from results/."""

import importlib
import json
import re
import shlex
import shutil
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from conftest import REPOSITORY, write_images

import compare
import generate
import rollout
from experiments.plans import read_plan
from experiments.scripts import script_parser
from models import build_model
from training.flags import ESSENTIAL

PAGES = [Path("README.md"), *sorted(Path("docs").glob("*.md"))]
TEXTS = {page: page.read_text() for page in PAGES}
EVERYTHING = "\n".join(TEXTS.values())
BLOCKS = [(page, block) for page in PAGES for block in re.findall(r"(?:^    .*\n(?:\n(?=    ))?)+", TEXTS[page], re.M)]
LINES = dict.fromkeys(line.strip() for _, block in BLOCKS for line in block.replace("\\\n", " ").splitlines())
LINES = [
    re.sub(r"^torchrun .*?(?=train_)", "python ", line) for line in LINES
]  # tests/training/test_ranks.py runs some
COMMANDS = [re.split(r"\s{2,}#|\s#\s", line)[0] for line in LINES if re.match(r"python (-m )?[\w/.]+", line)]
TRAINING = ("train_vit.py", "train_cct.py", "train_resnet_attn.py")


CODE = {page: [dedent(b) for p, b in BLOCKS if p == page and re.match(r" +(import|from) ", b)] for page in PAGES}
del CODE[Path("docs/reading.md")]  # tests/test_lesson.py runs it, in one session
PLANS = [dedent(block) for _, block in BLOCKS if block.startswith("    title = ")]
FOLDER = "--dataset folder --data-dir photos --cache-dir cache --device cpu"


def made_small(script, argv):
    """The arguments of a command, changed to a run of seconds on a folder of a few images."""
    if "--resume" in argv and "auto" not in argv:
        return [*argv, "--device", "cpu"]
    small = ["--epochs", "1", "--batch-size", "32", *FOLDER.split()]
    if script == "train_generator.py":
        small += ["--width", "8", "--image-size", "16"] + ([] if "acgan" in argv else ["--noise-steps", "8"])
    if script == "train_vit.py" and "vit_b_16" not in argv:
        small += ["--embed-dim", "16", "--depth", "1", "--patch-size", "8"]
        small += [] if "identity" in argv or "depthwise" in argv else ["--num-heads", "2"]
    if script == "train_cct.py":
        small += ["--model", "cct_2_3x2"]
    if script == "train_resnet_attn.py":
        small += ["--model", "xresnet18", "--image-size", "48"] if "woof" in argv else ["--width", "8"]
    return [*argv, *small]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with plans/, results/, photos/, photo.jpg and a small trained run under each name that a page uses."""
    folder = tmp_path_factory.mktemp("workspace")
    for name in ("plans", "results", "docs"):
        shutil.copytree(REPOSITORY / name, folder / name)
    shutil.copy(REPOSITORY / "README.md", folder)
    write_images(folder / "photos", classes=("cat", "dog", "ship"), count=75)
    write_images(folder / "elsewhere", classes=("cat", "dog", "lion"), suffix=".jpg")
    shutil.copy(folder / "photos" / "cat" / "000.png", folder / "photo.jpg")
    (folder / "my_block.py").write_text(CODE[Path("docs/extending.md")][0])
    (folder / "plans" / "cosine.toml").write_text(next(plan for plan in PLANS if "my_block.py:" in plan))
    for name in set(re.findall(r"plans/[\w-]+\.toml", "\n".join(COMMANDS))):
        if not (folder / name).exists():  # a page tells the reader to write it
            (folder / name).write_text(PLANS[0])
    code = [block for blocks in CODE.values() for block in blocks]
    tiny = build_model("vit", embed_dim=16, depth=1, num_heads=2, patch_size=8)
    torch.save(tiny.state_dict(), folder / "report.pth")  # docs/export.md: a file of someone's weights
    used = set(re.findall(r"checkpoints/([\w-]+)", "\n".join([*COMMANDS, *code])))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in sorted(used):
            script = next((s for s in TRAINING if name.startswith(s[6:9])), "train_vit.py")
            script = "train_generator.py" if name in ("acgan", "ddpm") else script
            own = ["--attention", "my_block.py:CosineAttention"] if name == "cosine" else []
            argv = made_small(script, ["--run-name", name, *own])
            importlib.import_module(script[:-3]).main(argv)
        generate.main(["checkpoints/ddpm", "--per-class", "4", "--out", "datasets/generated", "--device", "cpu"])
    return folder


@pytest.fixture
def inside(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    return workspace


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command, inside, monkeypatch):
    """On small settings; benchmarks and the lesson have tests of their own, and plans are listed, not run."""
    argv = shlex.split(command)[1:]
    if argv[0] == "-m":
        return parse(argv[1], argv[2:]) if argv[1] != "pytest" else None
    script, argv = argv[0], argv[1:]
    if script in ("lesson/vit.py", "colab/bundle.py"):  # they have tests of their own
        return None
    main = importlib.import_module(script.removesuffix(".py")).main
    if "--log" in argv:
        pytest.importorskip(argv[argv.index("--log") + 1])
    if script in (*TRAINING, "train_generator.py") and not {"--help", "--help-all"} & set(argv):
        if "--run-name" in argv and "auto" not in argv:
            argv += ["--overwrite"]
        argv = made_small(script, argv)
    elif script == "generate.py":
        argv += ["--device", "cpu", "--per-class", "4"]
        if "--classifier" in argv:
            pytest.importorskip("torchmetrics")
    elif script == "predict.py":
        if "--corruptions" in argv:
            pytest.importorskip("imagecorruptions")
        argv += ["--device", "cpu"]
    elif script in ("rollout.py", "attribute.py"):
        argv = ["cat" if word == "ship" else word for word in argv]
        argv += ["--device", "cpu"] + (["--num-images", "4"] if "--evaluate" in argv else [])
    elif script == "export.py":
        pytest.importorskip("safetensors" if "safetensors" in argv else "onnxscript")
    elif script == "demo.py":
        gradio = pytest.importorskip("gradio")
        monkeypatch.setattr(gradio.Blocks, "launch", lambda page, **options: None)
    elif script == "compare.py" and "--maps" in argv:
        for run in argv[1:]:
            rollout.main([run, "--evaluate", "--num-images", "4", "--device", "cpu"])
    elif script == "campaign.py":
        if "--engine" in argv:  # tests/experiments/test_engines.py starts engines
            assert importlib.import_module("campaign").campaign_parser().parse_args(argv).engine
            argv = argv[: argv.index("--engine")]
        argv = argv[: argv.index("--tune")] if "--tune" in argv else argv  # tests/experiments/test_tuning.py tunes
        argv = [word for word in argv if word not in ("--list", "--dry")] + ["--list", "--device", "cpu"]
    main(argv)
    return None


def parse(module, argv):
    """Check the flags of a benchmark, if it has a parser of its own."""
    found = vars(importlib.import_module(module))
    for name in found:
        if name.endswith("_parser") and name != "speed_parser":
            found[name]().parse_args(argv)


@pytest.mark.parametrize(("page", "blocks"), [item for item in CODE.items() if item[1]], ids=str)
def test_code_runs(page, blocks, inside):
    """The blocks of a page one after the other, given a model and images."""
    scope = {"model": build_model("vit", embed_dim=16, depth=2, num_heads=2), "images": torch.zeros(2, 3, 32, 32)}
    small = ", ".join(map(repr, made_small("train_vit.py", [])))
    if page.name == "export.md":
        pytest.importorskip("onnxruntime")
        importlib.import_module("export").main(["checkpoints/vit"])
    for block in blocks:
        exec(block.replace('"--dataset", "shapes"', small), scope)
    if page.name == "README.md":
        assert scope["results"]["epochs"] == 1 and not scope["model"].training
        assert scope["matrices"].shape[0] == 2


def test_plans_can_be_read(inside):
    for text in PLANS:
        Path("documented.toml").write_text(text)
        assert read_plan("documented.toml").rows


def test_the_task_for_skypilot_is_yaml_and_runs_commands_of_this_page():
    yaml = pytest.importorskip("yaml")
    [block] = [dedent(block) for page, block in BLOCKS if page.name == "machines.md" and "accelerators:" in block]
    task = yaml.safe_load(block)
    assert task.keys() == {"workdir", "resources", "file_mounts", "setup", "run"} and task["resources"]["use_spot"]
    [folder] = task["file_mounts"]
    for command in task["run"].splitlines():
        assert command in COMMANDS  # test_commands_run parses it
        assert f"--out-dir {folder}/" in command and f"--results {folder}/" in command
    assert Path(task["setup"].split()[-1]).exists()


def test_flags_exist():
    scripts = [*TRAINING, "rollout.py", "benchmarks.train"]
    others = {"attribute.py": "attribute_parser", "campaign.py": "campaign_parser", "compare.py": "compare_parser"}
    others |= {"train_generator.py": "generator_parser", "generate.py": "generate_parser"}
    others |= {"export.py": "export_parser", "predict.py": "predict_parser", "demo.py": "demo_parser"}
    parsers = [script_parser(script) for script in scripts]
    parsers += [getattr(importlib.import_module(name[:-3]), parser)() for name, parser in others.items()]
    known = {flag for parser in parsers for action in parser._actions for flag in action.option_strings}
    text = re.sub(r"^    (?!python).*$|https?:\S+", "", EVERYTHING, flags=re.M)
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) <= known | {
        "--no-cache-dir",
        "--upgrade",
        "--max-restarts",
        "--nproc-per-node",
    }
    training = [script_parser(script) for script in TRAINING]
    assert {action.dest for parser in training for action in parser._actions} >= ESSENTIAL


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_images_and_files_exist(page):
    for target in re.findall(r"\]\(([^)#]+)", TEXTS[page]):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    rooms = "models|training|pipeline|maps|experiments|lesson|results|plans"
    for name in set(re.findall(rf"`((?:{rooms})/[\w./-]+\.\w+)`", TEXTS[page])) - {"maps/evaluation.json"}:
        assert Path(name).exists(), name
    for image in Path("docs/images").iterdir():
        assert image.stat().st_size <= 300_000 and image.name in EVERYTHING


def tables_of_maps():
    """(header, rows) of the tables that name a file of results/maps/ in their header."""
    for block in re.findall(r"(?:^\|.*\n)+", EVERYTHING, re.M):
        header, _, *rows = ([cell.strip() for cell in line.strip("| \n").split("|")] for line in block.splitlines())
        if any((Path("results/maps") / f"{cell.strip('`')}.json").exists() for cell in header):
            yield header, rows


@pytest.mark.parametrize(("header", "rows"), list(tables_of_maps()))
def test_tables_of_maps_come_from_results(header, rows):
    """Either a file with measures as columns, or a measure with files as columns; one row per method."""
    assert len(rows) > 2
    for name, *cells in rows:
        for column, cell in zip(header[1:], cells, strict=True):
            file, measure = (header[0], column) if header[0].startswith("`") else (column, header[0])
            scores = json.loads((Path("results/maps") / f"{file.strip('`')}.json").read_text())["scores"][name]
            assert cell == ("{:.3f} ± {:.3f}".format(*scores[measure]) if measure in scores else "-")


@pytest.mark.parametrize("row", re.findall(r"^\| .*`results/[\w.-]+\.json`.*$", EVERYTHING, re.M))
def test_numbers_come_from_results(row):
    result = json.loads(Path(re.search(r"`(results/[\w.-]+)`", row)[1]).read_text())
    accuracy = f"{result['test_accuracy']:.2%}".replace("%", " %")
    for said in (accuracy, f"{result['params']:,}", result["device"], f"{result['epochs']} epochs"):
        assert said in row, said


@pytest.mark.parametrize("name", re.findall(r"^\| .*`results/quality/([\w-]+)\.json` \|$", EVERYTHING, re.M))
def test_scores_of_generated_images_come_from_results(name):
    """Those of generated images in the order of the first row, and in the first table row those of training images."""
    record = json.loads(Path(f"results/quality/{name}.json").read_text())
    table = next(block for block in re.findall(r"(?:^\|.*\n)+", EVERYTHING, re.M) if f"{name}.json`" in block)
    header, _, real, *rows = ([cell.strip() for cell in line.strip("| \n").split("|")] for line in table.splitlines())
    generated = next(row for row in rows if row[-1] == f"`results/quality/{name}.json`")
    for row, images in ((real, "training images"), (generated, "generated images")):
        scores = {key: f"{value:.3f}" for key, value in record["scores"][images].items()}
        assert row[1:-1] == [scores[key] for key in header[1:-1]]


@pytest.mark.parametrize(
    "row", re.findall(r"^\|.*`([\w-]+)` \| \d+ \| \d+ \| (.*) \|$", TEXTS[Path("docs/your-images.md")], re.M)
)
def test_numbers_of_your_images_come_from_results(row):
    """The last training, validation and test accuracy of each seed, in per cent."""
    name, cells = row
    runs = [json.loads(path.read_text()) for path in sorted(Path("results/your-images").glob(f"{name}-seed-?.json"))]
    logs = [path.read_text().splitlines() for path in sorted(Path("results/your-images").glob(f"{name}-seed-?.csv"))]
    train = [float(log[-1].split(",")[log[0].split(",").index("train_accuracy")]) for log in logs]
    found = train, [run["val_accuracy"] for run in runs], [run["test_accuracy"] for run in runs]
    assert cells == " | ".join(", ".join(f"{100 * value:.1f}" for value in values) for values in found)


@pytest.mark.parametrize("page", [page for page in PAGES if "<!-- table:" in TEXTS[page]], ids=str)
def test_tables_are_what_results_give(page):
    assert compare.filled_tables(TEXTS[page], "results") == TEXTS[page]


def test_readme_is_short():
    assert len(TEXTS[Path("README.md")].splitlines()) <= 200
