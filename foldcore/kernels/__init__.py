"""Triton kernels, written once and launched by both tracks; nothing here knows their frameworks."""
