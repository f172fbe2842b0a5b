"""Make an assignment of any functions of a paper:   python experiments/assignment.py pdm patchify unpatchify

Writes a copy of this repository in which their bodies are `raise NotImplementedError("Eq. n: ...")`, signature and docstring kept, and prints
the command that grades them. Tests of other files that need a blank function are skipped until it is written.

    python experiments/assignment.py edm ode_sample D --out week2
    python experiments/assignment.py --measure           # blank every function in turn, note which tests go red, in tests/grading.json
    python experiments/assignment.py pdm --check         # the same, compared with that file
"""
import ast
import json
import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent.parent
sys.path[:0] = [str(HERE), str(HERE / "tests")]
from train import command, script

GRADING = HERE / "tests" / "grading.json"


def assignment(paper=None, *functions,
               out: str | None = None,    # the new folder; default assignment-<paper>
               measure: bool = False,     # blank every function of tests/grading.json in turn and write down the tests that go red
               check: bool = False):      # the same, and compare: exit code 1 where they differ
    """Raises ValueError for a paper or function that is not there, and for a folder that is."""
    papers = json.loads(GRADING.read_text())
    if paper is not None and f"{paper}.py" not in papers:
        raise ValueError(f"no paper {paper}: choose one of " + ", ".join(name.removesuffix(".py") for name in papers))
    source = (HERE / f"{paper}.py").read_text() if paper else ""
    functions = [key for function in functions for key in graded(source, function, papers[f"{paper}.py"])]
    if measure or check:
        return grade({name: own for name, own in papers.items() if paper in (None, name.removesuffix(".py"))}, functions, papers, measure)
    if not functions:
        raise ValueError("name a paper and functions of it: python experiments/assignment.py pdm patchify")
    name, out = f"{paper}.py", Path(out or f"assignment-{paper}")
    text = blank(source, functions)
    if out.exists():
        raise ValueError(f"{out} is there already: choose another --out")
    shutil.copytree(HERE, out, ignore=shutil.ignore_patterns(".git", ".ci", "runs", "__pycache__", ".pytest_cache", ".venv", "venv", "*.pt", "*.npy", "assignment-*", "mutants.jsonl", "test_course.py", out.name))
    (out / name).write_text(text)
    tests = sorted({test for function in functions for test in papers[name].get(function, ())})
    print(f"wrote {out}/: {', '.join(functions)} of {name} to be written" + (f"; {len(tests)} tests are red until then:" if tests else ""))
    print(*(f"    {test}" for test in tests), sep="\n")
    print(f"now: cd {out} && python -m pytest tests/test_{name}")


def blank(source, functions):
    """The source with these functions' bodies replaced; their docstrings stay. ValueError for one that is not there."""
    lines = source.splitlines(keepends=True)
    for function in functions:
        node = find(source, function)
        body = node.body[1:] if ast.get_docstring(node) else node.body
        tags = list(dict.fromkeys(re.findall(r"#\s+((?:Eqs?\.|Algorithm|Table|Sec\.|App\.|SNR|Training targets|Loss weight|Optimal prediction).*)",
                                             "".join(lines[body[0].lineno - 1:body[-1].end_lineno]))))
        what = ": ".join(filter(None, ["; ".join(tags), (ast.get_docstring(node) or node.name).splitlines()[0]]))
        lines[body[0].lineno - 1] = " " * body[0].col_offset + f"raise NotImplementedError({json.dumps(what)})\n"
        for k in range(body[0].lineno, body[-1].end_lineno):
            lines[k] = ""
        source = "".join(lines)
        lines = source.splitlines(keepends=True)
    return source


def find(source, function):
    """The syntax tree of a function, or of Class.function."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{child.name}": child for child in node.body if isinstance(child, ast.FunctionDef)}
    found |= {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    named = {key: node for key, node in found.items() if key == function or key.endswith(f".{function}")}
    if len(named) != 1:
        raise ValueError(f"{'several functions are' if named else 'no function is'} called {function}: choose one of {', '.join(named or found)}")
    return next(iter(named.values()))


def graded(source, function, listed):
    """[the function as grading.json calls it], or [its own name] if it is not graded. ValueError for one that is not there."""
    line = find(source, function).lineno
    return [key for key in listed if find(source, key).lineno == line] or [function]


def grade(some, functions, papers, write):
    """Which tests of its own paper go red when a function is blank; none of the other papers' may."""
    from mutants import red_tests
    different = 0
    if lacking := [function for function in functions for own in some.values() if function not in own]:
        raise ValueError(f"{', '.join(lacking)}: not in tests/grading.json")
    for name, own in some.items():
        for function, listed in own.items():
            if functions and function not in functions:
                continue
            text = blank((HERE / name).read_text(), [function])
            red, elsewhere = sorted(red_tests(name, text)), red_tests(name, text, papers=[paper for paper in papers if paper != name])
            if write:
                own[function] = red
                GRADING.write_text(json.dumps(papers, indent=1) + "\n")
            different += red != listed and not write or bool(elsewhere)
            print(f"{name} {function}: {len(red)} tests red" + (f"; not as listed: {sorted(set(red) ^ set(listed))}" if red != listed else "")
                  + (f"; other papers' tests that are red too: {sorted(elsewhere)}" if elsewhere else ""), flush=True)
    if different:
        sys.exit(1)


main = script(assignment, __doc__)

if __name__ == "__main__":
    command(main)
