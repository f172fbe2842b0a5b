"""Patch Diffusion's claim at equal time: in as many seconds, crops teach more than whole images
do, above all where there are few of them (Sec. 4).

    python experiments/patch_diffusion_time.py --quick

Trains on whole images alone, p = 1, then with crops, p = 0.5, as many steps as take the same
time, on all images and on a few; writes the error by noise level, the Frechet distance and a
grid for each. A step is timed in short runs of both, in turns.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from experiments.common import Setup, choose, prepare
from experiments.equal_time import seconds_of, steps_in_that_time
from experiments.judge import measure, verdict
from experiments.report import claim, write_results
from plumbing.drawing import check_range
from plumbing.flags import run, script

WORDS = "--method patch_diffusion --P_mean 0 --no-compile --p_full"


def patch_diffusion_time(
    *,
    quick: bool = False,  # 16x16 and 2,000 steps on whole images, for two CPU cores
    data: str = "digits",  # or what train.py's --data takes
    size: int | None = None,  # image size; default 32, quick 16
    p: float = 0.5,  # share of steps on whole images beside the crops, under 1
    steps: int | None = None,  # on whole images, crops get the time; default 30,000, quick 2000
    timed: int | None = None,  # steps of a run that times; default 500, quick 200
    few: int = 500,  # images of the small data set
    n: int | None = None,  # samples of each; default 2,000, quick 128
    seeds: int = 3,  # trainings of each; their means and their scatter decide
    features: str | None = None,  # TorchScript file; default one is trained; none: no distance
    flags: str = "",  # more of train.py's, as --flags='--flip --lr 1e-3'
    out: str = "runs/patch-diffusion-time",  # folder of the runs and the table
    device: str | None = None,  # cuda, mps or cpu
):
    """Train, measure, write the table. A run that is there already is used as it is."""
    size = choose(size, quick, 16, 32)
    steps = choose(steps, quick, 2000, 30_000)
    timed = choose(timed, quick, 200, 500)
    n = choose(n, quick, 128, 2000)
    setup = Setup(Path(out), data, size, steps, n, features, device, flags, seeds)
    check_range("p", p, 0, 0.999)
    prepare(setup, few=few, timed=timed)
    of_crops = steps_in_that_time(setup, f"{WORDS} 1", f"{WORDS} {p}", timed)
    rows = []
    results = []
    for images, overfit in (("all", 0), (few, few)):
        for share, count in ((1.0, steps), (p, of_crops)):
            name = f"{setup.stem}-{images}-p{share:g}-{count}"
            line = f"{WORDS} {share} --overfit {overfit}"
            results.append(measure(setup._replace(steps=count), name, line, 18))
            took = seconds_of(results[-1].paths)
            rows.append(dict(images=images, p=share, steps=count, seconds=took))
    faster = of_crops / steps
    note = f"{data}, crops are {faster:.2f} times as fast, {n} samples by Heun in 18 steps"
    write_results(setup.out / f"patch_diffusion_time-{setup.stem}.csv", rows, results, note)
    for images, whole, crops in (("all", *results[:2]), (few, *results[2:])):
        ours = f"Frechet {whole.drawn.frechet} for p = 1, {crops.drawn.frechet} for p = {p:g}"
        text = f"crops are ahead in equal time, {images} images (Patch Diffusion)"
        claim(text, "", ours, verdict(crops, whole))


main = script(patch_diffusion_time, __doc__)

if __name__ == "__main__":
    run(main)
