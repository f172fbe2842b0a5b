"""Patch Diffusion for fine-tuning: do crops teach a trained EDM more than whole images do, in
equal time?

    python experiments/patch_diffusion_finetune.py --quick              # trains the EDM first
    python experiments/patch_diffusion_finetune.py --run runs/edm --data photos

Begins with the averaged weights of one EDM: as EDM again, on whole images, and as Patch
Diffusion, on crops, for as many seconds (short runs of both, in turns, tell the steps).
Writes the error by noise level, the Frechet distance and a grid for both, and before.
"""
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from experiments.common import Setup, choose, prepare, train_once
from experiments.equal_time import seconds_of, steps_in_that_time
from experiments.judge import measure
from experiments.report import claim, write_results
from experiments.verdict import decide
from plumbing import checkpoint
from plumbing.flags import UserError, as_flag, run, script

LEVEL = "rmse_1"
FIRST = "--method edm --width 32 --mults 1 2 4 --attention 2 --P_mean 0"  # crops suit 3 levels
KEPT = ("width", "mults", "blocks", "attention", "dropout", "sigma_data", "P_mean", "P_std")


def patch_diffusion_finetune(
    *,
    quick: bool = False,  # 16x16, 600 and 300 steps, for two CPU cores
    run: str | None = None,  # the EDM to begin with; default one is trained
    train_steps: int | None = None,  # for so many steps; default 10,000, quick 600
    data: str = "digits",  # to fine-tune on, or what train.py's --data takes
    size: int | None = None,  # image size; default 32, quick 16
    steps: int | None = None,  # on whole images, crops get the time; default 5,000, quick 300
    n: int | None = None,  # samples of each; default 2,000, quick 128
    seeds: int = 3,  # fine-tunings of each; their means and their scatter decide
    features: str | None = None,  # TorchScript file; default one is trained; none: no distance
    flags: str = "",  # more of train.py's, as --flags='--flip --lr 1e-3'
    out: str = "runs/patch-diffusion-finetune",  # folder of the runs and the table
    device: str | None = None,  # cuda, mps or cpu
):
    """Train, measure, write the table. A run that is there already is used as it is."""
    size = choose(size, quick, 16, 32)
    train_steps = choose(train_steps, quick, 600, 10_000)
    steps = choose(steps, quick, 300, 5000)
    n = choose(n, quick, 128, 2000)
    flags = f"--no-compile {flags}"
    setup = Setup(Path(out), data, size, steps, n, features, device, flags, seeds)
    prepare(setup, train_steps=train_steps)
    if run is None:
        run = train_once(setup._replace(steps=train_steps), f"{setup.stem}-first", FIRST)
    whole = f"--method edm {words_of(run)}"
    crops = f"--method patch_diffusion {words_of(run)}"
    rows = []
    results = []

    def add(training, count, line):
        name = f"{setup.stem}-{training}"
        results.append(measure(setup._replace(steps=count), name, line, 18))
        took = seconds_of(results[-1].paths)
        rows.append(dict(training=training, steps=count, seconds=took))

    add("before", 1, f"{whole} --lr 0")
    add("whole", steps, whole)
    add("crops", steps_in_that_time(setup, whole, crops, max(1, steps // 5)), crops)
    note = f"begun with {run}, {n} samples by Heun in 18 steps"
    write_results(setup.out / f"patch_diffusion_finetune-{setup.stem}.csv", rows, results, note)
    before, of_whole, of_crops = results
    means = [before.drawn.frechet, of_whole.drawn.frechet, of_crops.drawn.frechet]
    verdict = decide(of_crops.drawn.distances, of_whole.drawn.distances)
    errors = decide(of_crops.errors[LEVEL], of_whole.errors[LEVEL])
    text = "crops are ahead of whole images in fine-tuning, in equal time (Patch Diffusion)"
    claim(text, "", f"Frechet before, whole, crops {means}", f"{verdict}; by {LEVEL} {errors}")


def words_of(run):
    """The flags of train.py that begin with this EDM's weights and keep its network."""
    saved = checkpoint.read(run)
    config = saved["config"]
    if saved["method"] != "edm" or config["precond"] != "edm":
        raise UserError(f"{run} must be a run of --method edm, with --precond edm")
    words = [as_flag(name, config[name]) for name in KEPT]
    if saved["classes"]:
        words.append("--conditional")
    return " ".join([f"--init {shlex.quote(str(run))}", *words])


main = script(patch_diffusion_finetune, __doc__)

if __name__ == "__main__":
    run(main)
