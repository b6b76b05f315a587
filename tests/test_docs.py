"""What docs/ says: names exist, links lead somewhere, code does what the page shows, figures are those of the result files."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from emulator import emulator

ROOT = Path(__file__).parent.parent
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
PATH = re.compile(r"(?<![\w/])((?:cupaged|cuda_src|docs|scripts|tests|weights)/[\w./<>*-]*)(?:::(\w+))?")
NAME = re.compile(r"[A-Za-z_][\w.]*(?:\(\))?")
SOURCES = [
    *(path for folder in ("cupaged", "cuda_src", "scripts", "tests") for path in (ROOT / folder).rglob("*")),
    *(ROOT / name for name in ("README.md", "setup.cfg")),
]


def spans(page):
    """What stands in backticks, outside of code blocks."""
    return SPAN.findall(FENCE.sub("", PAGES[page]))


def marked(mark):
    """(page, number) of every block of code below a comment `<!-- test: mark -->`, and (language, text) of it and the next."""
    found = {}
    for page, text in PAGES.items():
        places = re.finditer(rf"^<!-- test: {mark} -->\n", text, re.MULTILINE)
        for number, place in enumerate(places):
            found[f"{page} {number}"] = [match.groups() for match in FENCE.finditer(text, place.end())][:2]
    return found


@pytest.fixture(scope="module")
def words():
    """All that can be a name in the sources."""
    kinds, texts = {".py", ".cu", ".cuh", ".h", ".cpp", ".md", ".cfg"}, []
    for path in SOURCES:
        if path.suffix in kinds and path != Path(__file__):
            texts.append(path.read_text(encoding="utf-8"))
    return set(re.findall(r"\w+", "\n".join(texts)))


def test_there_are_pages():
    assert {"attention-kernel.md", "measuring.md", "new-model-family.md"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_every_path_that_is_named_exists(page):
    named = {match.groups() for span in spans(page) for match in PATH.finditer(span)}
    assert len(named) > 10
    missing = [path for path, _ in named if not list(ROOT.glob(re.sub(r"<\w+>", "*", path).rstrip("/")))]
    assert missing == []
    for path, name in named:
        if name is None:
            continue
        is_python = path.endswith(".py")
        defined = rf"^\s*(?:def|class) {name}\b|^{name}\b.*=" if is_python else rf"\b{name}\b"
        assert re.search(defined, (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), f"{path} has no {name}"


@pytest.mark.parametrize("page", PAGES)
def test_every_name_is_one_of_the_sources(page, words):
    added = {word for language, text in FENCE.findall(PAGES[page]) if language == "diff" for word in re.findall(r"\w+", text)}
    names = {span.removesuffix("()") for span in spans(page) if NAME.fullmatch(span)}
    assert len(names) > 10
    unknown = sorted(name for name in names if not set(name.split(".")) <= words | added)
    assert unknown == []


def heading(line):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", FENCE.sub("", PAGES[page])):
        if re.match(r"\w+:", target):
            continue
        path = ROOT / "docs" / (target or page)
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
            assert anchor in map(heading, headings), f"{target}#{anchor}"


EXAMPLES = marked("run") | marked("run, emulator")


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_prints_what_the_page_shows(example):
    (language, code), (shown_as, shown) = EXAMPLES[example]
    assert (language, shown_as) == ("python", "text")
    if "emulator" in code and emulator.COMPILER is None:
        pytest.skip("no C++ compiler (g++ or c++) to build the kernel with")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, example, "exec"), {"__name__": "example"})
    assert printed.getvalue() == shown


def test_the_pages_have_their_examples():
    assert [name.split()[0] for name in EXAMPLES] == ["attention-kernel.md", "measuring.md"]


# Where all layers rotate, it is Llama; where none does, Llama with positions so close that nothing turns.
TRY_OUT = """
import sys
from pathlib import Path
import numpy as np
import tiny_models
import cupaged
from cupaged import LLM

folder = Path(sys.argv[1])
assert Path(cupaged.__file__).is_relative_to(folder), cupaged.__file__

def logits(family="SmolLM3", rotates=None, **changes):
    config = {"architectures": [f"{family}ForCausalLM"], "num_hidden_layers": 4, "tie_word_embeddings": True, **changes}
    llm = LLM(tiny_models.write_model(folder / "model", tiny_models._llama(**config)), device="cpu", threads=1)
    assert family == "Llama" or llm.config.rotates == rotates, llm.config.rotates
    return llm.logits(tiny_models.prompt("smollm3")).astype(np.float64)

def distance(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)

all_rotate, none_does = logits("Llama"), logits("Llama", rope_scaling={"type": "linear", "factor": 1e9})
assert (logits(rotates=(True,) * 4, no_rope_layers=[1, 1, 1, 1]) == all_rotate).all()
assert distance(logits(rotates=(False,) * 4, no_rope_layers=[0, 0, 0, 0]), none_does) < 1e-5
mixed = logits(rotates=(True, False, True, False), no_rope_layer_interval=2)
assert min(distance(mixed, all_rotate), distance(mixed, none_does)) > 1e-2
"""


def test_the_family_that_is_added_on_the_page_works(tmp_path):
    shutil.copytree(ROOT / "cupaged", tmp_path / "cupaged", ignore=shutil.ignore_patterns("__pycache__"))
    changes = marked("apply")
    assert len(changes) == 2
    for (language, text), *_ in changes.values():
        assert language == "diff"
        file, _, hunks = text.partition("\n")
        path = tmp_path / file.removeprefix("--- ")
        changed = path.read_text(encoding="utf-8")
        for hunk in hunks.split("@@\n"):
            lines = hunk.splitlines()
            before, after = ("".join(f"{line[1:]}\n" for line in lines if line[:1] != mark) for mark in "+-")
            assert changed.count(before) == 1, f"{file} does not hold these lines (any more), or more than once:\n{before}"
            changed = changed.replace(before, after)
        path.write_text(changed, encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), str(ROOT / "tests")])
    command = [sys.executable, "-c", TRY_OUT, str(tmp_path)]
    result = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("page", PAGES)
def test_figures_are_those_of_the_result_files(page):
    """Rows of a table by their case; and the date of a file, for what is quoted from it in sentences."""
    text = PAGES[page]
    for file, date in re.findall(r"`(scripts/results/\w+\.json)` of (\d{4}-\d\d-\d\d)", text):
        known = json.loads((ROOT / file).read_text())["date"]
        assert date == known, f"{page} quotes {file} of {date}, which is of {known} now: look through its figures"
    rows = json.loads((ROOT / "scripts" / "results" / "attention_h100.json").read_text())["rows"]
    written = {f"| {row['case']} | {row['us']:.4g} us | {row['share']:.0%} |" for row in rows}
    assert set(re.findall(r"^\| (?:decode|prefill|mixed) \d.*$", text, re.MULTILINE)) <= written
