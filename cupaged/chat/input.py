"""What is typed in a chat: lines or several lines together, with editing and a history that outlives the session."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from cupaged.errors import InvalidArgument

logger = logging.getLogger("cupaged")
MAX_HISTORY = 1000  # entries that are kept from session to session
_QUOTES = '"""'


class Entry(NamedTuple):
    """What was typed up to the Enter that sends it, without its marks; one in quotes is no command, whatever it begins with."""

    text: str
    is_command: bool


def entries(history: Path | None) -> Iterator[Entry]:
    '''What a terminal is asked for, or the lines of stdin (`history` None), but for empty ones.

    A line that ends in a backslash goes on in the next, and one that begins with """ goes on until a line ends with """. On
    a terminal Ctrl-C drops what is being typed, and pasted lines stay together; the entries are kept in the file `history`.
    '''
    interactive = history is not None
    with contextlib.suppress(AttributeError):  # a test's StringIO holds text already
        sys.stdin.reconfigure(errors="strict", **({} if interactive else {"encoding": "utf-8-sig"}))
    read, keep = _editor(history) if interactive else (_next_line, lambda typed: None)
    while True:
        typed = ""
        try:
            typed = read("> ")
            while _goes_on(typed):
                typed += "\n" + read("... ")
        except UnicodeDecodeError as error:
            if not interactive:
                raise InvalidArgument(f"the input is not text ({error}); give it as UTF-8") from error
            logger.error("what was typed is not text (%s); type it again", error)
            continue
        except EOFError:
            if interactive:
                print(file=sys.stderr)
            elif typed:
                raise InvalidArgument(f"the input ends within a question; end it with {_QUOTES} or no backslash") from None
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            print(file=sys.stderr)
            logger.warning("Ctrl-D or /quit leaves")
            continue
        if typed.strip():
            keep(typed.strip("\n"))  # a paste may end in one
        if entry := _entry(typed):
            yield entry


def _goes_on(typed: str) -> bool:
    text = typed.strip()
    if text.startswith(_QUOTES):
        return not text.endswith(_QUOTES) or len(text) < 2 * len(_QUOTES)
    return typed.endswith("\\")


def _entry(typed: str) -> Entry | None:
    text = typed.strip()
    quoted = text.startswith(_QUOTES)
    text = text[len(_QUOTES) : -len(_QUOTES)].strip("\r\n") if quoted else text.replace("\\\n", "\n")
    return Entry(text, not quoted and text.startswith("/")) if text.strip() else None


def _next_line(prompt: str) -> str:
    if line := sys.stdin.readline():
        return line.rstrip("\r\n")
    raise EOFError


def _editor(history: Path) -> tuple[Callable[[str], str], Callable[[str], None]]:
    """(what asks for a line under a prompt, what keeps an entry), of readline where Python has it: Windows has none."""
    try:
        import readline
    except ImportError:
        return input, lambda typed: None
    readline.set_auto_history(False)  # an entry may have several lines
    readline.parse_and_bind("set enable-bracketed-paste on")  # Python turns it off; libedit knows it not and says nothing
    last = ""
    for last in _load(history):
        with contextlib.suppress(ValueError):  # this locale may not know its characters
            readline.add_history(last)

    def keep(typed: str) -> None:
        nonlocal last
        if typed != last:
            last = typed
            readline.add_history(typed)
            _append(history, typed)

    return input, keep


# ---- the history's file: a JSON string a line, so that entries may have several


def _load(path: Path) -> list[str]:
    """The last entries. The file is cut to them, and to what can be read, so that it does not grow for ever."""
    kept: list[str] = []
    try:
        content = path.read_bytes()
        kept = [entry for line in content.splitlines() if isinstance(entry := _parse(line), str)][-MAX_HISTORY:]
        written = b"".join(map(_line, kept))
        if written != content:
            handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
            try:
                with open(handle, "wb") as file:
                    file.write(written)
                os.replace(partial, path)
            except BaseException:
                os.unlink(partial)
                raise
    except FileNotFoundError:
        pass
    except OSError as error:
        logger.debug("cannot read or shorten the history: %s", error)
    return kept


def _append(path: Path, entry: str) -> None:
    """In one write, so that several chats at a time do not garble one another's."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(handle, _line(entry))
        finally:
            os.close(handle)
    except OSError as error:
        logger.debug("cannot keep the history: %s", error)


def _parse(line: bytes) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _line(entry: str) -> bytes:
    return json.dumps(entry).encode() + b"\n"
