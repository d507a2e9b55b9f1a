"""Environment variables that a stage reads and that whoever starts it sets: an executor, an agent, an image."""

WORK_FOLDER = "LLAMAREFINE_WORK"  # where temporary folders are created; the system's place if not set
TERMINATION_MESSAGE = "LLAMAREFINE_TERMINATION_MESSAGE"  # file for the last message; Kubernetes' file if not set
STOP_AT_EOF = "LLAMAREFINE_STOP_AT_EOF"  # "1": the end of standard input, which the launcher holds open, is a SIGTERM
BUCKET_KEYS = "LLAMAREFINE_BUCKET_KEYS"  # folder with the bucket's keys, one file per variable: a mounted Secret
GIVE_UP_VARIABLE = "LLAMAREFINE_GIVE_UP_AFTER_S"  # how long one outage is retried; contract/retry.py reads it
OOM_VARIABLE = "LLAMAREFINE_RAN_OUT_AT_ROWS"  # JSON list of micro-batches, in rows, that were too large for the memory
SHARED_FOLDER = "LLAMAREFINE_GROUP"  # the folder that an agent shares with its workers; only workers have it
GIT_COMMIT = "LLAMAREFINE_GIT_COMMIT"  # set by the images, recorded in the manifest
IMAGE_DIGEST = "LLAMAREFINE_IMAGE_DIGEST"  # recorded in the manifest
EXPECTED_KEY = "LLAMAREFINE_EXPECTED_KEY"  # key of the artifact that the driver wants; the stage makes no other

RENDEZVOUS_PORT = 29500  # where the processes of a training meet unless MASTER_PORT is set; torchrun's default, too
