"""What the commands share; nothing in it is from a paper."""
