"""Publishing an overlay on a Hugging Face hub, by huggingface_hub and nothing else.

The hub's address and token are that library's: HF_ENDPOINT, HF_TOKEN or `hf auth login`.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from everybit.errors import EverybitError, OutputError, SourceError, reason
from everybit.formats import Overlay
from everybit.formats.files import open_inside

_LOGIN = "run `hf auth login`, or set HF_TOKEN to a token that may write"
_ADVICE = {401: _LOGIN, 403: "use a token that may write there, or name another repository"}
_LEFT = [".*", "*.partial", "*/*"]  # an overlay is plain files of one folder; these are somebody else's


def push(folder: str | Path, repo: str, *, private: bool = False, revision: str | None = None) -> str:
    """Uploads an overlay to `repo` (NAME or ORGANIZATION/NAME, made where there is none); returns the commit's address.

    `private`: nobody else may see it; `revision`: a branch, made where there is none.

    Cost: every byte is read twice, the first time to be verified.
    Raises: FormatError, ChecksumError before anything is sent; OutputError where the hub refuses or is not reached
    """
    path = Path(folder).expanduser()
    if revision is not None and not revision.strip():
        raise SourceError("an empty revision arrived, expected a branch's name: leave it out for main")
    if get_token() is None:
        raise OutputError(f"there is no token for {repo}: {_LOGIN}")
    with Overlay.open(path) as overlay:
        overlay.verify_all()
    for file in path.iterdir():
        if file.is_symlink():  # publishing it would publish its target
            open_inside(path, file.name).close()
    api = HfApi(library_name="everybit")
    try:
        name = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
        if private and not api.model_info(name).private:
            raise OutputError(f"{name} is there and public: leave --private out, or name another repository")
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        message = "Upload an everybit overlay"
        done = api.upload_folder(
            repo_id=name, folder_path=path, revision=revision, commit_message=message, ignore_patterns=_LEFT
        )
    except HfHubHTTPError as error:
        advice = _ADVICE.get(error.response.status_code, "try again")
        raise OutputError(f"{repo}: the hub refused ({reason(error)}): {advice}") from error
    except OfflineModeIsEnabled:
        raise OutputError("HF_HUB_OFFLINE is set, expected a hub that can be reached: unset it") from None
    except ValueError as error:  # the repository's name, or the card's metadata
        raise OutputError(f"{repo}: huggingface_hub refused: {' '.join(str(error).split())}") from error
    except EverybitError:
        raise
    except Exception as error:  # of its HTTP library, which is another one from version to version
        raise OutputError(
            f"{api.endpoint} is not reached ({reason(error)}): look at the network, HF_ENDPOINT"
        ) from error
    return str(done.commit_url)
