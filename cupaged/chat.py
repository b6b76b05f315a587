"""A conversation in the terminal: what is typed is asked, what begins with a slash is a command."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cupaged.errors import CupagedError, InvalidArgument

if TYPE_CHECKING:
    from cupaged.engine.outputs import RequestOutput
    from cupaged.llm import LLM
    from cupaged.model.sampling import SamplingParams

logger = logging.getLogger("cupaged")
HELP = """\
/reset        forget the conversation
/system TEXT  answer under this system message from now on; without TEXT, under the chat template's own
/save FILE    write the conversation: as JSON if FILE ends in .json, else as Markdown
/help         this list
/quit         leave, like Ctrl-D; Ctrl-C cuts an answer short"""
_ANSWER_ROOM = 512  # tokens that are free for an answer, or old turns are dropped; at most a quarter of the context


class Conversation:
    """The turns of one chat. All are rendered for every answer: the LLM's prefix cache keeps their K/V between answers."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None = None) -> None:
        if llm.tokenizer.chat_template is None:
            raise InvalidArgument(f"{llm.path.name} has no chat template; take an instruct model, or `cupaged generate --raw`")
        self.llm, self.params, self.system = llm, params, system
        self.reset()

    def reset(self) -> None:
        self.turns: list[dict[str, str]] = []  # user and assistant in turn
        self.num_dropped = 0  # of the oldest turns, those that the model sees no more

    def messages(self, first: int = 0) -> list[dict[str, str]]:
        """The system message, if one was set, and the turns from `first` on."""
        return [*([] if self.system is None else [{"role": "system", "content": self.system}]), *self.turns[first:]]

    def ask(self, question: str, write: Callable[[str], None]) -> tuple[RequestOutput, bool]:
        """Answer, handing text to `write` as it comes; returns the output and whether Ctrl-C cut it short.

        What was said until then stays in the conversation. A question that was not answered at all leaves no trace.
        """
        said, cut = "", False
        self.turns.append({"role": "user", "content": question})
        try:
            with contextlib.closing(self.llm.stream({"prompt_token_ids": self._prompt_ids()}, self.params)) as stream:
                try:
                    for delta in stream:
                        said += delta
                        write(delta)
                except KeyboardInterrupt:
                    cut = True
            if cut and not said:
                self.turns.pop()
            else:
                self.turns.append({"role": "assistant", "content": said})
            return stream.output, cut
        except BaseException:
            self.turns.pop()
            raise

    def _prompt_ids(self) -> list[int]:
        """The conversation as token ids, without its oldest turns where it leaves too little room for an answer.

        Dropping turns changes what all later ones follow on, so that everything is computed anew. Therefore it is done
        rarely, and then down to half of the context.
        """
        context = self.llm.max_model_len
        room = min(self.params.max_tokens or _ANSWER_ROOM, context // 4)
        ids = self.llm.tokenizer.encode_chat(self.messages(self.num_dropped))
        if len(ids) + room <= context:
            return ids
        while len(ids) > context // 2 and self.num_dropped < len(self.turns) - 1:
            self.num_dropped += 2
            ids = self.llm.tokenizer.encode_chat(self.messages(self.num_dropped))
        if self.num_dropped:
            logger.warning(
                "the context of %d tokens is full: the %d oldest turns are no longer seen", context, self.num_dropped
            )
        return ids

    def save(self, name: str) -> Path:
        """Write all turns to a file, dropped ones too; InvalidArgument where that fails."""
        path = Path(name).expanduser()
        if path.suffix == ".json":
            text = json.dumps({"model": self.llm.path.name, "messages": self.messages()}, ensure_ascii=False, indent=2)
        else:
            text = "\n\n".join(f"**{message['role']}**\n\n{message['content']}" for message in self.messages())
        try:
            path.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise InvalidArgument(
                f"cannot write {path}: {error.strerror}; give a file in a folder where you may write"
            ) from error
        return path


def chat(
    llm: LLM, params: SamplingParams, write: Callable[[str], None], system: str | None = None, stats: bool = False
) -> None:
    """Talk until the input ends or /quit. Answers go through `write`, remarks to the log, what a command asks for to stderr.

    On a terminal an error is a line and the conversation goes on, Ctrl-C cuts the answer or clears the line that is being
    typed. Where stdin or stdout is no terminal, questions are the lines of stdin, and an error or Ctrl-C ends the chat.
    """
    talk = Conversation(llm, params, system)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        with contextlib.suppress(ImportError):  # Windows has none
            import readline  # noqa: F401  (importing it gives input() line editing and a history)
        logger.warning(f"{llm.path.name}, {llm.dtype} on {llm.device}; /help lists the commands")
    for line in _lines(interactive):
        try:
            if line.startswith("/"):
                if not _command(talk, line):
                    return
            elif line:
                output, cut = talk.ask(line, write)
                write("\n")
                if cut and not interactive:
                    raise KeyboardInterrupt
                if output.outputs[0].finish_reason == "length":
                    logger.warning("the answer reached the limit of its length")
                if stats:
                    print(_stats(output), file=sys.stderr)
        except CupagedError as error:
            if not interactive:
                raise
            logger.error("%s", error)
        except KeyboardInterrupt:  # outside of the answer itself, which `ask` cuts
            if not interactive:
                raise
            print(file=sys.stderr)


def _lines(interactive: bool) -> Iterator[str]:
    """What is typed, or the lines of stdin, without surrounding blanks."""
    with contextlib.suppress(AttributeError):  # a test's StringIO holds text already
        sys.stdin.reconfigure(errors="strict", **({} if interactive else {"encoding": "utf-8-sig"}))
    while True:
        try:
            line = input("> ") + "\n" if interactive else sys.stdin.readline()
        except UnicodeDecodeError as error:
            if not interactive:
                raise InvalidArgument(f"the input is not text ({error}); give it as UTF-8") from error
            logger.error("what was typed is not text (%s); type it again", error)
            continue
        except (EOFError, KeyboardInterrupt) as end:
            if not interactive:
                raise
            print(file=sys.stderr)
            if isinstance(end, EOFError):
                return
            logger.warning("Ctrl-D or /quit leaves")
            continue
        if not line:
            return
        yield line.strip()


def _command(talk: Conversation, line: str) -> bool:
    """Obey a line that begins with a slash; False for the one that ends the chat."""
    name, *rest = line.split(maxsplit=1)
    argument = rest[0] if rest else ""
    if name == "/quit":
        return False
    if name == "/help":
        print(HELP, file=sys.stderr)
    elif name == "/reset":
        talk.reset()
        logger.warning("the conversation is forgotten")
    elif name == "/system":
        talk.system = argument or None
        logger.warning("the system message is set" if argument else "the system message is the chat template's own again")
    elif name == "/save":
        if not argument:
            raise InvalidArgument("/save needs the name of a file; type /save FILE")
        logger.warning(f"wrote {talk.save(argument)}")
    else:
        raise InvalidArgument(f"there is no command {name}; /help lists them")
    return True


def _stats(output: RequestOutput) -> str:
    metrics = output.metrics
    text = f"{metrics.num_prompt_tokens} prompt tokens, {metrics.num_cached_tokens} of them cached"
    if metrics.time_to_first_token is not None:
        text += f"; first token after {metrics.time_to_first_token:.2f} s"
    text += f"; {metrics.num_generated_tokens} tokens"
    return text + (f" at {metrics.decode_tok_s:.1f} tok/s" if metrics.decode_tok_s else "")
