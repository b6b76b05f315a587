"""What a terminal shows of an answer: Markdown, rendered while it comes. Only a chat on a terminal imports this, and rich.

The text is cut at its top-level blocks (paragraphs, lists, fences). Those that are complete are printed for good and scroll
as any text does. The last one may still change: its lines are drawn again, from the first that is different. Lines that have
scrolled off the top cannot be, and are done with: a block may be taller than the screen.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import sys
import time
from collections.abc import Callable, Iterator

from markdown_it import MarkdownIt
from markdown_it.token import Token
from pygments.token import Comment, Generic, Keyword, Name, Number, String
from rich.cells import chop_cells
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, ListItem, Markdown
from rich.segment import Segment, Segments
from rich.style import Style
from rich.syntax import ANSISyntaxTheme, Syntax
from rich.text import Text
from rich.theme import Theme

# HTML is shown as it is, so are images and link definitions, which would vanish: nothing that a model says is hidden.
_PARSER = MarkdownIt("commonmark", {"html": False, "maxNesting": 40}).enable(["table", "strikethrough"])
_PARSER.disable(["image", "reference"])
_THEME = Theme(  # the terminal's own colours, few, and no background: readable on dark and light
    {
        **{"markdown.h1": "bold underline", "markdown.code": "cyan", "markdown.block_quote": "none"},
        **dict.fromkeys(("markdown.h2", "markdown.h3", "markdown.h4", "markdown.h5", "markdown.h6"), "bold"),
        **{"markdown.link": "none", "markdown.link_url": "underline", "markdown.hr": "dim"},
        **{"markdown.item.bullet": "none", "markdown.item.number": "none"},
        **{"markdown.table.border": "dim", "markdown.table.header": "bold"},
    }
)
_CODE_THEME = ANSISyntaxTheme(
    {
        **{Comment: Style(dim=True), Keyword: Style(color="blue", bold=True), Name.Builtin: Style(color="cyan")},
        **{Name.Tag: Style(color="blue"), String: Style(color="green"), Number: Style(color="magenta")},
        **{Generic.Deleted: Style(color="red"), Generic.Inserted: Style(color="green")},
    }
)
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_ONLY_MARKS = re.compile(r"[-=*_#>`~+|: \t]*|[ \t]*\d{1,3}[.)]?[ \t]*")
_STYLES = re.compile(r"\x1b\[[\d;]*m")
_PADDING = re.compile(r"(?: |\x1b\[[\d;]*m)+$")


def can_render() -> bool:
    """Whether stdout is a terminal that can move its cursor."""
    console = Console()
    return console.is_terminal and not console.is_dumb_terminal and not console.legacy_windows


def print_dim(text: str) -> None:
    """A remark on stderr."""
    Console(stderr=True).print(Text(text, "dim"), soft_wrap=True)


@contextlib.contextmanager
def answer(write: Callable[[str], None]) -> Iterator[Callable[[str], None]]:
    """Gives what takes the answer's text, piece by piece; `write` gets what is to be put on the terminal.

    What is typed meanwhile is not echoed, it would shift the lines; the next prompt gets it.
    """
    view = MarkdownView(write)
    with _no_echo():
        try:
            yield view.add
        finally:
            view.close()


class MarkdownView:
    """Draws one answer: `add` takes its text as it comes, `close` draws what is left and a blank line.

    Args:
        write: puts text on the terminal, whose cursor is at the beginning of a line.
        console: what rich knows of the terminal's colours.
        get_size: its (columns, rows) now; either is 0 where that is not known.
        pause: seconds between two drawings, at least, or as long as keeps drawing to a tenth of the time; 0 draws always.
    """

    def __init__(
        self,
        write: Callable[[str], None],
        console: Console | None = None,
        get_size: Callable[[], tuple[int, int]] = os.get_terminal_size,
        pause: float = 0.04,
    ) -> None:
        self._write, self._get_size, self._pause = write, get_size, pause
        self._console = console or Console()
        self._text = ""  # from the beginning of the last block
        self._drawn: list[str] = []  # lines of it that can be drawn again; the cursor is at the end of the last
        self._gone = 0  # size of its first lines, which cannot
        self._empty = True
        self._due = 0.0

    def add(self, text: str) -> None:
        self._text += text.translate(_CONTROLS)
        if time.monotonic() >= self._due:
            started = time.monotonic()
            self._draw(complete=False)
            ended = time.monotonic()
            self._due = ended + max(self._pause, 10 * (ended - started)) * (self._pause > 0)

    def close(self) -> None:
        self._draw(complete=True)
        if not self._empty:
            self._write("\n\n")  # a blank line before what is asked next

    def _draw(self, complete: bool) -> None:
        columns, rows = self._get_size()
        columns, rows = columns or 80, rows or 24
        self._let_go(columns, rows)  # the window may have become smaller
        lines: list[str] = []
        begin = first_line = height = 0  # of the last block: its first line on screen and in the text; height of the first
        for line_number, tokens in _blocks(self._text, complete):
            if lines:
                lines.append("")
            begin, first_line = len(lines), line_number
            lines += self._render(tokens, columns) or self._text.split("\n")[slice(*tokens[0].map)]  # nothing but marks
            height = height or len(lines)
        skip, gone = 0, self._gone
        while skip < height and gone >= _size(lines[skip]):  # what has gone in part is shown again
            gone -= _size(lines[skip])
            skip += 1
        self._gone -= gone
        old, new = self._drawn, lines[skip:]
        same = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
        output = ""
        if same < len(old):
            same = max(0, min(same, len(new) - 1))  # the cursor has to come to the end of a line
            up = sum(_rows(line, columns) for line in old[same:]) - 1
            output = "\r" + f"\x1b[{up}A" * (up > 0) + "\x1b[J"
        elif same and same < len(new):
            output = "\n"
        output += "\n".join(new[same:])
        # First the state, then the screen: Ctrl-C may come in between, but what is written is all in the buffer by then.
        if begin:
            self._text, self._gone = self._text.split("\n", first_line)[first_line], 0
        self._drawn, self._empty = new[max(0, begin - skip) :], self._empty and not new
        self._let_go(columns, rows)
        if output:
            self._write(output)

    def _let_go(self, columns: int, rows: int) -> None:
        """Forget the lines that have scrolled off the top. How much that was is counted in letters: unlike lines,
        they stay the same when the width changes."""
        height = sum(_rows(line, columns) for line in self._drawn)
        while height >= rows and len(self._drawn) > 1:
            line = self._drawn.pop(0)
            height -= _rows(line, columns)
            self._gone += _size(line)

    def _render(self, tokens: list[Token], columns: int) -> list[str]:
        """The lines of a block, with escape sequences for their styles only."""
        markdown = _Markdown("", hyperlinks=False)
        markdown.parsed = tokens
        console = self._console
        columns = max(columns, 20, 4 * max(token.level for token in tokens))  # or what is nested deeply has no room
        options = console.options.update(width=columns, height=None)
        with console.use_theme(_THEME), console.capture() as capture:
            for line in Segment.split_lines(console.render(markdown, options)):
                console.print(Segments([*line, Segment.line()]), soft_wrap=True)
        lines = [_PADDING.sub(lambda end: "\x1b[0m" * ("\x1b" in end[0]), line) for line in capture.get().split("\n")]
        filled = [i for i, line in enumerate(lines) if _STYLES.sub("", line)]
        return lines[filled[0] : filled[-1] + 1] if filled else []


def _blocks(text: str, complete: bool) -> Iterator[tuple[int, list[Token]]]:
    """(number of its first line, tokens) of each top-level block.

    Unless the text is complete, a last line that may become anything is left out ("-" under a paragraph makes it a heading,
    until it turns out to begin an item), and what is bold, italic or code and still open is closed, so that marks do not flash.
    """
    if not complete:
        start = text.rfind("\n") + 1
        if _ONLY_MARKS.fullmatch(text, start):
            text = text[:start]
    tokens = _PARSER.parse(text)
    last = next((token for token in reversed(tokens) if token.nesting == 0), None)
    if not complete and last is not None and last.type == "inline":
        last.children = _PARSER.parseInline(_closed(last.content))[0].children
    block: list[Token] = []
    for token in tokens:
        for child in token.children or ():
            if child.type == "softbreak":  # a line of a poem, more often than a line that is to be joined
                child.type = "hardbreak"
        block.append(token)
        if token.level == 0 and token.nesting != 1:
            yield block[0].map[0], block
            block = []


def _closed(inline: str) -> str:
    """The text with what is bold, italic or code at its end closed."""
    inline = inline.rstrip("*` ")
    before, tick, _ = re.sub("`[^`]*`", "", inline).partition("`")
    italic = re.search(r"(^|[\s(])\*[^\s*][^*]*$", before.replace("**", ""))
    return inline + tick + "*" * bool(italic) + "**" * (before.count("**") % 2)


def _size(line: str) -> int:
    """How much of the text a line holds: its letters and digits, at least 1."""
    return max(1, sum(map(str.isalnum, _STYLES.sub("", line))))


def _rows(line: str, columns: int) -> int:
    """Rows of the screen that a line takes."""
    return len(chop_cells(_STYLES.sub("", line), columns)) or 1


class _Heading(Heading):
    """At the left, whatever its level."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.text


class _ListItem(ListItem):
    """Its number with the point, and room for two digits: items are where they were when the tenth comes."""

    def render_number(self, console: Console, options: ConsoleOptions, number: int, last_number: int) -> RenderResult:
        segments = super().render_number(console, options, number, max(last_number, 10))
        for numeral in itertools.islice(segments, 1):
            yield Segment(f"{number}. ".rjust(len(numeral.text)), numeral.style)
        yield from segments


class _CodeBlock(CodeBlock):
    """Code between its fences, to be copied: not indented, and long lines are the terminal's to wrap."""

    @classmethod
    def create(cls, markdown: Markdown, token: Token) -> _CodeBlock:
        info = token.info.strip()
        block = cls(info.split()[0] if info else "text", markdown.code_theme)
        block.fences = [Text(fence, "dim") for fence in (token.markup + info, token.markup) if fence]
        block.nested = token.level > 0  # in a list or a quote, which crop what is too wide
        return block

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = str(self.text).removesuffix("\n").expandtabs(4)
        text = Syntax("", self.lexer_name, theme=_CODE_THEME).highlight(code)
        text.rstrip()
        yield from self.fences[:1]
        for line in text.split(allow_blank=True):
            line.no_wrap = not self.nested and len(line) < 2 * options.max_width  # a longer one might fill the screen
            line.overflow = "ignore" if line.no_wrap else "fold"
            yield line
        yield from self.fences[1:]


class _Markdown(Markdown):
    elements = {  # noqa: RUF012  (as rich declares it)
        **Markdown.elements,
        **{"heading_open": _Heading, "list_item_open": _ListItem, "fence": _CodeBlock, "code_block": _CodeBlock},
    }


@contextlib.contextmanager
def _no_echo() -> Iterator[None]:
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    silent = list(before)
    silent[3] &= ~termios.ECHO
    try:
        termios.tcsetattr(terminal, termios.TCSANOW, silent)
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)
