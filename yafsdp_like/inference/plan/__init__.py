"""What a served model takes, before anything is allocated: integers only."""
