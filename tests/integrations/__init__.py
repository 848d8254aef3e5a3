"""Overlays in other people's tools: transformers, PEFT, lm-eval, a hub."""
