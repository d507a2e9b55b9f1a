"""Where prepare's inputs come from: local paths, S3 objects, web addresses, the Hugging Face Hub.

This package copies sources to a local folder and computes their fingerprints. It does not interpret rows (data/) or
models (models/), and imports no training library, because the launcher pins sources, too.
"""
