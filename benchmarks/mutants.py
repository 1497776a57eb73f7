"""Mutation testing: each mutant is one small fault in a module, and the tests that name the module should find it.

python -m benchmarks.mutants chat/prompt.py tests/test_prompt.py [TESTS ...] [--lines FROM TO]

Mutants: a comparison, a logical or arithmetic operator turned round, a number or text changed, a condition negated, an
argument or a statement left out, a returned value lost. They run one after the other in a copy of the repository.
Prints those that survive, to be read, and the share that was killed. Types, docstrings and errors' texts stay.
"""

import argparse
import ast
import copy
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LEFT_OUT = shutil.ignore_patterns(".venv*", ".git", "runs", "__pycache__", "node_modules")
OPPOSITE: dict[type, type] = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult,
    ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.LShift: ast.RShift,
}  # fmt: skip
TIMEOUT = 120.0  # seconds of the tests of one mutant; one that takes longer counts as killed


def variants(node: ast.AST) -> Iterator[ast.AST | None]:
    """What may stand in place of a node; None where a statement is left out."""
    changed: Any
    if isinstance(node, ast.Compare):
        for n, op in enumerate(node.ops):
            changed = copy.deepcopy(node)
            changed.ops[n] = OPPOSITE[type(op)]()
            yield changed
    elif isinstance(node, ast.BoolOp | ast.BinOp) and type(node.op) in OPPOSITE:
        changed = copy.deepcopy(node)
        changed.op = OPPOSITE[type(node.op)]()
        yield changed
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield ast.Constant(node.value + "!" if node.value else "!")
    elif isinstance(node, ast.If | ast.IfExp | ast.While):
        changed = copy.deepcopy(node)
        changed.test = ast.UnaryOp(ast.Not(), changed.test)
        yield changed
    elif isinstance(node, ast.Return) and node.value:
        yield ast.Return(ast.Constant(None))
    elif isinstance(node, ast.Call) and node.keywords:
        for n in range(len(node.keywords)):
            changed = copy.deepcopy(node)
            del changed.keywords[n]
            yield changed
    elif isinstance(node, ast.Expr | ast.Assign | ast.AugAssign | ast.Raise | ast.Break | ast.Continue):
        yield None


def skipped(tree: ast.Module) -> set[int]:
    """The ids of nodes that are not mutated: annotations, docstrings, what only type checkers read, errors' texts."""
    found: set[int] = set()

    def skip(node: ast.AST | None) -> None:
        found.update(id(each) for each in ast.walk(node)) if node else None

    for node in ast.walk(tree):
        for name in ("annotation", "returns"):
            skip(getattr(node, name, None))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skip(node)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            skip(node.exc)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            skip(node)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "cast":
            skip(node.args[0])
    return found


class Put(ast.NodeTransformer):
    """Puts one variant in place of the node at a position of the walk."""

    def __init__(self, target: ast.AST, variant: ast.AST | None) -> None:
        self.target, self.variant = target, variant

    def visit(self, node: ast.AST) -> ast.AST:
        """The variant at the target; every other node as it is."""
        return (self.variant or ast.Pass()) if node is self.target else self.generic_visit(node)


def mutants(source: str) -> Iterator[tuple[int, str, str]]:
    """Line, what was changed, and the whole source, for each mutant."""
    count = sum(1 for _ in ast.walk(ast.parse(source)))
    for n in range(count):
        tree = ast.parse(source)
        node = list(ast.walk(tree))[n]
        if id(node) in skipped(tree):
            continue
        before = ast.unparse(node).split("\n")[0]
        for variant in list(variants(node)):
            fresh = ast.parse(source)
            target = list(ast.walk(fresh))[n]
            after = ast.unparse(variant).split("\n")[0] if variant else "(left out)"
            changed = ast.fix_missing_locations(Put(target, variant).visit(fresh))
            yield getattr(node, "lineno", 0), f"{before}  →  {after}", ast.unparse(changed)


def killed(checkout: Path, tests: list[str]) -> bool:
    """Whether the tests fail on the checkout as it is."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    try:
        ran = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return True
    return ran.returncode != 0


def main() -> None:
    """Run the mutants of a module, print the survivors and the share that was killed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mutants", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("module", help="as chat/prompt.py")
    parser.add_argument("tests", nargs="+", help="files of tests, or pytest's other arguments")
    parser.add_argument("--lines", type=int, nargs=2, default=(1, 10**6), metavar=("FROM", "TO"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "checkout"
        shutil.copytree(ROOT, checkout, ignore=LEFT_OUT)
        if killed(checkout, args.tests):
            sys.exit("The tests fail without any mutant. Mend them first.")
        source = (ROOT / args.module).read_text(encoding="utf-8")
        found = [mutant for mutant in mutants(source) if args.lines[0] <= mutant[0] <= args.lines[1]]
        survivors = 0
        for line, change, mutated in found:
            (checkout / args.module).write_text(mutated, encoding="utf-8")
            if not killed(checkout, args.tests):
                survivors += 1
                print(f"survived  {args.module}:{line}  {change}", flush=True)
    share = f"{1 - survivors / len(found):.1%}" if found else "none to kill"
    print(f"{args.module}: {len(found) - survivors} of {len(found)} mutants killed ({share})")


if __name__ == "__main__":
    main()
