"""Where prepare's inputs come from: local paths, S3 objects, web addresses, the Hugging Face Hub.

Copies sources to a local folder and fingerprints them. Does not interpret rows (data/) or models (models/), and imports
no training library: the launcher pins sources, too.
"""
