"""OpenAI's request and response bodies: JSON objects in, prompts and SamplingParams out, and the way back.

Fields as in the API reference of chat completions and completions, plus those of vLLM that name a sampling parameter. A field
that is not known is ignored; one that is known, would change the answer and cannot be obeyed is refused.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cupaged.errors import InvalidArgument
from cupaged.structured import constraint

if TYPE_CHECKING:
    from cupaged.checkpoint.tokenizer import Tokenizer
    from cupaged.engine.outputs import CompletionOutput, Logprob, RequestOutput
    from cupaged.llm import LLM, Prompt
    from cupaged.model.sampling import SamplingParams

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MAX_N = 128  # completions of one prompt
MAX_LOGPROBS = 20  # alternatives to a token
COMPLETION_TOKENS = 16  # of a completion (not of a chat) that names no max_tokens; the API's default
SAMPLING = (
    "temperature",
    "top_p",
    "n",
    "seed",
    "stop",
    "presence_penalty",
    "frequency_penalty",
    "max_tokens",
    # vLLM's
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
    "stop_token_ids",
    "skip_special_tokens",
)
# field -> the values beside null that ask for nothing
_REFUSED: dict[str, tuple] = {
    "tools": ([],),
    "functions": ([],),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
}


def parse(llm: LLM, url: str, body: dict[str, Any], seed: int | None = None) -> tuple[list[Prompt], SamplingParams]:
    """The prompts of a request body (more than one only where a completion has a list of them) and how to continue them.

    What the body leaves open follows `LLM.default_sampling_params`, and `seed`.

    Raises:
        InvalidArgument: a field is missing, wrong, or asks for what there is not.
    """
    given = {name: value for name, value in body.items() if value is not None}
    for name, idle in _REFUSED.items():
        if name in given and given[name] not in idle:
            raise InvalidArgument(f"{name} is {_shown(given[name])}, which is not supported here; leave it out")
    values = {name: given[name] for name in SAMPLING if name in given}
    if seed is not None:
        values.setdefault("seed", seed)
    if "logit_bias" in given:
        values["logit_bias"] = _logit_bias(given["logit_bias"])
    logprobs = _num_logprobs(url, given)
    if logprobs is not None:
        values["logprobs"] = logprobs
    if url == CHAT:
        prompts = [{"prompt_token_ids": llm.tokenizer.encode_chat(_messages(given.get("messages")))}]
        if "max_completion_tokens" in given:
            values["max_tokens"] = given["max_completion_tokens"]
    else:
        prompts = _prompts(given.get("prompt"))
        values.setdefault("max_tokens", COMPLETION_TOKENS)
    if "response_format" in given:
        limited = constraint(llm, given["response_format"])
        if limited is not None and given.get("min_tokens"):
            raise InvalidArgument("min_tokens may forbid the end of an answer that is whole; leave it out with response_format")
        values["logits_processors"] = [] if limited is None else [limited]
    params = llm.default_sampling_params(**values)
    if params.n > MAX_N:
        raise InvalidArgument(f"n is {params.n}; give at most {MAX_N}")
    return prompts, params


def answer(
    url: str, body: dict[str, Any], outputs: Sequence[RequestOutput], request_id: str, model: str, tokenizer: Tokenizer
) -> dict[str, Any]:
    """The response body for the finished outputs of all prompts of a request; `model` is named where the body names none."""
    choices, num_logprobs = [], _num_logprobs(url, body)
    for output in outputs:
        for completion in output.outputs:
            choice: dict[str, Any] = {"index": len(choices)}
            if url == CHAT:
                choice["message"] = {"role": "assistant", "content": completion.text, "refusal": None}
            else:
                choice["text"] = completion.text
            choice["logprobs"] = None if num_logprobs is None else _logprobs(url, completion, num_logprobs, tokenizer)
            choices.append({**choice, "finish_reason": completion.finish_reason})
    kind = "chat.completion" if url == CHAT else "text_completion"
    return {**_head(url, kind, request_id, body.get("model") or model), "choices": choices, "usage": usage(outputs)}


class Chunks:
    """The pieces of a streamed answer, as the outputs of a request's prompts grow.

    The first piece of a chat's choice names the role, the last one of every choice its finish_reason.
    """

    def __init__(self, url: str, body: dict[str, Any], request_id: str, model: str, tokenizer: Tokenizer) -> None:
        self._url, self._num_logprobs, self._tokenizer = url, _num_logprobs(url, body), tokenizer
        kind = "chat.completion.chunk" if url == CHAT else "text_completion"
        self._head = _head(url, kind, request_id, body.get("model") or model)
        self._usage = {"usage": None} if (body.get("stream_options") or {}).get("include_usage") else {}
        self._shown: dict[int, tuple[int, int]] = {}  # by choice: characters, tokens
        self._ended: set[int] = set()
        self._outputs: dict[int, RequestOutput] = {}

    def of(self, number: int, output: RequestOutput) -> list[dict[str, Any]]:
        """What is new in the output of prompt `number`."""
        self._outputs[number] = output
        chunks = []
        for completion in output.outputs:
            index = number * len(output.outputs) + completion.index
            if index in self._ended:
                continue
            num_shown, num_tokens = self._shown.get(index, (0, 0))
            text = completion.text[num_shown:]
            length = 0 if self._num_logprobs is None else len(completion.token_ids)  # asked for, it is a copy of all of them
            logprobs = None
            if length > num_tokens:
                logprobs = _logprobs(self._url, completion, self._num_logprobs, self._tokenizer, num_tokens)
            if index not in self._shown and self._url == CHAT:
                chunks.append(self._chunk(index, {"delta": {"role": "assistant", "content": ""}}))
            if text or logprobs:
                chunks.append(self._chunk(index, self._content(text), logprobs))
            if completion.finish_reason is not None:
                self._ended.add(index)
                nothing = {"delta": {}} if self._url == CHAT else {"text": ""}
                chunks.append(self._chunk(index, nothing, finish_reason=completion.finish_reason))
            self._shown[index] = (len(completion.text), length)
        return chunks

    def last(self) -> list[dict[str, Any]]:
        """The usage, if it was asked for."""
        return [{**self._head, "choices": [], "usage": usage(list(self._outputs.values()))}] if self._usage else []

    def _content(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}} if self._url == CHAT else {"text": text}

    def _chunk(
        self, index: int, content: dict[str, Any], logprobs: dict | None = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._head, "choices": [choice], **self._usage}


def usage(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """Tokens read and written for the outputs of all prompts of a request."""
    prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    completion_tokens = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(output.metrics.num_cached_tokens for output in outputs)},
    }


def _head(url: str, kind: str, request_id: str, model: str) -> dict[str, Any]:
    prefix = "chatcmpl" if url == CHAT else "cmpl"
    return {"id": f"{prefix}-{request_id}", "object": kind, "created": int(time.time()), "model": model}


# ---- what is asked


def _messages(messages: object) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise InvalidArgument(f'messages is {_shown(messages)}; give at least one {{"role": ..., "content": ...}}')
    result = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InvalidArgument(f'messages[{index}] is {_shown(message)}; give {{"role": "user", "content": "..."}}')
        result.append({**message, "content": _text(message.get("content"), f"messages[{index}].content")})
    return result


def _text(content: object, where: str) -> str:
    """A message's text, given as a string or as parts of type text."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not parts:
        raise InvalidArgument(f"{where} is {_shown(content)}; give a string")
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise InvalidArgument(f'{where} holds {_shown(part)}; give parts {{"type": "text", "text": "..."}} only')
    return "".join(part["text"] for part in parts)


def _prompts(prompt: object) -> list[Prompt]:
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(item, str) or (isinstance(item, list) and item) for item in prompt):
            return prompt
        if not any(isinstance(item, (str, list, dict)) for item in prompt):
            return [prompt]  # token ids; the engine refuses those that are none
    raise InvalidArgument(f"prompt is {_shown(prompt)}; give a string, a list of token ids, or a list of these")


def _logit_bias(bias: object) -> dict[int, float]:
    """Token id -> what is added to its logit; JSON has the ids as strings."""
    try:
        return {int(token_id): value for token_id, value in bias.items()}
    except (AttributeError, ValueError):
        raise InvalidArgument(f'logit_bias is {_shown(bias)}; give {{"TOKEN ID": number, ...}}') from None


def _num_logprobs(url: str, body: dict[str, Any]) -> int | None:
    """How many alternatives to each token are wanted beside its own log-probability; None: nothing of the kind."""
    name, count = "logprobs", body.get("logprobs")
    if url == CHAT:
        if count not in (None, True, False):
            raise InvalidArgument(f"logprobs is {_shown(count)}; give true or false, and top_logprobs how many")
        if not count:
            return None
        name, count = "top_logprobs", body.get("top_logprobs") or 0
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= MAX_LOGPROBS):
        raise InvalidArgument(f"{name} is {_shown(count)}; give a whole number from 0 to {MAX_LOGPROBS}")
    return count


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


# ---- what is answered


def _logprobs(url: str, completion: CompletionOutput, count: int, tokenizer: Tokenizer, first: int = 0) -> dict[str, Any]:
    """Of the tokens from number `first` on."""

    def by_rank(step: dict[int, Logprob]) -> list[tuple[int, Logprob]]:
        return sorted(step.items(), key=lambda item: item[1].rank)

    ids, steps = completion.token_ids[first:], completion.logprobs[first:]
    chosen = [step[token_id] for step, token_id in zip(steps, ids, strict=True)]
    if url == CHAT:

        def entry(token_id: int, logprob: Logprob) -> dict[str, Any]:
            return {"token": logprob.decoded_token, "logprob": logprob.logprob, "bytes": list(tokenizer.token_bytes(token_id))}

        return {
            "content": [
                # The engine tells of the token that was drawn beside those of the highest ranks.
                {
                    **entry(token_id, own),
                    "top_logprobs": [entry(*other) for other in by_rank(step) if other[1].rank <= count],
                }
                for token_id, own, step in zip(ids, chosen, steps, strict=True)
            ],
            "refusal": None,
        }
    decoder, offsets = codecs.getincrementaldecoder("utf-8")("replace"), [0]  # a character counts once it is whole
    for token_id in completion.token_ids:
        offsets.append(offsets[-1] + len(decoder.decode(tokenizer.token_bytes(token_id))))
    return {
        "tokens": [own.decoded_token for own in chosen],
        "token_logprobs": [own.logprob for own in chosen],
        # Of tokens that read the same (parts of characters) the most probable one, entered last, stays.
        "top_logprobs": [{other.decoded_token: other.logprob for _, other in reversed(by_rank(step))} for step in steps],
        "text_offset": offsets[first:-1],
    }
