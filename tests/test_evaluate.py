import csv
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import HERE, close, closed_form, tensor
from PIL import Image
from test_train import do, pictures  # noqa: F401 (fixtures)

import data as pixels
import evaluate
import sample
import train
from ddpm import DDPM
from evaluate import closest, frechet_distance, moments


# Frechet distance

def gaussian(D, n):  # mean and covariance that do not commute with another's
    a = torch.randn(D, D, dtype=torch.float64)
    return torch.randn(D, dtype=torch.float64), a @ a.T / D + 0.1 * torch.eye(D, dtype=torch.float64), n


def test_the_frechet_distance_of_two_gaussians_is_its_closed_form():
    m_1, m_2 = tensor([1.0, -2.0]), tensor([0.5, 1.0])
    a, b = tensor([4.0, 9.0]).diag(), tensor([1.0, 25.0]).diag()                    # they commute: the root is taken by hand
    close(frechet_distance(m_1, a, m_2, b), 0.25 + 9 + (2 - 1) ** 2 + (3 - 5) ** 2)
    (m_1, s_1, _), (m_2, s_2, _) = gaussian(5, 0), gaussian(5, 0)
    values = torch.linalg.eigvals(s_1 @ s_2).real                                   # of the plain product, which is not symmetric
    close(frechet_distance(m_1, s_1, m_2, s_2), (m_1 - m_2).square().sum() + s_1.trace() + s_2.trace() - 2 * values.sqrt().sum())


def test_the_frechet_distance_is_symmetric_and_zero_from_a_set_to_itself():
    (m_1, s_1, _), (m_2, s_2, _) = gaussian(6, 0), gaussian(6, 0)
    close(frechet_distance(m_1, s_1, m_2, s_2), frechet_distance(m_2, s_2, m_1, s_1))
    assert abs(frechet_distance(m_1, s_1, m_1, s_1)) < 1e-9


def test_two_clouds_are_as_far_apart_as_the_gaussians_they_come_from():
    n, D = 200_000, 3
    x, y = torch.randn(n, D).double(), 1 + 2 * torch.randn(n, D).double()
    assert abs(frechet_distance(*moments(x), *moments(y)) - (D * 1 + D * (2 - 1) ** 2)) < 0.1
    assert frechet_distance(*moments(x[: n // 2]), *moments(x[n // 2:])) < 1e-3


# Nearest images

def test_the_closest_image_of_a_training_image_is_itself():
    data = torch.rand(50, 3, 4, 4) * 2 - 1
    distance, index = closest(data[10:13] + 2 / 255, data)
    assert index[:, 0].tolist() == [10, 11, 12] and index.shape == (3, 50)
    close(distance[:, 0], torch.full((3,), 1.0), rtol=1e-4)                           # one step of 255
    brute = 127.5 * (data[:, None] - data[10:13]).square().flatten(2).mean(2).sqrt()
    close(closest(data[10:13], data, 3)[0][:, 1:], brute.sort(dim=0)[0][1:3].T, rtol=1e-4)


# The command

FACTS = """--method pdm --patch 2 --conditional --steps 3 --T 12 | --method edm --steps 2 | --method ddpm --steps 2""".split(" | ")


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluated")


@pytest.fixture
def run(do, trained, tmp_path):
    """run("pdm --nll ...") -> (code, stdout, stderr, report) on a tiny run of that method."""
    def run(line, **flags):
        name, rest = line.split()[0], line.split()[1:]
        fact = next(fact for fact in FACTS if f" {name}" in fact)
        if not (trained / name / "ckpt.pt").exists():
            do(train, f"{fact} --lr 0.01 --warmup 0 --out {trained / name}")
        if not (tmp_path / name).exists():
            shutil.copytree(trained / name, tmp_path / name)
        path = tmp_path / name / "evaluation" / "report.json"
        path.unlink(missing_ok=True)
        code, out, err = do(evaluate, f"{name}/ckpt.pt --device cpu {' '.join(rest)}")
        return code, out, err, json.loads(path.read_text()) if path.exists() else None
    return run


class Mean(torch.nn.Module):  # the mean of each channel: three features
    def forward(self, x):
        return x.float().mean(dim=[2, 3])


class Pixels(torch.nn.Module):
    def forward(self, x):
        return x.float()


@pytest.fixture
def features(tmp_path):
    torch.jit.script(Mean()).save(str(tmp_path / "mean.pt"), _extra_files={"about.json": '{"accuracy": "12%"}'})
    torch.jit.script(Pixels()).save(str(tmp_path / "pixels.pt"))
    return tmp_path


def test_the_reported_bits_are_those_of_the_method_and_its_tables_add_up(run, tmp_path):
    code, out, err, report = run("pdm --nll --n 3")
    assert code == 0, err
    nll, rows = report["nll"], list(csv.DictReader(open(tmp_path / "pdm/evaluation/terms.csv")))
    method, checkpoint = train.load(tmp_path / "pdm/ckpt.pt", device="cpu")
    (_, _), (x, y) = train.hold_out(*pixels.load(tmp_path / "set.npz")[:2], 0)
    bound = method.bits_per_dim(pixels.to_float(x), y, randn_like=train.seeded_noise([(0, 0), (0, 1), (0, 2)]))
    close(nll["bits_per_dim"], bound["total"].mean(), rtol=1e-4)
    assert len(x) == nll["n"] == 3 and nll["nfe"] == len(rows) == 12 and nll["seconds_per_image"] > 0
    assert [int(row["t"]) for row in rows] == list(range(1, 13))
    close(nll["bits_per_dim"], nll["rate"] + nll["decoder"])
    terms = tensor([float(row["bits_per_dim"]) for row in rows])
    close(nll["first_percent"], 0.0) if "no step" in out else close(nll["first_percent"], terms[0], rtol=1e-4)
    for k, row in enumerate(rows):                                     # at t the bits of all later terms are known
        close(float(row["rate"]), nll["prior"] + terms[k + 1:].sum(), rtol=1e-3, atol=1e-5)
        close(float(row["distortion"]), 127.5 * bound["mse"].double().mean(0)[k].sqrt(), rtol=1e-3)
    assert run("pdm --nll --n 3 --batch 2")[3]["nll"]["bits_per_dim"] == pytest.approx(nll["bits_per_dim"], rel=1e-4)
    assert run("pdm --nll --n 2 --steps 10")[3]["nll"]["steps"] == 10


def test_the_first_percent_is_the_sum_of_the_terms_up_to_t_over_100(tmp_path):
    ddpm = DDPM(closed_form(lambda x, t, y: 0 * x), 1, T=300)
    result = evaluate.likelihood(ddpm, torch.zeros(2, 1, 2, 2), None, None, 2, 0, "cpu", tmp_path / "terms.csv")
    rows = list(csv.DictReader(open(tmp_path / "terms.csv")))
    close(result["first_percent"], sum(float(row["bits_per_dim"]) for row in rows[:3]), rtol=1e-4)
    assert float(rows[2]["bits_per_dim"]) > 1e-3 * result["first_percent"] and float(rows[3]["bits_per_dim"]) > 1e-3 * result["first_percent"]


def test_the_error_at_each_level_is_that_of_the_denoiser_and_the_floor_that_of_the_data(run, tmp_path):
    code, out, _, report = run("edm --batch 2")                         # what is measured if nothing is named
    method, _ = train.load(tmp_path / "edm/ckpt.pt", device="cpu")
    (x, _), (held, _) = train.hold_out(pixels.load(tmp_path / "set.npz")[0], None, 0)
    x, held, rows = pixels.to_float(x), pixels.to_float(held), report["error"]["levels"]
    assert code == 0 and rows[0]["sigma"] == 0.01 and rows[-1]["sigma"] == 50 and "edm" in out
    for row in rows:
        sigma, some = row["sigma"], [0, 28, 56]
        n = train.seeded_noise([(0, 0), (0, 1), (0, 2)])(held)
        close(row["held_out"], (method.D(held + sigma * n, sigma) - held).square().mean().sqrt(), rtol=1e-3)
        close(row["trained_on"], (method.D(x[some] + sigma * n, sigma) - x[some]).square().mean().sqrt(), rtol=1e-3)
        logits = -(x[some] + sigma * n)[:, None].double().sub(x.double()).square().flatten(2).sum(2) / (2 * sigma ** 2)
        best = (logits.softmax(1) @ x.flatten(1).double()).view(3, *x.shape[1:])
        close(row["floor"], (best - x[some]).square().mean().sqrt(), rtol=1e-3, atol=1e-6)
    assert [float(row["floor"]) for row in csv.DictReader(open(tmp_path / "edm/evaluation/error.csv"))] == [row["floor"] for row in rows]


def test_the_frechet_distance_is_taken_between_the_samples_and_all_the_data(run, features, tmp_path):
    code, out, _, report = run("ddpm --frechet --features mean.pt --n 8 --steps 3")
    assert code == 0 and "Frechet distance on mean.pt" in out and "FID" not in out and "accuracy 12%" in out and report["samples"]["nfe"] == 3
    assert do_sample(tmp_path, 8, 3)
    drawn = torch.stack([torch.tensor(np.asarray(Image.open(p))).permute(2, 0, 1) for p in sorted((tmp_path / "drawn").iterdir())])
    data = pixels.load(tmp_path / "set.npz")[0]
    held = torch.linspace(0, 59, 3).long().tolist()
    data = data[[i for i in range(60) if i not in held]]
    a, b = (x.double().mean(dim=(2, 3)) for x in (drawn, data))
    expected = frechet_distance(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T))
    close(report["frechet"]["value"], expected, rtol=0.02)
    assert report["frechet"] | dict(value=0) == dict(name="Frechet distance on mean.pt", value=0, samples=8, images=57, dimensions=3, features="mean.pt", accuracy="12%")
    kept = list(tmp_path.glob("set.npz.*.stats.npz"))
    assert len(kept) == 1
    np.savez(kept[0], mean=np.zeros(3), covariance=np.zeros((3, 3)))      # the second time it is read
    again = run("ddpm --frechet --features mean.pt --n 8 --steps 3")[3]["frechet"]["value"]
    close(again, a.mean(0).square().sum() + torch.cov(a.T).trace(), rtol=0.02)
    assert "too high" in run("ddpm --frechet --features mean.pt --n 3 --steps 2")[1]


def do_sample(folder, n, steps):
    sample.main(f"{folder}/ddpm/ckpt.pt --n {n} --steps {steps} --out {folder}/drawn".split())
    return True


def test_copies_of_training_images_are_found_out(run, tmp_path, monkeypatch):
    data = pixels.to_float(pixels.load(tmp_path / "set.npz")[0])
    code, out, _, report = run("ddpm --nearest --n 6 --sampler euler --steps 3")
    assert code == 0 and report["nearest"]["copies"] == 0 and report["samples"]["nfe"] == 3 and report["samples"]["sampler"] == "euler"
    assert Image.open(tmp_path / "ddpm/evaluation/nearest.png").size[0] >= 8 * 16
    monkeypatch.setattr(evaluate, "draw", lambda *arguments: data[10:16].clone())
    nearest = run("ddpm --nearest --n 6 --steps 3")[3]["nearest"]
    assert nearest["copies"] == 1 and nearest["samples"] < 0.1 < nearest["held_out"]


@pytest.mark.parametrize("line, words", [
    ("edm --nll", "edm has no variational bound"),
    ("ddpm --nll --data latents.npy", "floats"),
    ("pdm --frechet", "--features"), ("pdm --frechet --features mean.pt --n 1", "--n 2"), ("pdm --nearest --eta 3", "eta"),
    ("pdm --features mean.pt", "--frechet"),
    ("pdm --frechet --features set.npz", "set.npz is not a TorchScript network"),
    ("pdm --frechet --features nothing.pt", "nothing.pt"),
    ("pdm --frechet --features pixels.pt", "one vector an image"),
    ("pdm --nll --data other.npz", "classes 0, 1, 2"),
    ("pdm --nll --data nothing", "no such file"),
    ("pdm --n 0", "--n"),
    ("pdm --nll --steps 5000", "steps"),
    ("pdm --steps 1 --nll", "2 steps"),
    ("edm --guidance 2 --nearest", "--conditional"),
    ("ddpm --error --out set.npz", "is a file"),
    ("ddpm --fid", "no such flag"),
    ("ddpm --S_churn 3 --nearest", "--sampler heun")])
def test_a_mistake_in_evaluating_is_one_line_and_exit_code_2(run, features, tmp_path, line, words):
    np.save(tmp_path / "latents.npy", np.zeros((40, 3, 16, 16), np.float32))
    np.savez(tmp_path / "other.npz", images=np.zeros((40, 3, 16, 16), np.uint8), labels=np.arange(40) % 7)
    code, out, err, report = run(line)
    assert code == 2 and err.startswith("error: ") and len(err.strip().splitlines()) == 1 and words in err and report is None


def test_the_features_script_saves_a_network_that_evaluate_reads(do, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(HERE.parent / "experiments"))
    import features
    bright = (np.arange(200) % 2 * 120 + np.random.default_rng(0).integers(0, 60, (3, 16, 16, 200))).astype(np.uint8).transpose(3, 0, 1, 2)
    np.savez(tmp_path / "easy.npz", images=bright, labels=np.arange(200) % 2)
    code, out, err = do(features, "--data easy.npz --epochs 30 --width 4 --dimensions 5 --out easy.pt")
    assert code == 0 and "100.00% of 10" in out.splitlines()[-2], err
    network = evaluate.Features("easy.pt", [3, 16, 16], "cpu")
    assert network.dimensions == 5 and network.about["accuracy"] == "100.00%" and network.name == "Frechet distance on easy.pt"
    for line in ("--data nothing", "--data easy.npz --epochs 0"):
        assert do(features, line)[0] == 2


def test_gray_images_reach_networks_of_one_channel_and_of_three(tmp_path):
    for channels in (1, 3):
        torch.jit.script(torch.nn.Sequential(ToFloat(), torch.nn.Conv2d(channels, 2, 1), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())).save(str(tmp_path / "net.pt"))
        assert evaluate.Features(str(tmp_path / "net.pt"), [1, 8, 8], "cpu").dimensions == 2


class ToFloat(torch.nn.Module):
    def forward(self, x):
        return x.float()


def test_the_floor_of_a_conditional_model_is_taken_over_the_image_s_own_class(tmp_path):
    data, y = torch.tensor([[0, 80], [120, 255]], dtype=torch.uint8).flatten()[:, None, None, None].expand(4, 1, 4, 4), torch.tensor([0, 0, 1, 1])
    class D:
        sigma_min, sigma_max = 5.0, 5.0
        def round_sigma(self, sigma):
            return sigma
        def __call__(self, x, sigma, y=None):
            return 0 * x
    rows = [evaluate.errors(D(), (data, labels), (pixels.to_float(data), labels), 8, 0, "cpu", tmp_path / "e.csv")[0]["floor"] for labels in (None, y)]
    assert 0 < rows[1] < 0.8 * rows[0]


class Port(torch.nn.Module):  # called as the published Inception port is
    def forward(self, x, return_features: bool = False):
        return x.float().mean(dim=[1, 2, 3])[:, None].expand(-1, 2048 if return_features else 1008)


def test_only_a_port_of_inception_gives_the_name_fid(tmp_path):
    for name, expected in (("inception-2015.pt", "FID"), ("other.pt", "Frechet distance on other.pt")):
        torch.jit.script(Port()).save(str(tmp_path / name))
        network = evaluate.Features(str(tmp_path / name), [3, 8, 8], "cpu")
        assert network.dimensions == 2048 and network.name == expected
