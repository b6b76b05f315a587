"""A conversation in the terminal: what is typed is asked, what begins with a slash is a command."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cupaged.chat.input import entries
from cupaged.checkpoint.fetch import models_folder
from cupaged.errors import CupagedError, InvalidArgument

if TYPE_CHECKING:
    from cupaged.engine.outputs import RequestOutput
    from cupaged.llm import LLM
    from cupaged.model.sampling import SamplingParams

logger = logging.getLogger("cupaged")
HELP = """\
/regenerate   answer the last question anew, with another draw
/undo         forget the last question and its answer
/reset        forget the conversation
/system TEXT  answer under this system message; without TEXT, the template's own
/stats        show the figures of each answer, or stop it
/save FILE    write the conversation: JSON if FILE ends in .json, else Markdown
/save! FILE   the same, over a file that is there
/help         this list
/quit         leave, like Ctrl-D; Ctrl-C cuts an answer short
A line that ends in \\ goes on in the next; \""" begins and ends several lines."""
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
        self.num_draws = 0  # /regenerate has asked for so many, each from a seed of its own

    def messages(self, first: int = 0) -> list[dict[str, str]]:
        """The system message, if one was set, and the turns from `first` on."""
        return [*([] if self.system is None else [{"role": "system", "content": self.system}]), *self.turns[first:]]

    def ask(self, question: str, write: Callable[[str], None]) -> tuple[RequestOutput, bool]:
        """Answer, handing text to `write` as it comes; returns the output and whether Ctrl-C cut it short.

        What was said until then stays in the conversation. A question that was not answered at all leaves no trace.
        """
        said, cut, params = "", False, self.params
        if params.seed is not None and self.num_draws:
            params = dataclasses.replace(params, seed=(params.seed + self.num_draws) % 2**63)
        self.turns.append({"role": "user", "content": question})
        try:
            with contextlib.closing(self.llm.stream({"prompt_token_ids": self._prompt_ids()}, params)) as stream:
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

    def regenerate(self, write: Callable[[str], None]) -> tuple[RequestOutput, bool]:
        """Answer the last question anew, as `ask` does; the old answer stays where nothing new is said."""
        old = self._last()
        if self.params.temperature == 0:
            logger.warning("the answer will be the same: nothing is drawn at temperature 0")
        self.undo()
        before, self.num_draws = len(self.turns), self.num_draws + 1
        try:
            return self.ask(old[0]["content"], write)
        finally:
            if len(self.turns) == before:
                self.turns += old

    def undo(self) -> None:
        """Forget the last question and its answer."""
        del self.turns[-len(self._last()) :]
        self.num_dropped = min(self.num_dropped, len(self.turns))

    def _last(self) -> list[dict[str, str]]:
        if not self.turns:
            raise InvalidArgument("there is no question yet; ask one")
        return self.turns[-2:]

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

    def save(self, name: str, overwrite: bool = False) -> Path:
        """Write all turns to a file, dropped ones too, whole or not at all; InvalidArgument where that fails."""
        path = Path(os.path.realpath(os.path.expanduser(name)))
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        if path.suffix == ".json":
            text = json.dumps({"model": self.llm.path.name, "messages": self.messages()}, ensure_ascii=False, indent=2)
        else:
            text = "\n\n".join(f"**{message['role']}**\n\n{message['content']}" for message in self.messages())
        try:
            if path.exists() and not path.is_file():  # a folder, a device
                raise InvalidArgument(f"{path} is no ordinary file; give another name")
            if path.exists() and not overwrite:
                raise InvalidArgument(f"{path} is there already; type /save! {name} to overwrite it")
            try:
                partial.write_text(text + "\n", encoding="utf-8")
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            raise InvalidArgument(
                f"cannot write {path}: {error.strerror}; give a file in a folder where you may write"
            ) from error
        return path


def chat(
    llm: LLM,
    params: SamplingParams,
    write: Callable[[str], None],
    system: str | None = None,
    stats: bool = False,
    plain: bool = False,
) -> None:
    """Talk until the input ends or /quit. Answers go through `write`, remarks to the log, what a command asks for to stderr.

    On a terminal answers are rendered as Markdown unless `plain`, an error is a line and the conversation goes on, Ctrl-C
    cuts the answer or clears the line that is being typed. Where stdin or stdout is no terminal, questions are the lines of
    stdin, answers are text, and an error or Ctrl-C ends the chat.
    """
    talk = Conversation(llm, params, system)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    session = _Session(talk, write, stats, interactive, plain)
    if interactive:
        logger.warning(f"{llm.path.name}, {llm.precision} on {llm.device}; /help lists the commands")
    for entry in entries(models_folder() / "chat_history.jsonl" if interactive else None):
        try:
            if not entry.is_command:
                session.answer(functools.partial(talk.ask, entry.text))
            elif not session.obey(entry.text):
                return
        except CupagedError as error:
            if not interactive:
                raise
            logger.error("%s", error)
        except KeyboardInterrupt:  # outside of the answer itself, which `ask` cuts
            if not interactive:
                raise
            print(file=sys.stderr)


class _Session:
    """How a conversation is shown, and what its commands do."""

    def __init__(self, talk: Conversation, write: Callable[[str], None], stats: bool, interactive: bool, plain: bool) -> None:
        self.talk, self.write, self.stats, self.interactive = talk, write, stats, interactive
        self.view = None  # the room that renders, where that is wanted and can be done
        if interactive and not plain:
            from cupaged.chat import view

            self.view = view if view.can_render() else None

    def answer(self, ask: Callable[[Callable[[str], None]], tuple[RequestOutput, bool]]) -> None:
        """Show what `ask` hands to the function that it is given."""
        with _as_it_is(self.write) if self.view is None else self.view.answer(self.write) as put:
            output, cut = ask(put)
        if cut and not self.interactive:
            raise KeyboardInterrupt
        if output.outputs[0].finish_reason == "length":
            logger.warning("the answer reached the limit of its length")
        if self.stats:
            line = _stats(output, self.talk.llm.max_model_len)
            if self.view is None:
                print(line, file=sys.stderr)
            else:
                self.view.print_dim(line)

    def obey(self, line: str) -> bool:
        """Obey a line that begins with a slash; False for the one that ends the chat."""
        name, *rest = line.split(maxsplit=1)
        argument = rest[0] if rest else ""
        if name == "/quit":
            return False
        if name == "/help":
            print(HELP, file=sys.stderr)
        elif name == "/regenerate":
            self.answer(self.talk.regenerate)
        elif name == "/undo":
            self.talk.undo()
            logger.warning("the last question and its answer are forgotten")
        elif name == "/reset":
            self.talk.reset()
            logger.warning("the conversation is forgotten")
        elif name == "/system":
            self.talk.system = argument or None
            logger.warning("the system message is set" if argument else "the system message is the chat template's own again")
        elif name == "/stats":
            self.stats = not self.stats
            logger.warning("figures follow each answer" if self.stats else "no more figures")
        elif name in ("/save", "/save!"):
            if not argument:
                raise InvalidArgument(f"{name} needs the name of a file; type {name} FILE")
            logger.warning(f"wrote {self.talk.save(argument, overwrite=name == '/save!')}")
        else:
            raise InvalidArgument(f"there is no command {name}; /help lists them")
        return True


@contextlib.contextmanager
def _as_it_is(write: Callable[[str], None]) -> Iterator[Callable[[str], None]]:
    """Gives what takes an answer's text, and ends its line."""
    try:
        yield write
    except CupagedError:
        write("\n")
        raise
    write("\n")


def _stats(output: RequestOutput, context: int) -> str:
    metrics = output.metrics
    text = f"{metrics.num_prompt_tokens} prompt tokens, {metrics.num_cached_tokens} of them cached"
    if metrics.time_to_first_token is not None:
        text += f"; first token after {metrics.time_to_first_token:.2f} s"
    text += f"; {metrics.num_generated_tokens} tokens"
    text += f" at {metrics.decode_tok_s:.1f} tok/s" if metrics.decode_tok_s else ""
    used = metrics.num_prompt_tokens + metrics.num_generated_tokens
    return text + f"; context {used} of {context} ({used / context:.0%})"
