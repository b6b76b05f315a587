"""A file of requests in, a file of answers out, in the format of OpenAI's batches; a run that was killed goes on where it was.

Answers are appended to OUT.partial as they finish, and reach the disk before they count. When all are there, they are written
in the order of the requests and renamed to OUT, so that OUT is whole whenever it exists. A line's `id` is made of its
request and the model: by it a later run knows what is done, and that a file holds the answers to something else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from cupaged.errors import CupagedError, InvalidArgument
from cupaged.openai_format import CHAT, COMPLETIONS, answer, parse

if TYPE_CHECKING:
    from cupaged.engine.outputs import RequestOutput
    from cupaged.llm import LLM

logger = logging.getLogger("cupaged")


@dataclass(frozen=True)
class BatchSummary:
    """Requests in all, those whose line has an `error`, and those that were done before this run."""

    total: int
    failed: int
    done_before: int


@dataclass(eq=False)
class _Request:
    id: str
    custom_id: str | None  # None: it has none of its own
    url: str
    body: dict[str, Any]
    error: str | None  # why it cannot be run


def run_batch(source: str, target: str, model: str, load: Callable[[], LLM], max_running: int = 128) -> BatchSummary:
    """Answer every request of the file `source` in the file `target`, or what an earlier run has left of them.

    Args:
        source: one JSON object a line: custom_id, method, url (/v1/chat/completions or /v1/completions) and body.
        target: gets a line for each request, in their order: {"id", "custom_id", "response", "error"}; one of the last two is
            null.
        model: what tells this model from others; answers of another one are not taken for this one's.
        load: gives the LLM; called only if something is left to compute.
        max_running: requests that are handed to the LLM at a time.

    Raises:
        InvalidArgument: a file cannot be read or written, holds no request, or holds other answers.
    """
    source_path, target_path = Path(source), Path(target)
    requests = _read_requests(source_path, model)
    if not target_path.parent.is_dir() or (target_path.exists() and not target_path.is_file()):
        raise InvalidArgument(f"cannot write {target}; give a file in a folder that exists")
    with _only_run(target_path):
        answers = _Answers(target_path, requests, source)
        done_before = len(answers)
        try:
            pending = [request for request in requests if request.id not in answers]
            if pending:
                with _progress(len(requests), done_before) as bar:
                    _run(pending, load, answers, max_running, bar)
            answers.finish()
        except BaseException:
            done = answers.num_on_disk()
            if done:
                remark = "%d of %d requests are done and kept in %s; the same command goes on from there"
                logger.warning(remark, done, len(requests), answers.partial)
            raise
        finally:
            answers.close()
    return BatchSummary(len(requests), len(answers.failed), done_before)


def _run(requests: Iterable[_Request], load: Callable[[], LLM], answers: _Answers, max_running: int, bar: Any) -> None:
    waiting = deque(requests)
    running: dict[_Request, list[RequestOutput]] = {}
    llm, num_tokens = load(), 0
    try:
        while waiting or running:
            finished: list[tuple[_Request, dict[str, Any] | str]] = []
            while waiting and len(running) < max_running:
                request = waiting.popleft()
                try:
                    running[request] = _start(llm, request)
                except Exception as error:  # whatever it is, it is this request's alone
                    own = isinstance(error, CupagedError)
                    finished.append((request, str(error) if own else f"internal error: {type(error).__name__}: {error}"))
            if running:
                llm.step()
            for request, outputs in list(running.items()):
                if all(output.finished for output in outputs):
                    del running[request]
                    finished.append((request, _result(llm, request, outputs)))
                    num_tokens += sum(output.metrics.num_generated_tokens for output in outputs)
            if finished:
                answers.add([_line(request, result) for request, result in finished])
                seconds = bar.format_dict["elapsed"]
                if seconds:
                    bar.set_postfix_str(f"{num_tokens / seconds:.0f} tok/s", refresh=False)
                bar.update(len(finished))
    finally:
        for outputs in running.values():
            for output in outputs:
                llm.abort(output)


def _result(llm: LLM, request: _Request, outputs: list[RequestOutput]) -> dict[str, Any] | str:
    """The response body, or what went wrong."""
    errors = [output.error for output in outputs if output.error is not None]
    if errors:
        return errors[0]
    try:
        return answer(request.url, request.body, outputs, request.id, llm.path.name, llm.tokenizer)
    except Exception as error:
        return f"internal error: {type(error).__name__}: {error}"


def _start(llm: LLM, request: _Request) -> list[RequestOutput]:
    if request.error is not None:
        raise InvalidArgument(request.error)
    if request.body.get("stream"):
        raise InvalidArgument("stream is asked for, and a batch has no place for it; leave it out")
    # Without a seed of its own a request gets one that is always the same: a run can be repeated, and taken up again, exactly.
    prompts, params = parse(llm, request.url, request.body, seed=int(request.id[:15], 16))
    outputs: list[RequestOutput] = []
    try:
        for prompt in prompts:
            outputs.append(llm.add(prompt, params))
    except BaseException:
        for output in outputs:
            llm.abort(output)
        raise
    return outputs


# ---- the requests


def _read_requests(path: Path, model: str) -> list[_Request]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InvalidArgument(
            f"cannot read {path}: {error.strerror}; give a file of requests, one JSON object a line"
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{path} is not UTF-8 text ({error}); convert it to UTF-8") from error
    first_line: dict[str, int] = {}  # of each custom_id
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    requests = [_read_request(number, line, model, first_line) for number, line in lines]
    if all(request.custom_id is None for request in requests):
        cause = requests[0].error.partition(";")[0] if requests else "it is empty"
        raise InvalidArgument(f"{path} holds no request ({cause}); give one JSON object a line, as OpenAI's batches have them")
    return requests


def _read_request(number: int, line: str, model: str, first_line: dict[str, int]) -> _Request:
    def broken(error: str, custom_id: str | None = None) -> _Request:
        return _Request(_digest([model, number, line]), custom_id, "", {}, error)

    try:
        fields = json.loads(line)
        content = _digest([model, fields])
    except (ValueError, RecursionError) as error:
        return broken(f"line {number} is not JSON ({error}); write each request as one JSON object on a line of its own")
    if not isinstance(fields, dict):
        return broken(f"line {number} is no JSON object; give custom_id, method, url and body")
    custom_id, url, body = (fields.get(name) for name in ("custom_id", "url", "body"))
    if not isinstance(custom_id, str) or not custom_id:
        return broken(f"line {number} has no custom_id; give every request a string of its own")
    if custom_id in first_line:
        # Without its custom_id, by which its line would be taken for the first one's.
        first = first_line[custom_id]
        return broken(f"line {number} has the custom_id {custom_id!r} of line {first}; give every request its own")
    first_line[custom_id] = number
    if fields.get("method") != "POST":
        return broken(f"method is {fields.get('method')!r}; give 'POST'", custom_id)
    if url not in (CHAT, COMPLETIONS):
        return broken(f"url is {url!r}; give {CHAT!r} or {COMPLETIONS!r}", custom_id)
    if not isinstance(body, dict) or not body:
        return broken("body is missing or no JSON object; give the request's fields", custom_id)
    return _Request(content, custom_id, url, body, None)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


# ---- the answers


def _line(request: _Request, result: dict[str, Any] | str) -> dict[str, Any]:
    """A request's line: `result` is its response body, or what went wrong."""
    response, error = None, None
    if isinstance(result, str):
        error = {"code": "request_failed", "message": " ".join(result.split())}
    else:
        response = {"status_code": 200, "request_id": f"req_{request.id}", "body": result}
    return {"id": f"batch_req_{request.id}", "custom_id": request.custom_id, "response": response, "error": error}


class _Answers:
    """The lines that are done, by the ids of their requests: in OUT.partial, at the end in OUT.

    Args:
        target: OUT.
        requests: all of them, in their order.
        source: the name of the requests' file, for messages.

    Attributes:
        partial: OUT.partial.
        failed: ids of the lines that hold an error.
    """

    def __init__(self, target: Path, requests: list[_Request], source: str) -> None:
        self.target, self.partial = target, target.with_name(f"{target.name}.partial")
        self.failed: set[str] = set()
        self._ids, self._source = [request.id for request in requests], source
        self._custom_ids = {request.custom_id for request in requests}
        self._spans: dict[str, tuple[int, int]] = {}  # offset and length of each line in the partial file
        self._file: BinaryIO | None = None
        whole, partial = self._read(target), self._read(self.partial, torn=True)
        lines = {**whole, **partial}  # a whole file counts too: nothing may be left to do, or requests may have been added
        for id_, line in lines.items():
            self._append(id_, len(line))
        with _failing_as_argument(self.partial):
            self._write(self.partial, lines.values())  # anew: without a torn last line, with those of the whole file
            self._file = open(self.partial, "a+b")  # noqa: SIM115

    def __len__(self) -> int:
        return len(self._spans)

    def __contains__(self, id_: str) -> bool:
        return id_ in self._spans

    def add(self, lines: Iterable[dict[str, Any]]) -> None:
        """Append lines; on return they are on the disk."""
        added = []
        for fields in lines:
            line = json.dumps(fields).encode() + b"\n"
            self._file.write(line)
            added.append((_id_of(fields), len(line), fields["error"]))
        self._file.flush()
        os.fsync(self._file.fileno())
        for id_, length, error in added:
            self._append(id_, length)
            if error is not None:
                self.failed.add(id_)

    def finish(self) -> None:
        """All lines are there: write them in order to OUT, and remove the partial file."""
        self._write(self.target, map(self._line, self._ids))
        self.close()
        self.partial.unlink(missing_ok=True)

    def num_on_disk(self) -> int:
        """Lines that the next run will find, also where this one was interrupted before it counted them."""
        return self.partial.read_bytes().count(b"\n") if self.partial.exists() else 0

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            if self.partial.stat().st_size == 0:  # nothing to go on from
                self.partial.unlink()

    def _append(self, id_: str, length: int) -> None:
        offset, before = next(reversed(self._spans.values()), (0, 0))
        self._spans[id_] = (offset + before, length)

    def _line(self, id_: str) -> bytes:
        offset, length = self._spans[id_]
        self._file.seek(offset)
        return self._file.read(length)

    def _read(self, path: Path, torn: bool = False) -> dict[str, bytes]:
        """The lines of a file that an earlier run has written, if there is one; `torn`: its last line may be incomplete."""
        try:
            *lines, rest = path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise InvalidArgument(f"cannot read {path}: {error.strerror}; name another output") from error
        known, result = set(self._ids), {}
        for number, line in enumerate(lines if torn or not rest else [*lines, rest], start=1):
            try:
                fields = json.loads(line)
                id_, error = _id_of(fields), fields["error"]
            except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
                id_ = error = None
            if id_ not in known and error is not None and fields.get("custom_id") in self._custom_ids:
                continue  # that request was mended since
            if id_ not in known:
                cause = f"line {number} of {path} is no answer of this model to a request of {self._source}"
                raise InvalidArgument(f"{cause}; name another output, or delete that file to compute all anew")
            if error is not None:
                self.failed.add(id_)
            result[id_] = line + b"\n"
        return result

    def _write(self, path: Path, lines: Iterable[bytes]) -> None:
        """Replace a file by these lines, in one step."""
        temporary = path.with_name(f"{path.name}.tmp")
        with open(temporary, "wb") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path)


def _id_of(line: dict[str, Any]) -> str:
    return line["id"].removeprefix("batch_req_")


# ---- files and the terminal


def _sync_folder(path: Path) -> None:
    """Make the name of a file durable, as fsync makes its content; Windows has no such call."""
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def _failing_as_argument(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InvalidArgument(f"cannot write {path}: {error.strerror}; give a file where you may write") from error


@contextlib.contextmanager
def _only_run(target: Path) -> Iterator[None]:
    """Hold OUT.lock; the operating system lets go of it however this process ends."""
    from filelock import FileLock, Timeout

    path = target.with_name(f"{target.name}.lock")
    lock = FileLock(path)
    with _failing_as_argument(path):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InvalidArgument(f"another process is writing {target}; wait for it, or name another output") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no file that is open
            path.unlink()
        lock.release()


def _progress(total: int, done: int) -> Any:
    """A tqdm bar on stderr, shown only where that is a terminal and warnings are shown."""
    from tqdm import tqdm

    quiet = None if logger.isEnabledFor(logging.WARNING) else True  # None: where stderr is no terminal
    return tqdm(total=total, initial=done, unit="request", leave=False, disable=quiet, file=sys.stderr)
