"""Kill a run at random moments, and look at what it leaves.

    python experiments/tools/kill.py
    python experiments/tools/kill.py --keep 2 --out runs/kill-2

Starts a short run that writes a checkpoint after every step, kills it with SIGKILL (kill -9) at
a random moment, then reads every checkpoint and the log, and goes on with --resume from there.
Says how many of the checkpoints were whole, how many logs had every line and no torn one, and
how many kills fell into the writing of a file.
"""
import csv
import random
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from experiments.common import check_counts
from plumbing import checkpoint
from plumbing.drawing import check_range
from plumbing.flags import UserError, run, script

TRAIN = Path(__file__).parent.parent.parent / "train.py"
FLAGS = (
    "--method pdm --patch 1 --size 8 --mults 1 --attention --batch 1 --overfit 2 --every 1 "
    "--grid 1 --T 10 --steps 1000000 --device cpu"
)


def kill(
    *,
    kills: int = 50,  # how often
    seconds: float = 2.0,  # a kill comes at most so long after the run's first checkpoint
    keep: int = 1,  # as in train.py
    width: int = 128,  # of the network; a wider one takes longer to write
    seed: int = 0,  # of the moments
    out: str = "runs/kill",  # folder of the run
):
    """UserError where a file cannot be read, or the run does not go on."""
    check_counts(1, kills=kills, width=width)
    check_range("keep", keep, 0, 1000)
    check_range("seconds", seconds, 0, 1000)
    folder = Path(out)
    if folder.exists():
        raise UserError(f"{folder} is there already: choose another --out")
    moments = random.Random(seed)
    words = [*FLAGS.split(), "--width", str(width), "--keep", str(keep), "--out", out]
    steps = [0]
    unfinished = 0
    for k in range(1, kills + 1):
        kill_one(folder, words, moments.uniform(0, seconds), k)
        steps.append(check_folder(folder, keep, steps[-1], k))
        torn = any(folder.glob("*.tmp"))
        unfinished += torn
        when = ", killed while a file was written" if torn else ""
        print(f"kill {k:3}: step {steps[-1]:5}, whole{when}", flush=True)
        if k == 1:
            words.append("--resume")
    print(
        f"{kills} kills: {kills} whole checkpoints, {kills} whole logs, {unfinished} kills "
        f"fell into the writing of a file; {steps[-1]} steps in all"
    )


def kill_one(folder, words, wait, k):
    """Start or resume the run, and kill it so many seconds after its first checkpoint."""
    line = [sys.executable, str(TRAIN), *words]
    output = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    before = written_at(folder)
    process = subprocess.Popen(line, **output)
    while written_at(folder) == before and process.poll() is None:
        time.sleep(0.01)
    time.sleep(wait)
    ended = process.poll() is not None
    process.kill()
    _, errors = process.communicate()
    if ended:
        raise UserError(f"run {k} ended by itself: {errors.strip().splitlines()[-1]}")


def written_at(folder):
    path = folder / "ckpt.pt"
    return path.stat().st_mtime_ns if path.exists() else 0


def check_folder(folder, keep, before, k):
    """The step of the checkpoint that kill k left; UserError unless all its files are whole."""
    step = checkpoint.read(folder)["step"]
    if step < before:
        raise UserError(f"the run went back from step {before} to {step} at kill {k}")
    numbered = sorted(folder.glob("ckpt-*.pt"))
    for path in numbered:
        checkpoint.load(path, device="cpu")
    # Between the writing of ckpt.pt and the end of the clearing there is one more
    if keep and not 1 <= len(numbered) <= keep + 2:
        raise UserError(f"{len(numbered)} numbered checkpoints with --keep {keep} at kill {k}")
    check_log(folder / "log.csv", step, k)
    return step


def check_log(path, step, k):
    """UserError unless it has the steps 1, 2, ... in whole lines, at least to step - 1."""
    text = path.read_text() if path.exists() else ""
    header, *rows = list(csv.reader(text.splitlines())) or [[]]
    whole = text.endswith("\n") or (not text and step == 1)
    even = all(len(row) == len(header) for row in rows)
    in_order = [row[0] for row in rows] == [str(i) for i in range(1, len(rows) + 1)]
    # It is written after the checkpoint: a kill between both leaves it one line behind
    if not (whole and even and in_order and step - 1 <= len(rows) <= step):
        raise UserError(f"log.csv has {len(rows)} rows at step {step}, or torn ones: kill {k}")


main = script(kill, __doc__)

if __name__ == "__main__":
    run(main)
