"""The text files of a folder, and their words."""

from __future__ import annotations

import os
from collections.abc import Iterator
from io import FileIO
from operator import attrgetter

__all__ = ["text_files", "words_of"]

_CHUNK = 1 << 16
"""While so many bytes are split, no other thread runs, and Ctrl-C is not heard: a few milliseconds."""


def text_files(folder: str) -> Iterator[str]:
    """Yield the files below `folder` that are regular, not hidden, and without a NUL byte in their first 8 KiB.

    Symbolic links and hidden folders are not followed. What cannot be looked at is yielded too, be it a folder: who
    tries to count its words will learn why, and report it.
    """
    folders = [folder]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                shown = sorted((entry for entry in entries if entry.name[0] != "."), key=attrgetter("name"))
            files = [entry.path for entry in shown if entry.is_file(follow_symlinks=False)]
            folders += [entry.path for entry in reversed(shown) if entry.is_dir(follow_symlinks=False)]
        except OSError:
            yield folder
        else:
            yield from filter(_is_text, files)


def words_of(path: str) -> Iterator[list[bytes]]:
    """Yield the words of a file, as `bytes.split()` of the whole would, some at a time. Raises `OSError`."""
    begun: list[bytes] = []  # the pieces of a word that the next chunk may go on with
    with _open(path) as file:
        while chunk := file.read(_CHUNK):
            end = max(map(chunk.rfind, b" \t\n\r\v\f")) + 1
            if end:
                yield b"".join([*begun, chunk[:end]]).split()
                begun = []
            begun.append(chunk[end:])
    if words := b"".join(begun).split():
        yield words


def _is_text(path: str) -> bool:
    try:
        with _open(path) as file:
            return b"\0" not in (file.read(8192) or b"")
    except OSError:
        return True


def _open(path: str) -> FileIO:
    """Open a file, and never wait for the other end, should it have become a pipe since it was listed."""
    return open(path, "rb", buffering=0, opener=lambda path, flags: os.open(path, flags | getattr(os, "O_NONBLOCK", 0)))
