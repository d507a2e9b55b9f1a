"""Errors of the API server and of the network, with messages that say what to do about them. Pure."""

import json
import re

from llamarefine_jobs.contract.errors import AccessError, LlamaRefineError

_FORBIDDEN = re.compile(
    r'User "(?P<user>[^"]+)" cannot (?P<verb>\S+) resource "(?P<resource>[^"]+)" in API group "(?P<group>[^"]*)"'
)


class RefusedError(Exception):
    """A response with a status of 400 to 499, except 429; its text is the server's message."""

    def __init__(self, status: int, body: bytes) -> None:
        try:
            message = str(json.loads(body)["message"])
        except (TypeError, ValueError, KeyError):
            message = body.decode(errors="replace")
        super().__init__(one_line(message))
        self.status = status


class UnauthenticatedError(AccessError):
    """401: the server does not know these credentials. A starting API server also returns this."""


class ForbiddenError(AccessError):
    """403: the user lacks a permission. A starting API server also returns this."""


class GoneError(AccessError):
    """410: the server no longer has the requested resource version."""


def error_from_response(refused: RefusedError, namespace: str) -> LlamaRefineError:
    """Return the LlamaRefineError that a refused request raises."""
    match refused.status:
        case 401:
            return UnauthenticatedError(
                "the API server does not accept these credentials (401): the token may have expired; log in to "
                "the cluster again"
            )
        case 403:
            return _forbidden_error(str(refused), namespace)
        case 404:
            return AccessError(f"the cluster has no such resource: {refused}")
        case 410:
            return GoneError(str(refused))
        case status:
            return LlamaRefineError(f"the API server refused ({status}): {refused}")


def _forbidden_error(message: str, namespace: str) -> AccessError:
    found = _FORBIDDEN.search(message)
    if not found:  # a quota or an admission rule; the server's own message is the most precise
        return AccessError(f"the cluster forbids it: {one_line(message)}")
    what = found["resource"] + (f".{found['group']}" if found["group"] else "")
    return ForbiddenError(
        f"{found['user']} may not {found['verb']} {what} in namespace {namespace}; "
        f"{grant_advice(found['user'], namespace)}"
    )


def grant_advice(user: str, namespace: str) -> str:
    """Return the command by which an admin grants a user the launcher's permissions."""
    account = re.fullmatch(r"system:serviceaccount:([^:]+):([^:]+)", user)
    subject = f"--serviceaccount={account[1]}:{account[2]}" if account else f"--user={user}"
    return (
        f"an admin grants it: kubectl -n {namespace} create rolebinding llamarefine-user --role=llamarefine-driver "
        f"{subject}"
    )


def network_cause(error: BaseException) -> str:
    """Return the root cause of a network error, on one line."""
    if "WRONG_VERSION_NUMBER" in str(error) or "record layer failure" in str(error):
        return "it does not speak TLS"
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return "its certificate is not signed by the authority that the kubeconfig names"
    reason = getattr(error, "reason", None) or error
    return one_line(str(reason).rpartition(": ")[2] or reason)


def one_line(error: object) -> str:
    """Return an error's text on one line; its class name if it has no text."""
    return " ".join(str(error).split()) or type(error).__name__
