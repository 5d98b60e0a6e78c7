"""Forecasts of routing. Nothing here yet; it will know no actor, engine or placement."""
