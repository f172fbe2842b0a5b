"""Join PDM's parts that were trained apart:  python experiments/join_parts.py runs/noisy/ckpt.pt runs/clean/ckpt.pt runs/both.pt

Each run was `train.py --method pdm --split_snr 0.25 --part K`, all else alike; from each its own part is taken.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from train import command, read, save


def join(paths, out):
    runs = {read(path)["config"].get("part"): read(path) for path in paths}
    first = next(iter(runs.values()))
    parts = len(first["config"].get("split_snr", ())) + 1
    if set(runs) != set(range(parts)) or parts == 1:
        raise ValueError(f"give one run for each part, 0 to {parts - 1}; got parts {', '.join(map(str, runs))}")
    for run in runs.values():
        for key in ("method", "shape", "classes"):
            if run[key] != first[key]:
                raise ValueError(f"the runs differ in {key}: {first[key]} and {run[key]}")
        for key, value in run["config"].items():
            if value != first["config"].get(key) and key in ("patch", "predict", "T", "schedule", "split_snr", "learn_variance", "width", "mults", "blocks", "attention"):
                raise ValueError(f"the runs differ in --{key}: {first['config'].get(key)} and {value}")
    joined = dict(first, config=first["config"] | dict(part=None), images=sum(run["images"] for run in runs.values()))
    for weights in ("model", "ema"):
        joined[weights] = {name: runs[int(name.split(".")[2])][weights][name] for name in first[weights]}   # net.nets.<part>. ...
    joined.pop("optimizer")
    save(out, joined)
    print(f"wrote {out}; now: python sample.py {out}")


def main(argv):
    if len(argv) < 3 or argv[0].startswith("-"):
        print(__doc__)
        if argv and argv[0] not in ("-h", "--help"):
            raise ValueError("give the checkpoints of all parts, and then the file to write")
        return
    if Path(argv[-1]).exists():
        raise ValueError(f"{argv[-1]} is there already")
    join(argv[:-1], argv[-1])


if __name__ == "__main__":
    command(main)
