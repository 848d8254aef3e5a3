"""`everybit push` with the real client of huggingface_hub, against a hub of our own on this machine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import everybit
from everybit.cli.main import main
from tests.integrations import fake_hub
from tests.integrations.fake_hub import FakeHub

pytest.importorskip("huggingface_hub")


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("push") / "overlay"
    everybit.quantize(tiny_llama, out, bits=(2, 3), progress=False)
    return out


@pytest.fixture
def overlay(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "overlay"))


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with fake_hub.running() as found:
        yield found


@pytest.fixture
def push(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Runs the command: its exit code and its last line. The client's settings, read once, are put back after."""
    from huggingface_hub import close_session, constants

    def run(endpoint: str, *args: str, token: str | None = fake_hub.TOKEN, offline: bool = False) -> tuple[int, str]:
        settings = {"ENDPOINT": endpoint, "HF_HUB_OFFLINE": offline, "HF_HUB_DISABLE_XET": True}
        for name, value in {**settings, "HF_TOKEN_PATH": str(tmp_path / "no-token")}.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", token or "")
        close_session()
        code = main(["push", *args])
        out, err = capsys.readouterr()
        assert code in (0, 2)
        return code, (err if code else out).splitlines()[-1]

    yield run
    close_session()


def test_the_whole_overlay_arrives(hub: FakeHub, push: Any, overlay: Path) -> None:
    (overlay / ".env").write_text("secret")
    (overlay / "notes").mkdir()
    (overlay / "notes" / "mine.txt").write_text("secret")
    code, said = push(hub.endpoint, str(overlay), "me/tiny", "--private", "--revision", "two-bits")
    assert (code, said) == (0, f"{hub.endpoint}/me/tiny/commit/{'1' * 40}")
    repo = hub.repos["me/tiny"]
    assert repo["private"] is True
    assert repo["branches"]["main"] == {}
    expected = {p.name: p.read_bytes() for p in overlay.iterdir() if p.is_file() and p.name != ".env"}
    assert repo["branches"]["two-bits"] == expected
    assert len(hub.objects) == 1  # the shard; the rest lies in the commit
    assert push(hub.endpoint, str(overlay), "tiny")[0] == 0  # there already; onto its default branch
    assert repo["branches"]["main"] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token": None}, "there is no token for me/tiny: run `hf auth login`"),
        ({"token": "hf_wrong"}, "me/tiny: the hub refused (Client error '401"),
        ({"token": fake_hub.READ_ONLY}, "use a token that may write there"),
        ({"offline": True}, "HF_HUB_OFFLINE is set"),
    ],
    ids=str,
)
def test_who_may_not_push_is_told_in_one_line(
    hub: FakeHub, push: Any, overlay: Path, options: dict[str, Any], message: str
) -> None:
    code, said = push(hub.endpoint, str(overlay), "me/tiny", **options)
    assert code == 2
    assert message in said
    assert not hub.objects


def test_nothing_is_sent_of_a_damaged_overlay(hub: FakeHub, push: Any, overlay: Path, tmp_path: Path) -> None:
    shard = overlay / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    code, said = push(hub.endpoint, str(overlay), "me/tiny")
    assert code == 2
    assert "its sha256 is" in said
    assert push(hub.endpoint, str(tmp_path), "me/tiny")[0] == 2
    assert hub.requests == []


def test_links_and_names_and_hubs_that_are_wrong(hub: FakeHub, push: Any, overlay: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (overlay / "link.txt").symlink_to(tmp_path / "secret")
    assert "outside the folder" in push(hub.endpoint, str(overlay), "me/tiny")[1]
    assert hub.requests == []
    (overlay / "link.txt").unlink()
    assert "huggingface_hub refused: Repo id" in push(hub.endpoint, str(overlay), "not a name!")[1]
    hub.repos["me/tiny"] = {"private": False, "branches": {"main": {}}}
    assert "me/tiny is there and public" in push(hub.endpoint, str(overlay), "me/tiny", "--private")[1]
    assert hub.repos["me/tiny"]["branches"]["main"] == {}
    (overlay / "README.md").write_text("no metadata")
    assert "Invalid metadata in README.md. - no metadata" in push(hub.endpoint, str(overlay), "me/tiny")[1]
    assert "is not reached" in push("http://127.0.0.1:9", str(overlay), "me/tiny")[1]
