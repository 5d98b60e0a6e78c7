"""Forecasts of routing: which experts coming layers will ask for. Knows no actor, engine, placement or Ray."""
