"""What the API server's and the network's errors mean, in words that a person can act on."""

import re


def grant_advice(user: str, namespace: str) -> str:
    """What an admin types so that a user may do what the launcher asks for."""
    account = re.fullmatch(r"system:serviceaccount:([^:]+):([^:]+)", user)
    subject = f"--serviceaccount={account[1]}:{account[2]}" if account else f"--user={user}"
    return (
        f"an admin grants it: kubectl -n {namespace} create rolebinding llamarefine-user --role=llamarefine-driver "
        f"{subject}"
    )


def kubeconfig_error_text(context: str | None, error: Exception) -> str:
    """What is wrong with the kubeconfig, or with the context that was asked of it."""
    from kubernetes import config

    try:
        contexts, _ = config.list_kube_config_contexts()
    except Exception:
        return f"no cluster to talk to: {sentence(error)}; set KUBECONFIG, or log in to a cluster first"
    names = ", ".join(each["name"] for each in contexts) or "none"
    return f"the kubeconfig has no context `{context}`; there are {names}" if context else sentence(error)


def network_cause(error: BaseException) -> str:
    """What is behind an error of the network."""
    if "WRONG_VERSION_NUMBER" in str(error) or "record layer failure" in str(error):
        return "it does not speak TLS"
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return "its certificate is not of the authority that the kubeconfig names"
    reason = getattr(error, "reason", None) or error
    return sentence(str(reason).rpartition(": ")[2] or reason)


def sentence(error: object) -> str:
    """An error on one line."""
    return " ".join(str(error).split()) or type(error).__name__
