"""The before/after report: metrics, confidence intervals, and the pages that show them.

This package loads no model: it computes everything from scores and manifests. The launcher reads report.json.
"""
