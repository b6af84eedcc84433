"""The layout editor: a page in the browser, and the server that it talks to."""

from collections.abc import Callable
from typing import Any


def edit(command: Any, make: Callable[..., Any]) -> int:
    """Serve --edit until Ctrl-C. command: tools.flags.Command; make: Pipeline."""
    from tools.editor.server import serve

    return serve(command, make)
