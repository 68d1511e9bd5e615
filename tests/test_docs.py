"""The documentation names what exists: paths, modules and functions resolve, commands parse, Python blocks compile."""

import ast
import importlib
import io
import re
import shlex
import tokenize
from functools import cache
from pathlib import Path

import pytest
import torch
import typer

import atmc
from atmc.cli.main import app

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "atmc"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("results/**/*.md")])
MODULES = sorted(SOURCE.rglob("*.py"))
FOLDERS = ("src", "tests", "docs", "configs", "results", "benchmarks", "examples", ".ci")
PLACEHOLDERS = ("RUN", "TOPIC", "NAME", "DIR", "FILE", "FOLDER", "DEVICE", "PATH", "PAGE")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?:^(?: {4}|\t).*\n)+", re.MULTILINE)
DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")
WORD = re.compile(r"[A-Za-z_]\w*")
EXTENSIONS = {
    *("atmc", "json", "jsonl", "toml", "md", "py", "html", "c", "h"),
    *("sh", "svg", "csv", "npz", "pt", "png", "parquet", "onnx", "vnnlib"),
}


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def without_blocks(text: str) -> str:
    return INDENTED.sub("", BLOCK.sub("", text))


def exists(path: str, folder: Path) -> bool:
    """Return whether a path, perhaps with wildcards or placeholders, names something below a folder."""
    for placeholder in PLACEHOLDERS:
        path = re.sub(rf"\b{placeholder}\b", "*", path)
    return any(folder.glob(path)) if "*" in path else (folder / path).exists()


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def modules_named(name: str) -> tuple[str, ...]:
    """Return the dotted names of the modules and packages of atmc whose last part is this name."""
    files = [path.relative_to(SOURCE.parent).with_suffix("").parts for path in MODULES]
    dotted = {".".join(parts[:-1] if parts[-1] == "__init__" else parts) for parts in files}
    return tuple(sorted(module for module in dotted if module.split(".")[-1] == name))


def resolves(dotted: str) -> bool:
    """Return whether a dotted name is a module of this environment or an attribute of one."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:]:
            if not hasattr(value, part) and part not in getattr(value, "__dataclass_fields__", {}):
                return part in getattr(value, "__annotations__", {})
            value = getattr(value, part, None)
        return True
    return False


@cache
def class_members() -> frozenset[str]:
    """Return the names of the fields and methods of all classes of atmc, and of tensors: they may follow a variable."""
    names = set(dir(torch.Tensor))
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for member in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(member, ast.FunctionDef):
                    names.add(member.name)
                elif isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name):
                    names.add(member.target.id)
    return frozenset(names)


def is_stale(dotted: str) -> bool:
    """Return whether a dotted name starts with a module of atmc, and neither it nor a class of atmc has the rest."""
    first, rest = dotted.split(".", 1)
    homes = modules_named(first)
    names = [dotted, *(f"{home}.{rest}" for home in homes)]
    known = first != "atmc" and rest.split(".")[0] in class_members()
    return bool(homes or first == "atmc") and not known and not any(map(resolves, names))


@cache
def known_words() -> frozenset[str]:
    """Return every identifier of the project's Python files, and every word of their strings and of configurations."""
    words: set[str] = set()
    files = [*MODULES, *ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/*.py")]
    files += ROOT.glob("results/**/*.py")
    for path in files:
        if path == Path(__file__):
            continue
        for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
            if token.type in (tokenize.NAME, tokenize.STRING):
                words.update(WORD.findall(token.string))
    for path in [
        *ROOT.glob("results/**/*.json"),
        *ROOT.glob("**/*.toml"),
        *SOURCE.rglob("native/*"),
        ROOT / "Makefile",
    ]:
        if ".venv" not in path.parts:
            words.update(WORD.findall(path.read_text(encoding="utf-8")))
    return frozenset(words)


def looks_like_code(word: str) -> bool:
    """Return whether a word in backticks can only be an identifier: snake_case, or CamelCase of two parts."""
    return "_" in word.strip("_") or bool(re.fullmatch(r"(?:[A-Z][a-z0-9]+){2,}", word))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    wrong = []
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if target.startswith(("http:", "https:")):
            continue
        other = page.parent / path if path else page
        if not other.exists() or (anchor and anchor not in anchors(other)):
            wrong.append(target)
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_paths_exist(page):
    text = page.read_text(encoding="utf-8")
    spans = [word for span in INLINE.findall(text) for word in span.split()]
    paths = [word.rstrip(".,:;") for word in spans if word.split("/")[0] in FOLDERS and "/" in word]
    assert [path for path in paths if not exists(path, ROOT)] == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_names_exist(page):
    if page.name == "CHANGELOG.md":
        return  # it names what no longer exists, too
    wrong = []
    for span in INLINE.findall(without_blocks(page.read_text(encoding="utf-8"))):
        for word in re.split(r"[\s,;()\[\]{}=<>|'\"+*&!?:-]+", span):
            word = word.strip(".")
            if "/" in word or word.split(".")[-1] in EXTENSIONS:
                continue
            if DOTTED.fullmatch(word) and (word.startswith("atmc.") or modules_named(word.split(".")[0])):
                wrong += [word] if is_stale(word) else []
                continue
            wrong += [part for part in WORD.findall(word) if looks_like_code(part) and part not in known_words()]
    assert wrong == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_names_in_docstrings_and_comments_exist(path):
    wrong = []
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type not in (tokenize.STRING, tokenize.COMMENT):
            continue
        for word in INLINE.findall(token.string):
            word = word.removesuffix("()")
            if not DOTTED.fullmatch(word) or word.split(".")[-1] in EXTENSIONS:
                continue
            wrong += [word] if is_stale(word) else []
    assert wrong == []


def commands_of(text: str) -> list[str]:
    """Return the `atmc` command lines in the code blocks of a page, continued lines joined, comments cut off."""
    blocks = [body for language, body in BLOCK.findall(text) if language in ("", "sh", "console")]
    blocks += INDENTED.findall(BLOCK.sub("", text))
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if re.match(r"\s*(\$ )?atmc [a-z]", line)]


def check_command(line: str, *, complete: bool) -> None:
    """Raise click's UsageError if a command line does not parse; if it is not complete, options may be missing."""
    words = shlex.split(line.removeprefix("$ "), comments=True)[1:]
    group = typer.main.get_command(app)
    context = group.make_context("atmc", ["--help"], resilient_parsing=True)
    command = group.get_command(context, words[0])
    assert command is not None, f"there is no command {words[0]}"
    command.make_context(words[0], words[1:], parent=context, resilient_parsing=not complete)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_parse(page):
    text = page.read_text(encoding="utf-8")
    for line in commands_of(text):
        check_command(line, complete="..." not in line and "…" not in line and "[" not in line)
    for span in INLINE.findall(without_blocks(text)):
        if re.match(r"atmc [a-z]+( |$)", span) and not re.search(r"[…\[|]|\.\.\.", span):
            check_command(span, complete=False)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_python_blocks_compile_and_name_what_exists(page):
    for language, body in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            tree = ast.parse(body)
            for node in ast.walk(tree):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "atmc":
                    assert hasattr(atmc, node.attr) or modules_named(node.attr), f"atmc.{node.attr}"
                if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "atmc":
                    for alias in node.names:
                        assert resolves(f"{node.module}.{alias.name}"), f"{node.module}.{alias.name}"


def test_a_stale_name_is_seen():
    assert not resolves("atmc.compress.projections.keep_smallest")
    assert resolves("atmc.compress.projections.keep_largest")
    assert "keep_smallest_of_all" not in known_words()
    assert not exists("src/atmc/judge.py", ROOT)
    assert is_stale("methods.EXACT_BELOW")
    assert not is_stale("rate_control.EXACT_BELOW")
    with pytest.raises(Exception, match="No such option"):
        check_command("atmc compress --out runs/x --budgit 3", complete=True)
