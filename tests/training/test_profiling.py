"""--profile: a trace, and a table of ten lines."""

import gzip
import json
from types import SimpleNamespace

import torch
from torch.autograd import DeviceType

from training.profiling import MEASURED, WAIT, StepProfiler


def test_a_few_steps_are_traced_and_tabled(tmp_path, capsys):
    profiler = StepProfiler(tmp_path, torch.device("cpu"))
    x = torch.randn(64, 64)
    for _ in range(WAIT + MEASURED + 3):
        x = torch.tanh(x @ x)
        profiler.step()
    profiler.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{MEASURED} steps of ") and str(tmp_path / "trace.json.gz") in lines[0]
    rows = [line.split() for line in lines[1:]]
    shares = [float(row[0].rstrip("%")) for row in rows]
    assert 0 < len(rows) <= 10 and shares == sorted(shares, reverse=True) and sum(shares) <= 100.5
    calls = {" ".join(row[7:]): float(row[5]) for row in rows}
    assert calls["aten::mm"] == calls["aten::tanh"] == 1.0
    events = json.load(gzip.open(tmp_path / "trace.json.gz"))["traceEvents"]
    assert sum(event.get("name") == "aten::tanh" for event in events) == MEASURED


def test_on_a_gpu_kernels_alone_are_counted(tmp_path, capsys):
    def row(key, device, annotation, time):
        kind = getattr(DeviceType, device)
        return SimpleNamespace(
            key=key, device_type=kind, is_user_annotation=annotation, self_device_time_total=time, count=MEASURED
        )

    rows = [("aten::mm", "CPU", False, 600), ("gemm", "CUDA", False, 600), ("ProfilerStep#1", "CUDA", True, 600)]
    traced = SimpleNamespace(export_chrome_trace=lambda path: None, key_averages=lambda: [row(*r) for r in rows])
    profiler = StepProfiler(tmp_path, torch.device("cpu"))
    profiler.device = torch.device("cuda")
    profiler.write(traced)
    lines = capsys.readouterr().out.splitlines()
    profiler.close()
    assert lines[0].startswith(f"{MEASURED} steps of {600 / MEASURED / 1e3:.1f} ms on the device") and len(lines) == 2
    assert lines[1].split()[0] == "100.0%" and lines[1].endswith("gemm")


def test_too_few_steps_are_said(tmp_path, capsys):
    profiler = StepProfiler(tmp_path, torch.device("cpu"))
    profiler.step()
    profiler.close()
    assert "--profile needs 15 steps in an epoch" in capsys.readouterr().err and not list(tmp_path.iterdir())
