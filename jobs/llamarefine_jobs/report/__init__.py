"""The before/after report: metrics, confidence intervals, and the pages that show them.

Computes from scores and manifests; loads no model itself. report.json is what the launcher reads.
"""
