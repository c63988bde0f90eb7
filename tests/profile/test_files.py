"""Files that are never seen half-written."""

import sys

from mlx_marlin.storage import atomic


def interrupted_at(line: int, path) -> bool:
    """Replace a file with an interrupt before the n-th line that runs; whether there were so many lines."""
    seen = 0

    def trace(frame, event, _):
        nonlocal seen
        if frame.f_code is not atomic.replace.__code__:
            return None
        seen += event == "line"
        if seen == line and event == "line":
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        atomic.replace(path, b"new")
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
