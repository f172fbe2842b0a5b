"""Do the tests notice?   python tests/mutants.py

Plants one bug at a time in the five paper files (a sign, an operator, a comparison, a constant, a dropped term, swapped arguments, a turned
condition), runs that paper's tests until the first goes red, and lists the bugs that no test noticed. Those that change nothing
stand in EQUIVALENT with the reason. Results are kept in mutants.jsonl and used again while the paper's file
is the same (those that no test noticed only while the tests are the same too), so a run that was stopped goes on.

    python tests/mutants.py pdm.py iddpm.py --sample 100 --list       # some files; at most so many of each, at random
"""
import argparse
import ast
import collections
import copy
import gc
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy, PIL.Image, pytest, torch, torch.testing, tqdm  # once, before the forks

torch.testing.assert_close(torch.ones(1), torch.ones(1)), torch.optim.Adam([torch.nn.Parameter(torch.ones(1))])  # both import much at their first call
gc.freeze()  # and need not be looked through in every fork
HERE = Path(__file__).parent.parent
PAPERS = ("ddpm.py", "iddpm.py", "pdm.py", "edm.py", "patch_diffusion.py")
SECONDS = 90  # a mutant that runs so long is noticed

EQUIVALENT = {  # (file, its line): {the change, None for any: why no test can tell}
    ("ddpm.py", "alpha_bar = torch.cat([betas.new_ones(1), (1 - betas).cumprod(0)])"): {"0 -> -1": "it has one dimension"},
    ("ddpm.py", "if not 0 <= (eta or 0) <= 1:"): {"0 -> 1 #2": "eta = 0 and no eta are both allowed"},
    ("ddpm.py", "mean, log_variance, x_0_hat = self.p_mean_variance(x_t, t, s, y, first=tau[:2])"): {"2 -> 3": "only the first two are read"},
    ("ddpm.py", "def log_beta_tilde(self, t, s, first=(1, 2)):"): {None: "where the default is taken it only fills the branch that s = 0 does not select"},
    ("ddpm.py", "return self.beta_tilde(torch.where(s > 0, t, first[1]), torch.where(s > 0, s, first[0])).log()"): {"0 -> 1 #2": "s = 1 is first[0] itself"},
    ("ddpm.py", "prior = normal_kl(alpha_bar.sqrt() * x_0, (1 - alpha_bar).log(), 0, 0 * alpha_bar).flatten(1).mean(1) / math.log(2)"): {
        "0 * alpha_bar -> 0 / alpha_bar": "0 either way"},
    ("ddpm.py", "upper = torch.where(x_0 > 0.999, 1.0, cdf(x_0 + 1 / 255))"): {"x_0 > 0.999 -> x_0 >= 0.999": "no pixel has that value"},
    ("ddpm.py", "lower = torch.where(x_0 < -0.999, 0.0, cdf(x_0 - 1 / 255))"): {"x_0 < -0.999 -> x_0 <= -0.999": "no pixel has that value"},
    ("iddpm.py", "before = (i[:, None] == i).tril(-1).sum(1)"): {"1 -> 0": "every ring is filled from its second place on"},
    ("iddpm.py", "return torch.randint(1, self.T + 1, (B, 1, 1, 1), device=device), 1.0"): {"1.0 -> 1.5": "the weight is read where t is importance-sampled only"},
    ("iddpm.py", "self.count.index_add_(0, i, torch.ones_like(i))"): {"0 -> -1": "it has one dimension"},
    ("iddpm.py", "return sorted({*space_timesteps(T, spec[3:]), *range(1, T // int(spec[3:]) + 1)})"): {"1 -> 2": "t = 1 is always kept"},
    ("pdm.py", "return Split(nets) if split_snr else nets[0]"): {"0 -> -1": "there is one network"},
    ("pdm.py", "return own[torch.randint(len(own), (B,), device=device)].view(B, 1, 1, 1), 1.0"): {"1.0 -> 1.5": "PDM does not read the weight"},
    ("pdm.py", "distance = z.square().sum(1, keepdim=True) - 2 * alpha_bar.sqrt() * z @ x.to(z).T + alpha_bar * x.to(z).square().sum(1)"): {
        "z.square() -> z": "the softmax does not see what all images have in common"},
    ("edm.py", "u.append(((u[-1] ** 2 + 1) / max(alpha_bar(j - 1) / alpha_bar(j), C_1) - 1) ** 0.5)"): {"j - 1 -> 1 - j": "a squared sine has no sign"},
    ("edm.py", "return max(low, getattr(D, \"sigma_min\", 0)), min(high, getattr(D, \"sigma_max\", math.inf))"): {"0 -> -1": "low is above both"},
    ("edm.py", "t = rounded(D, sigma_steps(steps, \"edm\", *noise_range(\"edm\", sigma_min, sigma_max, D), rho)).flip(0)"): {"0 -> -1": "it has one dimension"},
    ("edm.py", "t_hat = torch.where(gamma > 0, sigma_inverse(rounded(D, (1 + gamma) * sigmas)), t[:-1])"): {
        "gamma > 0 -> gamma >= 0": "without noise added both sides are t, but for the last digit", "0 -> -1": "as before"},
    ("edm.py", 'if not alpha > 0 or solver == "heun" and not ((t_prime > 0) & (sigma(t_prime) > 0))[:-1].all():'): {
        "t_prime > 0 -> t_prime >= 0": "sigma(0) is 0", "sigma(t_prime) > 0 -> sigma(t_prime) >= 0": "it is 0 at t = 0 only", "0 -> -1 #3": "where t is above 0 it is above 0 or no number"},
    ("pdm.py", "logits.append(-distance / (2 * (1 - alpha_bar)).clamp(min=1e-12))"): {"1e-12 -> 1.5e-12": "any small number"},
    ("edm.py", "return (self.P_mean + self.P_std * normal).exp()"): {"self.P_mean + self.P_std * normal -> self.P_mean - self.P_std * normal": "as likely"},
    ("edm.py", "uniform, normal = torch.rand(B, 12, device=x.device), torch.randn(B, 4, device=x.device)"): {
        "12 -> 13": "more than are used", "12 -> 11": "more than are used", "4 -> 5": "more than are used"},
    ("edm.py", "on = (uniform[:, :6] < x.new_tensor([1, p, p, p, p, p], dtype=torch.float32)).float().unbind(1)"): {
        "1 -> 2": "always, either way",
        "uniform[:, :6] < x.new_tensor([1, p, p, p, p, p], dtype=torch.float32) -> uniform[:, :6] <= x.new_tensor([1, p, p, p, p, p], dtype=torch.float32)": "as likely"},
    ("edm.py", "flip_x, flip_y = (on[k] * (uniform[:, 6 + k] < 0.5) for k in (0, 1))"): {"uniform[:, 6 + k] < 0.5 -> uniform[:, 6 + k] <= 0.5": "as likely"},
    ("edm.py", "octaves, angle = on[2] * normal[:, 0], on[3] * math.pi * (2 * uniform[:, 8] - 1)"): {
        "2 * uniform[:, 8] - 1 -> 1 - 2 * uniform[:, 8]": "as likely", "2 * uniform[:, 8] - 1 -> 2 * uniform[:, 8]": "a full turn either way",
        "2 * uniform[:, 8] - 1 -> 2 * uniform[:, 8] + 1": "a full turn either way", "1 -> 2": "a full turn either way", "1 -> 0": "a full turn either way"},
    ("edm.py", "axis, stretch = on[4] * math.pi * (2 * uniform[:, 9] - 1), on[4] * normal[:, 1]"): {
        "2 * uniform[:, 9] - 1 -> 1 - 2 * uniform[:, 9]": "as likely", "2 * uniform[:, 9] - 1 -> 2 * uniform[:, 9]": "a full turn either way",
        "2 * uniform[:, 9] - 1 -> 2 * uniform[:, 9] + 1": "a full turn either way", "1 -> 2": "a full turn either way", "1 -> 0": "a full turn either way", "9 -> 10": "a number of its own either way"},
    ("edm.py", "back = scale(1 - 2 * flip_x, 1 - 2 * flip_y) @ scale(2 ** (-0.2 * octaves), 2 ** (-0.2 * octaves)) @ rotation(angle)"): {
        "scale(1 - 2 * flip_x, 1 - 2 * flip_y) @ scale(2 ** (-0.2 * octaves), 2 ** (-0.2 * octaves)) -> scale(1 - 2 * flip_x, 1 - 2 * flip_y) * scale(2 ** (-0.2 * octaves), 2 ** (-0.2 * octaves))":
            "of diagonal matrices both products are one"},
    ("edm.py", "back = back @ rotation(axis) @ scale(2 ** (-0.2 * stretch), 2 ** (0.2 * stretch)) @ rotation(-axis) # from warped pixel to source"): {
        "scale(2 ** (-0.2 * stretch), 2 ** (0.2 * stretch)) -> scale(2 ** (0.2 * stretch), 2 ** (-0.2 * stretch))": "its sign is as likely, and not in the labels (Table 6)"},
    ("edm.py", "grid = nn.functional.affine_grid(torch.cat([back, -back @ shift], dim=2), [B, 1, H, W], align_corners=False)"): {
        "1 -> 2": "a grid has no channels"},
    ("edm.py", "return (levels - torch.as_tensor(sigma).to(levels)[..., None]).abs().argmin(-1)"): {
        "levels - torch.as_tensor(sigma).to(levels)[..., None] -> torch.as_tensor(sigma).to(levels)[..., None] - levels": "a distance has no sign"},
}

SWAP = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.MatMult: ast.Mult,
        ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
        ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}


def variants(node):
    """Mutated copies of one node of a syntax tree."""
    def changed(**fields):
        new = copy.copy(node)
        for name, value in fields.items():
            setattr(new, name, value)
        return new

    if isinstance(node, ast.BinOp):
        yield changed(op=SWAP[type(node.op)]())
        if isinstance(node.op, (ast.Add, ast.Sub)):
            yield node.left                                                    # a term dropped
        if isinstance(node.op, (ast.Sub, ast.Div, ast.Pow)):
            yield changed(left=node.right, right=node.left)
    elif isinstance(node, ast.BoolOp):
        yield changed(op=SWAP[type(node.op)]())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
        yield node.operand
    elif isinstance(node, ast.Compare):
        yield changed(ops=[SWAP[type(node.ops[0])](), *node.ops[1:]])
        if isinstance(node.ops[0], (ast.Lt, ast.LtE, ast.Gt, ast.GtE)):
            yield ast.UnaryOp(ast.Not(), node)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield ast.Constant(node.value + 1)
        yield ast.Constant(node.value - 1)
    elif isinstance(node, ast.Constant) and isinstance(node.value, float):
        yield ast.Constant(node.value * 1.5 if node.value else 0.1)
    elif isinstance(node, ast.Call) and len(node.args) > 1 and ast.unparse(node.func) not in ("min", "max") and not any(isinstance(a, ast.Starred) for a in node.args[:2]):
        yield changed(args=[node.args[1], node.args[0], *node.args[2:]])
    elif isinstance(node, ast.IfExp):
        yield changed(body=node.orelse, orelse=node.body)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not node.args and not node.keywords and node.func.attr in ("sqrt", "square", "exp", "log", "mean", "detach"):
        yield node.func.value                                                  # a function dropped


def inside(tree):
    """The nodes that compute: no docstrings, no annotations, no error messages."""
    def walk(node):
        if isinstance(node, (ast.Raise, ast.JoinedStr)):
            return
        yield node
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns", "decorator_list"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        yield from walk(child)
    return walk(tree)


def mutants(source):
    """[(line number, line, the change, mutated source), ...]; the second equal change in a line ends in #2."""
    lines, found, times = source.splitlines(keepends=True), [], collections.Counter()
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line.encode()))
    raw = source.encode()
    for node in inside(ast.parse(source)):
        if not hasattr(node, "lineno"):
            continue
        begin, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        for new in variants(node):
            if raw[end:].startswith((b").square()", b") ** 2")) and isinstance(new, ast.BinOp) and isinstance(new.op, ast.Sub) and new.left is node.right:
                continue                                                       # the square of a difference has no sign
            text = f"({ast.unparse(ast.fix_missing_locations(new))})"
            if text[1:-1] == ast.unparse(node):
                continue                                                       # swapped twins
            mutated = (raw[:begin] + text.encode() + raw[end:]).decode()
            try:
                compile(mutated, "mutant", "exec")
            except SyntaxError:
                continue
            change = f"{raw[begin:end].decode()} -> {text[1:-1]}"
            times[node.lineno, change] += 1
            number = f" #{times[node.lineno, change]}" if times[node.lineno, change] > 1 else ""
            found.append((node.lineno, lines[node.lineno - 1].split("  #")[0].strip(), change + number, mutated))
    return found


class Red:
    """A plugin that runs the tests named in `first` first and writes down which test failed."""

    def __init__(self, first=()):
        self.first = list(first)

    def pytest_collection_modifyitems(self, items):
        items.sort(key=lambda item: self.first.index(item.originalname) if item.originalname in self.first else len(self.first))

    def pytest_runtest_logreport(self, report):
        if report.failed:
            with open("red", "a") as file:
                file.write(report.nodeid.split("::")[1].split("[")[0] + "\n")


def red_tests(name, mutated, *flags, first=(), papers=()):
    """The names of the paper's tests (or of these papers') that fail with this text in the place of its file; those in `first` run first."""
    with tempfile.TemporaryDirectory() as folder:
        for path in HERE.glob("*.py"):
            shutil.copy(path, folder)
        shutil.copytree(HERE / "tests", Path(folder) / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        (Path(folder) / name).write_text(mutated)
        return run_pytest(folder, *(f"tests/test_{paper}" for paper in papers or [name]), *flags, first=first)


def run_pytest(folder, *flags, first=()):
    """The names of the tests that fail in this folder, run in a fork, which has torch imported already."""
    child = os.fork()
    if child == 0:
        code = 3
        try:
            os.setsid()
            os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"                       # others' plugins take longer to load than a paper's tests to run
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1), os.dup2(nowhere, 2)
            os.chdir(folder)
            ours = (HERE, HERE / "tests", HERE / "experiments")
            for key, module in list(sys.modules.items()):                            # what the caller imported is not what is to be tested
                if Path(getattr(module, "__file__", None) or "none").parent in ours:
                    del sys.modules[key]
            sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() not in ours]
            code = int(pytest.main(["-q", "-p", "no:cacheprovider", *flags], plugins=[Red(first)]))
        finally:
            os._exit(code)
    until, red = time.time() + SECONDS, Path(folder) / "red"
    while time.time() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return set() if os.waitstatus_to_exitcode(status) == 0 else set(red.read_text().split("\n")[:-1]) if red.exists() else {"it cannot be imported"}
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return {f"no end in {SECONDS} s"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=PAPERS, help="paper files; default all five")
    parser.add_argument("--sample", type=int, default=10 ** 9, help="at most so many mutants of each file, at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="name all survivors, with the reason where they are equivalent")
    parser.add_argument("--out", default=str(HERE / "mutants.jsonl"), help="results so far")
    arguments = parser.parse_args()
    jobs, out = [], Path(arguments.out)
    torch.set_num_threads(1)
    for name in arguments.files:
        source = (HERE / name).read_text()
        version, tests = (hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in (HERE / name, HERE / f"tests/test_{name}"))
        some = mutants(source)
        random.Random(arguments.seed).shuffle(some)
        jobs += [dict(file=name, version=version, tests=tests, line=line, text=text, change=change, mutated=mutated, which=hashlib.sha256(mutated.encode()).hexdigest()[:12]) for line, text, change, mutated in some[:arguments.sample]]
    key = lambda job: (job["file"], job["version"], job["which"])
    known = {key(result): result for result in map(json.loads, out.read_text().splitlines() if out.exists() else [])}
    left = [job for job in jobs if key(job) not in known or known[key(job)]["noticed_by"] is None and known[key(job)]["tests"] != job["tests"]]
    print(f"{len(jobs)} mutants, {len(left)} to try", flush=True)
    children = []
    for k in range(arguments.processes):
        child = os.fork()
        if child == 0:
            seen = [result for result in known.values() if result["noticed_by"]]
            for job in left[k::arguments.processes]:
                near = sorted((result for result in seen if result["file"] == job["file"]), key=lambda result: abs(result["line"] - job["line"]))
                red = red_tests(job["file"], job["mutated"], "-x", first=dict.fromkeys(result["noticed_by"] for result in near))   # what noticed its neighbours
                result = {name: value for name, value in job.items() if name != "mutated"} | dict(noticed_by=next(iter(red), None))
                seen += [result] if red else []
                with open(out, "a") as file:
                    file.write(json.dumps(result) + "\n")
                if result["noticed_by"] is None:
                    print(f"{job['file']}:{job['line']}: {job['change']}\n    {job['text']}", flush=True)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    known = {key(result): result for result in map(json.loads, out.read_text().splitlines())}
    print("file | mutants | equivalent | noticed | of the others")
    worst = 1.0
    for name in arguments.files:
        own = [known[key(job)] | dict(change=job["change"]) for job in jobs if job["file"] == name]
        alive = [result for result in own if result["noticed_by"] is None]
        reason = lambda result: (found := EQUIVALENT.get((name, result["text"]), {})).get(result["change"]) or found.get(None)
        same = [result for result in alive if reason(result)]
        share = 1 - (len(alive) - len(same)) / max(1, len(own) - len(same))
        worst = min(worst, share)
        print(f"{name} | {len(own)} | {len(same)} | {len(own) - len(alive)} | {share:.1%}")
        for result in alive if arguments.list else ():
            print(f"    line {result['line']}: {result['change']}: {reason(result) or 'not noticed'}")
    return int(worst < 0.95)


if __name__ == "__main__":
    sys.exit(main())
