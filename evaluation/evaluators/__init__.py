"""The metric plug-ins; `base` has their contract."""
