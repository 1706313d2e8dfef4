"""Metrics, normalizers, evaluators and reports."""
