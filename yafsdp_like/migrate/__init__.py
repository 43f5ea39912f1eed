"""What other libraries' configurations mean here."""
