"""Many models on one device: asleep in host memory, awake on slabs that weights and pages share."""
