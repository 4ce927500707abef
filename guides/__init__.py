"""Guides: how the latents of a model are inferred. Copy one, or ``template.py``, and edit it."""
