"""Semantics: units of parameters, when they are all-gathered and released, and when gradients are reduced."""
