"""Requests from an event loop: one thread steps the engine, and every request is an async iterator of what it has so far."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import TYPE_CHECKING

from cupaged.engine.outputs import EngineStats, RequestOutput
from cupaged.errors import CupagedError, InvalidArgument
from cupaged.model.sampling import SamplingParams

if TYPE_CHECKING:
    from cupaged.llm import LLM, Prompt

logger = logging.getLogger("cupaged")


class AsyncEngine:
    """An LLM for servers: many requests at once from the tasks of one event loop.

    A thread of its own steps the engine while there is work and sleeps while there is none. Until `close`, that thread alone
    may use the LLM: call no generate, stream or logits of it. The event loop is the one in which the first request is made;
    requests from another are refused.

        async with AsyncEngine(LLM(path)) as engine:
            async for output in engine.generate("Hello", SamplingParams(max_tokens=100)):
                print(output.outputs[0].text)

    Args:
        llm: the model, free of unfinished requests.
    """

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()  # what the thread is to do; None: end
        self._thread: threading.Thread | None = None
        # The event loop's:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._readers: dict[str, _Reader] = {}  # by request id, until the iterator ends
        self._num_requests = 0
        self._refusal: str | None = None  # why no more requests are taken
        self._cause: BaseException | None = None
        # The thread's:
        self._unfinished: set[_Reader] = set()
        self._failed = False

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """Snapshots of the request's output as it grows: text and token ids from the beginning, as in vLLM.

        A reader that is slower than the engine misses some in between, never the last one, which is `finished`. A task that is
        cancelled while it waits here, and an iterator that is closed, end the request and free its blocks before the next
        step. Where the loop over it is left early, `contextlib.aclosing` closes it at once; else Python does, when the last
        reference to it goes.

        Args:
            prompt: a string, a list of token ids, or `{"prompt_token_ids": [...]}`.
            sampling_params: default: `LLM.default_sampling_params()`.
            request_id: for `abort`; no other unfinished request's. Default: a number.
            priority: of those that wait, the smallest go first.

        Raises:
            InvalidArgument: the prompt, the parameters, the id or the event loop cannot be used.
            CupagedError: the engine is closed; or a step failed twice, which ends the engine and gives all requests this error.
        """
        reader = self._register(request_id)
        try:
            # In another thread: a long text then delays neither other tasks nor the steps.
            text, token_ids = await asyncio.to_thread(self.llm.encode_prompt, prompt)
            self._check_open()
            self._calls.put(lambda: self._add(reader, text, token_ids, sampling_params, priority))
            while True:
                output = await reader.take()
                yield output
                if output.finished:
                    return
        finally:
            del self._readers[reader.request_id]
            self._calls.put(lambda: self._end(reader))

    async def abort(self, request_id: str) -> None:
        """End a request; its blocks are free on return, and its reader gets a last output, with finish_reason "abort".

        An id that no unfinished request has is ignored.
        """
        reader = self._readers.get(request_id)
        if reader is None or self._refusal is not None:
            return
        done = asyncio.Event()

        def end() -> None:
            self._end(reader)
            self._tell(done.set)

        self._calls.put(end)
        await done.wait()

    async def check(self) -> None:
        """CupagedError where the engine is closed or has stopped."""
        self._check_open()

    async def stats(self) -> EngineStats:
        """`LLM.stats`, between two steps. CupagedError where the engine is closed or has stopped."""
        self._check_open()
        loop = asyncio.get_running_loop()
        if self._thread is None:  # nothing has been asked of it yet
            return self.llm.stats()
        future = loop.create_future()

        def count() -> None:
            stats = self.llm.stats()
            self._tell(lambda: future.done() or future.set_result(stats))

        self._calls.put(count)
        return await future

    async def close(self) -> None:
        """End all requests, whose readers get what there is with finish_reason "abort", and the thread.

        A request whose prompt is still being encoded has nothing yet: its reader gets the error that later ones get. The LLM
        may then be used directly again, and the engine no more. Harmless when it is closed already.
        """
        if self._refusal is None:
            self._refusal = "the AsyncEngine is closed; make another one"
        if self._thread is not None:
            self._calls.put(None)
            await asyncio.to_thread(self._thread.join)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # ---- in the event loop

    def _register(self, request_id: str | None) -> _Reader:
        self._check_open()
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
            # A daemon: a program that ends without `close` is not held up.
            self._thread = threading.Thread(target=self._run, name="cupaged-engine", daemon=True)
            self._thread.start()
        if loop is not self._loop:
            raise InvalidArgument("this AsyncEngine serves another event loop; make one for each loop, or use a single loop")
        if request_id is None:
            while (request_id := str(self._num_requests)) in self._readers:
                self._num_requests += 1
            self._num_requests += 1
        if not isinstance(request_id, str):
            raise InvalidArgument(f"request_id is {request_id!r}; give a string, or None for one that is made up")
        if request_id in self._readers:
            raise InvalidArgument(f"request_id is {request_id!r}, which an unfinished request has; give each its own")
        reader = self._readers[request_id] = _Reader(request_id)
        return reader

    def _check_open(self) -> None:
        if self._refusal is not None:
            raise CupagedError(self._refusal) from self._cause

    def _fail(self, cause: BaseException) -> None:
        self._refusal = f"the engine has stopped: {type(cause).__name__}: {cause}; close it and make another one"
        self._cause = cause
        for reader in self._readers.values():
            error = CupagedError(self._refusal)  # one for each: a raised exception collects the frames it passes
            error.__cause__ = cause
            reader.put(error)

    # ---- in the thread

    def _run(self) -> None:
        num_failures = 0  # steps that failed, one after the other
        try:
            while True:
                try:
                    if not self._obey_calls():
                        break
                    if self._unfinished:
                        self.llm.step()
                        num_failures = 0
                        self._publish()
                except _LoopIsGoneError:
                    raise
                except BaseException as error:
                    num_failures += 1
                    if num_failures == 1 and isinstance(error, Exception):
                        logger.warning("a step failed and is tried again: %s: %s", type(error).__name__, error)
                        continue
                    self._failed = True  # from now on calls are answered and nothing is computed
                    self._abort_all()
                    self._tell(lambda error=error: self._fail(error))
                    self._unfinished.clear()
            self._abort_all()
            self._publish()
        except _LoopIsGoneError:  # it was closed before this engine: nobody is left to tell
            self._abort_all()

    def _obey_calls(self) -> bool:
        """Do what was asked for, first waiting for it if there is nothing else to do; False: end the thread."""
        wait = not self._unfinished
        while True:
            try:
                call = self._calls.get(block=wait)
            except queue.Empty:
                return True
            if call is None:
                return False
            call()
            wait = False

    def _add(
        self, reader: _Reader, text: str | None, token_ids: list[int], params: SamplingParams | None, priority: int
    ) -> None:
        if self._failed:  # its reader has been told, or will be
            return
        try:
            reader.live = self.llm.add({"prompt_token_ids": token_ids}, params, priority)
        except Exception as error:
            self._tell(lambda error=error: reader.put(error))
            return
        reader.live.request_id = reader.request_id
        if text is not None:
            reader.live.prompt = text
        self._unfinished.add(reader)
        if reader.ended:  # aborted while its text was being encoded
            self.llm.abort(reader.live)
        if reader.live.finished:
            self._publish()

    def _end(self, reader: _Reader) -> None:
        reader.ended = True
        if reader in self._unfinished:
            self.llm.abort(reader.live)
            self._publish()

    def _abort_all(self) -> None:
        for reader in self._unfinished:
            with contextlib.suppress(Exception):  # a failed step may have left anything behind
                self.llm.abort(reader.live)

    def _publish(self) -> None:
        """Hand a snapshot of each output that has grown to its reader, in one call of the event loop for all."""
        news = []
        for reader in self._unfinished:
            live = reader.live
            grown = live.metrics.num_generated_tokens != reader.num_shown and reader.has_read
            if live.finished or grown:
                reader.num_shown = live.metrics.num_generated_tokens
                news.append((reader, _snapshot(live)))
        self._unfinished.difference_update(reader for reader, snapshot in news if snapshot.finished)
        if news:
            self._tell(lambda: [reader.put(snapshot) for reader, snapshot in news])

    def _tell(self, call: Callable[[], object]) -> None:
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError as error:
            raise _LoopIsGoneError from error


class _LoopIsGoneError(Exception):
    """The event loop was closed before the engine."""


class _Reader:
    """What stands between the thread and the task that reads a request: the newest snapshot, which holds all before it."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        # The thread's:
        self.live: RequestOutput | None = None  # the engine's own, once it has been added
        self.num_shown = 0  # generated tokens in the last snapshot
        self.ended = False
        # The event loop's:
        self._newest: RequestOutput | Exception | None = None
        self._arrived = asyncio.Event()

    @property
    def has_read(self) -> bool:
        """Whether nothing waits to be read. Read by the thread too: if it is late by one step, so is the next snapshot."""
        return self._newest is None

    def put(self, newest: RequestOutput | Exception) -> None:
        if not isinstance(self._newest, RequestOutput) or not self._newest.finished:  # nothing comes after the last one
            self._newest = newest
            self._arrived.set()

    async def take(self) -> RequestOutput:
        await self._arrived.wait()
        newest, self._newest = self._newest, None
        self._arrived.clear()
        if isinstance(newest, Exception):
            raise newest
        return newest


def _snapshot(live: RequestOutput) -> RequestOutput:
    """What the engine does not change; what it says of the prompt is shared, for that is complete before there is any."""
    twin = object.__new__(RequestOutput)  # once for each step and request, so quicker than dataclasses.replace
    outputs = [completion.snapshot() for completion in live.outputs]
    vars(twin).update(vars(live), outputs=outputs, metrics=live.metrics.snapshot())
    return twin
