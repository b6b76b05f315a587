"""A chat in the terminal, on a tiny model: what is typed, commands, Ctrl-C, a full context; how answers are drawn."""

from __future__ import annotations

import io
import json
import os
import random
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from test_cli import TEMPLATE
from tiny_models import CONFIGS, write_model

from cupaged import LLM, InvalidArgument, SamplingParams
from cupaged.chat.conversation import Conversation, chat
from cupaged.chat.input import MAX_HISTORY, Entry, entries
from cupaged.chat.view import MarkdownView
from cupaged.cli import main

CONTEXT = 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("model"), {**CONFIGS["llama-gqa"], "max_position_embeddings": CONTEXT})
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
    return folder


@pytest.fixture
def llm(folder) -> LLM:
    return LLM(folder, device="cpu", max_num_seqs=1)


def talk(llm: LLM, *lines: str, max_tokens: int = 6, sampling: dict | None = None, **kwargs) -> list[str]:
    """Say these lines through stdin; the answers."""
    answers = [""]

    def write(text: str) -> None:
        if text == "\n":
            answers.append("")
        else:
            answers[-1] += text

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "stdin", io.TextIOWrapper(io.BytesIO("".join(f"{line}\n" for line in lines).encode()), encoding="latin-1")
        )
        chat(llm, params(max_tokens, **(sampling or {})), write, **kwargs)
    return answers[:-1]


def params(max_tokens: int, **kwargs) -> SamplingParams:
    fixed = {"max_tokens": max_tokens, "ignore_eos": True, "skip_special_tokens": False, "stop": ["\n"]}
    return SamplingParams(**{"temperature": 0, **fixed, **kwargs})


def answer(llm: LLM, *messages: str, system: str | None = None, max_tokens: int = 6) -> str:
    """What the model says to a whole conversation at once, in another LLM."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(messages)]
    turns = [{"role": "system", "content": system}] * (system is not None) + turns
    return LLM(llm.path, device="cpu").chat(turns, params(max_tokens))[0].outputs[0].text


def test_answers_follow_from_the_whole_conversation(llm):
    first, second = talk(llm, "hellö", "", "more")
    assert first == answer(llm, "hellö")
    assert second == answer(llm, "hellö", first, "more") != answer(llm, "more")


def test_a_turn_prefills_only_what_is_new(llm, capsys):
    talk(llm, "a question of forty bytes, more or less.", "and another", stats=True)
    first, second = [line for line in capsys.readouterr().err.splitlines() if "cached" in line]
    tokens = int(first.split()[0])
    assert ", 0 of them cached" in first
    assert f", {tokens // 16 * 16} of them cached" in second or f", {(tokens // 16 + 1) * 16} of them cached" in second


def test_reset_and_system(llm, capsys):
    answers = talk(
        llm, "hello", "/reset", "hello", "/system Be brief", "/reset", "hello", "/system", "/reset", "hello", system=None
    )
    plain, brief = answer(llm, "hello"), answer(llm, "hello", system="Be brief")
    assert answers == [plain, plain, brief, plain]
    assert brief != plain
    assert talk(llm, "hello", system="Be brief") == [brief]


@pytest.mark.parametrize("end", ["/quit", None])
def test_quit_and_the_end_of_input_leave(llm, end):
    assert talk(llm, "hello", *([end, "more"] if end else [])) == [answer(llm, "hello")]


def test_save_writes_json_or_markdown(llm, tmp_path):
    said = talk(llm, "hello", f"/save {tmp_path / 'a b.json'}", f"/save {tmp_path / 'talk.md'}", system="Be brief")
    saved = json.loads((tmp_path / "a b.json").read_text(encoding="utf-8"))
    assert [(m["role"], m["content"]) for m in saved["messages"]] == [
        ("system", "Be brief"),
        ("user", "hello"),
        ("assistant", said[0]),
    ]
    markdown = (tmp_path / "talk.md").read_text(encoding="utf-8")
    assert markdown == f"**system**\n\nBe brief\n\n**user**\n\nhello\n\n**assistant**\n\n{said[0]}\n"


def test_save_overwrites_only_when_told_to(llm, tmp_path):
    path = tmp_path / "talk.md"
    path.write_text("precious")
    with pytest.raises(InvalidArgument, match="/save!"):
        talk(llm, "hello", f"/save {path}")
    assert path.read_text() == "precious"
    talk(llm, "hello", f"/save! {path}")
    assert "hello" in path.read_text(encoding="utf-8")
    with pytest.raises(InvalidArgument, match="no ordinary file"):
        talk(llm, f"/save! {tmp_path}")
    assert os.listdir(tmp_path) == ["talk.md"]


def test_several_lines_are_one_question(llm):
    question = answer(llm, "one\n  two")
    assert (
        talk(llm, "one\\", "  two")
        == talk(llm, '"""one', '  two"""', "")
        == talk(llm, '"""', "one", "  two", '"""')
        == [question]
    )
    assert talk(llm, '"""/help"""') == [answer(llm, "/help")]


@pytest.mark.parametrize("lines", [['"""one', "two"], ["one\\"], ['"""']])
def test_a_question_that_does_not_end_is_refused(llm, lines):
    with pytest.raises(InvalidArgument, match="ends within a question"):
        talk(llm, *lines)


def test_undo_forgets_the_last_question(llm):
    first, more = talk(llm, "hello", "more")
    assert talk(llm, "hello", "more", "/undo", "more") == [first, more, more]
    assert talk(llm, "hello", "/undo", "more")[1] == answer(llm, "more")
    with pytest.raises(InvalidArgument, match="no question"):
        talk(llm, "hello", "/undo", "/undo")


def test_undo_after_turns_were_dropped(llm):
    conversation = Conversation(llm, params(6))
    for i in range(8):
        conversation.ask(f"{i} " + "x" * 60, lambda text: None)
    assert conversation.num_dropped
    while conversation.turns:
        conversation.undo()
    conversation.ask("hello", lambda text: None)
    assert conversation.turns[-1]["content"] == answer(llm, "hello")


def test_regenerate_draws_another_answer_to_the_same_question(llm, caplog):
    drawn = {"temperature": 1.0, "seed": 5}
    first, *others, third = talk(llm, "hello", "/regenerate", "/regenerate", "/undo", "hello", sampling=drawn, max_tokens=12)
    assert len({first, *others}) == 3
    assert third == others[1]  # draws go on from the last seed; the question stands alone again
    assert talk(llm, "hello", "/regenerate", sampling=drawn, max_tokens=12) == [first, others[0]]  # a seed repeats them all
    assert "same" not in caplog.text
    assert talk(llm, "hello", "/regenerate") == [answer(llm, "hello")] * 2
    assert "same" in caplog.text
    with pytest.raises(InvalidArgument, match="no question"):
        talk(llm, "/regenerate")


def test_regenerate_keeps_the_old_answer_where_nothing_new_comes(llm, monkeypatch):
    conversation = Conversation(llm, params(6))
    conversation.ask("hello", lambda text: None)
    turns = list(conversation.turns)

    def fail(*args):
        raise InvalidArgument("no")

    monkeypatch.setattr(llm, "stream", fail)
    with pytest.raises(InvalidArgument):
        conversation.regenerate(lambda text: None)
    assert conversation.turns == turns


def test_stats_tell_the_use_of_the_context_and_can_be_switched(llm, capsys):
    talk(llm, "hello", "/stats", "hello", "/stats", "hello", stats=True)
    lines = [line for line in capsys.readouterr().err.splitlines() if "cached" in line]
    assert len(lines) == 2
    for line in lines:
        prompt, generated = int(line.split()[0]), int(re.search(r"(\d+) tokens(;| at)", line)[1])
        assert f"context {prompt + generated} of {CONTEXT} (" in line


@pytest.mark.parametrize(
    ("line", "says"), [("/save", "/save FILE"), ("/save no/such/folder/x", "no/such"), ("/sing a song", "/sing")]
)
def test_commands_that_cannot_be_obeyed(llm, line, says):
    with pytest.raises(InvalidArgument, match=says):
        talk(llm, line)


def test_help_lists_the_commands(llm, capsys):
    assert talk(llm, "/help") == []
    shown = capsys.readouterr().err
    commands = ("/regenerate", "/undo", "/reset", "/system", "/stats", "/save", "/help", "/quit")
    assert all(command in shown for command in commands)


def test_a_model_without_a_template_cannot_chat(tmp_path):
    with pytest.raises(InvalidArgument, match="no chat template"):
        talk(LLM(write_model(tmp_path, CONFIGS["llama-gqa"]), device="cpu"), "hello")


def test_the_oldest_turns_make_room(llm, caplog, tmp_path):
    questions = [f"{i} " + "x" * 60 for i in range(12)]
    answers = talk(llm, *questions, f"/save {tmp_path / 'all.json'}")
    assert len(answers) == 12
    assert "no longer seen" in caplog.text
    assert len(json.loads((tmp_path / "all.json").read_text())["messages"]) == 24  # /save keeps what the model has lost
    turns = [text for pair in zip(questions, answers, strict=True) for text in pair][:-1]
    assert answers[-1] in [
        answer(llm, *turns[first:]) for first in range(len(turns) - 7, len(turns), 2)
    ]  # it answers to the newest turns


def test_a_question_longer_than_the_context_leaves_no_trace(llm):
    conversation = Conversation(llm, params(6))
    with pytest.raises(InvalidArgument, match=str(CONTEXT)):
        conversation.ask("x" * 500, lambda text: None)
    assert conversation.turns == []
    assert llm.pool_stats().used_blocks == 0


def test_ctrl_c_keeps_what_was_said(llm):
    conversation, said = Conversation(llm, params(200)), []

    def write(text: str) -> None:
        said.append(text)
        if len(said) == 3:
            raise KeyboardInterrupt

    output, cut = conversation.ask("hello", write)
    assert (cut, output.outputs[0].finish_reason) == (True, "abort")
    assert conversation.turns[1:] == [{"role": "assistant", "content": "".join(said)}]
    assert llm.pool_stats().used_blocks == 0


@pytest.mark.parametrize("at", [1, 2, 5, 9, 14, 23])
def test_ctrl_c_in_the_middle_of_a_step_harms_nothing(llm, monkeypatch, at):
    """The interrupt arrives inside the forward pass: blocks come back, and nothing half computed is reused."""
    from cupaged.ops import numpy as ops

    calls, norm_swiglu = [], ops.norm_swiglu

    def interrupted(*args):
        calls.append(None)
        if len(calls) == at:
            raise KeyboardInterrupt
        return norm_swiglu(*args)

    conversation = Conversation(llm, params(20))
    question = "a question that fills more than one block of the pool"
    monkeypatch.setattr(ops, "norm_swiglu", interrupted)
    output, cut = conversation.ask(question, lambda text: None)
    assert cut
    assert [turn["content"] for turn in conversation.turns[1:]] == [output.outputs[0].text] * bool(output.outputs[0].text)
    assert len(conversation.turns) != 1  # a question without an answer is forgotten
    assert llm.pool_stats().used_blocks == 0
    conversation.reset()
    conversation.ask(question, lambda text: None)
    assert conversation.turns[1]["content"] == answer(llm, question, max_tokens=20)


def test_bytes_that_are_not_text_end_a_scripted_chat(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"na\xefve\n"), encoding="latin-1"))
    assert main(["chat", "--model", str(folder), "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "UTF-8" in err


def test_rich_is_imported_by_a_chat_on_a_terminal_only():
    code = "import sys, cupaged.chat.conversation, cupaged.cli; print({'rich', 'markdown_it', 'readline'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# ---- what is typed


@pytest.fixture
def typed(monkeypatch):
    """Types lines at the prompts of `entries` and gives what comes of them; an exception is raised where it stands."""
    pytest.importorskip("readline")

    def type_lines(history: Path, *lines: str | type[BaseException]) -> list[Entry]:
        waiting = iter([*lines, EOFError])

        def read(prompt: str) -> str:
            line = next(waiting)
            if not isinstance(line, str):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)
        return list(entries(history))

    return type_lines


def test_history_outlives_the_session(typed, tmp_path):
    import readline

    history = tmp_path / "new" / "folder" / "history"
    questions = ["hellö", "/stats", '"""two\nlines"""', "pasted\nlines"]
    assert typed(history, questions[0], "", "/stats", "/stats", '"""two', 'lines"""', "pasted\nlines\n") == [
        ("hellö", False),
        ("/stats", True),
        ("/stats", True),
        ("two\nlines", False),
        ("pasted\nlines", False),
    ]
    readline.clear_history()
    typed(history)
    assert [readline.get_history_item(i + 1) for i in range(readline.get_current_history_length())] == questions
    assert os.name != "posix" or history.stat().st_mode & 0o777 == 0o600
    assert os.listdir(history.parent) == ["history"]


def test_history_keeps_the_newest_entries_that_can_be_read(typed, tmp_path):
    history = tmp_path / "history"
    history.write_bytes(b"".join(b'"%d"\n' % i for i in range(MAX_HISTORY + 9)) + b'\xff\n17\n"half')
    typed(history, "new")
    kept = [json.loads(line) for line in history.read_text().splitlines()]
    assert kept == [*(str(i) for i in range(9, MAX_HISTORY + 9)), "new"]
    assert os.name != "posix" or history.stat().st_mode & 0o777 == 0o600


def test_a_history_that_cannot_be_kept_is_no_error(typed, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert typed(tmp_path / "file" / "history", "hello") == [("hello", False)]
    assert typed(tmp_path, "hello") == [("hello", False)]  # a folder
    assert [record for record in caplog.records if record.levelname != "DEBUG"] == []


def test_ctrl_c_drops_what_is_being_typed(typed, tmp_path):
    assert typed(tmp_path / "history", "one\\", KeyboardInterrupt, '"""two', KeyboardInterrupt, "three") == [("three", False)]
    assert typed(tmp_path / "history", '"""half') == []  # Ctrl-D


# ---- how answers are drawn


class Screen:
    """A terminal that knows what MarkdownView writes, for characters of one column; it reflows lines when it is resized."""

    def __init__(self, columns: int, rows: int) -> None:
        self.size = columns, rows
        self.lines = [["", False]]  # (a row's characters, whether it goes on in the next), from the first that scrolled off
        self.top = self.x = self.y = 0

    def write(self, text: str) -> None:
        for up, erase, other in re.findall(r"\x1b\[(\d+)A|(\x1b\[J)|\x1b\[[\d;]*m|([^\x1b])", text):
            if up:
                self.y = max(self.top, self.y - int(up))
            elif erase:
                self.lines[self.y] = [self.lines[self.y][0][: self.x], False]
                del self.lines[self.y + 1 :]
            elif other == "\r":
                self.x = 0
            elif other == "\n":
                self._down(wrapped=False)
            elif other:
                if self.x == self.size[0]:
                    self._down(wrapped=True)
                row = self.lines[self.y]
                row[0] = row[0][: self.x].ljust(self.x) + other + row[0][self.x + 1 :]
                self.x += 1

    def _down(self, wrapped: bool) -> None:
        self.lines[self.y][1] = wrapped
        self.x, self.y = 0, self.y + 1
        if self.y == len(self.lines):
            self.lines.append(["", False])
        self.top = max(self.top, len(self.lines) - self.size[1])

    def resize(self, columns: int, rows: int) -> None:
        text, self.size, self.lines = self.text(), (columns, rows), []
        for line in text.split("\n"):
            self.lines += [[line[at : at + columns], True] for at in range(0, max(1, len(line)), columns)]
            self.lines[-1][1] = False
        self.y, self.x = len(self.lines) - 1, len(self.lines[-1][0])
        self.top = max(0, len(self.lines) - rows)

    def text(self) -> str:
        """All that was written and is there still, what has scrolled off too, as lines."""
        return "".join(row + "\n" * (not wrapped) for row, wrapped in self.lines)[:-1]


def draw(pieces: list[str], screen: Screen, after_each=lambda: None) -> str:
    console = Console(force_terminal=True, color_system="standard")
    view = MarkdownView(screen.write, console, lambda: screen.size, pause=0)
    for piece in pieces:
        view.add(piece)
        after_each()
    view.close()
    return screen.text()


def markdown(rng: random.Random) -> str:
    def words(count: int) -> str:
        return " ".join("".join(rng.choices("abcdefgh", k=rng.randint(1, 9))) for _ in range(count))

    def inline() -> str:
        forms = ["%s", "%s", "**%s**", "`%s`", "*%s*", "[%s](http://a.b/c)"]
        return " ".join(rng.choice(forms) % words(rng.randint(1, 5)) for _ in range(rng.randint(1, 6)))

    def block() -> str:
        some = range(1, rng.randint(2, 14))
        return rng.choice(
            [
                inline(),
                "\n".join(inline() for _ in some),
                "#" * rng.randint(1, 4) + " " + words(3),
                "```python\n" + "\n".join("    " * rng.randint(0, 2) + words(rng.choice([0, 2, 12])) for _ in some) + "\n```",
                "\n".join("- " + inline() + "\n  - nested" * rng.randint(0, 2) for _ in some),
                "\n".join(f"{i}. {inline()}" for i in some),
                "> " + inline() + "\n> " + inline(),
                "---",
            ]
        )

    return "\n\n".join(block() for _ in range(rng.randint(1, 6)))


def cut(text: str, rng: random.Random) -> list[str]:
    at = sorted(rng.sample(range(len(text)), len(text) // 4))
    return [text[begin:end] for begin, end in zip([0, *at], [*at, len(text)], strict=True)]


@pytest.mark.parametrize("seed", range(25))
def test_an_answer_that_streams_ends_up_as_one_drawn_at_once(seed):
    """In what has scrolled off too: nothing twice, nothing missing, on screens that most blocks do not fit on."""
    rng = random.Random(seed)
    text, size = markdown(rng), (rng.choice([30, 40, 80]), rng.choice([8, 24]))
    assert draw(cut(text, rng), Screen(*size)) == draw([text], Screen(*size))


@pytest.mark.parametrize("seed", range(15))
def test_resizing_loses_nothing(seed):
    rng = random.Random(seed)
    text, screen = markdown(rng), Screen(80, 24)

    def resize() -> None:
        if rng.random() < 0.03:
            screen.resize(rng.choice([20, 30, 40, 80]), rng.choice([5, 8, 24]))

    drawn = iter(draw(cut(text, rng), screen, resize))
    assert all(letter in drawn for letter in filter(str.isalnum, draw([text], Screen(80, 24))))


def test_how_markdown_looks():
    text = (
        "# One\nTo **be** or `not`:\n- a\n- b\n  1. c\n\n```python x\ndef f():\n\treturn 1\n```\n[link](http://a.b) <b>html</b>"
    )
    assert draw([text], Screen(40, 24)).split("\n") == [
        *["One", "", "To be or not:", "", " • a", " • b", "    1. c", ""],
        *["```python x", "def f():", "    return 1", "```", ""],
        *["link (http://a.b) <b>html</b>", "", ""],
    ]


def test_marks_do_not_flash():
    screen, seen = Screen(60, 24), []
    text = "Text\n- **bold** and *it* and `code`\n- **more\n  bold**\n\n1. x\n\n---\nend"
    draw(list(text), screen, lambda: seen.append(screen.text()))
    assert [shown for shown in seen if re.search(r"[*`#>]|^-[^-]", shown, re.M)] == []


@pytest.mark.parametrize(
    "text", ["- ", "> " * 50 + "deep", "[x]: http://a", "![alt](http://a)", "| a |\n|---|\n", "```", "&copy <i>"]
)
def test_nothing_that_is_said_is_hidden(text):
    drawn = draw(list(text), Screen(20, 5))
    assert drawn.strip()
    assert all(word in drawn for word in re.findall(r"[a-z]{3,}", text))


def test_escape_sequences_of_a_model_reach_no_terminal():
    written = []
    view = MarkdownView(written.append, Console(force_terminal=True), lambda: (0, 0))
    view.add("a\x1b]52;c;x\x07b\x9bc\x00`\x1b[2J`")
    view.close()
    assert not set("".join(written)) & set("\x07\x9b\x00")
    assert "\x1b[2J" not in "".join(written).replace("\x1b[J", "")
    assert "\x1b]" not in "".join(written)


class Terminal:
    """A chat that runs in a pseudo-terminal, in a process of its own."""

    def __init__(self, folder: Path, home: Path, *options: str) -> None:
        import pty

        words = ["chat", "--model", str(folder), "--device", "cpu", *options]
        self.pid, self.handle = pty.fork()
        if self.pid == 0:
            os.environ |= {"PYTHONPATH": str(Path(__file__).parents[1]), "CUPAGED_HOME": str(home), "TERM": "xterm"}
            os.execv(sys.executable, [sys.executable, "-m", "cupaged", *words])
        self.screen = b""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self.handle)  # hangs up on a child that is still there

    def type(self, keys: bytes) -> None:
        os.write(self.handle, keys)

    def wait_for(self, pattern: bytes, typing: bytes = b"") -> bytes:
        """What matches, once it is there; `typing` is typed first, and again where nothing has come of it for seconds."""
        deadline = time.monotonic() + 30
        self.type(typing)
        while (match := re.search(pattern, self.screen)) is None:
            assert time.monotonic() < deadline, self.screen
            if select.select([self.handle], [], [], 3)[0]:
                self.screen += os.read(self.handle, 1 << 16)
            else:
                self.type(typing)
        self.screen = self.screen[match.end() :]
        return match[0]

    def leave(self) -> None:
        self.type(b"\x04")
        assert os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]) == 0


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("form", [[], ["--plain"]])
def test_in_a_terminal(folder, tmp_path, form):
    """A typed question, Ctrl-C in its answer, Ctrl-C at the prompt, a wrong command, several lines, Ctrl-D; and once more."""
    long = shutil.copytree(folder, tmp_path / "long")  # a context that takes seconds to fill
    config = json.loads((long / "config.json").read_text())
    (long / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 20000}))
    (long / "generation_config.json").write_text(json.dumps({"eos_token_id": []}))  # nothing ends it
    home = tmp_path / "home"
    with Terminal(long, home, "--temperature", "1", "--seed", "1", "--stats", *form) as terminal:
        terminal.wait_for(b"> ")
        terminal.type(b"hello\n")
        terminal.wait_for(rb"hello\r\n\x1b\[\?2004l\r\n?")
        terminal.wait_for(rb"[^\r\n]{3}")
        terminal.type(b"\x03")
        assert int(terminal.wait_for(rb"\d+ tokens at").split()[0]) < 19000
        terminal.wait_for(b"> ")
        terminal.type(b"half a line")
        terminal.wait_for(b"half a line")
        terminal.wait_for(b"Ctrl-D or /quit leaves", typing=b"\x03")  # Python may miss it on its way back to waiting for keys
        terminal.wait_for(b"> ")
        terminal.type(b"/sing\n")
        terminal.wait_for(b"there is no command /sing")
        terminal.wait_for(b"> ")
        terminal.type(b"\xff\n")
        terminal.wait_for(b"not text")
        terminal.wait_for(b"> ")
        terminal.type(b"/system\tBe brief,\\\n")
        terminal.wait_for(rb"\.\.\. ")
        terminal.type(b"and kind.\n")
        terminal.wait_for(b"system message is set")
        terminal.wait_for(b"> ")
        terminal.type(b"\x1b[200~/system pasted\ntwice\x1b[201~\n")
        terminal.wait_for(b"system message is set")
        terminal.wait_for(b"> ")
        terminal.leave()
    with Terminal(long, home, *form) as terminal:
        terminal.wait_for(b"> ")
        terminal.type(b"\x1b[A" * 3 + b"\n")
        terminal.wait_for(b"there is no command /sing")
        terminal.wait_for(b"> ")
        terminal.leave()
    history = [json.loads(line) for line in (home / "chat_history.jsonl").read_text().splitlines()]
    assert history == ["hello", "/sing", "/system\tBe brief,\\\nand kind.", "/system pasted\ntwice", "/sing"]
