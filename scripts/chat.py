"""A chat with a model in the terminal: the same as `cupaged chat`."""

import sys

from cupaged.cli import main

if __name__ == "__main__":
    sys.exit(main(["chat", *sys.argv[1:]]))
