"""The before/after report: metrics, confidence intervals, and the pages that show them.

This package computes from scores and manifests and loads no model. The launcher reads report.json.
"""
