import functools
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import sample
from plumbing import checkpoint, drawing
from plumbing.device import seeded_noise
from plumbing.flags import UserError
from unet import Guided


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with tiny runs: run (PDM with classes), ddpm, edm, crops (Patch Diffusion)."""
    folder = tmp_path_factory.mktemp("runs")
    tiny.write_run(folder / "run", "pdm", classes=3, patch=(2,))
    tiny.write_run(folder / "ddpm", "ddpm")
    tiny.write_run(folder / "edm", "edm")
    tiny.write_run(folder / "crops", "patch_diffusion", classes=3)
    tiny.write_run(folder / "latents", "edm", shape=(5, 8, 8), latents=True)
    return folder


@pytest.fixture
def draw(runs, tmp_path, monkeypatch, capsys):
    """draw("run --n 2 --out a") -> (exit code, stdout, stderr), beside copies of the runs."""
    return functools.partial(tiny.beside(runs, tmp_path, monkeypatch, capsys), sample)


@pytest.fixture
def images(draw):
    """images("run --n 2") -> the images that it draws, (n, H, W, 3) of integers."""

    def images(line):
        shutil.rmtree("drawn", ignore_errors=True)
        code, _, err = draw(f"{line} --out drawn")
        assert code == 0, err
        return read("drawn")

    return images


def read(folder):
    files = sorted(Path(folder).iterdir())
    return np.stack([np.asarray(Image.open(file)).astype(int) for file in files])


def same(a, b):
    """Equal, but for one step of 255, since sums of floats depend on the batch's size."""
    return np.abs(a - b).max() <= 1


# Noise


@pytest.mark.parametrize("flags", ["--batch 2", "--n 2", "--n 3 --batch 1"])
def test_image_i_depends_on_the_seed_and_i_alone(images, flags):
    five = images("run --n 5 --steps 3 --class 0")
    others = images(f"run --n 5 --steps 3 --class 0 {flags}")
    assert same(five[: len(others)], others)


def test_images_of_one_seed_differ_and_so_do_seeds(images):
    five = images("run --n 5 --steps 3 --class 0")
    other = images("run --n 5 --steps 3 --class 0 --seed 1")
    for a, b in zip(five, [*five[1:], other[0]]):
        assert np.abs(a - b).max() > 20


def test_seeds_name_the_images_and_each_is_the_first_of_its_seed(draw):
    draw("run --seeds 3-4,10 --steps 3 --class 1 --out picked")
    names = sorted(path.name for path in Path("picked").iterdir())
    assert names == ["000003.png", "000004.png", "000010.png"]
    draw("run --n 1 --seed 10 --steps 3 --class 1 --out alone")
    assert same(read("picked")[2], read("alone")[0])


def test_seeded_noise_is_standard_normal_and_goes_on_with_every_call():
    randn_like = seeded_noise([(0, i) for i in range(100)])
    a = randn_like(torch.empty(100, 1, 20, 20))
    b = randn_like(torch.empty(100, 1, 20, 20))
    for x in (a, b):
        assert abs(x.mean()) < 5 / 200
        assert abs(x.std() - 1) < 5 / 283
    assert abs((a * b).mean()) < 5 / 200
    assert abs((a[1:] * a[:-1]).mean()) < 5 / 199
    assert torch.equal(seeded_noise([(0, 7)])(a[:1]), a[7:8])


# Classes and guidance


def test_classes_are_drawn_in_turn_or_one_by_name_or_number(images):
    in_turn = images("run --n 4 --steps 3")
    for i in range(4):
        assert same(in_turn[i], images(f"run --n 4 --steps 3 --class {i % 3}")[i])
    assert not same(in_turn[0], images("run --n 1 --steps 3 --class 1")[0])


@pytest.mark.parametrize("run, weight", [("run", 1.5), ("crops", 1.3)])
def test_guidance_is_by_default_the_method_s_own_and_printed(draw, images, run, weight):
    line = f"{run} --n 2 --steps 3 --class 1"
    by_default = images(line)
    assert same(by_default, images(f"{line} --guidance {weight}"))
    assert not same(by_default, images(f"{line} --guidance 1"))
    assert not same(by_default, images(f"{line} --guidance 3"))
    assert f"guidance {weight}\n" in draw(line)[1]


def test_an_unconditional_model_has_no_guidance_to_speak_of(draw):
    assert "guidance" not in draw("ddpm --n 1 --steps 3")[1]


def test_guidance_is_linear_in_the_network_s_output(draw):
    method, _ = checkpoint.load("run")
    x = torch.randn(2, 3, 8, 8)
    t = torch.tensor([3.0, 20.0])
    y = torch.tensor([0, 2])
    with_class, without = method.net(x, t, y), method.net(x, t, None)
    with drawing.guided(method, 2.5):
        expected = without + 2.5 * (with_class - without)
        torch.testing.assert_close(method.net(x, t, y), expected)


def test_the_network_is_itself_again_after_sampling_and_after_an_error(draw):
    method, _ = checkpoint.load("run")
    net = method.net
    with drawing.counted(method, 1), drawing.guided(method, 3.0):
        assert isinstance(method.net, Guided)
    assert method.net is net
    with pytest.raises(KeyError), drawing.changed(method, clip=False, net=None):
        raise KeyError
    assert method.net is net
    assert method.clip


@pytest.mark.parametrize("flags", ["--guidance 2", "--class 1"])
def test_guidance_and_classes_need_a_conditional_model(draw, flags):
    code, _, err = draw(f"ddpm {flags}")
    assert code == 2
    assert "--conditional" in err


# Samplers


def test_steps_and_eta_and_raw_weights_reach_the_method_s_own_sampler(images):
    flags = ("--steps 3", "--steps 2,2", "--steps 3 --eta 0", "--steps 3 --raw")
    drawn = [images(f"run --n 1 --class 1 {one}") for one in flags]
    assert len({image.tobytes() for image in drawn}) == len(flags)


def test_edm_s_samplers_serve_any_method_and_take_its_options(images):
    samplers = (
        "--sampler own",
        "--sampler heun",
        "--sampler euler",
        "--sampler churn",
        "--sampler heun --steps 4",
        "--sampler heun --rho 3",
    )
    drawn = [images(f"run --n 1 --steps 3 --class 1 {one}") for one in samplers]
    assert len({image.tobytes() for image in drawn}) == len(samplers)
    again = images("run --n 2 --steps 3 --class 1 --sampler heun")
    assert same(again[0], drawn[1][0])


@pytest.mark.parametrize(
    "line, evaluations",
    [
        ("ddpm --steps 5", 5),
        ("run --steps 5 --class 0", 10),  # guidance asks the network twice
        ("run --steps 5 --class 0 --guidance 1", 5),
        ("ddpm --sampler heun --steps 5", 9),
        ("ddpm --sampler euler --steps 5", 5),
    ],
)
def test_network_evaluations_are_counted(draw, line, evaluations):
    assert f"{evaluations} network evaluations" in draw(f"{line} --n 3 --batch 2")[1]


def test_clip_and_variance_are_those_of_training_unless_given(images):
    plain = images("ddpm --n 2 --steps 5")
    assert (images("ddpm --n 2 --steps 5 --clip --variance large") == plain).all()
    assert (images("ddpm --n 2 --steps 5 --no-clip") != plain).any()
    assert (images("ddpm --n 2 --steps 5 --variance small") != plain).any()
    plain = images("run --n 2 --steps 5 --guidance 9")
    assert (images("run --n 2 --steps 5 --guidance 9 --dynamic_clip") != plain).any()


def test_bf16_is_near_fp32_and_not_the_same(images):
    plain = images("ddpm --n 2 --steps 5")
    difference = np.abs(images("ddpm --n 2 --steps 5 --precision bf16") - plain)
    assert difference.max() > 0
    assert difference.mean() < 2  # of 255


@pytest.mark.parametrize("flags", ["--no-clip", "--variance small", "--dynamic_clip"])
def test_clip_and_variance_belong_to_the_method_s_own_sampler(draw, flags):
    code, _, err = draw(f"ddpm --n 1 --steps 3 --sampler heun {flags} --out no")
    assert code == 2
    assert "does not suit --sampler" in err


# Another canvas


@pytest.mark.parametrize("run", ["run", "ddpm", "edm", "crops"])
@pytest.mark.parametrize("size, shape", [("8 12", (8, 12)), ("12", (12, 12))])
def test_any_method_draws_on_another_canvas_and_quality_is_not_promised(draw, run, size, shape):
    code, out, err = draw(f"{run} --n 2 --steps 3 --size {size} --out drawn")
    assert code == 0, err
    assert read("drawn").shape == (2, *shape, 3)
    assert "note: trained on 8x8" in out


def test_the_training_images_size_needs_no_note(draw):
    assert "note" not in draw("run --n 1 --steps 3 --size 8")[1]


@pytest.mark.parametrize(
    "line, words",
    [
        ("run --size 9", "8 or 10"),
        ("run --size 8 8 8", "height and width"),
        ("run --size 0", "size must be"),
        ("run --size 1000000", "size must be at most"),
        ("run --size 8000 --n 1000000", "memory"),
        ("crops --window 0 0 8 8", "--size h w --corner y x --image H W"),
        ("crops --canvas 16 --extend", "--size"),
        ("crops --zoom", "--size"),
    ],
)
def test_a_canvas_that_cannot_be_is_one_line_that_says_what_can(
    runs, monkeypatch, capsys, line, words
):
    monkeypatch.chdir(runs)
    tiny.Command(monkeypatch, capsys).refuses(sample, line, words)


# Rows


def test_a_row_for_each_class_shares_its_noise_and_is_what_it_is_alone(draw):
    code, out, err = draw("run --class all --n 2 --steps 3 --out rows")
    assert code == 0, err
    assert sorted(path.name for path in Path("rows").iterdir()) == ["0", "1", "2"]
    assert out.count("network evaluations") == 3
    draw("run --class 2 --n 2 --steps 3 --out alone")
    assert same(read("rows/2"), read("alone"))
    assert not same(read("rows/0"), read("alone"))


def test_a_row_for_each_weight_is_what_it_is_alone(draw):
    draw("run --guidance 0 1 3 --class 1 --n 2 --steps 3 --out rows")
    draw("run --guidance 3 --class 1 --n 2 --steps 3 --out alone")
    assert same(read("rows/w_3"), read("alone"))
    assert not same(read("rows/w_1"), read("alone"))


def test_rows_are_rows_of_the_picture_with_room_for_their_names(draw):
    draw("run --class 0 2 --n 4 --steps 3 --out grid.png")
    width, height = Image.open("grid.png").size
    assert height == 2 * (8 * 16 + 2) + 2
    assert 4 * (8 * 16 + 2) + 2 < width < 4 * (8 * 16 + 2) + 60


def test_checkpoints_are_compared_from_the_same_noise(draw):
    code, _, err = draw("run --compare ddpm run/ckpt.pt --n 3 --steps 5 --out rows")
    assert code == 0, err
    first, second, third = (read(f"rows/{name}") for name in ("1_run", "2_ddpm", "3_run"))
    assert (first == third).all()
    assert (first != second).any()


def test_guidance_is_off_in_a_comparison_unless_asked_for(draw):
    draw("run --compare crops --n 2 --steps 3 --out rows")
    draw("run --n 2 --steps 3 --guidance 1 --out alone")
    assert same(read("rows/run"), read("alone"))
    assert draw("run --compare crops --n 2 --steps 3")[1].count("guidance 1\n") == 2


@pytest.mark.parametrize(
    "line, words",
    [
        ("run --compare edm --steps 5 --eta 0.5", "--eta 0.5 does not suit the sampler of EDM"),
        ("run --compare ddpm --steps ddim10", "got ddim10"),
        ("run --compare latents --steps 3", "other shapes"),
        ("run --compare nothing.pt", "nothing.pt"),
    ],
)
def test_what_is_compared_must_go_together(runs, monkeypatch, capsys, line, words):
    monkeypatch.chdir(runs)
    tiny.Command(monkeypatch, capsys).refuses(sample, line, words)


# The chain


def test_a_strip_ends_with_the_sample(draw, images):
    assert draw("run --strip --steps 30 --class 0 --out strip.png")[0] == 0
    strip = np.asarray(Image.open("strip.png")).astype(int)
    zoom = 8
    assert strip.shape[0] == 2 * (8 * zoom + 2) + 2
    x_0_hat = strip[8 * zoom + 4 :]
    last = x_0_hat[: 8 * zoom : zoom, -(8 * zoom + 2) : -2 : zoom]
    assert same(last, images("run --n 1 --steps 30 --class 0")[0])


def test_an_animation_shows_the_chain(draw):
    assert draw("run --gif --n 2 --steps 15 --class 0 --out chain.gif")[0] == 0
    animation = Image.open("chain.gif")
    assert animation.is_animated
    assert 10 < animation.n_frames <= 80


def test_a_long_chain_is_recorded_evenly_and_to_its_end():
    def count_to_1000(x, y, randn_like):
        for k in range(1000):
            yield torch.full((1, 1, 1, 1), float(k)), torch.zeros(1, 1, 1, 1)

    frames = drawing.record(count_to_1000, (1, 1, 1), [(0, 0)])
    steps = list(frames)
    assert [x.item() for x, _ in frames.values()] == steps
    assert steps[-1] == 999
    assert 30 <= len(steps) <= 61
    assert len({b - a for a, b in zip(steps, steps[1:-1])}) == 1


# Where it is written


@pytest.mark.parametrize("name", ["..", "a/b", "", "../../x"])
def test_the_name_of_a_class_is_no_path(name):
    folder = drawing.as_file_name(name)
    assert Path("there", folder).resolve().parent == Path("there").resolve()


@pytest.mark.parametrize(
    "line, name",
    [
        ("ddpm --n 2 --steps 3 --eta 0", "step000003-seed0-n2-steps3-eta0.png"),
        ("ddpm --n 2 --steps 3 --seed 7", "step000003-seed7-n2-steps3.png"),
        ("ddpm --seeds 4,6-7 --steps 3", "step000003-seeds4,6-7-steps3.png"),
        ("ddpm --n 1 --steps 3 --no-clip", "step000003-seed0-n1-no-clip-steps3.png"),
        ("ddpm --steps 3 --strip", "step000003-seed0-steps3-strip.png"),
        ("latents --n 2 --steps 3", "step000003-seed0-n2-steps3.npy"),
        ("ddpm --n 2 --steps 3 --batch 1 --device cpu", "step000003-seed0-n2-steps3.png"),
    ],
)
def test_a_default_name_tells_the_step_and_the_flags_that_made_the_picture(draw, line, name):
    code, out, err = draw(line)
    assert code == 0, err
    assert Path(line.split()[0], "samples", name).is_file()


def test_a_long_name_is_cut_and_still_tells_pictures_apart(draw):
    seeds = ",".join(map(str, range(10**8, 10**8 + 20)))
    draw(f"ddpm --seeds {seeds} --steps 1")
    draw(f"ddpm --seeds {seeds},7 --steps 1")
    names = [path.name for path in Path("ddpm/samples").iterdir()]
    assert len(names) == 2
    assert max(map(len, names)) < 100


def test_a_picture_that_the_user_names_is_not_overwritten_in_silence(draw):
    assert "overwritten" not in draw("ddpm --n 1 --steps 2 --out a.png")[1]
    assert "note: a.png is there already" in draw("ddpm --n 1 --steps 2 --out a.png")[1]


def test_a_run_is_named_by_its_folder_or_by_a_checkpoint_in_it(draw, images):
    shutil.copy("ddpm/ckpt.pt", "ddpm/ckpt-000001.pt")
    by_folder = images("ddpm --n 1 --steps 3")
    assert (images("ddpm/ckpt.pt --n 1 --steps 3") == by_folder).all()
    assert (images("ddpm/ckpt-000001.pt --n 1 --steps 3") == by_folder).all()


def test_a_checkpoint_is_read_once(draw, monkeypatch):
    paths = []
    read = checkpoint.read

    def remembering(path):
        paths.append(path)
        return read(path)

    monkeypatch.setattr(checkpoint, "read", remembering)
    draw("run --compare ddpm --n 1 --steps 3 --out rows")
    assert paths == ["run", "ddpm"]


def test_latents_come_out_as_numbers_that_are_not_clipped(draw):
    assert draw("latents --n 3 --steps 2 --out drawn.npy")[0] == 0
    drawn = np.load("drawn.npy")
    assert drawn.shape == (3, 5, 8, 8)
    assert drawn.dtype == np.float32
    assert np.isfinite(drawn).all()
    assert np.abs(drawn).max() > 1
    tiny.assert_one_line(draw("latents --n 1 --out x.png"), ".npy")


# A GPU's memory


SHORT = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("error", SHORT)
def test_batches_are_halved_where_memory_is_short(error):
    sizes = []

    def at_most_three(indices):
        sizes.append(len(indices))
        if len(indices) > 3:
            raise error
        return torch.tensor(indices)

    assert drawing.in_batches(at_most_three, 10, 8).tolist() == list(range(10))
    assert sizes == [8, 4, 2, 2, 2, 2, 2]


def test_a_bug_is_not_taken_for_a_lack_of_memory():
    sizes = []

    def wrong(indices):
        sizes.append(len(indices))
        raise RuntimeError("The size of tensor a (3) must match")

    with pytest.raises(RuntimeError, match="must match"):
        drawing.in_batches(wrong, 10, 8)
    assert sizes == [8]


def test_no_batch_is_halved_into_nothing():
    def never(indices):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    with pytest.raises(UserError, match="--device cpu"):
        drawing.in_batches(never, 10, 8)


# Help and mistakes


def test_help_lists_the_flags_without_a_run_and_the_sampler_s_with_one(draw):
    code, out, _ = draw("--help")
    assert code == 0
    assert "--guidance" in out and "--eta" not in out
    code, out, _ = draw("run --help")
    assert code == 0
    assert "--guidance" in out and "--eta" in out
    assert "--S_churn" in draw("run --sampler churn --help")[1]


@pytest.mark.parametrize(
    "line, words",
    [
        ("nothing.pt", "nothing.pt"),
        ("--n 4", "runs/pdm"),
        ("run --n 0", "--n"),
        ("run --n 100000000000000000000", "--n"),
        ("run --batch 0", "--batch"),
        ("run --seed -1", "--seed"),
        ("run --steps 31", "31"),
        ("run --steps many", "many"),
        ("edm --steps 100000000000000000000", "--steps"),
        ("run --class cat", "cat"),
        ("run --class 3", "3"),
        ("run --class 0 nine", "no class nine"),
        ("run --guidance nan", "--guidance"),
        ("run --width 3", "--width"),
        ("run --nn 3", "did you mean --n?"),
        ("run --out run", "--out"),
        ("run --out some.npy", ".png"),
        ("run --gif --out a.png", ".gif"),
        ("run --out run/ckpt.pt/a.png", "cannot write"),
        ("run --eta lots", "lots"),
        ("run --sampler dpm", "heun"),
        ("run --S_churn 9", "--sampler heun"),
        ("run --sampler heun --eta 0", "--sampler own"),
        ("run --sampler heun --steps 1", "steps"),
        ("run --sampler heun --sigma_min 3 --sigma_max 2", "sigma_min"),
        ("run --sampler heun --rho 1e-3", "out of range"),
        ("edm --steps 3 --sigma_max 1e300", "out of range"),
        ("run --sampler churn --S_churn -1", "S_churn"),
        ("run --sampler heun --alpha 0", "alpha"),
        ("run --sampler euler --schedule cosine", "vp"),
        ("run --device quantum", "quantum"),
        ("run --device meta", "meta"),
        ("run --seeds 5-", "--seeds"),
        ("run --seeds 3 --n 2", "--seeds"),
        ("run --seeds 0-99999999999", "seeds"),
        ("run --class 0 1 --guidance 1 2", "do not go together"),
        ("run --gif --strip", "do not go together"),
        ("run --class all --compare ddpm", "do not go together"),
    ],
)
def test_a_mistake_is_one_error_line_and_writes_nothing(runs, monkeypatch, capsys, line, words):
    monkeypatch.chdir(runs)
    tiny.Command(monkeypatch, capsys).refuses(sample, line, words)


@pytest.mark.parametrize("options", [
    "--sampler heun --solver euler",
    "--sampler heun --schedule vp --scaling vp",
    "--sampler euler --discretization ve",
    "--sampler heun --alpha 0.5",
])
def test_every_choice_of_table_1_reaches_the_general_solver(draw, options):
    code, out, err = draw(f"run {options} --n 2 --steps 3")
    assert code == 0, err
    assert "network evaluations" in out
