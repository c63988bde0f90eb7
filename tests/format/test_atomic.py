"""Files that are never seen half-written."""

import sys

import pytest

from mlx_marlin.storage import atomic

# Everything of ours that runs while a file is written; contextlib's own lines are traced as well.
TRACED = {atomic.__file__, sys.modules["contextlib"].__file__}


def interrupted_at(line: int, path) -> bool:
    """Write a file with an interrupt before the n-th line that runs; whether there were so many lines."""
    seen = 0

    def trace(frame, event, _):
        nonlocal seen
        if frame.f_code.co_filename not in TRACED:
            return None
        seen += event == "line"
        if seen == line and event == "line":
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        atomic.write_bytes(path, b"new")
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_an_interrupt_at_any_line_leaves_nothing_behind(tmp_path):
    path, line = tmp_path / "profile.json", 1
    path.write_bytes(b"old")
    while interrupted_at(line, path):
        assert path.read_bytes() in (b"old", b"new")
        assert list(tmp_path.iterdir()) == [path]
        line += 1
    assert line > 5 and path.read_bytes() == b"new"


def test_an_exception_of_the_block_keeps_what_was_there(tmp_path):
    path = tmp_path / "new folder" / "file"
    atomic.write_text(path, "old \u00e9\n")
    with pytest.raises(ZeroDivisionError), atomic.writing(path) as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert list(path.parent.iterdir()) == [path] and path.read_bytes() == "old \u00e9\n".encode()


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    kept = tmp_path / "a.tmp"
    kept.write_bytes(b"")
    with atomic.writing(tmp_path / "file"):
        (beside,) = (p for p in tmp_path.iterdir() if p != kept)
        atomic.remove_leftovers(tmp_path)
        assert not beside.exists() and kept.exists()
        beside.write_bytes(b"for the renaming")
