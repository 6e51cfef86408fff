"""Adapters: one class per family of diffusion models, one interface (`cad.models.base`)."""
