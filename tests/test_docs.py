"""Runs every page of docs/, with a tiny model in place of the default one, and builds the site."""

import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

import qjax
from tests import markdown
from tests.markdown import ROOT, Page

DOCS = ROOT / "docs"
PAGES = [Page(path) for path in sorted(DOCS.rglob("*.md"))]
TEXTS = [Page(ROOT / "CONTRIBUTING.md"), *PAGES]
RUN = [page for page in PAGES if page.blocks("python", "bash")]


def name(page: Page) -> str:
    return str(page.path.relative_to(ROOT).with_suffix(""))


@pytest.mark.usefixtures("default_model", "own_loggers")
@pytest.mark.parametrize("page", RUN, ids=name)
def test_page_runs(
    page: Page, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    markdown.run_page(page, monkeypatch, lm_eval=bool(request.config.getoption("--peer")))


@pytest.mark.parametrize("page", TEXTS, ids=name)
def test_blocks(page: Page) -> None:
    markdown.check_blocks(page)


@pytest.mark.parametrize("page", TEXTS, ids=name)
def test_named_files_exist(page: Page) -> None:
    """Files of the repository stand as code in the pages: a site has no links to them."""
    folders = [entry.name for entry in ROOT.iterdir() if entry.is_dir() and entry.name[0] != "."]
    files = re.compile(rf"({'|'.join(folders)})/[\w./-]*")
    named = [code for code in page.code() if files.fullmatch(code)]
    assert [code for code in named if not (ROOT / code).exists()] == []


def test_links_of_contributing_lead_somewhere() -> None:
    (page,) = (page for page in TEXTS if page not in PAGES)
    targets = [target for target in page.links() if "://" not in target]
    assert all((ROOT / target.partition("#")[0]).exists() for target in targets)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. Strict: a link or an anchor that leads nowhere is an error, as is a page that
    the navigation leaves out."""
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    assert not built.returncode, built.stderr
    return folder


def test_reference_has_every_public_name(site: Path) -> None:
    inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    entries = {line.split()[0] for line in zlib.decompress(inventory).decode().splitlines()}
    assert set(qjax.__all__) <= {entry.removeprefix("qjax.") for entry in entries}


@pytest.mark.parametrize("exported", qjax.__all__)
def test_public_names_are_explained(exported: str) -> None:
    assert (getattr(qjax, exported).__doc__ or "").strip()


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("qjax generat hello", "no 'generat'"),
        ("qjax generate hello --max-token 3", "No such option"),
        ("qjax generate hello --max-tokens", "requires an argument"),
        ("qjax eval ppl smollm2-135m another", "too much"),
    ],
)
def test_wrong_commands_are_caught(command: str, reason: str) -> None:
    (words,) = markdown.commands(command)
    with pytest.raises(Exception, match=reason):
        markdown.check_command(words)


def test_commands_are_taken_apart() -> None:
    script = "A=1 qjax a 'b # c' \\\n  --d  # e 'f\nfor i in 1; do qjax g $i & done; wait\n"
    assert markdown.commands(script) == [
        ["A=1", "qjax", "a", "b # c", "--d"],
        ["for", "i", "in", "1"],
        ["do", "qjax", "g", "$i"],
        ["done"],
        ["wait"],
    ]
