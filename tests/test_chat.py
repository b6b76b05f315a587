"""A chat in the terminal, on a tiny model: history, commands, what Ctrl-C and a full context do."""

from __future__ import annotations

import io
import json
import os
import re
import select
import shutil
import sys
import time
from pathlib import Path

import pytest
from test_cli import TEMPLATE
from tiny_models import CONFIGS, write_model

from cupaged import LLM, InvalidArgument, SamplingParams
from cupaged.chat import Conversation, chat
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


def talk(llm: LLM, *lines: str, max_tokens: int = 6, **kwargs) -> list[str]:
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
        chat(llm, params(max_tokens), write, **kwargs)
    return answers[:-1]


def params(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, skip_special_tokens=False, stop=["\n"])


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


@pytest.mark.parametrize(
    ("line", "says"), [("/save", "/save FILE"), ("/save no/such/folder/x", "no/such"), ("/sing a song", "/sing")]
)
def test_commands_that_cannot_be_obeyed(llm, line, says):
    with pytest.raises(InvalidArgument, match=says):
        talk(llm, line)


def test_help_lists_the_commands(llm, capsys):
    assert talk(llm, "/help") == []
    shown = capsys.readouterr().err
    assert all(command in shown for command in ("/reset", "/system", "/save", "/help", "/quit"))


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

    calls, swiglu = [], ops.swiglu

    def interrupted(*args):
        calls.append(None)
        if len(calls) == at:
            raise KeyboardInterrupt
        return swiglu(*args)

    conversation = Conversation(llm, params(20))
    question = "a question that fills more than one block of the pool"
    monkeypatch.setattr(ops, "swiglu", interrupted)
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


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_in_a_terminal(folder, tmp_path):
    """A typed question, Ctrl-C in its answer, Ctrl-C at the prompt, a wrong command, Ctrl-D."""
    import pty

    long = shutil.copytree(folder, tmp_path / "long")  # a context that takes seconds to fill
    config = json.loads((long / "config.json").read_text())
    (long / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 20000}))
    (long / "generation_config.json").write_text(json.dumps({"eos_token_id": []}))  # nothing ends it
    words = ["chat", "--model", str(long), "--device", "cpu", "--temperature", "1", "--seed", "1", "--stats"]
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
        os.execv(sys.executable, [sys.executable, "-m", "cupaged", *words])
    screen = b""

    def wait_for(pattern: bytes) -> bytes:
        nonlocal screen
        deadline = time.monotonic() + 20
        while (match := re.search(pattern, screen)) is None:
            assert select.select([terminal], [], [], max(0, deadline - time.monotonic()))[0], screen
            screen += os.read(terminal, 1 << 16)
        screen = screen[match.end() :]
        return match[0]

    try:
        wait_for(b"> ")
        os.write(terminal, b"hello\n")
        wait_for(b"hello\r\n(.|\n)")
        os.write(terminal, b"\x03")
        assert int(wait_for(rb"\d+ tokens( at .*)?\r\n").split()[0]) < 19000
        wait_for(b"> ")
        os.write(terminal, b"half a line\x03")
        wait_for(b"Ctrl-D or /quit leaves")
        wait_for(b"> ")
        os.write(terminal, b"/sing\n")
        wait_for(b"there is no command /sing")
        wait_for(b"> ")
        os.write(terminal, b"\xff\n")
        wait_for(b"not text")
        wait_for(b"> ")
        os.write(terminal, b"/system\tBe brief.\n")
        wait_for(b"system message is set")
        wait_for(b"> ")
        os.write(terminal, b"\x04")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        os.close(terminal)  # hangs up on a child that is still there
