"""Semantics: which parameters form a unit, when a unit is gathered and released, and when its gradients are reduced."""
