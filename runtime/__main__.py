"""`vmad`, also as `python -m vmad_edge.runtime`."""

from __future__ import annotations

import os
import signal


def main() -> int:
    """`cli.main`, whose imports take a second or more: until they are done, a Ctrl-C ends the process without a word.

    Returns:
        As `cli.main`.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored, as by nohup
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from vmad_edge.runtime import cli

    return cli.main()


if __name__ == "__main__":
    raise SystemExit(main())
