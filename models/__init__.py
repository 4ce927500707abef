"""Generative processes: what is assumed about cells. Copy one, or ``template.py``, and edit it."""
