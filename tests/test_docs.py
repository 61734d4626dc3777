"""The documentation: the reference is of this code, links lead somewhere, examples compile."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *ROOT.glob("README.md")])
LINK = re.compile(r"\]\(<?([^()<>\s]+)>?(?:\s+\"[^\"]*\")?\)|(?:src|href)=\"([^\"]+)\"")
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in links, as GitHub makes it."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


def test_the_reference_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "scripts" / "reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = (DOCS / "reference.md").read_text(encoding="utf-8")
    assert written == module.page(), "run: python scripts/reference.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    for link in (a or b for a, b in LINK.findall(text)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_relative_to(ROOT), f"{page.name}: {link} leads out of the repository"
        assert target.exists(), f"{page.name}: {link} does not exist"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link} has no such heading"


def test_the_index_has_every_page() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    for page in DOCS.glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, f"{page.name} is not listed"


def test_python_examples_compile() -> None:
    page = DOCS / "python.md"
    blocks = [
        code for kind, code in FENCE.findall(page.read_text(encoding="utf-8")) if kind == "python"
    ]
    assert blocks
    for number, code in enumerate(blocks, start=1):
        compile(code, f"{page.name}, block {number}", "exec")


@pytest.mark.parametrize(
    "file", [*PAGES, *(ROOT / "benchmarks" / "results").glob("*.json")], ids=lambda file: file.name
)
def test_nothing_says_where_its_writer_has_python(file: Path) -> None:
    """Messages name the line of the model that they are about, wherever that is installed."""
    found = re.search(r"\S*[/\\]site-packages[/\\]\S*", file.read_text(encoding="utf-8"))
    assert found is None, f"{file.name} holds the path {found and found[0]}"
