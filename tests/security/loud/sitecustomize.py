"""On PYTHONPATH, this makes every library of a process log at DEBUG, whatever level the process sets."""

import http.client
import logging

logging.basicConfig(level=logging.DEBUG)
logging.Logger.isEnabledFor = lambda self, level: True  # type: ignore[method-assign]
logging.Logger.getEffectiveLevel = lambda self: logging.DEBUG  # type: ignore[method-assign]
http.client.HTTPConnection.debuglevel = 1
