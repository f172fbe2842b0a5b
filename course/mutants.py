"""Do the tests notice?   python course/mutants.py pdm iddpm --sample 100 --list

Plants one bug at a time in the papers' files (a sign, an operator, a comparison, a constant, a
dropped term, swapped arguments, a turned condition), runs that paper's tests until the first
goes red, and lists the bugs that no test noticed. Those that change nothing stand in
equivalent.py with the reason.

Results are kept in mutants.jsonl and used again while the paper's file is the same (those that
no test noticed only while the tests are the same too), so a run that was stopped goes on.
"""
import argparse
import ast
import collections
import contextlib
import copy
import gc
import hashlib
import importlib
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
from course import index, trial
from course.equivalent import EQUIVALENT

ROOT = Path(__file__).parent.parent
SECONDS = 60  # a mutant that runs so long is noticed


# Planting a bug

class Mutant(NamedTuple):
    line: int
    text: str  # the line, without its comment
    change: str  # "a + b -> a - b"; the second equal change in a line ends in #2
    source: str  # of the whole file, with the change


OPPOSITE = {
    ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Div, ast.Div: ast.Mult, ast.MatMult: ast.Mult,
    ast.Pow: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.And: ast.Or, ast.Or: ast.And, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}
IN_ANY_ORDER = ("min", "max")
DROPPED = ("sqrt", "square", "exp", "log", "mean", "detach")


def changed(node, **fields):
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def opposite(operator):
    return OPPOSITE[type(operator)]()


def of_operation(node):
    """a - b becomes a + b, a, b - a."""
    yield changed(node, op=opposite(node.op))
    if isinstance(node.op, (ast.Add, ast.Sub)):
        yield node.left
    if isinstance(node.op, (ast.Sub, ast.Div, ast.Pow)):
        yield changed(node, left=node.right, right=node.left)


def of_and_or(node):
    yield changed(node, op=opposite(node.op))


def of_sign(node):
    if isinstance(node.op, (ast.USub, ast.Not)):
        yield node.operand


def of_comparison(node):
    yield changed(node, ops=[opposite(node.ops[0]), *node.ops[1:]])
    if isinstance(node.ops[0], (ast.Lt, ast.LtE, ast.Gt, ast.GtE)):
        yield ast.UnaryOp(ast.Not(), node)


def of_constant(node):
    if isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node.value, int):
        yield ast.Constant(node.value + 1)
        yield ast.Constant(node.value - 1)
    elif isinstance(node.value, float):
        yield ast.Constant(node.value * 1.5 if node.value else 0.1)


def of_call(node):
    """f(a, b) becomes f(b, a); x.sqrt() becomes x."""
    starred = any(isinstance(argument, ast.Starred) for argument in node.args[:2])
    ordered = ast.unparse(node.func) not in IN_ANY_ORDER
    if len(node.args) > 1 and ordered and not starred:
        yield changed(node, args=[node.args[1], node.args[0], *node.args[2:]])
    is_method = isinstance(node.func, ast.Attribute) and node.func.attr in DROPPED
    if is_method and not node.args and not node.keywords:
        yield node.func.value


def of_choice(node):
    yield changed(node, body=node.orelse, orelse=node.body)


CHANGES = {
    ast.BinOp: of_operation,
    ast.BoolOp: of_and_or,
    ast.UnaryOp: of_sign,
    ast.Compare: of_comparison,
    ast.Constant: of_constant,
    ast.Call: of_call,
    ast.IfExp: of_choice,
}


def computing(node):
    """The nodes below that compute: no annotations, no messages of errors."""
    if isinstance(node, (ast.Raise, ast.JoinedStr)):
        return
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        children = value if isinstance(value, list) else [value]
        for child in children:
            if isinstance(child, ast.AST):
                yield from computing(child)


def mutants(source):
    """[Mutant] of a file, from top to bottom of its syntax tree."""
    raw = source.encode()
    lines = source.splitlines()
    starts = [0]
    for line in raw.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    times = collections.Counter()
    planted = []
    for node in computing(ast.parse(source)):
        if type(node) not in CHANGES:
            continue
        begin = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        for new in CHANGES[type(node)](node):
            if same(node, new, raw[end:]):
                continue
            mutated = raw[:begin] + f"({ast.unparse(new)})".encode() + raw[end:]
            change = f"{ast.unparse(node)} -> {ast.unparse(new)}"
            times[node.lineno, change] += 1
            if times[node.lineno, change] > 1:
                change += f" #{times[node.lineno, change]}"
            text = lines[node.lineno - 1].split("  #")[0].strip()
            planted.append(Mutant(node.lineno, text, change, mutated.decode()))
    return planted


def same(node, new, after):
    """Whether a change is none: twins swapped, or the sign of a difference that is squared."""
    ast.fix_missing_locations(new)
    if ast.unparse(new) == ast.unparse(node):
        return True
    squared = after.startswith((b").square()", b") ** 2"))
    difference = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub)
    return squared and difference and getattr(new, "left", None) is node.right


# Running its tests

def warm_up():
    """Import once what the tests import, so that a fork of this process need not."""
    for name in ("numpy", "PIL.Image", "pytest", "torch", "torch.testing", "tqdm"):
        importlib.import_module(name)
    torch = sys.modules["torch"]
    torch.set_num_threads(1)
    torch.optim.Adam([torch.nn.Parameter(torch.ones(1))])  # imports much at its first call
    gc.freeze()  # what is here already need not be looked through in every fork


def try_in_process(folder, paper, first):
    """The target of a process: the paper's tests in a copy, until the first goes red."""
    os.chdir(folder)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.dont_write_bytecode = True  # a file may change twice within the second of its stamp
    for path in (str(ROOT), str(ROOT / "course")):
        if path in sys.path:
            sys.path.remove(path)
    for name in list(sys.modules):  # the copy has its own
        if name == "course" or name.startswith("course."):
            del sys.modules[name]
    with contextlib.redirect_stdout(io.StringIO()):
        trial.pytest_main(paper, "results.jsonl", first, ["-x", "--assert=plain", "-q"])


class Running(NamedTuple):
    mutant: dict
    folder: str
    process: multiprocessing.Process
    until: float


def start(mutant, folder, first):
    """Plant the mutant in a copy of the project and start its tests."""
    (Path(folder) / f"{mutant['paper']}.py").write_text(mutant["source"], encoding="utf-8")
    (Path(folder) / "results.jsonl").unlink(missing_ok=True)
    forks = "fork" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if forks else "spawn")
    arguments = (folder, mutant["paper"], first)
    process = context.Process(target=try_in_process, args=arguments)
    process.start()
    return Running(mutant, folder, process, time.monotonic() + SECONDS)


def noticed_by(running):
    """The test that went red, or another sign of the bug; None if nothing noticed it."""
    late = running.process.is_alive()
    if late:
        running.process.kill()
    running.process.join()
    problem = f"no end in {SECONDS} s" if late else ""
    result = trial.read(Path(running.folder) / "results.jsonl", problem)
    return next(iter(result.failed), None) or result.problem or None


def try_all(waiting, folders, seen):
    """Yield (mutant, what noticed it) in the order in which they end, one copy for each."""
    free = list(folders)
    at_work = []
    waiting = collections.deque(waiting)
    while waiting or at_work:
        while waiting and free:
            folder = free.pop()
            mutant = waiting.popleft()
            at_work.append(start(mutant, folder, neighbours(mutant, seen)))
        multiprocessing.connection.wait([one.process.sentinel for one in at_work], timeout=1)
        for one in list(at_work):
            if one.process.is_alive() and time.monotonic() < one.until:
                continue
            at_work.remove(one)
            test = noticed_by(one)
            paper = Path(one.folder) / f"{one.mutant['paper']}.py"
            shutil.copyfile(ROOT / paper.name, paper)
            free.append(one.folder)
            yield one.mutant, test


def neighbours(mutant, seen):
    """The tests that noticed bugs in this file, those of the nearest lines first."""
    near = [result for result in seen if result["paper"] == mutant["paper"]]
    near.sort(key=lambda result: abs(result["line"] - mutant["line"]))
    return list(dict.fromkeys(result["noticed_by"] for result in near))


# The run

def listed(paper, sample, seed):
    """The mutants of a paper as they are kept, `sample` of them at random."""
    file = ROOT / f"{paper}.py"
    tests = ROOT / "tests" / f"test_{paper}.py"
    chosen = mutants(file.read_text(encoding="utf-8"))
    if sample is not None and sample < len(chosen):
        chosen = sorted(random.Random(seed).sample(chosen, sample))
    about = dict(paper=paper, version=digest(file), tests=digest(tests))
    return [
        about | mutant._asdict() | dict(which=digest_of(mutant.source)) for mutant in chosen
    ]


def digest(file):
    return digest_of(file.read_text(encoding="utf-8"))


def digest_of(text):
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def key(mutant):
    return mutant["paper"], mutant["version"], mutant["which"]


def results_so_far(file):
    if not file.exists():
        return {}
    lines = file.read_text(encoding="utf-8").splitlines()
    return {key(result): result for result in map(json.loads, lines)}


def is_known(mutant, known):
    result = known.get(key(mutant))
    if result is None:
        return False
    return result["noticed_by"] is not None or result["tests"] == mutant["tests"]


def reason(mutant):
    """Why no test can notice a mutant, if equivalent.py says so."""
    rows = EQUIVALENT.get(mutant["paper"], [])
    for text, change, why in rows:
        if text == mutant["text"] and change == mutant["change"]:
            return why
    return None


def try_and_keep(jobs, processes, file):
    """Try the mutants that the file of results does not know; what is in it at the end."""
    known = results_so_far(file)
    left = [mutant for mutant in jobs if not is_known(mutant, known)]
    print(f"{len(jobs)} mutants, {len(left)} to try", flush=True)
    if not left:
        return known
    warm_up()
    seen = [result for result in known.values() if result["noticed_by"]]
    with contextlib.ExitStack() as stack:
        folders = [
            stack.enter_context(tempfile.TemporaryDirectory()) for _ in range(processes)
        ]
        files = trial.project_files()
        for folder in folders:
            trial.copy_files(files, folder)
        for mutant, test in try_all(left, folders, seen):
            result = {name: value for name, value in mutant.items() if name != "source"}
            result["noticed_by"] = test
            known[key(result)] = result
            with open(file, "a", encoding="utf-8") as results:
                results.write(json.dumps(result) + "\n")
            if test is not None:
                seen.append(result)
            elif reason(result) is None:
                print(f"{result['paper']}.py:{result['line']}: {result['change']}", flush=True)
    return known


def report(paper, results, in_full):
    """Print a paper's row, and the mutants that no test noticed; True where one is left."""
    alive = [result for result in results if result["noticed_by"] is None]
    unnoticed = [result for result in alive if reason(result) is None]
    noticed = len(results) - len(alive)
    equivalent = len(alive) - len(unnoticed)
    print(f"{paper}.py | {len(results)} | {noticed} | {equivalent} | {len(unnoticed)}")
    shown = alive if in_full else unnoticed
    for result in shown:
        why = reason(result) or "not noticed"
        print(f"    line {result['line']}: {result['change']}: {why}")
    return bool(unnoticed)


def arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("papers", nargs="*", default=index.PAPERS, help="default all")
    parser.add_argument("--sample", type=int, help="at most so many mutants of each paper")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="the equivalent ones too, and why")
    parser.add_argument("--out", default=str(ROOT / "mutants.jsonl"), help="results so far")
    return parser.parse_args(argv)


def main(argv=None):
    """1 where a mutant is neither noticed nor equivalent."""
    options = arguments(argv)
    papers = [name.removesuffix(".py") for name in options.papers]
    jobs = {paper: listed(paper, options.sample, options.seed) for paper in papers}
    in_turn = [mutant for paper in papers for mutant in jobs[paper]]
    known = try_and_keep(in_turn, options.processes, Path(options.out))
    print("file | mutants | noticed | equivalent | not noticed")
    left = False
    for paper in papers:
        results = [known[key(mutant)] for mutant in jobs[paper]]
        left = report(paper, results, options.list) or left
    return int(left)


if __name__ == "__main__":
    sys.exit(main())
