"""What models and the sharded runtime share, and what knows neither: linear layers, a head's loss, split masters."""
