"""On PYTHONPATH: every library of the process tells all it has to tell, and nothing can hold it to less."""

import http.client
import logging

logging.basicConfig(level=logging.DEBUG)
logging.Logger.isEnabledFor = lambda self, level: True  # type: ignore[method-assign]
logging.Logger.getEffectiveLevel = lambda self: logging.DEBUG  # type: ignore[method-assign]
http.client.HTTPConnection.debuglevel = 1
