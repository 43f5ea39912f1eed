"""A served model's weights: where they come from, and how they come to the device."""
