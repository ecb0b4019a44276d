"""Where `regcache` begins: the commands take a second to import, in which Ctrl-C may come."""

import signal


def main() -> None:
    """Import the command line, then run it.

    Until it is there nothing has been written that would have to be cleared up: an interrupt ends
    the process at once, and not in a traceback out of some import.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    if before == signal.SIG_IGN:  # as nohup and shells start what runs in the background
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    from regcache.compiler.cli.main import main as run

    signal.signal(signal.SIGINT, before)
    run()
