"""What gpu.py measures with: a report that loses nothing, clocks, and processes."""
import contextlib
import functools
import gc
import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

import train
from experiments.report import read_table
from experiments.tools import timers
from experiments.tools.benchmark import peak
from plumbing.checkpoint import written_whole
from plumbing.flags import UserError

ROOT = Path(__file__).parent.parent.parent
TO_TF32 = dict(fp32=False, tf32=True)  # bf16: torch's own setting


class Report:
    """The rows of one part, in OUT/<part>.json and .txt after each measurement.

    A measurement that fails is written down, and the next one goes on. What is there already,
    and did not fail, is not measured again. After so many minutes none is begun.
    """

    def __init__(self, out, part, about):
        self.part = part
        self.out = out
        self.path = out / f"{part}.json"
        self.about = about
        self.until = math.inf
        self.rows = []
        if self.path.exists():
            saved = json.loads(self.path.read_text(encoding="utf-8"))
            if saved["about"] != about:
                raise UserError(f"{self.path} is of {saved['about']}: choose another --out")
            self.rows = [row for row in saved["rows"] if "failed" not in row]

    def begin(self, minutes):
        self.until = time.time() + 60 * minutes

    def measure(self, what, function, *arguments):
        """Add the row, a dict, that function(*arguments) returns."""
        if any(row["what"] == what for row in self.rows):
            return
        if time.time() > self.until:
            print(f"{self.part}, {what}: no time left; the same command goes on with it")
            return
        start = time.time()
        try:
            row = function(*arguments)
        except (Exception, SystemExit) as error:  # whatever it is, the next one goes on
            row = dict(failed=f"{type(error).__name__}: {error}"[:300])
            with open(self.out / f"{self.part}-errors.txt", "a", encoding="utf-8") as file:
                file.write(f"{what}\n{traceback.format_exc()}\n")
        self.rows.append(dict(what=what) | row | dict(took=round(time.time() - start, 1)))
        self.write()
        print(f"{self.part}, {line_of(self.rows[-1])}", flush=True)

    def write(self):
        with written_whole(self.path, "w") as file:
            json.dump(dict(about=self.about, rows=self.rows), file, indent=1)
        lines = [self.about, *map(line_of, self.rows)]
        with written_whole(self.path.with_suffix(".txt"), "w") as file:
            file.write("\n".join(lines) + "\n")

    def log(self, name):
        """The file that takes what a measurement prints."""
        return self.out / f"{self.part}-{name}.log"

    def new_folder(self, name):
        """One that is not there yet, so that no run of before is in the way."""
        numbered = (self.out / f"{self.part}-{name}-{k}" for k in range(1, 10**6))
        folder = next(folder for folder in numbered if not folder.exists())
        folder.mkdir()
        return folder

    def seconds_left(self):
        return max(30, self.until - time.time())


def line_of(row):
    cells = [f"{name} {as_word(value)}" for name, value in row.items() if name != "what"]
    return f"{row['what']}: {', '.join(cells)}"


def as_word(value):
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# Seconds and memory


@contextlib.contextmanager
def watched(device):
    """Yields a dict that has, at the end, seconds and the device's memory at its peak."""
    row = {}
    on_cuda = device.type == "cuda"
    gc.collect()
    if on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = timers.clock(device)
    yield row
    row["seconds"] = timers.clock(device) - start
    row["memory_mb"] = torch.cuda.max_memory_allocated() / 1e6 if on_cuda else None


@contextlib.contextmanager
def rounding(precision):
    """While it is open, float32 products and convolutions round to TF32, or not: TO_TF32."""
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [setting.allow_tf32 for setting in settings]
    try:
        for setting in settings:
            setting.allow_tf32 = TO_TF32.get(precision, setting.allow_tf32)
        yield
    finally:
        for setting, value in zip(settings, before):
            setting.allow_tf32 = value


@functools.cache
def peak_of(device, precision):
    """FLOP/s of a large matrix product."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    with rounding(precision):
        return peak(device, dtype)


def idle_share(function, seconds):
    """Share of these seconds, which function() takes, in which the GPU does nothing.

    Kernels take as long under the profiler as without it, the host does not.
    """
    worked = busy(function, "cuda")
    return 1 - worked / seconds if worked else None


def busy(function, kind):
    """Seconds in which a device, cuda or cpu, works while function() runs."""
    activity = getattr(torch.profiler.ProfilerActivity, kind.upper())
    with torch.profiler.profile(activities=[activity]) as profile:
        function()
        timers.clock(torch.device(kind))
    device_type = getattr(torch.autograd.DeviceType, kind.upper())
    intervals = []
    for event in profile.events():
        if event.device_type == device_type and not event.is_user_annotation:
            intervals.append((event.time_range.start, event.time_range.end))
    return union(intervals) / 1e6


def union(intervals):
    """The length of what intervals (start, end) cover together."""
    covered = 0
    until = -math.inf
    for start, end in sorted(intervals):
        covered += max(0, end - max(start, until))
        until = max(until, end)
    return covered


# Runs and processes


def trained(line, run, log, device, data="digits"):
    """Seconds, memory, loss and speed of train.py in this process, by its log's last row."""
    words = [*line.split(), "--data", str(data), "--out", str(run), "--device", device.type]
    with quiet(log), watched(device) as row:
        train.main(words)
    end = read_table(run / "log.csv")[-1]
    return row | dict(loss=float(end["loss"]), images_per_s=float(end["images_per_s"]))


@contextlib.contextmanager
def quiet(log):
    """While it is open, what is printed goes to the file `log`."""
    with (
        open(log, "a", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        yield


def start(words, log, folder=ROOT, **environment):
    """A Python program and its arguments as a process, whose output goes to the file `log`."""
    environment = os.environ | dict(PYTHONPATH=str(ROOT)) | environment
    with open(log, "a", encoding="utf-8") as file:
        line = [sys.executable, *map(str, words)]
        output = dict(stdout=file, stderr=subprocess.STDOUT)
        return subprocess.Popen(line, cwd=folder, env=environment, **output)


def finish(process, seconds):
    """Its exit code; killed, with an exception, where it takes longer than `seconds`."""
    try:
        return process.wait(seconds)
    finally:
        process.kill()
        process.wait()


def run_for(seconds, words, log):
    """The exit code of a process that gets a Ctrl-C after so many seconds, if it still runs."""
    process = start(words, log)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    return finish(process, 120)


def must_be(code, expected, log):
    if code not in expected:
        raise RuntimeError(f"exit code {code}: {last_line(log)}")


def last_line(log):
    lines = Path(log).read_text(encoding="utf-8", errors="replace").split("\n")
    return [line for line in lines if line.strip()][-1].split("\r")[-1]
