"""The scripts of experiments/, each run in this process with tiny numbers."""
import csv
import importlib
import json
import math
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from plumbing import checkpoint, flags

HERE = Path(__file__).parent.parent
CLAIMS = [
    "ddpm_loss",
    "iddpm_schedule",
    "iddpm_steps",
    "edm_samplers",
    "edm_churn",
    "edm_churn_grid",
    "edm_training",
    "edm_augmentation",
    "edm_truncation",
    "pdm_patches",
    "pdm_targets",
    "patch_diffusion_p",
    "patch_diffusion_time",
    "patch_diffusion_finetune",
    "blur",
    "edm_trajectories",
]
TOOLS = sorted(path.stem for path in (HERE / "experiments/tools").glob("*.py"))
HELPERS = ("peers", "timers", "gpu_parts", "gpu_tools")
TOOLS = [f"tools.{name}" for name in TOOLS if name not in HELPERS]

TINY = "--width 8 --mults 1 --attention --grid 1 --batch 4"
TINY_PDM = "--width 8 --mults 1 --attention --grid 1 --batch 4 --T 22"
# Each claim's command, its flags for train.py, and some of what it writes
COMMANDS = {
    "ddpm_loss": (
        "--steps 1 --bound_n 1 --n 2 --seeds 2",
        f"{TINY} --T 22",
        "ddpm_loss-set-8.csv ddpm_loss-set-8-grid.png progressive-strip.png",
    ),
    "iddpm_schedule": (
        "--steps 1 --T 22 --n 2 --seeds 2",
        TINY,
        "table2-set-8.csv fig2-set-8.csv fig1.csv fig3.png fig5.csv",
    ),
    "iddpm_steps": (
        "--train_steps 1 --n 2 --seeds 1",
        f"{TINY} --T 22",
        "iddpm_steps.csv iddpm_steps-grid.png",
    ),
    "edm_samplers": (
        "--train_steps 1 --n 2 --seeds 1",
        f"{TINY} --T 250",
        "edm_samplers.csv edm_samplers-grid.png",
    ),
    "edm_churn": (
        "--train_steps 1 --n 20 --images 2 --seeds 1",
        TINY,
        "mixture.csv churn.csv churn-grid.png",
    ),
    "edm_churn_grid": (
        "--train_steps 1 --n 2 --seeds 1 --S_tmin 0 1 --S_tmax 50 --S_noise 1 1.003 --chain 2",
        TINY,
        "churn_grid.csv churn_grid-grid.png",
    ),
    "edm_training": (
        "--steps 1 --n 2 --seeds 1",
        TINY,
        "edm_training-set-8.csv edm_training-set-8-grid.png",
    ),
    "edm_augmentation": (
        "--steps 2 --n 2 --few 8 --seeds 1",
        TINY,
        "edm_augmentation-set-8.csv overfitting-set-8.csv edm_augmentation-set-8-grid.png",
    ),
    "edm_truncation": (
        "--train_steps 1 --n 2 --steps 3 --lengths 2 3 --fine 2",
        TINY,
        "local.csv global.csv",
    ),
    "pdm_patches": (
        "--steps 1 --n 2 --seeds 1 --patches 4 2 --chain 2 --batch 2 --repeats 1",
        TINY_PDM,
        "pdm_patches-set-8.csv pdm_patches-set-8-grid.png",
    ),
    "pdm_targets": (
        "--steps 1 --n 2 --seeds 1 --patches 4 --chain 2",
        TINY_PDM,
        "pdm_targets-set-8-linear.csv pdm_targets-set-8-linear-grid.png",
    ),
    "patch_diffusion_p": (
        "--steps 1 --n 2 --seeds 1 --small 3 --batch 2",
        "--width 8 --mults 1 --attention --grid 1",
        "patch_diffusion_p-set-8.csv patch_diffusion_p-set-8-grid.png",
    ),
    "patch_diffusion_time": (
        "--steps 1 --timed 1 --n 2 --seeds 1 --few 8",
        "--width 8 --mults 1 --attention --grid 1 --batch 4",
        "patch_diffusion_time-set-8.csv patch_diffusion_time-set-8-grid.png",
    ),
    "patch_diffusion_finetune": (
        "--steps 1 --train_steps 1 --n 2 --seeds 1",
        TINY,
        "patch_diffusion_finetune-set-8.csv patch_diffusion_finetune-set-8-grid.png",
    ),
}
ONE_RUN = "--method pdm --patch 1 --width 8 --mults 1 --attention --grid 1 --batch 2 --T 4"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """run("edm_churn", "--quick ...") -> (exit code, stdout, stderr), in an empty folder.

    Plots, and the pictures of a run, which are slow, have tests of their own.
    """
    monkeypatch.chdir(tmp_path)
    tiny.draw_no_pictures(monkeypatch)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    def run(name, line):
        script = importlib.import_module(f"experiments.{name}")
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *shlex.split(line)])
        code = 0
        try:
            flags.run(script.main)
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


def write_images(path="set.npy", count=80, classes=0):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (count, 8, 8, 3), np.uint8)
    if classes:
        np.savez(path, images=images, labels=np.arange(count) % classes)
    else:
        np.save(path, images)


def rows_of(path):
    with open(path) as file:
        return list(csv.DictReader(file))


class Mean(torch.nn.Module):
    """Features of an image: its mean colour."""

    def forward(self, x):
        return x.float().mean(dim=[2, 3])


# What every script does


@pytest.mark.parametrize("name", CLAIMS + TOOLS)
def test_each_explains_itself_and_refuses_what_it_does_not_know(run, tmp_path, name):
    code, out, _ = run(name, "--help")
    assert code == 0
    assert "--" in out
    code, _, err = run(name, "--nonsense 3")
    assert code == 2
    assert err.startswith("error: no such flag: --nonsense")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", CLAIMS)
def test_each_claim_is_a_script_of_under_100_lines(name):
    lines = (HERE / f"experiments/{name}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 100


@pytest.mark.parametrize("name", COMMANDS)
def test_each_claim_comes_out_with_one_command(run, tmp_path, monkeypatch, name):
    line, of_training, made = COMMANDS[name]
    costs = importlib.import_module("experiments.costs")
    monkeypatch.setattr(costs, "CLEAR", tmp_path / "none")  # no process to weigh memory in
    write_images()
    given = f"--quick --data set.npy --size 8 --out it --device cpu --flags '{of_training}'"
    code, out, err = run(name, f"{line} {given}")
    assert code == 0, err
    for file in made.split():
        assert (tmp_path / "it" / file).stat().st_size > 0, file
    no_distance = "no Frechet distance: set.npy has no classes" in out
    assert no_distance or name in ("iddpm_schedule", "edm_truncation")
    row = out.strip().splitlines()[-1]
    assert row.startswith("| ")
    assert row.count("|") == 8
    assert f"`{name}.py --" in row


REFUSED = [
    ("ddpm_loss", "--n -1"),
    ("ddpm_loss", "--bound_n 0"),
    ("iddpm_schedule", "--n -1"),
    ("iddpm_schedule", "--T 1"),
    ("iddpm_steps", "--seeds 0"),
    ("iddpm_steps", "--batch -1"),
    ("edm_samplers", "--seeds 0"),
    ("edm_samplers", "--train_steps 0"),
    ("edm_churn", "--images 0"),
    ("edm_churn", "--seeds -2"),
    ("edm_churn_grid", "--S_churn -1"),
    ("edm_churn_grid", "--S_noise 1 -1"),
    ("edm_churn_grid", "--chain 0"),
    ("edm_training", "--n 1"),
    ("edm_training", "--seeds 0"),
    ("edm_augmentation", "--few 0"),
    ("edm_truncation", "--lengths 18"),
    ("edm_truncation", "--lengths 9 5"),
    ("pdm_patches", "--repeats 0"),
    ("pdm_patches", "--patches 2 0"),
    ("pdm_patches", "--patches 4 4"),
    ("pdm_targets", "--chain 0"),
    ("patch_diffusion_p", "--batch -1"),
    ("patch_diffusion_p", "--n 100000000000000000000"),
    ("patch_diffusion_time", "--timed 0"),
    ("patch_diffusion_time", "--p 1"),
    ("edm_training", "--flags '--seed 3'"),
    ("patch_diffusion_finetune", "--train_steps 0"),
    ("blur", "run --limit 0"),
    ("edm_trajectories", "--steps 3"),
    ("edm_trajectories", "--out paths.txt"),
    ("tools.precision", "--steps -1"),
    ("tools.precision", "--seeds 1"),
    ("tools.features", "--epochs 0"),
    ("tools.benchmark", "--repeats 0"),
    ("tools.kill", "--kills 0"),
    ("tools.unet_shapes", "--threads 0"),
    ("tools.gpu", "--minutes 0"),
    ("tools.gpu", "--part speed nonsense"),
]


@pytest.mark.parametrize("name, line", REFUSED)
def test_a_number_that_cannot_be_is_refused_before_any_work(run, tmp_path, name, line):
    code, _, err = run(name, line)
    assert code == 2
    flag = [word for word in line.split() if word.startswith("--")][0]
    assert flag in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["edm_samplers", "iddpm_steps", "pdm_targets"])
def test_a_missing_features_file_is_noticed_before_any_work(run, tmp_path, name):
    code, _, err = run(name, "--quick --features nowhere.pt")
    assert code == 2
    assert err.startswith("error: no such file: nowhere.pt")
    assert not list(tmp_path.iterdir())


# Training and measuring


def test_a_run_is_trained_measured_and_written_down(run, tmp_path):
    torch.jit.script(Mean()).save("mean.pt")
    write_images()
    of_training = f"{TINY_PDM} --patch 1 --lr 0.1 --warmup 0"
    line = f"--flags='{of_training}' --data set.npy --size 8 --n 8 --chain 2 --device cpu"
    code, out, err = run("tools.precision", f"{line} --features mean.pt --steps 2")
    assert code == 0, err
    folder = tmp_path / "runs/precision"
    fp32, bf16 = rows_of(folder / "precision.csv")
    assert bf16["precision"] == "bf16"
    assert float(fp32["frechet"]) > 0
    assert float(fp32["spread"]) > 0
    assert fp32["rmse_1"] != bf16["rmse_1"]
    assert len(rows_of(folder / "losses.csv")) == 8
    trained = [checkpoint.read(folder / f"fp32-seed{k}/ckpt.pt") for k in (0, 1)]
    assert [saved["config"]["seed"] for saved in trained] == [0, 1]
    assert (folder / "precision-grid.png").exists()
    assert "no precision.png: matplotlib is not installed" in out
    assert out.strip().splitlines()[-1].startswith("| fp32 draws better")
    code, _, err = run("tools.precision", f"{line} --features mean.pt --steps 3")
    assert code == 2
    assert "is another run: --steps 2" in err


def test_a_verdict_rests_on_the_trainings_or_on_the_draws_of_a_given_one(run, tmp_path):
    torch.jit.script(Mean()).save("mean.pt")
    write_images()
    grid = "--S_tmin 0 --S_tmax 50 --S_noise 2 --chain 2 --n 8 --features mean.pt --seeds 2"
    rest = f"{grid} --data set.npy --size 8 --train_steps 1 --out it --flags '{TINY}'"
    code, out, err = run("edm_churn_grid", f"--quick {rest}")
    assert code == 0, err
    assert sorted(p.parent.name for p in tmp_path.glob("it/*/ckpt.pt")) == [
        "edm-set-8-seed0",
        "edm-set-8-seed1",
    ]
    assert float(rows_of(tmp_path / "it/churn_grid.csv")[0]["spread"]) > 0
    assert "standard errors" in out.splitlines()[-1] or "no row" in out.splitlines()[-1]
    code, out, err = run("edm_churn_grid", f"it/edm-set-8-seed0 --quick {rest}")
    assert code == 0, err
    assert float(rows_of(tmp_path / "it/churn_grid.csv")[0]["spread"]) > 0
    assert "trainings" not in out.splitlines()[-1]


def test_an_interrupted_run_goes_on_and_another_one_is_refused(run, tmp_path):
    from experiments.common import Setup, train_once

    write_images()
    half = Setup(tmp_path / "it", "set.npy", 8, 2, 2, "none", "cpu")
    path = train_once(half, "a", ONE_RUN)
    about = path.parent / "flags.txt"
    asked = about.read_text()
    about.write_text(asked.replace("--steps 2", "--steps 4").replace("--every 2", "--every 4"))
    whole = half._replace(steps=4)
    assert train_once(whole, "a", ONE_RUN) == path
    assert checkpoint.read(path)["step"] == 4
    before = path.stat().st_mtime_ns
    assert train_once(whole, "a", ONE_RUN) == path
    assert path.stat().st_mtime_ns == before  # not trained twice
    with pytest.raises(flags.UserError, match="another run: --steps 4"):
        train_once(whole, "a", f"{ONE_RUN} --seed 3")


def test_a_blur_is_drawn_beside_what_the_network_predicts(run, tmp_path):
    from experiments.common import Setup, train_once

    write_images()
    train_once(Setup(tmp_path / "it", "set.npy", 8, 1, 2, "none", "cpu"), "a", ONE_RUN)
    code, out, err = run("blur", "it/a --out blur.png")
    assert code == 0, err
    assert out.count("sigma ") == 8
    assert "76 images in the optimal prediction" in out
    assert (tmp_path / "blur.png").stat().st_size > 0
    code, _, err = run("blur", "it/a --image 4")
    assert code == 2
    assert err.startswith("error: --image must lie between 0 and 3")


def test_features_are_trained_on_the_classes_once(run, capsys):
    from experiments.judge import features_file

    write_images("set.npz", 60, classes=3)
    write_images("bare.npy", 60)
    path = features_file(None, "set.npz", [3, 8, 8], "cpu")
    assert path == "runs/features/set-8.pt"
    vectors = torch.jit.load(path)(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    assert vectors.shape == (2, 64)
    capsys.readouterr()
    assert features_file(None, "set.npz", [3, 8, 8], "cpu") == path
    assert not capsys.readouterr().out  # not trained twice
    assert features_file("none", "set.npz", [3, 8, 8], "cpu") is None
    assert features_file(None, "bare.npy", [3, 8, 8], "cpu") is None
    assert "no classes" in capsys.readouterr().out
    with pytest.raises(flags.UserError, match="nowhere.pt"):
        features_file("nowhere.pt", "set.npz", [3, 8, 8], "cpu")


@pytest.mark.parametrize("out", ["nowhere/features.pt", "."])
def test_a_place_for_features_that_cannot_be_written_is_noticed_first(run, out):
    write_images("set.npz", 60, classes=3)
    code, printed, err = run("tools.features", f"--data set.npz --out {out}")
    assert code == 2
    assert err.startswith(f"error: --out {out} must name a file")
    assert "epoch" not in printed


def test_held_out_images_are_none_that_a_small_set_trained_on(run):
    from experiments.judge import data_of

    write_images()
    saved = dict(shape=[3, 8, 8], classes=[], latents=False)
    saved["config"] = dict(data="set.npy", overfit=20)
    _, learned_data, held_out = data_of("run", saved, "set.npy")
    images = np.load("set.npy").transpose(0, 3, 1, 2)
    learned = {images[i].tobytes() for i in np.linspace(0, 79, 20).astype(int)}
    kept = {image.numpy().tobytes() for image in held_out.x}
    assert kept
    assert not learned & kept
    assert {image.numpy().tobytes() for image in learned_data.x} == learned


def test_a_plot_is_drawn_where_matplotlib_is(tmp_path):
    pytest.importorskip("matplotlib")
    from experiments.report import curves_of, plot

    rows = [dict(name=name, x=x, y=x * x, bar=0.1) for name in "ab" for x in (1, 2, 3)]
    curves = curves_of(rows, "name", "x", "y", "bar")
    assert [curve.y for curve in curves] == [[1, 4, 9], [1, 4, 9]]
    plot(tmp_path / "plot.png", curves, "x", "y", log="xy")
    assert (tmp_path / "plot.png").stat().st_size > 1000


# What the claims rest on


def test_the_search_for_churn_draws_by_every_combination_and_without():
    from experiments.edm_churn_grid import cases_of

    class Judge:
        def chain(self, sampler, **options):
            return (sampler, options)

    grid = [(0.0, 1.0, 1.007), (0.05, 50.0, 1.0)]
    ode, low, high = cases_of([Judge(), Judge()], 5, 20.0, grid)
    assert ode.runs == [("heun", dict(steps=5))] * 2
    assert low.name == "0 to 1, S_noise 1.007"
    churn = dict(steps=5, S_churn=20.0, S_tmin=0.05, S_tmax=50.0, S_noise=1.0)
    assert high.runs == [("heun", churn)] * 2


@pytest.mark.parametrize("of_best, words, told", [
    ([50.0, 60.0], "40.0 without churn", "no row is below"),
    ([34.0, 36.0], "35.0 by 0 to 1, 40.0 without churn", "not told apart: 0.6"),
    ([9.0, 31.0], "20.0 by 0 to 1, 40.0 without churn", "yes: by 20"),
    ([], "", "no distance"),
])
def test_the_best_churn_counts_where_it_is_ahead_by_more_than_chance(of_best, words, told):
    from experiments.edm_churn_grid import ODE, verdict
    from experiments.judge import Drawn

    distances = {ODE: [30.0, 50.0], "0 to 1": of_best, "1 to 50": [90.0, 90.0]}
    if not of_best:
        distances = dict.fromkeys(distances, [])
    drawn = {name: Drawn(None, values, 63, 0.1) for name, values in distances.items()}
    found, decided = verdict(drawn)
    assert found == words
    assert decided.startswith(told)


@pytest.mark.parametrize("ours, other, words", [
    ([1.0, 2.0, 3.0], [5.0, 6.0, 7.0], "yes: by 4.9 standard errors"),
    ([5.0, 6.0, 7.0], [1.0, 2.0, 3.0], "no, higher: by 4.9 standard errors"),
    ([1.0, 2.0, 3.0], [2.0, 3.0, 4.0], "not told apart: 1.2 standard errors; 9 trainings"),
    ([1.0], [9.0], "one of the trainings decides nothing"),
    ([], [], "nothing was measured"),
    ([1.0, 2.0], [2.0, 1.0], "no difference"),
    ([1.0, 1.0], [2.0, 2.0], "the trainings do not scatter"),
])
def test_a_difference_counts_from_twice_its_standard_error_on(ours, other, words):
    from experiments.verdict import decide

    assert decide(ours, other).startswith(words)


def test_values_of_the_same_networks_are_compared_in_pairs():
    from experiments.verdict import decide

    ours = [10.0, 20.0, 30.0]
    other = [11.0, 22.0, 33.0]  # 1, 2 and 3 more: 2 on average, and a standard error of .58
    assert decide(ours, other).startswith("not told apart: 0.2")
    assert decide(ours, other, paired=True) == "yes: by 3.5 standard errors"
    rounded = decide([0.1, 0.2, 0.3], [0.2, 0.3, 0.4], paired=True)
    assert rounded.startswith("the trainings do not scatter")
    with pytest.raises(ValueError):
        decide([1.0], [1.0, 2.0])


def test_two_results_are_compared_by_distance_and_by_error():
    from experiments.judge import Drawn, Result, verdict

    errors = {"rmse_1": [0.3, 0.31], "rmse_3": [0.9, 0.1]}
    crops = Result([], errors, Drawn(None, [10.0, 11.0], 35, 0.1))
    whole = Result([], {"rmse_1": [0.1, 0.11]}, Drawn(None, [20.0, 21.0], 35, 0.1))
    drawn, errors = verdict(crops, whole).split("; ")
    assert drawn == "yes: by 14.1 standard errors"
    assert errors == "by rmse_1 no, higher: by 28.3 standard errors"
    unmeasured = whole._replace(drawn=Drawn(None, [], 35, 0.1))
    assert verdict(unmeasured, unmeasured).startswith("nothing was measured; by rmse_1")


def test_equal_time_gives_the_faster_kind_more_steps():
    from experiments.equal_time import in_that_time

    assert in_that_time(100, [(4.0, 2.0), (9.0, 3.0), (2.0, 2.0)]) == 200
    assert in_that_time(1, [(1.0, 9.0)]) == 1


def test_the_seconds_of_trainings_are_those_at_their_end(tmp_path):
    from experiments.equal_time import seconds_of

    paths = []
    for k, ends in enumerate([(1, 7), (2, 5), (3, 9)]):
        path = tmp_path / str(k) / "log.csv"
        path.parent.mkdir()
        path.write_text("step,seconds\n1,{}\n2,{}\n".format(*ends))
        paths.append(path.parent / "ckpt.pt")
    assert seconds_of(paths) == 7


def test_half_a_step_of_heun_errs_an_eighth():
    from experiments.truncation import heun_step, reference, step_errors

    def D(x, sigma, y):  # of data that are Gaussian: x grows as the root of 1 + sigma^2
        return x / (1 + sigma**2)

    x = torch.full((1, 1, 1, 1), math.sqrt(1 + 2.0**2), dtype=torch.float64)
    t = torch.tensor(2.0, dtype=torch.float64)
    errors = []
    for h in (0.2, 0.1):
        exact = (1 + (t - h) ** 2).sqrt()
        errors.append((heun_step(D, x, t, t - h) - exact).abs().item())
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.1)
    noise = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    high = 80 ** (1 / 3)
    low = 0.002 ** (1 / 3)
    for k, x in enumerate(reference(D, noise, 4 * 100 + 1, 3.0)[:-1:100]):
        sigma = (high + k / 4 * (low - high)) ** 3
        assert x.item() == pytest.approx(80 * math.sqrt((1 + sigma**2) / (1 + 80**2)), rel=1e-3)
    errors = step_errors(D, noise, 5, 100, 3.0)
    levels = [(high + k / 4 * (low - high)) ** 3 for k in range(1, 5)]
    assert list(errors) == pytest.approx(levels, abs=1e-4)
    assert min(errors.values()) > 0


def test_the_order_of_a_solver_is_the_power_of_the_step():
    from experiments.truncation import order

    assert order([9.0, 1.0, 1 / 8], [3, 5, 10]) == pytest.approx(3)


def test_a_network_of_fixed_noise_levels_has_no_fine_solution():
    from experiments.truncation import check_levels

    class D:
        sigma_min = 0.002
        sigma_max = 80.0

        def round_sigma(self, sigma):
            return round(sigma)

    with pytest.raises(flags.UserError, match="some noise levels only"):
        check_levels(D(), "run")


def test_the_mixtures_denoiser_is_its_posterior_mean(run):
    from experiments import mixture

    x = torch.full((1, 1, 1, 1), 0.4, dtype=torch.float64)
    x_0 = mixture.draw(400_000)
    for sigma in (0.2, 1.0):
        w = (-(0.4 - x_0).square() / (2 * sigma**2)).exp()
        expected = (w * x_0).sum() / w.sum()
        found = mixture.Mixture()(x, torch.full((1, 1, 1, 1), sigma))
        assert found.item() == pytest.approx(expected.item(), abs=0.01)


def test_the_paths_of_each_schedule_end_at_the_same_places_and_euler_s_near_them(run, tmp_path):
    from experiments.edm_trajectories import CASES, HIGH, walk

    torch.manual_seed(0)
    noise = torch.randn(50, 1, 1, 2, dtype=torch.float64)
    ends = []
    for schedule, scaling, _ in CASES:
        t, x = walk(noise, 200, "heun", schedule, scaling)
        assert x.shape == (201, 50, 2)
        start = {"vp": HIGH / (1 + HIGH**2) ** 0.5}.get(schedule, HIGH)
        torch.testing.assert_close(x[0], start * noise[:, 0, 0])
        assert t[0].item() == pytest.approx({"vp": 1, "ve": HIGH**2, "linear": HIGH}[schedule])
        assert t[-1] == 0
        ends.append(x[-1])
    for end in ends:
        assert (end - ends[-1]).norm(dim=1).mean() < 0.01
    code, out, err = run("edm_trajectories", "--n 30 --steps 4")
    assert code == 0, err
    assert "no edm-trajectories.png: matplotlib is not installed" in out
    assert "Euler in 4 steps ends off the path by VP 0." in out


def test_the_paths_are_drawn_where_matplotlib_is(tmp_path):
    pytest.importorskip("matplotlib")
    from experiments.edm_trajectories import draw_columns

    t = torch.linspace(1, 0, 5)
    x = torch.randn(5, 30, 2)
    draw_columns([("VP", t, x, t, x)] * 3, tmp_path / "paths.png")
    assert (tmp_path / "paths.png").stat().st_size > 1000


# Tools


def test_a_benchmark_gives_speeds_and_ratios(run, tmp_path):
    line = "--methods pdm --size 8 --batch 2 --width 8 --mults 1 --steps 1 --repeats 1"
    code, out, err = run("tools.benchmark", f"{line} --threads 1 --device cpu --out it")
    assert code == 0, err
    names, values = (tmp_path / "it/benchmark.txt").read_text().splitlines()[1:]
    row = dict(zip(names.split(" | "), values.split(" | ")))
    assert row["method"] == "pdm"
    assert float(row["images_per_s"]) > 0
    assert float(row["ratio"]) > 0
    assert (tmp_path / "it/benchmark.json").exists()
    assert "wrote it/benchmark.txt" in out


def test_a_part_for_the_gpu_goes_on_where_its_time_was_up(run, tmp_path):
    line = "--part speed cifar --tiny --device cpu --limit 0.001 --out it"
    path = tmp_path / "it/speed.json"
    tables = []
    for _ in range(2):  # each call has the time to begin one measurement, or two
        code, out, err = run("tools.gpu", line)
        assert code == 0, err
        assert "no time left" in out
        assert "cifar: left out" in out
        tables.append(json.loads(path.read_text())["rows"])
    (first,) = tables[0]
    assert first["what"] == "ddpm fp32 channels_last eager, batch 4, width 8"
    assert first["images_per_s"] > 0
    assert 0 < first["share_of_peak"] < 1
    again, second, *_ = tables[1]
    assert again == first
    assert "tf32" in second["what"]
    assert second == second | dict(images_per_s=None, idle=None, memory_mb=None)
    assert "memory_mb -, " in path.with_suffix(".txt").read_text()
    code, _, err = run("tools.gpu", line.replace("--tiny ", ""))
    assert code == 2
    assert "choose another --out" in err


def test_a_measurement_that_fails_is_written_down_and_tried_again(run, tmp_path):
    from experiments.tools.gpu_tools import Report

    calls = []

    def fails():
        calls.append("fails")
        raise SystemExit("what went wrong")

    def works():
        calls.append("works")
        return dict(seconds=1.0)

    for _ in range(2):
        report = Report(tmp_path, "part", "a machine")
        report.measure("a", fails)
        report.measure("b", works)
    assert calls == ["fails", "works", "fails"]
    works, fails = json.loads((tmp_path / "part.json").read_text())["rows"]
    assert fails["failed"] == "SystemExit: what went wrong"
    assert works["seconds"] == 1.0
    assert "in fails" in (tmp_path / "part-errors.txt").read_text()


def test_each_precision_rounds_as_it_says_and_leaves_torch_as_it_was(run):
    from experiments.tools.gpu_tools import rounding

    settings = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [setting.allow_tf32 for setting in settings]
    for precision, expected in dict(fp32=[False] * 2, tf32=[True] * 2, bf16=before).items():
        with rounding(precision):
            assert [setting.allow_tf32 for setting in settings] == expected
        assert [setting.allow_tf32 for setting in settings] == before


def test_what_overlaps_is_counted_once(run):
    from experiments.tools.gpu_tools import busy, union

    assert union([(5, 7), (0, 3), (1, 2), (2, 4), (7, 8)]) == 7
    assert union([]) == 0
    x = torch.randn(64, 64)

    def work():
        for _ in range(100):
            x @ x
        time.sleep(0.2)

    started = time.perf_counter()
    worked = busy(work, "cpu")
    assert 0 < worked < time.perf_counter() - started - 0.2


def test_shapes_of_a_network_are_trained_in_turns(run, tmp_path):
    write_images()
    line = "--method pdm --data set.npy --size 16 --seconds 0.05 --turn 0.02 --device cpu"
    shapes = "--shapes 'width=8 mults=1, attention=()' 'even width=8 mults=1,2 attention=()'"
    code, _, err = run("tools.unet_shapes", f"{line} {shapes} --out it")
    assert code == 0, err
    lean, even = rows_of(tmp_path / "it/unet_shapes.csv")
    assert int(lean["images"]) >= 32
    assert int(even["parameters"]) > int(lean["parameters"])
    assert float(lean["rmse_1"]) > 0


WRONG_SHAPES = [
    ("widt=3", "widt"),
    ("width=0", "--width"),
    ("mults=2", "--mults"),
    ("width", "width"),
    ("mults=1,1,1,1,1,1,1", "--size"),
    ("attention=9,", "--attention"),
]


@pytest.mark.parametrize("shape, word", WRONG_SHAPES)
def test_a_shape_that_cannot_be_is_refused_by_name(run, tmp_path, shape, word):
    code, _, err = run("tools.unet_shapes", f"--shapes '{shape}'")
    assert code == 2
    assert err.startswith(f"error: shape '{shape}'")
    assert word in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


HEADER = "step,loss\n"
TORN = [HEADER + "1,0.5\n2,0", HEADER + "1,0.5\n2\n", HEADER + "1,0.5\n3,0.4\n", HEADER]


@pytest.mark.parametrize("text", TORN)
def test_a_torn_log_does_not_pass_for_a_whole_one(tmp_path, text):
    from experiments.tools.kill import check_log

    path = tmp_path / "log.csv"
    path.write_text(HEADER + "1,0.5\n2,0.4\n")
    check_log(path, 2, 1)
    check_log(path, 3, 1)  # killed between checkpoint and log
    path.write_text(text)
    with pytest.raises(flags.UserError, match="kill 1"):
        check_log(path, 2, 1)
