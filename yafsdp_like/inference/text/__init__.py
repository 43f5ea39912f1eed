"""Text in and out of a served model."""
