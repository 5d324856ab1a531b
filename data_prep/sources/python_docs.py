"""An English corpus that every installation already has: the documentation inside its Python packages.

Docstrings of modules, classes and functions of the standard library and of the packages in `PACKAGES` that are
installed, and the topics behind Python's `help()`. Sources are parsed, never imported. One document per module, in a
fixed order: the same environment gives the same documents, whatever the number of workers. Paragraphs that are mostly
code, and paragraphs that appeared before, are left out; the corpus ends with the module that takes it past `LIMIT`.
"""

from __future__ import annotations

import ast
import multiprocessing
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path

from data_prep.processors import available_processors

LIMIT = 20_000_000  # characters
SHORTEST = 400  # characters of prose below which a module makes no document

# The standard library comes first; those with the most prose per line of code follow: fewer sources to parse.
PACKAGES = (
    "numpy", "scipy", "sklearn", "pandas", "networkx", "matplotlib", "sympy", "mpmath", "nltk", "datasets",
    "huggingface_hub", "hypothesis", "joblib", "torch", "transformers", "pydantic", "fsspec", "lm_eval", "deepspeed",
    "jinja2", "werkzeug", "PIL", "fontTools",
)  # fmt: skip

_SKIPPED_FOLDERS = {
    "tests", "test", "testing", "_vendor", "__pycache__", "site-packages", "dist-packages", "idlelib", "lib2to3",
}  # fmt: skip
_LARGEST_SOURCE = 1_000_000  # generated tables

# torch and numpy attach the documentation of compiled functions by calls such as add_docstr(torch.abs, "...").
_DOCUMENTING_CALLS = {"add_docstr", "_add_docstr", "add_newdoc", "add_docstr_all"}

_COMMON_WORDS = re.compile(
    r"\b(?:the|a|an|of|to|is|are|and|in|for|that|this|if|with|or|be|by|as|not|from|which)\b", re.I
)
_ROLE = re.compile(r":[a-z:]+:`~?([^`<]*?)(?: *<[^`]*>)?`")
_QUOTED = re.compile(r"`{1,2}([^`\n]+)`{1,2}_{0,2}")
_RULE = re.compile(r"^\s*[-=~^\"'*+#.]{3,}\s*$")
_DIRECTIVE = re.compile(r"^\s*\.\. ")
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")  # escapes in docstrings may stand for these
_WORDLIKE = re.compile(r"[A-Za-z ,;'\n]")

_Module = tuple[str, list[tuple[str, list[str]]]]  # its name; its docstrings as qualified names and paragraphs


def iter_documents(workers: int | None = None) -> Iterator[tuple[str, str]]:
    """Documents as `(id, text)`, the dotted name of the module and its prose.

    Args:
        workers: processes that parse; by default one for each core this process may use, at most 8.
    """
    workers = workers or min(available_processors(), 8)
    seen: set[bytes] = set()
    characters = 0
    for name, blocks in _parsed(workers):
        text = _compose(name, blocks, seen)
        if text is not None:
            characters += len(text)
            yield name, text
        if characters >= LIMIT:
            return


def _parsed(workers: int) -> Iterator[_Module]:
    """All modules in the order of the corpus."""
    yield from _topics()
    if workers == 1:
        yield from map(_parse, _sources())
        return
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        yield from pool.imap(_parse, _sources(), chunksize=24)


def _topics() -> Iterator[_Module]:
    from pydoc_data.topics import topics

    for topic in sorted(topics):
        yield f"topics.{topic}", [("", _paragraphs(topics[topic]))]


def _sources() -> Iterator[tuple[str, str]]:
    roots = [("", Path(sysconfig.get_path("stdlib")))]
    for package in PACKAGES:
        specification = find_spec(package)
        if specification is not None and specification.submodule_search_locations:
            roots.append((package, Path(next(iter(specification.submodule_search_locations)))))
    for package, root in roots:
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(set(folders) - _SKIPPED_FOLDERS)
            for name in sorted(names):
                if name.endswith(".py"):
                    path = Path(folder, name)
                    parts = [package, *path.relative_to(root).with_suffix("").parts]
                    yield ".".join(part for part in parts if part and part != "__init__"), str(path)


def _parse(file: tuple[str, str]) -> _Module:
    name, path = file
    try:
        source = Path(path).read_bytes()
        if b'"""' not in source or len(source) > _LARGEST_SOURCE:
            return name, []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError):
        return name, []  # templates and sources for other versions of Python are no documents
    return name, [(owner, paragraphs) for owner, text in _docstrings(tree) if (paragraphs := _paragraphs(text))]


def _docstrings(node: ast.AST, owner: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = ast.get_docstring(node)
        if text:
            yield owner, text
    for child in getattr(node, "body", ()):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _docstrings(child, f"{owner}.{child.name}" if owner else child.name)
        elif isinstance(child, ast.Expr) and isinstance(child.value, ast.Call):
            yield from _documenting_call(child.value)


def _documenting_call(call: ast.Call) -> Iterator[tuple[str, str]]:
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name not in _DOCUMENTING_CALLS or not call.args:
        return
    subject = ast.unparse(call.args[0]).strip("'\"")
    for argument in call.args[1:]:
        for part in ast.walk(argument):
            if isinstance(part, ast.Constant) and isinstance(part.value, str) and len(part.value) > 80:
                yield subject, part.value


def _paragraphs(text: str) -> list[str]:
    """Paragraphs of prose in a docstring, without markup; nor those that only announce code which is left out."""
    kept: list[str] = []
    announced = False  # the last kept paragraph directly precedes this one
    for paragraph in re.split(r"\n\s*\n", _UNPRINTABLE.sub("", text.expandtabs())):
        plain = _plain(paragraph)
        if _is_prose(plain):
            kept.append(plain)
            announced = True
        elif announced:
            announced = False
            if kept[-1].endswith(":") and "\n" not in kept[-1]:
                kept.pop()
    return kept


def _plain(paragraph: str) -> str:
    if ">>>" in paragraph or paragraph.lstrip().startswith(("$ ", "%", "@", "#!")):
        return ""
    lines = [line.rstrip() for line in paragraph.split("\n")]
    lines = [line for line in lines if not _RULE.match(line) and not _DIRECTIVE.match(line)]
    margin = min((len(line) - len(line.lstrip()) for line in lines), default=0)
    plain = "\n".join(line[margin:] for line in lines).strip("\n")
    plain = _QUOTED.sub(r"\1", _ROLE.sub(r"\1", plain)).replace("::\n", ":\n")
    return plain[:-1] if plain.endswith("::") else plain


def _is_prose(paragraph: str) -> bool:
    """At least one common word in 180 characters, and few characters that are not letters."""
    words = len(_COMMON_WORDS.findall(paragraph))
    return words > 0 and words * 180 >= len(paragraph) <= len(_WORDLIKE.findall(paragraph)) / 0.85


def _compose(name: str, blocks: list[tuple[str, list[str]]], seen: set[bytes]) -> str | None:
    """The document of a module from its paragraphs that are not in `seen`, or None when little is left."""
    parts = [name]
    prose = 0
    for owner, paragraphs in blocks:
        fresh = []
        for paragraph in paragraphs:
            key = blake2b(paragraph.encode(), digest_size=12).digest()
            if key not in seen:
                seen.add(key)
                fresh.append(paragraph)
        if fresh:
            if owner:
                parts.append(owner)
            parts += fresh
            prose += sum(map(len, fresh))
    return "\n\n".join(parts) + "\n" if prose >= SHORTEST else None
