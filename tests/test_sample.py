import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import do, pictures  # noqa: F401 (fixtures)

import sample
import train
from train import seeded_noise


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    return tmp_path_factory.mktemp("trained")


def a_run(do, trained, tmp_path, name, flags):  # trained once, copied for each test
    if not (trained / name / "ckpt.pt").exists():
        assert do(train, f"{flags} --out {trained / name}")[0] == 0
    shutil.copytree(trained / name, tmp_path / "run")
    return do


@pytest.fixture
def run(do, trained, tmp_path):
    return a_run(do, trained, tmp_path, "pdm", "--method pdm --patch 2 --conditional --steps 2 --lr 0.01 --warmup 0")


@pytest.fixture
def run_on_crops(do, trained, tmp_path):
    return a_run(do, trained, tmp_path, "crops", "--method patch_diffusion --steps 2 --lr 0.01 --warmup 0 --conditional --mults 1 1")


def drawn(folder):
    return [np.asarray(Image.open(p)).astype(int) for p in sorted(folder.iterdir())]


def test_image_i_depends_on_the_seed_and_i_alone(run, tmp_path):
    run(sample, "run/ckpt.pt --n 5 --steps 3 --out all --class 0")
    run(sample, "run/ckpt.pt --n 5 --steps 3 --out batches --batch 2 --class 0")
    run(sample, "run/ckpt.pt --n 2 --steps 3 --out few --class 0")
    run(sample, "run/ckpt.pt --n 2 --steps 3 --out other --seed 1 --class 0")
    images = drawn(tmp_path / "all")
    for folder in ("batches", "few"):
        assert all(np.abs(a - b).max() <= 1 for a, b in zip(images, drawn(tmp_path / folder)))
    assert all(np.abs(a - b).max() > 20 for a, b in zip(images, images[1:] + drawn(tmp_path / "other")))
    assert len(drawn(tmp_path / "batches")) == 5


def test_seeded_noise_is_standard_normal_and_goes_on_with_every_call():
    randn_like = seeded_noise([(0, i) for i in range(100)])
    a, b = randn_like(torch.empty(100, 1, 20, 20)), randn_like(torch.empty(100, 1, 20, 20))
    for x in (a, b):
        assert abs(x.mean()) < 5 / 200 and abs(x.std() - 1) < 5 / 283
    assert abs((a * b).mean()) < 5 / 200 and abs((a[1:] * a[:-1]).mean()) < 5 / 199
    assert torch.equal(seeded_noise([(0, 7)])(a[:1]), a[7:8])


def test_classes_are_drawn_in_turn_or_one_by_name_or_number(run, tmp_path):
    run(sample, "run/ckpt.pt --n 4 --steps 3 --out turn")
    for c in "012":
        run(sample, f"run/ckpt.pt --n 4 --steps 3 --out class{c} --class {c}")
    images = drawn(tmp_path / "turn")
    for i in range(4):
        assert np.array_equal(images[i], drawn(tmp_path / f"class{i % 3}")[i])
    assert not np.array_equal(images[0], drawn(tmp_path / "class1")[0])


def test_guidance_changes_the_picture_and_is_by_default_the_method_s_own(run, tmp_path):
    for w in ("1.0", "1.5", "2.0"):
        run(sample, f"run/ckpt.pt --n 2 --steps 3 --out w{w} --class 1 --guidance {w}")
    run(sample, "run/ckpt.pt --n 2 --steps 3 --out plain --class 1")
    assert np.array_equal(drawn(tmp_path / "w1.5"), drawn(tmp_path / "plain"))
    assert not np.array_equal(drawn(tmp_path / "w1.0"), drawn(tmp_path / "plain")) and not np.array_equal(drawn(tmp_path / "w2.0"), drawn(tmp_path / "plain"))


def test_clip_and_variance_are_those_of_training_unless_given(do, tmp_path):
    assert do(train, "--method ddpm --steps 4 --lr 0.01 --warmup 0 --out ddpm")[0] == 0
    for name, flags in (("plain", ""), ("same", "--clip --variance large"), ("free", "--no-clip"), ("small", "--variance small"), ("bf16", "--precision bf16")):
        assert do(sample, f"ddpm/ckpt.pt --n 2 --steps 5 --out {name} {flags}")[0] == 0
    plain, same, free, small, bf16 = (np.array(drawn(tmp_path / name)).astype(int) for name in ("plain", "same", "free", "small", "bf16"))
    assert (plain == same).all() and (plain != free).any() and (plain != small).any()
    assert 0 < abs(plain - bf16).max() and abs(plain - bf16).mean() < 2                                       # of 255
    for flags in ("--no-clip --sampler heun", "--variance small --sampler euler"):
        code, _, err = do(sample, f"ddpm/ckpt.pt --n 2 --steps 5 --out no {flags}")
        assert code == 2 and "does not suit --sampler" in err and not (tmp_path / "no").exists()


def test_steps_and_eta_reach_the_method_s_own_sampler(run, tmp_path):
    for name, flags in (("a", "--steps 3"), ("b", "--steps 2,2"), ("c", "--steps 3 --eta 0"), ("d", "--steps 3 --raw")):
        assert run(sample, f"run/ckpt.pt --n 1 --out {name} {flags}")[0] == 0
    first = drawn(tmp_path / "a")
    assert all(not np.array_equal(first, drawn(tmp_path / name)) for name in "bcd")


def test_edm_s_samplers_serve_any_method_and_take_its_options(run, tmp_path):
    for name, flags in (("own", ""), ("heun", "--sampler heun"), ("euler", "--sampler euler"), ("churn", "--sampler churn"), ("steps", "--sampler heun --steps 4"),
                        ("rho", "--sampler heun --rho 3"), ("again", "--sampler heun --n 2 --class 1")):
        assert run(sample, f"run/ckpt.pt --n 1 --steps 3 --class 1 --out {name} {flags}")[0] == 0
    images = {path.name: drawn(path)[0] for path in tmp_path.iterdir() if path.is_dir() and path.name != "run"}
    assert np.abs(images.pop("again") - images["heun"]).max() <= 1
    assert len({image.tobytes() for image in images.values()}) == 6


@pytest.mark.parametrize("line, word", [
    ("nothing.pt", "nothing.pt"), ("run/ckpt.pt --n 0", "--n"), ("run/ckpt.pt --batch 0", "--batch"), ("run/ckpt.pt --steps 31", "31"),
    ("run/ckpt.pt --steps many", "many"), ("run/ckpt.pt --class cat", "cat"), ("run/ckpt.pt --class 3", "3"), ("run/ckpt.pt --width 3", "--width"),
    ("run/ckpt.pt --out run", "--out"), ("--n 4", "path"), ("run/ckpt.pt --eta lots", "lots"), ("run/ckpt.pt --sampler dpm", "heun"),
    ("run/ckpt.pt --S_churn 9", "--sampler heun"), ("run/ckpt.pt --sampler heun --eta 0", "--sampler own"), ("run/ckpt.pt --sampler heun --steps 1", "steps"),
    ("run/ckpt.pt --sampler heun --sigma_min 3 --sigma_max 2", "sigma_min"), ("run/ckpt.pt --sampler churn --S_churn -1", "S_churn"),
    ("run/ckpt.pt --sampler heun --alpha 0", "alpha"), ("run/ckpt.pt --sampler euler --schedule cosine", "vp"), ("run/ckpt.pt --device quantum", "quantum")])
def test_a_mistake_is_one_error_line_and_writes_nothing(run, tmp_path, line, word):
    before = sorted(tmp_path.rglob("*"))
    code, _, err = run(sample, line)
    assert code == 2 and len(err.strip().splitlines()) == 1 and err.startswith("error: ") and word in err
    assert sorted(tmp_path.rglob("*")) == before


def test_guidance_and_classes_need_a_conditional_model(do):
    do(train, "--method ddpm --steps 1 --out plain")
    for flags in ("--guidance 2", "--class 1"):
        code, _, err = do(sample, f"plain/ckpt.pt {flags}")
        assert code == 2 and "--conditional" in err


# Patch Diffusion's canvas

def test_windows_and_canvases_have_their_size_and_only_the_canvas_comes_with_a_note(run_on_crops, tmp_path):
    for name, flags, size, note in (("whole", "", (16, 16), False), ("window", "--window 2 4 8 12", (12, 8), False), ("extend", "--canvas 16 24 --extend", (24, 16), True),
                                    ("zoom", "--canvas 24 --zoom", (24, 24), True), ("plain", "--guidance 1", (16, 16), False)):
        code, out, err = run_on_crops(sample, f"run/ckpt.pt --n 2 --steps 2 --out {name} {flags}")
        assert code == 0 and ("not promised" in out) == note, err
        assert [Image.open(p).size for p in (tmp_path / name).iterdir()] == [size] * 2
    assert not np.array_equal(drawn(tmp_path / "whole")[0], drawn(tmp_path / "plain")[0])  # guidance is 1.3 by default


@pytest.mark.parametrize("flags, word", [
    ("--window 2 4 8", "y x h w"), ("--window 10 0 8 8", "16x16"), ("--window 0 0 8 8 --zoom", "--zoom"), ("--canvas 32 32", "--extend"),
    ("--canvas 32 --extend --zoom", "--zoom"), ("--extend", "--canvas"), ("--canvas 17 --zoom", "16 or 18"), ("--out some.npy", ".png")])
def test_a_place_that_cannot_be_is_one_error_line(run_on_crops, tmp_path, flags, word):
    code, out, err = run_on_crops(sample, f"run/ckpt.pt --n 1 --steps 2 {flags}")
    assert code == 2 and len(err.strip().splitlines()) == 1 and word in err and not list(tmp_path.rglob("seed0*"))


def test_other_methods_know_no_windows(run):
    for flag in ("--window 0 0 8 8", "--canvas 32 --zoom"):
        code, _, err = run(sample, f"run/ckpt.pt {flag}")
        assert code == 2 and "belongs to patch_diffusion" in err


def test_latents_are_trained_on_halves_at_least_and_come_out_as_numbers(do, tmp_path):
    np.save(tmp_path / "latents.npy", 3 * np.random.default_rng(0).standard_normal((50, 5, 8, 8)).astype(np.float32))
    assert do(train, "--method patch_diffusion --data latents.npy --steps 6 --every 6 --out run --batch 8")[0] == 0
    checkpoint = torch.load(tmp_path / "run/ckpt.pt", weights_only=True)
    assert set(checkpoint["sizes"]) == {8, 4} and checkpoint["config"]["quarter"] is False
    assert do(sample, "run/ckpt.pt --n 3 --steps 2")[0] == 0
    drawn = np.load(tmp_path / "run/samples/seed0.npy")
    assert drawn.shape == (3, 5, 8, 8) and drawn.dtype == np.float32 and np.isfinite(drawn).all()
    assert do(sample, "run/ckpt.pt --n 1 --out x.png")[0] == 2


def test_latents_are_not_clipped_and_no_bound_of_8_bit_pixels_is_trained_on(do, tmp_path):
    np.save(tmp_path / "latents.npy", 5 + np.random.default_rng(0).standard_normal((50, 4, 8, 8)).astype(np.float32))
    code, out, _ = do(train, "--method ddpm --data latents.npy --steps 2 --every 2 --out run --batch 8 --grid 2")
    assert code == 0 and "floats, so latents" in out and "in [-1, 1]" not in out
    assert do(sample, "run/ckpt.pt --n 3 --steps 2")[0] == 0 and abs(np.load(tmp_path / "run/samples/seed0.npy")).max() > 1.5
    for flags, word in (("iddpm", "--objective simple"), ("pdm --patch 2 --learn_variance", "--no-learn_variance")):
        code, _, err = do(train, f"--method {flags} --data latents.npy --steps 2 --out no")
        assert code == 2 and word in err and not (tmp_path / "no").exists()


def test_seeds_name_the_images_and_each_is_the_first_of_its_seed(run, tmp_path):
    run(sample, "run/ckpt.pt --seeds 3-4,10 --steps 3 --class 1 --out picked")
    assert sorted(p.name for p in (tmp_path / "picked").iterdir()) == ["000003.png", "000004.png", "000010.png"]
    run(sample, "run/ckpt.pt --n 1 --seed 10 --steps 3 --class 1 --out alone")
    assert np.abs(drawn(tmp_path / "picked")[2] - drawn(tmp_path / "alone")[0]).max() <= 1


def test_a_row_for_each_class_or_weight_shares_its_noise_and_is_what_it_is_alone(run, tmp_path):
    code, out, err = run(sample, "run/ckpt.pt --class all --n 2 --steps 3 --out rows")
    assert code == 0 and sorted(p.name for p in (tmp_path / "rows").iterdir()) == ["0", "1", "2"] and out.count("network evaluations") == 3, err
    run(sample, "run/ckpt.pt --class 2 --n 2 --steps 3 --out alone")
    assert all(np.abs(a - b).max() <= 1 for a, b in zip(drawn(tmp_path / "rows/2"), drawn(tmp_path / "alone")))
    assert any(np.abs(a - b).max() > 20 for a, b in zip(drawn(tmp_path / "rows/0"), drawn(tmp_path / "alone")))
    assert run(sample, "run/ckpt.pt --guidance 0 1 3 --class 1 --n 2 --steps 3 --out w")[0] == 0
    run(sample, "run/ckpt.pt --guidance 3 --class 1 --n 2 --steps 3 --out three")
    a, b = drawn(tmp_path / "w/w_3"), drawn(tmp_path / "three")
    assert all(np.abs(x - y).max() <= 1 for x, y in zip(a, b)) and any(np.abs(x - y).max() > 5 for x, y in zip(a, drawn(tmp_path / "w/w_1")))
    run(sample, "run/ckpt.pt --class 0 2 --n 4 --steps 3 --out grid.png")
    assert Image.open(tmp_path / "grid.png").size[1] == 2 * (16 * 8 + 2) + 2                                  # two rows of four, with room for labels
    assert 4 * (16 * 8 + 2) + 2 < Image.open(tmp_path / "grid.png").size[0] < 4 * (16 * 8 + 2) + 60


def test_checkpoints_are_compared_from_one_noise_each_under_options_that_all_understand(run, do, tmp_path):
    assert do(train, "--method ddpm --steps 2 --out plain")[0] == 0
    code, out, err = run(sample, "run/ckpt.pt --compare plain/ckpt.pt run/ckpt.pt --n 3 --steps 5 --out both")
    names = ["1_run", "2_plain", "3_run"]
    assert code == 0 and sorted(p.name for p in (tmp_path / "both").iterdir()) == names, err
    first, second, third = (drawn(tmp_path / "both" / name) for name in names)
    assert all((a == b).all() for a, b in zip(first, third)) and any((a != b).any() for a, b in zip(first, second))
    do(train, "--method edm --steps 2 --out edm")
    code, _, err = run(sample, "run/ckpt.pt --compare edm/ckpt.pt --steps 5 --eta 0.5")
    assert code == 2 and "--eta" in err and "EDM" in err
    code, _, err = run(sample, "run/ckpt.pt --compare plain/ckpt.pt --steps ddim10")
    assert code == 2 and "--steps ddim10" in err


def test_the_chain_is_shown_as_an_animation_and_as_a_strip_that_end_with_the_sample(run, tmp_path):
    assert run(sample, "run/ckpt.pt --gif --n 2 --steps 30 --class 0 --out chain.gif")[0] == 0
    animation = Image.open(tmp_path / "chain.gif")
    assert animation.is_animated and 10 < animation.n_frames <= 80 and animation.size == (2 * (16 * 8 + 2) + 2,) * 2
    assert run(sample, "run/ckpt.pt --strip --steps 30 --class 0 --out strip.png")[0] == 0
    run(sample, "run/ckpt.pt --n 1 --steps 30 --class 0 --out one")
    strip, zoom = np.asarray(Image.open(tmp_path / "strip.png")).astype(int), 4
    assert strip.shape[0] == 2 * (16 * zoom + 2) + 2
    last = strip[2:2 + 16 * zoom:zoom, -(16 * zoom + 2):-2:zoom]
    assert np.abs(last - drawn(tmp_path / "one")[0]).max() <= 1
    long = sample.record(lambda x, y, randn_like: ((torch.full((1, 1, 1, 1), float(k)),) * 2 for k in range(1000)), (1, 1, 1), [(0, 0)], None, "cpu")
    values = [x.item() for x, _ in long]
    assert values[-1] == 999 and 30 <= len(values) <= 61
    assert len({b - a for a, b in zip(values, values[1:-1])}) == 1                              # evenly spaced


@pytest.mark.parametrize("flags, words", [
    ("--seeds 5-", "--seeds"), ("--seeds 3 --n 2", "--seeds"), ("--seeds 0-99999999999", "seeds"), ("--class 0 1 --guidance 1 2", "do not go together"),
    ("--gif --strip", "do not go together"), ("--gif --out a.png", ".gif"), ("--class all --compare run/ckpt.pt", "do not go together"), ("--compare nothing.pt", "nothing.pt"),
    ("--class 0 nine", "no class nine"), ("--n 0", "--n")])
def test_a_mistake_in_rows_seeds_and_animations_is_one_line(run, tmp_path, flags, words):
    code, _, err = run(sample, f"run/ckpt.pt --steps 2 {flags}")
    assert code == 2 and err.startswith("error: ") and len(err.strip().splitlines()) == 1 and words in err and not list(tmp_path.rglob("seed*"))
