"""Patch Diffusion for fine-tuning: do crops teach a trained EDM more than whole images do, in
equal time?

    python experiments/patch_diffusion_finetune.py --quick              # trains the EDM first
    python experiments/patch_diffusion_finetune.py runs/edm --data photos

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
from experiments.judge import measure, verdict
from experiments.report import claim, write_results
from plumbing import checkpoint
from plumbing.flags import UserError, as_flag, run, script

FIRST = "--method edm --width 32 --mults 1 2 4 --attention 2 --P_mean 0"  # crops suit 3 levels
KEPT = ("width", "mults", "blocks", "attention", "dropout", "sigma_data", "P_mean", "P_std")


def patch_diffusion_finetune(
    path=None,
    *,
    quick: bool = False,  # 16x16, 600 and 300 steps, for two CPU cores
    train_steps: int | None = None,  # where no EDM is given; default 10,000, quick 600
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
    if path is None:
        path = train_once(setup._replace(steps=train_steps), f"{setup.stem}-first", FIRST)
    whole = f"--method edm {words_of(path)}"
    crops = f"--method patch_diffusion {words_of(path)}"
    count = steps_in_that_time(setup, whole, crops, max(1, steps // 5))
    still = setup._replace(steps=1, flags=f"{flags} --lr 0")  # a step that changes no weight
    cases = {
        "before": (still, whole),
        "whole": (setup, whole),
        "crops": (setup._replace(steps=count), crops),
    }
    rows = []
    results = []
    for training, (its, line) in cases.items():
        results.append(measure(its, f"{setup.stem}-{training}", line, 18))
        took = seconds_of(results[-1].paths)
        rows.append(dict(training=training, steps=its.steps, seconds=took))
    note = f"begun with {path}, {n} samples by Heun in 18 steps"
    write_results(setup.out / f"patch_diffusion_finetune-{setup.stem}.csv", rows, results, note)
    before, of_whole, of_crops = results
    means = [before.drawn.frechet, of_whole.drawn.frechet, of_crops.drawn.frechet]
    decided = verdict(of_crops, of_whole, "fine-tunings")
    text = "crops are ahead of whole images in fine-tuning, in equal time (Patch Diffusion)"
    claim(text, "", f"Frechet before, whole, crops {means}", decided)


def words_of(path):
    """The flags of train.py that begin with this EDM's weights and keep its network."""
    saved = checkpoint.read(path)
    config = saved["config"]
    if saved["method"] != "edm" or config["precond"] != "edm":
        raise UserError(f"{path} must be a run of --method edm, with --precond edm")
    words = [as_flag(name, config[name]) for name in KEPT]
    if saved["classes"]:
        words.append("--conditional")
    return " ".join([f"--init {shlex.quote(str(path))}", *words])


main = script(patch_diffusion_finetune, __doc__)

if __name__ == "__main__":
    run(main)
