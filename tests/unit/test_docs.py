"""The documentation is true: its commands parse, its links resolve, and nothing names our machines."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from everybit.cli.main import build_parser

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [path for path in (*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")) if path.is_file()]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def _blocks(page: Path, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def _commands() -> list[str]:
    """Shell lines that start with everybit, continuation lines joined."""
    blocks = [block.replace("\\\n", " ") for page in PAGES for block in _blocks(page, "sh")]
    return [line for block in blocks for line in block.splitlines() if line.startswith("everybit ")]


def _tracked() -> list[Path]:
    """Files that are in the repository or about to be; the whole tree where there is no git."""
    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    names = listing.stdout.splitlines() if listing.returncode == 0 else []
    hidden = (".git", ".venv", "build", "demo-out")
    if not names:
        names = [str(path.relative_to(REPOSITORY)) for path in REPOSITORY.rglob("*") if path.is_file()]
    return [REPOSITORY / name for name in names if Path(name).parts[0] not in hidden and (REPOSITORY / name).is_file()]


@pytest.mark.parametrize("command", _commands())
def test_commands_parse(command: str) -> None:
    args = build_parser().parse_args(shlex.split(command, comments=True)[1:])
    assert callable(args.run)


def test_the_readme_shows_every_command() -> None:
    shown = {shlex.split(command)[1] for command in _commands()}
    assert shown >= {"quantize", "generate", "inspect", "eval"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_relative_links_resolve(page: Path) -> None:
    targets = [link.partition("#")[0] for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    broken = [target for target in targets if target and not (page.parent / target).exists()]
    assert broken == []


def test_no_machine_paths_and_no_registry_hosts() -> None:
    # In pieces, so that this file does not find itself.
    places = "|".join(("work", "root", "home"))
    hosts = "|".join(("pypi", "pythonhosted", "download.pytorch", "anaconda"))
    pattern = re.compile(rf"(?<![\w.*~$)}}])/(?:{places})/\w|\b(?:{hosts})\.(?:org|com)\b")
    found = []
    for path in _tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # not a text file
        found += [f"{path.relative_to(REPOSITORY)}: {match.group()}" for match in pattern.finditer(text)]
    assert found == []
