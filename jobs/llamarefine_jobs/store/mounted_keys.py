"""The bucket's keys in a folder with one file per variable, as Kubernetes mounts a Secret.

The environment of a container keeps the keys with which it started. The files of a mounted Secret follow the Secret
within about a minute, so a client that reads them again gets the keys that replaced the refused ones.
"""

import os
from pathlib import Path

from llamarefine_jobs.contract.environment import BUCKET_KEYS
from llamarefine_jobs.untrusted.log_redaction import redact_secret

_REQUIRED = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_NAMES = (*_REQUIRED, "AWS_SESSION_TOKEN")


def read_mounted_keys() -> dict[str, str]:
    """Return the keys in the folder that the environment names, as arguments of boto3's Session.

    Returns no keys if no folder is named or if key or secret is missing in it: boto3 then looks for keys itself.
    Raises OSError if a file cannot be read.
    """
    folder = os.environ.get(BUCKET_KEYS)
    if not folder:
        return {}
    keys = {name: path.read_text().strip() for name in _NAMES if (path := Path(folder, name)).is_file()}
    if not all(keys.get(name) for name in _REQUIRED):
        return {}
    for secret in keys.values():
        redact_secret(secret)
    return {name.lower(): value for name, value in keys.items() if value}
