import contextlib
import copy
import multiprocessing
import os
import shutil

import pytest
import torch

from plumbing import checkpoint
from plumbing.checkpoint import METHODS
from plumbing.checks import check_ranges, check_size
from plumbing.device import to_device
from plumbing.flags import UserError

CPU = torch.device("cpu")
CONFIG = dict(width=8, mults=(1,), attention=(), T=4, schedule="cosine")
CONFIG |= dict(data="digits", overfit=0)
ROW = dict(images=2, seconds=1.0)  # a row of the log


def describe(method="iddpm", **more):
    return dict(
        method=method,
        config=CONFIG | more,
        shape=[3, 8, 8],
        classes=["a", "b"],
        latents=False,
        fingerprint=7,
    )


def trained(about):
    """A method and its optimizer after one step."""
    torch.manual_seed(0)
    method = to_device(checkpoint.build(about), CPU)
    optimizer = torch.optim.Adam(method.parameters(), fused=True)
    method.loss(torch.rand(2, 3, 8, 8), torch.tensor([0, -1])).backward()
    optimizer.step()
    return method, optimizer


def content(step=1, about=None):
    """A checkpoint, with Adam's state of the first weights alone, for it has many."""
    about = about or describe()
    method, optimizer = trained(about)
    moments = optimizer.state_dict()["state"]
    progress = dict(step=step, images=2, seconds=1.0, sizes={}, losses=[0.5])
    state = dict(
        model=method.state_dict(),
        ema=method.state_dict(),
        optimizer={i: moments[i] for i in range(8)},
        log=[ROW],
    )
    return about | progress | state


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    checkpoint.write(folder, content())
    return folder


@pytest.fixture(scope="module")
def as_read(written):
    return checkpoint.read(written)


@pytest.fixture
def run(tmp_path, written):
    """A folder with that checkpoint."""
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def saved(as_read):
    """What is in it, to change and write again."""
    return copy.deepcopy(as_read)


def resave(run, changed):
    """Write a changed checkpoint, with the checksum that belongs to it."""
    with contextlib.suppress(AttributeError, KeyError, RuntimeError, TypeError):
        changed["checksum"] = checkpoint.checksum(changed)
    torch.save(changed, run / "ckpt.pt")


def refused(path):
    """The one line with which a checkpoint is refused."""
    with pytest.raises(UserError) as error:
        checkpoint.read(path)
    line = str(error.value)
    assert "\n" not in line
    assert str(path) in line
    return line


# Building

@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_built_from_a_plain_dict_and_flags_it_lacks_have_defaults(method):
    about = dict(method=method, config=dict(width=8), shape=[1, 16, 16], classes=[])
    built = checkpoint.build(about)
    assert isinstance(built, METHODS[method])
    assert built.net is not None


def test_on_meta_the_network_takes_no_memory():
    method = checkpoint.build(describe(width=100_000), "meta")
    assert all(weight.is_meta for weight in method.parameters())
    with pytest.raises(UserError, match="parameters"):
        checkpoint.check_room(method)


@pytest.mark.parametrize(
    "sides, multiple, levels, words",
    [
        ((16, 16), 5, 2, "not divisible by 10 .*choose --size 10 or 20"),
        ((28, 30), 1, 3, r"28x30 .*by 4 \(2\^2 for 3 levels\).*--size 28 or 28 32"),
        ((3, 3), 4, 1, "--size 4,"),
    ],
)
def test_an_illegal_size_names_the_nearest_legal_ones(sides, multiple, levels, words):
    with pytest.raises(UserError, match=words):
        check_size(sides, multiple, levels)


def test_a_legal_size_passes():
    check_size((24, 16), 4, 2)


@pytest.mark.parametrize("value", [-1, 2, float("nan")])
def test_a_value_out_of_range_names_its_flag(value):
    with pytest.raises(UserError, match="--ema must lie between 0 and 1"):
        check_ranges(dict(ema=value))


# Writing

def test_what_is_written_is_read_again_from_the_file_or_its_folder(run):
    method, saved = checkpoint.load(run, device="cpu")
    same, _ = checkpoint.load(run / "ckpt.pt", ema=False, device="cpu")
    expected, _ = trained(describe())
    for name, weight in expected.state_dict().items():
        assert torch.equal(method.state_dict()[name], weight)
        assert torch.equal(same.state_dict()[name], weight)
    assert not method.training
    assert not any(weight.requires_grad for weight in method.parameters())
    assert saved["step"] == 1


def test_ema_false_loads_the_raw_weights(tmp_path):
    different = content()
    different["ema"] = {name: weight + 1 for name, weight in different["ema"].items()}
    checkpoint.write(tmp_path, different)
    raw = checkpoint.load(tmp_path, ema=False, device="cpu")[0].state_dict()
    averaged = checkpoint.load(tmp_path, device="cpu")[0].state_dict()
    assert all(torch.equal(averaged[name], raw[name] + 1) for name in raw)


def test_the_log_is_written_from_the_rows_of_the_checkpoint(tmp_path):
    rows = [dict(step=1, share_8=1.0), dict(step=2, share_8=0.5, share_4=0.5)]
    checkpoint.write(tmp_path, content() | dict(log=rows))
    assert (tmp_path / "log.csv").read_text() == "step,share_8,share_4\n1,1.0,0\n2,0.5,0.5\n"


def test_a_damaged_log_is_written_anew(run):
    (run / "log.csv").write_bytes(b"\xff\x00 no csv")
    checkpoint.write(run, content())
    assert (run / "log.csv").read_text() == "images,seconds\n2,1.0\n"


def test_keep_deletes_only_the_names_that_it_writes(tmp_path):
    others = ["ckpt-0-best.pt", "ckpt-best.pt", "ckpt-12.pt", "my-ckpt-000001.pt"]
    for name in others:
        (tmp_path / name).touch()
    for step in (1, 2, 3, 1_000_000):
        checkpoint.write(tmp_path, content(step), keep=1)
    numbered = ["ckpt-000003.pt", "ckpt-1000000.pt"]
    expected = ["ckpt.pt", "log.csv", *numbered, *others]
    assert sorted(os.listdir(tmp_path)) == sorted(expected)
    for name, step in zip([*numbered, "ckpt.pt"], (3, 1_000_000, 1_000_000)):
        assert checkpoint.read(tmp_path / name)["step"] == step


def test_a_file_is_on_the_disk_before_it_takes_the_place_of_the_old_one(run, monkeypatch):
    calls = []
    replace = os.replace

    def replacing(temporary, path):
        calls.append("replace")
        replace(temporary, path)

    monkeypatch.setattr(os, "fsync", lambda number: calls.append("fsync"))
    monkeypatch.setattr(os, "replace", replacing)
    checkpoint.write(run, content())
    assert calls == ["fsync", "replace"] * 2  # ckpt.pt, log.csv


@pytest.mark.parametrize("error", [OSError("No space left"), RuntimeError("writing file")])
def test_a_full_disk_keeps_the_old_checkpoint_and_leaves_nothing_else(run, monkeypatch, error):
    def full(value, file):
        file.write(b"half")
        raise error

    before = (run / "ckpt.pt").read_bytes()
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="cannot write .*ckpt.pt, the one before it stays"):
        checkpoint.write(run, content())
    assert (run / "ckpt.pt").read_bytes() == before
    assert sorted(os.listdir(run)) == ["ckpt.pt", "log.csv"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows limits no file's size")
def test_a_disk_that_is_really_full_is_one_line_too(run):
    import resource

    before = (run / "ckpt.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write"):
            checkpoint.write(run, content())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (run / "ckpt.pt").read_bytes() == before
    assert sorted(os.listdir(run)) == ["ckpt.pt", "log.csv"]


def test_a_process_killed_while_it_writes_leaves_the_old_file(run, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    before = (run / "ckpt.pt").read_bytes()
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(run, content())
    assert (run / "ckpt.pt").read_bytes() == before


# Two runs in one folder

def test_a_second_run_in_the_folder_is_refused_until_the_first_ends(tmp_path):
    with checkpoint.locked(tmp_path):
        with pytest.raises(UserError, match="another process is training in"):
            with checkpoint.locked(tmp_path):
                pass
    with checkpoint.locked(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def lock_and_die(folder):
    with checkpoint.locked(folder):
        os.kill(os.getpid(), 9)


def test_the_lock_of_a_process_that_was_killed_is_taken_over(tmp_path):
    process = multiprocessing.Process(target=lock_and_die, args=(tmp_path,))
    process.start()
    process.join()
    assert os.listdir(tmp_path) == ["ckpt.lock"]
    with checkpoint.locked(tmp_path):
        pass


# Reading what is no checkpoint

def test_load_refuses_what_read_refuses(run, saved):
    torch.save(saved | dict(shape=[3, 8]), run / "ckpt.pt")
    with pytest.raises(UserError, match="no image has the shape"):
        checkpoint.load(run, device="cpu")


@pytest.mark.parametrize(
    "name, write",
    [
        ("missing.pt", None),
        ("empty.pt", b""),
        ("junk.pt", b"no checkpoint"),
        ("half.pt", "half"),
        ("list.pt", [1, 2]),
        ("other.pt", {"weights": 1}),
        ("pickled.pt", torch.nn.Linear(2, 2)),
    ],
)
def test_foreign_and_broken_files_are_refused(run, name, write):
    path = run / name
    if write == "half":
        whole = (run / "ckpt.pt").read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif isinstance(write, bytes):
        path.write_bytes(write)
    elif write is not None:
        torch.save(write, path)
    refused(path)


@pytest.mark.parametrize("version", [1, 2, 3, 5])
def test_another_layout_is_refused_with_its_number(run, saved, version):
    resave(run, saved | dict(version=version))
    assert f"has layout {version}; this version reads layout 4" in refused(run / "ckpt.pt")


@pytest.mark.parametrize("name", checkpoint.LAYOUT)
def test_each_key_must_be_there_and_of_its_type(run, saved, name):
    torch.save(saved | {name: ("x",)}, run / "ckpt.pt")
    refused(run / "ckpt.pt")
    del saved[name]
    torch.save(saved, run / "ckpt.pt")
    refused(run / "ckpt.pt")


@pytest.mark.parametrize(
    "changes",
    [
        dict(shape=[3, 8]),
        dict(shape=[3, 8, 8.0]),
        dict(shape=[3, 0, 8]),
        dict(shape=[3, 8, 10 ** 12]),
        dict(method="sde"),
        dict(classes=[1, 2]),
        dict(classes=["a"]),
        dict(step=-1),
        dict(log=["row"]),
        dict(log=[ROW | dict(step="1")]),
        dict(log=[ROW | dict(images=10**400)]),
        dict(log=[ROW | {1: 1}]),
        dict(log=[dict(step=1)]),
        dict(images=2**63),
        dict(version=torch.zeros(2)),
        dict(losses=[None]),
        dict(sizes={"8": 1}),
    ],
)
def test_values_that_training_does_not_write_are_refused(run, saved, changes):
    resave(run, saved | changes)
    refused(run / "ckpt.pt")


@pytest.mark.parametrize(
    "changes",
    [
        dict(width=50_000),
        dict(width=16),
        dict(width="8"),
        dict(width=8.5),
        dict(T=10 ** 12),
        dict(T=-1),
        dict(mults="12"),
        dict(mults=(1,) * 1000),
        dict(mults=()),
        dict(attention=(5,)),
        dict(schedule="straight"),
        dict(clip=1),
        dict(blocks=True),
        dict(data=3),
        dict(data=None),
        dict(overfit=-1),
        dict(overfit="some"),
    ],
)
def test_flags_that_cannot_be_are_refused_before_memory_is_asked_for(run, saved, changes):
    resave(run, saved | dict(config=saved["config"] | changes))
    refused(run / "ckpt.pt")


def a_number(tensor):
    return 1.0


def another_shape(tensor):
    return tensor.new_zeros(1)


def another_type(tensor):
    return tensor.double()


def sparse(tensor):
    return tensor.to_sparse()


def one_number_stretched(tensor):
    return tensor.new_zeros(()).expand(tensor.shape)


def without_numbers(tensor):
    return tensor.to("meta")


def turned(tensor):
    return tensor.clone().transpose(0, 1).contiguous().transpose(0, 1)


WRONG = [a_number, another_shape, another_type, sparse, one_number_stretched, turned]
WRONG += [without_numbers]


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("part", ["model", "ema", "exp_avg", "exp_avg_sq"])
def test_tensors_of_another_shape_type_or_layout_are_refused(run, saved, part, wrong):
    if part in ("model", "ema"):
        saved[part]["net.conv_in.weight"] = wrong(saved[part]["net.conv_in.weight"])
    else:
        i = next(i for i, state in saved["optimizer"].items() if state[part].dim() == 4)
        saved["optimizer"][i][part] = wrong(saved["optimizer"][i][part])
    resave(run, saved)
    refused(run / "ckpt.pt")


def without_a_moment(optimizer):
    del optimizer[0]["exp_avg"]


def with_another_weight(optimizer):
    optimizer[10 ** 6] = optimizer[0]


def with_a_long_step(optimizer):
    optimizer[0]["step"] = torch.ones(2)


@pytest.mark.parametrize(
    "change", [without_a_moment, with_another_weight, with_a_long_step, dict.clear]
)
def test_an_optimizer_of_other_weights_is_refused(run, saved, change):
    change(saved["optimizer"])
    resave(run, saved)
    if change is dict.clear:  # as after a step in which nothing was trained
        assert checkpoint.read(run)["optimizer"] == {}
    else:
        refused(run / "ckpt.pt")


def test_names_that_are_missing_or_too_many_are_refused(run, saved):
    for names in (["net.conv_in.weight"], []):
        weights = copy.copy(saved["ema"])
        for name in names:
            del weights[name]
        if not names:
            weights["net.more"] = torch.zeros(1)
        resave(run, saved | dict(ema=weights))
        assert "averaged weights" in refused(run / "ckpt.pt")


@pytest.mark.parametrize("part", ["model", "ema", "optimizer"])
@pytest.mark.parametrize("value", [float("nan"), 0.125])
def test_changed_tensors_are_noticed_by_their_checksum(run, saved, part, value):
    tensors = [tensor for _, tensor in checkpoint.tensors_of(saved[part])]
    tensors[0].view(-1)[0] = value
    torch.save(saved, run / "ckpt.pt")
    assert "is damaged" in refused(run / "ckpt.pt")


def test_a_flipped_bit_anywhere_among_the_weights_is_noticed(run, saved):
    whole = bytearray((run / "ckpt.pt").read_bytes())
    weight = saved["model"]["net.conv_in.weight"]
    memory = weight.permute(0, 2, 3, 1).contiguous().numpy().tobytes()
    whole[whole.index(memory) + 100] ^= 1
    (run / "ckpt.pt").write_bytes(whole)
    assert "is damaged" in refused(run / "ckpt.pt")


# Going on

def test_moments_are_laid_out_as_their_weights_whatever_the_file_has():
    method, optimizer = trained(describe())
    expected, reference = trained(describe())
    state = copy.deepcopy(optimizer.state_dict()["state"])
    for moments in state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name] = moments[name].contiguous()
    checkpoint.restore_optimizer(optimizer, state)
    for weight in method.parameters():
        moment = optimizer.state[weight]["exp_avg"]
        assert moment.stride() == weight.stride()
    optimizer.step()
    reference.step()
    for weight, other in zip(method.parameters(), expected.parameters()):
        assert torch.equal(weight, other)
