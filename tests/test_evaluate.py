import csv
import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import close, closed_form, tensor
from PIL import Image

import evaluate
import sample
from ddpm import DDPM
from evaluate import closest, frechet_distance, moments, precision_and_recall
from plumbing import checkpoint, datasets, frechet, images
from plumbing.device import seeded_noise
from plumbing.flags import UserError

# Frechet distance


def gaussian(D):
    """A mean and a covariance that does not commute with another's."""
    a = torch.randn(D, D, dtype=torch.float64)
    covariance = a @ a.T / D + 0.1 * torch.eye(D, dtype=torch.float64)
    return torch.randn(D, dtype=torch.float64), covariance


def test_the_frechet_distance_of_gaussians_that_commute_is_that_of_their_roots():
    a, b = tensor([4.0, 9.0]).diag(), tensor([1.0, 25.0]).diag()
    distance = frechet_distance(tensor([1.0, -2.0]), a, tensor([0.5, 1.0]), b)
    close(distance, 0.25 + 9 + (2 - 1) ** 2 + (3 - 5) ** 2)


def test_the_frechet_distance_of_gaussians_is_its_closed_form():
    (m_1, s_1), (m_2, s_2) = gaussian(5), gaussian(5)
    values = torch.linalg.eigvals(s_1 @ s_2).real  # of the plain product, not symmetric
    expected = (m_1 - m_2).square().sum() + s_1.trace() + s_2.trace() - 2 * values.sqrt().sum()
    close(frechet_distance(m_1, s_1, m_2, s_2), expected)


def test_the_frechet_distance_is_symmetric_and_zero_from_a_set_to_itself():
    a, b = gaussian(6), gaussian(6)
    close(frechet_distance(*a, *b), frechet_distance(*b, *a))
    assert abs(frechet_distance(*a, *a)) < 1e-9


def test_two_clouds_are_as_far_apart_as_the_gaussians_they_come_from():
    n, D = 200_000, 3
    x = torch.randn(n, D).double()
    y = 1 + 2 * torch.randn(n, D).double()
    expected = D * 1 + D * (2 - 1) ** 2
    assert abs(frechet_distance(*moments(x), *moments(y)) - expected) < 0.1
    assert frechet_distance(*moments(x[: n // 2]), *moments(x[n // 2 :])) < 1e-3


# Precision and recall


def test_a_set_has_precision_and_recall_1_with_itself_and_0_with_one_far_away():
    x = torch.randn(60, 5, dtype=torch.float64)
    assert precision_and_recall(x, x.clone()) == (1, 1)
    assert precision_and_recall(x, x + 1000) == (0, 0)


def test_samples_of_one_of_two_modes_have_precision_1_and_recall_a_half():
    mode = torch.randn(200, 2, dtype=torch.float64)
    data = torch.cat([mode, mode + 1000])
    assert precision_and_recall(mode, data) == (1, 0.5)
    drawn_anew = torch.randn(400, 2, dtype=torch.float64)
    precision, recall = precision_and_recall(drawn_anew, data)
    assert 0.9 < precision <= 1
    assert 0.45 < recall <= 0.5


@pytest.mark.parametrize("k, precision, recall", [(1, 0.8, 0.5), (2, 0.8, 1.0)])
def test_precision_and_recall_of_points_on_a_line_are_those_by_hand(k, precision, recall):
    data = tensor([[0.0], [1.0], [10.0], [12.0]])  # k = 1: within -1 to 2 and 8 to 14
    samples = tensor([[1.5], [1.6], [9.0], [9.6], [30.0]])  # 1.4 to 1.7, 8.4 to 50.4
    found = precision_and_recall(samples, data, k)
    assert found == pytest.approx((precision, recall))


def test_a_point_reaches_as_far_as_its_third_neighbour():
    data = torch.arange(10, dtype=torch.float64)[:, None]
    samples = tensor([[5.2], [6.3], [12.0], [12.5]])
    assert precision_and_recall(samples, data)[0] == 0.75


def test_precision_is_recall_where_samples_and_data_change_places():
    x = torch.randn(40, 3, dtype=torch.float64)
    y = 1 + 2 * torch.randn(50, 3, dtype=torch.float64)
    precision, recall = precision_and_recall(x, y)
    assert precision_and_recall(y, x) == (recall, precision)


def test_many_distances_are_made_a_few_rows_at_a_time():
    x = torch.randn(10, 3, dtype=torch.float64)
    points = torch.randn(7, 3, dtype=torch.float64)
    parts = list(frechet.distances(x, points, most=30))
    assert [len(part) for part in parts] == [4, 4, 2]
    close(torch.cat(parts), (x[:, None] - points).norm(dim=2))
    assert [len(part) for part in frechet.distances(x, points, most=1)] == [1] * 10


# Nearest images


def test_the_closest_image_of_a_training_image_is_itself():
    data = torch.rand(50, 3, 4, 4) * 2 - 1
    distance, index = closest(data[10:13] + 2 / 255, data)
    assert index[:, 0].tolist() == [10, 11, 12]
    close(distance[:, 0], torch.ones(3), rtol=1e-4)  # one step of 255


def test_the_closest_images_are_those_of_smallest_rmse():
    data = torch.rand(50, 3, 4, 4) * 2 - 1
    all_pairs = 127.5 * (data[:, None] - data[10:13]).square().flatten(2).mean(2).sqrt()
    distance, _ = closest(data[10:13], data, 3)
    close(distance[:, 1:], all_pairs.sort(dim=0)[0][1:3].T, rtol=1e-4)


# A denoiser's least error


def test_what_is_known_by_heart_is_that_of_the_image_s_own_class():
    values = torch.tensor([0, 80, 120, 255], dtype=torch.uint8)
    x = values[:, None, None, None].expand(4, 1, 4, 4)

    class D:
        sigma_min = 5.0
        sigma_max = 5.0

        def round_sigma(self, sigma):
            return sigma

        def __call__(self, x, sigma, y=None):
            return 0 * x

    by_heart = []
    for y in (None, torch.tensor([0, 0, 1, 1])):
        data = evaluate.Data(x, y, "set", "images")
        by_heart.append(evaluate.errors(D(), data, data, 8, 0, "cpu")[0]["by_heart"])
    assert 0 < by_heart[1] < 0.8 * by_heart[0]


def test_the_first_percent_is_the_sum_of_the_terms_up_to_t_over_100():
    method = DDPM(closed_form(lambda x, t, y: 0 * x), 1, T=300)
    method.weight = torch.nn.Parameter(torch.zeros(1))
    x = torch.full((2, 1, 2, 2), 128, dtype=torch.uint8)
    result, rows = evaluate.likelihood(method, x, None, None, 2, 0)
    assert [row["t"] for row in rows] == list(range(1, 301))
    close(result["first_percent"], sum(row["bits_per_dim"] for row in rows[:3]))
    for row in rows[2:4]:
        assert row["bits_per_dim"] > 1e-3 * result["first_percent"]


# Features


class Mean(torch.nn.Module):
    """The mean of each channel: three features."""

    def forward(self, x):
        return x.float().mean(dim=[2, 3])


class Pixels(torch.nn.Module):
    def forward(self, x):
        return x.float()


class Nan(torch.nn.Module):
    """Features of real images that are not finite; those of a black image are."""

    def forward(self, x):
        return (-x.float().mean(dim=[2, 3])).sqrt()


class Port(torch.nn.Module):
    """Called as the published port of Inception is."""

    def forward(self, x, return_features: bool = False):
        features = 2048 if return_features else 1008
        return x.float().mean(dim=[1, 2, 3])[:, None].expand(-1, features)


def save(module, path, about=None):
    extra = {} if about is None else {"about.json": about}
    torch.jit.script(module).save(str(path), _extra_files=extra)


@pytest.mark.parametrize(
    "file, name",
    [("inception-2015.pt", "FID"), ("other.pt", "Frechet distance on other.pt")],
)
def test_only_a_port_of_inception_gives_the_name_fid(tmp_path, file, name):
    save(Port(), tmp_path / file)
    network = frechet.Features(tmp_path / file, [3, 8, 8], "cpu")
    assert network.dimensions == 2048
    assert network.name == name


@pytest.mark.parametrize("channels", [1, 3])
def test_gray_images_reach_networks_of_one_channel_and_of_three(tmp_path, channels):
    layers = (Pixels(), torch.nn.Conv2d(channels, 2, 1), torch.nn.AdaptiveAvgPool2d(1))
    save(torch.nn.Sequential(*layers, torch.nn.Flatten()), tmp_path / "net.pt")
    assert frechet.Features(tmp_path / "net.pt", [1, 8, 8], "cpu").dimensions == 2


@pytest.mark.parametrize("about", ["[1]", "{", "3", "null"])
def test_odd_words_in_a_features_file_are_refused_in_one_line(tmp_path, about):
    save(Mean(), tmp_path / "odd.pt", about)
    with pytest.raises(UserError, match="about.json"):
        frechet.Features(tmp_path / "odd.pt", [3, 8, 8], "cpu")


@pytest.mark.parametrize("error", [RuntimeError, IndexError, KeyError])
def test_whatever_torch_says_of_a_damaged_features_file_is_one_line(monkeypatch, error):
    def load(*_, **options):
        raise error("torn")

    monkeypatch.setattr(torch.jit, "load", load)
    with pytest.raises(UserError, match="x.pt is not a TorchScript network: .*torn"):
        frechet.load_features("x.pt", "cpu")


def test_statistics_that_were_damaged_are_made_again(tmp_path):
    save(Mean(), tmp_path / "mean.pt")
    source = tmp_path / "set.npz"
    tiny.write_set(source)
    network = frechet.Features(tmp_path / "mean.pt", [3, 8, 8], "cpu")
    x = datasets.load(source)[0]
    expected = network.statistics(x, source, 64)
    (kept,) = tmp_path.glob("set.npz.*.stats.npz")
    for mean in (np.full(3, np.nan), np.zeros(4), np.array("x")):
        np.savez(kept, mean=mean, covariance=np.zeros((3, 3)))
        for again, once in zip(network.statistics(x, source, 64), expected):
            close(again, once)


# The command


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    tiny.write_set(folder / "set.npz")
    tiny.write_run(folder / "pdm", "pdm", classes=3, patch=(2,), T=12)
    tiny.write_run(folder / "ddpm", "ddpm")
    tiny.write_run(folder / "edm", "edm")
    save(Mean(), folder / "mean.pt", '{"accuracy": "12%", "value": "of no interest"}')
    save(Pixels(), folder / "pixels.pt")
    save(Nan(), folder / "nan.pt")
    np.save(folder / "latents.npy", np.zeros((40, 3, 8, 8), np.float32))
    blank = np.zeros((40, 3, 8, 8), np.uint8)
    np.savez(folder / "other.npz", images=blank, labels=np.arange(40) % 7)
    return folder


@pytest.fixture
def command(runs, tmp_path, monkeypatch, capsys):
    return tiny.beside(runs, tmp_path, monkeypatch, capsys)


@pytest.fixture
def measure(command):
    """measure("pdm --nll") -> the results of a run's only report."""

    def measure(line):
        path = Path(line.split()[0], "evaluation/report.json")
        path.unlink(missing_ok=True)
        code, _, err = command(evaluate, f"{line} --device cpu")
        assert code == 0, err
        (results,) = json.loads(path.read_text()).values()
        return results

    return measure


def trained_on_and_held_out(labels=None):
    x, y, _ = datasets.load("set.npz")
    return datasets.hold_out(x, y if labels else None, 0)


def test_the_reported_bits_are_those_of_the_method(measure):
    nll = measure("pdm --nll --n 3")["nll"]
    method, _ = checkpoint.load("pdm", device="cpu")
    _, (x, y) = trained_on_and_held_out(labels=True)
    noise = seeded_noise([(0, i) for i in range(3)])
    bound = method.bits_per_dim(images.to_float(x), y, randn_like=noise)
    close(nll["bits_per_dim"], bound["total"].mean(), rtol=1e-4)
    close(nll["bits_per_dim"], nll["rate"] + nll["decoder"])
    assert nll["n"] == 3
    assert nll["nfe"] == 12
    assert nll["seconds_per_image"] > 0
    in_parts = measure("pdm --nll --n 3 --batch 2")["nll"]
    close(in_parts["bits_per_dim"], nll["bits_per_dim"], rtol=1e-4)


def test_rate_and_distortion_at_t_are_those_once_all_later_terms_are_known(measure):
    nll = measure("pdm --nll --n 3")["nll"]
    rows = list(csv.DictReader(open("pdm/evaluation/terms.csv")))
    assert [int(row["t"]) for row in rows] == list(range(1, 13))
    method, _ = checkpoint.load("pdm", device="cpu")
    _, (x, y) = trained_on_and_held_out(labels=True)
    noise = seeded_noise([(0, i) for i in range(3)])
    bound = method.bits_per_dim(images.to_float(x), y, randn_like=noise)
    terms = bound["terms"].double().mean(0)
    mse = bound["mse"].double().mean(0)
    for k, row in enumerate(rows):
        rate = nll["prior"] + terms[k + 1 :].sum()
        close(float(row["rate"]), rate, rtol=1e-3, atol=1e-5)
        close(float(row["distortion"]), 127.5 * mse[k].sqrt(), rtol=1e-3)


def test_steps_shorten_the_bound_s_chain(measure):
    assert measure("pdm --nll --n 2 --steps 10")["nll"]["steps"] == 10


def test_the_error_at_each_level_is_the_denoiser_s(measure):
    rows = measure("edm --batch 2")["error"]["levels"]  # measured where nothing is named
    method, _ = checkpoint.load("edm", device="cpu")
    (x, _), (held_out, _) = trained_on_and_held_out()
    sets = dict(held_out=images.to_float(held_out), trained_on=images.to_float(x)[[0, 28, 56]])
    assert [rows[0]["sigma"], rows[-1]["sigma"]] == [0.01, 50]
    for row in rows:
        for name, x_0 in sets.items():
            noisy = x_0 + row["sigma"] * seeded_noise([(0, i) for i in range(3)])(x_0)
            error = (method.D(noisy, row["sigma"]) - x_0).square().mean().sqrt()
            close(row[name], error, rtol=1e-3)


def test_by_heart_is_the_error_of_a_model_that_knows_the_training_images_by_heart(measure):
    rows = measure("edm")["error"]["levels"]
    (x, _), _ = trained_on_and_held_out()
    x = images.to_float(x).double()
    x_0 = x[[0, 28, 56]]
    for row in rows:
        noise = seeded_noise([(0, i) for i in range(3)])(x_0.float())
        noisy = x_0 + row["sigma"] * noise
        squares = (noisy[:, None] - x).square().flatten(2).sum(2)
        weights = (-squares / (2 * row["sigma"] ** 2)).softmax(1)
        best = (weights @ x.flatten(1)).view_as(x_0)
        close(row["by_heart"], (best - x_0).square().mean().sqrt(), rtol=1e-3, atol=1e-5)
    table = list(csv.DictReader(open("edm/evaluation/error.csv")))
    assert [float(row["by_heart"]) for row in table] == [row["by_heart"] for row in rows]


def test_the_frechet_distance_is_taken_between_the_samples_and_all_the_data(measure, command):
    report = measure("ddpm --frechet --features mean.pt --n 8 --steps 3")["frechet"]
    command(sample, "ddpm --n 8 --steps 3 --out drawn")
    drawn = np.stack([np.asarray(Image.open(path)) for path in sorted(Path("drawn").iterdir())])
    a = torch.tensor(drawn).double().mean(dim=(1, 2))
    (data, _), _ = trained_on_and_held_out()
    b = data.double().mean(dim=(2, 3))
    expected = frechet_distance(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T))
    close(report["value"], expected, rtol=0.02)
    facts = dict(samples=8, images=57, dimensions=3, features="mean.pt", accuracy="12%", nfe=3)
    assert facts.items() <= report.items()
    assert report["name"] == "Frechet distance on mean.pt"


def test_precision_and_recall_are_of_the_samples_and_of_as_many_images(command):
    line = "ddpm --n 20 --steps 3"
    code, out, _ = command(evaluate, f"{line} --frechet --features mean.pt")
    assert code == 0
    report = json.loads(Path("ddpm/evaluation/report.json").read_text())["step 3"]["frechet"]
    command(sample, f"{line} --out drawn")
    drawn = np.stack([np.asarray(Image.open(path)) for path in sorted(Path("drawn").iterdir())])
    a = torch.tensor(drawn).double().mean(dim=(1, 2))
    (data, _), _ = trained_on_and_held_out()
    b = data[[i * 56 // 19 for i in range(20)]].double().mean(dim=(2, 3))
    for name, x, points in (("precision", a, b), ("recall", b, a)):
        own = (points[:, None] - points).norm(dim=2).sort(dim=1)[0]
        near = (x[:, None] - points).norm(dim=2) <= own[:, 3]
        close(report[name], near.any(dim=1).double().mean())
    assert dict(of_each=20, k=3).items() <= report.items()
    precision, recall = report["precision"], report["recall"]
    assert f"precision {precision:.3f}, recall {recall:.3f}: of 20 samples and as many" in out


def test_two_samples_have_one_neighbour_each(measure):
    report = measure("ddpm --frechet --features mean.pt --n 2 --steps 2")["frechet"]
    assert report["k"] == 1


def test_too_few_images_for_the_features_are_warned_of(command):
    line = "ddpm --frechet --features mean.pt --steps 2 --n"
    assert "too high" in command(evaluate, f"{line} 3")[1]
    assert "too high" not in command(evaluate, f"{line} 4")[1]


def test_copies_of_training_images_are_noticed(measure, monkeypatch):
    line = "ddpm --nearest --n 6 --sampler euler --steps 3"
    nearest = measure(line)["nearest"]
    assert nearest["copies"] == 0
    assert nearest["sampler"] == "euler"
    assert nearest["nfe"] == 3
    assert Image.open("ddpm/evaluation/nearest.png").size[0] >= 8 * 16
    (data, _), _ = trained_on_and_held_out()
    copies = images.to_float(data[10:16])
    monkeypatch.setattr(evaluate, "draw", lambda *arguments: copies)
    nearest = measure(line)["nearest"]
    assert nearest["copies"] == 1
    assert nearest["samples"] < 0.1 < nearest["held_out"]


def test_guidance_is_off_unless_asked_for(measure):
    line = "pdm --nearest --n 4 --steps 3"
    plain = measure(line)["nearest"]
    assert plain["guidance"] == 1
    assert plain["nfe"] == 3
    guided = measure(f"{line} --guidance 2")["nearest"]
    assert guided["guidance"] == 2
    assert guided["nfe"] == 6
    assert guided["samples"] != plain["samples"]


# The report


def test_a_report_keeps_what_was_measured_at_each_step_and_of_raw_weights(command, tmp_path):
    def steps_and_measures():
        report = json.loads(Path("ddpm/evaluation/report.json").read_text())
        measures = ("nll", "error", "nearest")
        return {step: {m for m in measures if m in results} for step, results in report.items()}

    command(evaluate, "ddpm --nll --steps 3 --n 2")
    command(evaluate, "ddpm --error --n 2")
    assert steps_and_measures() == {"step 3": {"nll", "error"}}
    command(evaluate, "ddpm --error --n 2 --raw")
    tiny.write_run(tmp_path / "ddpm", "ddpm", step=5)
    command(evaluate, "ddpm --nearest --n 2 --steps 3")
    assert steps_and_measures() == {
        "step 3": {"nll", "error"},
        "step 3 raw": {"error"},
        "step 5": {"nearest"},
    }


FOREIGN = dict(
    cut="{",
    list="[]",
    flat='{"a": 1}',
    empty='{"step 3": {}}',
    odd='{"step 3": {"method": [], "trained_on": {}}}',
    number="3",
    binary="\x00\xff",
    deep="[" * 10**5,
)


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_report_is_left_as_it_is(command, kind):
    text = FOREIGN[kind]
    Path("edm/evaluation").mkdir()
    path = Path("edm/evaluation/report.json")
    path.write_text(text)
    tiny.assert_one_line(command(evaluate, "edm --n 2"), "no report of this command")
    assert path.read_text() == text


def test_the_report_of_another_run_is_left_as_it_is(command):
    command(evaluate, "edm --n 2 --out there")
    before = Path("there/report.json").read_text()
    tiny.assert_one_line(command(evaluate, "ddpm --n 2 --out there"), "another run")
    assert Path("there/report.json").read_text() == before


# Help and mistakes


def test_help_lists_the_flags_without_a_run(command):
    code, out, _ = command(evaluate, "--help")
    assert code == 0
    assert "--nearest" in out


@pytest.mark.parametrize(
    "line, words",
    [
        ("edm --nll", "edm has no variational bound"),
        ("ddpm --nll --data latents.npy", "floats"),
        ("pdm --frechet", "--features"),
        ("pdm --frechet --features mean.pt --n 1", "--n must lie between 2"),
        ("pdm --nearest --eta 3", "eta"),
        ("pdm --features mean.pt", "--frechet"),
        ("pdm --frechet --features set.npz", "set.npz is not a TorchScript network"),
        ("pdm --frechet --features nothing.pt", "nothing.pt"),
        ("pdm --frechet --features pixels.pt", "one vector an image"),
        ("pdm --nll --data other.npz", "classes 0, 1, 2"),
        ("pdm --nll --data nothing", "no such file"),
        ("pdm --n 0", "--n"),
        ("pdm --n 100000000000000000000", "--n"),
        ("pdm --batch 0", "--batch"),
        ("pdm --seed -1", "--seed"),
        ("pdm --nll --steps 5000", "steps"),
        ("pdm --steps 1 --nll", "2 steps"),
        ("edm --guidance 2 --nearest", "--conditional"),
        ("pdm --guidance nan --nearest", "--guidance"),
        ("ddpm --error --out set.npz", "set.npz"),
        ("ddpm --error --out set.npz/there", "cannot write"),
        ("ddpm --fid", "no such flag"),
        ("ddpm --S_churn 3 --nearest", "--sampler heun"),
        ("--error", "runs/pdm"),
    ],
)
def test_a_mistake_in_evaluating_is_one_line_and_writes_nothing(
    runs, monkeypatch, capsys, line, words
):
    monkeypatch.chdir(runs)
    tiny.Command(monkeypatch, capsys).refuses(evaluate, line, words)


def test_features_that_are_not_finite_are_refused(command):
    line = "ddpm --frechet --features nan.pt --n 4 --steps 3"
    code, _, err = command(evaluate, line)
    assert code == 2
    assert "error: nan.pt gives features that are not finite" in err
    assert not Path("ddpm/evaluation/report.json").exists()
