"""What each command does: a request in, events out; prints nothing."""
