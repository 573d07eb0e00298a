"""The shape of the house, held by tests. Each failure says what to do; a rule that is in the way is changed here."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fastckpt
from fastckpt import errors

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastckpt"
MODULES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "integrations").rglob("*.py")])

PUBLIC = {"Checkpointer", "Pending", "Snapshot", "Callback", "Options", "Topology", "RankPath"}
PUBLIC |= {"Shard", "PerRank", "RNGState", "open"}

OPTIONS = [
    "chunk_bytes",
    "codec",
    "fence",
    "fence_seconds_max",
    "staging_bytes_max",
    "writers",
    "streams",
    "read_fanout",  # bench/read_fanout
    "copy",
    "commit_seconds_max",
    "record_hosts",
]

DOCUMENTS = [
    *("README.md", "CHANGELOG.md", "fastckpt/ARCHITECTURE.md", "fastckpt/format/FORMAT.md", "integrations/README.md"),
    "tests/README.md",
]

ERRORS = {name: kind for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, Exception)}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


each_module = pytest.mark.parametrize("path", MODULES, ids=relative)


# --- the public surface --------------------------------------------------------------------------------------------


def test_public_names_are_those_promised() -> None:
    promised = PUBLIC | set(ERRORS)
    assert set(fastckpt.__all__) == promised, "ARCHITECTURE.md section 7 and this list promise the public names"
    assert len(fastckpt.__all__) == len(promised), "a name is listed twice in fastckpt.__all__"
    visible = {name for name in dir(fastckpt) if not name.startswith("_")}
    assert promised <= visible, "dir(fastckpt) is what completion shows: __dir__ lists every public name"


@pytest.mark.parametrize("name", sorted(PUBLIC | set(ERRORS)))
def test_a_public_name_resolves_and_has_a_docstring(name: str) -> None:
    public = getattr(fastckpt, name)
    assert inspect.getdoc(public), f"fastckpt.{name} needs a docstring: it is its contract"
    if name in ERRORS:
        assert public is ERRORS[name]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        fastckpt.no_such_name  # noqa: B018


LIGHT_IMPORTS = [
    "import fastckpt",
    "import fastckpt.cli.main",
    "import fastckpt; fastckpt.open",
    "import fastckpt; fastckpt.Options; fastckpt.SnapshotDamaged",
    "import fastckpt.repository, fastckpt.plan, fastckpt.format.value, fastckpt.storage, fastckpt.testing",
]


@pytest.mark.parametrize("statement", LIGHT_IMPORTS)
def test_tools_do_not_load_torch(statement: str) -> None:
    code = f"{statement}; import sys; sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert result.stderr == ""
    assert result.returncode == 0, "torch takes over a second to import; load it on first use, inside fastckpt/job"


# --- errors --------------------------------------------------------------------------------------------------------


def drawn_tree(document: str) -> dict[str, str]:
    """Child to parent, from the drawing: a base stands alone or before its children, deeper means below."""
    parents: dict[str, str] = {}
    stack: list[tuple[int, str]] = []
    drawing = document.split("\n\n")[1]
    for line in drawing.splitlines():
        depth = len(line) - len(line.lstrip())
        names = re.findall(r"\w+", line)
        while stack and stack[-1][0] >= depth:
            stack.pop()
        if stack:
            parents[names[0]] = stack[-1][1]
        stack.append((depth, names[0]))
        parents.update(dict.fromkeys(names[1:], names[0]))
    return parents


def test_the_drawn_error_tree_is_the_real_one() -> None:
    real = {name: kind.__base__.__name__ for name, kind in ERRORS.items() if kind is not errors.FastckptError}
    assert drawn_tree(errors.__doc__ or "") == real, "redraw the tree at the top of errors.py"


def an_error(kind: type[Any]) -> errors.FastckptError:
    """An error of this kind with every field set to something that is not its default."""
    values: dict[str, Any] = {
        "failures": {3: ValueError("full")},
        "missing_ranks": (1, 2),
        "offset": 7,
        "transient": True,
    }
    parameters = inspect.signature(kind.__init__).parameters
    fields = {
        name: values.get(name, f"the {name}")
        for name, parameter in parameters.items()
        if name not in ("self", "message") and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    error: errors.FastckptError = kind("what, where, what next", **fields)
    assert set(vars(error)) == set(fields), f"every argument of {kind.__name__} is a field of the same name"
    return error


@pytest.mark.parametrize("name", sorted(ERRORS))
def test_an_error_has_a_docstring_and_pickles_with_its_fields(name: str) -> None:
    kind = ERRORS[name]
    assert kind.__dict__.get("__doc__"), f"{name} needs a docstring that says when it is raised"
    error = an_error(kind)
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is kind
    assert str(back) == str(error)
    # Exceptions compare by identity, so those among the fields are compared by what they print.
    assert repr(vars(back)) == repr(vars(error)), f"{name} loses fields on its way between ranks"


# --- modules and imports -------------------------------------------------------------------------------------------


def test_imports_point_down() -> None:
    # The console script beside this interpreter, whether or not the environment is activated.
    command = Path(sys.executable).parent / "lint-imports"
    result = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, f"see `Imports point down` in ARCHITECTURE.md\n{result.stdout}{result.stderr}"


@each_module
def test_a_module_is_named_for_one_idea(path: Path) -> None:
    vague = {"utils", "util", "common", "helpers", "helper", "base", "misc"}
    assert not vague & set(path.relative_to(ROOT).with_suffix("").parts), "name it for the one idea that it holds"


@each_module
def test_a_module_says_what_lives_in_it_and_stays_readable(path: Path) -> None:
    text = path.read_text()
    assert not text.strip() or ast.get_docstring(ast.parse(text)), "open it with what lives here, and what does not"
    assert len(text.splitlines()) <= 700, "over 700 lines hold more than one idea: find the seam"


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def called(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id


@each_module
def test_nothing_in_the_package_can_run_what_it_reads(path: Path) -> None:
    tree = ast.parse(path.read_text())
    forbidden = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml"}
    assert not forbidden & {name.partition(".")[0] for name in imported(tree)}, "no pickle, anywhere"
    assert not {"eval", "exec", "compile"} & set(called(tree)), "bytes from a repository are data"
    attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    if path.name == "torch_file.py":  # reads others' files, in a child process, and only so:
        calls = [call for call in ast.walk(tree) if isinstance(call, ast.Call)]
        loads = [call for call in calls if ast.unparse(call.func) == "torch.load"]
        assert [ast.unparse(k.value) for call in loads for k in call.keywords if k.arg == "weights_only"] == ["True"]
        attributes.discard("torch.load")
    assert not {"torch.load", "torch.save"} & attributes, "torch.load and torch.save are pickle"


# --- options -------------------------------------------------------------------------------------------------------


def option_docstrings() -> dict[str, str | None]:
    """Name to the docstring under it. Python does not keep these, so they are read from the source."""
    tree = ast.parse((PACKAGE / "options.py").read_text())
    (options,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Options")
    documented: dict[str, str | None] = {}
    for node, following in zip(options.body, [*options.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            documented[node.target.id] = str(following.value.value) if is_text else None
    return documented


def test_the_list_of_options_is_frozen() -> None:
    assert list(option_docstrings()) == OPTIONS, (
        "a new option needs a measurement in which two of its values are each best somewhere; then add it here"
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_has_a_docstring(name: str) -> None:
    assert option_docstrings().get(name), f"Options.{name} needs a docstring under it"


# --- documents -----------------------------------------------------------------------------------------------------


def anchors(document: str) -> set[str]:
    """The anchors that a code host makes from headings."""
    headings = re.findall(r"^#+ +(.+)$", document, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_links(path: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target.read_text())):
            broken.append(link)
    return broken


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_in_a_document_resolve(name: str) -> None:
    assert broken_links(ROOT / name) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    document = tmp_path / "a.md"
    document.write_text("# One two\n[x](b.md) [y](#one-two) [z](#three) [w](https://example.org) [v](a.md#nowhere)\n")
    assert broken_links(document) == ["b.md", "#three", "a.md#nowhere"]


@pytest.mark.parametrize("name", ["Makefile", "LICENSE", ".ci/run"])
def test_the_root_holds_what_tools_expect(name: str) -> None:
    assert (ROOT / name).is_file()
    assert name != ".ci/run" or os.access(ROOT / name, os.X_OK), ".ci/run is executable"


def test_the_tests_import_this_checkout() -> None:
    spec = importlib.util.find_spec("fastckpt")
    assert spec is not None
    assert Path(spec.origin or "").parent == PACKAGE, "another fastckpt is installed: run `make install`"
