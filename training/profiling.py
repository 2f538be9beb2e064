"""Where the time of ten steps goes, by torch.profiler."""

import sys

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

WAIT, MEASURED = 5, 10  # steps


class StepProfiler:
    """A torch.profiler that skips the first WAIT steps and measures the MEASURED ones after them.

    A trace for Perfetto or chrome://tracing goes to trace.json.gz in the folder, ten lines to the screen. step() is
    called after each step, close() at the end.
    """

    def __init__(self, folder, device):
        self.path, self.device, self.done = folder / "trace.json.gz", device, False
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        plan = schedule(wait=WAIT - 2, warmup=2, active=MEASURED, repeat=1)
        self.profiler = profile(activities=activities, schedule=plan, on_trace_ready=self.write)
        self.profiler.start()
        self.step = self.profiler.step

    def write(self, profiler):
        profiler.export_chrome_trace(str(self.path))
        where = "device" if self.device.type == "cuda" else "cpu"
        rows = profiler.key_averages()
        if where == "device":  # the kernels alone: their callers' rows hold the same time again
            rows = [row for row in rows if row.device_type == DeviceType.CUDA and not row.is_user_annotation]
        times = {row.key: (getattr(row, f"self_{where}_time_total"), row.count) for row in rows}
        total = sum(spent for spent, _ in times.values())
        print(f"{MEASURED} steps of {total / MEASURED / 1e3:.1f} ms on the {where}; the trace is in {self.path}")
        for name, (spent, count) in sorted(times.items(), key=lambda item: -item[1][0])[:10]:
            share, milliseconds, calls = spent / total, spent / MEASURED / 1e3, count / MEASURED
            name = "outside of operations" if name.startswith("ProfilerStep") else name
            print(f"{share:6.1%} {milliseconds:9.2f} ms per step {calls:7.1f} calls  {name[:70]}")
        self.done = True

    def close(self):
        self.profiler.stop()
        if not self.done:
            print(f"warning: --profile needs {WAIT + MEASURED} steps in an epoch; no trace", file=sys.stderr)
