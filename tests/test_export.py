"""export.py: what others run gives the model's logits, of every family, at any batch size."""

import io
import json
import sys

import pytest
import torch

import export
import train_vit
from errors import UserError
from models import build_model
from models.attention import explicit_is_faster
from models.portable import PORTABLE
from training.checkpoint import load_checkpoint, rebuild_model

FAMILIES = {
    "vit": {"embed_dim": 16, "depth": 1, "num_heads": 2, "image_size": 14, "pad": True},
    "cct_2_3x2": {"embed_dim": 16, "depth": 1, "positional_embedding": "sine"},
    "vit_lite_6_4": {"embed_dim": 16, "depth": 1},
    "resnet18": {"width": 4, "attention": "graph", "attention_after": "layer3"},
    "xresnet18": {"attention": "simple", "image_size": 64},
    "cct_nano": {},
}
LARGE = ("resnet18", "xresnet18", "cct_nano")


@pytest.fixture
def checkpoint(folder_flags, tmp_path):
    train_vit.main([*folder_flags, "--epochs", "1"])
    return tmp_path / "runs" / "vit"


def awake(model):
    """The model in evaluation mode, with no weight at the 0 where a block would do nothing."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.uniform_(0.1, 0.5)
    return model.eval()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in FAMILIES]
)
def test_every_family_gives_its_logits_in_onnx(name):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    options = FAMILIES[name]
    model = awake(build_model(name, **options))
    size = options.get("image_size", 32)
    _, convert, runner = PORTABLE["onnx"]
    data = convert(model, torch.zeros(2, 3, size, size), {})
    assert b"site-packages" not in data and b"models/" not in data  # no paths of this machine
    export.check_logits(model, runner(model, data), (3, size, size))


@pytest.mark.parametrize(
    ("options", "module"), [(["onnx"], "onnx"), (["torch"], None), (["safetensors"], "safetensors")]
)
def test_the_file_holds_the_logits_and_what_a_user_must_know(options, module, checkpoint, capsys):
    if module:
        pytest.importorskip(module)
    path = export.main([str(checkpoint), "--format", *options])
    assert path == checkpoint / f"model.{PORTABLE[options[0]][0]}"
    assert f"{path}, " in capsys.readouterr().out
    if module == "onnx":
        import onnx

        read = onnx.load(path)
        notes = {entry.key: entry.value for entry in read.metadata_props}
        assert read.graph.input[0].type.tensor_type.shape.dim[0].dim_param and len(list(checkpoint.glob("model*"))) == 1
    elif module:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            notes, names = file.metadata(), set(file.keys())
        assert names == set(torch.load(checkpoint / "last.pt")["weights"])
    else:
        files = {"metadata.json": ""}
        program = torch.export.load(path, extra_files=files)
        notes = json.loads(files["metadata.json"])
        model = rebuild_model(load_checkpoint(checkpoint), build_model)
        images = torch.randn(5, 3, 32, 32)
        torch.testing.assert_close(program.module()(images), model(images))
    notes = {name: json.loads(text) for name, text in notes.items()}
    assert notes["classes"] == ["ant", "bee", "cat"] and notes["image_size"] == 32
    assert len(notes["mean"]) == len(notes["std"]) == 3 and notes["model_args"]["depth"] == 2


def test_the_export_does_not_depend_on_what_is_fast_here(matmul_settings):
    """The rule of attend() looks at the switches of this process; a file runs in another."""
    model = build_model("vit", embed_dim=16, depth=1, num_heads=2).eval()
    files = []
    for precision in ("none", "bf16"):
        matmul_settings.fp32_precision = precision
        assert explicit_is_faster(torch.zeros(2, 2, 65, 8)) == (precision == "bf16")
        program = torch.export.load(io.BytesIO(PORTABLE["torch"][1](model, torch.zeros(2, 3, 32, 32), {})))
        files.append([node.target for node in program.graph.nodes if node.op == "call_function"])
    assert files[0] == files[1]


def test_other_logits_are_not_written(checkpoint, monkeypatch):
    monkeypatch.setitem(
        PORTABLE, "torch", ("pt2", *PORTABLE["torch"][1:2], lambda model, data: lambda x: model(x) + 0.1)
    )
    with pytest.raises(UserError, match="a batch of 1 has other logits, by 1.0e-01: nothing was written"):
        export.main([str(checkpoint), "--format", "torch"])
    assert not list(checkpoint.glob("model*"))


@pytest.mark.parametrize(("name", "package"), [("onnx", "onnxscript"), ("safetensors", "safetensors")])
def test_a_missing_package_is_one_line(name, package, checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.torch", None)
    with pytest.raises(UserError, match=f"pip install {package} "):
        export.main([str(checkpoint), "--format", name])
    assert not list(checkpoint.glob("model*"))


def test_without_onnxruntime_the_file_is_written_and_not_checked(checkpoint, monkeypatch, capsys):
    pytest.importorskip("onnxscript")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert export.main([str(checkpoint), "--out", str(checkpoint / "mine.onnx")]).exists()
    assert "not checked: this needs a package that is not installed: pip install onnxruntime" in capsys.readouterr().out


def test_what_torch_cannot_export_is_one_line(checkpoint, monkeypatch):
    monkeypatch.setattr(train_vit.torch.export, "export", lambda *a, **b: 1 / 0)
    with pytest.raises(UserError, match=r"--format torch: vit cannot be exported \(division by zero\)"):
        export.main([str(checkpoint), "--format", "torch"])


def test_a_replaced_run_takes_its_exported_files_along(checkpoint, folder_flags):
    export.main([str(checkpoint), "--format", "torch"])
    train_vit.main([*folder_flags, "--epochs", "1", "--run-name", "vit", "--overwrite"])
    assert not list(checkpoint.glob("model*"))
