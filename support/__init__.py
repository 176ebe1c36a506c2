"""What every script needs and no paper describes."""
