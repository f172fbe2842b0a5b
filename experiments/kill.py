"""Kill a run at random moments, and look at what it leaves.   python experiments/kill.py

Starts a short run that writes a checkpoint after every step, kills it with SIGKILL (kill -9) at a random moment, then reads the checkpoint and
the log, and goes on with --resume from there. Says how many of the checkpoints were whole, how many logs had every line and no torn one, and
how many kills fell into the writing of a checkpoint.
"""
import csv
import random
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from train import command, load, read, script

HERE = Path(__file__).parent.parent


def kill(*,
         kills: int = 50,            # how often
         seconds: float = 2.0,       # a kill comes at most so long after the run's first checkpoint
         width: int = 128,           # of the network; a wider one takes longer to write
         seed: int = 0,              # of the moments
         out: str = "runs/kill"):    # folder of the run
    """Raises ValueError where a checkpoint cannot be read or does not go on."""
    run, moments = Path(out), random.Random(seed)
    flags = f"--method pdm --patch 1 --size 8 --width {width} --mults 1 --attention 0 --batch 1 --overfit 2 --every 1 --grid 1 --T 10 --steps 1000000 --device cpu --keep 1 --out".split()
    if run.exists():
        raise ValueError(f"{run} is there already: choose another --out")
    steps, unfinished = [], 0
    for k in range(kills):
        process = subprocess.Popen([sys.executable, HERE / "train.py", *flags, out, *["--resume"] * (k > 0)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        before = mtime(run)
        while mtime(run) == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, seconds))
        if process.poll() is not None:
            raise ValueError(f"run {k + 1} ended by itself: {process.stderr.read().strip().splitlines()[-1]}")
        process.kill()
        process.communicate()
        unfinished += any(run.glob("*.tmp"))
        for checkpoint in run.glob("*.pt"):
            load(checkpoint, device="cpu")
        steps.append(read(run / "ckpt.pt")["step"])
        text = (run / "log.csv").read_text() if (run / "log.csv").exists() else ""
        rows = list(csv.reader(text.splitlines()))
        if (not text.endswith("\n") or len({len(row) for row in rows}) > 1 or [row[0] for row in rows[1:]][:steps[-1]] != [str(k) for k in range(1, steps[-1] + 1)]):
            raise ValueError(f"log.csv is torn after kill {k + 1}: {rows[-1]}")
        print(f"kill {k + 1:3}: step {steps[-1]:5}, whole" + (", killed while a file was written" if any(run.glob("*.tmp")) else ""), flush=True)
    if steps != sorted(steps):
        raise ValueError(f"a run went backwards: {steps}")
    print(f"{kills} kills: {kills} whole checkpoints, {kills} whole logs, {unfinished} kills fell into the writing of a file; {steps[-1]} steps in all")


def mtime(run):
    return (run / "ckpt.pt").stat().st_mtime_ns if (run / "ckpt.pt").exists() else 0


main = script(kill, __doc__)

if __name__ == "__main__":
    command(main)
