"""A signature as a command line: each typed keyword-only argument is a flag.

Its annotation is the type, its default the default, the comment at the end of its line the
help, so that all three stand in one place and an argument that a reader adds is a flag at once.
"""
import argparse
import difflib
import functools
import inspect
import itertools
import os
import re
import signal
import sys
import types
import typing
import warnings

# What other programs call our flags.
SYNONYMS = {
    "learning_rate": "lr",
    "batch_size": "batch",
    "patch_size": "patch",
    "image_size": "size",
    "epochs": "steps",
    "iterations": "steps",
    "dataset": "data",
    "output": "out",
    "cfg": "guidance",
}
OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "ALLOC_FAILED",
    "ALLOCATION_FAILED",  # cuDNN from 9.0 on
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "Storage size calculation overflowed",
)


class UserError(ValueError):
    """A mistake of the user's: one line on stderr and exit code 2."""

    def __init__(self, message):
        super().__init__(message)


# Running a command

def run(main):
    """Call main(argv). What a user can mend ends it with one line on stderr and exit code 2.

    So do full disks, too little memory, and a torch.compile that does not work. Ctrl-C ends it
    with 130, SIGTERM with 143, a closed pipe with 141, all without a traceback.
    """
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None where the shell closed it: 2>&-
    sys.stderr = sys.stderr or open(os.devnull, "w")
    signal.signal(signal.SIGTERM, terminated)
    if not sys.warnoptions:  # an error is one line, without Pillow's and torch's warnings
        warnings.simplefilter("ignore")
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # Python's last flush would complain again, of what has no reader any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        line = explanation(error)
        if line is None:
            raise
        first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started
        if first or not isinstance(error, UserError):
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)


def explanation(error):
    """One line about an error that is no bug; None for one that is, and keeps its traceback."""
    text = str(error).strip() or type(error).__name__
    first_line = text.splitlines()[0]
    if isinstance(error, UserError):
        return " ".join(text.splitlines())
    if lacks_memory(error):
        return f"too little memory: lower --batch, or raise --accumulate ({first_line[:100]})"
    if isinstance(error, OSError):
        return first_line
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"torch.compile does not work here, give --no-compile: {first_line}"
    return None


def lacks_memory(error):
    """Whether memory is short, in the words of torch, cuDNN, cuBLAS or Python."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


def terminated(number, frame):
    sys.exit(128 + number)


def quiet_interrupt(kind, error, trace):
    """Python's last word on an error, but for Ctrl-C while torch is still being imported."""
    if issubclass(kind, KeyboardInterrupt):
        sys.exit(130)
    sys.__excepthook__(kind, error, trace)


sys.excepthook = quiet_interrupt


# From signatures to flags

@functools.cache
def flags_of(function):
    """{name: Parameter} of a function's, or a class's, typed keyword-only arguments."""
    parameters = inspect.signature(function).parameters.values()
    typed = [p for p in parameters if p.annotation is not p.empty]
    return {p.name: p for p in typed if p.kind is p.KEYWORD_ONLY}


@functools.cache
def source_of(function):
    return inspect.getsource(function.__init__ if inspect.isclass(function) else function)


def help_of(function, name):
    """The comment at the end of the argument's line, or of its last line if it has several."""
    source = source_of(function)
    several_lines = r"(?:\[\n[^\]]*\][^#\n]*)?"
    comment = re.search(rf"\b{name}: [^#\n]*?{several_lines}# *(.+)$", source, re.MULTILINE)
    return comment.group(1) if comment else ""


def add_flags(parser, title, function, defaults=None):
    """Add a function's flags to a parser, under a title; returns {name: default}.

    `defaults` replace the signature's. Of a tuple[X, ...] any number of values can be given,
    none only where () says something.
    """
    group = parser.add_argument_group(title)
    values = {}
    for name, parameter in flags_of(function).items():
        default = (defaults or {}).get(name, parameter.default)
        options = options_of(parameter.annotation)
        if parameter.default == () and default != ():
            options["nargs"] = "*"
        text = help_of(function, name) + shown(default)
        options |= dict(dest=name, default=argparse.SUPPRESS, help=text.replace("%", "%%"))
        group.add_argument(f"--{name.rstrip('_')}", **options)
        values[name] = default
    return values


def shown(default):
    """A default as the help shows it."""
    if default is None or default == ():
        return ""
    if isinstance(default, tuple):
        default = " ".join(map(str, default))
    return f" [{default}]"


def options_of(annotation):
    """argparse's options for int, float, str, bool, Literal, X | None and tuple[X, ...]."""
    origin = typing.get_origin(annotation)
    inner = typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return options_of(inner[0])
    if annotation is bool:
        return dict(action=argparse.BooleanOptionalAction)
    if origin is typing.Literal:
        return dict(choices=inner)
    if origin is tuple:
        return dict(type=inner[0], nargs="+", action=AsTuple, metavar="N")
    return dict(type=annotation, metavar=annotation.__name__)


def matches(value, annotation):
    """Whether a value is one of the annotation's; an int will do for a float."""
    origin = typing.get_origin(annotation)
    inner = typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return any(matches(value, kind) for kind in inner)
    if origin is typing.Literal:
        return isinstance(value, str) and value in inner
    if origin is tuple:
        return type(value) is tuple and all(matches(one, inner[0]) for one in value)
    if annotation is float:
        return type(value) in (int, float)
    return type(value) is annotation


def as_flag(name, value):
    """A flag as the user writes it: --no-clip, --patch 4 2."""
    name = name.rstrip("_")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    if isinstance(value, tuple):
        value = " ".join(map(str, value))
    return f"--{name} {value}".rstrip()


# Reading the command line

class AsTuple(argparse.Action):
    """Keeps the several values of a flag as a tuple."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(values))


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors, and that takes no abbreviations."""

    def __init__(self, **options):
        as_written = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=as_written, **options)

    def error(self, message):
        raise UserError(message)

    def parse(self, argv, hints=None):
        """{name: value} of the flags that were given, and those alone.

        hints: {word: sentence} says more of words that this command does not know, such as
        the flags of other methods. UserError for those words and all others.
        """
        given, unknown = self.parse_known_args(argv)
        for word in unknown:
            name = word.lstrip("-").split("=")[0].removeprefix("no-")
            hint = (hints or {}).get(name) or self.hint(word, name)
            raise UserError(f"no such flag: {word}; {hint}" if word[:1] == "-" else hint)
        return vars(given)

    def hint(self, word, name):
        """What may have been meant by a word that is no flag."""
        known = list(self._option_string_actions)
        meant = "--" + SYNONYMS.get(name.replace("-", "_"), "")
        near = difflib.get_close_matches("--" + name, known, 1)
        if meant in known:
            return f"did you mean {meant}?"
        if near and word.startswith("-"):
            return f"did you mean {near[0]}?"
        return "see --help" if word.startswith("-") else f"what is {word}? see --help"


def script(function, doc):
    """The main(argv) of a script of one function.

    Its keyword arguments are the flags, its positional ones the words before them.
    """
    name = function.__name__

    def main(argv):
        words = list(itertools.takewhile(is_word, argv))
        parser = Parser(prog=f"{name}.py", description=doc)
        add_flags(parser, name, function)
        given = parser.parse(argv[len(words):])
        try:
            inspect.signature(function).bind(*words)
        except TypeError as error:
            raise UserError(f"{name}.py: {error}; see --help") from None
        function(*words, **given)

    return main


def is_word(argument):
    return not argument.startswith("-")
