import os
import signal
import subprocess
import sys
from typing import Literal

import pytest
from conftest import HERE

from plumbing import flags
from plumbing.flags import Parser, UserError, add_flags, flags_of


def example(
    word,
    *,
    steps: int = 3,  # optimizer steps, 100% of them
    lr: float | None = None,  # learning rate
    name: str = "a",  # a name
    mults: tuple[float, ...] = (1, 2),  # widths
    attention: tuple[int, ...] = (),  # levels
    weight: Literal["x", "eps"] = "x",  # target
    sizes: Literal[
        "small",
        "large",
    ] = "small",  # of several lines
    clip: bool = True,  # clip to [-1, 1]
    class_: int = 0,  # a word of Python's
    untyped=None,
):
    return steps


def parse(*argv, hints=None):
    parser = Parser()
    add_flags(parser, "example", example)
    return parser.parse(argv, hints)


def run(main):
    """Exit code of flags.run(main)."""
    try:
        flags.run(main)
    except SystemExit as stop:
        return stop.code
    return 0


# Signatures as flags

def test_typed_keyword_arguments_are_the_flags():
    expected = "steps lr name mults attention weight sizes clip class_"
    assert list(flags_of(example)) == expected.split()
    assert flags_of(example)["steps"].default == 3


@pytest.mark.parametrize(
    "words, expected",
    [
        ("--steps 5", dict(steps=5)),
        ("--lr 1e-3", dict(lr=1e-3)),
        ("--mults 1 0.5 3", dict(mults=(1.0, 0.5, 3.0))),
        ("--mults 2", dict(mults=(2.0,))),
        ("--weight eps", dict(weight="eps")),
        ("--no-clip", dict(clip=False)),
        ("--class 4", dict(class_=4)),
        ("--steps 5 --steps 6", dict(steps=6)),
        ("", {}),
    ],
)
def test_annotations_are_the_types_and_tuples_arrive_as_tuples(words, expected):
    assert parse(*words.split()) == expected


def test_none_of_a_tuples_values_is_given_only_where_that_says_something():
    parser = Parser()
    add_flags(parser, "example", example, dict(attention=(3,)))
    assert parser.parse(["--attention"], {}) == dict(attention=())
    with pytest.raises(UserError, match="--mults"):
        parser.parse(["--mults"], {})


def test_the_comment_of_its_line_is_the_help_and_the_default_is_shown():
    parser = Parser()
    add_flags(parser, "example", example, dict(mults=(3, 4)))
    text = parser.format_help()
    assert "optimizer steps, 100% of them [3]" in text
    assert "widths [3 4]" in text
    assert "of several lines [small]" in text
    assert "learning rate\n" in text
    assert flags.help_of(example, "lr") == "learning rate"


def test_defaults_are_returned_and_can_be_replaced():
    values = add_flags(Parser(), "example", example, dict(steps=7))
    assert values["steps"] == 7
    assert values["mults"] == (1, 2)


@pytest.mark.parametrize(
    "value, annotation, expected",
    [
        (1, int, True),
        (True, int, False),
        (1, float, True),
        ("1", float, False),
        (None, int | None, True),
        ((1, 2), tuple[int, ...], True),
        ((1, "2"), tuple[int, ...], False),
        ([1, 2], tuple[int, ...], False),
        ("x", Literal["x", "eps"], True),
        ("v", Literal["x", "eps"], False),
        ((), Literal["x", "eps"], False),
    ],
)
def test_a_value_from_a_file_is_held_against_the_annotation(value, annotation, expected):
    assert flags.matches(value, annotation) is expected


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("clip", False, "--no-clip"),
        ("patch", (4, 2), "--patch 4 2"),
        ("class_", 3, "--class 3"),
        ("attention", (), "--attention"),
    ],
)
def test_a_value_is_told_as_the_user_would_write_it(name, value, expected):
    assert flags.as_flag(name, value) == expected


# Words that are no flags

@pytest.mark.parametrize(
    "words, message",
    [
        ("--stps 4", "no such flag: --stps; did you mean --steps?"),
        ("--learning-rate 1", "no such flag: --learning-rate; did you mean --lr?"),
        ("--learning_rate=1", "did you mean --lr?"),
        ("--zzz", "no such flag: --zzz; see --help"),
        ("--st 4", "--st"),
        ("word", "what is word? see --help"),
        ("--steps few", "invalid int value: 'few'"),
        ("--weight v", "invalid choice: 'v'"),
        ("--patch 4", "--patch belongs to pdm"),
        ("--no-patch", "--patch belongs to pdm"),
        ("pdm", "did you mean --method pdm?"),
    ],
)
def test_a_wrong_word_is_a_user_error_that_says_what_was_meant(words, message):
    hints = dict(patch="--patch belongs to pdm", pdm="did you mean --method pdm?")
    with pytest.raises(UserError) as raised:
        parse(*words.split(), hints=hints)
    assert message in str(raised.value)


# Scripts

def test_a_script_takes_positional_words_before_its_flags(capsys):
    seen = []

    def measure(path, other="b", *, n: int = 3):  # samples
        seen.append((path, other, n))

    main = flags.script(measure, "Measures.")
    main(["x.pt", "--n", "4"])
    main(["x.pt", "y.pt"])
    assert seen == [("x.pt", "b", 4), ("x.pt", "y.pt", 3)]
    for argv in ([], ["a", "b", "c"]):
        with pytest.raises(UserError, match="measure.py: .*see --help"):
            main(argv)


# How a command ends

class BackendFailed(RuntimeError):
    __module__ = "torch._dynamo.exc"


@pytest.mark.parametrize(
    "error, line",
    [
        (UserError("what is wrong"), "what is wrong"),
        (UserError("two\nlines"), "two lines"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (MemoryError(), "too little memory"),
        (RuntimeError("CUDA out of memory. Tried"), "too little memory"),
        (RuntimeError("x DefaultCPUAllocator: can't allocate memory: y"), "too little memory"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "too little memory"),
        (RuntimeError("CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), "too little"),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling"), "too little memory"),
        (RuntimeError("Storage size calculation overflowed with"), "too little memory"),
        (BackendFailed("no compiler\ntrace"), "give --no-compile: no compiler"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_exit_code_2(capsys, error, line):
    def main(argv):
        raise error

    assert run(main) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert line in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("error", [ValueError, KeyError, NotImplementedError, RuntimeError])
def test_a_bug_keeps_its_traceback(error):
    def main(argv):
        raise error("a bug")

    with pytest.raises(error):
        flags.run(main)


def command(body, shell="{}", **options):
    """What a shell says of a program whose main has this body."""
    program = f"from plumbing import flags\ndef main(argv):\n    {body}\nflags.run(main)"
    python = f"'{sys.executable}' -c \"{program}\""
    environment = dict(os.environ, PYTHONPATH=str(HERE.parent))
    line = ["bash", "-c", shell.format(python)]
    return subprocess.run(line, capture_output=True, text=True, env=environment, **options)


needs_bash = pytest.mark.skipif(os.name == "nt", reason="the shell here is bash")


@needs_bash
def test_ctrl_c_is_130_and_sigterm_143_without_a_traceback():
    interrupted = command("raise KeyboardInterrupt")
    assert (interrupted.returncode, interrupted.stderr) == (130, "interrupted\n")
    terminated = command("import os, signal; os.kill(os.getpid(), signal.SIGTERM)")
    assert (terminated.returncode, terminated.stderr) == (143, "")


@needs_bash
def test_ctrl_c_during_the_imports_is_130_without_a_traceback():
    program = "from plumbing import flags\nraise KeyboardInterrupt"
    environment = dict(os.environ, PYTHONPATH=str(HERE.parent))
    line = [sys.executable, "-c", program]
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (130, "")


@needs_bash
def test_a_closed_pipe_ends_quietly():
    body = "[print(k) for k in range(100000)]"
    done = command(body, "{} | head -1; exit ${{PIPESTATUS[0]}}")
    assert (done.returncode, done.stdout, done.stderr) == (141, "0\n", "")


@needs_bash
def test_an_error_does_not_land_in_a_file_where_stderr_is_closed(tmp_path):
    body = "raise flags.UserError(open('x', 'w').fileno())"
    done = command(body, "{} 2>&-", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")
    assert (tmp_path / "x").read_text() == ""


@needs_bash
def test_a_warning_is_no_second_line_of_an_error(capsys):
    done = command("import warnings; warnings.warn('odd'); raise flags.UserError('wrong')")
    assert done.stderr == "error: wrong\n"


@pytest.fixture(autouse=True)
def sigterm():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)
