"""A copy of the project, and what comes of a paper's tests in it.

    trial = run_tests(folder, "pdm", seconds=120)      in a process of its own
    python .../course/trial.py pdm results.jsonl       what that process runs, inside the copy
"""
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
NEVER = (".git", ".ci", ".venv", "venv", "runs", "__pycache__", ".pytest_cache", ".ruff_cache")
NEVER_ENDING = (".pt", ".npy", ".jsonl", ".pyc")


class Trial(NamedTuple):
    passed: list  # names of tests, those whose every case passed
    failed: dict  # {name of a test: its first message}
    printed: bool  # whether anything was printed to the console
    problem: str  # "" where all tests ran: does not import, no end in 90 s, ...


# A copy of the project

def project_files(root=ROOT, tracked=False):
    """The files of the project as paths within it; without git, all that look like them.

    tracked: those that git tracks alone, without new ones that it does not ignore either.
    """
    command = ["git", "ls-files", "--cached"]
    if not tracked:
        command += ["--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=root, capture_output=True, text=True)
        names = listed.stdout.splitlines() if listed.returncode == 0 else []
    except FileNotFoundError:
        names = []
    if not names:
        names = [path.relative_to(root).as_posix() for path in sorted(root.rglob("*"))]
    files = [Path(name) for name in names if (root / name).is_file()]
    return [file for file in files if not left_out(file)]


def left_out(file):
    return file.suffix in NEVER_ENDING or any(part in NEVER for part in file.parts)


def copy_files(files, folder, root=ROOT):
    for file in files:
        target = Path(folder) / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / file, target)


# The tests of a paper

def run_tests(folder, paper, seconds):
    """The Trial of a paper's tests in a copy of the project, ended after so many seconds."""
    settings = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    problem = ""
    with tempfile.TemporaryDirectory() as elsewhere:
        results = Path(elsewhere) / "results.jsonl"
        try:
            subprocess.run(
                [sys.executable, str(Path(__file__).absolute()), paper, str(results)],
                cwd=folder,
                env=settings,
                timeout=seconds,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            problem = f"no end in {seconds:g} s"
        return read(results, problem)


def read(results, problem=""):
    """The Trial that a file of Record's lines tells."""
    lines = []
    if results.exists():
        lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    failed = {}
    passed = {}
    printed = False
    last = ""
    ended = False
    for line in lines:
        test = line.get("test", "")
        printed = printed or line["printed"]
        if line["event"] == "start":
            last = test
        elif line["event"] == "failed":
            failed.setdefault(test, line["message"])
        elif line["event"] == "passed":
            passed.setdefault(test)
        elif line["event"] == "import":
            problem = problem or f"does not import: {line['message']}"
        ended = ended or line["event"] == "end"
    if not ended:
        problem = problem or "Python itself came to an end"
        problem += f", in {last}" if last else ", while it was imported"
    return Trial([test for test in passed if test not in failed], failed, printed, problem)


class Record:
    """A plugin of pytest's that writes a line to a file for all that happens.

    first: names of tests that run before the others.
    """

    def __init__(self, file, first=()):
        self.file = Path(file).absolute()
        self.first = list(first)

    def write(self, event, test="", message="", printed=False):
        line = dict(event=event, test=test, message=message, printed=printed)
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def pytest_collection_modifyitems(self, items):
        order = {name: place for place, name in enumerate(self.first)}
        items.sort(key=lambda item: order.get(item.originalname, len(order)))

    def pytest_collectreport(self, report):
        printed = any("stdout" in title for title, _ in report.sections)
        if report.failed:
            last = [line for line in str(report.longrepr).splitlines() if line.strip()][-1]
            self.write("import", message=last.removeprefix("E").strip(), printed=printed)
        elif printed:
            self.write("printed", printed=True)

    def pytest_runtest_logstart(self, nodeid, location):
        self.write("start", test=name_of(nodeid))

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message if crash else ""
            printed = bool(report.capstdout)
            self.write(report.outcome, name_of(report.nodeid), message, printed)

    def pytest_sessionfinish(self):
        self.write("end")


def name_of(nodeid):
    """tests/test_pdm.py::test_gamma[snr] -> test_gamma."""
    return nodeid.partition("::")[2].partition("[")[0]


def pytest_main(paper, results, first=(), flags=()):
    """Run a paper's tests in this process and folder, and record what comes of them."""
    arguments = [f"tests/test_{paper}.py", "-p", "no:cacheprovider", *flags]
    return pytest.main(arguments, plugins=[Record(results, first)])


if __name__ == "__main__":
    pytest_main(*sys.argv[1:])
