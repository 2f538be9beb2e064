"""The benchmarks: that they measure what they say, and write it down."""

import json
import statistics
import time

import pytest
import torch
from PIL import Image

from benchmarks import augment, export, faults, peers, train
from benchmarks.turns import take_turns
from errors import UserError
from experiments.speed import speed_text
from models import build_model

QUICK = ["--device", "cpu", "--rounds", "2", "--seconds", "0.01"]


def test_ways_take_turns_and_are_counted_by_the_clock():
    calls = []

    def way(name, images):
        def run():
            calls.append(name)
            time.sleep(0.02)
            return images

        return run

    ways = {"slow": way("slow", 1), "fast": way("fast", 3)}
    speeds = take_turns(ways, torch.device("cpu"), rounds=3, seconds=0.01)
    assert calls == ["slow", "fast"] * 4  # with a round to warm up
    assert all(30 < speed < 51 for speed in speeds["slow"]) and all(90 < speed < 151 for speed in speeds["fast"])
    assert len(speeds["slow"]) == len(speeds["fast"]) == 3


def check_speeds(path, ways, capsys):
    """Each way is in the file, with its rounds, and in the table."""
    results = json.loads(path.read_text())
    printed = capsys.readouterr().out
    for table in results["images_per_second"].values():
        assert len(table) == ways and all(len(rounds) == 2 and min(rounds) > 0 for rounds in table.values())
        assert all(name in printed for name in table)
    assert results["threads"] == torch.get_num_threads() and ("times as fast" in printed) == (ways > 1)
    lines = speed_text(path).splitlines()
    assert lines[0].startswith(f"{results['device']}, ") and lines[2].startswith("| what | against | times as fast: ")


def test_exported_models(tmp_path, capsys, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(export, "MODELS", ("cct_2_3x2",))
    export.main(["--rounds", "2", "--seconds", "0.01", "--out", str(tmp_path / "speed.json")])
    check_speeds(tmp_path / "speed.json", 2, capsys)


def test_augmentation(tmp_path, capsys):
    pytest.importorskip("kornia")
    augment.main([*QUICK, "--batch-size", "4", "--out", str(tmp_path / "speed.json")])
    check_speeds(tmp_path / "speed.json", 4, capsys)


@pytest.mark.parametrize(("model", "ways"), [("vit", 5), ("cct_6_3x1", 3), ("cct_2_3x2", 1), ("resnet18", 3)])
def test_training_steps_beside_the_peers(model, ways, tmp_path, capsys, monkeypatch):
    if model in ("vit", "cct_6_3x1"):
        pytest.importorskip("timm")
        pytest.importorskip("vit_pytorch")
    monkeypatch.setattr(train, "matmul_peak", lambda device, dtype: 100.0)
    monkeypatch.setattr(train, "peaks_of_ways", lambda name, ways, args: dict.fromkeys(ways, 2**30))
    options = ["--models", model, "--dataset", "shapes", "--batch-size", "4", "--steps", "1"]
    train.main([*QUICK, *options, "--out", str(tmp_path / "speed.json")])
    check_speeds(tmp_path / "speed.json", ways, capsys)
    assert Image.open(tmp_path / "speed.png").width > 500
    results = json.loads((tmp_path / "speed.json").read_text())
    share, gflop = results["share_of_peak"][model]["ours"], results["gflop_per_image"][model]
    assert share[1] == pytest.approx(statistics.median(results["images_per_second"][model]["ours"]) * gflop / 100)
    assert 0 < results["data_share"][model] < 1
    assert gflop == pytest.approx({"vit": 1.308, "cct_6_3x1": 6.07, "cct_2_3x2": 0.2, "resnet18": 3.33}[model], rel=0.1)
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"


def test_faults_are_summed_up(tmp_path, capsys, monkeypatch):
    (tmp_path / "tests" / "faults").mkdir(parents=True)
    test = """def test_faults():
        import json, os
        for seconds in (1, 2.5):
            with open(os.environ["FAULTS_LOG"], "a") as file:
                print(json.dumps({"what": "kill", "count": 500, "seconds": seconds}), file=file)
        assert True
    """
    (tmp_path / "tests" / "faults" / "test_one.py").write_text(test)
    monkeypatch.chdir(tmp_path)
    faults.main(["--out", "faults.json"])
    assert capsys.readouterr().out.split() == ["1,000", "kill", "seconds", "2.5"]
    assert speed_text("faults.json").splitlines()[-1] == "| kill | 1,000 | seconds 2.5 |"
    (tmp_path / "tests" / "faults" / "test_one.py").write_text(test.replace("True", "False"))
    with pytest.raises(UserError, match="a test of tests/faults failed"):
        faults.main([])


def test_memory_is_that_of_a_process_of_its_own():
    held = []
    for batch_size in ("8", "256"):
        parser = train.train_parser()
        args = parser.parse_args(["--device", "cpu", "--dataset", "shapes", "--batch-size", batch_size, "--steps", "1"])
        held += train.peaks_of_ways("cct_2_3x2", ["ours"], args).values()
    assert 5e7 < held[1] - held[0] < 4e9


def test_ours_and_the_peers_are_models_of_one_size():
    ours = {name: build_model(name, num_classes=10) for name in ("vit", "resnet18")}
    peer = peers.plain_resnet18(10)
    peer.load_state_dict(ours["resnet18"].state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours["resnet18"].eval()(images), peer.eval()(images), rtol=1e-4, atol=1e-4)
    counts = [sum(p.numel() for p in model.parameters()) for model in (ours["vit"], peers.ReportViT())]
    assert counts[0] == counts[1] == 3_195_146
