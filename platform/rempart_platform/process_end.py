"""The end of a process that has nothing left to do."""

import logging
import os
import sys
from typing import NoReturn


def end_process(code: int) -> NoReturn:
    """Ends this process at once, with what it said so far written.

    Python is not taken down first: obstore's threads may still be putting away what they have handed over, and one that
    then finds Python gone aborts the process, whose exit code would be that of a crash although all was done.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
