"""Measurements of the cacheless policy on a cluster of processes of this machine."""
