"""What it costs to survive, where nothing fails: two checkouts in turns, and the parts of a step."""
