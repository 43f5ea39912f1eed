"""What is known of units before any memory is there: schedules, layouts and plans. Pure functions, frozen values."""
