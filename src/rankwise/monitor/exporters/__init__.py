"""A rank's monitor for others to read while it runs."""

from __future__ import annotations

from rankwise.monitor.exporters.prometheus import PrometheusExporter, serve_prometheus

__all__ = ["PrometheusExporter", "serve_prometheus"]
