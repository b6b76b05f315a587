"""The HTTP face: OpenAI's API over an AsyncEngine.

    request -> key, size, shape, model -> a prompt or several -> AsyncEngine -> JSON, or server-sent events as tokens come

What goes wrong is answered with {"error": {"message", "type", "param", "code"}} and the status that says whose fault it is:
400, 401, 404, 405, 408, 413 and 422 the client's, 429 too much at once, 503 the server's. A client that leaves frees its blocks
before the next step.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router

from cupaged.async_engine import AsyncEngine
from cupaged.errors import CupagedError, InvalidArgument
from cupaged.openai_format import CHAT, COMPLETIONS, Chunks, answer, parse
from cupaged.server.metrics import ServerMetrics

if TYPE_CHECKING:
    from cupaged.engine.outputs import RequestOutput

logger = logging.getLogger("cupaged")

MAX_COMPLETIONS = 1024  # of one request: prompts times n
MAX_MESSAGES = 10_000  # of one chat
BODY_SECONDS = 30  # in which a body must have come
SEND_SECONDS = 60  # in which a client must have read what was sent
GONE_SECONDS = 1  # the same once the server has ended

_Send = Callable[[dict], Awaitable[None]]
_Receive = Callable[[], Awaitable[dict]]
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class ServerOptions:
    """How to serve.

    Attributes:
        name: what clients call the model.
        api_key: what requests to /v1 must carry as `Authorization: Bearer KEY`; None: nothing.
        max_requests: at a time, running and waiting; more get 429.
        max_body_bytes: of a request; more gets 413.
        timeout: seconds that a request may take.
        grace: seconds that running requests get when the server is told to end.
        allowed_origins: of web pages whose scripts may call (CORS).
    """

    name: str
    api_key: str | None = None
    max_requests: int = 1024
    max_body_bytes: int = 4 << 20
    timeout: float = 600.0
    grace: float = 30.0
    allowed_origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("max_requests", 1), ("max_body_bytes", 1), ("timeout", 0.001), ("grace", 0)):
            if not getattr(self, name) >= least:
                raise InvalidArgument(f"{name} is {getattr(self, name)}; give at least {least}")
        if self.api_key is not None and not self.api_key.strip():
            raise InvalidArgument("api_key is empty; give a secret, or none at all")


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 429 else "rate_limit_error" if self.status == 429 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.code}}


# ---- the shapes of bodies: types only, for what is not of the right type is told apart (422) from what cannot be obeyed (400)


class _Shape(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _StreamOptions(_Shape):
    include_usage: bool | None = None


class _Generation(_Shape):
    model: str | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    response_format: dict[str, Any] | None = None


class _Completion(_Generation):
    prompt: str | list[int] | list[str | list[int]]
    logprobs: int | None = None


class _Chat(_Generation):
    messages: list[dict[str, Any]]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None


_SHAPES: dict[str, type[_Generation]] = {CHAT: _Chat, COMPLETIONS: _Completion}


# ---- the application


class Api:
    """An ASGI application over an engine, which it does not close.

    Args:
        engine: of the event loop that will run this.
        options: how to serve.
    """

    def __init__(self, engine: AsyncEngine, options: ServerOptions) -> None:
        self.engine, self.options = engine, options
        self.metrics = ServerMetrics()
        self.draining = False  # no new requests: the server is about to end
        self.ended = asyncio.Event()  # the grace is over: nothing is waited for any more
        self._num_requests = 0  # running and waiting
        self._started = int(time.time())
        routes = [
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            *(Route(url, _Endpoint(self, url), methods=["POST"]) for url in _SHAPES),
        ]
        app: Any = _Guard(self, Router(routes))
        if options.allowed_origins:
            origins = list(options.allowed_origins)
            app = CORSMiddleware(app, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"])
        self._app = app

    async def __call__(self, scope: dict, receive: _Receive, send: _Send) -> None:
        await self._app(scope, receive, send)

    def check_key(self, request: Request) -> None:
        """ApiError 401 unless a request to /v1 carries the key; how long that takes tells nothing about the key."""
        if self.options.api_key is None or not request.url.path.startswith("/v1"):
            return
        scheme, *key = request.headers.get("authorization", "").encode("latin-1").split(None, 1) or [b""]  # bytes as they came
        same = hmac.compare_digest(b"".join(key).strip(), self.options.api_key.strip().encode())
        if scheme.lower() != b"bearer" or not same:
            cause = "the API key is missing or wrong; send it as `Authorization: Bearer KEY`"
            raise ApiError(401, cause, "invalid_api_key", {"WWW-Authenticate": "Bearer"})

    async def generate(self, url: str, request: Request, receive: _Receive, send: _Send) -> None:
        """Answer a request for a completion or chat."""
        if self.draining:
            raise ApiError(503, "the server is about to end; ask another one", headers={"Retry-After": "30"})
        if self._num_requests >= self.options.max_requests:
            cause = f"{self.options.max_requests} requests are running and waiting, as many as the server takes"
            raise ApiError(429, f"{cause}; try again in a moment", "rate_limit_exceeded", {"Retry-After": "1"})
        self._num_requests += 1
        try:
            body = await self._body(request)
            shape = self._shape(url, body)
            # In another thread: a long text then delays nobody else.
            prompts, params = await asyncio.to_thread(parse, self.engine.llm, url, body)
            if len(prompts) * params.n > MAX_COMPLETIONS:
                raise ApiError(400, f"{len(prompts)} prompts with n {params.n} are asked for; {MAX_COMPLETIONS} is the most")
            outputs = self._outputs([self.engine.generate(prompt, params) for prompt in prompts])
            respond = self._stream if shape.stream else self._answer
            await _while_connected(receive, respond(url, body, outputs, send))
        finally:
            self._num_requests -= 1

    # ---- a request

    async def _body(self, request: Request) -> dict[str, Any]:
        limit = self.options.max_body_bytes
        too_large = ApiError(413, f"the body is larger than {limit} bytes; send less", headers={"Connection": "close"})
        announced = request.headers.get("content-length", "")
        if announced.isdigit() and int(announced) > limit:
            raise too_large

        async def read() -> bytes:
            data = bytearray()
            async for piece in request.stream():
                data += piece
                if len(data) > limit:
                    raise too_large
            return bytes(data)

        try:
            body = json.loads(await _in_time(read(), BODY_SECONDS, self.ended))
        except _EndedError as error:
            raise ApiError(503, "the server ended before the request had come", headers={"Connection": "close"}) from error
        except asyncio.TimeoutError as error:
            raise ApiError(408, f"the body did not come within {BODY_SECONDS} s", headers={"Connection": "close"}) from error
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body is not JSON ({error}); send a JSON object") from error
        if not isinstance(body, dict):
            raise ApiError(400, "the body is no JSON object; send one")
        return body

    def _shape(self, url: str, body: dict[str, Any]) -> _Generation:
        for name, most in (("prompt", MAX_COMPLETIONS), ("messages", MAX_MESSAGES)):  # to check them all would take seconds
            several = body.get(name)
            if isinstance(several, list) and len(several) > most and not isinstance(several[0], int):
                raise ApiError(400, f"{name} has {len(several)} entries; give {most} at most")
        try:
            shape = _SHAPES[url].model_validate(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise ApiError(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        if shape.model is not None and shape.model != self.options.name:
            raise self._no_model(shape.model)
        return shape

    async def _outputs(self, iterators: list[AsyncIterator[RequestOutput]]) -> AsyncIterator[tuple[int, RequestOutput]]:
        """(number of the prompt, its output so far) as they grow, the finished output of each in the end."""
        deadline = time.monotonic() + self.options.timeout
        pending = {asyncio.ensure_future(anext(iterator)): number for number, iterator in enumerate(iterators)}
        newest: dict[int, RequestOutput] = {}
        try:
            while pending:
                left = max(deadline - time.monotonic(), 0)
                done, _ = await asyncio.wait(pending, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    raise ApiError(503, f"the request took longer than {self.options.timeout:g} s; ask for less, or later")
                for task in done:
                    number = pending.pop(task)
                    output = newest[number] = task.result()
                    self.metrics.grown(output)
                    if output.finished and output.error is not None:
                        raise self._failure(output)
                    if not output.finished:
                        pending[asyncio.ensure_future(anext(iterators[number]))] = number
                    yield number, output
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
            for iterator in iterators:
                await iterator.aclose()
            self.metrics.ended(list(newest.values()))

    def _failure(self, output: RequestOutput) -> ApiError:
        if any(completion.finish_reason == "abort" for completion in output.outputs) and self.draining:
            return ApiError(503, "the server ended before the request did; ask another one")
        return ApiError(400, output.error)

    async def _answer(self, url: str, body: dict, outputs: AsyncIterator[tuple[int, RequestOutput]], send: _Send) -> None:
        last: dict[int, RequestOutput] = {}
        async with contextlib.aclosing(outputs):
            async for number, output in outputs:
                last[number] = output
        ordered, tokenizer = [last[number] for number in sorted(last)], self.engine.llm.tokenizer
        result = answer(url, body, ordered, uuid.uuid4().hex, self.options.name, tokenizer)
        await _respond(JSONResponse(result), send)

    async def _stream(self, url: str, body: dict, outputs: AsyncIterator[tuple[int, RequestOutput]], send: _Send) -> None:
        chunks = Chunks(url, body, uuid.uuid4().hex, self.options.name, self.engine.llm.tokenizer)
        begun = False

        async def say(*events: object) -> None:
            nonlocal begun
            if not begun:
                headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                begun = True
            texts = (event if isinstance(event, str) else json.dumps(event, ensure_ascii=False) for event in events)
            data = "".join(f"data: {text}\n\n" for text in texts).encode()
            await send({"type": "http.response.body", "body": data, "more_body": True})

        async with contextlib.aclosing(outputs):
            try:
                async for number, output in outputs:
                    await say(*chunks.of(number, output))
                await say(*chunks.last(), "[DONE]")
            except (ApiError, CupagedError) as error:
                if not begun:  # there still is a status to tell it with
                    raise
                await say((error if isinstance(error, ApiError) else ApiError(503, str(error))).body())
        await send({"type": "http.response.body", "body": b""})

    # ---- what else there is

    async def _health(self, request: Request) -> Response:
        if self.draining:
            raise ApiError(503, "the server is about to end")
        await self.engine.check()
        return JSONResponse({"status": "ok"})

    async def _metrics(self, request: Request) -> Response:
        text, content_type = self.metrics.exposition(await self.engine.stats(), self._num_requests)
        return Response(text, headers={"content-type": content_type})

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.options.name:
            raise self._no_model(name)
        return JSONResponse(self._card())

    def _no_model(self, name: str) -> ApiError:
        return ApiError(404, f"there is no model {name[:100]!r} here; ask for {self.options.name!r}", "model_not_found")

    def _card(self) -> dict[str, Any]:
        length = self.engine.llm.max_model_len
        card = {"id": self.options.name, "object": "model", "created": self._started, "owned_by": "cupaged"}
        return {**card, "max_model_len": length}


class _Endpoint:
    """An ASGI application for one URL: the answer is sent by whoever makes it."""

    def __init__(self, api: Api, url: str) -> None:
        self._api, self._url = api, url

    async def __call__(self, scope: dict, receive: _Receive, send: _Send) -> None:
        await self._api.generate(self._url, Request(scope, receive), receive, send)


class _Guard:
    """Checks the key before anything else, turns what is raised into an answer, and gives up on clients that do not read."""

    def __init__(self, api: Api, app: Router) -> None:
        self._api, self._app = api, app

    async def __call__(self, scope: dict, receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http":
            return  # websockets there are none
        status: int | None = None

        async def send_in_time(message: dict) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await _in_time(send(message), GONE_SECONDS if self._api.ended.is_set() else SEND_SECONDS)

        request = Request(scope, receive)
        try:
            self._api.check_key(request)
            await self._app({**scope, "app": self._api}, receive, send_in_time)  # with "app" it raises what it does not know
        except asyncio.CancelledError:  # the process does not wait any longer
            if status is not None or not self._api.draining:
                raise
            await _respond(_error_response(ApiError(503, "the server has ended")), send_in_time)
        except ClientDisconnect:
            status = 499  # as nginx calls it; nobody is there to be told
        except asyncio.TimeoutError:
            status = 499
            raise
        except Exception as error:
            if status is not None:
                raise
            await _respond(_error_response(error), send_in_time)
        finally:
            self._api.metrics.answered(request.url.path, status)


class _EndedError(Exception):
    """The server has ended."""


async def _in_time(work: Awaitable[_Result], seconds: float, ended: asyncio.Event | None = None) -> _Result:
    """The result; or asyncio.TimeoutError; or _EndedError, once `ended` is set.

    Up to Python 3.11 asyncio.wait_for can lose a cancellation that comes as the work ends.
    """
    task = asyncio.ensure_future(work)
    watch = [] if ended is None else [asyncio.ensure_future(ended.wait())]
    try:
        done, _ = await asyncio.wait((task, *watch), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            return task.result()
        raise _EndedError if done else asyncio.TimeoutError
    finally:
        for each in (task, *watch):
            each.cancel()


async def _while_connected(receive: _Receive, work: Awaitable[None]) -> None:
    """Do the work, unless the client leaves first: then it is cancelled."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        task.result()
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _respond(response: Response, send: _Send) -> None:
    async def nothing() -> dict:
        return {"type": "http.disconnect"}

    await response({"type": "http"}, nothing, send)


def _error_response(error: Exception) -> Response:
    if not isinstance(error, ApiError):
        if isinstance(error, HTTPException):
            known = {404: "there is nothing at this path", 405: "this path does not take that method"}
            error = ApiError(error.status_code, known.get(error.status_code, str(error.detail)), headers=error.headers)
        elif isinstance(error, InvalidArgument):
            error = ApiError(400, str(error), "context_length_exceeded" if "shorten it" in str(error) else None)
        elif isinstance(error, CupagedError):
            error = ApiError(503, str(error))
        else:
            logger.error("a request failed: %s: %s", type(error).__name__, error, exc_info=logger.isEnabledFor(logging.DEBUG))
            error = ApiError(503, f"internal error: {type(error).__name__}")
    return JSONResponse(error.body(), error.status, error.headers)
