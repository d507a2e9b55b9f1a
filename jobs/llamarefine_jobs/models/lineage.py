"""Whether an adapter belongs to the base and to the SFT policy that it is put on."""

from llamarefine_jobs.context import Context
from llamarefine_jobs.contract.artifact import Manifest, artifact_key, artifact_path, short
from llamarefine_jobs.contract.errors import IntegrityError
from llamarefine_jobs.contract.stages import STAGES


def check_lineage(context: Context, child: str, *origins: str) -> None:
    """Refuse an adapter that `child` did not train from this run's `origins`."""
    trained = context.parents[child]
    for origin in origins:
        if not _stems_from(trained, context.parents[origin], context):
            raise IntegrityError(
                f"the {child.upper()} adapter {short(trained.key)} was not trained from this run's {origin} "
                f"({short(context.parents[origin].key)}); to train it anew, remove "
                f"{context.store.uri}/{artifact_path(child, trained.key)} and run again"
            )


def _stems_from(child: Manifest, origin: Manifest, context: Context) -> bool:
    """Whether `child` was made from `origin`, or from one that held the same bytes where `child` reads it."""
    recorded = child.parents.get(origin.stage)
    if recorded is None:
        return False
    if recorded.manifest_sha256 == origin.sha256():
        return True
    reads = STAGES[child.stage].reads[origin.stage]
    earlier = context.store.manifest(origin.stage, recorded.key)
    if earlier is not None and earlier.sha256() == recorded.manifest_sha256:
        return earlier.content_sha256(*reads) == origin.content_sha256(*reads)
    # The origin was made anew or removed since. The child's key still says what bytes it read.
    lineage = {name: context.parents[name] for name in STAGES[child.stage].reads}
    return artifact_key(child.stage, context.recipe, lineage) == child.key
