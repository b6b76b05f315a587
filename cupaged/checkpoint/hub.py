"""ORG/NAME on the Hugging Face hub -> a folder in the hub's own cache, through huggingface_hub."""

from __future__ import annotations

from pathlib import Path

from cupaged.errors import FetchError

_WANTED = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
]
_UNWANTED = ["*/*", "consolidated*"]  # a `*` of the hub's patterns matches slashes too; subfolders hold other formats


def fetch_from_hub(repo_id: str) -> Path:
    """The folder of the model `repo_id` ("ORG/NAME"), its safetensors and tokenizer files downloaded if they are not cached.

    huggingface_hub does the work and honours HF_HOME, HF_TOKEN, HF_HUB_OFFLINE and HF_ENDPOINT. Raises FetchError.
    """
    # Here and not above: it takes a while to import, and reads the environment when it is.
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(repo_id, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except Exception as error:  # that of a refused, dropped or malformed answer differs between versions of huggingface_hub
        answers = (getattr(e, "response", None) for e in (error, error.__cause__))
        status = next((answer.status_code for answer in answers if answer is not None), None)
        if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
            raise FetchError(
                f"there is no folder {repo_id}, nor does the hub show a model of that name; check the spelling, and for a "
                "private model set HF_TOKEN to a token of your account"
            ) from error
        if isinstance(error, GatedRepoError) or status in (401, 403):
            raise FetchError(
                f"the hub does not let you read {repo_id}: accept its licence at https://huggingface.co/{repo_id} and set "
                "HF_TOKEN to a token of your account"
            ) from error
        if isinstance(error, LocalEntryNotFoundError) and status is None:
            offline = constants.HF_HUB_OFFLINE
            cause = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
            remedy = "unset it" if offline else "check the network (and HF_ENDPOINT, if set)"
            raise FetchError(f"there is no folder {repo_id}, nor is it in the hub's cache, and {cause}; {remedy}") from error
        reason = f"it answered {status}" if status else " ".join(str(error).split()) or type(error).__name__
        raise FetchError(f"{repo_id} could not be fetched from the hub ({reason}); try again") from error
    if not any(folder.glob("*.safetensors")):
        raise FetchError(
            f"{repo_id} has no *.safetensors weights and cupaged loads no other kind; choose a repository with them"
        )
    return folder
